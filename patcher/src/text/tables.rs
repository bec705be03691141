//! Places in the text that the guest rewrites by itself while it runs, or counts on.
//!
//! Jump labels and static calls are switched at any time, and the kernel stops with a BUG when it
//! finds other bytes there than it expects. Their tables hold distances from each entry, so the
//! kernel's file gives link addresses that hold whatever the slide; the boot sorts the tables, and
//! the places stay.

use std::ops::Range;

use crate::Kernel;
use crate::guest::LinkAddr;
use crate::space::{LayoutError, optional, optional_range};
use crate::text::decode::{MAX_INSTRUCTION, instruction_len};

/// Longest instruction that is switched: a conditional jump with a 32-bit displacement.
const LONGEST: u64 = 6;
/// Bytes of a distance.
pub(super) const DISTANCE: u64 = 4;
/// More bytes than any kernel's tables have.
const MAX_TABLE: u64 = 64 << 20;

/// What rewrites a place.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rewriter {
    /// A jump label (static key).
    JumpLabel,
    /// A static call.
    StaticCall,
    /// ftrace, in its own trampolines.
    Ftrace,
    /// Nobody; but the kernel goes on elsewhere when the instruction that is there faults.
    Fixup,
    /// Nobody; but the kernel knows the trap that is there by its address.
    Bug,
    /// The kernel, when it gets its second CPU or is left with one.
    SmpLock,
}

impl std::fmt::Display for Rewriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::JumpLabel => "a jump label, which the guest rewrites",
            Self::StaticCall => "a static call, which the guest rewrites",
            Self::Ftrace => "ftrace's own call site, which the guest rewrites",
            Self::Fixup => {
                "the exception table: a fault of this instruction is expected and goes on elsewhere"
            }
            Self::Bug => "a BUG or WARN, which the guest knows by its address",
            Self::SmpLock => "a lock prefix, which the guest rewrites when it has one CPU",
        })
    }
}

/// A table: the symbols at its ends, the type of an entry, and what it is about.
struct Table {
    name: &'static str,
    start: &'static str,
    end: &'static str,
    /// Without a name, nothing but the distance.
    entry: Option<&'static str>,
    rewriter: Rewriter,
    /// The member that is the distance to where the kernel goes on by itself.
    leads: Option<(&'static str, Leader)>,
}

/// `struct jump_entry` with relative entries, `struct static_call_site`,
/// `struct exception_table_entry`, `struct bug_entry` and the offsets of `.smp_locks`: each begins
/// with the distance to its instruction.
const TABLES: [Table; 5] = [
    Table {
        name: "table of jump labels",
        start: "__start___jump_table",
        end: "__stop___jump_table",
        entry: Some("jump_entry"),
        rewriter: Rewriter::JumpLabel,
        leads: Some(("target", Leader::JumpLabel)),
    },
    Table {
        name: "table of static calls",
        start: "__start_static_call_sites",
        end: "__stop_static_call_sites",
        entry: Some("static_call_site"),
        rewriter: Rewriter::StaticCall,
        leads: None,
    },
    Table {
        name: "exception table",
        start: "__start___ex_table",
        end: "__stop___ex_table",
        entry: Some("exception_table_entry"),
        rewriter: Rewriter::Fixup,
        leads: Some(("fixup", Leader::Fault)),
    },
    Table {
        name: "table of bugs",
        start: "__start___bug_table",
        end: "__stop___bug_table",
        entry: Some("bug_entry"),
        rewriter: Rewriter::Bug,
        leads: None,
    },
    Table {
        name: "table of lock prefixes",
        start: "__smp_locks",
        end: "__smp_locks_end",
        entry: None,
        rewriter: Rewriter::SmpLock,
        leads: None,
    },
];

/// The places that a guest rewrites, by link address.
#[derive(Clone, Debug, Default)]
pub struct Rewritten {
    sites: Vec<(u64, Rewriter)>,
    /// Where it goes on by itself.
    leads: Vec<(u64, Leader)>,
}

/// The places that the entries of a table at `start` are about, each `entry` bytes long: `member` bytes
/// from the start of each is the distance from there to its place.
pub(super) fn places(
    start: u64,
    bytes: &[u8],
    entry: u64,
    member: u64,
) -> impl Iterator<Item = u64> {
    let len = usize::try_from(entry).unwrap_or(usize::MAX).max(1);
    let skip = usize::try_from(member).unwrap_or(usize::MAX);
    let entries = (0..).zip(bytes.chunks_exact(len));
    entries.filter_map(move |(index, raw): (u64, &[u8])| {
        let distance = i32::from_le_bytes(*raw.get(skip..)?.first_chunk()?);
        let at = start.wrapping_add(index.wrapping_mul(entry).wrapping_add(member));
        Some(at.wrapping_add_signed(distance.into()))
    })
}

/// What leads somewhere without a jump that need be in the text.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Leader {
    /// A jump label that is off: the guest writes the jump when it is switched on.
    JumpLabel,
    /// A fault that the exception table expects.
    Fault,
}

impl std::fmt::Display for Leader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::JumpLabel => "a jump label leads there when the guest switches it",
            Self::Fault => "the exception table leads there after a fault",
        })
    }
}

/// Those of sorted `leads` that are behind `start` and before `end`.
pub(super) fn inside(
    leads: &[(u64, Leader)],
    start: u64,
    end: u64,
) -> impl Iterator<Item = (u64, Leader)> {
    let first = leads.partition_point(|&(at, _)| at <= start);
    let behind = leads.get(first..).unwrap_or_default().iter().copied();
    behind.take_while(move |&(at, _)| at < end)
}

/// The first of sorted `sites` that `len` bytes at `at` overlap, where `size` tells how long its
/// instruction is.
pub(super) fn first_overlap(
    sites: &[(u64, Rewriter)],
    at: u64,
    len: u64,
    size: impl Fn(u64) -> Option<u64>,
) -> Option<(u64, Rewriter)> {
    let from = at.saturating_sub(LONGEST - 1);
    let first = sites.partition_point(|&(site, _)| site < from);
    let near = sites.get(first..)?.iter().copied();
    near.take_while(|&(site, _)| site < at.saturating_add(len))
        .find(|&(site, _)| site.saturating_add(size(site).unwrap_or(LONGEST)) > at)
}

impl Rewritten {
    /// Reads the tables in the kernel's file. A kernel may lack any of them.
    ///
    /// # Errors
    /// [`LayoutError::Unknown`] for a table that it has and that is not in the file.
    pub fn of(kernel: &Kernel) -> Result<Self, LayoutError> {
        let single = ["ftrace_call", "ftrace_regs_call", "ftrace_graph_call"];
        let mut sites: Vec<_> = single
            .into_iter()
            .filter_map(|name| Some((optional(kernel.symbols(), name)?.0, Rewriter::Ftrace)))
            .collect();
        let mut leads = Vec::new();
        for table in TABLES {
            let Some(range) = optional_range(kernel, table.start, table.end) else {
                continue;
            };
            let unknown = || LayoutError::Unknown { what: table.name };
            let len = range.end.distance_from(range.start).min(MAX_TABLE);
            let bytes = usize::try_from(len)
                .ok()
                .and_then(|len| kernel.image().read(range.start, len))
                .ok_or_else(unknown)?;
            let size = match table.entry {
                Some(entry) => kernel.types().size_of(entry)?,
                None => DISTANCE,
            };
            if size < DISTANCE {
                return Err(unknown());
            }
            let at = places(range.start.0, bytes, size, 0);
            sites.extend(at.map(|at| (at, table.rewriter)));
            if let (Some(entry), Some((member, leader))) = (table.entry, table.leads) {
                let member = kernel.types().field(entry, member)?.offset;
                let at = places(range.start.0, bytes, size, member);
                leads.extend(at.map(|at| (at, leader)));
            }
        }
        sites.sort_by_key(|&(at, _)| at);
        leads.sort_by_key(|&(at, _)| at);
        Ok(Self { sites, leads })
    }

    /// The first such place that `len` bytes at `at` overlap. How long its instruction is, the
    /// kernel's file tells: switching does not change that.
    #[must_use]
    pub fn overlap(&self, kernel: &Kernel, at: LinkAddr, len: u64) -> Option<(LinkAddr, Rewriter)> {
        let size = |site: u64| {
            let bytes = kernel.image().read(LinkAddr(site), MAX_INSTRUCTION);
            bytes.and_then(instruction_len)
        };
        let (site, rewriter) = first_overlap(&self.sites, at.0, len, size)?;
        Some((LinkAddr(site), rewriter))
    }

    /// Where the kernel goes on by itself in `bytes`, but for the first of them: no jump need be in the
    /// text that leads there.
    pub fn leads_into(&self, bytes: &Range<LinkAddr>) -> impl Iterator<Item = (LinkAddr, Leader)> {
        let all = inside(&self.leads, bytes.start.0, bytes.end.0);
        all.map(|(to, leader)| (LinkAddr(to), leader))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.sites.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sites.is_empty()
    }
}
