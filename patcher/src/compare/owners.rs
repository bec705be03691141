//! Whose a change is.

use super::report::Owner;
use super::view::View;
use crate::guest::Gva;
use crate::patch::Applied;

/// Everybody who may have changed text.
pub(super) struct Owners<'a> {
    ours: &'a [Applied],
}

impl<'a> Owners<'a> {
    pub(super) fn of(_view: &View<'_>, ours: &'a [Applied], _doubts: &mut Vec<String>) -> Self {
        Self { ours }
    }

    /// Whose `found` at `at` is.
    pub(super) fn of_bytes(&self, at: Gva, found: &[u8]) -> Owner {
        let end = at.offset(found.len() as u64);
        let ours = self.ours.iter().find(|change| {
            let after = &change.after.0;
            let last = change.address.offset(after.len() as u64);
            at < last && change.address < end
        });
        match ours {
            Some(change) => Owner::Ours { id: change.id },
            None => Owner::Unknown,
        }
    }
}
