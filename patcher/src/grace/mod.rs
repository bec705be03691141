//! When may code that was unhooked be freed? When no context can come back to it.
//!
//! A context is a vCPU, wherever the host left it, a task, or what an interrupt left on a CPU's
//! stacks. [`crate::tasks::scan`] finds every address in the code's ranges that any context still
//! has; it cannot miss one, but what it finds may be stale. [`Judge`] then asks for better
//! [`Evidence`] about each of them. What nothing speaks for is a [`Holdout`]: it is never guessed.
//!
//! Who waits for whom, and what a cookie covers, is in [`Queue`]; what speaks for a task in
//! [`evidence`]; where nobody must be when bytes change in [`interior`]. These know nothing of a
//! guest, so that a model can be made of the same rules.

mod evidence;
mod interior;
mod judge;
mod queue;

pub use evidence::{Evidence, Switches, Witness, evidence};
pub use interior::interior;
pub use judge::{Clearance, Holdout, Judge, Judgement};
pub use queue::Queue;
