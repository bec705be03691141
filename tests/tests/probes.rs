//! Probes count, come and go, and what they leave behind is freed when nobody is in it.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stillpoint_tests::{
    Failure, Guest, Qmp, QmpError, TestResult, all_freed, on_kvm, replacement, take_sum,
};

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

#[cfg(feature = "full")]
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
fn cookies_of_a_grace_period_that_a_sleeper_holds_up() -> TestResult {
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

/// Attaches with more than a site.
fn attach_as(qmp: &mut Qmp, request: Value) -> Result<u64, Failure> {
    number(&qmp.execute("probe-attach", request)?, "/id")
}

fn probe(qmp: &mut Qmp, id: u64) -> Result<Value, Failure> {
    let reply = qmp.execute("query-probes", json!({}))?;
    let mut all = reply["probes"].as_array().into_iter().flatten();
    let found = all.find(|probe| probe["id"] == json!(id)).cloned();
    found.ok_or_else(|| Failure::new(format!("no probe {id} in {reply}")))
}

fn callbacks(kernel: &str) -> TestResult {
    const SITE: &str = "version_proc_show";
    const READS: i64 = 20;
    let guest = Guest::boot(kernel).cpus(2).start()?;
    let mut qmp = guest.control()?;
    let before = guest.sh("cat /proc/version")?;
    let read = |times: i64| -> Result<(), Failure> {
        let said = guest.sh(&format!(
            "for i in $(seq {times}); do cat /proc/version; done | uniq"
        ))?;
        assert_eq!(said, before);
        Ok(())
    };
    let object = |name: &str| replacement(name).display().to_string();
    take_sum(&guest)?;

    // Everything that is built in, and code twice with different data, on one site.
    let add = |data: u64, priority: i32| {
        json!({
            "site": SITE, "object": object("add"), "data": data, "priority": priority,
        })
    };
    let once = attach_as(&mut qmp, add(1, 0))?;
    read(READS)?;
    assert_eq!(take_sum(&guest)?, READS, "one alone");
    let hundred = attach_as(&mut qmp, add(100, 7))?;
    let counted = attach(&mut qmp, SITE)?;
    let histogram = attach_as(
        &mut qmp,
        json!({"site": SITE, "callback": "histogram", "registers": ["di"]}),
    )?;
    let records = attach_as(
        &mut qmp,
        json!({"site": SITE, "callback": "record", "registers": ["di", "sp"], "records": 8}),
    )?;
    let never = attach_as(&mut qmp, json!({"site": SITE, "if": "di==0"}))?;
    let always = attach_as(
        &mut qmp,
        json!({"site": SITE, "if": "di>=0xffff800000000000"}),
    )?;
    read(READS)?;
    assert_eq!(
        take_sum(&guest)?,
        READS * 101,
        "both, each with its own data"
    );
    for (id, hits) in [
        (once, 2 * READS),
        (hundred, READS),
        (counted, READS),
        (never, 0),
        (always, READS),
    ] {
        assert_eq!(probe(&mut qmp, id)?["hits"], hits, "probe {id}");
    }
    let told = qmp.execute("query-histogram", json!({"id": histogram}))?;
    let all: u64 = told["cpus"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|cpu| {
            cpu.as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_u64)
                .collect::<Vec<_>>()
        })
        .sum();
    assert_eq!(i64::try_from(all)?, READS, "{told}");
    // Addresses of the direct map have their highest bit set: the last bucket.
    assert!(
        told["cpus"].as_array().is_some_and(|cpus| cpus
            .iter()
            .any(|cpu| cpu.as_array().is_some_and(|cpu| cpu.len() == 65))),
        "{told}"
    );
    let told = qmp.execute("query-records", json!({"id": records}))?;
    assert_eq!(
        (&told["lost"], &told["next"]),
        (&json!(READS - 8), &json!(READS)),
        "{told}"
    );
    let kept = told["records"].as_array().cloned().unwrap_or_default();
    assert_eq!(kept.len(), 8, "{told}");
    for record in &kept {
        assert!(
            record["values"][0]
                .as_str()
                .is_some_and(|di| di.starts_with("0xffff")),
            "{record}"
        );
        assert!(
            record["values"][1]
                .as_str()
                .is_some_and(|sp| sp.starts_with("0xffff")),
            "{record}"
        );
    }
    let told = qmp.execute("query-records", json!({"id": records, "since": READS}))?;
    assert_eq!(told["records"], json!([]), "{told}");

    // They go while both vCPUs come by, and the others stay right.
    guest.sh("(while :; do cat /proc/version; done) >/dev/null 2>&1 & echo $! >/tmp/busy")?;
    for id in [once, counted, records, never, histogram, always] {
        qmp.execute("probe-detach", json!({"id": id}))?;
    }
    guest.sh("kill $(cat /tmp/busy); sleep 0.2")?;
    let (hits, _) = detach(&mut qmp, hundred)?;
    let ones = take_sum(&guest)? - (i64::try_from(hits)? - READS) * 100;
    assert!(
        (0..100).contains(&ones),
        "only whole calls: {ones} after {hits} hits"
    );
    all_freed(&mut qmp)?;

    // A nested hit of a callback is skipped and counted; a count is not a callback.
    take_sum(&guest)?;
    let nested = json!({"object": object("nested"), "data": 1000});
    let at = |site: &str| {
        let mut request = nested.clone();
        request["site"] = json!(site);
        request
    };
    let outer = attach_as(&mut qmp, at(SITE))?;
    let inner = attach_as(&mut qmp, at("jiffies_to_msecs"))?;
    let inner_count = attach(&mut qmp, "jiffies_to_msecs")?;
    read(READS)?;
    let (outer, inner) = (probe(&mut qmp, outer)?, probe(&mut qmp, inner)?);
    assert_eq!(
        (&outer["hits"], &outer["skipped"]),
        (&json!(READS), &json!(0))
    );
    assert!(inner["skipped"].as_i64() >= Some(READS), "{inner}");
    assert!(hits_of(&mut qmp, inner_count)? >= READS, "{inner}");
    let sum = take_sum(&guest)?;
    assert!(
        (READS..1_000_000).contains(&sum),
        "{sum}: registers were wrong"
    );
    for probe in [&outer, &inner] {
        qmp.execute("probe-detach", json!({"id": probe["id"]}))?;
    }
    qmp.execute("probe-detach", json!({"id": inner_count}))?;
    all_freed(&mut qmp)?;

    // One that sleeps is left alone until it has come back.
    let dozer = attach_as(
        &mut qmp,
        json!({"site": SITE, "object": object("dozer"), "data": 2000}),
    )?;
    guest.sh("cat /proc/version >/tmp/slept & echo $! >/tmp/sleeper; sleep 0.5")?;
    let pid = guest.sh("cat /tmp/sleeper")?;
    let (_, reply) = detach(&mut qmp, dozer)?;
    assert_eq!(
        reply.pointer("/collected/freed"),
        Some(&json!([])),
        "{reply}"
    );
    let told = qmp.execute("query-holdouts", json!({}))?.to_string();
    assert!(told.contains(&format!("pid {}", pid.trim())), "{told}");
    all_freed(&mut qmp)?;
    assert_eq!(guest.sh("wait; cat /tmp/slept")?, before);
    // Where it may not sleep it is skipped.
    let dozer = attach_as(
        &mut qmp,
        json!({"site": "scheduler_tick", "object": object("dozer"), "data": 2000}),
    )
    .or_else(|_| {
        attach_as(
            &mut qmp,
            json!({"site": "sched_tick", "object": object("dozer"), "data": 2000}),
        )
    })?;
    guest.sh("sleep 0.5")?;
    let told = probe(&mut qmp, dozer)?;
    assert!(
        told["hits"] == 0 && told["skipped"].as_u64() > Some(0),
        "{told}"
    );
    detach(&mut qmp, dozer)?;
    all_freed(&mut qmp)?;
    assert_eq!(guest.complaints()?, "");
    println!("callbacks: 7 on one site, {READS} hits each, none lost; nested and sleeping ones");
    Ok(())
}

fn hits_of(qmp: &mut Qmp, id: u64) -> Result<i64, Failure> {
    Ok(i64::try_from(hits(qmp, id)?)?)
}

#[test]
fn sleeping_callback_and_others_on_6_12() -> TestResult {
    on_kvm(|| callbacks("6.12"))
}

#[test]
fn sleeping_callback_and_others_on_6_1() -> TestResult {
    on_kvm(|| callbacks("6.1"))
}
