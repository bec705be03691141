//! Tasks that are in a trampoline for long: preempted, asleep, or in what it called.

use std::collections::BTreeSet;

use stillpoint_tests::SOON;

use super::*;

/// How many tasks are in the callback at once: each of them is a repetition.
const TASKS: usize = 20;

/// What keeps them there.
struct Case {
    name: &'static str,
    /// The callback.
    object: &'static str,
    /// What it is given to stay for five seconds; times the cycles of a microsecond where it counts those.
    data: u64,
    cycles: bool,
    /// What goes wrong without this.
    rule: &'static str,
}

const PREEMPTED: Case = Case {
    name: "preempted-in-trampoline",
    object: "spinner",
    data: 5,
    cycles: true,
    rule: "grace-period",
};

const CALLEE: Case = Case {
    name: "callee-returns",
    object: "delayer",
    // Each millisecond is waited for on its own, and the CPU is shared.
    data: 250,
    cycles: false,
    rule: "return-addresses",
};

const SLEEPING: Case = Case {
    name: "sleeping-callback",
    object: "dozer",
    data: 5_000,
    cycles: false,
    rule: "sleepers",
};

/// A guest in which so many tasks are in the callback, all on one CPU.
fn inside(kernel: &str, case: &Case, without: Option<&str>) -> Result<(Guest, Qmp, u64), Failure> {
    let boot = mortal(
        Guest::boot(kernel)
            .cpus(2)
            .cmdline("preempt=full isolcpus=1 irqaffinity=0"),
        without,
    );
    let guest = boot.start()?;
    let mut qmp = guest.control()?;
    qmp.execute("events-enable", json!({}))?;
    let mut data = case.data;
    if case.cycles {
        let mega = guest.sh("awk '/cpu MHz/ {print int($4); exit}' /proc/cpuinfo")?;
        data *= mega.trim().parse::<u64>()?;
    }
    let request = json!({"site": "version_proc_show", "object": object(case.object), "data": data});
    let id = attach(&mut qmp, request)?;
    guest.sh(&format!(
        "i=0; while [ $i -lt {TASKS} ]; do i=$((i+1)); \
         taskset -c 1 cat /proc/version >/tmp/version.$i 2>&1 & done"
    ))?;
    let begun = std::time::Instant::now();
    while hits(&mut qmp, id)? < TASKS as u64 {
        assert!(begun.elapsed() < SOON, "they do not come");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok((guest, qmp, id))
}

/// Whoever is in it holds it up, by name, and nobody comes to harm.
fn held_up(kernel: &str, case: &Case) -> TestResult {
    let (guest, mut qmp, id) = inside(kernel, case, None)?;
    let detached = qmp.execute("probe-detach", json!({"id": id}))?;
    assert_eq!(
        detached.pointer("/collected/freed"),
        Some(&json!([])),
        "{detached}"
    );
    let told = qmp.execute("query-holdouts", json!({}))?;
    let all = told["holdouts"].as_array().into_iter().flatten();
    let names: BTreeSet<_> = all.filter_map(|one| one["found"].as_str()).collect();
    let cats = names.iter().filter(|found| found.contains("cat (pid"));
    let pids: BTreeSet<_> = cats.filter_map(|found| found.split(')').next()).collect();
    assert_eq!(pids.len(), TASKS, "{told}");
    let cookie = qmp.execute("gp-snapshot", json!({}))?["cookie"].clone();
    let poll = json!({"cookie": cookie});
    assert_eq!(
        qmp.execute("gp-poll", poll.clone())?["passed"],
        json!(false)
    );
    qmp.event("TRAMPOLINE_FREED", SOON)?;
    all_freed(&mut qmp)?;
    assert_eq!(qmp.execute("gp-poll", poll)?["passed"], json!(true));
    let version = guest.sh("cat /proc/version")?;
    let same = guest.sh(&format!(
        "sleep 0.3; i=0; n=0; while [ $i -lt {TASKS} ]; do i=$((i+1)); \
         cmp -s /tmp/version.$i /proc/version && n=$((n+1)); done; echo $n"
    ))?;
    assert_eq!(same.trim(), TASKS.to_string(), "{version}");
    assert_eq!(guest.complaints()?, "");
    println!(
        "{}: {TASKS} tasks inside, all of them holdouts by name, freed after the last",
        case.name
    );
    Ok(())
}

/// Without the rule it is freed under their feet.
fn freed_too_early(kernel: &str, case: &Case) -> TestResult {
    let (guest, mut qmp, id) = inside(kernel, case, Some(case.rule))?;
    let detached = qmp.execute("probe-detach", json!({"id": id}))?;
    assert_eq!(
        detached.pointer("/collected/freed"),
        Some(&json!([id])),
        "{detached}"
    );
    dies(&guest)?;
    println!(
        "{}: without the rule {:?} the guest died",
        case.name, case.rule
    );
    Ok(())
}

fn both_sides(kernel: &str, case: &Case) -> TestResult {
    held_up(kernel, case)?;
    freed_too_early(kernel, case)
}

#[test]
fn preempted_in_trampoline_on_6_12() -> TestResult {
    on_kvm_breaking(|| both_sides("6.12", &PREEMPTED))
}

#[test]
fn preempted_in_trampoline_on_6_1() -> TestResult {
    on_kvm_breaking(|| both_sides("6.1", &PREEMPTED))
}

#[test]
fn callee_returns_on_6_12() -> TestResult {
    on_kvm_breaking(|| both_sides("6.12", &CALLEE))
}

#[test]
fn sleeping_callback_on_6_12() -> TestResult {
    on_kvm_breaking(|| both_sides("6.12", &SLEEPING))
}
