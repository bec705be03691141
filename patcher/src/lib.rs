//! Everything that understands and changes a Linux guest kernel, from outside the guest.
//!
//! This crate has no hypervisor, no threads and no I/O of its own. It works on the traits of
//! [`guest`], so the same code runs on a live virtual machine, on a memory image and in a fuzzer.
//! Guest memory and kernel images are hostile input: every reader here is bounded and returns an
//! error where it cannot believe what it reads.

pub mod arena;
pub mod compare;
pub mod error;
pub mod grace;
pub mod guest;
mod hash;
#[cfg(test)]
mod hostile;
pub mod image;
mod kernel;
pub mod klog;
pub mod patch;
pub mod probe;
pub mod rules;
pub mod space;
pub mod stack;
pub mod symbols;
#[cfg(any(test, feature = "synthetic"))]
pub mod synthetic;
pub mod tasks;
pub mod text;
pub mod types;

pub use kernel::{Kernel, KernelError};
