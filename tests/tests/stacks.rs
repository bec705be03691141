//! What the guest's tasks have on their stacks, told from outside, against what the guest's own
//! kernel says in /proc/PID/stack.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use stillpoint_tests::{Failure, Guest, Qmp, TestResult, on_kvm};

/// What the guest's own kernel says of its tasks, by thread id.
#[derive(Default)]
struct Theirs {
    /// Checksums of /proc/PID/stack: all of them would take long over a serial port.
    stacks: BTreeMap<u64, u32>,
    /// How often they have left a CPU, read after the stacks.
    switches: BTreeMap<u64, String>,
}

fn theirs(guest: &Guest) -> Result<Theirs, Failure> {
    // A task may be gone by the time that its files are read.
    let (_, said) = guest.sh_status(
        "cd /proc; crc32 [0-9]*/task/[0-9]*/stack 2>/dev/null; \
         grep -H ctxt_switches [0-9]*/task/[0-9]*/status 2>/dev/null",
    )?;
    let mut theirs = Theirs::default();
    for line in said.lines() {
        let parsed = match line.split_once(':') {
            Some((path, told)) => pid_of(path).map(|pid| {
                // Of its own will, and not.
                theirs.switches.entry(pid).or_default().push_str(told);
            }),
            None => checksum_of(line).map(|(pid, sum)| {
                theirs.stacks.insert(pid, sum);
            }),
        };
        parsed.ok_or_else(|| Failure::new(format!("what is this: {line}")))?;
    }
    Ok(theirs)
}

/// The thread that a path is of, such as `1/task/7/stack`.
fn pid_of(path: &str) -> Option<u64> {
    path.rsplit('/').nth(1)?.parse().ok()
}

/// A line of crc32: the sum comes first, the file last.
fn checksum_of(line: &str) -> Option<(u64, u32)> {
    let mut words = line.split_whitespace();
    let sum = u32::from_str_radix(words.next()?, 16).ok()?;
    Some((pid_of(words.last()?)?, sum))
}

/// CRC-32 as crc32 and gzip have it.
fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            let carry = crc & 1;
            (crc >> 1) ^ (carry * 0xedb8_8320)
        })
    })
}

fn query(qmp: &mut Qmp, pid: Option<u64>) -> Result<Vec<Value>, Failure> {
    let arguments = pid.map_or(json!({}), |pid| json!({"pid": pid}));
    let answer = qmp.execute("query-stacks", arguments)?;
    assert_eq!(answer["more"], 0, "{answer}");
    let tasks = answer["tasks"].as_array().cloned();
    tasks.ok_or_else(|| Failure::new(format!("no tasks in {answer}")))
}

fn pid(task: &Value) -> u64 {
    task["pid"].as_u64().unwrap_or(0)
}

/// The frames that /proc/PID/stack would show.
fn frames(task: &Value) -> Vec<String> {
    let frames = task["frames"].as_array().into_iter().flatten();
    frames
        .filter(|frame| frame["scheduler"] != true)
        .filter_map(|frame| frame["symbol"].as_str())
        .map(ToOwned::to_owned)
        .collect()
}

/// A task that is being switched to or from is not asleep.
fn is_asleep(task: &Value) -> bool {
    let why = task["unreliable"]["why"].as_str();
    let is_switched = why.is_some_and(|why| why.starts_with("it is being switched"));
    task["vcpu"].is_null() && task["end"] != "no-stack" && !is_switched
}

/// The stack ends with user mode: with its registers, or in the first instructions of the kernel, where
/// there are none yet.
fn ends_with_user_mode(task: &Value) -> bool {
    let frames = task["frames"].as_array().map_or(&[][..], Vec::as_slice);
    let in_entry = |frame: &Value| {
        let symbol = frame["symbol"].as_str().unwrap_or_default();
        symbol.starts_with("entry_") || symbol.starts_with("asm_")
    };
    match frames {
        [only] if task["end"] == "bottom" => in_entry(only),
        _ => task["end"] == "user-mode",
    }
}

/// Compares every task that was off the CPUs from before the question until after the guest's own answer.
fn agree(guest: &Guest, qmp: &mut Qmp) -> Result<usize, Failure> {
    let before = theirs(guest)?;
    let ours = query(qmp, None)?;
    let after = theirs(guest)?;
    let mut agreed = 0;
    for task in ours.iter().filter(|task| is_asleep(task)) {
        let pid = pid(task);
        let (then, now) = (before.switches.get(&pid), after.switches.get(&pid));
        if then.is_none() || then != now {
            continue;
        }
        let lines = frames(task).into_iter();
        let text: String = lines.map(|frame| format!("[<0>] {frame}\n")).collect();
        if after.stacks.get(&pid) != Some(&checksum(text.as_bytes())) {
            let told = guest.sh_status(&format!("cat /proc/{pid}/stack"))?;
            return Err(Failure::new(format!("{task}\n{text}\n{told:?}")));
        }
        assert_eq!(task["reliable"], true, "{task}");
        agreed += 1;
    }
    Ok(agreed)
}

/// Every stack of a task that sleeps is reliable.
fn all_reliable(qmp: &mut Qmp) -> Result<usize, Failure> {
    let tasks = query(qmp, None)?;
    let asleep: Vec<_> = tasks.iter().filter(|task| is_asleep(task)).collect();
    for task in &asleep {
        assert_eq!(task["reliable"], true, "{task}");
    }
    Ok(asleep.len())
}

/// The stack of a task that was started with `command`, once it sleeps.
fn of_started(guest: &Guest, qmp: &mut Qmp, command: &str) -> Result<Value, Failure> {
    let started = guest.sh(&format!("{command} >/dev/null 2>&1 & sleep 1; echo $!"))?;
    let pid = started
        .trim()
        .parse()
        .map_err(|_| Failure::new(format!("no pid: {started}")))?;
    let mut tasks = query(qmp, Some(pid))?;
    match (tasks.pop(), tasks.pop()) {
        (Some(task), None) => Ok(task),
        _ => Err(Failure::new(format!("{command} is not there once"))),
    }
}

fn sleepers(kernel: &str) -> TestResult {
    let guest = Guest::boot(kernel).start()?;
    let mut qmp = guest.control()?;
    let asleep = all_reliable(&mut qmp)?;
    let agreed = agree(&guest, &mut qmp)?;
    assert!(agreed > 30, "{agreed}");

    // Code of a module, where this kernel has the driver as one.
    if guest
        .sh("ls /dev/input 2>/dev/null || true")?
        .contains("event0")
    {
        let reader = of_started(&guest, &mut qmp, "cat /dev/input/event0")?;
        assert_eq!(reader["reliable"], true, "{reader}");
        let frames = frames(&reader);
        let module = frames.iter().any(|frame| frame.ends_with(" [evdev]"));
        let loaded = guest.sh("cat /proc/modules")?.contains("evdev");
        assert_eq!(module, loaded, "{frames:#?}");
        agree(&guest, &mut qmp)?;
    }

    traced(&guest, &mut qmp)?;
    assert_eq!(guest.complaints()?, "");

    let text = guest.stillpoint(&["stacks", "1"])?.ok()?;
    assert!(
        text.contains("(pid 1) S\n  ") && text.contains("entry_SYSCALL_64_after_hwframe+"),
        "{text}"
    );
    assert!(text.contains("1 of 1 stacks are reliable"), "{text}");
    println!("{asleep} asleep and reliable, {agreed} compared");
    Ok(())
}

/// Tracers take return addresses off the stacks of tasks that sleep.
fn traced(guest: &Guest, qmp: &mut Qmp) -> TestResult {
    const SLEEP: &str = "sleep 1000";
    let plain = of_started(guest, qmp, SLEEP)?;
    let expected = frames(&plain);
    assert!(
        expected
            .iter()
            .any(|frame| frame.starts_with("hrtimer_nanosleep+")),
        "{expected:?}"
    );
    let on_sleepers = |guest: &Guest, qmp: &mut Qmp| -> Result<usize, Failure> {
        let task = of_started(guest, qmp, SLEEP)?;
        assert_eq!(task["reliable"], true, "{task}");
        assert_eq!(frames(&task), expected, "{task}");
        let all = task["frames"].as_array().into_iter().flatten();
        Ok(all
            .filter(|frame| !frame["repaired-from"].is_null())
            .count())
    };
    let tracing = |what: &str| guest.sh(&format!("cd /sys/kernel/tracing; {what}"));
    tracing(
        "echo do_nanosleep common_nsleep >set_ftrace_filter; echo function_graph >current_tracer",
    )?;
    assert!(on_sleepers(guest, qmp)? > 0);
    agree(guest, qmp)?;
    tracing(
        "echo nop >current_tracer; echo r:back hrtimer_nanosleep >kprobe_events; echo 1 >events/kprobes/back/enable",
    )?;
    assert!(on_sleepers(guest, qmp)? > 0);
    // Before 5.18 the kernel's own unwinder does not see what return probes took.
    if guest
        .sh("grep -c arch_rethook_trampoline /proc/kallsyms || true")?
        .trim()
        != "0"
    {
        agree(guest, qmp)?;
    }
    // Both, and on the same function, one above the other: where the kernel's own unwinder fails.
    tracing(
        "echo hrtimer_nanosleep do_nanosleep >set_ftrace_filter; echo function_graph >current_tracer",
    )?;
    assert!(on_sleepers(guest, qmp)? > 1);
    all_reliable(qmp)?;
    tracing(
        "echo nop >current_tracer; echo 0 >events/kprobes/back/enable; echo >kprobe_events; echo >set_ftrace_filter",
    )?;
    // Those that still sleep with what the tracers took.
    all_reliable(qmp)?;
    Ok(())
}

#[test]
fn sleeping_tasks_on_6_12() -> TestResult {
    on_kvm(|| sleepers("6.12"))
}

#[test]
fn sleeping_tasks_on_6_1() -> TestResult {
    on_kvm(|| sleepers("6.1"))
}

/// A thousand threads, and a CPU that is never idle: of the tasks that sleep, at least 99.9 % are
/// told reliably; and, if that is asked for, every frame is the one in /proc, which takes minutes.
fn crowd(kernel: &str, looks: usize, compared: bool) -> TestResult {
    const THREADS: usize = 1000;
    let guest = Guest::boot(kernel).cpus(2).start()?;
    guest.sh(&format!(
        "ulimit -u unlimited; echo 4000 >/proc/sys/kernel/threads-max; \
         guest threads {THREADS} >/tmp/threads & \
         until grep -q threads /tmp/threads; do sleep 1; done; \
         guest calls 1000 >/dev/null & sleep 1"
    ))?;
    let mut qmp = guest.control()?;
    let (mut asleep, mut reliable) = (0, 0);
    for _ in 0..looks {
        for task in query(&mut qmp, None)?.iter().filter(|task| is_asleep(task)) {
            asleep += 1;
            match task["reliable"] == true {
                true => reliable += 1,
                false => println!("unreliable: {task}"),
            }
        }
    }
    println!("{reliable} of {asleep} stacks of sleeping tasks are reliable");
    assert!(asleep > looks * THREADS, "{asleep}");
    assert!(reliable * 1000 >= asleep * 999, "{reliable} of {asleep}");
    if compared {
        let agreed = agree(&guest, &mut qmp)?;
        println!("{agreed} are those in /proc");
        assert!(agreed > THREADS, "{agreed}");
    }
    Ok(())
}

#[test]
fn a_thousand_threads_on_6_12() -> TestResult {
    on_kvm(|| crowd("6.12", 2, false))
}

/// Samples of a busy task: the reliable ones that were in the kernel, and all.
fn samples(qmp: &mut Qmp, busy: u64, wanted: usize) -> Result<(Vec<Value>, usize), Failure> {
    const MOST: usize = 200;
    let mut inside = Vec::new();
    for looked in 1..=MOST {
        let task = query(qmp, Some(busy))?.pop();
        let task = task.ok_or_else(|| Failure::new("the busy task is gone"))?;
        if task["frames"]
            .as_array()
            .is_some_and(|frames| !frames.is_empty())
        {
            inside.push(task);
        }
        if inside.len() >= wanted {
            return Ok((inside, looked));
        }
    }
    Ok((inside, MOST))
}

fn runners(kernel: &str) -> TestResult {
    const WANTED: usize = 30;
    let guest = Guest::boot(kernel).start()?;
    let mut qmp = guest.control()?;
    let start = |command: &str| -> Result<u64, Failure> {
        let pid = guest.sh(&format!("{command} >/dev/null 2>&1 & echo $!"))?;
        let number = pid.trim().parse();
        number.map_err(|_| Failure::new(format!("no pid: {pid}")))
    };
    let copier = start("dd if=/dev/zero of=/dev/null bs=1M")?;
    let spinner = start("sh -c 'while :; do :; done'")?;
    let (inside, looked) = samples(&mut qmp, copier, WANTED)?;
    let reliable: Vec<_> = inside
        .iter()
        .filter(|task| task["reliable"] == true)
        .collect();
    // On one CPU they take turns: some of the time it runs, some of the time it was preempted.
    let running = reliable
        .iter()
        .filter(|task| !task["vcpu"].is_null())
        .count();
    let preempted = reliable.len() - running;
    for task in &inside {
        if task["reliable"] != true {
            println!("unreliable: {}", task["unreliable"]);
        }
    }
    println!(
        "{looked} looks, {} inside, {running} running, {preempted} preempted",
        inside.len()
    );
    assert!(inside.len() >= WANTED, "{}", inside.len());
    assert!(
        reliable.len() * 10 >= inside.len() * 9,
        "{}",
        reliable.len()
    );
    assert!(running > 0 && preempted > 0, "{running} {preempted}");
    for task in &reliable {
        assert!(ends_with_user_mode(task), "{task}");
    }
    let read = |task: &&&Value| {
        frames(task)
            .iter()
            .any(|frame| frame.starts_with("vfs_read+"))
    };
    assert!(reliable.iter().filter(read).count() > 0, "{reliable:#?}");

    let spinning = query(&mut qmp, Some(spinner))?;
    assert_eq!(spinning.len(), 1);
    let vcpus = qmp.execute("query-vcpus", json!({}))?;
    let current = vcpus[0]["pid"].as_u64();
    assert!([Some(copier), Some(spinner)].contains(&current), "{vcpus}");
    if vcpus[0]["cpl"] == 0 {
        assert!(vcpus[0]["symbol"].is_string(), "{vcpus}");
    }
    let text = guest.stillpoint(&["cpus"])?.ok()?;
    assert!(text.starts_with("VCPU"), "{text}");
    all_idle(&guest, &mut qmp, &[copier, spinner])?;
    Ok(())
}

/// With nothing to do the vCPU is halted in the idle task, which is told to its beginning.
fn all_idle(guest: &Guest, qmp: &mut Qmp, busy: &[u64]) -> TestResult {
    for pid in busy {
        guest.sh(&format!("kill {pid}"))?;
    }
    for _ in 0..50 {
        let idle = query(qmp, Some(0))?.pop();
        let idle = idle.ok_or_else(|| Failure::new("no idle task"))?;
        if !idle["vcpu"].is_null() {
            assert_eq!(idle["reliable"], true, "{idle}");
            assert_eq!(idle["end"], "bottom", "{idle}");
            return Ok(());
        }
    }
    Err(Failure::new("the guest is never idle"))
}

#[test]
fn running_tasks_on_6_12() -> TestResult {
    on_kvm(|| runners("6.12"))
}

#[test]
fn running_tasks_on_6_1() -> TestResult {
    on_kvm(|| runners("6.1"))
}

/// The same on the other series.
#[cfg(feature = "full")]
mod series {
    use stillpoint_tests::TestResult;

    fn many(kernel: &str) -> TestResult {
        crate::crowd(kernel, 20, true)
    }
    mod crowded {
        stillpoint_tests::on_every_series!(super::many);
    }
    mod sleeping {
        stillpoint_tests::on_every_series!(crate::sleepers);
    }
    mod running {
        stillpoint_tests::on_every_series!(crate::runners);
    }
}
