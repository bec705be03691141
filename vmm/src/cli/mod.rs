//! The command line.

pub mod args;
pub mod client;
mod log;
pub mod run;
mod signals;
pub mod values;
