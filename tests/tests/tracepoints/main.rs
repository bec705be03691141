//! Callbacks on the guest's own tracepoints, beside the guest's own users of them.

mod alternating;
mod system_calls;
mod toggling;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stillpoint_tests::{
    Failure, Guest, Qmp, QmpError, TestResult, all_freed, all_or, on_kvm, replacement, take_sum,
};

fn attach(qmp: &mut Qmp, arguments: Value) -> Result<u64, Failure> {
    let reply = qmp.execute("tracepoint-attach", arguments)?;
    let id = reply["id"].as_u64();
    id.ok_or_else(|| Failure::new(format!("no number in {reply}")))
}

fn hits(qmp: &mut Qmp, id: u64) -> Result<u64, Failure> {
    let reply = qmp.execute("query-tracepoints", json!({}))?;
    let mut all = reply["tracepoints"].as_array().into_iter().flatten();
    let found = all.find(|one| one["id"] == json!(id));
    let hits = found.and_then(|one| one["hits"].as_u64());
    hits.ok_or_else(|| Failure::new(format!("no {id} in {reply}")))
}

fn detach(qmp: &mut Qmp, id: u64) -> Result<u64, Failure> {
    let reply = qmp.execute("tracepoint-detach", json!({"id": id, "deadline": "20s"}))?;
    let hits = reply["tracepoint"]["hits"].as_u64();
    hits.ok_or_else(|| Failure::new(format!("no hits in {reply}")))
}

/// How many events the guest's own tracing has of `event`.
fn traced(guest: &Guest, event: &str) -> Result<u64, Failure> {
    let said = guest.sh(&format!(
        "grep -c ' {event}: ' /sys/kernel/tracing/trace || true"
    ))?;
    let parsed = said.trim().parse();
    parsed.map_err(|_| Failure::new(format!("no number: {said}")))
}

/// The guest complains about nothing, its allocator neither.
fn silent(guest: &Guest) -> TestResult {
    assert_eq!(guest.complaints()?, "");
    let slabs = guest.sh("dmesg | grep -E 'Redzone|Poison|Object padding|already free' || true")?;
    assert_eq!(slabs, "");
    Ok(())
}

/// How often each kind of thing is done in one guest.
struct Rounds {
    /// On and off, while the guest's own comes and goes.
    both: u32,
    /// Additions and removals by guest and host.
    alternating: usize,
    /// On and off, while the guest changes its text; not at all is fine.
    toggling: u32,
}

fn in_one_guest(kernel: &str, rounds: &Rounds) -> TestResult {
    let guest = Guest::boot(kernel)
        .cpus(2)
        .cmdline("slub_debug=FZPU")
        .start()?;
    let mut qmp = guest.control()?;
    beside_the_guest(&guest, &mut qmp, rounds.both)?;
    system_calls::old_and_new_tasks(&guest, &mut qmp)?;
    alternating::alternate(&guest, &mut qmp, rounds.alternating)?;
    if rounds.toggling == 0 {
        return Ok(());
    }
    toggling::while_text_is_toggled(&guest, &mut qmp, rounds.toggling)
}

fn beside_the_guest(guest: &Guest, qmp: &mut Qmp, rounds: u32) -> TestResult {
    let five = || guest.sh("for i in 1 2 3 4 5; do /bin/true; done");
    let event = |on: u8| {
        guest.sh(&format!(
            "echo {on} >/sys/kernel/tracing/events/sched/sched_process_exec/enable"
        ))
    };
    let name = "sched_process_exec";
    take_sum(guest)?;
    // Alone: 0 to 1 and back. The shell that runs a command is a program as well.
    let id = attach(qmp, json!({"name": name}))?;
    five()?;
    assert_eq!(detach(qmp, id)?, 6);
    // Two of ours with their own data, one of the guest's between them, and records of arguments.
    let object = replacement("add").display().to_string();
    let add = |data: u64| json!({"name": name, "object": object, "data": data});
    let one = attach(qmp, add(1))?;
    event(1)?;
    let hundred = attach(qmp, add(10_000))?;
    let argument =
        json!({"name": name, "callback": "record", "registers": ["di", "si"], "data": "0x1234"});
    let records = attach(qmp, argument)?;
    five()?;
    assert!(traced(guest, name)? >= 5);
    let told = qmp.execute("query-records", json!({"id": records}))?;
    for record in told["records"].as_array().into_iter().flatten() {
        assert_eq!(record["values"][0], "0x1234", "{record}");
        let task = record["values"][1].as_str();
        assert!(
            task.is_some_and(|task| task.starts_with("0xffff")),
            "{record}"
        );
        assert_eq!(
            record["values"][1], record["task"],
            "who calls exec: {record}"
        );
    }
    let ones = detach(qmp, one)?;
    event(0)?;
    five()?;
    let recorded = detach(qmp, records)?;
    let hundreds = detach(qmp, hundred)?;
    assert!(
        ones > 5 && recorded > 11 && hundreds == recorded,
        "{ones} {recorded} {hundreds}"
    );
    assert_eq!(
        take_sum(guest)?,
        i64::try_from(ones + 10_000 * hundreds)?,
        "each its own data"
    );
    all_freed(qmp)?;
    // One that has to be switched on.
    let calls = attach(qmp, json!({"name": "sys_enter", "if": "dx==39"}))?;
    let all = attach(qmp, json!({"name": "sys_enter"}))?;
    guest.sh("true")?;
    // A shell asks for its pid once.
    let pids = hits(qmp, calls)?;
    assert!((1..10).contains(&pids), "{pids}");
    assert!(detach(qmp, all)? > 20);
    detach(qmp, calls)?;

    // Both in turns, while it is hit.
    guest.sh(&format!(
        "(while :; do /bin/true; done) & echo $! >/tmp/busy; \
         (cd /sys/kernel/tracing/events/sched/{name}; \
          while :; do echo 1 >enable; echo 0 >enable; sleep 0.1; done) & echo $! >>/tmp/busy"
    ))?;
    let mut longest = Duration::ZERO;
    for _ in 0..rounds {
        let begun = Instant::now();
        let id = attach(qmp, add(1))?;
        detach(qmp, id)?;
        longest = longest.max(begun.elapsed());
    }
    guest.sh("kill $(cat /tmp/busy); sleep 0.5")?;
    all_freed(qmp)?;

    for (arguments, word) in [
        (json!({"name": "no_such_tracepoint"}), "BadRequest"),
        (json!({"name": ""}), "BadRequest"),
        (json!({}), "MissingArgument"),
        (json!({"name": name, "site": "vfs_read"}), "UnknownArgument"),
    ] {
        match qmp.execute("tracepoint-attach", arguments.clone()) {
            Err(QmpError::Refused { desc, .. }) => assert!(desc.starts_with(word), "{desc}"),
            other => return Err(Failure::new(format!("{arguments}: {other:?}"))),
        }
    }
    assert!(
        qmp.execute("tracepoint-detach", json!({"id": 9999}))
            .is_err()
    );
    assert_eq!(
        qmp.execute("query-tracepoints", json!({}))?["tracepoints"],
        json!([])
    );
    silent(guest)?;
    println!("tracepoints: {rounds} times on and off beside the guest's own, {longest:?} at most");
    Ok(())
}

fn transitions(kernel: &'static str, both: u32) -> TestResult {
    on_kvm(|| {
        let rounds = Rounds {
            both,
            alternating: all_or(1000, 100),
            toggling: all_or(4, 0),
        };
        in_one_guest(kernel, &rounds)
    })
}

#[test]
fn tracepoint_transitions_on_6_12() -> TestResult {
    transitions("6.12", 10)
}

#[test]
fn tracepoint_transitions_on_6_1() -> TestResult {
    transitions("6.1", 5)
}
