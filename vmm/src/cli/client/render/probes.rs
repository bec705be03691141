//! What the commands on probes, trampolines and grace periods answer, as text for people.

use serde_json::{Value, json};

use super::patching::{reverted, stalled};
use super::{anything, plain};

/// `probe-attach`.
pub(in super::super) fn attached(answer: &Value) -> String {
    let one = |probe: &Value| {
        let (place, at) = (plain(&probe["place"]), plain(&probe["address"]));
        format!("probe {} at {place} ({at})\n", probe["id"])
    };
    let all = match answer["probes"].as_array() {
        Some(all) => all.iter().map(one).collect(),
        None => one(answer),
    };
    all + &stalled(answer)
}

/// `query-histogram`: one row for each magnitude, one column for each CPU.
pub(in super::super) fn histogram(answer: &Value) -> String {
    let cpus: Vec<_> = answer["cpus"].as_array().into_iter().flatten().collect();
    let count = |cpu: &Value, bucket: usize| cpu.get(bucket).and_then(Value::as_u64).unwrap_or(0);
    let longest = cpus.iter().filter_map(|cpu| cpu.as_array().map(Vec::len));
    let of = match answer.get("register") {
        Some(register) => plain(register),
        None => "cycles".to_owned(),
    };
    let rows = (0..longest.max().unwrap_or(0)).map(|bucket| {
        let mut row = serde_json::Map::new();
        let from = bucket.checked_sub(1).map_or(0, |bit| 1_u64 << bit.min(63));
        row.insert(format!("{of} from"), json!(format!("{from:#x}")));
        for (index, cpu) in cpus.iter().enumerate() {
            row.insert(format!("CPU {index}"), json!(count(cpu, bucket)));
        }
        Value::Object(row)
    });
    let rows: Vec<_> = rows.collect();
    match rows.is_empty() {
        true => "no hits\n".into(),
        false => anything(&Value::Array(rows)) + &cycles(answer),
    }
}

/// What the cycles of a histogram are in time, where that is known.
fn cycles(answer: &Value) -> String {
    match answer["tsc-khz"].as_u64() {
        Some(khz) => format!("{khz:#x} cycles are a millisecond\n"),
        None => String::new(),
    }
}

/// `query-records`.
pub(in super::super) fn records(answer: &Value) -> String {
    let names: Vec<_> = answer["registers"]
        .as_array()
        .into_iter()
        .flatten()
        .collect();
    let rows = answer["records"].as_array().into_iter().flatten();
    let rows = rows.map(|record| {
        let mut row = serde_json::Map::new();
        for (name, member) in [("number", "number"), ("tsc", "tsc"), ("cpu", "cpu")] {
            row.insert(name.into(), record[member].clone());
        }
        row.insert("task".into(), json!(plain(&record["task"])));
        let values = record["values"].as_array().into_iter().flatten();
        for (name, value) in names.iter().zip(values) {
            row.insert(plain(name), value.clone());
        }
        Value::Object(row)
    });
    let rows: Vec<_> = rows.collect();
    let table = match rows.is_empty() {
        true => "no records\n".into(),
        false => anything(&Value::Array(rows)),
    };
    table + &format!("{} lost; the next is {}\n", answer["lost"], answer["next"])
}

/// `probe-detach`.
pub(in super::super) fn detached(answer: &Value) -> String {
    let one = |probe: &Value| format!("probe {}: {} hits\n", probe["id"], probe["hits"]);
    match answer["probes"].as_array() {
        Some(all) => all.iter().map(one).collect::<String>() + &stalled(answer),
        None => one(&answer["probe"]) + &reverted(answer),
    }
}

/// `query-probes`.
pub(in super::super) fn probes(answer: &Value) -> String {
    let row = |probe: &Value| {
        json!({
            "probe": probe["id"],
            "does": probe["callback"],
            "when": probe["when"],
            "hits": probe["hits"],
            "skipped": probe["skipped"],
            "priority": probe["priority"],
            "place": probe["place"],
            "address": plain(&probe["address"]),
            "asked for as": probe["site"],
        })
    };
    table(&answer["probes"], row, "no probes")
}

/// `tracepoint-attach` and `tracepoint-detach`.
pub(in super::super) fn traced(answer: &Value) -> String {
    let (one, what) = match answer.get("tracepoint") {
        Some(gone) => (
            gone,
            format!("was on {}, {} hits", plain(&gone["name"]), gone["hits"]),
        ),
        None => (answer, format!("is on {}", plain(&answer["name"]))),
    };
    format!("callback {} {what}\n", one["id"]) + &stalled(answer)
}

/// `query-tracepoints`.
pub(in super::super) fn tracepoints(answer: &Value) -> String {
    let row = |one: &Value| {
        json!({
            "callback": one["id"],
            "tracepoint": one["name"],
            "state": one["state"],
            "does": one["callback"],
            "hits": one["hits"],
            "skipped": one["skipped"],
            "priority": one["priority"],
        })
    };
    table(&answer["tracepoints"], row, "no callbacks on tracepoints")
}

/// `query-trampolines`.
pub(in super::super) fn trampolines(answer: &Value) -> String {
    let row = |one: &Value| {
        let waits = match (&one["keep"], one["held-by"].as_array()) {
            (Value::String(why), _) => why.clone(),
            (_, Some(by)) => by.iter().map(plain).collect::<Vec<_>>().join(", "),
            _ => String::new(),
        };
        let probes = one["probes"].as_array().map(|all| {
            let all: Vec<_> = all.iter().map(plain).collect();
            match (one["permanent"].as_bool(), all.is_empty()) {
                (Some(true), true) => "none, permanent".to_owned(),
                (Some(true), false) => format!("{}, permanent", all.join(", ")),
                _ => all.join(", "),
            }
        });
        json!({
            "change": one["id"],
            "state": one["state"],
            "kind": one.get("kind").map(plain).unwrap_or_default(),
            "place": one.get("place").map(plain).unwrap_or_default(),
            "probes": probes.unwrap_or_default(),
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
    fn histograms_say_what_they_are_of() {
        let register = json!({"register": "di", "cpus": [[1, 0, 2]]});
        let text = histogram(&register);
        assert!(
            text.contains("DI FROM") && !text.contains("cycles"),
            "{text}"
        );
        let latency = json!({"unit": "tsc-cycles", "tsc-khz": 0x1000, "cpus": [[], [0, 1]]});
        let text = histogram(&latency);
        assert!(text.contains("CYCLES FROM"), "{text}");
        assert!(text.contains("0x1000 cycles are a millisecond"), "{text}");
    }

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
        let answer = json!({"trampolines": [{
            "id": 1, "state": "hooked", "code": "0xffffffffff800000", "code-bytes": 16,
            "data-bytes": 0, "held-by": [], "probes": [], "permanent": true,
        }]});
        assert!(trampolines(&answer).contains("none, permanent"));
    }
}
