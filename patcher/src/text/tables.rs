//! Places in the text that the guest rewrites by itself while it runs.
//!
//! Jump labels and static calls are switched at any time, and the kernel stops with a BUG when it
//! finds other bytes there than it expects. Their tables stay in guest memory; entries hold
//! distances from themselves, so they give link addresses whatever the slide.

use std::ops::Range;

use crate::Kernel;
use crate::guest::LinkAddr;
use crate::space::{Located, Space, SpaceError, optional, optional_range};
use crate::text::decode::{MAX_INSTRUCTION, instruction_len};

/// Longest instruction that is switched: a conditional jump with a 32-bit displacement.
const LONGEST: u64 = 6;
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
}

impl std::fmt::Display for Rewriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::JumpLabel => "a jump label",
            Self::StaticCall => "a static call",
            Self::Ftrace => "ftrace's own call site",
        })
    }
}

/// Where the tables are.
#[derive(Clone, Debug)]
pub struct TablesLayout {
    /// Table, bytes of an entry, and what it is about.
    tables: Vec<(Range<LinkAddr>, u64, Rewriter)>,
    single: Vec<LinkAddr>,
}

impl TablesLayout {
    /// Looks them up in the kernel's file; a kernel may lack any of them.
    #[must_use]
    pub fn of(kernel: &Kernel) -> Self {
        // `struct jump_entry` with relative entries, `struct static_call_site`.
        let known = [
            (
                "__start___jump_table",
                "__stop___jump_table",
                "jump_entry",
                Rewriter::JumpLabel,
            ),
            (
                "__start_static_call_sites",
                "__stop_static_call_sites",
                "static_call_site",
                Rewriter::StaticCall,
            ),
        ];
        let tables = known
            .into_iter()
            .filter_map(|(start, end, entry, rewriter)| {
                let range = optional_range(kernel, start, end)?;
                let size = kernel.types().size_of(entry).ok()?;
                (size >= 4).then_some((range, size, rewriter))
            })
            .collect();
        let single = ["ftrace_call", "ftrace_regs_call", "ftrace_graph_call"]
            .into_iter()
            .filter_map(|name| optional(kernel.symbols(), name))
            .collect();
        Self { tables, single }
    }

    /// Reads the tables of a guest.
    ///
    /// # Errors
    /// [`SpaceError`] when one cannot be read.
    pub fn read(&self, space: &Space<'_>, located: &Located) -> Result<Rewritten, SpaceError> {
        let mut sites: Vec<_> = self
            .single
            .iter()
            .map(|&at| (at, Rewriter::Ftrace))
            .collect();
        for (range, size, rewriter) in &self.tables {
            let len = range.end.distance_from(range.start).min(MAX_TABLE);
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            space.read(range.start.at(located.slide), &mut bytes)?;
            let step = usize::try_from(*size).unwrap_or(usize::MAX);
            for (index, entry) in bytes.chunks_exact(step).enumerate() {
                let at = range.start.offset(index as u64 * size);
                if let Some(raw) = entry.first_chunk() {
                    sites.push((at.displace(i32::from_le_bytes(*raw).into()), *rewriter));
                }
            }
        }
        sites.sort_by_key(|&(at, _)| at);
        Ok(Rewritten { sites })
    }
}

/// The places that a guest rewrites, by link address.
#[derive(Clone, Debug, Default)]
pub struct Rewritten {
    sites: Vec<(LinkAddr, Rewriter)>,
}

impl Rewritten {
    /// The first such place that `len` bytes at `at` overlap. How long its instruction is, the
    /// kernel's file tells: switching does not change that.
    #[must_use]
    pub fn overlap(&self, kernel: &Kernel, at: LinkAddr, len: u64) -> Option<(LinkAddr, Rewriter)> {
        let from = LinkAddr(at.0.saturating_sub(LONGEST - 1));
        let first = self.sites.partition_point(|&(site, _)| site < from);
        self.sites
            .get(first..)?
            .iter()
            .copied()
            .take_while(|&(site, _)| site.0 < at.0.saturating_add(len))
            .find(|&(site, _)| {
                let bytes = kernel.image().read(site, MAX_INSTRUCTION);
                let size = bytes.map_or(LONGEST, |bytes| instruction_len(bytes).unwrap_or(LONGEST));
                site.0.saturating_add(size) > at.0
            })
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
