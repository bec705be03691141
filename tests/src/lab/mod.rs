//! The lab: a machine in which `/dev/kvm` is real, on hosts where it is not.
//!
//! Level 1 is a QEMU TCG machine with nested SVM that runs Debian's generic kernel. It sees the
//! host's whole file system at the same paths, read-only and through a fresh overlay for each
//! command: test binaries, Python clients, QEMU and drgn run there as they are, and nothing that
//! they write stays, except below the *share* ([`Home::share`]).
//!
//! | part | where it runs | what it does |
//! |---|---|---|
//! | [`client`] | the caller | takes a free machine, runs one command there, passes everything through |
//! | [`keeper`] | host, one process per machine | boots QEMU, relays frames, keeps it warm for a while |
//! | [`agent`] | level 1, as its init | runs commands, one at a time, and says every second that it is alive |
//! | [`run_fresh`] | the caller | the same on a machine of its own, which is not kept |
//! | [`enter`] | level 1, once per command | makes the command's own root and becomes the command |
//!
//! What holds:
//!
//! * A machine serves one command at a time; whoever runs one holds the lock file of the machine.
//! * When a command ends, everything that it started in the lab is killed.
//! * When a client dies, so does its command; when a keeper dies, so does its QEMU; a keeper ends by
//!   itself when its machine was idle for a while.
//! * A machine that gives no sign of life for [`keeper::SILENCE`] is *lost*, which says nothing
//!   about the command: it is started again and the command runs once more, counted and printed. A
//!   command that fails or runs into its time limit is never repeated.

pub mod agent;
pub mod client;
pub mod enter;
mod feed;
pub mod frame;
mod fresh;
mod home;
pub mod keeper;
mod level1;

use std::io;
use std::path::PathBuf;

pub use client::{Outcome, Output, run};
pub use feed::Inputs;
pub use frame::{Command, Exit};
pub use fresh::{ICOUNT, run_fresh};
pub use home::{Home, image_cache};

/// Set in the environment of commands that run in the lab.
pub const INSIDE: &str = "STILLPOINT_LAB_SHARE";

/// What goes wrong with the lab itself, apart from the command that runs there.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A file or socket of the lab.
    #[error("{what} ({path})")]
    Path {
        /// What was being done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A program that the lab needs could not be run or failed.
    #[error("{program}: {why}; scripts/setup installs what is missing")]
    Program {
        /// Its name.
        program: String,
        /// What it said, or why it could not be started.
        why: String,
    },
    /// The command is not there.
    #[error("{0}: command not found")]
    NoCommand(String),
    /// The level 1 machine did not boot, or was lost twice in a row.
    #[error("the lab's machine {machine} was lost: {why}\nits console is in {console}")]
    Lost {
        /// Index of the machine.
        machine: usize,
        /// Why, as the keeper saw it.
        why: String,
        /// Its console, on the host.
        console: PathBuf,
    },
    /// The conversation between client, keeper and agent.
    #[error("talking to the lab's machine")]
    Talk(#[source] io::Error),
}

/// Adds the path to an I/O error.
fn at(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> LabError {
    let path = path.into();
    move |source| LabError::Path { what, path, source }
}
