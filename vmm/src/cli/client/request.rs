//! From the command line to QMP.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::connection::ClientError;
use super::render;
use crate::cli::args::{
    CallbackOptions, ClientCommand, GpCommand, PatchCommand, ProbeCommand, ReturnOptions,
    StepsCommand, TextCommand, TracepointCommand, VcpuCommand,
};
use crate::cli::values::Deadline;

/// What a command line asks for.
pub(super) enum Task {
    /// One request and its answer.
    Ask(Request),
    /// Events until the VMM ends.
    Events,
    /// The end of the VMM, waited for.
    Quit,
    /// A core file that the client makes.
    Dump {
        file: PathBuf,
        /// Begin and length.
        part: Option<(u64, u64)>,
    },
}

/// A command for the VMM, and how to show what it answers.
pub(super) struct Request {
    pub(super) command: &'static str,
    pub(super) arguments: Value,
    pub(super) show: fn(&Value) -> String,
}

fn ask(command: &'static str, arguments: Value) -> Request {
    Request {
        command,
        arguments: without_absent(arguments),
        show: render::anything,
    }
}

/// Options that were not given are not sent.
fn without_absent(arguments: Value) -> Value {
    match arguments {
        Value::Object(members) => {
            let given: Map<_, _> = members.into_iter().filter(|(_, v)| !v.is_null()).collect();
            Value::Object(given)
        }
        other => other,
    }
}

/// The VMM has its own working directory.
fn absolute(path: &Path) -> Result<String, ClientError> {
    let failed = |source| ClientError::File {
        path: path.to_owned(),
        source,
    };
    let whole: PathBuf = std::fs::canonicalize(path).map_err(failed)?;
    whole.into_os_string().into_string().map_err(|_| {
        failed(std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            "the path is not UTF-8",
        ))
    })
}

impl Task {
    pub(super) fn of(command: ClientCommand) -> Result<Self, ClientError> {
        use ClientCommand as C;
        let shown = |command, arguments, show| Request {
            show,
            ..ask(command, arguments)
        };
        Ok(Self::Ask(match command {
            C::Events => return Ok(Self::Events),
            C::Quit => return Ok(Self::Quit),
            C::Dump {
                file,
                begin,
                length,
            } => {
                let part = begin.zip(length);
                return Ok(Self::Dump { file, part });
            }
            C::Status => shown("query-status", Value::Null, render::status),
            C::Pause { deadline } => {
                let deadline = deadline.map(|d| d.as_millis());
                shown("pause", json!({ "deadline": deadline }), render::paused)
            }
            C::Resume => shown("resume", Value::Null, render::resumed),
            C::Powerdown => shown("system_powerdown", Value::Null, |_| {
                "power button pressed".to_owned()
            }),
            C::Reset => shown("system_reset", Value::Null, |_| "reset".to_owned()),
            C::Cpus => shown("query-vcpus", Value::Null, render::vcpus),
            C::Inspect(_) => shown("inspect-text", Value::Null, render::inspected_text),
            C::Kernel => shown("query-kernel", Value::Null, render::kernel),
            C::Symbols {
                pattern,
                module,
                limit,
            } => shown(
                "query-symbols",
                json!({ "pattern": pattern, "module": module, "limit": limit }),
                render::symbols,
            ),
            C::Tasks { pid } => shown("query-tasks", json!({ "pid": pid }), render::tasks),
            C::Modules => shown("query-modules", Value::Null, render::modules),
            C::Stacks { pid } => shown("query-stacks", json!({ "pid": pid }), render::stacks),
            C::Text(command) => text(command)?,
            C::Patch(command) => patch(command)?,
            C::Probe(command) => probe(command)?,
            C::Tracepoint(command) => tracepoint(command)?,
            C::Trampolines => shown("query-trampolines", Value::Null, render::trampolines),
            C::Holdouts => shown("query-holdouts", Value::Null, render::holdouts),
            C::Gp(GpCommand::Snapshot) => shown("gp-snapshot", Value::Null, render::cookie),
            C::Gp(GpCommand::Poll { cookie }) => {
                shown("gp-poll", json!({ "cookie": cookie }), render::passed)
            }
            C::Gp(GpCommand::Wait { cookie, deadline }) => {
                let deadline = deadline.map(|d| d.as_millis());
                let arguments = json!({ "cookie": cookie, "deadline": deadline });
                shown("gp-wait", arguments, render::passed)
            }
            C::Vcpu(command) => vcpu(command),
            C::Steps(command) => steps(command)?,
        }))
    }
}

fn text(command: TextCommand) -> Result<Request, ClientError> {
    let show: fn(&Value) -> String = match command {
        TextCommand::Patch { .. } | TextCommand::Redirect { .. } => render::changed,
        TextCommand::Revert { .. } => render::reverted,
        TextCommand::List => render::text_list,
    };
    let request = match command {
        TextCommand::Patch {
            site,
            expect,
            write,
            force,
            deadline,
        } => ask(
            "text-patch",
            json!({
                "site": site.0,
                "expect": expect.to_string(),
                "write": write.to_string(),
                "force": force.then_some(true),
                "deadline": deadline.map(|d| d.as_millis()),
            }),
        ),
        TextCommand::Revert { id, deadline } => ask(
            "text-revert",
            json!({ "id": id, "deadline": deadline.map(|d| d.as_millis()) }),
        ),
        TextCommand::Redirect {
            site,
            object,
            code,
            entry,
            deadline,
        } => ask(
            "text-redirect",
            json!({
                "site": site.0,
                "object": object.as_deref().map(absolute).transpose()?,
                "code": code.map(|c| c.to_string()),
                "entry": entry,
                "deadline": deadline.map(|d| d.as_millis()),
            }),
        ),
        TextCommand::List => ask("query-text", Value::Null),
    };
    Ok(Request { show, ..request })
}

fn patch(command: PatchCommand) -> Result<Request, ClientError> {
    Ok(match command {
        PatchCommand::Check { file } => ask("patch-check", json!({ "file": absolute(&file)? })),
        PatchCommand::Apply { file, deadline } => ask(
            "patch-apply",
            json!({ "file": absolute(&file)?, "deadline": deadline.map(|d| d.as_millis()) }),
        ),
        PatchCommand::Revert { id, deadline } => ask(
            "patch-revert",
            json!({ "id": id, "deadline": deadline.map(|d| d.as_millis()) }),
        ),
        PatchCommand::List => ask("query-patches", Value::Null),
        PatchCommand::Show { id } => ask("query-patches", json!({ "id": id })),
    })
}

fn probe(command: ProbeCommand) -> Result<Request, ClientError> {
    let show: fn(&Value) -> String = match command {
        ProbeCommand::Attach { .. } => render::attached,
        ProbeCommand::Histogram { .. } => render::histogram,
        ProbeCommand::Records { .. } => render::records,
        ProbeCommand::Detach { .. } => render::detached,
        ProbeCommand::List => render::probes,
    };
    let request = match command {
        ProbeCommand::Attach {
            mut sites,
            callback,
            returns,
            permanent,
            deadline,
        } => {
            let place = match (sites.pop(), sites.is_empty()) {
                (Some(only), true) => ("site", json!(only.0)),
                (last, _) => {
                    let all = sites.into_iter().chain(last).map(|site| site.0);
                    ("sites", all.collect())
                }
            };
            let arguments = attach(place, *callback, returns, permanent, deadline)?;
            ask("probe-attach", arguments)
        }
        ProbeCommand::Detach { ids, deadline } => {
            let (name, which) = match ids.as_slice() {
                [id] => ("id", json!(id)),
                all => ("ids", json!(all)),
            };
            ask(
                "probe-detach",
                json!({ name: which, "deadline": deadline.map(|d| d.as_millis()) }),
            )
        }
        ProbeCommand::List => ask("query-probes", Value::Null),
        ProbeCommand::Histogram { id } => ask("query-histogram", json!({ "id": id })),
        ProbeCommand::Records { id, since } => {
            ask("query-records", json!({ "id": id, "since": since }))
        }
    };
    Ok(Request { show, ..request })
}

/// What a probe or a callback on a tracepoint is asked to do.
fn attach(
    (place, at): (&str, Value),
    options: CallbackOptions,
    returns: ReturnOptions,
    permanent: bool,
    deadline: Option<Deadline>,
) -> Result<Value, ClientError> {
    let kind = match (&options.histogram, &options.record, returns.latency) {
        (Some(_), ..) => Some("histogram"),
        (_, Some(_), _) => Some("record"),
        (.., true) => Some("latency"),
        _ => None,
    };
    let registers = options.histogram.map(|register| vec![register]);
    let yes = |given: bool| given.then_some(true);
    Ok(json!({
        place: at,
        "callback": kind,
        "object": options.callback.as_deref().map(absolute).transpose()?,
        "entry": options.entry,
        "may-sleep": yes(options.may_sleep),
        "needs-rcu": yes(options.needs_rcu),
        "nmi": yes(options.nmi),
        "registers": registers.or(options.record),
        "records": options.records,
        "return": yes(returns.returned || returns.latency),
        "if": options.only_if,
        "if-called": returns.if_called,
        "stack-words": returns.stack_words,
        "permanent": yes(permanent),
        "data": options.data,
        "priority": options.priority,
        "deadline": deadline.map(|d| d.as_millis()),
    }))
}

fn steps(command: StepsCommand) -> Result<Request, ClientError> {
    Ok(match command {
        StepsCommand::Apply { file, deadline } => {
            let failed = |source| ClientError::File {
                path: file.clone(),
                source,
            };
            let text = std::fs::read_to_string(&file).map_err(failed)?;
            let mut asked: Value = serde_json::from_str(&text).map_err(|e| failed(e.into()))?;
            for object in objects(&mut asked) {
                if let Some(path) = object.as_str() {
                    *object = json!(absolute(&beside(&file, path))?);
                }
            }
            if let (Some(members), Some(deadline)) = (asked.as_object_mut(), deadline) {
                members.insert("deadline".into(), json!(deadline.as_millis()));
            }
            ask("steps-apply", asked)
        }
        StepsCommand::Revert { id, deadline } => {
            let deadline = deadline.map(|d| d.as_millis());
            ask("steps-revert", json!({"id": id, "deadline": deadline}))
        }
        StepsCommand::Cancel { id } => ask("steps-cancel", json!({ "id": id })),
        StepsCommand::List => ask("query-steps", json!({})),
    })
}

/// The object files that steps name.
fn objects(steps: &mut Value) -> impl Iterator<Item = &mut Value> {
    fn redirects(step: &mut Value) -> Option<&mut Vec<Value>> {
        step.get_mut("redirect")?.as_array_mut()
    }
    let steps = steps.get_mut("steps").and_then(Value::as_array_mut);
    let all = steps.into_iter().flatten().filter_map(redirects).flatten();
    all.filter_map(|redirect| redirect.get_mut("object"))
}

/// A path that is given in a file: it begins where that is.
fn beside(file: &Path, path: &str) -> PathBuf {
    file.parent().unwrap_or(Path::new("")).join(path)
}

fn vcpu(command: VcpuCommand) -> Request {
    match command {
        VcpuCommand::Hold {
            index,
            at,
            soft,
            no_wait,
            deadline,
        } => Request {
            show: render::held,
            ..ask(
                "vcpu-hold",
                json!({
                    "vcpu": index,
                    "at": at.map(|s| s.0),
                    "soft": soft.then_some(true),
                    "wait": no_wait.then_some(false),
                    "deadline": deadline.map(|d| d.as_millis()),
                }),
            )
        },
        VcpuCommand::Release { index } => Request {
            show: render::released,
            ..ask("vcpu-release", json!({ "vcpu": index }))
        },
    }
}

fn tracepoint(command: TracepointCommand) -> Result<Request, ClientError> {
    Ok(match command {
        TracepointCommand::Attach {
            name,
            callback,
            deadline,
        } => {
            let arguments = attach(
                ("name", json!(name)),
                callback,
                ReturnOptions::default(),
                false,
                deadline,
            )?;
            let request = ask("tracepoint-attach", arguments);
            Request {
                show: render::traced,
                ..request
            }
        }
        TracepointCommand::Detach { id, deadline } => {
            let request = ask(
                "tracepoint-detach",
                json!({ "id": id, "deadline": deadline.map(|d| d.as_millis()) }),
            );
            Request {
                show: render::traced,
                ..request
            }
        }
        TracepointCommand::List => Request {
            show: render::tracepoints,
            ..ask("query-tracepoints", Value::Null)
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Cli, Command};
    use clap::Parser;

    fn request(line: &str) -> (&'static str, Value) {
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap_or_else(|e| panic!("{e}"));
        let Command::Client(command) = cli.command else {
            panic!("{line}: not a client's command");
        };
        match Task::of(command).unwrap_or_else(|e| panic!("{line}: {e}")) {
            Task::Ask(request) => (request.command, request.arguments),
            _ => panic!("{line}: not a single request"),
        }
    }

    #[test]
    fn commands_become_requests() {
        for (line, command, arguments) in [
            ("stillpoint status", "query-status", json!(null)),
            ("stillpoint pause", "pause", json!({})),
            (
                "stillpoint pause --deadline 2s",
                "pause",
                json!({"deadline": 2000}),
            ),
            (
                "stillpoint text patch f+4 --expect 90:90 --write cccc",
                "text-patch",
                json!({"site": "f+4", "expect": "9090", "write": "cccc"}),
            ),
            (
                "stillpoint text patch f --expect 90 --write cc --force --deadline 1s",
                "text-patch",
                json!({"site": "f", "expect": "90", "write": "cc", "force": true, "deadline": 1000}),
            ),
            ("stillpoint text revert 3", "text-revert", json!({"id": 3})),
            (
                "stillpoint text redirect f --code c3",
                "text-redirect",
                json!({"site": "f", "code": "c3"}),
            ),
            ("stillpoint text list", "query-text", json!(null)),
            ("stillpoint vcpu hold 1", "vcpu-hold", json!({"vcpu": 1})),
            (
                "stillpoint probe attach f+4 --deadline 1s",
                "probe-attach",
                json!({"site": "f+4", "deadline": 1000}),
            ),
            (
                "stillpoint probe attach f --record di,si --records 9 --if di!=0 --priority -1",
                "probe-attach",
                json!({
                    "site": "f", "callback": "record", "registers": ["di", "si"],
                    "records": 9, "if": "di!=0", "priority": -1,
                }),
            ),
            (
                "stillpoint probe attach f --callback /dev/null --data 0x10 --may-sleep",
                "probe-attach",
                json!({"site": "f", "object": "/dev/null", "data": 16, "may-sleep": true}),
            ),
            (
                "stillpoint probe attach f --return --record ax --if ax>=1 --if-called di==2",
                "probe-attach",
                json!({"site": "f", "callback": "record", "registers": ["ax"], "return": true,
                       "if": "ax>=1", "if-called": "di==2"}),
            ),
            (
                "stillpoint probe attach f --latency --stack-words 3",
                "probe-attach",
                json!({"site": "f", "callback": "latency", "return": true, "stack-words": 3}),
            ),
            (
                "stillpoint probe attach f g+1",
                "probe-attach",
                json!({"sites": ["f", "g+1"]}),
            ),
            (
                "stillpoint probe detach 1 2",
                "probe-detach",
                json!({"ids": [1, 2]}),
            ),
            (
                "stillpoint probe detach 1",
                "probe-detach",
                json!({"id": 1}),
            ),
            ("stillpoint gp wait 7", "gp-wait", json!({"cookie": "7"})),
            (
                "stillpoint vcpu hold 1 --at f+4 --no-wait --deadline 2s",
                "vcpu-hold",
                json!({"vcpu": 1, "at": "f+4", "wait": false, "deadline": 2000}),
            ),
            (
                "stillpoint vcpu hold 1 --soft",
                "vcpu-hold",
                json!({"vcpu": 1, "soft": true}),
            ),
            (
                "stillpoint vcpu release 1",
                "vcpu-release",
                json!({"vcpu": 1}),
            ),
        ] {
            assert_eq!(request(line), (command, arguments), "{line}");
        }
    }

    #[test]
    fn files_are_named_so_that_the_vmm_finds_them() {
        let (_, arguments) = request("stillpoint patch apply .");
        let path = arguments["file"].as_str().unwrap_or_default();
        assert!(path.starts_with('/'), "{path}");
        let missing = PatchCommand::Check {
            file: "no/such/file".into(),
        };
        assert!(matches!(patch(missing), Err(ClientError::File { .. })));
    }
}
