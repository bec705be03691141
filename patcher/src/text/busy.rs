//! Whether the guest is itself changing text right now.
//!
//! With every vCPU stopped it is enough that none of a closed list of the kernel's locks has an
//! owner, that no module is coming or going, and that no text poke is in flight. If one is, the
//! guest has to run on before its text may be touched.

use crate::Kernel;
use crate::guest::{Gva, LinkAddr};
use crate::space::{LayoutError, Located, Space, SpaceError, optional};
use crate::symbols::{ModulesError, ModulesLayout};
use crate::types::Field;

/// The locks under which a kernel changes its own text or the tables that describe it. All are
/// looked at that a kernel has; the first must exist.
const LOCKS: [&str; 8] = [
    "text_mutex",
    "ftrace_lock",
    "tracepoints_mutex",
    "jump_label_mutex",
    "static_call_mutex",
    "klp_mutex",
    "module_mutex",
    "kprobe_mutex",
];
/// Bits of a mutex's owner word that are flags: MUTEX_FLAGS, and RT_MUTEX_HAS_WAITERS below it.
const LOCK_FLAGS: u64 = 7;

/// What the guest is in the middle of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Busy {
    /// A lock is held.
    #[error("the guest is changing its own text: {lock} is held by {owner}")]
    Locked {
        /// Name of the lock.
        lock: &'static str,
        /// The task that holds it.
        owner: String,
    },
    /// Breakpoints are in place for a change that is not finished.
    #[error("the guest is changing its own text: a text poke of {count} sites is in flight")]
    Poking {
        /// References or entries that it counts.
        count: u64,
    },
    /// A module is being loaded or removed.
    #[error("the guest is loading or removing module {name}")]
    Module {
        /// Its name.
        name: String,
    },
}

/// Why it is not known whether the guest is in the middle of something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusyError {
    /// A lock or a count cannot be read.
    #[error("the guest's locks cannot be read")]
    Unreadable(#[from] SpaceError),
    /// Its modules cannot be told.
    #[error(transparent)]
    Modules(#[from] ModulesError),
}

/// Where the kernel keeps these.
#[derive(Clone, Debug)]
pub struct BusyLayout {
    locks: Vec<(&'static str, LinkAddr)>,
    /// `mutex.owner`, or with PREEMPT_RT `mutex.rtmutex.owner`.
    owner: u64,
    comm: Field,
    pid: Field,
    /// Counters of text pokes: address and size.
    pokes: Vec<(LinkAddr, u64)>,
    /// `None` for a kernel that has no modules.
    modules: Option<ModulesLayout>,
}

impl BusyLayout {
    /// Looks them up in the kernel's file.
    ///
    /// # Errors
    /// [`LayoutError`] when the lock of all text changes cannot be found.
    pub fn of(kernel: &Kernel) -> Result<Self, LayoutError> {
        let symbols = kernel.symbols();
        let types = kernel.types();
        symbols.address("text_mutex")?;
        let locks = LOCKS
            .into_iter()
            .flat_map(|name| {
                let all = symbols.named(name).filter_map(|symbol| symbol.address());
                all.map(move |address| (name, address))
            })
            .collect();
        let owner = types
            .field("mutex", "owner")
            .or_else(|error| types.field("mutex", "rtmutex.owner").map_err(|_| error))?;
        // Up to 6.14 a reference count and a queue, from 6.15 on a queue.
        let pokes = [
            ("bp_desc", "bp_patching_desc", "refs"),
            ("text_poke_array", "smp_text_poke_array", "nr_entries"),
        ]
        .into_iter()
        .filter_map(|(symbol, holder, member)| {
            let field = types.field(holder, member).ok()?;
            let address = optional(symbols, symbol)?;
            Some((address.offset(field.offset), field.size))
        })
        .chain(optional(symbols, "tp_vec_nr").map(|at| (at, 4)))
        .collect();
        Ok(Self {
            locks,
            owner: owner.offset,
            comm: types.field("task_struct", "comm")?,
            pid: types.field("task_struct", "pid")?,
            pokes,
            modules: ModulesLayout::of(kernel)?,
        })
    }

    /// What the guest is in the middle of, if anything.
    ///
    /// # Errors
    /// [`BusyError`] when the locks or the list of modules cannot be read.
    pub fn check(&self, space: &Space<'_>, located: &Located) -> Result<Option<Busy>, BusyError> {
        let slide = located.slide;
        for &(lock, address) in &self.locks {
            let owner = space.read_u64(address.offset(self.owner).at(slide))? & !LOCK_FLAGS;
            if owner != 0 {
                let owner = self.describe(space, Gva(owner));
                return Ok(Some(Busy::Locked { lock, owner }));
            }
        }
        for &(address, size) in &self.pokes {
            let count = space.read_sized(address.at(slide), size)?;
            if count != 0 {
                return Ok(Some(Busy::Poking { count }));
            }
        }
        let Some(modules) = &self.modules else {
            return Ok(None);
        };
        let unsettled = modules.unsettled(space, located)?;
        Ok(unsettled.map(|name| Busy::Module { name }))
    }

    fn describe(&self, space: &Space<'_>, task: Gva) -> String {
        let mut comm = [0; 16];
        let pid = space.read_sized(task.offset(self.pid.offset), self.pid.size);
        match (space.read(task.offset(self.comm.offset), &mut comm), pid) {
            (Ok(()), Ok(pid)) => format!("{} (pid {pid})", until_nul(&comm)),
            _ => format!("a task at {task}"),
        }
    }
}

fn until_nul(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0);
    String::from_utf8_lossy(bytes.get(..end.unwrap_or(bytes.len())).unwrap_or_default())
        .into_owned()
}
