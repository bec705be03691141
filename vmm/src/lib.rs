//! The Stillpoint virtual machine monitor: the machine, its control socket and its command line.

pub mod cli;
pub mod control;
pub mod holding;
pub mod machine;
pub mod patching;
pub mod printable;
