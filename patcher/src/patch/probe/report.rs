//! What probes have seen. Everything is read from the arena, whether or not the guest runs.

use super::super::code::Resolved;
use super::super::report::{Applied, Collected, Origin, Reverted};
use super::super::{EntryId, PatchError, Patcher};
use super::callback::{Attached, Does};
use crate::arena::Arena;
use crate::guest::{GuestMemory, Gva};
use crate::probe::{Action, BUCKETS, Predicate, RECORD, Register, UNFINISHED, When, data};

/// A probe that is in the guest.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ProbeInfo {
    /// Its number.
    pub id: EntryId,
    /// The site as it was given.
    pub site: String,
    /// Function and offset of the jump.
    pub place: String,
    /// Address of the jump.
    pub address: Gva,
    /// What it does.
    #[serde(flatten)]
    pub does: Does,
    /// What its callback is given.
    #[serde(serialize_with = "hexadecimal")]
    pub data: u64,
    /// Those with a higher one come first.
    pub priority: i32,
    /// It does it when the site is reached, or when the function returns.
    pub when: When,
    /// It does it only where this holds at that moment.
    pub only_if: Option<Predicate>,
    /// At the return: only where this held when the function was called.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub only_if_called: Option<Predicate>,
    /// How often the site was reached since it was attached, or the function returned, or its callback
    /// was called.
    pub hits: u64,
    /// How often its callback was not called: nested in a callback, or where it may not be.
    pub skipped: u64,
    /// Who attached it, and when.
    pub origin: Origin,
}

/// A probe that was attached.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct NewProbe {
    /// The probe.
    #[serde(flatten)]
    pub probe: ProbeInfo,
    /// The change of the text that it is in, with all probes of its site.
    pub change: Applied,
}

/// A probe that was detached.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Detached {
    /// The probe, with its last counts.
    pub probe: ProbeInfo,
    /// What became of its trampoline, and of others.
    #[serde(flatten)]
    pub reverted: Reverted,
}

/// Probes that were detached in one stop.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct AllDetached {
    /// The probes, with their last counts.
    pub probes: Vec<ProbeInfo>,
    /// What became of their trampolines, and of others.
    pub collected: Collected,
}

/// What a histogram is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(untagged, rename_all_fields = "kebab-case")]
pub enum Measured {
    /// A register.
    Register {
        /// Which.
        register: Register,
    },
    /// How long a function took.
    Latency {
        /// `tsc-cycles`
        unit: &'static str,
        /// How many of them the guest's kernel says are a millisecond, where it does.
        #[serde(skip_serializing_if = "Option::is_none")]
        tsc_khz: Option<u64>,
    },
}

/// How often something had which magnitude.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Histogram {
    /// The probe.
    pub id: EntryId,
    /// What was measured.
    #[serde(flatten)]
    pub of: Measured,
    /// For each CPU, how often the value was 0, and then, for each n from 0 on, how often it was
    /// between 2^n and 2^(n+1) - 1. Trailing zeros are left out.
    pub cpus: Vec<Vec<u64>>,
}

/// One record.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Recorded {
    /// Its number, from 0.
    pub number: u64,
    /// The guest's time stamp counter.
    pub tsc: u64,
    /// Address of the task.
    pub task: Gva,
    /// The CPU.
    pub cpu: u32,
    /// The registers, in the order in which they were asked for.
    #[serde(serialize_with = "all_hexadecimal")]
    pub values: Vec<u64>,
}

/// Numbers that may be addresses are sent as strings, as addresses are.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
pub(in super::super) fn hexadecimal<S: serde::Serializer>(
    value: &u64,
    to: S,
) -> Result<S::Ok, S::Error> {
    to.collect_str(&format_args!("{value:#x}"))
}

fn all_hexadecimal<S: serde::Serializer>(values: &[u64], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(values.iter().map(|value| format!("{value:#x}")))
}

/// Records of a probe.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Records {
    /// The probe.
    pub id: EntryId,
    /// What the values are.
    pub registers: Vec<Register>,
    /// The records, oldest first.
    pub records: Vec<Recorded>,
    /// How many from the one asked for on were overwritten, or never made.
    pub lost: u64,
    /// What to ask for next time.
    pub next: u64,
}

impl Patcher {
    /// The probes that are in the guest, which may run.
    ///
    /// # Errors
    /// [`PatchError::Arena`] when a count cannot be read.
    pub fn probes(&self, memory: &dyn GuestMemory) -> Result<Vec<ProbeInfo>, PatchError> {
        let all = self.sites.iter();
        let mut all: Vec<_> = all
            .flat_map(|(change, site)| site.attached.iter().map(move |probe| (*change, probe.id)))
            .filter(|(_, id)| !self.is_errand(*id))
            .map(|(change, id)| self.probe_info(memory, change, id))
            .collect::<Result<_, _>>()?;
        all.sort_by_key(|probe| probe.id);
        Ok(all)
    }

    pub(super) fn new_probe(
        &self,
        memory: &dyn GuestMemory,
        change: EntryId,
        id: EntryId,
    ) -> Result<NewProbe, PatchError> {
        let entry = self.ledger.get(change);
        Ok(NewProbe {
            probe: self.probe_info(memory, change, id)?,
            change: entry.ok_or(PatchError::NoSuchProbe { id })?.clone(),
        })
    }

    pub(super) fn probe_info(
        &self,
        memory: &dyn GuestMemory,
        change: EntryId,
        id: EntryId,
    ) -> Result<ProbeInfo, PatchError> {
        let lost = PatchError::NoSuchProbe { id };
        let probe = self.site(change)?.attached.iter();
        let probe = probe.clone().find(|probe| probe.id == id);
        let (probe, entry) = probe.zip(self.ledger.get(change)).ok_or(lost)?;
        let word = |at| self.word(memory, probe.act.data.offset(at));
        Ok(ProbeInfo {
            id,
            site: probe.site.clone(),
            place: entry.place.clone(),
            address: entry.address,
            does: probe.does(),
            data: probe.act.value,
            priority: probe.priority,
            when: probe.act.when,
            only_if: probe.act.only_if,
            only_if_called: probe.act.only_if_called,
            hits: word(data::HITS)?,
            skipped: word(data::SKIPPED)?,
            origin: probe.origin.clone(),
        })
    }

    /// The histogram of a probe in the guest, which may run.
    ///
    /// # Errors
    /// [`PatchError::NoSuchProbe`], [`PatchError::Request`] for one that makes none,
    /// [`PatchError::Arena`].
    pub fn histogram(
        &self,
        memory: &dyn GuestMemory,
        id: EntryId,
    ) -> Result<Histogram, PatchError> {
        let probe = self.attached(id)?;
        let of = match probe.act.action {
            Action::Histogram(register) => Measured::Register { register },
            Action::Latency => Measured::Latency {
                unit: "tsc-cycles",
                tsc_khz: self.tsc_khz(memory),
            },
            _ => return Err(makes_no(id, "histogram")),
        };
        let bytes = self.more(memory, probe)?;
        let words = words(&bytes);
        let buckets = usize::try_from(BUCKETS).unwrap_or(1);
        let trimmed = |row: &[u64]| {
            let len = row.iter().rposition(|&count| count != 0);
            row.iter()
                .take(len.map_or(0, |last| last + 1))
                .copied()
                .collect()
        };
        Ok(Histogram {
            id,
            of,
            cpus: words.chunks_exact(buckets).map(trimmed).collect(),
        })
    }

    /// What the guest's kernel has found out about its time stamp counter.
    fn tsc_khz(&self, memory: &dyn GuestMemory) -> Option<u64> {
        let found = self.found.as_ref()?;
        let Ok(Resolved::Linked(variable)) = self.know.resolve("tsc_khz") else {
            return None;
        };
        let space = found.space(memory);
        let khz = space.read_sized(variable.at(found.slide), 4).ok()?;
        (khz != 0).then_some(khz)
    }

    /// The records of a probe in the guest, which may run, from number `since` on.
    ///
    /// # Errors
    /// As [`Patcher::histogram`].
    pub fn records(
        &self,
        memory: &dyn GuestMemory,
        id: EntryId,
        since: u64,
    ) -> Result<Records, PatchError> {
        let probe = self.attached(id)?;
        let Action::Record { registers, records } = &probe.act.action else {
            return Err(makes_no(id, "records"));
        };
        let head = self.word(memory, probe.act.data.offset(data::HEAD))?;
        let before = self.more(memory, probe)?;
        let parsed = before.chunks_exact(usize::try_from(RECORD).unwrap_or(1));
        // What was written meanwhile is not in one piece.
        let after = self.more(memory, probe)?;
        let again = after.chunks_exact(usize::try_from(RECORD).unwrap_or(1));
        let oldest = head.saturating_sub(*records).max(since);
        let mut all: Vec<_> = parsed
            .zip(again)
            .filter(|(once, twice)| once == twice)
            .filter_map(|(record, _)| parse(record, registers.len()))
            .filter(|record| record.number >= oldest && record.number < head)
            .collect();
        all.sort_by_key(|record| record.number);
        let told = all.len() as u64;
        Ok(Records {
            id,
            registers: registers.clone(),
            records: all,
            lost: head.saturating_sub(since).saturating_sub(told),
            next: head,
        })
    }

    fn attached(&self, id: EntryId) -> Result<&Attached, PatchError> {
        let sites = self.sites.values().flat_map(|site| &site.attached);
        let mut all = sites.chain(self.tracepoints.values().map(|traced| &traced.probe));
        let found = all.find(|probe| probe.id == id);
        found.ok_or(PatchError::NoSuchProbe { id })
    }

    pub(in super::super) fn word(
        &self,
        memory: &dyn GuestMemory,
        at: Gva,
    ) -> Result<u64, PatchError> {
        let mut bytes = [0; 8];
        self.arena_or_lost()?.read(memory, at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// What a probe has beside its counts.
    fn more(&self, memory: &dyn GuestMemory, probe: &Attached) -> Result<Vec<u8>, PatchError> {
        let len = probe.data.len.saturating_sub(data::MORE);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        let at = probe.data.at.offset(data::MORE);
        self.arena_or_lost()?.read(memory, at, &mut bytes)?;
        Ok(bytes)
    }

    pub(in super::super) fn arena_or_lost(&self) -> Result<&Arena, PatchError> {
        let lost = || PatchError::Request("there is no arena in the guest".into());
        self.arena.as_ref().ok_or_else(lost)
    }
}

fn words(bytes: &[u8]) -> Vec<u64> {
    let all = bytes.chunks_exact(8);
    all.filter_map(|word| word.try_into().ok().map(u64::from_le_bytes))
        .collect()
}

fn makes_no(id: EntryId, what: &str) -> PatchError {
    PatchError::Request(format!("probe {id} makes no {what}"))
}

fn parse(record: &[u8], registers: usize) -> Option<Recorded> {
    let words = words(record);
    let word = |index: usize| words.get(index).copied();
    let number = word(0)?;
    if number & UNFINISHED != 0 {
        return None;
    }
    Some(Recorded {
        number: number.checked_sub(1)?,
        tsc: word(1)?,
        task: Gva(word(2)?),
        cpu: u32::try_from(word(3)? & 0xffff_ffff).ok()?,
        values: (4..4 + registers).map_while(word).collect(),
    })
}
