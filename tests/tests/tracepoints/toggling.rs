//! Callbacks come and go while the guest changes its own text as fast as it can.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stillpoint_tests::{Failure, Guest, Qmp, QmpError, TestResult, all_freed};

use crate::silent;

const NAME: &str = "sched_process_exec";
/// What is traced in turns: what the guest runs often, and what it is asked by.
const TRACED: [&str; 5] = [
    "hrtimer_*",
    "tick_*",
    "update_process_times",
    "schedule",
    "vfs_*",
];

/// Static keys, tracers and tracepoints: what is switched, where, with what it is switched on and off.
const TOGGLED: [(&str, &str, [&str; 2]); 5] = [
    (
        "schedstats",
        "/proc/sys/kernel/sched_schedstats",
        ["1", "0"],
    ),
    ("bpf", "/proc/sys/kernel/bpf_stats_enabled", ["1", "0"]),
    (
        "flows",
        "/proc/sys/net/core/rps_sock_flow_entries",
        ["32", "0"],
    ),
    (
        "tracer",
        "/sys/kernel/tracing/current_tracer",
        ["function", "nop"],
    ),
    (
        "event",
        "/sys/kernel/tracing/events/sched/sched_process_exec/enable",
        ["1", "0"],
    ),
];

/// Restricts the guest's tracer.
fn filter(guest: &Guest) -> TestResult {
    for name in TRACED {
        guest.sh(&format!(
            "echo \"{name}\" >>/sys/kernel/tracing/set_ftrace_filter"
        ))?;
    }
    Ok(())
}

fn begin(guest: &Guest) -> TestResult {
    filter(guest)?;
    guest.sh(": >/tmp/toggle")?;
    for (name, file, [on, off]) in TOGGLED {
        guest.sh(&format!(
            "(f={file}; while [ -e /tmp/toggle ]; do echo {on} >$f; echo {off} >$f; n=$((n+1)); done; \
             echo $n >/tmp/{name}) >/dev/null 2>&1 &"
        ))?;
    }
    Ok(())
}

/// How often each was switched on and off.
fn end(guest: &Guest) -> Result<Vec<(&'static str, u64)>, Failure> {
    guest.sh("rm /tmp/toggle")?;
    let mut all = Vec::new();
    for (name, ..) in TOGGLED {
        let said = guest.sh(&format!(
            "while [ ! -s /tmp/{name} ]; do sleep 0.1; done; cat /tmp/{name}"
        ))?;
        all.push((name, said.trim().parse()?));
    }
    guest.sh("cd /sys/kernel/tracing; echo >set_ftrace_filter; echo >trace")?;
    Ok(all)
}

/// What is refused for now, and why. Anything else is an error.
fn passing(result: Result<Value, QmpError>) -> Result<Result<Value, String>, Failure> {
    match result {
        Ok(reply) => Ok(Ok(reply)),
        Err(QmpError::Refused { desc, .. }) if desc.starts_with("Deadline") => Ok(Err(desc)),
        Err(QmpError::Refused { desc, .. }) if desc.contains("Underway") => Ok(Err(desc)),
        Err(error) => Err(error.into()),
    }
}

/// Nothing is on its way: all that there is was attached.
fn settled(qmp: &mut Qmp) -> Result<Vec<u64>, Failure> {
    let begun = Instant::now();
    loop {
        let reply = qmp.execute("query-tracepoints", json!({}))?;
        let all: Vec<_> = reply["tracepoints"].as_array().cloned().unwrap_or_default();
        if all.iter().all(|one| one["state"] == "attached") {
            return Ok(all.iter().filter_map(|one| one["id"].as_u64()).collect());
        }
        if begun.elapsed() > stillpoint_tests::SOON {
            return Err(Failure::new(format!("still on its way: {reply}")));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Adds and removes callbacks all the while.
pub(crate) fn while_text_is_toggled(guest: &Guest, qmp: &mut Qmp, rounds: u32) -> TestResult {
    let begun = Instant::now();
    begin(guest)?;
    let (mut longest, mut tries) = (Duration::ZERO, 0);
    for _ in 0..rounds {
        let begun = Instant::now();
        let attach = json!({"name": NAME, "deadline": "60s"});
        let new = qmp.execute("tracepoint-attach", attach)?;
        tries += new["stop"]["stops"].as_u64().unwrap_or(0);
        longest = longest.max(begun.elapsed());
        let begun = Instant::now();
        let detach = json!({"id": new["id"], "deadline": "60s"});
        let gone = qmp.execute("tracepoint-detach", detach)?;
        tries += gone["stop"]["stops"].as_u64().unwrap_or(0);
        longest = longest.max(begun.elapsed());
    }
    // Who has no time is told so, and what was begun is seen to.
    let mut refused = Vec::new();
    for _ in 0..rounds {
        let attach = json!({"name": NAME, "deadline": "15ms"});
        if let Err(why) = passing(qmp.execute("tracepoint-attach", attach))? {
            refused.push(why);
        }
        for id in settled(qmp)? {
            let detach = json!({"id": id, "deadline": "60s"});
            qmp.execute("tracepoint-detach", detach)?;
        }
    }
    let toggled = end(guest)?;
    assert!(toggled.iter().all(|(_, n)| *n > 0), "{toggled:?}");
    assert_eq!(settled(qmp)?, [0; 0]);
    all_freed(qmp)?;

    // The tracer may begin while one of ours is there, and end when it is not any more.
    let tracer = |name: &str| guest.sh(&format!("echo {name} >/sys/kernel/tracing/current_tracer"));
    filter(guest)?;
    tracer("function")?;
    let one = qmp.execute("tracepoint-attach", json!({"name": NAME}))?;
    tracer("nop")?;
    let two = qmp.execute("tracepoint-attach", json!({"name": NAME}))?;
    tracer("function")?;
    for id in [&one["id"], &two["id"]] {
        qmp.execute("tracepoint-detach", json!({"id": id, "deadline": "20s"}))?;
    }
    tracer("nop")?;
    guest.sh("echo >/sys/kernel/tracing/set_ftrace_filter")?;
    all_freed(qmp)?;
    silent(guest)?;
    println!(
        "toggling: {rounds} times on and off in {tries} stops, {longest:?} at most, and {} of {rounds} \
         refused for now; the guest has switched on and off {toggled:?}; \
         {:?} in all",
        refused.len(),
        begun.elapsed()
    );
    if let Some(why) = refused.first() {
        println!("toggling: {why}");
    }
    Ok(())
}
