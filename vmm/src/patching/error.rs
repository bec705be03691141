//! The patcher's refusals as clients see them.

use patcher::error::with_causes;
use patcher::patch::PatchError;

use crate::control::protocol::{QmpError, Reason};

/// An error whose first word is the patcher's own, and whose text names every cause.
pub(super) fn refusal(error: &PatchError) -> QmpError {
    let reason = match error {
        PatchError::Site(_) | PatchError::NoSuchEntry { .. } | PatchError::NoSuchProbe { .. } => {
            Reason::NotFound
        }
        PatchError::Request(_) | PatchError::NoSuchCookie { .. } | PatchError::Code(_) => {
            Reason::InvalidArgument
        }
        PatchError::Busy(_) | PatchError::Waiting { .. } | PatchError::Occupied { .. } => {
            Reason::Busy
        }
        _ => Reason::Refused,
    };
    QmpError::new(reason, with_causes(error)).with_word(error.word())
}
