//! Probes that act when a function returns: nothing is lost, nothing is seen that is not so, and who
//! is in the function holds up what it will return to.

use std::time::Duration;

use serde_json::{Value, json};
use stillpoint_tests::{
    Failure, Guest, Qmp, TestResult, all_freed, attach_probe, detach_probes, on_kvm, replacement,
    take_sum,
};

/// One guest and its probes.
struct Lab {
    guest: Guest,
    qmp: Qmp,
}

impl Lab {
    fn attach(&mut self, site: &str, more: Value) -> Result<u64, Failure> {
        attach_probe(&mut self.qmp, site, more)
    }

    fn hits(&mut self, id: u64) -> Result<u64, Failure> {
        let reply = self.qmp.execute("query-probes", json!({}))?;
        let mut all = reply["probes"].as_array().into_iter().flatten();
        let found = all.find(|probe| probe["id"] == json!(id));
        let hits = found.and_then(|probe| probe["hits"].as_u64());
        hits.ok_or_else(|| Failure::new(format!("no probe {id} in {reply}")))
    }

    /// Detaches in one stop. Tells the last counts.
    fn detach(&mut self, ids: &[u64]) -> Result<Vec<u64>, Failure> {
        detach_probes(&mut self.qmp, ids)
    }

    /// For each CPU, the buckets of a histogram; and how many cycles are a millisecond.
    fn histogram(&mut self, id: u64) -> Result<(Vec<Vec<u64>>, u64), Failure> {
        let reply = self.qmp.execute("query-histogram", json!({ "id": id }))?;
        let cpus = serde_json::from_value(reply["cpus"].clone())?;
        if reply.get("register").is_none() {
            assert_eq!(reply["unit"], "tsc-cycles", "{reply}");
        }
        Ok((cpus, reply["tsc-khz"].as_u64().unwrap_or(0)))
    }
}

fn sum(cpus: &[Vec<u64>]) -> u64 {
    cpus.iter().flatten().sum()
}

/// Both CPUs at once, while other probes come to the site and go: as many returns as calls, each with
/// what was returned.
fn under_load(lab: &mut Lab) -> TestResult {
    const SITE: &str = "__x64_sys_getppid";
    const OTHERS: usize = 6;
    let called = lab.attach(SITE, json!({}))?;
    let returned = lab.attach(SITE, json!({"return": true}))?;
    let values = lab.attach(
        SITE,
        json!({"return": true, "callback": "record", "registers": ["ax"], "records": 64}),
    )?;
    let latency = lab.attach(SITE, json!({"callback": "latency"}))?;
    lab.guest.sh(
        "sh -c 'echo parent $$; guest calls 600; true' >/tmp/calls & \
         until pidof guest >/tmp/calling; do :; done",
    )?;
    for other in 0..OTHERS {
        let when = json!({"return": other % 2 == 0, "priority": other % 3});
        let id = lab.attach(SITE, when)?;
        std::thread::sleep(Duration::from_millis(20));
        lab.detach(&[id])?;
    }
    let said = lab
        .guest
        .sh("kill $(cat /tmp/calling); until grep -q 'cpu 1' /tmp/calls && grep -q 'cpu 0' /tmp/calls; do sleep 0.1; done; cat /tmp/calls")?;
    let word = |line: &str, index| line.split_whitespace().nth(index)?.parse::<u64>().ok();
    let of = |start: &str, index: usize| {
        let lines = said.lines().filter(|line| line.starts_with(start));
        lines
            .filter_map(|line| word(line, index))
            .collect::<Vec<_>>()
    };
    let calls: u64 = of("cpu", 2).iter().sum();
    let (cpus, _) = lab.histogram(latency)?;
    assert_eq!(cpus.len(), 2);
    assert!(
        cpus.iter().all(|cpu| cpu.iter().sum::<u64>() > 100),
        "{cpus:?}"
    );
    let told = lab.qmp.execute("query-records", json!({"id": values}))?;
    let kept = told["records"].as_array().cloned().unwrap_or_default();
    assert_eq!(kept.len(), 64, "{told}");
    let right = of("parent", 1).first().map(|parent| format!("{parent:#x}"));
    let same = |one: &Value| one["values"][0] == json!(right);
    assert!(kept.iter().all(same), "{right:?}: {told}");
    let counts = lab.detach(&[called, returned, values, latency])?;
    assert!(counts.iter().all(|count| *count == counts[0]), "{counts:?}");
    assert_eq!(counts[0], sum(&cpus));
    assert!(counts[0] >= calls && calls > 1000, "{calls}, {counts:?}");
    all_freed(&mut lab.qmp)?;
    println!("returns: {calls} calls on 2 vCPUs while {OTHERS} others came and went, none lost");
    Ok(())
}

/// How long a function took that sleeps, where it was asked for something; and arguments of the call.
fn latency_of_sleepers(lab: &mut Lab) -> TestResult {
    const SITE: &str = "hrtimer_nanosleep";
    const LONG: u64 = 300;
    let long = json!({"callback": "latency", "if-called": "di>=200000000"});
    let long = lab.attach(SITE, long)?;
    let all = lab.attach(SITE, json!({"return": true, "if": "ax==0"}))?;
    lab.guest
        .sh("for i in 1 2 3; do sleep 0.3; sleep 0.01; done")?;
    let (cpus, khz) = lab.histogram(long)?;
    let counts = lab.detach(&[long, all])?;
    assert_eq!(counts, [3, 6]);
    assert_eq!(sum(&cpus), 3, "{cpus:?}");
    // A bucket that begins with 2^n is the one of index n + 1.
    let least = usize::try_from((LONG * khz).ilog2())? + 1;
    let most = usize::try_from((LONG * 8 * khz).ilog2())? + 1;
    for cpu in &cpus {
        for (bucket, count) in cpu.iter().enumerate().filter(|(_, count)| **count > 0) {
            assert!(
                (least..=most).contains(&bucket),
                "{count} in {bucket}: {cpus:?} at {khz} kHz"
            );
        }
    }
    all_freed(&mut lab.qmp)
}

/// More arguments than registers, and a function that calls itself.
fn arguments_and_recursion(lab: &mut Lab) -> TestResult {
    let mut ids = Vec::new();
    for site in ["do_mmap", "ep_loop_check_proc", "__dev_queue_xmit"] {
        ids.push(lab.attach(site, json!({}))?);
        ids.push(lab.attach(site, json!({"return": true}))?);
        ids.push(lab.attach(
            site,
            json!({"return": true, "callback": "histogram", "registers": ["ax"]}),
        )?);
    }
    let mapped = lab
        .guest
        .sh("for i in 1 2 3; do ls /sys/kernel >/dev/null; done; grep -c . /proc/self/maps")?;
    assert!(mapped.trim().parse::<u32>()? > 5, "{mapped}");
    lab.guest
        .sh("guest epolls 4; ping -c 3 -i 0.1 127.0.0.1 >/dev/null")?;
    // Addresses of user mode, and no errors.
    let (cpus, _) = lab.histogram(ids[2])?;
    assert!(cpus.iter().all(|cpu| cpu.len() <= 48), "{cpus:?}");
    let counts = lab.detach(&ids)?;
    for (counts, least) in counts.chunks(3).zip([20, 6, 6]) {
        assert!(counts[0] >= least, "{counts:?}");
        assert_eq!((counts[1], counts[2]), (counts[0], counts[0]));
    }
    all_freed(&mut lab.qmp)?;
    println!("returns: arguments on the stack, recursion and interrupts: {counts:?}");
    Ok(())
}

/// What a callback sees, nested ones, one that sleeps, and the guest's own return probe elsewhere.
fn callbacks(lab: &mut Lab) -> TestResult {
    const SITE: &str = "version_proc_show";
    const READS: u64 = 5;
    const TRACING: &str = "/sys/kernel/tracing";
    let object = |name: &str| replacement(name).display().to_string();
    take_sum(&lab.guest)?;
    let sees = lab.attach(
        SITE,
        json!({"return": true, "object": object("returned"), "data": 0}),
    )?;
    let nested = lab.attach(
        "jiffies_to_msecs",
        json!({"return": true, "object": object("returned")}),
    )?;
    let dozes = lab.attach(
        SITE,
        json!({"return": true, "object": object("dozer"), "data": 1, "priority": -1}),
    )?;
    lab.guest.sh(&format!(
        "cd {TRACING} && echo 'r:theirs seq_printf' >kprobe_events && \
         echo 1 >events/kprobes/enable"
    ))?;
    let read = format!("for i in $(seq {READS}); do cat /proc/version; done | uniq | wc -l");
    assert_eq!(lab.guest.sh(&read)?.trim(), "1");
    let theirs = lab.guest.sh(&format!(
        "cd {TRACING} && grep -c 'theirs:' trace; echo 0 >events/kprobes/enable; echo >kprobe_events; echo >trace"
    ))?;
    assert!(theirs.trim().parse::<u64>()? >= READS, "{theirs}");
    let seen = take_sum(&lab.guest)?;
    let skipped = lab.qmp.execute("query-probes", json!({}))?;
    let skipped = skipped["probes"].as_array().cloned().unwrap_or_default();
    let skipped = skipped.iter().find(|probe| probe["id"] == json!(nested));
    let skipped = skipped.and_then(|probe| probe["skipped"].as_u64());
    let counts = lab.detach(&[sees, nested, dozes])?;
    assert_eq!((counts[0], counts[2]), (READS, READS));
    assert!(skipped >= Some(READS), "{skipped:?}");
    // What others ask of jiffies_to_msecs() returns something else than 0, mostly.
    assert_eq!(
        u64::try_from(seen)? % 1_000_000,
        READS,
        "{seen}, {counts:?}"
    );
    all_freed(&mut lab.qmp)
}

/// Taken out while somebody sleeps in the function: who is told, who is not, and what is freed when.
fn taken_out(lab: &mut Lab) -> TestResult {
    const SITE: &str = "hrtimer_nanosleep";
    let goes = lab.attach(SITE, json!({"return": true}))?;
    let stays = lab.attach(SITE, json!({"return": true}))?;
    lab.guest
        .sh("sleep 1000 & echo $! >/tmp/sleeper; sleep 0.3")?;
    let pid = lab.guest.sh("cat /tmp/sleeper")?.trim().to_owned();
    let stack = lab
        .qmp
        .execute("query-stacks", json!({"pid": pid.parse::<u32>()?}))?;
    let stack = &stack["tasks"][0];
    assert_eq!(stack["reliable"], true, "{stack}");
    let text = stack.to_string();
    assert!(text.contains("[stillpoint hrtimer_nanosleep"), "{text}");
    assert!(text.contains("do_syscall_64"), "{text}");
    // The guest's own ends where it knows the code no more.
    let theirs = lab.guest.sh(&format!("cat /proc/{pid}/stack"))?;
    assert!(theirs.contains("nanosleep"), "{theirs}");
    // What it prints for people goes on, with doubts, and without a complaint.
    assert_eq!(lab.guest.complaints()?, "");
    let printed = lab.guest.sh(
        "dmesg -c >/dev/null; echo t >/proc/sysrq-trigger; dmesg | grep -A 30 'task:sleep'; \
         dmesg | grep WARNING; dmesg -c >/dev/null",
    )?;
    assert!(printed.contains("? do_syscall_64"), "{printed}");
    assert!(!printed.contains("WARNING"), "{printed}");
    let before = lab.hits(goes)?;
    assert_eq!(lab.detach(&[goes])?, [before]);
    let told = lab.qmp.execute("query-holdouts", json!({}))?.to_string();
    assert!(told.contains(&format!("pid {pid}")), "{told}");
    lab.guest
        .sh("kill $(cat /tmp/sleeper); while kill -0 $(cat /tmp/sleeper) 2>/dev/null; do sleep 0.1; done")?;
    assert!(lab.hits(stays)? > before);
    lab.detach(&[stays])?;
    all_freed(&mut lab.qmp)?;
    Ok(())
}

/// An interrupt's function: in one stop no more are inside than there are CPUs.
fn interrupts(lab: &mut Lab) -> TestResult {
    let called = lab.attach("hrtimer_interrupt", json!({}))?;
    let returned = lab.attach("hrtimer_interrupt", json!({"callback": "latency"}))?;
    let before = lab.hits(called)?;
    lab.guest.sh("guest calls 0.3 >/dev/null")?;
    let id = returned.to_string();
    let said = lab.guest.stillpoint(&["probe", "histogram", &id])?.ok()?;
    assert!(
        said.contains("CYCLES FROM") && said.contains("a millisecond"),
        "{said}"
    );
    let counts = lab.detach(&[called, returned])?;
    assert!(counts[0] > before + 20, "{counts:?}");
    assert!(counts[0] - counts[1] <= 2 + before, "{counts:?}");
    all_freed(&mut lab.qmp)
}

fn returns(kernel: &str, cmdline: &str) -> TestResult {
    let guest = Guest::boot(kernel).cpus(2).cmdline(cmdline).start()?;
    let qmp = guest.control()?;
    let mut lab = Lab { guest, qmp };
    under_load(&mut lab)?;
    latency_of_sleepers(&mut lab)?;
    arguments_and_recursion(&mut lab)?;
    callbacks(&mut lab)?;
    taken_out(&mut lab)?;
    interrupts(&mut lab)?;
    let said = lab.guest.stillpoint(&["inspect", "--json"])?.ok()?;
    let text: Value = serde_json::from_str(&said)?;
    assert_eq!(text["foreign"], json!([]), "{said}");
    assert_eq!(lab.guest.complaints()?, "");
    Ok(())
}

#[test]
fn probes_of_returns_on_6_12() -> TestResult {
    on_kvm(|| returns("6.12", "preempt=full"))
}

#[test]
fn probes_of_returns_on_6_1() -> TestResult {
    on_kvm(|| returns("6.1", ""))
}

/// A probe at the return of functions all over the kernel, a hundred at a time: whatever they are, the
/// guest does not notice.
#[cfg(feature = "full")]
mod full {
    use super::*;

    /// Of so many functions, one.
    const EACH: usize = 8;
    const AT_ONCE: usize = 100;

    /// Functions of the kernel, by names that are easily told apart.
    fn functions(qmp: &mut Qmp) -> Result<Vec<String>, Failure> {
        let mut names = Vec::new();
        for first in ('a'..='z').chain(['_']) {
            let (mut seen, mut more) = (0, true);
            while more {
                let pattern = format!("{first}*");
                let request = json!({"pattern": pattern, "skip": seen, "limit": 20_000});
                let reply = qmp.execute("query-symbols", request)?;
                let all = reply["symbols"].as_array().into_iter().flatten();
                seen += all.clone().count();
                more = reply["more"] != json!(0);
                let text = all.filter(|one| one["type"] == "T" || one["type"] == "t");
                names.extend(text.filter_map(|one| one["name"].as_str().map(str::to_owned)));
            }
        }
        names.sort();
        names.dedup();
        names.retain(|name| !name.contains('.') && !name.starts_with("__pfx_"));
        Ok(names)
    }

    fn everywhere(kernel: &str, cmdline: &str) -> TestResult {
        let boot = Guest::boot(kernel).cpus(2).memory("512M").cmdline(cmdline);
        let guest = boot.start()?;
        let mut qmp = guest.control()?;
        let names: Vec<_> = functions(&mut qmp)?.into_iter().step_by(EACH).collect();
        let mut lab = Lab { guest, qmp };
        let (mut taken, mut called) = (0, 0);
        for some in names.chunks(AT_ONCE) {
            let mut ids = Vec::new();
            for (index, site) in some.iter().enumerate() {
                let more = match index % 4 {
                    0 => json!({"return": true}),
                    1 => json!({"return": true, "callback": "histogram", "registers": ["ax"]}),
                    2 => json!({"callback": "latency", "if-called": "di!=0"}),
                    _ => json!({"return": true, "callback": "record", "records": 8,
                                "registers": ["ax", "sp", "bp"]}),
                };
                // What is refused says why; who is refused is tried elsewhere.
                if let Ok(id) = lab.attach(site, more) {
                    ids.push(id);
                }
            }
            lab.guest.sh(
                "ls -l /proc/self /sys/kernel >/dev/null 2>&1; ping -c 1 127.0.0.1 >/dev/null; \
                 sleep 0.05; guest calls 0.05 >/dev/null; echo 3 >/proc/sys/vm/drop_caches; \
                 true | cat | cat",
            )?;
            taken += ids.len();
            if !ids.is_empty() {
                let counts = lab.detach(&ids)?;
                called += counts.iter().filter(|count| **count > 0).count();
            }
            assert_eq!(lab.guest.complaints()?, "", "{some:?}");
        }
        assert!(taken > names.len() / 2, "{taken} of {}", names.len());
        println!(
            "returns: {taken} functions of {}, {called} called",
            names.len()
        );
        Ok(())
    }

    #[test]
    fn returns_everywhere_on_6_12() -> TestResult {
        on_kvm(|| everywhere("6.12", "preempt=full"))
    }

    #[test]
    fn returns_everywhere_on_6_1() -> TestResult {
        on_kvm(|| everywhere("6.1", ""))
    }
}
