//! Who of the guest's own users of ftrace wants to hear of a function.
//!
//! ftrace counts its users at each record, and passes by those that are marked FTRACE_FL_DISABLED:
//! whoever begins to trace a function while its record has the mark is not counted, but is taken
//! off the count when he ends (`__ftrace_hash_rec_update()` in kernel/trace/ftrace.c, all
//! releases). With the mark gone before that, ftrace finds a count of 0 and disables itself for
//! good. So the mark goes only when nobody wants to hear of the function.

use crate::Kernel;
use crate::guest::{Gva, LinkAddr};
use crate::space::{Located, Space, optional};
use crate::types::Field;

use super::FtraceError;

/// More users, and more functions in one bucket, than any kernel has.
const MOST_USERS: usize = 1 << 16;
const MOST_FUNCTIONS: usize = 1 << 20;
/// Buckets of a hash that are believed (FTRACE_HASH_MAX_BITS is 12).
const MAX_BITS: u64 = 16;
/// GOLDEN_RATIO_64 of include/linux/hash.h, for `hash_long()`.
const GOLDEN_RATIO: u64 = 0x61c8_8646_80b5_83eb;

/// Where the kernel keeps its users of ftrace.
#[derive(Clone, Debug)]
pub(super) struct TracersLayout {
    list: LinkAddr,
    end: LinkAddr,
    next: u64,
    hashes: u64,
    filter: u64,
    notrace: u64,
    bits: Field,
    buckets: u64,
    count: Field,
    link: u64,
    ip: u64,
}

impl TracersLayout {
    /// Looks it up in the kernel's file; `None` when that lacks something.
    pub(super) fn of(kernel: &Kernel) -> Option<Self> {
        let types = kernel.types();
        let field = |name, member| types.field(name, member).ok();
        let offset = |name, member| field(name, member).map(|field| field.offset);
        Some(Self {
            list: optional(kernel.symbols(), "ftrace_ops_list")?,
            end: optional(kernel.symbols(), "ftrace_list_end")?,
            next: offset("ftrace_ops", "next")?,
            hashes: offset("ftrace_ops", "func_hash")?,
            filter: offset("ftrace_ops_hash", "filter_hash")?,
            notrace: offset("ftrace_ops_hash", "notrace_hash")?,
            bits: field("ftrace_hash", "size_bits")?,
            buckets: offset("ftrace_hash", "buckets")?,
            count: field("ftrace_hash", "count")?,
            link: offset("ftrace_func_entry", "hlist")?,
            ip: offset("ftrace_func_entry", "ip")?,
        })
    }

    /// Whether anybody wants to hear of the function whose record has the address `ip`.
    pub(super) fn want(
        &self,
        space: &Space<'_>,
        located: &Located,
        ip: Gva,
    ) -> Result<bool, FtraceError> {
        let end = self.end.at(located.slide);
        let mut at = space.read_pointer(self.list.at(located.slide))?;
        for _ in 0..MOST_USERS {
            if at == end || at.0 == 0 {
                return Ok(false);
            }
            let hashes = space.read_pointer(at.offset(self.hashes))?;
            let hash = |member| space.read_pointer(hashes.offset(member));
            let only = self.has(space, hash(self.filter)?, ip)?;
            if only != Some(false) && self.has(space, hash(self.notrace)?, ip)? != Some(true) {
                return Ok(true);
            }
            at = space.read_pointer(at.offset(self.next))?;
        }
        Err(FtraceError::EndlessUsers { users: MOST_USERS })
    }

    /// Whether a hash has a function; `None` when it is empty.
    fn has(&self, space: &Space<'_>, hash: Gva, ip: Gva) -> Result<Option<bool>, FtraceError> {
        if hash.0 == 0 {
            return Ok(None);
        }
        let read = |field: Field| space.read_sized(hash.offset(field.offset), field.size);
        let buckets = space.read_pointer(hash.offset(self.buckets))?;
        if read(self.count)? == 0 || buckets.0 == 0 {
            return Ok(None);
        }
        let bits = read(self.bits)?.min(MAX_BITS);
        // Where it is if the kernel's hash is what it has always been; else it is looked for everywhere.
        let usual = match bits {
            0 => 0,
            _ => ip.0.wrapping_mul(GOLDEN_RATIO) >> (64 - bits),
        };
        for bucket in std::iter::once(usual).chain(0..1 << bits) {
            if self.bucket_has(space, buckets.offset(bucket * 8), ip)? {
                return Ok(Some(true));
            }
        }
        Ok(Some(false))
    }

    fn bucket_has(&self, space: &Space<'_>, bucket: Gva, ip: Gva) -> Result<bool, FtraceError> {
        let mut at = space.read_pointer(bucket)?;
        for _ in 0..MOST_FUNCTIONS {
            if at.0 == 0 {
                return Ok(false);
            }
            let entry = Gva(at.0.wrapping_sub(self.link));
            if space.read_pointer(entry.offset(self.ip))? == ip {
                return Ok(true);
            }
            // `hlist_node.next` comes first.
            at = space.read_pointer(at)?;
        }
        Err(FtraceError::EndlessUsers {
            users: MOST_FUNCTIONS,
        })
    }
}
