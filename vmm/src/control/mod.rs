//! The control socket: QMP for standard clients, with our own verbs beside QEMU's.
//!
//! [`protocol`] is the conversation without any I/O; [`server`] brings clients and commands
//! together; [`command`] is the table of commands; [`dump`] writes core files; [`Host`] is what all
//! of them need of a machine.

pub mod command;
pub mod dump;
mod host;
pub mod protocol;
pub mod server;

pub use host::{Host, StoppedHost, StoppedWork};
pub use server::{BindError, ControlServer, ControlSocket, ServerError};
