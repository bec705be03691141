//! All tasks of a stopped guest.
//!
//! Found are: every thread on the task list, the idle task of every CPU (not on that list), what
//! each CPU runs, what waits on its run queue, and tasks that have left the task list and still
//! have a last switch to make. Guaranteed: the answer is complete or an error. A list that does
//! not end, and a number of threads that is not the kernel's own count, are errors.

use std::collections::HashSet;
use std::fmt;

use super::layout::{Exiting, TaskLayout};
use super::parts::{Parts, Record};
use super::state::TaskState;
use crate::guest::Gva;
use crate::space::{Located, Space, SpaceError};
use crate::types::Field;

/// Longest name that is believed; TASK_COMM_LEN is 16.
const MAX_COMM: usize = 64;

/// Address of a `task_struct` in the guest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize)]
#[serde(transparent)]
pub struct TaskAddr(pub Gva);

/// One task.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Task {
    /// Its `task_struct`.
    pub address: TaskAddr,
    /// Thread id; 0 for idle tasks.
    pub pid: u32,
    /// Id of the process that the thread belongs to.
    pub tgid: u32,
    /// Name, at most 15 characters.
    pub comm: String,
    /// State bits as the kernel has them (0: it runs or can run).
    pub state: u64,
    /// Bits of the way in which it ended, as the kernel has them; 0 while it lives.
    pub exit_state: u64,
    /// PF_ flags as the kernel has them.
    pub flags: u64,
    /// It is on a CPU, or just being switched to or from.
    pub on_cpu: bool,
    /// It is on a run queue.
    pub on_rq: bool,
    /// Lowest address of its kernel stack; 0 when it has none any more.
    pub stack: Gva,
    /// Its saved stack pointer. Stale while it is on a CPU.
    pub sp: Gva,
}

impl Task {
    /// Its state as `ps` shows it.
    #[must_use]
    pub const fn shown(&self) -> TaskState {
        TaskState::of(self.state, self.exit_state)
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.comm, self.pid)
    }
}

/// Why the tasks could not be told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TaskError {
    /// A pointer leads nowhere.
    #[error("the guest's {what} cannot be read")]
    Unreadable {
        /// What was being read.
        what: &'static str,
        /// Where it failed.
        source: SpaceError,
    },
    /// A list came back to an entry that it had been at.
    #[error(
        "the guest's {what} runs in a circle through {at}; nothing can be said about its tasks"
    )]
    Circle {
        /// The list.
        what: &'static str,
        /// The entry seen twice.
        at: Gva,
    },
    /// A list has more entries than memory could hold.
    #[error(
        "the guest's {what} has more than {limit} entries; nothing can be said about its tasks"
    )]
    Endless {
        /// The list.
        what: &'static str,
        /// The bound that was hit.
        limit: usize,
    },
    /// The kernel's own count is another one: it is just adding or removing a thread.
    #[error("{listed} threads are on the guest's lists, and it counts {counted}: try again")]
    Miscount {
        /// Threads found.
        listed: u64,
        /// Threads that the kernel counts.
        counted: u64,
    },
    /// Tasks are ending, and this kernel keeps no list of them.
    #[error("{tasks} tasks of the guest are ending and are on no list: try again")]
    Ending {
        /// How many.
        tasks: u64,
    },
    /// Nothing says whether there are tasks on their way out.
    #[error("this kernel does not tell which tasks have left its task list without being gone")]
    EndingUnknown,
}

impl TaskError {
    /// Whether it may be different after the guest ran on for a moment.
    #[must_use]
    pub const fn passes(&self) -> bool {
        matches!(self, Self::Miscount { .. } | Self::Ending { .. })
    }
}

/// Tasks found so far.
#[derive(Default)]
pub(super) struct Tasks {
    pub(super) tasks: Vec<Task>,
    seen: HashSet<Gva>,
}

/// A reader of tasks in one stopped guest.
pub(super) struct Walker<'a, 'm> {
    pub(super) space: &'a Space<'m>,
    pub(super) located: &'a Located,
    pub(super) layout: &'a TaskLayout,
    /// More tasks than this do not fit into the guest's memory, or are not looked at.
    pub(super) limit: usize,
}

impl<'a, 'm> Walker<'a, 'm> {
    pub(super) fn new(space: &'a Space<'m>, located: &'a Located, layout: &'a TaskLayout) -> Self {
        let ram = space
            .memory()
            .ram()
            .iter()
            .fold(0_u64, |sum, range| sum.saturating_add(range.len));
        let limit = ram / layout.task.size.max(1);
        Self {
            space,
            located,
            layout,
            limit: usize::try_from(limit)
                .unwrap_or(usize::MAX)
                .min(space.bounds().entries),
        }
    }

    /// All tasks, each once.
    pub(super) fn all(&self) -> Result<Vec<Task>, TaskError> {
        let mut found = self.listed()?;
        let listed = found.tasks.iter().filter(|task| task.pid != 0).count();
        self.compare_count(listed as u64)?;
        self.unlisted(&mut found)?;
        Ok(found.tasks)
    }

    /// The tasks that are there, whether or not they are as many as the kernel counts.
    pub(super) fn uncounted(&self) -> Result<Vec<Task>, TaskError> {
        let mut found = self.listed()?;
        self.unlisted(&mut found)?;
        Ok(found.tasks)
    }

    /// Every thread on the task list, each once.
    pub(super) fn listed(&self) -> Result<Tasks, TaskError> {
        let layout = self.layout;
        let mut found = Tasks::default();
        for leader in self.leaders()? {
            self.threads(leader, &layout.task.all, &mut |thread, record| {
                if found.seen.insert(thread) {
                    found.tasks.push(self.task_of(thread, record));
                    self.bound("task list", found.tasks.len())?;
                }
                Ok(())
            })?;
        }
        Ok(found)
    }

    /// The first thread of every process, the first task of all before them.
    fn leaders(&self) -> Result<Vec<Gva>, TaskError> {
        let init = self.layout.init_task.at(self.located.slide);
        let member = self.layout.task.tasks;
        let mut leaders = vec![init];
        leaders.extend(self.entries("task list", init.offset(member), member)?);
        Ok(leaders)
    }

    /// The tasks that are on a CPU or on a run queue. All are looked at and counted, as by
    /// [`Walker::all`], but no more is read of the others.
    pub(super) fn awake(&self) -> Result<Vec<Task>, TaskError> {
        let fields = &self.layout.task;
        let is_awake = |record: &Record<'_>| {
            record.number(fields.on_cpu) != 0 || record.number(fields.on_rq) != 0
        };
        let mut listed = Vec::new();
        let mut awake = Vec::new();
        for leader in self.leaders()? {
            self.threads(leader, &fields.few, &mut |thread, record| {
                if is_awake(record) {
                    awake.push(thread);
                }
                if record.number(fields.pid) != 0 {
                    listed.push(thread);
                }
                self.bound("task list", listed.len())
            })?;
        }
        // One that is on several lists is one.
        listed.sort_unstable();
        listed.dedup();
        self.compare_count(listed.len() as u64)?;
        for address in self.per_cpu()?.into_iter().chain(self.ending()?) {
            if address.0 != 0 && is_awake(&self.record(address, &fields.few)?) {
                awake.push(address);
            }
        }
        awake.sort_unstable();
        awake.dedup();
        awake.into_iter().map(|task| self.task(task)).collect()
    }

    /// Adds the tasks that are not on the task list.
    pub(super) fn unlisted(&self, found: &mut Tasks) -> Result<(), TaskError> {
        for address in self.per_cpu()?.into_iter().chain(self.ending()?) {
            if address.0 != 0 && found.seen.insert(address) {
                found.tasks.push(self.task(address)?);
                self.bound("run queues", found.tasks.len())?;
            }
        }
        Ok(())
    }

    /// Everything but idle tasks is counted, by adding and removing under the lock of the list.
    fn compare_count(&self, listed: u64) -> Result<(), TaskError> {
        match self.counted()? {
            Some(counted) if counted != listed => Err(TaskError::Miscount { listed, counted }),
            _ => Ok(()),
        }
    }

    /// The kernel's own count of threads, where it has one.
    pub(super) fn counted(&self) -> Result<Option<u64>, TaskError> {
        let Some(address) = self.layout.nr_threads else {
            return Ok(None);
        };
        let at = address.at(self.located.slide);
        self.number("nr_threads", at, 4).map(Some)
    }

    /// The idle task of every CPU.
    pub(super) fn idle(&self) -> Result<Vec<Gva>, TaskError> {
        let queues = &self.layout.runqueues;
        let per_cpu = &self.located.per_cpu;
        let areas = per_cpu
            .cpus()
            .filter_map(|cpu| per_cpu.address(queues.variable, cpu));
        areas
            .map(|rq| self.pointer("run queues", rq.offset(queues.idle)))
            .collect()
    }

    /// What is current, idle or waiting on every CPU.
    fn per_cpu(&self) -> Result<Vec<Gva>, TaskError> {
        let queues = &self.layout.runqueues;
        let mut found = Vec::new();
        for cpu in self.located.per_cpu.cpus() {
            let Some(rq) = self.located.per_cpu.address(queues.variable, cpu) else {
                continue;
            };
            found.push(self.pointer("run queues", rq.offset(queues.curr))?);
            found.push(self.pointer("run queues", rq.offset(queues.idle))?);
            found.extend(self.optional("run queues", rq.offset(queues.fair), queues.fair_node)?);
        }
        Ok(found)
    }

    fn ending(&self) -> Result<Vec<Gva>, TaskError> {
        const WHAT: &str = "list of ending tasks";
        let per_cpu = &self.located.per_cpu;
        match self.layout.exiting {
            Exiting::Listed {
                variable,
                head,
                node,
            } => {
                let mut found = Vec::new();
                for area in per_cpu
                    .cpus()
                    .filter_map(|cpu| per_cpu.address(variable, cpu))
                {
                    found.extend(self.optional(WHAT, area.offset(head), node)?);
                }
                Ok(found)
            }
            Exiting::Counted { .. } | Exiting::Unknown => Ok(Vec::new()),
        }
    }

    /// There are no tasks on their way out that [`Walker::all`] could not find: asleep, and on no
    /// list any more.
    pub(super) fn none_unlisted(&self) -> Result<(), TaskError> {
        const WHAT: &str = "count of ending tasks";
        let per_cpu = &self.located.per_cpu;
        match self.layout.exiting {
            Exiting::Listed { .. } => Ok(()),
            Exiting::Counted {
                domain,
                data,
                locks,
                unlocks,
            } => {
                let domain = domain.at(self.located.slide);
                let data = self.pointer(WHAT, domain.offset(data))?;
                let mut inside = 0_u64;
                for area in per_cpu
                    .cpus()
                    .filter_map(|cpu| per_cpu.of_pointer(data, cpu))
                {
                    inside = inside
                        .wrapping_add(self.sum(WHAT, area, locks)?)
                        .wrapping_sub(self.sum(WHAT, area, unlocks)?);
                }
                match inside {
                    0 => Ok(()),
                    tasks => Err(TaskError::Ending { tasks }),
                }
            }
            Exiting::Unknown => Err(TaskError::EndingUnknown),
        }
    }

    /// Sum of an array of longs.
    fn sum(&self, what: &'static str, base: Gva, field: Field) -> Result<u64, TaskError> {
        (0..field.size / 8).try_fold(0_u64, |sum, index| {
            let at = base.offset(field.offset).offset(index * 8);
            Ok(sum.wrapping_add(self.number(what, at, 8)?))
        })
    }

    fn task(&self, address: Gva) -> Result<Task, TaskError> {
        let record = self.record(address, &self.layout.task.all)?;
        Ok(self.task_of(address, &record))
    }

    fn task_of(&self, address: Gva, record: &Record<'_>) -> Task {
        let fields = &self.layout.task;
        let narrow = |field| u32::try_from(record.number(field)).unwrap_or(u32::MAX);
        let comm = record.bytes(fields.comm);
        let comm = comm.get(..comm.len().min(MAX_COMM)).unwrap_or_default();
        let end = memchr::memchr(0, comm).unwrap_or(comm.len());
        Task {
            address: TaskAddr(address),
            pid: narrow(fields.pid),
            tgid: narrow(fields.tgid),
            comm: String::from_utf8_lossy(comm.get(..end).unwrap_or_default()).into_owned(),
            state: record.number(fields.state),
            exit_state: record.number(fields.exit_state),
            flags: record.number(fields.flags),
            on_cpu: record.number(fields.on_cpu) != 0,
            on_rq: record.number(fields.on_rq) != 0,
            stack: record.pointer(fields.stack),
            sp: record.pointer(fields.sp),
        }
    }

    /// Reads those parts of a task that hold the members of `parts`.
    pub(super) fn record<'p>(
        &self,
        address: Gva,
        parts: &'p Parts,
    ) -> Result<Record<'p>, TaskError> {
        let mut record = parts.empty();
        self.fill(&mut record, address)?;
        Ok(record)
    }

    /// The same for another task.
    pub(super) fn fill(&self, record: &mut Record<'_>, address: Gva) -> Result<(), TaskError> {
        let read = record.fill(self.space, address);
        read.map_err(|source| TaskError::Unreadable {
            what: "task",
            source,
        })
    }

    pub(super) fn pointer(&self, what: &'static str, at: Gva) -> Result<Gva, TaskError> {
        self.number(what, at, 8).map(Gva)
    }

    pub(super) fn number(&self, what: &'static str, at: Gva, size: u64) -> Result<u64, TaskError> {
        self.space
            .read_sized(at, size)
            .map_err(|source| TaskError::Unreadable { what, source })
    }
}
