//! vCPUs that are held one by one, as text for people.

use serde_json::Value;

use super::patching::stalled;
use super::{micros, plain, time};

/// `vcpu-hold`.
pub(in super::super) fn held(answer: &Value) -> String {
    let (vcpu, left) = (&answer["vcpu"], time(micros(answer, "left-us")));
    let text = match answer["state"].as_str() {
        Some("armed") => format!(
            "vCPU {vcpu} will be held at {} ({}), if it gets there within {left}\n",
            plain(&answer["place"]),
            plain(&answer["at"])
        ),
        _ => {
            let at = match &answer["place"] {
                Value::Null => plain(&answer["rip"]),
                place => format!("{} ({})", plain(place), plain(&answer["rip"])),
            };
            let how = match (answer["soft"].as_bool(), answer["interrupts"].as_bool()) {
                (Some(true), Some(false)) => "held in a loop, with interrupts disabled,",
                (Some(true), _) => "held in a loop, serving interrupts,",
                _ => "held",
            };
            format!("vCPU {vcpu} is {how} at {at}; it is released in {left}\n")
        }
    };
    match &answer["stop"] {
        Value::Null => text,
        _ => text + &stalled(answer),
    }
}

/// `vcpu-release`.
pub(in super::super) fn released(answer: &Value) -> String {
    let vcpu = &answer["vcpu"];
    match answer["held-us"].as_u64() {
        Some(us) => format!("vCPU {vcpu} goes on; it was held for {}\n", time(us)),
        None => format!(
            "vCPU {vcpu} will not be held; it had not got to {}\n",
            plain(&answer["place"])
        ),
    }
}

/// The hold of a vCPU in a line of `cpus`.
pub(super) fn hold_of(hold: &Value) -> String {
    let left = time(micros(hold, "left-us"));
    match hold["state"].as_str() {
        None => "-".to_owned(),
        Some("armed") => format!("when at {}, within {left}", plain(&hold["place"])),
        Some(_) if hold["soft"] == true => format!("softly, for {left} more"),
        Some(_) => format!("for {left} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_hold_tells_where_and_for_how_long() {
        let now = json!({"vcpu": 1, "state": "held", "rip": "0x401000", "left-us": 10_000_000});
        assert_eq!(
            held(&now),
            "vCPU 1 is held at 0x401000; it is released in 10.00 s\n"
        );
        let at = json!({
            "vcpu": 1, "state": "held", "at": "0x10", "place": "f+0x4", "rip": "0x10",
            "left-us": 2_500_000, "stop": {"stops": 1, "stalled-in-all-us": 900},
        });
        assert_eq!(
            held(&at),
            "vCPU 1 is held at f+0x4 (0x10); it is released in 2.500 s\n\
             the guest stood still for 900 µs\n"
        );
        let soft = json!({
            "vcpu": 1, "state": "held", "soft": true, "rip": "0x10", "left-us": 10_000_000,
        });
        assert_eq!(
            held(&soft),
            "vCPU 1 is held in a loop, serving interrupts, at 0x10; it is released in 10.00 s\n"
        );
        assert_eq!(hold_of(&soft), "softly, for 10.00 s more");
        assert_eq!(hold_of(&at), "for 2.500 s more");
        let armed = json!({
            "vcpu": 1, "state": "armed", "at": "0x10", "place": "f+0x4", "left-us": 2_500_000,
        });
        assert_eq!(
            held(&armed),
            "vCPU 1 will be held at f+0x4 (0x10), if it gets there within 2.500 s\n"
        );
        assert_eq!(hold_of(&armed), "when at f+0x4, within 2.500 s");
        assert_eq!(hold_of(&Value::Null), "-");
    }

    #[test]
    fn a_release_tells_what_it_ended() {
        let was = json!({"vcpu": 1, "reason": "released", "held-us": 1_284});
        assert_eq!(released(&was), "vCPU 1 goes on; it was held for 1.284 ms\n");
        let never = json!({"vcpu": 1, "reason": "released", "place": "f"});
        assert_eq!(
            released(&never),
            "vCPU 1 will not be held; it had not got to f\n"
        );
    }
}
