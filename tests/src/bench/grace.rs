//! `grace`: from taking a probe out until its trampoline is free, beside what the guest's kernel waits
//! for itself before it frees one (`synchronize_rcu_tasks_rude()` and `synchronize_rcu_tasks()`).
//!
//! Both in the same guest, in turn. Ours is seen by the client on the control socket, theirs by
//! whoever reads a file of the guest whose function is probed with a callback that waits; what
//! reading it takes without is subtracted. Theirs waits for timers and for the guest, ours computes:
//! in real time the lab makes ours a good deal slower than a machine would, and theirs not. Under
//! icount both are told by a machine that executes an instruction in each nanosecond.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::errand::{self, Clock};
use super::inside::report;
use super::peer::{Files, Peer};
use super::stats::{cell, median, percentile};
use super::stop::Subject;
use super::{Finding, Work};
use crate::{Failure, SOON, TestResult};

/// What the guest does meanwhile, and how many of its tasks sleep.
const CASES: [(&str, u32, &str); 3] = [
    ("idle", 100, ""),
    ("idle", 1000, ""),
    ("busy", 1000, "guest calls 3600 >/dev/null &"),
];
/// What is probed: it is called all the time.
const SITE: &str = "vfs_read";
/// What theirs is measured by.
const FILE: &str = "/proc/version";
const FUNCTION: &str = "version_proc_show";
/// Samples of ours in each case under icount.
const ICOUNT_SAMPLES: u32 = 10;
/// Theirs takes a good part of a second each.
const THEIRS: u32 = 5;

pub(super) fn run(rounds: u32) -> TestResult {
    let files = errand::files()?;
    let found = |cpus, rounds, clock| errand::send(&files, Work::Grace { cpus, rounds }, clock);
    if errand::in_lab()? {
        icount(&found)?;
    } else {
        println!("grace, icount: only where guests run in the lab");
    }
    // None at all leaves only what does not depend on the host's load.
    if rounds == 0 {
        return Ok(());
    }
    let findings = found(2, rounds * 5, Clock::Real)?;
    println!("grace, 2 vCPU, real time: median / p90 / max, ms");
    println!("{}", table(&findings)?);
    Ok(())
}

/// On a machine of its own, which may hang.
fn icount(found: &dyn Fn(u32, u32, Clock) -> Result<Vec<Finding>, Failure>) -> Result<(), Failure> {
    for attempt in 1..=errand::ICOUNT_TRIES {
        eprintln!("bench: 1 vCPU, icount: grace, machine {attempt}");
        let findings = found(1, ICOUNT_SAMPLES, Clock::Icount)?;
        if findings
            .iter()
            .any(|finding| matches!(finding, Finding::End))
        {
            println!("grace, 1 vCPU, icount (1 instruction = 1 ns): median / p90 / max, ms");
            // It is told before the last line, which is that of real time.
            println!("  {}", table(&findings)?);
            return Ok(());
        }
    }
    println!("grace, 1 vCPU, icount: could not be measured");
    Ok(())
}

/// Prints all cases, and returns what is said of the worst one.
fn table(findings: &[Finding]) -> Result<String, Failure> {
    let mut worst: Option<(f64, String)> = None;
    for (index, (load, tasks, _)) in CASES.iter().enumerate() {
        let all = findings.iter().filter_map(|finding| match *finding {
            Finding::Grace {
                case,
                ours,
                ms,
                stalled_ms,
            } if case == index => Some((ours, ms, stalled_ms)),
            _ => None,
        });
        let of = |wanted: bool| {
            let wanted = all.clone().filter(|(ours, ..)| *ours == wanted);
            wanted.map(|(_, ms, _)| ms).collect::<Vec<_>>()
        };
        let stalls: Vec<_> = all.clone().filter_map(|(.., stalled)| stalled).collect();
        let three = |values: &[f64]| {
            let all = [
                median(values),
                percentile(values, 90),
                percentile(values, 100),
            ];
            all.map(|value| cell(value, 2)).join(" / ")
        };
        let (ours, theirs) = (of(true), of(false));
        println!(
            "  {load}, {tasks} tasks: ours {} (n {}; the guest stood still for {}), theirs {} (n {})",
            three(&ours),
            ours.len(),
            three(&stalls),
            three(&theirs),
            theirs.len()
        );
        let (Some(ours), Some(theirs)) = (median(&ours), median(&theirs)) else {
            return Err(Failure::new(format!("{load} could not be measured")));
        };
        let ratio = theirs / ours;
        if worst.as_ref().is_none_or(|(least, _)| ratio < *least) {
            let text = format!(
                "grace: ratio {ratio:.2} (ours {ours:.2} ms, theirs {theirs:.2} ms: {load}, {tasks} \
                 tasks, the least of {} cases)",
                CASES.len()
            );
            worst = Some((ratio, text));
        }
    }
    worst
        .map(|(_, text)| text)
        .ok_or_else(|| Failure::new("nothing was measured"))
}

/// Takes the samples.
pub(super) fn measure(files: &Files, dir: &Path, cpus: u32, rounds: u32) -> TestResult {
    let mut guest = Subject::start(Peer::Ours, files, dir, "", cpus)?;
    guest.ask("echo 4000 >/proc/sys/kernel/threads-max; ulimit -u unlimited")?;
    let mut sleeping = 0;
    for (case, (_, tasks, load)) in CASES.iter().enumerate() {
        let more = tasks - sleeping;
        if more > 0 {
            guest.ask(&format!(
                "guest threads {more} >/tmp/threads & until [ -s /tmp/threads ]; do sleep 1; done; \
                 rm /tmp/threads"
            ))?;
            sleeping = *tasks;
        }
        if !load.is_empty() {
            guest.ask(&format!("{load} sleep 1"))?;
        }
        for _ in 0..rounds {
            ours(&mut guest, case)?;
        }
        theirs(&mut guest, files, case)?;
    }
    report(&Finding::End)
}

fn ours(guest: &mut Subject, case: usize) -> TestResult {
    let attached = guest.qmp.execute("probe-attach", json!({"site": SITE}))?;
    std::thread::sleep(Duration::from_millis(20));
    let begun = Instant::now();
    let detached = guest.qmp.execute(
        "probe-detach",
        json!({"id": attached["id"], "deadline": "30s"}),
    )?;
    if detached["collected"]["freed"] != json!([attached["id"]]) {
        guest.qmp.event("TRAMPOLINE_FREED", SOON)?;
    }
    report(&Finding::Grace {
        case,
        ours: true,
        ms: begun.elapsed().as_secs_f64() * 1e3,
        stalled_ms: detached["stop"]["stalled-in-all-us"]
            .as_u64()
            .and_then(|us| u32::try_from(us).ok())
            .map(|us| f64::from(us) / 1e3),
    })
}

fn theirs(guest: &mut Subject, files: &Files, case: usize) -> TestResult {
    let read = format!("cat {FILE} >/dev/null");
    let mut without = Vec::new();
    for _ in 0..THEIRS {
        without.push(guest.timed_sh(&read)?);
    }
    let floor = median(&without).unwrap_or(0.0);
    let probe = json!({"site": FUNCTION, "object": files.synchronize});
    let attached = guest.qmp.execute("probe-attach", probe)?;
    for _ in 0..THEIRS {
        let ms = guest.timed_sh(&read)? - floor;
        report(&Finding::Grace {
            case,
            ours: false,
            ms,
            stalled_ms: None,
        })?;
    }
    guest
        .qmp
        .execute("probe-detach", json!({"id": attached["id"]}))?;
    Ok(())
}
