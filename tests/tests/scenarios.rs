//! What trampolines are known to go wrong with, each on a stock kernel.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stillpoint_tests::{
    Failure, Guest, Qmp, QmpError, TestResult, all_freed, on_kvm, replacement, take_sum,
};

fn attach(qmp: &mut Qmp, request: Value) -> Result<u64, Failure> {
    let reply = qmp.execute("probe-attach", request)?;
    let id = reply["id"].as_u64();
    id.ok_or_else(|| Failure::new(format!("no number in {reply}")))
}

/// Functions that can be probed, as many as are wanted.
fn functions(qmp: &mut Qmp, wanted: usize) -> Result<Vec<String>, Failure> {
    let mut found = Vec::new();
    for pattern in [
        "__x64_sys_*",
        "vfs_*",
        "ext4_*",
        "tcp_*",
        "ip_*",
        "proc_*",
        "sock_*",
        "pci_*",
    ] {
        let reply = qmp.execute("query-symbols", json!({"pattern": pattern, "limit": 2000}))?;
        let mut count = HashMap::new();
        let names = reply["symbols"].as_array().into_iter().flatten();
        let text = names.filter(|symbol| symbol["type"] == "T" || symbol["type"] == "t");
        for name in text.filter_map(|symbol| symbol["name"].as_str()) {
            *count.entry(name.to_owned()).or_insert(0) += 1;
        }
        let mut once: Vec<_> = count.into_iter().filter(|(_, n)| *n == 1).collect();
        once.sort();
        let left = wanted.saturating_sub(found.len());
        let plain = once.into_iter().map(|(name, _)| name);
        found.extend(plain.filter(|name| !name.contains('.')).take(left));
    }
    match found.len() >= wanted {
        true => Ok(found),
        false => Err(Failure::new(format!("{} functions only", found.len()))),
    }
}

/// A thousand functions, each with a callback of its own and data of its own.
fn thousand_trampolines(kernel: &str) -> TestResult {
    const WANTED: usize = 1000;
    let guest = Guest::boot(kernel).cpus(2).start()?;
    let mut qmp = guest.control()?;
    take_sum(&guest)?;
    let object = replacement("add").display().to_string();
    let mut attached: Vec<u64> = Vec::new();
    let mut refused = 0;
    for name in functions(&mut qmp, WANTED + 300)? {
        let data = attached.len() + 1;
        let request = json!({"site": name, "object": object, "data": data});
        match qmp.execute("probe-attach", request) {
            Ok(reply) => attached.push(reply["id"].as_u64().unwrap_or(0)),
            Err(QmpError::Refused { .. }) => refused += 1,
            Err(error) => return Err(error.into()),
        }
        if attached.len() == WANTED {
            break;
        }
    }
    assert_eq!(attached.len(), WANTED, "{refused} were refused");
    guest.sh("ls -lR /proc/self /sys/kernel >/dev/null; cat /proc/version; ip link; true")?;
    // All at one moment; nothing is added after that.
    let request = json!({"ids": attached, "deadline": "60s"});
    let detached = qmp.execute("probe-detach", request)?;
    let (mut hits, mut expected, mut called) = (0_u64, 0_i32, 0);
    for probe in detached["probes"].as_array().into_iter().flatten() {
        let count = probe["hits"].as_u64().unwrap_or(0);
        let data = probe["data"]
            .as_str()
            .unwrap_or("")
            .trim_start_matches("0x");
        let data = i32::from_str_radix(data, 16)?;
        hits += count;
        called += usize::from(count > 0);
        let count = i32::try_from(count % (1 << 31))?;
        expected = expected.wrapping_add(data.wrapping_mul(count));
    }
    assert!(
        called > 20 && hits > 1000,
        "{called} functions were called {hits} times"
    );
    assert_eq!(
        take_sum(&guest)?,
        i64::from(expected),
        "each call with its own data"
    );
    all_freed(&mut qmp)?;
    assert_eq!(guest.complaints()?, "");
    println!(
        "thousand-trampolines: {WANTED} callbacks, {called} called, {hits} hits, detached in {} stop(s)",
        detached["stop"]["stops"]
    );
    Ok(())
}

#[test]
fn thousand_trampolines_on_6_12() -> TestResult {
    on_kvm(|| thousand_trampolines("6.12"))
}

/// A hundred transitions as one change.
fn coalesced(kernel: &str) -> TestResult {
    const WANTED: usize = 100;
    let guest = Guest::boot(kernel).cpus(2).start()?;
    let mut qmp = guest.control()?;
    guest.sh("(while :; do cat /proc/version; done) >/dev/null 2>&1 & echo $! >/tmp/busy")?;
    let mut sites = Vec::new();
    for name in functions(&mut qmp, WANTED * 2)? {
        if let Ok(reply) = qmp.execute("probe-attach", json!({"site": name})) {
            qmp.execute("probe-detach", json!({"id": reply["id"]}))?;
            sites.push(name);
        }
        if sites.len() == WANTED {
            break;
        }
    }
    assert_eq!(sites.len(), WANTED);
    // One that cannot be: none is.
    let with = |last: &str| {
        let mut all = sites.clone();
        all.push(last.to_owned());
        json!({"sites": all})
    };
    assert!(qmp.execute("probe-attach", with("start_kernel")).is_err());
    assert!(
        qmp.execute("probe-attach", with(&format!("{}+1", sites[0])))
            .is_err()
    );
    let probes = qmp.execute("query-probes", json!({}))?;
    assert_eq!(probes["probes"], json!([]));
    all_freed(&mut qmp)?;
    let attached = qmp.execute("probe-attach", json!({"sites": sites, "deadline": "30s"}))?;
    let ids: Vec<_> = attached["probes"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|p| p["id"].clone())
        .collect();
    assert_eq!(ids.len(), WANTED);
    guest.sh("cat /proc/version; ls /proc >/dev/null")?;
    let mut wrong = ids.clone();
    wrong.push(json!(999_999));
    assert!(qmp.execute("probe-detach", json!({"ids": wrong})).is_err());
    let begun = Instant::now();
    let detached = qmp.execute("probe-detach", json!({"ids": ids, "deadline": "30s"}))?;
    all_freed(&mut qmp)?;
    let took = begun.elapsed();
    let stops = detached["stop"]["stops"].as_u64().unwrap_or(u64::MAX);
    assert!(stops <= 3, "{}", detached["stop"]);
    guest.sh("kill $(cat /tmp/busy)")?;
    assert_eq!(guest.complaints()?, "");
    println!("coalesced: {WANTED} transitions, {stops} stop(s), {took:?} until all were freed");
    Ok(())
}

#[test]
fn coalesced_on_6_12() -> TestResult {
    on_kvm(|| coalesced("6.12"))
}

#[test]
fn coalesced_on_6_1() -> TestResult {
    on_kvm(|| coalesced("6.1"))
}

/// Somebody in the kernel never schedules: the guest's own grace period waits for him, ours does not.
fn never_schedules(kernel: &str) -> TestResult {
    const SPINS: Duration = Duration::from_secs(4);
    let guest = Guest::boot(kernel).cpus(2).start()?;
    let mut qmp = guest.control()?;
    let object = |name: &str| replacement(name).display().to_string();
    let mega = guest.sh("awk '/cpu MHz/ {print int($4); exit}' /proc/cpuinfo")?;
    let mega: u64 = mega.trim().parse()?;
    let spinner = json!({"site": "cmdline_proc_show", "object": object("spinner"), "data": mega * SPINS.as_secs()});
    attach(&mut qmp, spinner)?;
    attach(
        &mut qmp,
        json!({"site": "version_proc_show", "object": object("synchronize")}),
    )?;
    guest.sh("cat /proc/version >/dev/null")?;
    guest.sh("taskset -c 1 cat /proc/cmdline >/dev/null & sleep 0.3; \
              (cat /proc/version >/dev/null; : >/tmp/theirs) & : >/tmp/begun")?;
    let begun = Instant::now();
    let mut longest = Duration::ZERO;
    for _ in 0..20 {
        let id = attach(&mut qmp, json!({"site": "vfs_read"}))?;
        let asked = Instant::now();
        let reply = qmp.execute("probe-detach", json!({"id": id}))?;
        if reply["collected"]["freed"] != json!([id]) {
            qmp.event("TRAMPOLINE_FREED", Duration::from_secs(20))?;
        }
        longest = longest.max(asked.elapsed());
    }
    assert!(
        begun.elapsed() < SPINS / 2,
        "too slow to tell: {:?}",
        begun.elapsed()
    );
    assert!(
        guest.sh_status("test -e /tmp/theirs")?.0 != 0,
        "theirs did not wait"
    );
    guest.sh("until [ -e /tmp/theirs ]; do sleep 0.1; done")?;
    let theirs = begun.elapsed();
    assert!(theirs > SPINS / 2, "{theirs:?}");
    println!("never-schedules: ours {longest:?} at most of 20, theirs {theirs:?}");
    Ok(())
}

#[test]
fn never_schedules_on_6_12() -> TestResult {
    on_kvm(|| never_schedules("6.12"))
}

/// Code that the idle task runs, and an interrupt on top of it.
fn idle_task(kernel: &str) -> TestResult {
    const ROUNDS: u32 = 20;
    let guest = Guest::boot(kernel).cpus(2).start()?;
    let mut qmp = guest.control()?;
    let mut hits = HashMap::new();
    for _ in 0..ROUNDS {
        for site in ["tick_nohz_idle_stop_tick", "hrtimer_interrupt"] {
            let id = attach(&mut qmp, json!({"site": site}))?;
            std::thread::sleep(Duration::from_millis(150));
            let reply = qmp.execute("probe-detach", json!({"id": id}))?;
            *hits.entry(site).or_insert(0) += reply["probe"]["hits"].as_u64().unwrap_or(0);
        }
    }
    all_freed(&mut qmp)?;
    assert!(
        hits.len() == 2 && hits.values().all(|hits| *hits > 0),
        "{hits:?}"
    );
    assert_eq!(guest.complaints()?, "");
    println!("idle-task: {ROUNDS} rounds, {hits:?}, all freed");
    Ok(())
}

#[test]
fn idle_task_on_6_12() -> TestResult {
    on_kvm(|| idle_task("6.12"))
}

/// Without preemption: the same answers.
fn no_preemption(kernel: &str) -> TestResult {
    const ROUNDS: u32 = 20;
    let guest = Guest::boot(kernel)
        .cpus(2)
        .cmdline("preempt=none")
        .start()?;
    let mut qmp = guest.control()?;
    guest.sh("(guest calls 600 &) >/dev/null; (while :; do cat /proc/version; done) >/dev/null 2>&1 & echo $! >/tmp/busy")?;
    let mut at_once = 0;
    for round in 0..ROUNDS {
        let site = [
            "vfs_read",
            "vfs_read+0x13",
            "__x64_sys_getppid",
            "version_proc_show",
        ];
        let site = site[round as usize % site.len()];
        let Ok(id) = attach(&mut qmp, json!({"site": site})) else {
            assert!(site.contains('+'), "{site}");
            continue;
        };
        std::thread::sleep(Duration::from_millis(20));
        let reply = qmp.execute("probe-detach", json!({"id": id, "deadline": "20s"}))?;
        at_once += u32::from(reply["collected"]["freed"] == json!([id]));
    }
    all_freed(&mut qmp)?;
    guest.sh("kill $(cat /tmp/busy)")?;
    assert_eq!(guest.complaints()?, "");
    println!("no-preemption: {at_once} of {ROUNDS} freed in the stop that detached");
    Ok(())
}

#[test]
fn no_preemption_on_6_12() -> TestResult {
    on_kvm(|| no_preemption("6.12"))
}
