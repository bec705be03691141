//! Kprobes in a function: armed ones have changed its text, disarmed ones will.

use std::collections::HashSet;
use std::ops::Range;

use crate::Kernel;
use crate::guest::{Gva, LinkAddr};
use crate::space::{Located, Space, SpaceError};

/// More probes in one bucket than any kernel has.
const MAX_CHAIN: usize = 1 << 16;

/// Where the kernel keeps its probes.
#[derive(Clone, Debug)]
pub struct KprobesLayout {
    table: LinkAddr,
    buckets: u64,
    /// `kprobe.hlist`, by which a probe is in its bucket.
    node: u64,
    address: u64,
}

impl KprobesLayout {
    /// Looks it up in the kernel's file; `None` for a kernel without kprobes.
    #[must_use]
    pub fn of(kernel: &Kernel) -> Option<Self> {
        let types = kernel.types();
        let table = kernel.symbols().named("kprobe_table").next()?;
        let bucket = types.size_of("hlist_head").ok()?.max(1);
        Some(Self {
            table: table.address()?,
            // KPROBE_TABLE_SIZE; the symbol may seem longer than it is, never shorter.
            buckets: (table.size()? / bucket).min(64),
            node: types.field("kprobe", "hlist").ok()?.offset,
            address: types.field("kprobe", "addr").ok()?.offset,
        })
    }

    /// The first probe whose address is in `range`.
    ///
    /// # Errors
    /// [`SpaceError`] when the table cannot be read.
    pub fn inside(
        &self,
        space: &Space<'_>,
        located: &Located,
        range: &Range<Gva>,
    ) -> Result<Option<Gva>, SpaceError> {
        for bucket in 0..self.buckets {
            let mut node = space.read_pointer(self.table.offset(bucket * 8).at(located.slide))?;
            let mut seen = HashSet::new();
            while node.0 != 0 {
                // A chain that cannot be followed to its end may hide a probe here.
                if !seen.insert(node) || seen.len() > MAX_CHAIN {
                    return Ok(Some(range.start));
                }
                let probe = Gva(node.0.wrapping_sub(self.node));
                let address = space.read_pointer(probe.offset(self.address))?;
                if range.contains(&address) {
                    return Ok(Some(address));
                }
                node = space.read_pointer(node)?;
            }
        }
        Ok(None)
    }
}
