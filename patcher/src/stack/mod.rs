//! What is on its stack?
//!
//! [`Unwinder`] follows the stack of any task or vCPU of a stopped guest to its end, by the
//! kernel's own unwind tables. Guaranteed: a trace that is called reliable has every frame, was
//! followed to where user mode or the first function began, and went only through code whose frames
//! are known; everything else is unreliable, and says from which frame on and why. A guest that lies
//! can make a trace wrong in the ways in which it can deceive its own kernel, but not endless, and
//! nothing outside the stacks that a context can be on is taken for one.
//!
//! The rules are those of arch/x86/kernel/unwind_orc.c, for kernels from 5.10 to 7.3: see [`orc`].
//! It does more than the kernel in one place: return addresses that several tracers took one after
//! the other are found. Addresses are virtual, in bytes.

mod areas;
mod code;
mod layout;
mod names;
mod orc;
mod repair;
mod report;
mod trace;
mod unwinder;
mod walk;

#[cfg(test)]
mod tests;

pub use code::GeneratedCode;
pub use layout::StackLayout;
pub use orc::{OrcError, OrcFormat, OrcTable};
pub use report::{
    FrameReport, StacksReport, StacksRequest, TaskStack, TheTask, Unwound, VcpuReport, unwind,
    vcpus,
};
pub use trace::{Doubt, End, Frame, FrameKind, Reliability, StackKind, Trace, Why};
pub use unwinder::{OnVcpu, Unwinder};
