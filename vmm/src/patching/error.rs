//! The patcher's refusals as clients see them.

use std::error::Error;

use patcher::patch::PatchError;

use crate::control::protocol::{QmpError, Reason};

/// An error whose first word is the patcher's own, and whose text names every cause.
pub(super) fn refusal(error: &PatchError) -> QmpError {
    let reason = match error {
        PatchError::Site(_) | PatchError::NoSuchEntry { .. } => Reason::NotFound,
        PatchError::Request(_) | PatchError::Code(_) => Reason::InvalidArgument,
        PatchError::Busy(_) | PatchError::Occupied { .. } => Reason::Busy,
        _ => Reason::Refused,
    };
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    QmpError::new(reason, text).with_word(error.word())
}
