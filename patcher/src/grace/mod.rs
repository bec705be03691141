//! When may code that was unhooked be freed? When no context can come back to it.
//!
//! A context is a vCPU, wherever the host left it, a task, or what an interrupt left on a CPU's
//! stacks. [`crate::tasks::scan`] finds every address in the code's ranges that any context still
//! has; it cannot miss one, but what it finds may be stale. [`Judge`] then asks for better
//! [`Evidence`] about each of them. What nothing speaks for is a [`Holdout`]: it is never guessed.

mod judge;

pub use judge::{Clearance, Evidence, Holdout, Judge, Judgement, Switches};
