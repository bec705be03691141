//! Every byte that was changed, and what became of it.

use std::collections::{BTreeMap, VecDeque};

use super::EntryId;
use super::report::{Applied, Closed, End, Origin};
use crate::guest::Gva;

/// Changes that are over and still remembered.
const REMEMBERED: usize = 1024;

/// The changes in a guest, and the last ones that were.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    last: u64,
    applied: BTreeMap<EntryId, Applied>,
    closed: VecDeque<Closed>,
}

impl Ledger {
    /// The number of the next change. Never given twice.
    pub(super) fn next(&mut self) -> EntryId {
        self.last += 1;
        EntryId(self.last)
    }

    pub(super) fn add(&mut self, entry: Applied) {
        self.applied.insert(entry.id, entry);
    }

    pub(super) fn get(&self, id: EntryId) -> Option<&Applied> {
        self.applied.get(&id)
    }

    pub(super) fn applied(&self) -> impl Iterator<Item = &Applied> {
        self.applied.values()
    }

    pub(super) fn closed(&self) -> impl Iterator<Item = &Closed> {
        self.closed.iter()
    }

    /// The change that already has bytes among the `len` at `at`.
    pub(super) fn overlap(&self, at: Gva, len: u64) -> Option<EntryId> {
        self.applied
            .values()
            .find(|entry| {
                let end = entry.address.0.saturating_add(entry.after.0.len() as u64);
                entry.address.0 < at.0.saturating_add(len) && at.0 < end
            })
            .map(|entry| entry.id)
    }

    pub(super) fn revert(&mut self, id: EntryId, origin: Origin) {
        if let Some(entry) = self.applied.remove(&id) {
            self.close(entry, End::Reverted { origin });
        }
    }

    /// The place of a change is gone.
    pub(super) fn lose(&mut self, id: EntryId, why: &str) -> Option<Applied> {
        let entry = self.applied.remove(&id)?;
        let end = End::Void {
            why: why.to_owned(),
        };
        self.close(entry.clone(), end);
        Some(entry)
    }

    /// The kernel is gone: nothing is in the guest any more.
    pub(super) fn void(&mut self, why: &str) -> Vec<Applied> {
        let ids: Vec<_> = self.applied.keys().copied().collect();
        let lost = ids.into_iter().filter_map(|id| self.lose(id, why));
        lost.collect()
    }

    fn close(&mut self, entry: Applied, end: End) {
        if self.closed.len() >= REMEMBERED {
            self.closed.pop_front();
        }
        self.closed.push_back(Closed { entry, end });
    }
}
