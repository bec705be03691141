//! The commands: one table, in which each has a name, an argument structure, and a handler.
//!
//! A command is added by one line in a `register` function. *Quick* commands answer from state that
//! is at hand and run on the control socket's own thread, so they must not wait for the guest, for
//! a file, or for a lock that is held while somebody else does. Everything else is *slow* and runs
//! on a thread of its own. A handler that panics becomes an error reply.

mod deadline;
mod descriptors;
mod dump;
mod hex;
mod machine;
mod monitor;
mod number;
mod queries;
mod services;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

pub use deadline::DeadlineArgument;
pub use hex::HexArgument;
pub use number::NumberArgument;
pub use services::{Context, Kept, Services, StopRecord};

use super::dump::VmcoreinfoSource;
use super::protocol::{QmpError, Reason, Request, SESSION_COMMANDS, from_arguments};

/// Where a command runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Speed {
    /// On the control socket's thread.
    Quick,
    /// On a thread of its own.
    Slow,
}

/// A command that takes no arguments.
#[derive(serde::Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub struct NoArguments {}

/// The answer of a command that has nothing to say: `{}`.
#[derive(serde::Serialize, Debug)]
pub struct Done {}

type Handler = Box<dyn Fn(&Context, Map<String, Value>) -> Result<Value, QmpError> + Send + Sync>;

struct Command {
    speed: Speed,
    handler: Handler,
}

/// All commands by name.
#[derive(Default)]
pub struct Registry {
    commands: BTreeMap<&'static str, Command>,
    /// A long answer takes many times its length until it is text: one is made at a time.
    making: Arc<Mutex<()>>,
}

/// The standard commands. `vmcoreinfo` finds the guest kernel's crash information for dumps.
#[must_use]
pub fn standard(vmcoreinfo: VmcoreinfoSource) -> Registry {
    let mut registry = Registry::default();
    queries::register(&mut registry);
    machine::register(&mut registry);
    descriptors::register(&mut registry);
    dump::register(&mut registry, vmcoreinfo);
    monitor::register(&mut registry);
    registry
}

impl Registry {
    /// Adds a quick command.
    pub fn quick<A, R, F>(&mut self, name: &'static str, handler: F)
    where
        A: DeserializeOwned,
        R: Serialize,
        F: Fn(&Context, A) -> Result<R, QmpError> + Send + Sync + 'static,
    {
        self.add(name, Speed::Quick, handler);
    }

    /// Adds a slow command.
    pub fn slow<A, R, F>(&mut self, name: &'static str, handler: F)
    where
        A: DeserializeOwned,
        R: Serialize,
        F: Fn(&Context, A) -> Result<R, QmpError> + Send + Sync + 'static,
    {
        self.add(name, Speed::Slow, handler);
    }

    fn add<A, R, F>(&mut self, name: &'static str, speed: Speed, handler: F)
    where
        A: DeserializeOwned,
        R: Serialize,
        F: Fn(&Context, A) -> Result<R, QmpError> + Send + Sync + 'static,
    {
        let making = Arc::clone(&self.making);
        let handler: Handler = Box::new(move |context, arguments| {
            let answer = handler(context, from_arguments(arguments)?)?;
            let _one = (speed == Speed::Slow)
                .then(|| making.lock().unwrap_or_else(PoisonError::into_inner));
            serde_json::to_value(answer)
                .map_err(|error| QmpError::new(Reason::Internal, error.to_string()))
        });
        self.commands.insert(name, Command { speed, handler });
    }

    /// Adds `query-commands`, which lists every command that is there by now.
    pub(super) fn complete(mut self) -> Self {
        let mut names: Vec<&str> = self.commands.keys().copied().collect();
        names.extend(SESSION_COMMANDS);
        names.push("query-commands");
        names.sort_unstable();
        let list: Vec<_> = names
            .into_iter()
            .map(|name| serde_json::json!({ "name": name }))
            .collect();
        self.quick("query-commands", move |_, _: NoArguments| Ok(list.clone()));
        self
    }

    pub(super) fn speed(&self, name: &str) -> Option<Speed> {
        self.commands.get(name).map(|command| command.speed)
    }

    /// Runs a command on this thread.
    pub(super) fn run(&self, context: &Context, request: Request) -> Result<Value, QmpError> {
        let Some(command) = self.commands.get(request.command.as_str()) else {
            return Err(QmpError::no_such_command(&request.command));
        };
        let handled = catch_unwind(AssertUnwindSafe(|| {
            (command.handler)(context, request.arguments)
        }));
        handled.unwrap_or_else(|_| {
            tracing::error!(command = request.command, "a command panicked");
            Err(QmpError::new(
                Reason::Internal,
                "the command failed inside the VMM; its log has the details",
            ))
        })
    }
}
