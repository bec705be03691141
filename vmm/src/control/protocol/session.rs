//! One connection's side of the conversation.

use serde_json::{Value, json};

use super::arguments::from_arguments;
use super::error::{QmpError, Reason};
use super::notice::{Audience, Notice};
use super::request::{self, Request};
use super::splitter::{Limits, Splitter, SyntaxError};

/// What the greeting and `query-version` say. Clients expect QEMU's triple and show it; who we are
/// goes into the package string.
#[derive(Clone, Copy, Debug)]
pub struct Version;

/// The QEMU release whose command shapes we follow.
const QEMU: [u32; 3] = [9, 0, 0];

impl Version {
    /// The value that `query-version` returns.
    #[must_use]
    pub fn to_value(self) -> Value {
        let [major, minor, micro] = QEMU;
        json!({
            "qemu": { "major": major, "minor": minor, "micro": micro },
            "package": format!("Stillpoint {}", env!("CARGO_PKG_VERSION")),
        })
    }
}

/// What a session wants done next.
#[derive(Clone, PartialEq, Debug)]
pub enum Step {
    /// Run this command, then call [`Session::finish`].
    Execute(Request),
    /// Send these bytes; nothing is to be run.
    Send(Vec<u8>),
}

#[derive(Clone, PartialEq, Debug)]
enum Mode {
    /// Only `qmp_capabilities` is taken.
    Negotiation,
    /// Ready for the next request.
    Ready,
    /// A command runs; this is the id to answer to.
    Executing(Option<Value>),
}

/// See the module's documentation. Ordering law: [`Session::next`] gives nothing while a command
/// runs; [`Session::finish`] ends it.
#[derive(Debug)]
pub struct Session {
    splitter: Splitter,
    mode: Mode,
    own_events: bool,
}

/// Commands that the session itself carries out.
pub const SESSION_COMMANDS: [&str; 2] = ["qmp_capabilities", "events-enable"];

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Capabilities {
    #[serde(default)]
    enable: Vec<String>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct EventsEnable {
    enable: Option<bool>,
}

impl Session {
    /// A connection that was just made.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            splitter: Splitter::new(limits),
            mode: Mode::Negotiation,
            own_events: false,
        }
    }

    /// What to send first.
    #[must_use]
    pub fn greeting() -> Vec<u8> {
        line(&json!({ "QMP": { "version": Version.to_value(), "capabilities": [] } }))
    }

    /// How many bytes of an unfinished request are kept.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.splitter.kept()
    }

    /// True while a command runs.
    #[must_use]
    pub fn executing(&self) -> bool {
        matches!(self.mode, Mode::Executing(_))
    }

    /// Takes bytes off the front of `input` until there is something to do. `None` when all were
    /// taken, or when a command runs and the rest has to wait.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Step> {
        if self.executing() {
            return None;
        }
        let parsed = match self.splitter.next(input)? {
            Ok(value) => request::parse(value),
            Err(error) => return Some(Step::Send(reply(None, Err(syntax(&error))))),
        };
        let id = parsed.id;
        let result = match parsed.request {
            Ok(request) => self.begin(request),
            Err(error) => Err(error),
        };
        Some(match result {
            Ok(Begun::Done) => Step::Send(reply(id, Ok(json!({})))),
            Ok(Begun::Run(request)) => {
                self.mode = Mode::Executing(id);
                Step::Execute(request)
            }
            Err(error) => Step::Send(reply(id, Err(error))),
        })
    }

    /// Drops an unfinished request, because all clients together keep too much.
    pub fn refuse_unfinished(&mut self) -> Vec<u8> {
        self.splitter.give_up();
        reply(
            None,
            Err(QmpError::new(
                Reason::TooLarge,
                "clients are sending too many long requests at once: send it again later",
            )),
        )
    }

    fn begin(&mut self, request: Request) -> Result<Begun, QmpError> {
        match (request.command.as_str(), &self.mode) {
            ("qmp_capabilities", Mode::Negotiation) => {
                let wanted: Capabilities = from_arguments(request.arguments)?;
                if let Some(name) = wanted.enable.first() {
                    let shown: String = name.chars().take(64).collect();
                    return Err(QmpError::new(
                        Reason::InvalidArgument,
                        format!("capability {shown:?} was not offered in the greeting"),
                    ));
                }
                self.mode = Mode::Ready;
                Ok(Begun::Done)
            }
            (_, Mode::Negotiation) => Err(QmpError::command(
                Reason::Negotiation,
                "send qmp_capabilities first",
            )),
            ("qmp_capabilities", _) => Err(QmpError::command(
                Reason::Negotiation,
                "capabilities were negotiated already",
            )),
            ("events-enable", _) => {
                let wanted: EventsEnable = from_arguments(request.arguments)?;
                self.own_events = wanted.enable.unwrap_or(true);
                Ok(Begun::Done)
            }
            _ => Ok(Begun::Run(request)),
        }
    }

    /// Ends the command that runs; the answer is the bytes to send. Empty when none runs.
    pub fn finish(&mut self, result: Result<Value, QmpError>) -> Vec<u8> {
        match std::mem::replace(&mut self.mode, Mode::Ready) {
            Mode::Executing(id) => reply(id, result),
            other => {
                self.mode = other;
                Vec::new()
            }
        }
    }

    /// Whether this connection is told: nothing before it has negotiated, and our own events only
    /// when it asked for them.
    #[must_use]
    pub fn wants(&self, notice: &Notice) -> bool {
        self.mode != Mode::Negotiation
            && (self.own_events || notice.audience() == Audience::Everybody)
    }
}

enum Begun {
    Done,
    Run(Request),
}

fn syntax(error: &SyntaxError) -> QmpError {
    let reason = match error {
        SyntaxError::TooLarge { .. } | SyntaxError::TooDeep { .. } => Reason::TooLarge,
        _ => Reason::Syntax,
    };
    QmpError::new(reason, error.to_string())
}

fn reply(id: Option<Value>, result: Result<Value, QmpError>) -> Vec<u8> {
    let mut message = serde_json::Map::new();
    match result {
        Ok(value) => message.insert("return".to_owned(), value),
        Err(error) => message.insert("error".to_owned(), error.to_value()),
    };
    if let Some(id) = id {
        message.insert("id".to_owned(), id);
    }
    line(&Value::Object(message))
}

pub(super) fn line(message: &Value) -> Vec<u8> {
    let mut bytes = message.to_string().into_bytes();
    bytes.extend_from_slice(b"\r\n");
    bytes
}

#[cfg(test)]
mod tests;
