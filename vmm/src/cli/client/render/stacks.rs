//! What the guest's tasks and vCPUs are doing, as text for people.

use std::fmt::Write;

use serde_json::{Value, json};

use super::holding::hold_of;
use super::patching::stalled;
use super::{anything, plain};

/// A task in a line: `sh (pid 7)`.
fn task(task: &Value) -> String {
    format!("{} (pid {})", plain(&task["comm"]), plain(&task["pid"]))
}

/// `query-vcpus`.
pub(in super::super) fn vcpus(answer: &Value) -> String {
    let rows: Vec<_> = answer.as_array().into_iter().flatten().collect();
    let any_held = rows.iter().any(|vcpu| !vcpu["hold"].is_null());
    let row = |vcpu: &Value| {
        let started = vcpu["activity"] != "not-started";
        let mode = match (vcpu["nested"].as_bool(), vcpu["cpl"].as_u64()) {
            (Some(true), _) => "nested guest",
            (_, Some(0)) => "kernel",
            _ => "user",
        };
        let at = match &vcpu["symbol"] {
            Value::Null => plain(&vcpu["rip"]),
            symbol => plain(symbol),
        };
        let when = |text: String| if started { text } else { "-".to_owned() };
        let mut row = json!({ "vcpu": vcpu["cpu-index"] });
        // A dump has no threads.
        if let Some(thread) = vcpu.get("thread-id") {
            row["thread"] = thread.clone();
        }
        let more = json!({
            "state": plain(&vcpu["activity"]).replace('-', " "),
            "mode": when(mode.to_owned()),
            "at": when(at),
            "task": match vcpu["comm"] {
                Value::Null => "-".to_owned(),
                _ => task(vcpu),
            },
        });
        if let (Some(row), Value::Object(more)) = (row.as_object_mut(), more) {
            row.extend(more);
        }
        if any_held {
            row["held"] = json!(hold_of(&vcpu["hold"]));
        }
        row
    };
    let why = rows.first().and_then(|vcpu| vcpu["no-kernel"].as_str());
    let text = anything(&Value::Array(rows.iter().map(|vcpu| row(vcpu)).collect()));
    match why {
        Some(why) => format!(
            "{text}nothing is known of its kernel: {}\n",
            plain(&json!(why))
        ),
        None => text,
    }
}

/// `query-stacks`: for each task a line, and its frames as /proc/PID/stack has them.
pub(in super::super) fn stacks(answer: &Value) -> String {
    let mut text = String::new();
    let tasks = answer["tasks"].as_array();
    for stack in tasks.into_iter().flatten() {
        let on = match &stack["vcpu"] {
            Value::Null => String::new(),
            vcpu => format!(", on vCPU {}", plain(vcpu)),
        };
        let ends = match stack["end"].as_str() {
            Some("user-mode") if frames(stack).next().is_none() => ", in user mode",
            Some("no-stack") => ", gone",
            _ => "",
        };
        let state = match &stack["state"] {
            Value::Null => String::new(),
            state => format!(" {}", plain(state)),
        };
        let _ = writeln!(text, "{}{state}{on}{ends}", task(stack));
        for frame in frames(stack) {
            let _ = writeln!(text, "  {}{}", plain(&frame["symbol"]), remarks(frame));
        }
        match stack["more-frames"].as_u64() {
            None | Some(0) => {}
            Some(more) => {
                let _ = writeln!(text, "  and {more} more");
            }
        }
        if let Some(why) = stack["unreliable"]["why"].as_str() {
            let _ = writeln!(text, "  unreliable: {}", plain(&json!(why)));
        }
        text.push('\n');
    }
    let (counts, more) = (&answer["counts"], answer["more"].as_u64());
    let number = |name: &str| counts[name].as_u64().unwrap_or(0);
    if number("tasks") == 0 {
        text.push_str("there is no such task\n");
    } else {
        let _ = writeln!(
            text,
            "{} of {} stacks are reliable",
            number("reliable"),
            number("tasks")
        );
    }
    if let Some(more @ 1..) = more {
        let _ = writeln!(
            text,
            "{more} tasks are left out: ask for them by their pids"
        );
    }
    text + &stalled(answer)
}

fn frames(stack: &Value) -> impl Iterator<Item = &Value> {
    stack["frames"].as_array().into_iter().flatten()
}

/// What there is to say of a frame that is not just the caller of the one before.
fn remarks(frame: &Value) -> String {
    let mut said = Vec::new();
    if frame["kind"] == "interrupted" {
        said.push("interrupted".to_owned());
    }
    match frame["stack"].as_str() {
        None | Some("task" | "register") => {}
        Some(stack) => said.push(format!("{} stack", stack.replace('-', " "))),
    }
    if !frame["repaired-from"].is_null() {
        said.push("traced".to_owned());
    }
    match said.is_empty() {
        true => String::new(),
        false => format!("  ({})", said.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stack_reads_as_the_kernel_prints_it() {
        let answer = json!({
            "tasks": [
                {
                    "pid": 7, "tgid": 7, "comm": "sh\u{7}", "state": "S", "vcpu": null, "reliable": true,
                    "end": "user-mode", "unreliable": null, "more-frames": 0,
                    "frames": [
                        {"symbol": "__schedule+0x3d8/0xb50", "kind": "switched", "stack": "task",
                         "repaired-from": null},
                        {"symbol": "do_wait+0x5f/0x120", "kind": "called", "stack": "task",
                         "repaired-from": "0xffffffff81090e00"},
                    ],
                },
                {"pid": 8, "comm": "busy", "state": "R", "vcpu": 1, "end": "user-mode", "frames": []},
                {
                    "pid": 9, "comm": "bad", "more-frames": 3,
                    "frames": [{"symbol": "0x10", "kind": "interrupted", "stack": "nmi"}],
                    "unreliable": {"frame": 1, "why": "0x10 is in no code that is known (frame 1)"},
                },
            ],
            "more": 5,
            "counts": {"tasks": 8, "reliable": 7},
            "stop": {"stops": 1, "stalled-in-all-us": 900},
        });
        assert_eq!(
            stacks(&answer),
            "sh\\u{7} (pid 7) S\n\
             \x20 __schedule+0x3d8/0xb50\n\
             \x20 do_wait+0x5f/0x120  (traced)\n\
             \n\
             busy (pid 8) R, on vCPU 1, in user mode\n\
             \n\
             bad (pid 9)\n\
             \x20 0x10  (interrupted, nmi stack)\n\
             \x20 and 3 more\n\
             \x20 unreliable: 0x10 is in no code that is known (frame 1)\n\
             \n\
             7 of 8 stacks are reliable\n\
             5 tasks are left out: ask for them by their pids\n\
             the guest stood still for 900 µs\n"
        );
        let none = stacks(&json!({"tasks": [], "counts": {"tasks": 0}}));
        assert!(none.starts_with("there is no such task\n"), "{none}");
    }

    #[test]
    fn a_vcpu_that_waits_to_be_started_has_no_place() {
        let answer = json!([
            {"cpu-index": 0, "thread-id": 42, "activity": "running", "cpl": 3, "rip": "0x401000",
             "pid": 7, "comm": "sh"},
            {"cpu-index": 1, "thread-id": 43, "activity": "not-started", "cpl": 0, "rip": "0xfff0"},
        ]);
        assert_eq!(
            vcpus(&answer),
            "VCPU  THREAD  STATE        MODE  AT        TASK\n\
             0     42      running      user  0x401000  sh (pid 7)\n\
             1     43      not started  -     -         -\n"
        );
        let held = json!([
            {"cpu-index": 0, "thread-id": 42, "activity": "running", "cpl": 0, "symbol": "f+0x4",
             "hold": {"vcpu": 0, "state": "held", "left-us": 2_000_000}},
            {"cpu-index": 1, "thread-id": 43, "activity": "halted", "cpl": 0, "symbol": "idle"},
        ]);
        assert_eq!(
            vcpus(&held),
            "VCPU  THREAD  STATE    MODE    AT     TASK  HELD\n\
             0     42      running  kernel  f+0x4  -     for 2.000 s more\n\
             1     43      halted   kernel  idle   -     -\n"
        );
    }
}
