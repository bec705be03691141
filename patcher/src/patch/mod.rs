//! The changes that are made to a guest's kernel: what may be asked for, what is checked, and the
//! ledger of everything that was done.
//!
//! [`Patcher`] is what a hypervisor calls. Guaranteed: an operation is done completely or not at
//! all; a refusal says why and leaves the guest as it was; what was changed can be taken back
//! unless the guest has changed it itself; and memory of ours is used again only when no vCPU and
//! no task can come back to it. Not guaranteed: that a change makes sense.

pub mod code;

mod breakpoint;
mod check;
mod error;
mod function;
mod grace;
mod hook;
mod inspect;
mod knowledge;
mod ledger;
mod look;
mod marks;
mod module_text;
mod patcher;
mod placing;
mod probe;
mod redirect;
mod report;
mod retire;
mod stacks;
mod steps;
mod text_patch;
mod tracepoint;
mod trap;
mod unloaded;
mod writing;

pub use breakpoint::{Breakpoint, BreakpointRequest, Settled, Spinning};
pub use error::PatchError;
pub use grace::Cookie;
pub use inspect::{Compared, TextCopy};
pub use patcher::Patcher;
pub use probe::{
    AllDetached, Callback, Detached, Does, Histogram, Measured, NewProbe, PreparedProbe, ProbeInfo,
    ProbeRequest, Recorded, Records, ReturnError,
};
pub use redirect::{NewCode, PreparedRedirect, RedirectRequest};
pub use report::{
    Applied, Bytes, Closed, Collected, End, EntryId, Evidence, Forgotten, FtraceMark, KernelReport,
    Kind, Listing, Origin, PlacedCode, Retired, Reverted,
};
pub use steps::{Passage, PreparedChange, Step};
pub use text_patch::{MAX_TEXT, PreparedText, TextRequest};
pub use tracepoint::{
    Outcome, PreparedTracepoint, TracepointInfo, TracepointRequest, TracepointState, USUAL_PRIORITY,
};
pub use trap::{TRAP_PORT, TrapHandler};
pub use unloaded::Unloaded;
