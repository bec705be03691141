//! Where the machine and the patcher meet: the guest's kernel as commands see it.
//!
//! The kernel's file is opened when a command first needs it, never while the guest is stopped.
//! A thread of its own looks now and then whether what was changed is still there, and frees what
//! nobody needs any more.

mod callback;
mod commands;
mod error;
mod grace;
mod insight;
mod inspect;
mod probes;
mod session;
mod stacks;
mod steps;
mod tracepoints;
mod vmcoreinfo;

use std::{io, thread};

pub(crate) use commands::origin_of;
pub use commands::register;
pub use session::{Patching, StopReport, WithStop};
pub use vmcoreinfo::vmcoreinfo_source;

impl Patching {
    /// Starts the thread that looks after what is in the guest.
    ///
    /// # Errors
    /// What the host said when there is no thread to be had.
    pub fn start_looking(&self) -> io::Result<()> {
        let patching = self.clone();
        let body = move || {
            let mut pause = patching.look();
            loop {
                thread::park_timeout(pause);
                pause = patching.look();
            }
        };
        let looking = thread::Builder::new().name("patching".into()).spawn(body)?;
        self.wake_by(looking.thread().clone());
        Ok(())
    }
}
