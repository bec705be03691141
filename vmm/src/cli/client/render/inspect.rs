//! What `inspect` says, as text for people.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::patching::stalled;
use super::{anything, bytes, plain, stacks, tasks, vcpus};

/// A kernel's file.
pub(in super::super) fn inspected_kernel(answer: &Value) -> String {
    let mut shown = identity(answer);
    shown["kind"] = answer["kind"].clone();
    shown["symbols"] = answer["symbols"].clone();
    shown["types"] = answer["types"].clone();
    shown["relocations"] = match answer["relocations-listed"].as_bool() {
        Some(true) => "listed".into(),
        _ => "not listed".into(),
    };
    let mut text = anything(&shown);
    if let Some(functions) = answer["functions"].as_array() {
        text.push('\n');
        let rows = functions.iter().map(|function| {
            json!({
                "function": function["name"],
                "address": function["address"],
                "bytes": function["size"],
                "patchable": match &function["refused"] {
                    Value::Null => "yes".to_owned(),
                    why => format!("no: {}", plain(why)),
                },
            })
        });
        return text + &anything(&Value::Array(rows.collect()));
    }
    let patching = &answer["patching"];
    let _ = writeln!(
        text,
        "\nof {} functions {} can be patched; not the others:",
        patching["functions"], patching["patchable"]
    );
    let mut refused: Vec<_> = members(&patching["refused"]).collect();
    refused.sort_by_key(|(_, count)| std::cmp::Reverse(count.as_u64()));
    for (why, count) in refused {
        let _ = writeln!(text, "{:>8}  {why}", count.as_u64().unwrap_or(0));
    }
    let rows = answer["sections"].as_array().into_iter().flatten();
    let rows = rows.map(|section| {
        let flag = |name: &str, letter| if section[name] == true { letter } else { "" };
        json!({
            "section": section["name"],
            "address": section["address"],
            "size": bytes(section["size"].as_u64().unwrap_or(0)),
            "flags": format!("r{}{}", flag("writable", "w"), flag("executable", "x")),
        })
    });
    text.push('\n');
    text + &anything(&Value::Array(rows.collect()))
}

/// A memory dump.
pub(in super::super) fn inspected_dump(answer: &Value) -> String {
    let mut shown = identity(answer);
    shown["slide"] = answer["slide"].clone();
    shown["physical base"] = answer["phys-base"].clone();
    shown["possible CPUs"] = answer["possible-cpus"].clone();
    let mut text = anything(&shown);
    let mut show = |name: &str, show: &dyn Fn(&Value) -> String| {
        if let Some(told) = answer.get(name) {
            text.push('\n');
            text.push_str(&show(told));
        }
    };
    show("cpus", &vcpus);
    show("modules", &|modules| {
        super::modules(&json!({ "modules": modules }))
    });
    show("tasks", &tasks);
    show("stacks", &stacks);
    show("text", &comparison);
    text
}

/// `inspect-text`.
pub(in super::super) fn inspected_text(answer: &Value) -> String {
    comparison(answer) + "\n" + &stalled(answer)
}

fn identity(answer: &Value) -> Value {
    json!({
        "release": answer["release"],
        "version": answer["banner"],
        "build id": answer["build-id"],
    })
}

fn members(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flat_map(Map::iter)
}

fn comparison(answer: &Value) -> String {
    let mut text = format!(
        "{} of text at {}: {} bytes are not as in the kernel's file\n",
        bytes(answer["len"].as_u64().unwrap_or(0)),
        plain(&answer["text"]),
        answer["explained"].as_u64().unwrap_or(0) + answer["foreign-bytes"].as_u64().unwrap_or(0),
    );
    let rows = members(&answer["sites"]).map(|(class, count)| {
        json!({ "class": class.replace('-', " "), "places": count["sites"], "changed": count["changed"] })
    });
    text.push_str(&anything(&Value::Array(rows.collect())));
    text.push('\n');
    for doubt in answer["doubts"].as_array().into_iter().flatten() {
        let _ = writeln!(text, "in doubt: {}", plain(doubt));
    }
    let foreign = answer["foreign"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    if foreign.is_empty() {
        text.push_str("every byte is explained\n");
        return text;
    }
    let rows = foreign.iter().map(|foreign| {
        json!({
            "place": foreign["place"],
            "address": foreign["address"],
            "expected": foreign["expected"],
            "found": foreign["found"],
            "owner": owner(&foreign["owner"]),
        })
    });
    let _ = writeln!(
        text,
        "{} bytes are foreign, in {} places:",
        answer["foreign-bytes"],
        foreign.len()
    );
    text.push_str(&anything(&Value::Array(rows.collect())));
    if answer["truncated"] == true {
        text.push_str("there are more\n");
    }
    text
}

fn owner(owner: &Value) -> String {
    let kind = plain(&owner["kind"]);
    match (&owner["what"], &owner["id"]) {
        (Value::String(what), _) if !what.is_empty() => format!("{kind} {}", plain(&json!(what))),
        (_, Value::Number(id)) => format!("our change {id}"),
        _ => kind,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_bytes_are_listed_with_their_owner() {
        let mut answer = json!({
            "text": "0xffffffff81000000", "len": 16 << 20, "explained": 561_991, "foreign-bytes": 0,
            "sites": {"function-entry": {"sites": 40_339, "changed": 40_339}},
            "foreign": [], "truncated": false, "doubts": [],
        });
        assert_eq!(
            comparison(&answer),
            "16 MiB of text at 0xffffffff81000000: 561991 bytes are not as in the kernel's file\n\
             CLASS           PLACES  CHANGED\n\
             function entry  40339   40339\n\
             \n\
             every byte is explained\n"
        );
        answer["foreign-bytes"] = 1.into();
        answer["doubts"] = json!(["who knows"]);
        answer["foreign"] = json!([{
            "place": "f+0x1/0x20", "address": "0xffffffff81000001", "expected": "e8", "found": "cc",
            "site": null, "owner": {"kind": "kprobe", "what": "f"},
        }]);
        let text = comparison(&answer);
        assert!(text.contains("in doubt: who knows\n"), "{text}");
        assert!(
            text.contains("1 bytes are foreign, in 1 places:\n"),
            "{text}"
        );
        assert!(text.ends_with("e8        cc     kprobe f\n"), "{text}");
        assert_eq!(owner(&json!({"kind": "ours", "id": 3})), "our change 3");
        assert_eq!(owner(&json!({"kind": "unknown"})), "unknown");
    }
}
