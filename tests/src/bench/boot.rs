//! `boot`: from exec of the VMM to the first line of the guest's init, and memory beside guest RAM.

use super::errand::{self, Clock};
use super::peer::{Files, Peer};
use super::stats::{cell, median};
use super::{Finding, Work};
use crate::{Failure, TestResult};

/// Samples of each VMM under icount, which repeats to 1 %.
const ICOUNT_SAMPLES: u32 = 3;

/// One boot.
#[derive(Clone, Copy, Debug)]
struct Sample {
    peer: Peer,
    round: u32,
    ms: f64,
    beside_mib: f64,
}

pub(super) fn run(rounds: u32) -> TestResult {
    let files = errand::files()?;
    let mut summary = None;
    // None at all leaves only what does not depend on the host's load.
    let real_time: &[u32] = if rounds == 0 { &[] } else { &[1, 2] };
    for &cpus in real_time {
        eprintln!("bench: {cpus} vCPU, real time, {rounds} rounds");
        let peers = vec![Peer::Ours, Peer::Microvm, Peer::Pc];
        let work = Work::Boot {
            peers: peers.clone(),
            cpus,
            rounds,
        };
        let samples = samples(errand::send(&files, work, Clock::Real)?);
        println!("boot, {cpus} vCPU, real time");
        table(&peers, &samples);
        for peer in [Peer::Microvm, Peer::Pc] {
            let ratios = pair_ratios(&samples, peer);
            println!(
                "  {} / ours: ratio of medians {}, median of {} pair ratios {}",
                peer.name(),
                cell(ratio_of_medians(&samples, peer), 2),
                ratios.len(),
                cell(median(&ratios), 2)
            );
        }
        if cpus == 1 {
            summary = Some(last_line(&samples)?);
        }
    }
    if errand::in_lab()? {
        icount(&files)?;
    } else {
        println!("boot, icount: only where guests run in the lab");
    }
    if let Some(summary) = summary {
        println!("{summary}");
    }
    Ok(())
}

/// Each VMM on a machine of its own. `-M microvm` with a vmlinux does not run there.
fn icount(files: &Files) -> TestResult {
    let peers = [Peer::Ours, Peer::Pc];
    let mut all = Vec::new();
    for peer in peers {
        for attempt in 1..=errand::ICOUNT_TRIES {
            eprintln!("bench: 1 vCPU, icount: {}, machine {attempt}", peer.name());
            let work = Work::Boot {
                peers: vec![peer],
                cpus: 1,
                rounds: ICOUNT_SAMPLES,
            };
            let found = samples(errand::send(files, work, Clock::Icount)?);
            if !found.is_empty() {
                all.extend(found);
                break;
            }
        }
    }
    println!(
        "boot, 1 vCPU, icount (1 instruction = 1 ns; a settled machine, one boot before the first)"
    );
    table(&peers, &all);
    println!(
        "  {} / ours: ratio of medians {}",
        Peer::Pc.name(),
        cell(ratio_of_medians(&all, Peer::Pc), 2)
    );
    Ok(())
}

fn samples(findings: Vec<Finding>) -> Vec<Sample> {
    findings
        .into_iter()
        .filter_map(|finding| match finding {
            Finding::Boot {
                peer,
                round,
                ms,
                beside,
                ram: _,
            } => Some(Sample {
                peer,
                round,
                ms,
                // KiB that a process can have are exact in a double.
                #[expect(clippy::cast_precision_loss)]
                beside_mib: beside as f64 / 1024.0,
            }),
            _ => None,
        })
        .collect()
}

fn times(samples: &[Sample], peer: Peer) -> Vec<f64> {
    let of_peer = samples.iter().filter(|sample| sample.peer == peer);
    of_peer.map(|sample| sample.ms).collect()
}

fn table(peers: &[Peer], samples: &[Sample]) {
    println!(
        "  {:<24} {:>3} {:>8} {:>8} {:>8} ms {:>8} MiB beside RAM",
        "", "n", "min", "median", "max", "median"
    );
    for peer in peers {
        let times = times(samples, *peer);
        let beside: Vec<f64> = samples
            .iter()
            .filter(|sample| sample.peer == *peer)
            .map(|sample| sample.beside_mib)
            .collect();
        let extreme = |pick: fn(f64, f64) -> f64| times.iter().copied().reduce(pick);
        println!(
            "  {:<24} {:>3} {:>8} {:>8} {:>8}    {:>8}",
            peer.name(),
            times.len(),
            cell(extreme(f64::min), 1),
            cell(median(&times), 1),
            cell(extreme(f64::max), 1),
            cell(median(&beside), 1)
        );
    }
}

fn ratio_of_medians(samples: &[Sample], peer: Peer) -> Option<f64> {
    Some(median(&times(samples, peer))? / median(&times(samples, Peer::Ours))?)
}

/// `peer` against ours in the rounds in which both were measured.
fn pair_ratios(samples: &[Sample], peer: Peer) -> Vec<f64> {
    let ours = samples.iter().filter(|sample| sample.peer == Peer::Ours);
    ours.filter_map(|ours| {
        let theirs = samples
            .iter()
            .find(|sample| sample.peer == peer && sample.round == ours.round)?;
        Some(theirs.ms / ours.ms)
    })
    .collect()
}

fn last_line(samples: &[Sample]) -> Result<String, Failure> {
    let ratio = median(&pair_ratios(samples, Peer::Microvm));
    let ours = median(&times(samples, Peer::Ours));
    let theirs = median(&times(samples, Peer::Microvm));
    let (Some(ratio), Some(ours), Some(theirs)) = (ratio, ours, theirs) else {
        return Err(Failure::new("not one pair could be measured"));
    };
    Ok(format!(
        "boot: ratio {ratio:.2} (ours {ours:.0} ms, theirs {theirs:.0} ms: QEMU microvm, 1 vCPU)"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_within_rounds() {
        let sample = |peer, round, ms| Sample {
            peer,
            round,
            ms,
            beside_mib: 1.0,
        };
        let samples = [
            sample(Peer::Ours, 1, 10.0),
            sample(Peer::Microvm, 1, 30.0),
            sample(Peer::Microvm, 2, 50.0),
            sample(Peer::Ours, 2, 20.0),
            sample(Peer::Ours, 3, 10.0),
        ];
        assert_eq!(pair_ratios(&samples, Peer::Microvm), [3.0, 2.5]);
        assert!(pair_ratios(&samples, Peer::Pc).is_empty());
        assert!(
            last_line(&samples)
                .unwrap()
                .starts_with("boot: ratio 2.75 ")
        );
        assert!(last_line(&[]).is_err());
    }
}
