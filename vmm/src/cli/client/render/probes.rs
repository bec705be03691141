//! What the commands on probes, trampolines and grace periods answer, as text for people.

use serde_json::{Value, json};

use super::patching::{reverted, stalled};
use super::{anything, plain};

/// `probe-detach`.
pub(in super::super) fn detached(answer: &Value) -> String {
    let probe = &answer["probe"];
    format!("probe {}: {} hits\n", probe["id"], probe["hits"]) + &reverted(answer)
}

/// `query-probes`.
pub(in super::super) fn probes(answer: &Value) -> String {
    let row = |probe: &Value| {
        json!({
            "probe": probe["id"],
            "hits": probe["hits"],
            "place": probe["place"],
            "address": plain(&probe["address"]),
            "asked for as": probe["site"],
        })
    };
    table(&answer["probes"], row, "no probes") + &stalled(answer)
}

/// `query-trampolines`.
pub(in super::super) fn trampolines(answer: &Value) -> String {
    let row = |one: &Value| {
        let waits = match (&one["keep"], one["held-by"].as_array()) {
            (Value::String(why), _) => why.clone(),
            (_, Some(by)) => by.iter().map(plain).collect::<Vec<_>>().join(", "),
            _ => String::new(),
        };
        json!({
            "change": one["id"],
            "state": one["state"],
            "kind": one.get("kind").map(plain).unwrap_or_default(),
            "place": one.get("place").map(plain).unwrap_or_default(),
            "code": plain(&one["code"]),
            "bytes": one["code-bytes"],
            "data": one["data-bytes"],
            "waits for": waits,
        })
    };
    table(&answer["trampolines"], row, "no trampolines")
}

/// `query-holdouts`.
pub(in super::super) fn holdouts(answer: &Value) -> String {
    let row = |one: &Value| {
        json!({
            "change": one["id"],
            "held up by": one["found"],
            "because": one["missing"],
        })
    };
    table(&answer["holdouts"], row, "nobody holds anything up")
}

/// `gp-snapshot`.
pub(in super::super) fn cookie(answer: &Value) -> String {
    plain(&answer["cookie"])
}

/// `gp-poll` and `gp-wait`.
pub(in super::super) fn passed(answer: &Value) -> String {
    let text = match answer["passed"].as_bool() {
        Some(true) => "passed\n",
        _ => "not passed yet\n",
    };
    match answer.get("stop") {
        Some(_) => text.to_owned() + &stalled(answer),
        None => text.to_owned(),
    }
}

fn table(rows: &Value, row: fn(&Value) -> Value, none: &str) -> String {
    let rows: Vec<Value> = rows.as_array().into_iter().flatten().map(row).collect();
    if rows.is_empty() {
        return format!("{none}\n");
    }
    anything(&Value::Array(rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_name_what_is_waited_for() {
        let answer = json!({"holdouts": [{
            "id": 3, "since-ms": 1, "found": "sh (pid 7) has 0xf in rip",
            "missing": "it is there now",
        }]});
        let text = holdouts(&answer);
        assert!(
            text.contains("sh (pid 7)") && text.contains("there now"),
            "{text}"
        );
        assert!(holdouts(&json!({"holdouts": []})).contains("nobody"));
        let answer = json!({"trampolines": [{
            "id": 1, "state": "retired", "code": "0xffffffffff800000", "code-bytes": 32,
            "data-bytes": 16, "held-by": ["dd (pid 9)"], "since-ms": 5,
        }]});
        assert!(trampolines(&answer).contains("dd (pid 9)"));
    }
}
