//! Whether the guest's kernel panicked, told from its own memory.
//!
//! Stock kernels have pvpanic as a module and do not reset after a panic, so neither a device nor
//! a reset can be relied on.

use patcher::Kernel;
use patcher::guest::StoppedGuest;
use patcher::klog;
use patcher::space::{Landmarks, Located};

/// Records of the log that are looked through for the panic's message.
const RECORDS: usize = 400;
/// Records that are printed.
const SHOWN: usize = 12;

/// What a dead kernel said.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Panic {
    /// The panic's own message.
    pub(super) message: String,
    /// The last lines of its log.
    pub(super) last_lines: Vec<String>,
}

/// Looks for a panic. `None` also when the guest runs another kernel than `kernel`.
pub(super) fn examine(guest: &dyn StoppedGuest, kernel: &Kernel) -> Option<Panic> {
    let marks = report("landmarks", Landmarks::of(kernel))?;
    let located = report("the kernel", Located::find_in_any_state(guest, &marks))?;
    let layout = report("the log", kernel.log_layout())?;
    let memory: &dyn patcher::guest::GuestMemory = &guest;
    let space = located.space(memory);
    report("panic_cpu", klog::panicked(&space, &layout, located.slide))??;
    let records = report(
        "the log",
        klog::last_records(&space, &layout, located.slide, RECORDS),
    )
    .unwrap_or_default();
    let message = klog::panic_message(&records)
        .unwrap_or("no message in its log")
        .to_owned();
    let shown = records.len().saturating_sub(SHOWN);
    let last_lines = records
        .into_iter()
        .skip(shown)
        .map(|record| record.text)
        .collect();
    Some(Panic {
        message,
        last_lines,
    })
}

fn report<T, E: std::fmt::Display>(what: &str, result: Result<T, E>) -> Option<T> {
    result
        .map_err(|error| tracing::debug!(%error, "cannot look at {what} of the guest"))
        .ok()
}
