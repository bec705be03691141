//! Why a change was refused. Whatever the reason, the guest is as it was.

use std::fmt;

use super::EntryId;
use super::code::{LinkError, ObjectError};
use super::probe::ReturnError;
use super::report::Retired;
use crate::arena::ArenaError;
use crate::grace::Holdout;
use crate::guest::{Gva, MemoryError};
use crate::probe::DisplaceError;
use crate::space::{LayoutError, LocateError, SpaceError};
use crate::symbols::{ModulesError, SiteError};
use crate::tasks::{Hit, TaskError};
use crate::text::{Busy, BusyError, DecodeError, FtraceError, Leader, RegionError, WriteError};

/// Why a change was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// The kernel's file lacks something.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The site is not known.
    #[error(transparent)]
    Site(#[from] SiteError),
    /// The request makes no sense.
    #[error("{0}")]
    Request(String),
    /// The place is out of bounds.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The bytes are not whole instructions.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A jump leads into the middle of the bytes, where no instruction would begin any more.
    #[error(
        "the instruction at {from} jumps to {to}, inside the bytes, where no new instruction begins"
    )]
    JumpInside {
        /// The jump.
        from: Gva,
        /// Where it leads.
        to: Gva,
    },
    /// The guest goes on inside the bytes by itself, where no instruction would begin any more.
    #[error(
        "the guest can go on at {to}, inside the bytes, where no new instruction begins: {leader}"
    )]
    LedInside {
        /// Where it goes on.
        to: Gva,
        /// What leads there.
        leader: Leader,
    },
    /// The function jumps to addresses that it computes, perhaps into the bytes.
    #[error(
        "the function jumps to a computed address at {from}, which may be inside the bytes: choose an instruction of at least 5 bytes"
    )]
    JumpUnknown {
        /// The jump.
        from: Gva,
    },
    /// An instruction at the site cannot run anywhere else.
    #[error(transparent)]
    Displace(#[from] DisplaceError),
    /// No probe can act at the return of a function.
    #[error("the return of {function} cannot be probed: {why}")]
    Return {
        /// The function.
        function: String,
        /// What stands in the way.
        why: ReturnError,
    },
    /// The new code cannot be used.
    #[error("the new code cannot be used")]
    Code(#[from] ObjectError),
    /// The new code does not reach what it refers to.
    #[error("the new code cannot be placed")]
    Link(#[from] LinkError),
    /// The kernel is not there.
    #[error(transparent)]
    Locate(#[from] LocateError),
    /// The kernel that had been found is gone, and what was changed in it.
    #[error("the guest's kernel is gone ({why}), and with it {} changes", lost.len())]
    Gone {
        /// What is there now.
        why: String,
        /// Changes that were in it.
        lost: Vec<EntryId>,
    },
    /// The guest is changing its text.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// Whether the guest is changing its text is not known.
    #[error(transparent)]
    BusyUnknown(#[from] BusyError),
    /// The guest's modules could not be told.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// The bytes are not those that were expected.
    #[error(
        "the guest has other bytes at {at}: expected {expected}, found {found}; they differ from byte {first:#x} on"
    )]
    Mismatch {
        /// Address of the first byte of all.
        at: Gva,
        /// What was expected.
        expected: String,
        /// What is there.
        found: String,
        /// Index of the first byte that differs.
        first: usize,
    },
    /// The guest changed bytes of ours, so they cannot be put back.
    #[error(
        "change {id} cannot be taken back: the byte at {at} is {found:#04x} and no longer our {ours:#04x}; the guest has changed it"
    )]
    NotOurs {
        /// The change.
        id: EntryId,
        /// The first byte that is not ours.
        at: Gva,
        /// What we had written.
        ours: u8,
        /// What is there.
        found: u8,
    },
    /// Somebody else uses these bytes.
    #[error("the bytes at {at} belong to {owner}")]
    Owned {
        /// Where.
        at: Gva,
        /// Whose they are.
        owner: String,
    },
    /// A context may be inside the bytes.
    #[error(
        "a context may be inside the bytes: {}; try again",
        first_of(hits, "it is not known which")
    )]
    Occupied {
        /// Who.
        hits: Vec<Hit>,
    },
    /// The tasks could not be told.
    #[error(transparent)]
    Tasks(#[from] TaskError),
    /// Guest memory could not be read.
    #[error("guest memory cannot be read")]
    Read(#[from] SpaceError),
    /// Guest memory could not be copied.
    #[error("guest memory cannot be copied")]
    Copy(#[from] MemoryError),
    /// ftrace's records could not be read, or have nothing for a function that ftrace owns.
    #[error("ftrace cannot be kept away from the function")]
    Ftrace(#[from] FtraceError),
    /// The arena has a problem.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// Writing failed.
    #[error("the guest's text cannot be written")]
    Write(#[from] WriteError),
    /// Somebody may still be in code that was unhooked.
    #[error("the grace period has not passed: {}", holdouts(waiting))]
    Waiting {
        /// What was unhooked and somebody may still be in.
        waiting: Vec<Retired>,
    },
    /// Somebody has not left a function since it was changed.
    #[error(
        "not everybody has left what was changed: {}",
        first_of(holdouts, "it is not known who")
    )]
    NotLeft {
        /// Who.
        holdouts: Vec<Holdout>,
    },
    /// The hypervisor cannot hear of breakpoints.
    #[error("breakpoints cannot be had in this guest: {0}")]
    NoBreakpoints(String),
    /// A vCPU is not where something is possible.
    #[error("vCPU {vcpu} cannot be held softly where it is: {why}")]
    NotHere {
        /// The vCPU.
        vcpu: u32,
        /// Why not.
        why: String,
    },
    /// A cookie that was never given.
    #[error("there is no grace period {cookie}: the last cookie that was given is {last}")]
    NoSuchCookie {
        /// As it was given.
        cookie: u64,
        /// The last one there is.
        last: u64,
    },
    /// There is no such probe.
    #[error("there is no probe {id} in the guest")]
    NoSuchProbe {
        /// As it was given.
        id: EntryId,
    },
    /// The guest's kernel was asked for something and did not do it.
    #[error("the guest was asked {what} and did not: {why}")]
    Refused {
        /// What it was asked.
        what: String,
        /// What it said.
        why: String,
    },
    /// The guest's kernel is still at it.
    #[error("the guest was asked to do something for {id} and has not come back from it")]
    Underway {
        /// The number of what it is done for.
        id: EntryId,
    },
    /// The guest's kernel is still at it, and nobody waits for it any more.
    #[error(
        "the guest was asked to do something for {id} and is still at it; it cannot be kept from it any \
         more, and its end will be seen to: look at the list later"
    )]
    StillUnderway {
        /// The number of what it is done for.
        id: EntryId,
    },
    /// There is no such change.
    #[error("there is no change {id} in the guest")]
    NoSuchEntry {
        /// As it was given.
        id: EntryId,
    },
}

impl PatchError {
    /// Whether it may go better after the guest ran on for a moment.
    #[must_use]
    pub fn passes(&self) -> bool {
        match self {
            Self::Busy(_)
            | Self::Occupied { .. }
            | Self::Waiting { .. }
            | Self::NotLeft { .. }
            | Self::Underway { .. }
            | Self::NotHere { .. } => true,
            Self::Tasks(error) => error.passes(),
            Self::Locate(error) => matches!(error, LocateError::Nested),
            _ => false,
        }
    }

    /// A word for programs that stays the same when the text for people changes.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Layout(_) => "UnknownKernelLayout",
            Self::Site(_) => "NoSuchSite",
            Self::Request(_) => "BadRequest",
            Self::Region(RegionError::NotText { .. }) => "NotText",
            Self::Region(RegionError::Init { .. }) => "InitText",
            Self::Region(RegionError::Forbidden { .. }) => "ForbiddenText",
            Self::Decode(_) => "NotWholeInstructions",
            Self::JumpInside { .. } | Self::LedInside { .. } | Self::JumpUnknown { .. } => {
                "JumpInside"
            }
            Self::Displace(_) => "CannotMove",
            Self::Return { .. } => "ReturnUnknown",
            Self::Code(_) => "BadCode",
            Self::Link(_) => "OutOfReach",
            Self::Locate(LocateError::StillBooting { .. }) => "StillBooting",
            Self::Locate(LocateError::NotRunning { .. }) => "NotRunning",
            Self::Locate(LocateError::Nested) => "NestedGuest",
            Self::Locate(_) => "OtherKernel",
            Self::Gone { .. } => "KernelGone",
            Self::Busy(_) => "GuestBusy",
            Self::BusyUnknown(BusyError::Unreadable(_)) => "Unreadable",
            Self::BusyUnknown(BusyError::Modules(_)) | Self::Modules(_) => "ModulesUnknown",
            Self::Mismatch { .. } => "BytesDiffer",
            Self::NotOurs { .. } => "NotOurs",
            Self::Owned { .. } => "Owned",
            Self::NoBreakpoints(_) => "NoBreakpoints",
            Self::NotHere { .. } => "NotHere",
            Self::Occupied { .. } => "Occupied",
            Self::Tasks(_) => "TasksUnknown",
            Self::Read(_) | Self::Copy(_) => "Unreadable",
            Self::Ftrace(_) => "FtraceUnknown",
            Self::Arena(_) => "Arena",
            Self::Write(_) => "WriteFailed",
            Self::Waiting { .. } | Self::NotLeft { .. } => "GracePeriod",
            Self::Refused { .. } => "GuestRefused",
            Self::Underway { .. } | Self::StillUnderway { .. } => "Underway",
            Self::NoSuchCookie { .. } => "NoSuchCookie",
            Self::NoSuchEntry { .. } | Self::NoSuchProbe { .. } => "NoSuchEntry",
        }
    }
}

fn holdouts(waiting: &[Retired]) -> String {
    let mut all = waiting.iter().flat_map(|retired| {
        let id = retired.id;
        let held = retired.held_by.iter();
        held.map(move |holdout| format!("change {id} is held up: {holdout}"))
    });
    match all.next() {
        None => "it has not been looked at yet".into(),
        Some(first) => match all.count() {
            0 => first,
            more => format!("{first}, and {more} more"),
        },
    }
}

fn first_of<T: fmt::Display>(all: &[T], none: &str) -> String {
    match all {
        [] => none.into(),
        [only] => only.to_string(),
        [first, rest @ ..] => format!("{first}, and {} more", rest.len()),
    }
}
