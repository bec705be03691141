//! Answers as text for people.
//!
//! [`anything`] shows whatever a command returns: an object as a list of its members, an array of
//! objects as a table. Members whose name ends in `-us` are times.

mod holding;
mod insight;
mod inspect;
mod patching;
mod probes;
mod stacks;
mod table;

use std::fmt::Write;

use serde_json::{Map, Value};

use crate::printable::printable;

pub(super) use holding::{held, released};
pub(super) use insight::{modules, symbols, tasks};
pub(super) use inspect::{inspected_dump, inspected_kernel, inspected_text};
pub(super) use patching::{changed, kernel, list as text_list, reverted};
pub(super) use probes::{
    attached, cookie, detached, histogram, holdouts, passed, probes, records, traced, tracepoints,
    trampolines,
};
pub(super) use stacks::{stacks, vcpus};

/// A time in microseconds, as one reads it.
pub(super) fn time(micros: u64) -> String {
    let scaled = |divisor: u64, unit: &str| {
        let (whole, rest) = (micros / divisor, micros % divisor * 1000 / divisor);
        match whole {
            0..=9 => format!("{whole}.{rest:03} {unit}"),
            10..=99 => format!("{whole}.{:02} {unit}", rest / 10),
            _ => format!("{whole}.{} {unit}", rest / 100),
        }
    };
    match micros {
        0..=999 => format!("{micros} µs"),
        1000..=999_999 => scaled(1000, "ms"),
        _ => scaled(1_000_000, "s"),
    }
}

/// A number of bytes, as one reads it.
fn bytes(count: u64) -> String {
    match count {
        0..0x400 => format!("{count} bytes"),
        0x400..0x10_0000 => format!("{} KiB", count >> 10),
        0x10_0000..0x4000_0000 => format!("{} MiB", count >> 20),
        _ => format!("{}.{} GiB", count >> 30, (count >> 20 & 0x3ff) * 10 / 1024),
    }
}

fn micros(answer: &Value, name: &str) -> u64 {
    answer[name].as_u64().unwrap_or(0)
}

pub(super) fn status(answer: &Value) -> String {
    plain(&answer["status"])
}

pub(super) fn paused(answer: &Value) -> String {
    match micros(answer, "to-stopped-us") {
        0 => "was paused already".to_owned(),
        us => format!("paused within {}", time(us)),
    }
}

pub(super) fn resumed(answer: &Value) -> String {
    match micros(answer, "stalled-us") {
        0 => "was running already".to_owned(),
        us => format!("running again after {}", time(us)),
    }
}

pub(super) fn dumped(answer: &Value) -> String {
    format!(
        "{} of guest memory; the guest stood still for {}",
        bytes(answer["completed"].as_u64().unwrap_or(0)),
        time(micros(answer, "stalled-us"))
    )
}

/// One line for an event.
pub(super) fn event(event: &Value) -> String {
    let stamp = &event["timestamp"];
    let (seconds, part) = (
        stamp["seconds"].as_u64().unwrap_or(0),
        stamp["microseconds"].as_u64().unwrap_or(0),
    );
    let mut text = format!("{seconds}.{part:06} {}", plain(&event["event"]));
    for (name, value) in event["data"].as_object().into_iter().flatten() {
        let _ = write!(text, " {name}={}", member(name, value));
    }
    text
}

/// Whatever a command returns.
pub(super) fn anything(answer: &Value) -> String {
    match answer {
        Value::Object(members) => list(members),
        Value::Array(items) if items.is_empty() => String::new(),
        Value::Array(items) => match rows(items) {
            Some(rows) => table(&rows),
            None => items.iter().map(|item| plain(item) + "\n").collect(),
        },
        other => plain(other),
    }
}

fn list(members: &Map<String, Value>) -> String {
    let width = members.keys().map(|name| name.chars().count()).max();
    let mut text = String::new();
    for (name, value) in members {
        match value {
            Value::Array(items) if rows(items).is_some() && !items.is_empty() => {
                let _ = writeln!(text, "{name}");
                for line in anything(value).lines() {
                    let _ = writeln!(text, "  {line}");
                }
            }
            _ => {
                let shown = member(name, value);
                let _ = writeln!(text, "{name:width$}  {shown}", width = width.unwrap_or(0));
            }
        }
    }
    text
}

fn rows(items: &[Value]) -> Option<Vec<&Map<String, Value>>> {
    items.iter().map(Value::as_object).collect()
}

fn table(rows: &[&Map<String, Value>]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for name in rows.iter().flat_map(|row| row.keys()) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let heading: Vec<String> = names.iter().map(|name| heading(name)).collect();
    let cells = rows.iter().map(|row| {
        let cell = |name: &&str| row.get(*name).map_or_else(String::new, |v| member(name, v));
        names.iter().map(cell).collect::<Vec<_>>()
    });
    let lines: Vec<Vec<String>> = std::iter::once(heading).chain(cells).collect();
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..names.len()).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        let padded: Vec<String> = line
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        let _ = writeln!(text, "{}", padded.join("  ").trim_end());
    }
    text
}

fn heading(name: &str) -> String {
    name.strip_suffix("-us").unwrap_or(name).to_uppercase()
}

fn member(name: &str, value: &Value) -> String {
    match value.as_u64() {
        Some(us) if name.ends_with("-us") => time(us),
        _ => plain(value),
    }
}

/// A value in a line of text; what whoever wrote it would have the terminal do is written out.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => printable(text).into_owned(),
        Value::Null => "-".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(plain).collect();
            items.join(", ")
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn times_and_sizes() {
        for (us, text) in [
            (0, "0 µs"),
            (284, "284 µs"),
            (1_284, "1.284 ms"),
            (12_340, "12.34 ms"),
            (123_456, "123.4 ms"),
            (2_250_000, "2.250 s"),
        ] {
            assert_eq!(time(us), text);
        }
        assert_eq!(bytes(512 << 20), "512 MiB");
        assert_eq!(bytes((6 << 30) + (512 << 20)), "6.5 GiB");
    }

    #[test]
    fn a_list_of_objects_is_a_table() {
        let answer = json!([
            {"id": 1, "site": "version_proc_show+0x4", "stalled-us": 284},
            {"id": 12, "site": "f", "stalled-us": 2000, "late": true},
        ]);
        assert_eq!(
            anything(&answer),
            "ID  SITE                   STALLED   LATE\n\
             1   version_proc_show+0x4  284 µs\n\
             12  f                      2.000 ms  yes\n"
        );
        assert_eq!(anything(&json!([])), "");
        assert_eq!(anything(&json!(["a", 1])), "a\n1\n");
    }

    #[test]
    fn an_object_is_a_list_of_its_members() {
        let answer = json!({"release": "6.12", "slide": "0x1c000000", "stops": [{"n": 1}]});
        assert_eq!(
            anything(&answer),
            "release  6.12\nslide    0x1c000000\nstops\n  N\n  1\n"
        );
    }

    #[test]
    fn what_the_guest_says_does_not_reach_the_terminal_raw() {
        assert_eq!(plain(&json!("a\u{1b}[31mb\n")), "a\\u{1b}[31mb\\n");
    }

    #[test]
    fn events_are_lines() {
        let value = json!({
            "timestamp": {"seconds": 5, "microseconds": 42},
            "event": "RESET",
            "data": {"guest": true, "reason": "guest-reset"}
        });
        assert_eq!(event(&value), "5.000042 RESET guest=yes reason=guest-reset");
    }
}
