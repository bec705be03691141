//! What is told of a guest's inside, against what the guest itself says of it.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::{Value, json};
use stillpoint_tests::{Failure, Guest, Qmp, Ran, TestResult, module_file, on_kvm};

/// A task as /proc/PID/task/TID/stat has it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Stat {
    pid: u64,
    tgid: u64,
    comm: String,
    state: char,
    ppid: u64,
    kernel: bool,
    /// In hundredths of a second since boot.
    start: u64,
}

/// PF_KTHREAD.
const KERNEL_THREAD: u64 = 0x20_0000;

/// One line for each thread: tgid, pid, state, ppid, flags, start and name. Serial ports are slow.
const STATS: &str = r#"grep -s "" /proc/[0-9]*/task/[0-9]*/stat | sed -nE "s/^.proc.([0-9]*).task.[0-9]*.stat:([0-9]*) \((.*)\) (.) ([-0-9]*) ([-0-9]* ){4}([0-9]*) ([-0-9]* ){12}([0-9]*) .*/\1 \2 \4 \5 \7 \9 \3/p""#;

impl Stat {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(7, ' ');
        let (tgid, pid) = (fields.next()?, fields.next()?);
        let (state, ppid) = (fields.next()?, fields.next()?);
        let (flags, start) = (fields.next()?, fields.next()?);
        Some(Self {
            pid: pid.parse().ok()?,
            tgid: tgid.parse().ok()?,
            comm: fields.next()?.to_owned(),
            state: state.chars().next()?,
            ppid: ppid.parse().ok()?,
            kernel: flags.parse::<u64>().ok()? & KERNEL_THREAD != 0,
            start: start.parse().ok()?,
        })
    }
}

/// Everything in /proc, those who look included.
fn in_proc(guest: &Guest) -> Result<BTreeMap<u64, Stat>, Failure> {
    let said = guest.sh(STATS)?;
    Ok(said
        .lines()
        .filter_map(Stat::parse)
        .map(|stat| (stat.pid, stat))
        .collect())
}

fn list<'a>(answer: &'a Value, name: &str) -> Result<&'a Vec<Value>, Failure> {
    let list = answer.get(name).and_then(Value::as_array);
    list.ok_or_else(|| Failure::new(format!("no {name} in {answer}")))
}

fn number(value: &Value, name: &str) -> u64 {
    value.get(name).and_then(Value::as_u64).unwrap_or(u64::MAX)
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// Tasks as we tell them, by pid.
type Ours = BTreeMap<u64, Value>;

/// Tasks that were in /proc before and after, by pid.
type Stayed = BTreeMap<u64, (Stat, Stat)>;

/// Our answer, and what was in /proc both before and after it.
fn both(guest: &Guest, qmp: &mut Qmp) -> Result<(Ours, Stayed), Failure> {
    let before = in_proc(guest)?;
    let answer = qmp.execute("query-tasks", json!({}))?;
    let after = in_proc(guest)?;
    assert_eq!(answer.get("disagreements"), Some(&json!([])), "{answer}");
    assert_eq!(number(&answer, "more"), 0);
    let ours = list(&answer, "tasks")?
        .iter()
        .filter(|task| text(task, "kind") != "idle")
        .map(|task| (number(task, "pid"), task.clone()))
        .collect();
    let stayed = before
        .into_iter()
        .filter_map(|(pid, first)| {
            let last = after.get(&pid).filter(|last| last.start == first.start)?;
            Some((pid, (first, last.clone())))
        })
        .collect();
    Ok((ours, stayed))
}

fn compare(ours: &Value, (before, after): &(Stat, Stat)) {
    let context = format!("{ours} {before:?} {after:?}");
    assert_eq!(number(ours, "tgid"), before.tgid, "{context}");
    assert_eq!(number(ours, "ppid"), before.ppid, "{context}");
    assert_eq!(text(ours, "kind") == "kernel", before.kernel, "{context}");
    assert_eq!(
        number(ours, "start-time-ns") / 10_000_000,
        before.start,
        "{context}"
    );
    let comm = text(ours, "comm");
    if before.kernel {
        // /proc has longer names for some, and says what a worker works on.
        assert!(before.comm.starts_with(comm), "{context}");
    } else {
        assert_eq!(comm, before.comm, "{context}");
    }
    let state = text(ours, "state").chars().next().unwrap_or('?');
    // It may have woken up, or gone to sleep, in between.
    let seen = [before.state, after.state];
    let woken = state == 'R' && seen.iter().all(|state| "SDI".contains(*state));
    let asleep = "SDI".contains(state) && seen.contains(&'R');
    assert!(seen.contains(&state) || woken || asleep, "{context}");
}

fn shows_tasks(kernel: &str) -> TestResult {
    let guest = Guest::boot(kernel).cpus(2).start()?;
    let pids = guest.sh(
        "sleep 1000 >/dev/null & echo $!; guest spin 1000 >/dev/null & echo $!; \
         guest threads 200 >/dev/null & echo $!; guest zombie >/dev/null & echo $!; \
         sleep 1001 >/dev/null & kill -STOP $!; echo $!; sleep 1",
    )?;
    let pids: Vec<u64> = pids
        .lines()
        .filter_map(|line| line.trim().parse().ok())
        .collect();
    let [sleeper, spinner, threads, zombies, stopped] = pids[..] else {
        return Err(Failure::new(format!("not five pids: {pids:?}")));
    };
    let mut qmp = guest.control()?;
    // A kernel worker may come or go in between; not every time.
    let mut tries = 0;
    let (ours, stayed) = loop {
        let (ours, stayed) = both(&guest, &mut qmp)?;
        tries += 1;
        if ours.keys().eq(stayed.keys()) {
            break (ours, stayed);
        }
        assert!(
            tries < 5,
            "ours {:?}\n/proc {:?}",
            ours.keys(),
            stayed.keys()
        );
    };
    assert!(ours.len() > 250, "{}", ours.len());
    for (pid, task) in &ours {
        compare(task, &stayed[pid]);
    }
    let state = |pid: u64| ours.get(&pid).map_or("", |task| text(task, "state"));
    assert_eq!(state(sleeper), "S");
    assert_eq!(state(spinner), "R");
    assert_eq!(state(stopped), "T");
    let of = |tgid| {
        ours.values()
            .filter(move |task| number(task, "tgid") == tgid)
    };
    assert_eq!(of(threads).count(), 200);
    let mut zombie = ours.values().filter(|task| number(task, "ppid") == zombies);
    assert_eq!(zombie.next().map(|task| text(task, "state")), Some("Z"));
    let spins = ours.get(&spinner).map(|task| text(task, "scheduling"));
    assert!(matches!(spins, Some("on-cpu" | "queued")), "{spins:?}");
    let status = guest.sh(&format!("grep ctxt /proc/{sleeper}/status"))?;
    let switches: Vec<u64> = status
        .lines()
        .filter_map(|line| line.rsplit('\t').next()?.parse().ok())
        .collect();
    let ours = &ours[&sleeper];
    assert_eq!(switches, [number(ours, "nvcsw"), number(ours, "nivcsw")]);
    assert_eq!(guest.complaints()?, "");
    let shown = guest.stillpoint(&["tasks", &threads.to_string()])?;
    assert_eq!(shown.stdout.lines().count(), 201, "{}", shown.stdout);
    Ok(())
}

#[test]
fn tasks_of_6_12_are_those_in_proc() -> TestResult {
    on_kvm(|| shows_tasks("6.12"))
}

#[test]
fn tasks_of_6_1_are_those_in_proc() -> TestResult {
    on_kvm(|| shows_tasks("6.1"))
}

/// Modules that are loaded beside those of every guest, in this order.
const MODULES: [&str; 5] = [
    "kernel/lib/libcrc32c",
    "kernel/net/ipv4/netfilter/nf_defrag_ipv4",
    "kernel/net/ipv6/netfilter/nf_defrag_ipv6",
    "kernel/net/netfilter/nf_conntrack",
    "kernel/net/vmw_vsock/vsock",
];

/// Every symbol as a line of /proc/kallsyms.
fn symbol_lines(qmp: &mut Qmp) -> Result<Vec<String>, Failure> {
    let mut lines = Vec::new();
    loop {
        let request = json!({"pattern": "*", "skip": lines.len(), "limit": 50_000});
        let answer = qmp.execute("query-symbols", request)?;
        for symbol in list(&answer, "symbols")? {
            let address = text(symbol, "address").trim_start_matches("0x");
            let (kind, name) = (text(symbol, "type"), text(symbol, "name"));
            lines.push(match symbol.get("module").and_then(Value::as_str) {
                Some(module) => format!("{address:0>16} {kind} {name}\t[{module}]"),
                None => format!("{address:0>16} {kind} {name}"),
            });
        }
        if number(&answer, "more") == 0 {
            return Ok(lines);
        }
    }
}

fn shows_symbols(name: &str) -> TestResult {
    let mut boot = Guest::boot(name).cpus(1).memory("512M");
    let mut load = String::from("true");
    let mut loaded = 0;
    for module in MODULES {
        let Some((file, at)) = module_file(name, module) else {
            continue;
        };
        loaded += 1;
        boot = boot.file(&at, &file);
        load.push_str(&format!(" && insmod {at}"));
    }
    let guest = boot.start()?;
    guest.sh(&load)?;
    let mut qmp = guest.control()?;

    let answer = qmp.execute("query-modules", json!({}))?;
    for module in list(&answer, "modules")? {
        let file = format!("/sys/kernel/btf/{}", text(module, "name"));
        let size = guest.sh(&format!("stat -c %s {file} 2>/dev/null || echo none"))?;
        let ours = module.pointer("/types/count").and_then(Value::as_u64);
        assert_eq!(ours, size.trim().parse().ok(), "{module}");
    }
    let ours: Vec<String> = list(&answer, "modules")?
        .iter()
        .map(|module| {
            let state = text(module, "state");
            let base = module.pointer("/memory/0/base").and_then(Value::as_str);
            let capital = state.get(..1).unwrap_or_default().to_uppercase();
            format!(
                "{} {} {} {capital}{} {}",
                text(module, "name"),
                number(module, "size"),
                number(module, "users"),
                state.get(1..).unwrap_or_default(),
                base.unwrap_or_default(),
            )
        })
        .collect();
    let listed = guest.sh("awk '{print $1, $2, $3, $5, $6}' /proc/modules")?;
    let listed: Vec<&str> = listed.lines().filter(|line| !line.is_empty()).collect();
    assert!(listed.len() >= loaded, "{listed:?}");
    assert_eq!(ours, listed);

    guest.sh("echo 0 >/proc/sys/kernel/kptr_restrict; cat /proc/kallsyms >/tmp/kallsyms")?;
    let ours = symbol_lines(&mut qmp)?;
    let all = ours.join("\n") + "\n";
    if sum_of(&guest, &all)? != guest.sh("md5sum </tmp/kallsyms")?.trim() {
        return Err(first_difference(&guest, &ours)?);
    }
    assert!(ours.len() > 80_000, "{}", ours.len());
    if loaded != 0 {
        one_of_a_module(&guest, &ours)?;
    }
    assert_eq!(guest.complaints()?, "");
    Ok(())
}

/// The address of a function in a module is told as the kernel would print it.
fn one_of_a_module(guest: &Guest, ours: &[String]) -> TestResult {
    let function = ours
        .iter()
        .find(|line| line.contains(" t ") && line.ends_with("[nf_conntrack]"));
    let function = function.map(String::as_str).unwrap_or_default();
    let (address, rest) = function.split_once(" t ").unwrap_or_default();
    let symbol = rest.split('\t').next().unwrap_or_default();
    let shown = guest
        .stillpoint(&["symbols", &format!("0x{address}")])?
        .stdout;
    assert!(
        shown.starts_with(&format!("{symbol}+0x0/")),
        "{function}: {shown}"
    );
    assert!(shown.ends_with(" [nf_conntrack]\n"), "{shown}");
    Ok(())
}

/// What md5sum says of a text.
fn sum_of(guest: &Guest, text: &str) -> Result<String, Failure> {
    let file = guest.dir().join("symbols");
    std::fs::write(&file, text)?;
    let ran = Ran::of(Command::new("md5sum").arg(&file))?;
    let sum = ran.stdout.split_whitespace().next().unwrap_or_default();
    Ok(format!("{sum}  -"))
}

/// The first line in which our symbols and the guest's differ. Its whole list would take minutes on
/// a serial port.
fn first_difference(guest: &Guest, ours: &[String]) -> Result<Failure, Failure> {
    let (mut same, mut other) = (0, ours.len());
    while same + 1 < other {
        let middle = usize::midpoint(same, other);
        let part = ours.get(..middle).unwrap_or_default().join("\n") + "\n";
        let theirs = guest.sh(&format!("head -n {middle} /tmp/kallsyms | md5sum"))?;
        if sum_of(guest, &part)? == theirs.trim() {
            same = middle;
        } else {
            other = middle;
        }
    }
    let theirs = guest.sh(&format!(
        "sed -n {}p /tmp/kallsyms; wc -l </tmp/kallsyms",
        same + 1
    ))?;
    Ok(Failure::new(format!(
        "{} symbols; line {} is {:?}, and in the guest {theirs:?}",
        ours.len(),
        same + 1,
        ours.get(same),
    )))
}

#[test]
fn symbols_of_6_12_are_those_of_kallsyms() -> TestResult {
    on_kvm(|| shows_symbols("6.12"))
}

#[test]
fn symbols_of_6_1_are_those_of_kallsyms() -> TestResult {
    on_kvm(|| shows_symbols("6.1"))
}

/// The same on the other series.
#[cfg(feature = "full")]
mod series {
    mod tasks {
        stillpoint_tests::on_every_series!(crate::shows_tasks);
    }
    mod symbols {
        stillpoint_tests::on_every_series!(crate::shows_symbols);
    }
}
