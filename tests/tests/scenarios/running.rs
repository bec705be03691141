//! Who runs while others wait: somebody who never schedules, idle tasks, a kernel without preemption.

use std::collections::HashMap;
use std::time::Instant;

use stillpoint_tests::{instructions, take_sum};

use super::*;

/// Somebody in the kernel never schedules: the guest's own grace period waits for him, ours does not.
fn never_schedules(kernel: &str) -> TestResult {
    const SPINS: Duration = Duration::from_secs(4);
    let guest = Guest::boot(kernel).cpus(2).start()?;
    let mut qmp = guest.control()?;
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

/// A guest without some rules.
fn without(kernel: &str, more: &str, rules: &str) -> Result<(Guest, Qmp), Failure> {
    let boot = Guest::boot(kernel).cpus(2).cmdline(more);
    let guest = mortal(boot, Some(rules)).start()?;
    let qmp = guest.control()?;
    Ok((guest, qmp))
}

/// Attaches and detaches until the guest's kernel has died of it.
fn until_it_dies(guest: &Guest, qmp: &mut Qmp, request: &Value, rounds: u32) -> TestResult {
    for _ in 0..rounds {
        let Ok(reply) = qmp.execute("probe-attach", request.clone()) else {
            break;
        };
        std::thread::sleep(Duration::from_millis(150));
        if qmp
            .execute("probe-detach", json!({"id": reply["id"]}))
            .is_err()
        {
            break;
        }
    }
    dies(guest)
}

/// Code that the idle task runs, and an interrupt on top of it.
fn idle_task(kernel: &str) -> TestResult {
    const ROUNDS: u32 = 20;
    const MILLISECONDS: u64 = 40;
    let guest = Guest::boot(kernel).cpus(2).start()?;
    let mut qmp = guest.control()?;
    let mut count = HashMap::new();
    let mut waited = 0;
    for _ in 0..ROUNDS {
        for site in ["tick_nohz_idle_stop_tick", "hrtimer_interrupt"] {
            let id = attach(&mut qmp, json!({"site": site}))?;
            std::thread::sleep(Duration::from_millis(100));
            let reply = qmp.execute("probe-detach", json!({"id": id}))?;
            *count.entry(site).or_insert(0) += reply["probe"]["hits"].as_u64().unwrap_or(0);
        }
        // An idle task that is in a function which will return to a callback.
        let id = attach(&mut qmp, delays_idle(MILLISECONDS))?;
        std::thread::sleep(Duration::from_millis(100));
        let reply = qmp.execute("probe-detach", json!({"id": id}))?;
        waited += u32::from(reply["collected"]["freed"] == json!([]));
    }
    all_freed(&mut qmp)?;
    assert!(
        count.len() == 2 && count.values().all(|hits| *hits > 0),
        "{count:?}"
    );
    assert!(waited > 0, "no idle task was met in a callback");
    assert_eq!(guest.complaints()?, "");
    println!("idle-task: {ROUNDS} rounds, {count:?}, {waited} waited for an idle task, all freed");
    let (guest, mut qmp) = without(kernel, "", "idle-tasks")?;
    until_it_dies(&guest, &mut qmp, &delays_idle(MILLISECONDS), 200)?;
    println!("idle-task: without the rule \"idle-tasks\" the guest died");
    Ok(())
}

fn delays_idle(milliseconds: u64) -> Value {
    json!({"site": "tick_nohz_idle_stop_tick", "object": object("delayer"), "data": milliseconds})
}

#[test]
fn idle_task_on_6_12() -> TestResult {
    on_kvm_breaking(|| idle_task("6.12"))
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
    let (guest, mut qmp) = without(kernel, "preempt=none", "running-tasks")?;
    guest.start_sh("while :; do cat /proc/version; done >/dev/null 2>&1")?;
    let stays = json!({"site": "version_proc_show", "object": object("delayer"), "data": 40});
    until_it_dies(&guest, &mut qmp, &stays, 200)?;
    println!("no-preemption: without the rule \"running-tasks\" the guest died");
    Ok(())
}

#[test]
fn no_preemption_on_6_12() -> TestResult {
    on_kvm_breaking(|| no_preemption("6.12"))
}

/// Where RCU does not watch, nothing is attached, and what uses RCU is not called.
fn rcu_not_watching(kernel: &str) -> TestResult {
    const IDLE: &str = "default_idle_call";
    let guest = Guest::boot(kernel).cpus(2).start()?;
    let mut qmp = guest.control()?;
    let places = instructions(&mut qmp, kernel, IDLE)?;
    let at = |offset: u64| json!({"site": format!("{IDLE}+{offset:#x}"), "object": object("watcher"), "deadline": "5s"});
    for place in &places {
        match qmp.execute("probe-attach", at(place.offset)) {
            Err(QmpError::Refused { desc, .. }) => {
                assert!(desc.starts_with("ForbiddenText"), "{desc}");
            }
            other => return Err(Failure::new(format!("not refused: {other:?}"))),
        }
    }
    println!(
        "rcu-not-watching: refused at each of {} instructions of {IDLE}",
        places.len()
    );

    // Were they not refused, the callback would be skipped and counted.
    let (guest, mut qmp) = without(kernel, "", "forbidden-text")?;
    take_sum(&guest)?;
    let mut unwatched = None;
    let mut skipped = 0;
    for place in &places {
        let Ok(id) = attach(&mut qmp, at(place.offset)) else {
            continue;
        };
        std::thread::sleep(Duration::from_millis(200));
        let reply = qmp.execute("probe-detach", json!({"id": id, "deadline": "5s"}))?;
        let count = reply["probe"]["skipped"].as_u64().unwrap_or(0);
        if count > 0 {
            skipped += count;
            unwatched.get_or_insert(place.offset);
        }
    }
    assert_eq!(take_sum(&guest)?, 0, "called where RCU does not watch");
    let offset = unwatched.ok_or_else(|| Failure::new("RCU watches everywhere in {IDLE}"))?;
    println!("rcu-not-watching: were it not, {skipped} calls skipped, none made");

    let (guest, mut qmp) = without(kernel, "", "forbidden-text,rcu-watching")?;
    take_sum(&guest)?;
    let id = attach(&mut qmp, at(offset))?;
    std::thread::sleep(Duration::from_millis(500));
    qmp.execute("probe-detach", json!({"id": id, "deadline": "5s"}))?;
    let wrong = take_sum(&guest)?;
    assert!(wrong > 0);
    println!("rcu-not-watching: without both rules {wrong} calls where RCU does not watch");
    Ok(())
}

#[test]
fn rcu_not_watching_on_6_12() -> TestResult {
    on_kvm_breaking(|| rcu_not_watching("6.12"))
}
