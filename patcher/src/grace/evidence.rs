//! What speaks for a task in which an address of a resource was found.

use std::collections::BTreeMap;

use crate::tasks::TaskAddr;

/// Why a context that has an address of a resource will not come back to it all the same.
///
/// A context in which no such address is found needs none of these: it is clear by the scan.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Evidence {
    /// Its vCPU is in user mode with this task current: its kernel stack is empty.
    UserMode,
    /// It has switched away by its own will since the resource was unhooked, which nobody does in
    /// code that neither sleeps nor calls. Says nothing where spinlocks sleep (PREEMPT_RT).
    VoluntarySwitch,
    /// Its stack was followed to its end, and no frame is in the resource: the address is stale.
    UnwindClear,
}

/// How often tasks had switched away by their own will when their address was first found.
pub type Switches = BTreeMap<TaskAddr, u64>;

/// What can be asked about one task in a stop.
pub trait Witness {
    /// Why its stack says nothing.
    type Doubt;

    /// Its vCPU is in user mode with this task current.
    fn is_in_user_mode(&self) -> bool;

    /// How often it has switched away by its own will so far; `None` where that cannot be read, or
    /// proves nothing.
    fn switches(&self) -> Option<u64>;

    /// Follows its stack to the end; done when no frame is in the resource.
    ///
    /// # Errors
    /// A frame is in it, or the stack cannot be followed.
    fn unwind(&self) -> Result<(), Self::Doubt>;
}

/// What speaks for `task`, cheapest first. `since` is what earlier stops saw, and what this one
/// adds; `None` for a resource in which a context may sleep, or which calls.
///
/// # Errors
/// Nothing speaks for it.
pub fn evidence<W: Witness>(
    task: TaskAddr,
    witness: &W,
    since: Option<&mut Switches>,
) -> Result<Evidence, W::Doubt> {
    if witness.is_in_user_mode() {
        return Ok(Evidence::UserMode);
    }
    if let (Some(since), Some(now)) = (since, witness.switches()) {
        if *since.entry(task).or_insert(now) < now {
            return Ok(Evidence::VoluntarySwitch);
        }
    }
    witness.unwind().map(|()| Evidence::UnwindClear)
}
