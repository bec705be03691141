//! Return addresses that return probes keep off the stacks.
//!
//! | kernels | where they are kept | replaced by |
//! |---|---|---|
//! | to 5.10 | one hash table for all tasks, `kretprobe_inst_table` | `kretprobe_trampoline` |
//! | 5.11 to 5.17 | a list in each task, `task_struct.kretprobe_instances` | the same, with `__` from 5.15 on |
//! | from 5.18 | a list in each task, `task_struct.rethooks` | `arch_rethook_trampoline` |
//!
//! Which it is follows from the kernel's types (kernel/kprobes.c, kernel/trace/rethook.c). Lists
//! have the newest entry first. A list that does not end is an error.

use std::collections::HashSet;

use super::list::TaskError;
use crate::Kernel;
use crate::guest::{Gva, LinkAddr, Slide};
use crate::space::{Space, optional};

/// More entries than any list of a kernel has return probes in flight.
const MAX_ENTRIES: usize = 1 << 16;
/// KPROBE_TABLE_SIZE.
const MAX_BUCKETS: u64 = 64;
const WHAT: &str = "list of return probes";

/// Where return probes keep what they took. Offsets are in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReturnProbes {
    /// What is put in place of a return address.
    pub(crate) trampoline: LinkAddr,
    pub(crate) place: Place,
    /// The member by which an entry is in its list: `rethook_node.llist`.
    pub(crate) link: u64,
    /// The return address: `rethook_node.ret_addr`.
    pub(crate) address: u64,
    /// Where on the stack it was: `rethook_node.frame`.
    pub(crate) slot: u64,
}

/// Where the lists begin.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// In each task.
    Tasks {
        /// `task_struct.rethooks.first`.
        first: u64,
    },
    /// In a table for all tasks.
    Table {
        start: LinkAddr,
        buckets: u64,
        /// `kretprobe_instance.task`.
        task: u64,
    },
}

/// A return address that was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Kept {
    /// Where it is kept.
    pub(crate) at: Gva,
    /// The address.
    pub(crate) address: u64,
    /// Where on the stack it was.
    pub(crate) slot: u64,
    /// Whose, where the entry says so.
    pub(crate) task: Option<Gva>,
}

impl ReturnProbes {
    /// Looks it up in the kernel's file; `None` for a kernel without return probes.
    pub(crate) fn of(kernel: &Kernel) -> Option<Self> {
        let symbol = |name| optional(kernel.symbols(), name);
        let field = |holder, path| {
            let found = kernel.types().field(holder, path).ok()?;
            Some(found.offset)
        };
        let instance = |name| field("kretprobe_instance", name);
        let old_trampoline =
            || symbol("__kretprobe_trampoline").or_else(|| symbol("kretprobe_trampoline"));
        if let Some(first) = field("task_struct", "rethooks.first") {
            let node = |name| field("rethook_node", name);
            return Some(Self {
                trampoline: symbol("arch_rethook_trampoline")?,
                place: Place::Tasks { first },
                link: node("llist.next")?,
                address: node("ret_addr")?,
                slot: node("frame")?,
            });
        }
        if let Some(first) = field("task_struct", "kretprobe_instances.first") {
            return Some(Self {
                trampoline: old_trampoline()?,
                place: Place::Tasks { first },
                link: instance("llist.next")?,
                address: instance("ret_addr")?,
                slot: instance("fp")?,
            });
        }
        let table = kernel.symbols().named("kretprobe_inst_table").next()?;
        let bucket = kernel.types().size_of("hlist_head").ok()?.max(1);
        Some(Self {
            trampoline: old_trampoline()?,
            place: Place::Table {
                start: table.address()?,
                // The symbol may seem longer than it is, never shorter.
                buckets: (table.size()? / bucket).min(MAX_BUCKETS),
                task: instance("task")?,
            },
            link: instance("hlist.next")?,
            address: instance("ret_addr")?,
            slot: instance("fp")?,
        })
    }

    /// What was taken off the stack of `task`, the newest of each list first.
    pub(crate) fn of_task(
        &self,
        space: &Space<'_>,
        slide: Slide,
        task: Gva,
    ) -> Result<Vec<Kept>, TaskError> {
        match self.place {
            Place::Tasks { first } => {
                let mut found = Vec::new();
                self.chain(space, task.offset(first), &mut found)?;
                Ok(found)
            }
            Place::Table { .. } => {
                let mut found = self.of_table(space, slide)?;
                found.retain(|kept| kept.task == Some(task));
                Ok(found)
            }
        }
    }

    /// What the table for all tasks holds; empty for kernels with lists in each task.
    pub(crate) fn of_table(&self, space: &Space<'_>, slide: Slide) -> Result<Vec<Kept>, TaskError> {
        let mut found = Vec::new();
        if let Place::Table { start, buckets, .. } = self.place {
            for bucket in 0..buckets {
                self.chain(space, start.offset(bucket * 8).at(slide), &mut found)?;
            }
        }
        Ok(found)
    }

    fn chain(&self, space: &Space<'_>, head: Gva, into: &mut Vec<Kept>) -> Result<(), TaskError> {
        let read = |at: Gva| {
            let word = space.read_u64(at);
            word.map_err(|source| TaskError::Unreadable { what: WHAT, source })
        };
        let mut node = Gva(read(head)?);
        let mut seen = HashSet::new();
        while node.0 != 0 {
            if !seen.insert(node) {
                return Err(TaskError::Circle {
                    what: WHAT,
                    at: node,
                });
            }
            if seen.len() > MAX_ENTRIES {
                return Err(TaskError::Endless {
                    what: WHAT,
                    limit: MAX_ENTRIES,
                });
            }
            // Heads and links point to the link of an entry.
            let entry = Gva(node.0.wrapping_sub(self.link));
            let at = entry.offset(self.address);
            into.push(Kept {
                at,
                address: read(at)?,
                slot: read(entry.offset(self.slot))?,
                task: match self.place {
                    Place::Tasks { .. } => None,
                    Place::Table { task, .. } => Some(Gva(read(entry.offset(task))?)),
                },
            });
            node = Gva(read(node)?);
        }
        Ok(())
    }
}
