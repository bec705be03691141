//! What the commands on the guest's kernel answer, as text for people.

use std::fmt::Write;

use serde_json::{Value, json};

use super::{anything, plain, time};

/// What every answer ends with that took a stop.
pub(super) fn stalled(answer: &Value) -> String {
    let stop = &answer["stop"];
    let all = stop["stalled-in-all-us"].as_u64().unwrap_or(0);
    match stop["stops"].as_u64().unwrap_or(1) {
        0 | 1 => format!("the guest stood still for {}\n", time(all)),
        stops => format!("the guest stood still for {} in {stops} stops\n", time(all)),
    }
}

fn place(change: &Value) -> String {
    format!(
        "{} ({})",
        plain(&change["place"]),
        plain(&change["address"])
    )
}

/// `query-kernel`.
pub(in super::super) fn kernel(answer: &Value) -> String {
    let shown = json!({
        "release": answer["release"],
        "version": answer["banner"],
        "build id": answer["build-id"],
        "slide": answer["slide"],
        "text at": answer["text"],
        "physical base": answer["phys-base"],
        "direct map at": answer["page-offset-base"],
        "page table at": format!(
            "{} (physical, {} levels)",
            plain(&answer["page-table"]),
            answer["levels"]
        ),
        "possible CPUs": answer["possible-cpus"],
    });
    anything(&shown) + &stalled(answer)
}

/// `text-patch` and `text-redirect`.
pub(in super::super) fn changed(answer: &Value) -> String {
    let mut text = format!(
        "change {}: {} {} -> {}",
        answer["id"],
        place(answer),
        plain(&answer["before"]),
        plain(&answer["after"])
    );
    if let Some(entry) = answer["code"].get("entry") {
        let _ = write!(text, ", to new code at {}", plain(entry));
    }
    text.push('\n');
    text + &stalled(answer)
}

/// `text-revert`.
pub(in super::super) fn reverted(answer: &Value) -> String {
    let change = &answer["entry"];
    let id = &change["id"];
    let mut text = format!(
        "change {id} taken back: {} {} -> {}\n",
        place(change),
        plain(&change["after"]),
        plain(&change["before"])
    );
    let collected = &answer["collected"];
    let freed = collected["freed"].as_array();
    if freed.is_some_and(|freed| freed.contains(id)) {
        text.push_str("its code was freed\n");
    }
    for retired in collected["retired"].as_array().into_iter().flatten() {
        text.push_str(&still_there(retired));
    }
    text + &stalled(answer)
}

fn still_there(retired: &Value) -> String {
    let id = &retired["id"];
    match (&retired["keep"], &retired["held-by"]) {
        (Value::String(why), _) => {
            format!("the code of change {id} is kept: {}\n", plain(&json!(why)))
        }
        (_, Value::Array(by)) if !by.is_empty() => {
            let names: Vec<String> = by.iter().map(plain).collect();
            format!(
                "the code of change {id} is still in use by {}\n",
                names.join(", ")
            )
        }
        _ => format!("the code of change {id} is not freed yet\n"),
    }
}

/// `query-text`.
pub(in super::super) fn list(answer: &Value) -> String {
    let rows = |changes: &Value| -> Vec<Value> {
        let row = |change: &Value| {
            json!({
                "change": change["id"],
                "kind": change["kind"],
                "place": change["place"],
                "address": plain(&change["address"]),
                "before": change["before"],
                "after": change["after"],
                "asked for as": change["site"],
            })
        };
        changes.as_array().into_iter().flatten().map(row).collect()
    };
    let applied = rows(&answer["applied"]);
    let mut text = if applied.is_empty() {
        "nothing is changed\n".to_owned()
    } else {
        anything(&Value::Array(applied))
    };
    for retired in answer["retired"].as_array().into_iter().flatten() {
        text.push_str(&still_there(retired));
    }
    for closed in answer["closed"].as_array().into_iter().flatten() {
        let (change, end) = (&closed["entry"], &closed["end"]);
        let how = match end["why"].as_str() {
            Some(why) => format!("gone: {}", plain(&json!(why))),
            None => plain(&end["how"]),
        };
        let _ = writeln!(text, "change {} at {}: {how}", change["id"], place(change));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change() -> Value {
        json!({
            "id": 1, "kind": "redirect", "site": "f", "place": "f+0x4",
            "address": "0xffffffff8610b0d4",
            "before": "0f1f440000", "after": "e9b7696f79",
            "code": {"entry": "0xffffffffff800000"},
            "stop": {"stops": 1, "stalled-us": 4905, "stalled-in-all-us": 4905},
        })
    }

    #[test]
    fn a_change_is_told_with_its_cost() {
        assert_eq!(
            changed(&change()),
            "change 1: f+0x4 (0xffffffff8610b0d4) 0f1f440000 -> e9b7696f79, \
             to new code at 0xffffffffff800000\n\
             the guest stood still for 4.905 ms\n"
        );
        let answer = json!({
            "entry": change(),
            "collected": {"freed": [], "retired": [{"id": 1, "held-by": ["task 7 (sh)", "vCPU 1"]}]},
            "stop": {"stops": 3, "stalled-in-all-us": 900},
        });
        assert_eq!(
            reverted(&answer),
            "change 1 taken back: f+0x4 (0xffffffff8610b0d4) e9b7696f79 -> 0f1f440000\n\
             the code of change 1 is still in use by task 7 (sh), vCPU 1\n\
             the guest stood still for 900 µs in 3 stops\n"
        );
    }

    #[test]
    fn the_list_names_what_is_there_and_what_is_over() {
        assert_eq!(list(&json!({"applied": []})), "nothing is changed\n");
        let text = list(&json!({
            "applied": [change()],
            "closed": [{"entry": change(), "end": {"how": "void", "why": "the machine was reset"}}],
        }));
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.contains("0xffffffff8610b0d4"), "{text}");
        assert!(text.ends_with("gone: the machine was reset\n"), "{text}");
    }
}
