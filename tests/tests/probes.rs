//! Probes count, come and go, and what they leave behind is freed when nobody is in it.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stillpoint_tests::{Failure, Guest, Qmp, QmpError, TestResult, on_kvm, replacement};

fn number(reply: &Value, pointer: &str) -> Result<u64, Failure> {
    reply
        .pointer(pointer)
        .and_then(Value::as_u64)
        .ok_or_else(|| Failure::new(format!("no {pointer} in {reply}")))
}

fn attach(qmp: &mut Qmp, site: &str) -> Result<u64, Failure> {
    let reply = qmp.execute("probe-attach", json!({"site": site}))?;
    number(&reply, "/id")
}

/// Detaches and returns the last count.
fn detach(qmp: &mut Qmp, id: u64) -> Result<(u64, Value), Failure> {
    let reply = qmp.execute("probe-detach", json!({"id": id}))?;
    Ok((number(&reply, "/probe/hits")?, reply))
}

fn hits(qmp: &mut Qmp, id: u64) -> Result<u64, Failure> {
    let reply = qmp.execute("query-probes", json!({}))?;
    let all = reply.get("probes").and_then(Value::as_array);
    let of = |probe: &&Value| probe.get("id").and_then(Value::as_u64) == Some(id);
    let probe = all.into_iter().flatten().find(of);
    probe
        .and_then(|probe| number(probe, "/hits").ok())
        .ok_or_else(|| Failure::new(format!("no probe {id} in {reply}")))
}

/// Waits until nothing is retired any more.
fn all_freed(qmp: &mut Qmp) -> TestResult {
    let begun = Instant::now();
    loop {
        let reply = qmp.execute("query-trampolines", json!({}))?;
        let all = reply.get("trampolines").and_then(Value::as_array);
        if all.is_some_and(Vec::is_empty) {
            return Ok(());
        }
        if begun.elapsed() > Duration::from_secs(20) {
            return Err(Failure::new(format!("not freed: {reply}")));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Sites in `function` at which a probe can be attached, the entry first.
fn sites(qmp: &mut Qmp, function: &str, upto: u32) -> Result<Vec<String>, Failure> {
    let mut found = Vec::new();
    for offset in 0..upto {
        let site = format!("{function}+{offset:#x}");
        match qmp.execute("probe-attach", json!({"site": site})) {
            Ok(reply) => {
                detach(qmp, number(&reply, "/id")?)?;
                found.push(site);
            }
            Err(QmpError::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(found)
}

fn counts(kernel: &str) -> TestResult {
    const READS: u64 = 500;
    let guest = Guest::boot(kernel).cpus(2).start()?;
    let mut qmp = guest.control()?;
    // What is asked of the kernel in a way that nobody else does meanwhile.
    let function = "version_proc_show";
    let read = |times: u64| {
        let each = format!("i=0; while [ $i -lt {times} ]; do cat /proc/version; i=$((i+1)); done");
        format!("({each}) >/dev/null & ({each}) >/dev/null; wait; cat /proc/version")
    };
    let before = guest.sh("cat /proc/version")?;
    let sites = sites(&mut qmp, function, 0x30)?;
    assert!(sites.len() > 2, "{sites:?}");
    for site in &sites {
        let id = attach(&mut qmp, site)?;
        assert_eq!(guest.sh(&read(5))?, before, "{site}");
        assert_eq!(hits(&mut qmp, id)?, 11, "{site}");
        let (last, reply) = detach(&mut qmp, id)?;
        assert_eq!(last, 11, "{reply}");
    }
    // Both vCPUs at once, exactly.
    let id = attach(&mut qmp, function)?;
    assert_eq!(
        guest.sh_within(Duration::from_secs(300), &read(READS))?.1,
        before
    );
    let (last, reply) = detach(&mut qmp, id)?;
    assert_eq!(last, 2 * READS + 1, "{reply}");
    all_freed(&mut qmp)?;
    assert_eq!(guest.sh("cat /proc/version")?, before);
    assert_eq!(guest.complaints()?, "");
    println!(
        "probes: {} sites in {function}, {last} hits on 2 vCPUs",
        sites.len()
    );
    Ok(())
}

#[test]
fn probes_count_exactly_on_6_12() -> TestResult {
    on_kvm(|| counts("6.12"))
}

#[test]
fn probes_count_exactly_on_6_1() -> TestResult {
    on_kvm(|| counts("6.1"))
}

fn cookie(qmp: &mut Qmp) -> Result<Value, Failure> {
    let reply = qmp.execute("gp-snapshot", json!({}))?;
    let cookie = reply.get("cookie").cloned();
    cookie.ok_or_else(|| Failure::new(format!("no cookie in {reply}")))
}

fn passed(qmp: &mut Qmp, cookie: &Value) -> Result<bool, Failure> {
    let reply = qmp.execute("gp-poll", json!({"cookie": cookie}))?;
    let passed = reply.get("passed").and_then(Value::as_bool);
    passed.ok_or_else(|| Failure::new(format!("not said whether it passed: {reply}")))
}

/// A task that sleeps in code that was taken out holds its grace period up, by name, until it
/// leaves.
#[test]
fn a_sleeper_holds_a_grace_period_up() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").cpus(2).start()?;
        let mut qmp = guest.control()?;
        let before = guest.sh("cat /proc/version")?;
        let earlier = cookie(&mut qmp)?;
        assert!(passed(&mut qmp, &earlier)?);
        for bad in ["17", "-1", "soon", ""] {
            let refused = qmp.execute("gp-poll", json!({"cookie": bad}));
            assert!(matches!(refused, Err(QmpError::Refused { .. })), "{bad}");
        }

        let object = replacement("sleeper").display().to_string();
        let request = json!({"site": "version_proc_show", "object": object});
        let change = qmp.execute("text-redirect", request)?;
        guest.sh("cat /proc/version >/tmp/slept & echo $! >/tmp/sleeper; sleep 0.5")?;
        let pid = guest.sh("cat /tmp/sleeper")?;
        let begun = Instant::now();
        let reverted = qmp.execute("text-revert", json!({"id": change.get("id")}))?;
        assert_eq!(
            reverted.pointer("/collected/freed"),
            Some(&json!([])),
            "{reverted}"
        );
        // New calls run the old function at once; the one that sleeps is still in the new one.
        assert_eq!(guest.sh("cat /proc/version")?, before);
        let now = cookie(&mut qmp)?;
        assert!(passed(&mut qmp, &earlier)?, "nothing older is waited for");
        assert!(!passed(&mut qmp, &now)?);
        let told = qmp.execute("query-holdouts", json!({}))?;
        let holdout = told.pointer("/holdouts/0/found").and_then(Value::as_str);
        let named = holdout.is_some_and(|found| found.contains(&format!("pid {}", pid.trim())));
        assert!(named, "{told}");
        match qmp.execute("gp-wait", json!({"cookie": now, "deadline": 300})) {
            Err(QmpError::Refused { desc, .. }) => {
                assert!(desc.contains(&format!("pid {}", pid.trim())), "{desc}");
            }
            other => return Err(Failure::new(format!("no deadline: {other:?}"))),
        }

        let waited = qmp.execute("gp-wait", json!({"cookie": now, "deadline": 20_000}))?;
        let after = begun.elapsed();
        assert!(after > Duration::from_secs(2), "passed too early: {waited}");
        all_freed(&mut qmp)?;
        assert!(passed(&mut qmp, &now)?);
        guest.sh("wait; sleep 1")?;
        assert_eq!(guest.sh("cat /tmp/slept")?.trim(), "z");
        assert_eq!(guest.complaints()?, "");
        println!("grace period: {after:?} for a sleeper of 4 s");
        Ok(())
    })
}

/// Busy vCPUs and tasks that sleep elsewhere hold nothing up for long.
#[test]
fn nobody_else_holds_a_grace_period_up() -> TestResult {
    const ROUNDS: usize = 20;
    on_kvm(|| {
        let guest = Guest::boot("6.12").cpus(2).start()?;
        let mut qmp = guest.control()?;
        guest.sh("(while :; do cat /proc/version; done) >/dev/null 2>&1 & echo $! >/tmp/busy")?;
        let (mut at_once, mut longest) = (0, Duration::ZERO);
        for _ in 0..ROUNDS {
            let id = attach(&mut qmp, "vfs_read")?;
            let begun = Instant::now();
            let (hits, _) = detach(&mut qmp, id)?;
            let now = cookie(&mut qmp)?;
            at_once += usize::from(passed(&mut qmp, &now)?);
            qmp.execute("gp-wait", json!({"cookie": now, "deadline": 20_000}))?;
            longest = longest.max(begun.elapsed());
            assert!(hits < 1 << 32, "{hits}");
        }
        all_freed(&mut qmp)?;
        guest.sh("kill $(cat /tmp/busy)")?;
        assert_eq!(guest.complaints()?, "");
        println!(
            "grace periods: {at_once} of {ROUNDS} passed in the stop that detached, {longest:?} at most"
        );
        Ok(())
    })
}
