//! Tracepoints that have to be switched on in every task: those of system calls.

use serde_json::{Value, json};
use stillpoint_tests::{Failure, Guest, Qmp, TestResult};

use crate::{attach, detach, hits};

/// umask(2): a shell's `umask MASK` calls it, and nothing else here does.
const UMASK: u32 = 95;
/// What no other system call here returns.
const MASK: u32 = 0o175;
const TIMES: u64 = 5;

fn masks() -> String {
    format!("umask {MASK:o}; ").repeat(usize::try_from(TIMES).unwrap_or(0))
}

/// How often tasks of the guest take the way of traced system calls while a program runs.
fn slow(guest: &Guest, qmp: &mut Qmp, site: &str) -> Result<u64, Failure> {
    let probe = qmp.execute("probe-attach", json!({"site": site}))?;
    guest.sh("/bin/true")?;
    let gone = qmp.execute("probe-detach", json!({"id": probe["id"]}))?;
    let hits = gone["probe"]["hits"].as_u64();
    hits.ok_or_else(|| Failure::new(format!("no hits in {gone}")))
}

/// The function that a system call goes through only when something has to see it.
fn slow_way(qmp: &mut Qmp) -> Result<String, Failure> {
    let arguments = json!({"pattern": "syscall_trace_enter*", "limit": 10});
    let reply = qmp.execute("query-symbols", arguments)?;
    let names = reply["symbols"].as_array().into_iter().flatten();
    let names = names.filter_map(|symbol| symbol["name"].as_str());
    let mut whole = names.filter(|name| !name.contains(".cold"));
    let first = whole.next().map(str::to_owned);
    first.ok_or_else(|| Failure::new(format!("no such function: {reply}")))
}

/// A task that was there before is seen as well as a new one, and nobody pays for it afterwards.
pub(crate) fn old_and_new_tasks(guest: &Guest, qmp: &mut Qmp) -> TestResult {
    let way = slow_way(qmp)?;
    let on = |on: u8| {
        guest.sh(&format!(
            "echo {on} >/sys/kernel/tracing/events/raw_syscalls/sys_enter/enable"
        ))
    };
    assert_eq!(slow(guest, qmp, &way)?, 0, "nobody looks at system calls");
    // An old task that waits, and says when it is done.
    guest.sh(&format!(
        "mkfifo /tmp/go /tmp/gone; \
         (read x </tmp/go; {} echo >/tmp/gone) >/dev/null 2>&1 &",
        masks()
    ))?;
    let called = attach(
        qmp,
        json!({"name": "sys_enter", "if": format!("dx=={UMASK}")}),
    )?;
    let returned = attach(
        qmp,
        json!({"name": "sys_exit", "if": format!("dx=={MASK}")}),
    )?;
    let mut both = |what: &str| -> Result<(u64, u64), Failure> {
        guest.sh(what)?;
        Ok((hits(qmp, called)?, hits(qmp, returned)?))
    };
    let old = both("echo >/tmp/go; read x </tmp/gone; rm /tmp/go /tmp/gone")?;
    let new = both(&masks())?;
    assert!(old.0 > 0 && old.0 % TIMES == 0, "{old:?}");
    assert!(old.1 >= TIMES - 1, "{old:?}");
    assert_eq!((new.0 - old.0, new.1 - old.1), old, "as many of a new task");
    assert!(slow(guest, qmp, &way)? > 0);

    // The guest's own user keeps it on when ours go, and does not when it goes.
    on(1)?;
    for id in [called, returned] {
        detach(qmp, id)?;
    }
    assert!(slow(guest, qmp, &way)? > 0, "the guest looks at them");
    let again = attach(qmp, json!({"name": "sys_enter"}))?;
    on(0)?;
    assert!(slow(guest, qmp, &way)? > 0, "we look at them");
    detach(qmp, again)?;
    assert_eq!(slow(guest, qmp, &way)?, 0, "nobody looks at them any more");
    let left: Value = qmp.execute("query-tracepoints", json!({}))?;
    assert_eq!(left["tracepoints"], json!([]));
    println!(
        "system calls: {} of a task that was there, {} of a new one",
        old.0,
        new.0 - old.0
    );
    Ok(())
}
