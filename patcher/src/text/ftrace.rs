//! ftrace's record of a function's entry.
//!
//! ftrace keeps a `dyn_ftrace` for every function that it can trace, and disables itself for good
//! when it finds bytes at an entry that it does not know. A record marked FTRACE_FL_DISABLED is
//! left alone, so the mark is set in the same stop in which an entry is taken, and taken away in
//! the stop in which the entry is given back.

use std::collections::HashSet;

use crate::Kernel;
use crate::guest::{Gva, LinkAddr};
use crate::space::{LayoutError, Located, Space, SpaceError, optional};
use crate::types::Field;

use super::tracers::TracersLayout;

/// More groups of records than any kernel allocates.
const MAX_GROUPS: usize = 1 << 20;

/// Where the kernel keeps its records.
#[derive(Clone, Debug)]
pub struct FtraceLayout {
    start: LinkAddr,
    next: u64,
    records: u64,
    index: Field,
    record_size: u64,
    ip: Field,
    flags: Field,
    /// FTRACE_FL_DISABLED.
    disabled: u64,
    /// Flags that say nothing about users now: FTRACE_FL_TOUCHED (6.6 and later).
    harmless: u64,
    /// `None` when it is not known who uses ftrace.
    tracers: Option<TracersLayout>,
}

/// One record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct FtraceRecord {
    /// Address of its flags.
    pub at: Gva,
    /// Size of the flags in bytes.
    pub size: u64,
    /// The flags now.
    pub flags: u64,
    /// The flags with the mark.
    pub marked: u64,
    /// Something in the guest traces or patches this function.
    pub in_use: bool,
}

/// Why a record could not be found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FtraceError {
    /// A pointer leads nowhere.
    #[error("ftrace's records cannot be read")]
    Unreadable(#[from] SpaceError),
    /// The records do not end.
    #[error("ftrace's groups of records do not end: {groups} and more")]
    Endless {
        /// How many were seen.
        groups: usize,
    },
    /// Its users do not end.
    #[error("ftrace's users do not end: {users} and more")]
    EndlessUsers {
        /// How many were seen.
        users: usize,
    },
}

impl FtraceLayout {
    /// Looks it up in the kernel's file; `None` for a kernel without dynamic ftrace.
    ///
    /// # Errors
    /// [`LayoutError`] when the kernel has records that cannot be understood.
    pub fn of(kernel: &Kernel) -> Result<Option<Self>, LayoutError> {
        let types = kernel.types();
        let Some(start) = optional(kernel.symbols(), "ftrace_pages_start") else {
            return Ok(None);
        };
        let flag = |name| {
            let value = types.enumerator(name)?;
            Ok::<_, LayoutError>(u64::try_from(value & 0xffff_ffff).unwrap_or(0))
        };
        Ok(Some(Self {
            start,
            next: types.field("ftrace_page", "next")?.offset,
            records: types.field("ftrace_page", "records")?.offset,
            index: types.field("ftrace_page", "index")?,
            record_size: types.size_of("dyn_ftrace")?.max(1),
            ip: types.field("dyn_ftrace", "ip")?,
            flags: types.field("dyn_ftrace", "flags")?,
            disabled: flag("FTRACE_FL_DISABLED")?,
            harmless: flag("FTRACE_FL_TOUCHED").unwrap_or(0),
            tracers: TracersLayout::of(kernel),
        }))
    }

    /// The first record of an entry among the `len` bytes at `at`; `None` when ftrace has none.
    ///
    /// # Errors
    /// [`FtraceError`] when the records cannot be read or do not end.
    pub fn find(
        &self,
        space: &Space<'_>,
        located: &Located,
        at: Gva,
        len: u64,
    ) -> Result<Option<FtraceRecord>, FtraceError> {
        let mut group = space.read_pointer(self.start.at(located.slide))?;
        let mut seen = HashSet::new();
        let ip = |record: Gva| space.read_sized(record.offset(self.ip.offset), self.ip.size);
        while group.0 != 0 {
            if !seen.insert(group) || seen.len() > MAX_GROUPS {
                return Err(FtraceError::Endless { groups: seen.len() });
            }
            let count = space.read_sized(group.offset(self.index.offset), self.index.size)?;
            let records = space.read_pointer(group.offset(self.records))?;
            let record = |index: u64| records.offset(index.wrapping_mul(self.record_size));
            // Sorted by address within a group, as the kernel's own search assumes.
            let (mut low, mut high) = (0, count);
            if count > 0
                && ip(record(0))? < at.0.saturating_add(len)
                && ip(record(count - 1))? >= at.0
            {
                while low < high {
                    let middle = low + (high - low) / 2;
                    if ip(record(middle))? < at.0 {
                        low = middle + 1;
                    } else {
                        high = middle;
                    }
                }
                if low < count && ip(record(low))? < at.0.saturating_add(len) {
                    return self.read(space, record(low)).map(Some);
                }
            }
            group = space.read_pointer(group.offset(self.next))?;
        }
        Ok(None)
    }

    fn read(&self, space: &Space<'_>, record: Gva) -> Result<FtraceRecord, FtraceError> {
        let at = record.offset(self.flags.offset);
        let size = self.flags.size;
        let flags = space.read_sized(at, size)?;
        Ok(FtraceRecord {
            at,
            size,
            flags,
            marked: flags | self.disabled,
            in_use: flags & !(self.disabled | self.harmless) != 0,
        })
    }

    /// Whether somebody in the guest wants to trace the function whose record has its flags at `flags`:
    /// then the mark must stay. Where that cannot be known, somebody does.
    ///
    /// # Errors
    /// [`FtraceError`] when it cannot be read who it is.
    pub fn is_wanted(
        &self,
        space: &Space<'_>,
        located: &Located,
        flags: Gva,
    ) -> Result<bool, FtraceError> {
        let Some(tracers) = &self.tracers else {
            return Ok(true);
        };
        let record = Gva(flags.0.wrapping_sub(self.flags.offset));
        let ip = space.read_sized(record.offset(self.ip.offset), self.ip.size)?;
        tracers.want(space, located, Gva(ip))
    }

    /// The flags of a record without the mark that [`FtraceRecord::marked`] added.
    #[must_use]
    pub const fn unmarked(&self, flags: u64) -> u64 {
        flags & !self.disabled
    }
}
