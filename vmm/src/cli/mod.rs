//! The command line.

pub mod args;
mod bounds;
pub mod client;
mod log;
pub mod run;
mod signals;
pub mod values;
