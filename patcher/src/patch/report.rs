//! What is told about changes: plain data, ready to be printed or sent.

use std::fmt;

use crate::arena::{ArenaReport, Slot};
use crate::grace::{Clearance, Holdout};
use crate::guest::Gva;
use crate::text::hex;

/// Number of a change, unique for as long as the patcher lives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize)]
#[serde(transparent)]
pub struct EntryId(pub u64);

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Bytes, sent as hexadecimal digits without spaces.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Bytes(pub Vec<u8>);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl serde::Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&hex(&self.0).replace(' ', ""))
    }
}

/// Who asked for something, and when.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Origin {
    /// Whoever it was, in the caller's words.
    pub who: String,
    /// Milliseconds since 1970, by the host's clock.
    pub at_ms: u64,
}

/// What kind of change an entry is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Bytes that someone gave.
    Text,
    /// A jump from a function's entry to code in the arena.
    Redirect,
    /// A jump from anywhere in a function to a trampoline, which comes back.
    Probe,
    /// An `int3`, at which one vCPU is to be held; the others go through a trampoline.
    Breakpoint,
    /// What tells the hypervisor of every `int3`, in the guest's own handler.
    Trap,
}

/// Why it was safe to change the bytes in this stop.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Evidence {
    /// One instruction was replaced by one, and no vCPU was in the middle of it.
    SingleInstruction,
    /// No word of any stack, no register and no saved return address is inside the bytes.
    ScanClear {
        /// Tasks that were looked at.
        tasks: usize,
        /// vCPUs that were looked at.
        vcpus: usize,
    },
}

/// How ftrace was told to leave a function alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FtraceMark {
    /// Address of the flags of its record.
    pub at: Gva,
    /// The flags before.
    pub before: u64,
    /// The flags now.
    pub after: u64,
    /// Size of the flags in bytes.
    pub size: u64,
}

/// Code that was placed in the arena.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PlacedCode {
    /// Where its code is.
    pub code: Slot,
    /// Where its data are, when it has any.
    pub data: Option<Slot>,
    /// The function that is jumped to.
    pub entry: Gva,
    /// Where it goes on in the guest's own text by itself: no stack tells of that.
    pub goes_on: Vec<Gva>,
    /// Why the memory will be kept after the change is reverted, when it will.
    pub keep: Option<String>,
}

/// One change to the guest.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Applied {
    /// Its number.
    pub id: EntryId,
    /// What it is.
    pub kind: Kind,
    /// The site as it was given.
    pub site: String,
    /// Function and offset that the changed bytes are in.
    pub place: String,
    /// Address of the first changed byte.
    pub address: Gva,
    /// The bytes before.
    pub before: Bytes,
    /// The bytes now.
    pub after: Bytes,
    /// Why it was safe.
    pub evidence: Evidence,
    /// The mark in ftrace's record, when the bytes were ftrace's.
    pub ftrace: Option<FtraceMark>,
    /// Code in the arena, for a redirect.
    pub code: Option<PlacedCode>,
    /// The module that the bytes are in; absent for the kernel itself.
    pub module: Option<String>,
    /// Who did it, and when.
    pub origin: Origin,
}

/// A change that was taken back.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Reverted {
    /// The change.
    pub entry: Applied,
    /// Why it was safe to take it back in this stop.
    pub evidence: Evidence,
    /// Who took it back, and when.
    pub origin: Origin,
    /// What became of retired code, that of this change included.
    pub collected: Collected,
}

/// Code that nothing jumps to any more and that still takes room.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Retired {
    /// The change that it belonged to.
    pub id: EntryId,
    /// Where the code is.
    pub code: Slot,
    /// Other code that only it called, and that is freed with it.
    pub callbacks: Vec<Slot>,
    /// Where the data of all of it are.
    pub data: Vec<Slot>,
    /// Where it goes on in the guest's own text by itself.
    pub goes_on: Vec<Gva>,
    /// Why it is kept for good, when it is.
    pub keep: Option<String>,
    /// When it was unhooked: milliseconds since 1970, by the host's clock.
    pub since_ms: u64,
    /// Who stood in the way when it was last tried to free it, for people.
    pub held_by: Vec<String>,
    /// The same in parts.
    pub holdouts: Vec<Holdout>,
    /// Why it is not free though nobody stands in the way, when that is so.
    pub stuck: Option<String>,
}

/// What became of retired code at a stop.
#[derive(Clone, PartialEq, Eq, Debug, Default, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Collected {
    /// Changes whose code was freed.
    pub freed: Vec<EntryId>,
    /// Retired code that is still there.
    pub retired: Vec<Retired>,
    /// Contexts that had a stale address of retired code, and why they were clear all the same.
    pub cleared: Vec<Clearance>,
    /// Why nothing could be decided this time, when that is so.
    pub undecided: Option<String>,
}

/// A change that is over.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Closed {
    /// The change.
    pub entry: Applied,
    /// How it ended.
    pub end: End,
}

/// How a change ended.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case", tag = "how")]
pub enum End {
    /// It was taken back.
    Reverted {
        /// Who did it, and when.
        origin: Origin,
    },
    /// The kernel, or the module, that it was made to is gone.
    Void {
        /// What happened to it.
        why: String,
    },
}

/// Everything that the patcher has done.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Listing {
    /// Changes that are in the guest now.
    pub applied: Vec<Applied>,
    /// Loops in which a vCPU is held.
    pub held: Vec<Applied>,
    /// Code that still takes room.
    pub retired: Vec<Retired>,
    /// Changes that are over, the latest last; old ones are forgotten.
    pub closed: Vec<Closed>,
    /// The arena, when there is one.
    pub arena: Option<ArenaReport>,
}

/// The kernel that was found in the guest.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct KernelReport {
    /// As `uname -r` prints it.
    pub release: String,
    /// Its whole version string.
    pub banner: String,
    /// Build id in hexadecimal, where it has one.
    pub build_id: Option<Bytes>,
    /// What KASLR added to its addresses.
    pub slide: crate::guest::Slide,
    /// Run-time address of the start of its text.
    pub text: Gva,
    /// Its top-level page table, guest-physical.
    pub page_table: crate::guest::Gpa,
    /// Levels of its page tables.
    pub levels: u8,
    /// `phys_base`.
    pub phys_base: crate::guest::Gpa,
    /// Start of its direct map.
    pub page_offset_base: Option<Gva>,
    /// CPUs that it may have.
    pub possible_cpus: usize,
}

/// What is gone with a kernel.
#[derive(Clone, PartialEq, Eq, Debug, Default, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Forgotten {
    /// Changes that were in the guest.
    pub lost: Vec<Applied>,
    /// Callbacks that were on tracepoints.
    pub tracepoints: Vec<EntryId>,
    /// Blocks of the arena, by guest-physical address, that the hypervisor has to take away.
    pub blocks: Vec<crate::guest::Gpa>,
}

impl Forgotten {
    /// The numbers of everything that is gone.
    #[must_use]
    pub fn ids(&self) -> Vec<EntryId> {
        let changes = self.lost.iter().map(|entry| entry.id);
        changes.chain(self.tracepoints.iter().copied()).collect()
    }
}
