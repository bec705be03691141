//! QMP as a state machine without I/O: bytes in, requests out; replies and events in, bytes out.
//!
//! [`Session`] is one connection. It never blocks, keeps at most one unfinished request of bounded
//! size, and hands out one request at a time: the next one is read only after the last was
//! answered, so replies come in the order of the requests.
//!
//! What clients rely on (the QMP specification, and the Python package `qemu.qmp`): requests are a
//! stream of JSON values with or without white space between them; every reply and event is one
//! line that ends with CR LF; `id` is echoed whatever value it has; an error without an `id` is
//! sent only in answer to something that could not be understood as a request.

mod arguments;
mod error;
mod notice;
mod request;
mod session;
mod splitter;
mod unique;

pub use arguments::from_arguments;
pub use error::{ErrorClass, QmpError, Reason};
pub use notice::{Audience, Notice, STANDARD_EVENTS, Timestamp, notices};
pub use request::Request;
pub use session::{SESSION_COMMANDS, Session, Step, Version};
pub use splitter::{Limits, Splitter, SyntaxError};
