//! What other threads hand to the loop: events of the machine, and results of commands.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::control::command::Kept;
use crate::control::protocol::{Notice, QmpError, Timestamp};

/// Events that wait for the loop. It takes them at once; only a flood of events within one of its
/// turns can lose some, which is logged.
const MAX_EVENTS: usize = 1024;

/// Which connection a result is for: the descriptor, and a number that is never used twice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ClientId {
    pub(super) fd: RawFd,
    pub(super) serial: u64,
}

/// A command that ran on another thread has ended.
pub(super) struct Finished {
    pub(super) client: ClientId,
    pub(super) result: Result<Value, QmpError>,
    /// Dropped when the answer is on its way.
    pub(super) kept: Kept,
}

#[derive(Default)]
struct Contents {
    events: VecDeque<(Notice, Timestamp)>,
    lost: u64,
    finished: Vec<Finished>,
    closing: bool,
}

/// See the module's documentation.
pub(crate) struct Mailbox {
    contents: Mutex<Contents>,
    wake: EventFd,
}

/// Everything that was in the mailbox.
pub(super) struct Mail {
    pub(super) events: VecDeque<(Notice, Timestamp)>,
    pub(super) finished: Vec<Finished>,
    pub(super) closing: bool,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            contents: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // It fails only when the counter is at its limit, and then the loop is awake.
        let _ = self.wake.write(1);
    }

    /// Tells clients of an event that happens now; never waits.
    pub(crate) fn notice(&self, notice: Notice) {
        let at = Timestamp::now();
        let mut contents = self.contents();
        if contents.events.len() < MAX_EVENTS {
            contents.events.push_back((notice, at));
        } else {
            contents.lost += 1;
        }
        drop(contents);
        self.wake();
    }

    /// Answers a client; never waits.
    pub(super) fn finished(&self, finished: Finished) {
        self.contents().finished.push(finished);
        self.wake();
    }

    pub(super) fn close(&self) {
        self.contents().closing = true;
        self.wake();
    }

    /// Takes everything. A result never comes without the events that happened before it.
    pub(super) fn take(&self) -> Mail {
        let _ = self.wake.read();
        let mut contents = self.contents();
        let lost = std::mem::take(&mut contents.lost);
        let mail = Mail {
            events: std::mem::take(&mut contents.events),
            finished: std::mem::take(&mut contents.finished),
            closing: contents.closing,
        };
        drop(contents);
        if lost > 0 {
            tracing::warn!(
                lost,
                "more events at once than the control socket can pass on"
            );
        }
        mail
    }

    /// Takes the events only, before an answer that must not overtake them.
    pub(super) fn take_events(&self) -> VecDeque<(Notice, Timestamp)> {
        std::mem::take(&mut self.contents().events)
    }
}

impl std::fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mailbox").finish_non_exhaustive()
    }
}

impl AsRawFd for Mailbox {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}
