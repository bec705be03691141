//! The kernel's other way to its tasks: the table of process ids.
//!
//! `init_pid_ns.idr` has held every pid of the guest since 4.15; each leads to the one task that
//! has it as its thread id. It is kept apart from the task list, so that the two can be compared.

use std::collections::HashSet;

use super::list::{TaskError, Walker};
use crate::Kernel;
use crate::guest::{Gva, LinkAddr};
use crate::types::{Field, TypeError};

/// PID_MAX_LIMIT is 2^22, with 64 in a node; and the nodes above those.
const MAX_NODES: usize = (1 << 16) + (1 << 10) + 32;
/// `enum pid_type`: PIDTYPE_PID is its first.
const OWN: &str = "tasks[0].first";
const WHAT: &str = "table of process ids";

/// Where the table is and how it is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct PidTable {
    pub(super) namespace: LinkAddr,
    /// `pid_namespace.idr.idr_rt.xa_head`.
    pub(super) head: u64,
    /// `xa_node.shift`.
    pub(super) shift: Field,
    /// `xa_node.slots`, an array of pointers.
    pub(super) slots: Field,
    /// `pid.tasks[PIDTYPE_PID].first`.
    pub(super) first: u64,
    /// `task_struct.pid_links[PIDTYPE_PID]`, which that points to.
    pub(super) link: u64,
}

impl PidTable {
    pub(super) fn of(kernel: &Kernel) -> Option<Self> {
        let types = kernel.types();
        let fields = || -> Result<Self, TypeError> {
            Ok(Self {
                namespace: LinkAddr(0),
                head: types.field("pid_namespace", "idr.idr_rt.xa_head")?.offset,
                shift: types.field("xa_node", "shift")?,
                slots: types.field("xa_node", "slots")?,
                first: types.field("struct pid", OWN)?.offset,
                link: types.field("task_struct", "pid_links[0]")?.offset,
            })
        };
        let namespace = kernel.symbols().address("init_pid_ns").ok()?;
        Some(Self {
            namespace,
            ..fields().ok()?
        })
    }
}

/// Entries of a table (include/linux/xarray.h): a node of the tree has the two lowest bits 10, a
/// number the lowest bit 1; anything else is a pointer.
fn node(entry: u64) -> Option<Gva> {
    // Below are marks for readers, such as XA_ZERO_ENTRY.
    (entry & 3 == 2 && entry > 4096).then(|| Gva(entry - 2))
}

impl Walker<'_, '_> {
    /// The `task_struct` of every task that the table leads to, each once.
    pub(super) fn by_pid(&self, table: &PidTable) -> Result<HashSet<Gva>, TaskError> {
        let mut tasks = HashSet::new();
        let head = table.namespace.at(self.located.slide).offset(table.head);
        let head = self.pointer(WHAT, head)?;
        let mut waiting: Vec<(Gva, u64)> =
            node(head.0).map(|root| (root, 64)).into_iter().collect();
        let mut seen = HashSet::new();
        let slots = usize::try_from(table.slots.size / 8).unwrap_or(0).min(64);
        let mut bytes = vec![0; slots * 8];
        while let Some((at, above)) = waiting.pop() {
            if !seen.insert(at) {
                return Err(TaskError::Circle { what: WHAT, at });
            }
            if seen.len() > MAX_NODES {
                return Err(TaskError::Endless {
                    what: WHAT,
                    limit: MAX_NODES,
                });
            }
            let shift = self.number(WHAT, at.offset(table.shift.offset), table.shift.size)?;
            if shift >= above {
                return Err(TaskError::Circle { what: WHAT, at });
            }
            self.space
                .read(at.offset(table.slots.offset), &mut bytes)
                .map_err(|source| TaskError::Unreadable { what: WHAT, source })?;
            for raw in bytes.chunks_exact(8) {
                let entry = raw.try_into().map_or(0, u64::from_le_bytes);
                match node(entry) {
                    Some(child) => waiting.push((child, shift)),
                    // A pid that is just being made has no structure yet.
                    None if entry == 0 || entry & 3 != 0 => {}
                    None => {
                        let first = self.pointer(WHAT, Gva(entry).offset(table.first))?;
                        // Without one, it is only the id of a group or a session.
                        if first.0 != 0 {
                            tasks.insert(Gva(first.0.wrapping_sub(table.link)));
                            self.bound(WHAT, tasks.len())?;
                        }
                    }
                }
            }
        }
        Ok(tasks)
    }
}
