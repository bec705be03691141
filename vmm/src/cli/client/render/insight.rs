//! What the commands answer that only look into the guest, as text for people.

use std::fmt::Write;

use serde_json::Value;

use super::table::{Cell, Tone, coloured, left, paint, right, table};
use super::{bytes, plain};

fn rows<'a>(answer: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> {
    answer[name].as_array().into_iter().flatten()
}

fn cell(value: &Value) -> Cell {
    (plain(value), Tone::Plain)
}

/// What was left out.
fn more(answer: &Value, what: &str) -> String {
    match answer["more"].as_u64() {
        Some(more) if more > 0 => format!("and {more} more {what}\n"),
        _ => String::new(),
    }
}

/// `query-tasks`.
pub(in super::super) fn tasks(answer: &Value) -> String {
    tasks_in(answer, coloured())
}

fn tasks_in(answer: &Value, colour: bool) -> String {
    let columns = [
        right("PID"),
        right("TGID"),
        right("PPID"),
        left("S"),
        left("SCHEDULING"),
        right("CPU"),
        right("VCPU"),
        right("SWITCHES"),
        right("FORCED"),
        right("START"),
        left("COMMAND"),
    ];
    let row = |task: &Value| {
        let state = plain(&task["state"]);
        let tone = match state.as_str() {
            "R" => Tone::Good,
            "D" | "T" | "t" => Tone::Notice,
            "Z" | "X" => Tone::Bad,
            _ => Tone::Plain,
        };
        // As ps and top do it: a name in brackets has no user memory.
        let comm = plain(&task["comm"]);
        let comm = match task["kind"].as_str() {
            Some("user") => (comm, Tone::Plain),
            _ => (format!("[{comm}]"), Tone::Dim),
        };
        vec![
            cell(&task["pid"]),
            cell(&task["tgid"]),
            cell(&task["ppid"]),
            (state, tone),
            cell(&task["scheduling"]),
            cell(&task["cpu"]),
            cell(&task["vcpu"]),
            cell(&task["nvcsw"]),
            cell(&task["nivcsw"]),
            (seconds(&task["start-time-ns"]), Tone::Plain),
            comm,
        ]
    };
    let all: Vec<_> = rows(answer, "tasks").map(row).collect();
    let mut text = table(&columns, &all, colour) + &more(answer, "tasks");
    for disagreement in rows(answer, "disagreements") {
        let told = paint(&plain(disagreement), Tone::Bad, colour);
        let _ = writeln!(text, "the guest contradicts itself: {told}");
    }
    text
}

/// Seconds with two places, as the guest's log has them.
fn seconds(nanos: &Value) -> String {
    let centis = nanos.as_u64().unwrap_or(0) / 10_000_000;
    format!("{}.{:02}", centis / 100, centis % 100)
}

/// `query-modules`.
pub(in super::super) fn modules(answer: &Value) -> String {
    modules_in(answer, coloured())
}

fn modules_in(answer: &Value, colour: bool) -> String {
    let columns = [
        left("MODULE"),
        right("SIZE"),
        right("USERS"),
        left("STATE"),
        left("TEXT AT"),
    ];
    let row = |module: &Value| {
        let text = rows(module, "memory").find(|part| part["kind"] == "text");
        let state = plain(&module["state"]);
        let tone = if state == "live" {
            Tone::Plain
        } else {
            Tone::Notice
        };
        vec![
            cell(&module["name"]),
            (bytes(module["size"].as_u64().unwrap_or(0)), Tone::Plain),
            cell(&module["users"]),
            (state, tone),
            cell(text.map_or(&Value::Null, |part| &part["base"])),
        ]
    };
    let all: Vec<_> = rows(answer, "modules").map(row).collect();
    if all.is_empty() {
        return "no module is loaded\n".to_owned();
    }
    table(&columns, &all, colour)
}

/// `query-symbols`.
pub(in super::super) fn symbols(answer: &Value) -> String {
    symbols_in(answer, coloured())
}

fn symbols_in(answer: &Value, colour: bool) -> String {
    if let Some(text) = answer["place"].get("text") {
        return plain(text) + "\n";
    }
    let columns = [
        right("ADDRESS"),
        left("T"),
        right("SIZE"),
        left("NAME"),
        left("MODULE"),
    ];
    let row = |symbol: &Value| {
        let kind = plain(&symbol["type"]);
        let tone = match kind.as_str() {
            "t" | "T" | "w" | "W" => Tone::Good,
            _ => Tone::Plain,
        };
        let size = symbol["size"].as_u64();
        let size = size.map_or_else(|| "-".to_owned(), |size| format!("{size:#x}"));
        let module = symbol["module"].as_str();
        vec![
            cell(&symbol["address"]),
            (kind, tone),
            (size, Tone::Plain),
            cell(&symbol["name"]),
            (
                module.map_or_else(String::new, |m| format!("[{m}]")),
                Tone::Dim,
            ),
        ]
    };
    let all: Vec<_> = rows(answer, "symbols").map(row).collect();
    if all.is_empty() {
        return "no symbol matches\n".to_owned();
    }
    let text = table(&columns, &all, colour);
    let lines: Vec<_> = text.lines().map(str::trim_end).collect();
    lines.join("\n") + "\n" + &more(answer, "symbols")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn tasks_are_a_table() {
        let answer = json!({
            "tasks": [
                {"pid": 1, "tgid": 1, "ppid": 0, "state": "S", "scheduling": "off", "cpu": 0,
                 "vcpu": null, "nvcsw": 70, "nivcsw": 3, "start-time-ns": 1_234_567_890,
                 "comm": "in\u{1b}it", "kind": "user"},
                {"pid": 2, "tgid": 2, "ppid": 0, "state": "R", "scheduling": "on-cpu", "cpu": 1,
                 "vcpu": 1, "nvcsw": 5, "nivcsw": 0, "start-time-ns": 0, "comm": "kthreadd",
                 "kind": "kernel"},
            ],
            "more": 7,
            "disagreements": ["the kernel counts 3 threads, and 2 are on its lists"],
        });
        assert_eq!(
            tasks_in(&answer, false),
            "PID  TGID  PPID  S  SCHEDULING  CPU  VCPU  SWITCHES  FORCED  START  COMMAND\n\
             \x20 1     1     0  S  off           0     -        70       3   1.23  in\\u{1b}it\n\
             \x20 2     2     0  R  on-cpu        1     1         5       0   0.00  [kthreadd]\n\
             and 7 more tasks\n\
             the guest contradicts itself: the kernel counts 3 threads, and 2 are on its lists\n"
        );
        assert!(tasks_in(&answer, true).contains("\u{1b}[32mR\u{1b}[0m"));
    }

    #[test]
    fn modules_are_a_table() {
        let answer = json!({"modules": [
            {"name": "evdev", "size": 0x7000, "users": 1, "state": "live",
             "memory": [{"kind": "text", "base": "0xffffffffc0000000", "size": 4096}]},
        ]});
        assert_eq!(
            modules_in(&answer, false),
            "MODULE    SIZE  USERS  STATE  TEXT AT\n\
             evdev   28 KiB      1  live   0xffffffffc0000000\n"
        );
        assert_eq!(
            modules_in(&json!({"modules": []}), false),
            "no module is loaded\n"
        );
    }

    #[test]
    fn symbols_are_a_table() {
        let answer = json!({"more": 2, "symbols": [
            {"address": "0xffffffff81000000", "type": "T", "size": 64, "name": "f", "module": null},
            {"address": "0xffffffffc0000010", "type": "t", "size": null, "name": "g", "module": "m"},
        ]});
        assert_eq!(
            symbols_in(&answer, false),
            "           ADDRESS  T  SIZE  NAME  MODULE\n\
             0xffffffff81000000  T  0x40  f\n\
             0xffffffffc0000010  t     -  g     [m]\n\
             and 2 more symbols\n"
        );
        let place = json!({"symbols": [], "place": {"text": "f+0x2/0x40 [m]"}});
        assert_eq!(symbols_in(&place, false), "f+0x2/0x40 [m]\n");
    }
}
