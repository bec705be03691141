//! Code that was unhooked, until nobody can be in it.
//!
//! Nothing jumps to retired code any more, but a call may still be in it, asleep or preempted, and
//! would return into whatever takes its place. So it is freed only in a stop in which no stack, no
//! register and no saved return address has a word in its range. Code that forms an address of its
//! own is kept for good: such an address may be anywhere.

use super::EntryId;
use super::code::Code;
use super::report::{Collected, PlacedCode, Retired};
use crate::arena::{Arena, Slot};
use crate::error::with_causes;
use crate::guest::StoppedGuest;
use crate::space::Located;
use crate::tasks::{TaskLayout, Windows, scan};

/// The retired code of one guest.
#[derive(Debug, Default)]
pub(super) struct Retirement {
    all: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    report: Retired,
    /// What was placed there, to find it again when the same is placed once more.
    content: Content,
}

/// What is needed to tell whether code is the same: the code, and the bytes it became.
#[derive(Clone, Debug)]
pub(super) struct Content {
    pub(super) code: Code,
    pub(super) linked: Vec<u8>,
}

impl Retirement {
    pub(super) fn add(&mut self, id: EntryId, placed: &PlacedCode, content: Content) {
        self.all.push(Entry {
            report: Retired {
                id,
                code: placed.code,
                data: placed.data,
                keep: placed.keep.clone(),
                held_by: Vec::new(),
            },
            content,
        });
    }

    pub(super) fn report(&self) -> Vec<Retired> {
        self.all.iter().map(|entry| entry.report.clone()).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Some of it may be freed one day.
    pub(super) fn can_shrink(&self) -> bool {
        self.all.iter().any(|entry| entry.report.keep.is_none())
    }

    pub(super) fn clear(&mut self) {
        self.all.clear();
    }

    /// A retired slot that holds just this code, and has no data that a first life has changed.
    /// Whoever is still in it does not notice that it is used again.
    pub(super) fn reuse(
        &mut self,
        code: &Code,
        linked_at: impl Fn(Slot) -> Option<Vec<u8>>,
    ) -> Option<(Slot, Content)> {
        let index = self.all.iter().position(|entry| {
            entry.report.data.is_none()
                && entry.content.code == *code
                && linked_at(entry.report.code).as_ref() == Some(&entry.content.linked)
        })?;
        let entry = self.all.swap_remove(index);
        Some((entry.report.code, entry.content))
    }

    /// Frees what nobody can be in.
    pub(super) fn collect(
        &mut self,
        guest: &mut dyn StoppedGuest,
        located: &Located,
        layout: &TaskLayout,
        arena: &mut Arena,
    ) -> Collected {
        let candidates = self.all.iter().filter(|entry| entry.report.keep.is_none());
        let windows = Windows::new(candidates.map(|entry| entry.report.code.range()));
        if windows.is_empty() {
            return Collected {
                retired: self.report(),
                ..Collected::default()
            };
        }
        let scanned = {
            let memory = &&*guest;
            scan(
                &located.space(memory),
                located,
                layout,
                guest.vcpus(),
                &windows,
            )
        };
        let scanned = match scanned {
            Ok(scanned) => scanned,
            Err(error) => {
                return Collected {
                    retired: self.report(),
                    undecided: Some(with_causes(&error)),
                    ..Collected::default()
                };
            }
        };
        let mut collected = Collected::default();
        let mut kept = Vec::new();
        for mut entry in std::mem::take(&mut self.all) {
            let report = &mut entry.report;
            if report.keep.is_none() {
                report.held_by = scanned.holdouts(&report.code.range());
                if report.held_by.is_empty() {
                    match free(guest, arena, report) {
                        Ok(()) => {
                            collected.freed.push(report.id);
                            continue;
                        }
                        Err(error) => report.held_by.push(with_causes(&error)),
                    }
                }
            }
            kept.push(entry);
        }
        self.all = kept;
        collected.retired = self.report();
        collected
    }
}

fn free(
    guest: &mut dyn StoppedGuest,
    arena: &mut Arena,
    report: &mut Retired,
) -> Result<(), crate::arena::ArenaError> {
    if let Some(data) = report.data {
        arena.free(guest, data)?;
        report.data = None;
    }
    arena.free(guest, report.code)
}
