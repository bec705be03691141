//! Who is running or waiting?
//!
//! [`tasks`] finds every task of a stopped guest, [`awake`] those that do not sleep, [`survey`] describes them, and [`scan`] tells which of them (or of the
//! vCPUs, or of the CPUs' own stacks) may come back to a range of addresses. A list that was cut off
//! is never taken for the whole, and a scan looks at everything or fails.

mod layout;
mod list;
mod parts;
mod pids;
mod probes;
mod ring;
mod scan;
mod state;
mod survey;

pub use layout::TaskLayout;
pub use list::{Task, TaskAddr, TaskError};
#[cfg(test)]
pub(crate) use probes::Place;
pub(crate) use probes::ReturnProbes;
pub use scan::{Context, Found, Hit, Scanned, Windows};
pub use state::{Scheduling, TaskState};
pub use survey::{Counts, Survey, SurveyLayout, TaskInfo, TaskKind, survey};

use crate::guest::Vcpu;
use crate::space::{Located, Space};

/// Every task of a stopped guest, each once. Kernels before 6.9 do not tell of tasks that are asleep
/// on their way out; [`scan`] fails while there are any.
///
/// # Errors
/// [`TaskError`]; where [`TaskError::passes`], the guest was stopped at a bad moment.
pub fn tasks(
    space: &Space<'_>,
    located: &Located,
    layout: &TaskLayout,
) -> Result<Vec<Task>, TaskError> {
    list::Walker::new(space, located, layout).all()
}

/// Those of [`tasks`] that are on a CPU or on a run queue.
///
/// # Errors
/// Those of [`tasks`].
pub fn awake(
    space: &Space<'_>,
    located: &Located,
    layout: &TaskLayout,
) -> Result<Vec<Task>, TaskError> {
    list::Walker::new(space, located, layout).awake()
}

/// As [`tasks`], also when the kernel counts another number of threads. Only for showing.
///
/// # Errors
/// [`TaskError`] when a list cannot be followed to its end.
pub fn tasks_to_show(
    space: &Space<'_>,
    located: &Located,
    layout: &TaskLayout,
) -> Result<Vec<Task>, TaskError> {
    list::Walker::new(space, located, layout).uncounted()
}

/// Every context that may come back to an address in `windows`.
///
/// # Errors
/// [`TaskError`]; where [`TaskError::passes`], the guest was stopped at a bad moment.
pub fn scan(
    space: &Space<'_>,
    located: &Located,
    layout: &TaskLayout,
    vcpus: &[Vcpu],
    windows: &Windows,
) -> Result<Scanned, TaskError> {
    let tasks = tasks(space, located, layout)?;
    scan_of(space, located, layout, vcpus, windows, &tasks)
}

/// The same with tasks that [`tasks`] has found in this stop.
///
/// # Errors
/// Those of [`scan`].
pub fn scan_of(
    space: &Space<'_>,
    located: &Located,
    layout: &TaskLayout,
    vcpus: &[Vcpu],
    windows: &Windows,
    tasks: &[Task],
) -> Result<Scanned, TaskError> {
    scan::Scan::new(space, located, layout, windows).run(vcpus, tasks)
}

#[cfg(test)]
mod tests;
