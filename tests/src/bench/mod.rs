//! Measurements of our VMM beside QEMU: what `scripts/bench` runs.
//!
//! | part | where it runs | what it does |
//! |---|---|---|
//! | [`boot`], [`stop`], [`grace`], [`probes`] | the caller | what is measured, and the table and ratio that come of it |
//! | [`errand`] | the caller | sends a [`Plan`] to where guests can run and collects what it finds |
//! | [`inside`] | there | carries out a plan and prints each finding as a line of JSON |
//! | [`peer`] | there | how each VMM is started |
//! | [`cost`] | there | what is attached to a function while it is called in a loop |
//!
//! Both VMMs run on the same machine, with the same kernel and initramfs, from files in memory.
//! In the lab real time is the time of an emulator that shares the host: only ratios between
//! samples taken in turn mean something there. Under *icount* level 1 counts instructions, one to
//! the nanosecond; that repeats to 1 %, whatever the host does, but knows nothing of caches and of
//! what an exit costs.

mod boot;
mod cost;
mod errand;
mod grace;
mod inside;
mod memory_root;
mod peer;
mod probes;
mod resident;
mod stats;
mod stop;
mod timed;

use serde::{Deserialize, Serialize};

use crate::{Failure, TestResult};
use peer::{Files, Peer};

pub use inside::carry_out;

/// The guest kernel of all measurements, as `guest-images/fetch` names it.
const KERNEL: &str = "6.12";

/// Guest memory in MiB.
const MEMORY: u64 = 256;

/// What can be measured.
pub const NAMES: [&str; 4] = ["boot", "stop", "grace", "probes"];

/// Measures `name`, prints a table and, as the last line, the ratio. `rounds` is how many samples
/// each VMM gives in real time.
///
/// # Errors
///
/// When something needed is missing, or too few samples could be taken.
pub fn run(name: &str, rounds: u32) -> TestResult {
    match name {
        "boot" => boot::run(rounds),
        "stop" => stop::run(rounds),
        "grace" => grace::run(rounds),
        "probes" => probes::run(),
        _ => Err(Failure::new(format!(
            "no measurement is called '{name}'; there are {}",
            NAMES.join(", ")
        ))),
    }
}

/// What is to be done where guests can run.
#[derive(Serialize, Deserialize, Debug)]
pub struct Plan {
    files: Files,
    work: Work,
}

#[derive(Serialize, Deserialize, Debug)]
enum Work {
    /// Boots each of `peers` in turn, `rounds` times, after one boot of each that does not count.
    Boot {
        peers: Vec<Peer>,
        cpus: u32,
        rounds: u32,
    },
    /// Stops and continues an idle and a busy guest of each of `peers`, `cycles` times in each of
    /// `rounds`.
    Stop {
        peers: Vec<Peer>,
        cpus: u32,
        rounds: u32,
        cycles: u32,
    },
    /// Takes probes out of an idle and a busy guest, `rounds` times in each case.
    Grace { cpus: u32, rounds: u32 },
    /// Counts what a hit of a probe adds.
    Probes,
}

/// What is found there.
#[derive(Serialize, Deserialize, Debug, Clone)]
enum Finding {
    /// It begins, perhaps anew because a machine was lost: what came before does not count.
    Begin,
    /// A boot.
    Boot {
        peer: Peer,
        round: u32,
        /// From exec to init's first line.
        ms: f64,
        /// Resident beside guest RAM at that moment, in KiB.
        beside: u64,
        /// Resident guest RAM, in KiB.
        ram: u64,
    },
    /// A stop and a continue.
    Stop {
        peer: Peer,
        busy: bool,
        stop: f64,
        cont: f64,
        /// Both, one after the other.
        both: f64,
        /// A command that does nothing.
        floor: f64,
    },
    /// The longest gap that a guest saw between two reads of its time stamp counter, in a second or
    /// so, in microseconds.
    Stall {
        peer: Peer,
        disturbed: bool,
        us: f64,
    },
    /// From taking a probe out until its trampoline is free, or what the guest's kernel waits for
    /// itself.
    Grace {
        /// Which of the cases.
        case: usize,
        ours: bool,
        ms: f64,
        /// How long the guest stood still for it.
        stalled_ms: Option<f64>,
    },
    /// Calls of a function with something attached to it, by the clock of the guest.
    Hits {
        /// Which of the rows.
        row: usize,
        /// Probes elsewhere.
        elsewhere: usize,
        per_call: f64,
        /// Flags and registers were as without it.
        faithful: bool,
        /// Every probe of ours counted every call, and no other.
        counted: bool,
    },
    /// All that was to be measured has been.
    End,
    /// A sample that could not be taken.
    Failed { peer: Peer, why: String },
}
