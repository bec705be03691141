//! What was counted.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde_json::Value;

/// Words that a refusal may begin with. Others say that something is wrong with the guest, with the
/// VMM or with what was asked.
const REFUSALS: [&str; 22] = [
    "Arena",
    "BadRequest",
    "Busy",
    "BytesDiffer",
    "CannotMove",
    "Deadline",
    "ForbiddenText",
    "GracePeriod",
    "GuestBusy",
    "GuestRefused",
    "InitText",
    "JumpInside",
    "NotHere",
    "NotText",
    "NotWholeInstructions",
    "Occupied",
    "OutOfReach",
    "Owned",
    "ReturnUnknown",
    "TasksUnknown",
    "TooMany",
    "Underway",
];

/// What one client has seen, or all of them.
#[derive(Clone, Default, Debug)]
pub(crate) struct Figures {
    /// Attached, detached, applied, reverted.
    pub(crate) transitions: u64,
    /// Hits of all probes that were detached.
    pub(crate) hits: u64,
    /// Those of callbacks that check their data.
    pub(crate) called: u64,
    /// Probes and callbacks on tracepoints that check their data and were attached.
    pub(crate) checked: u64,
    /// Records that were read.
    pub(crate) records: u64,
    /// Holds that were made.
    pub(crate) holds: u64,
    refusals: BTreeMap<String, u64>,
    stops: u64,
    longest: Duration,
}

impl Figures {
    /// Takes note of a refusal. What it says must be one of the expected things.
    pub(crate) fn refused(&mut self, desc: &str) -> Result<(), String> {
        let word = desc.split(':').next().unwrap_or_default();
        if !REFUSALS.contains(&word) {
            return Err(desc.to_owned());
        }
        *self.refusals.entry(word.to_owned()).or_default() += 1;
        Ok(())
    }

    /// Takes note of what an answer says of its stops.
    pub(crate) fn stopped(&mut self, answer: &Value) {
        let stop = &answer["stop"];
        let number = |name: &str| stop[name].as_u64().unwrap_or(0);
        self.stops += number("stops");
        self.longest = self
            .longest
            .max(Duration::from_micros(number("stalled-us")));
    }

    /// How many were refused.
    pub(crate) fn refusals(&self) -> u64 {
        self.refusals.values().sum()
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.transitions += other.transitions;
        self.hits += other.hits;
        self.called += other.called;
        self.checked += other.checked;
        self.records += other.records;
        self.holds += other.holds;
        self.stops += other.stops;
        self.longest = self.longest.max(other.longest);
        for (word, count) in &other.refusals {
            *self.refusals.entry(word.clone()).or_default() += count;
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let refusals: Vec<_> = self
            .refusals
            .iter()
            .map(|(word, count)| format!("{count} {word}"))
            .collect();
        write!(
            f,
            "{} hits, {} of {} callbacks that check their data, {} records read, {} holds; {} stops, the \
             longest {:.1} ms; {} refused ({})",
            self.hits,
            self.called,
            self.checked,
            self.records,
            self.holds,
            self.stops,
            self.longest.as_secs_f64() * 1e3,
            self.refusals(),
            refusals.join(", ")
        )
    }
}
