//! `grace`: from taking a probe out until its trampoline is free, beside what the guest's kernel waits
//! for itself before it frees one (`synchronize_rcu_tasks_rude()` and `synchronize_rcu_tasks()`).
//!
//! Both in the same guest, in turn. Ours is seen by the client on the control socket, theirs by
//! whoever reads a file of the guest whose function is probed with a callback that waits; what
//! reading it takes without is subtracted.

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
/// Theirs takes a good part of a second each.
const THEIRS: u32 = 5;

pub(super) fn run(rounds: u32) -> TestResult {
    let files = errand::files()?;
    let work = Work::Grace {
        rounds: rounds.max(1) * 5,
    };
    let findings = errand::send(&files, work, Clock::Real)?;
    let mut worst: Option<(f64, String)> = None;
    println!("grace, 2 vCPU: median / p90 / max, ms");
    for (index, (load, tasks, _)) in CASES.iter().enumerate() {
        let of = |ours: bool| {
            let all = findings.iter().filter_map(move |finding| match *finding {
                Finding::Grace {
                    case,
                    ours: by_us,
                    ms,
                    ..
                } if case == index && by_us == ours => Some(ms),
                _ => None,
            });
            all.collect::<Vec<_>>()
        };
        let stalls = findings.iter().filter_map(|finding| match *finding {
            Finding::Grace {
                case,
                stalled_ms: Some(ms),
                ..
            } if case == index => Some(ms),
            _ => None,
        });
        let stalls: Vec<_> = stalls.collect();
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
    if let Some((_, text)) = worst {
        println!("{text}");
    }
    Ok(())
}

/// Takes the samples.
pub(super) fn measure(files: &Files, dir: &Path, rounds: u32) -> TestResult {
    let mut guest = Subject::start(Peer::Ours, files, dir, "", 2)?;
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
    Ok(())
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
