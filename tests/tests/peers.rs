//! What others tell of the same memory dump: drgn, with the kernel's debugging symbols.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use stillpoint_tests::{
    Failure, Guest, Ran, TestResult, debug_kernel, drgn_script, on_kvm_then_here, python_client,
};

const STACKS: &str = "stacks.json";
const CORE: &str = "core";

/// What a guest that is stopped has on its stacks, and its memory.
fn record(kernel: &str, into: &Path) -> TestResult {
    let guest = Guest::boot(kernel).cpus(2).memory("192M").start()?;
    guest.sh(
        "guest threads 200 >/tmp/threads 2>&1 & until [ -s /tmp/threads ]; do sleep 1; done; \
         grep -q threads /tmp/threads || { cat /tmp/threads; exit 1; }; \
         guest calls 1000 >/dev/null & guest zombie >/dev/null & \
         dd if=/dev/zero of=/dev/null bs=64k 2>/dev/null & sleep 1000 >/dev/null & cat | cat & sleep 1",
    )?;
    let mut qmp = guest.control()?;
    qmp.execute("stop", json!({}))?;
    let answer = qmp.execute("query-stacks", json!({}))?;
    std::fs::write(into.join(STACKS), answer.to_string())?;
    let core = into.join(CORE).display().to_string();
    guest.stillpoint(&["dump", &core])?.ok()?;
    Ok(())
}

fn addresses(value: &Value) -> Vec<u64> {
    let frames = value["frames"].as_array().into_iter().flatten();
    let address = |frame: &Value| {
        let text = frame["address"].as_str().unwrap_or_default();
        u64::from_str_radix(text.trim_start_matches("0x"), 16).ok()
    };
    frames
        .filter_map(|frame| frame.as_u64().or_else(|| address(frame)))
        .collect()
}

/// What drgn tells, by the address of the task.
fn theirs(kernel: &str, from: &Path) -> Result<BTreeMap<u64, Value>, Failure> {
    let mut command = Command::new(python_client("python")?);
    command
        .arg(drgn_script("stacks"))
        .arg(from.join(CORE))
        .arg(debug_kernel(kernel)?);
    let said = Ran::of(&mut command)?.ok()?;
    let tasks = said.lines().map(serde_json::from_str::<Value>);
    let tasks = tasks.collect::<Result<Vec<_>, _>>()?;
    Ok(tasks
        .into_iter()
        .map(|task| (task["address"].as_u64().unwrap_or(0), task))
        .collect())
}

fn agree(kernel: &str, from: &Path) -> TestResult {
    let ours: Value = serde_json::from_slice(&std::fs::read(from.join(STACKS))?)?;
    assert_eq!(ours["more"], 0);
    let ours = ours["tasks"].as_array().cloned().unwrap_or_default();
    let theirs = theirs(kernel, from)?;
    assert_eq!(ours.len(), theirs.len());
    assert!(ours.len() > 250, "{}", ours.len());
    let (mut frames, mut running) = (0, 0);
    for task in &ours {
        let address = task["address"].as_str().unwrap_or_default();
        let address = u64::from_str_radix(address.trim_start_matches("0x"), 16).unwrap_or(0);
        let other = theirs
            .get(&address)
            .ok_or_else(|| Failure::new(format!("{task}")))?;
        assert_eq!(
            (&task["pid"], &task["comm"]),
            (&other["pid"], &other["comm"])
        );
        // A zombie has given its stack back; drgn follows what was left there.
        if task["end"] != "no-stack" {
            let ours = addresses(task);
            let mut told = addresses(other);
            // Where ours ends with user mode, drgn goes on into whatever it finds there.
            if task["end"] == "user-mode" {
                told.truncate(ours.len());
            }
            assert_eq!(ours, told, "{task}\n{other}");
        }
        frames += addresses(task).len();
        running += usize::from(!task["vcpu"].is_null());
    }
    println!(
        "{} tasks, {running} of them running, {frames} frames",
        ours.len()
    );
    assert_eq!(running, 2);
    Ok(())
}

fn stacks_agree(kernel: &'static str) -> TestResult {
    on_kvm_then_here(
        &[kernel],
        |into| record(kernel, into),
        |from| agree(kernel, from),
    )
}

#[test]
fn stacks_of_6_12_are_those_that_drgn_unwinds() -> TestResult {
    stacks_agree("6.12")
}

#[cfg(feature = "full")]
mod full {
    use stillpoint_tests::TestResult;

    #[test]
    fn stacks_of_6_1_are_those_that_drgn_unwinds() -> TestResult {
        super::stacks_agree("6.1")
    }
}
