//! `dump-guest-memory` and `query-dump`, in QEMU's shapes.
//!
//! Paging and formats other than ELF are not offered. As in QEMU, `fd:NAME` uses the descriptor up,
//! DUMP_COMPLETED is sent whether or not the dump was detached, and comes before the answer. A dump
//! that is not detached is given up when its client goes away, and any when the VMM ends.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use super::{Context, DeadlineArgument, Done, NoArguments, Registry};
use crate::control::dump::{
    self, DumpError, Progress, Range, Running, Target, TargetError, VmcoreinfoSource,
};
use crate::control::protocol::{Notice, QmpError, Reason};
use patcher::guest::RamRange;

#[derive(serde::Deserialize, Debug)]
#[serde(rename_all = "lowercase")]
enum Format {
    Elf,
}

#[derive(serde::Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct Dump {
    paging: bool,
    protocol: String,
    #[serde(default)]
    detach: Option<bool>,
    begin: Option<u64>,
    length: Option<u64>,
    #[serde(rename = "format")]
    _format: Option<Format>,
    /// Ours: how long to wait for the guest to stop.
    #[serde(default)]
    deadline: DeadlineArgument,
}

pub(super) fn register(registry: &mut Registry, vmcoreinfo: VmcoreinfoSource) {
    registry.slow("dump-guest-memory", move |context, arguments: Dump| {
        start(context, &arguments, &vmcoreinfo)
    });
    registry.quick("query-dump", |context, _: NoArguments| {
        Ok::<Progress, QmpError>(context.services.dump().progress())
    });
    registry.quick("query-dump-guest-memory-capability", |_, _: NoArguments| {
        Ok::<Value, QmpError>(json!({ "formats": ["elf"] }))
    });
}

fn invalid(text: &str) -> QmpError {
    QmpError::new(Reason::InvalidArgument, text)
}

fn part(arguments: &Dump) -> Result<Option<Range>, QmpError> {
    let missing = |name: &str| QmpError::new(Reason::MissingArgument, name);
    match (arguments.begin, arguments.length) {
        (None, None) => Ok(None),
        (Some(_), None) => Err(missing("length")),
        (None, Some(_)) => Err(missing("begin")),
        (Some(begin), Some(length)) => match Range::new(begin, length) {
            None => Err(invalid("length: 0, or it reaches beyond 2^64")),
            range => Ok(range),
        },
    }
}

fn start(
    context: &Context,
    arguments: &Dump,
    vmcoreinfo: &VmcoreinfoSource,
) -> Result<Done, QmpError> {
    if arguments.paging {
        return Err(invalid(
            "paging: only false; debuggers find their way by VMCOREINFO",
        ));
    }
    let ram: Vec<RamRange> = context
        .services
        .host()
        .regions()
        .iter()
        .map(|region| RamRange {
            start: region.start,
            len: region.len,
        })
        .collect();
    let ranges = dump::select(&ram, part(arguments)?).map_err(|e| answer_for(&e))?;
    let total = ranges.iter().map(|range| range.len).sum();
    let running = context.services.dump().begin(total).ok_or_else(|| {
        let text = "a dump is being written; query-dump tells how far it is";
        QmpError::new(Reason::Busy, text)
    })?;
    let target = match open(context, &arguments.protocol) {
        Ok(target) => target,
        Err(error) => {
            running.withdraw();
            return Err(error);
        }
    };
    let job = Job {
        context: Context::new(Arc::clone(&context.services), Arc::clone(&context.peer)),
        detached: arguments.detach.unwrap_or(false),
        deadline: arguments.deadline,
        ranges,
        vmcoreinfo: Arc::clone(vmcoreinfo),
    };
    if !job.detached {
        return job.run(target, running).map(|()| Done {});
    }
    let services = Arc::clone(&context.services);
    let started = services.workers().run(Box::new(move || {
        // Whoever started it learns the outcome from the event or from query-dump.
        let _ = job.run(target, running);
    }));
    started.map(|()| Done {}).map_err(|error| {
        let text = format!("no thread for the dump: {error}");
        QmpError::new(Reason::Internal, text)
    })
}

fn open(context: &Context, protocol: &str) -> Result<Target, QmpError> {
    let target = match protocol.split_once(':') {
        Some(("fd", name)) => {
            let passed = context.peer.take_descriptor(name)?;
            let fd = passed.fd().try_clone().map_err(TargetError::from);
            fd.and_then(Target::descriptor)
        }
        Some(("file", path)) if !path.is_empty() => Target::create(Path::new(path)),
        _ => return Err(invalid("protocol: file:PATH or fd:NAME")),
    };
    target.map_err(|error| answer_for(&error.into()))
}

struct Job {
    context: Context,
    detached: bool,
    deadline: DeadlineArgument,
    ranges: Vec<RamRange>,
    vmcoreinfo: VmcoreinfoSource,
}

impl Job {
    fn run(&self, mut target: Target, running: Running) -> Result<(), QmpError> {
        let services = &self.context.services;
        let cancelled = || {
            let gone = !self.detached && self.context.peer.is_gone();
            gone || services.dump().is_given_up()
        };
        let vmcoreinfo = (self.vmcoreinfo)();
        let stopped =
            services.while_stopped("dump-guest-memory", self.deadline.or_usual(), |guest| {
                let info = vmcoreinfo.as_ref();
                dump::write(guest, &self.ranges, info, &mut target, &running, &cancelled)
            });
        let result = match stopped {
            Ok((written, _)) => written.map_err(|error| answer_for(&error)),
            Err(error) => Err(error),
        };
        if result.is_err() {
            target.discard();
        }
        let progress = running.end(result.is_ok());
        let mut data = json!({ "result": progress });
        if let Err(error) = &result {
            data["error"] = Value::from(error.to_string());
        }
        services.announce(Notice::standard("DUMP_COMPLETED", data));
        result
    }
}

fn answer_for(error: &DumpError) -> QmpError {
    let reason = match error {
        DumpError::Target(TargetError::Stalled) => Reason::Deadline,
        DumpError::Target(TargetError::Cancelled) => Reason::Cancelled,
        DumpError::Target(TargetError::NoPlace) => Reason::InvalidArgument,
        DumpError::Target(_) => Reason::Io,
        DumpError::Registers(_) | DumpError::Memory(_) => Reason::Internal,
        DumpError::NoMemory(_) => Reason::InvalidArgument,
    };
    QmpError::new(reason, error.to_string())
}
