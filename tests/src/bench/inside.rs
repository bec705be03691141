//! Carries out a plan, where guests can run.

use std::io::Write;
use std::time::Duration;

use tempfile::TempDir;

use super::peer::{Files, Peer};
use super::{Finding, Plan, Work, cost, grace, memory_root, stop, timed};
use crate::{TestResult, lab};

/// Carries out a plan that [`super::run`] made, and prints what it finds.
///
/// # Errors
///
/// When it cannot begin. A sample that cannot be taken is a finding.
pub fn carry_out(plan: &str) -> TestResult {
    let Plan { files, work } = serde_json::from_str(plan)?;
    report(&Finding::Begin)?;
    let in_lab = std::env::var_os(lab::INSIDE).is_some();
    let files = if in_lab {
        memory_root::enter(&files)?
    } else {
        files
    };
    let dir = TempDir::new_in("/tmp")?;
    // What level 1 does at its own boot, and what the copies left to do, is over by then.
    std::thread::sleep(Duration::from_secs(2));
    match work {
        Work::Boot {
            peers,
            cpus,
            rounds,
        } => boots(&files, &peers, cpus, rounds),
        Work::Stop {
            peers,
            cpus,
            rounds,
            cycles,
        } => stop::measure(&files, dir.path(), &peers, cpus, rounds, cycles),
        Work::Grace { cpus, rounds } => grace::measure(&files, dir.path(), cpus, rounds),
        Work::Probes => cost::measure(&files, dir.path()),
    }
}

/// Prints a finding for the caller, at once.
pub(super) fn report(finding: &Finding) -> TestResult {
    let line = serde_json::to_string(finding)?;
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")?;
    Ok(stdout.flush()?)
}

fn boots(files: &Files, peers: &[Peer], cpus: u32, rounds: u32) -> TestResult {
    for round in 0..=rounds {
        for index in 0..peers.len() {
            // Each is first in its turn.
            let turn = (index + round as usize) % peers.len();
            let Some(&peer) = peers.get(turn) else {
                continue;
            };
            // One that fails has a second try: guests in the lab get stuck now and then.
            let sample = timed::boot(peer, files, cpus).or_else(|why| {
                report(&Finding::Failed {
                    peer,
                    why: why.to_string(),
                })?;
                timed::boot(peer, files, cpus)
            });
            match sample {
                // The first one reads programs and libraries.
                Ok(_) if round == 0 => {}
                Ok((ms, resident)) => report(&Finding::Boot {
                    peer,
                    round,
                    ms,
                    beside: resident.beside,
                    ram: resident.ram,
                })?,
                Err(why) => report(&Finding::Failed {
                    peer,
                    why: why.to_string(),
                })?,
            }
        }
    }
    Ok(())
}
