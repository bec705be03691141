//! Signals that ask this process to end.
//!
//! They are blocked in every thread and taken by one that waits for them, so no handler runs in
//! the middle of anything. One that the parent had ignored (nohup, a shell's background job) stays
//! ignored.

use std::io;
use std::mem::MaybeUninit;
use std::thread;

use vmm_sys_util::signal::{block_signal, create_sigset};

const ENDING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: no new action is given, and the pointer is to memory for the present one.
    let known = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) } == 0;
    // SAFETY: sigaction succeeded and filled it in.
    known && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// The signals, blocked in the calling thread and in all it starts from now on.
pub(super) struct EndSignals(Vec<libc::c_int>);

impl EndSignals {
    /// Blocks them. To be called before any other thread exists.
    #[must_use]
    pub(super) fn block() -> Self {
        let taken = ENDING.into_iter().filter(|signal| !is_ignored(*signal));
        let taken: Vec<_> = taken.collect();
        for signal in &taken {
            // One that is blocked already was blocked by the parent: it is taken all the same.
            let _ = block_signal(*signal);
        }
        Self(taken)
    }

    /// Starts the thread that calls `taken` for each of them.
    ///
    /// # Errors
    /// What the host said when there is no thread to be had.
    pub(super) fn take(self, taken: impl Fn() + Send + 'static) -> io::Result<()> {
        let set =
            create_sigset(&self.0).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        let body = move || {
            loop {
                let mut signal = 0;
                // SAFETY: the set is initialised and all its signals are blocked in this thread.
                if unsafe { libc::sigwait(&raw const set, &raw mut signal) } == 0 {
                    tracing::info!(signal, "asked to end");
                    taken();
                }
            }
        };
        thread::Builder::new()
            .name("signals".into())
            .stack_size(64 * 1024)
            .spawn(body)
            .map(drop)
    }
}
