//! How much a guest may make us read.

use std::cell::Cell;
use std::time::{Duration, Instant};

use super::SpaceError;

/// Steps between two looks at the clock.
const LOOK: u64 = 1 << 10;

/// Bounds of everything that is read in one look at a guest, whatever its lists and tables say.
///
/// A read beyond one of them is an error ([`SpaceError::Steps`] and the like), so a walk that hits
/// one is never taken for a complete one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// Reads, counted by page. 2^26 unless set: 100,000 tasks take a hundredth of that.
    pub steps: u64,
    /// Bytes that are read. 16 GiB unless set.
    pub bytes: u64,
    /// Entries of one list: tasks, modules, what waits on a run queue. 2^22 unless set, which is
    /// as many as there can be process ids.
    pub entries: usize,
    /// From the first read to the last. 10 s unless set.
    pub time: Duration,
}

impl Bounds {
    /// The bounds unless others are set.
    pub const USUAL: Self = Self {
        steps: 1 << 26,
        bytes: 16 << 30,
        entries: 1 << 22,
        time: Duration::from_secs(10),
    };
}

impl Default for Bounds {
    fn default() -> Self {
        Self::USUAL
    }
}

/// What is left of them.
#[derive(Debug)]
pub(super) struct Left {
    bounds: Bounds,
    steps: Cell<u64>,
    bytes: Cell<u64>,
    begun: Cell<Option<Instant>>,
}

impl Left {
    pub(super) const fn of(bounds: Bounds) -> Self {
        Self {
            bounds,
            steps: Cell::new(0),
            bytes: Cell::new(0),
            begun: Cell::new(None),
        }
    }

    pub(super) const fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Takes a step in which `bytes` are read.
    pub(super) fn spend(&self, bytes: usize) -> Result<(), SpaceError> {
        let bounds = &self.bounds;
        let steps = self.steps.get();
        if steps >= bounds.steps {
            return Err(SpaceError::Steps {
                limit: bounds.steps,
            });
        }
        self.steps.set(steps + 1);
        let read = self.bytes.get().saturating_add(bytes as u64);
        if read > bounds.bytes {
            return Err(SpaceError::Bytes {
                limit: bounds.bytes,
            });
        }
        self.bytes.set(read);
        if steps % LOOK == 0 {
            let now = Instant::now();
            let begun = self.begun.get().unwrap_or(now);
            self.begun.set(Some(begun));
            if now.duration_since(begun) > bounds.time {
                return Err(SpaceError::Time { limit: bounds.time });
            }
        }
        Ok(())
    }
}
