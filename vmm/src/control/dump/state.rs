//! How far the dump is, as `query-dump` tells it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// QEMU's `DumpStatus`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// None was ever started.
    #[default]
    None,
    /// One is being written.
    Active,
    /// The last one succeeded.
    Completed,
    /// The last one failed.
    Failed,
}

/// QEMU's `DumpQueryResult`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Progress {
    /// What it is doing.
    pub status: Status,
    /// Bytes of guest memory that are done.
    pub completed: u64,
    /// Bytes of guest memory in all.
    pub total: u64,
}

/// The one dump that there can be at a time.
#[derive(Debug, Default)]
pub struct DumpState {
    /// Status and total.
    fixed: Mutex<(Status, u64)>,
    completed: AtomicU64,
    given_up: AtomicBool,
}

impl DumpState {
    fn fixed(&self) -> MutexGuard<'_, (Status, u64)> {
        self.fixed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a dump of `total` bytes; `None` when one is being written.
    #[must_use]
    pub fn begin(self: &Arc<Self>, total: u64) -> Option<Running> {
        let mut fixed = self.fixed();
        if fixed.0 == Status::Active {
            return None;
        }
        let before = std::mem::replace(&mut *fixed, (Status::Active, total));
        let completed = self.completed.swap(0, Ordering::Relaxed);
        Some(Running {
            state: Arc::clone(self),
            before,
            completed,
        })
    }

    /// No dump goes on from now on: the VMM ends.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    /// Whether [`DumpState::give_up`] was called.
    #[must_use]
    pub fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    /// Whether one is being written.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.fixed().0 == Status::Active
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let (status, total) = *self.fixed();
        Progress {
            status,
            completed: self.completed.load(Ordering::Relaxed),
            total,
        }
    }
}

/// A dump that is being written. Dropping it ends it as failed.
#[derive(Debug)]
pub struct Running {
    state: Arc<DumpState>,
    /// What there was to tell of the dump before this one.
    before: (Status, u64),
    completed: u64,
}

impl Running {
    pub(super) fn advance(&self, bytes: u64) {
        self.state.completed.fetch_add(bytes, Ordering::Relaxed);
    }

    /// It never began: what is told is the dump before it.
    pub fn withdraw(self) {
        let mut fixed = self.state.fixed();
        *fixed = self.before;
        self.state
            .completed
            .store(self.completed, Ordering::Relaxed);
    }

    /// Ends it.
    #[must_use]
    pub fn end(self, succeeded: bool) -> Progress {
        if succeeded {
            self.state.fixed().0 = Status::Completed;
        }
        let state = Arc::clone(&self.state);
        drop(self);
        state.progress()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut fixed = self.state.fixed();
        if fixed.0 == Status::Active {
            fixed.0 = Status::Failed;
        }
    }
}
