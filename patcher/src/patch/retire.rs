//! Code that was unhooked, until nobody can be in it.
//!
//! Nothing jumps to retired code any more, but a call may still be in it, asleep or preempted, and
//! would return into whatever takes its place. So it is freed only in a stop in which no context
//! can come back to it ([`crate::grace`]). Code that forms an address of its own is kept for good:
//! such an address may be anywhere.
//!
//! Each piece of retired code has a number, in the order in which it was unhooked. A grace period
//! cookie is such a number: it has passed when nobody is in any code with that or a lower one.

use super::EntryId;
use super::code::Code;
use super::knowledge::Knowledge;
use super::report::{Applied, Collected, Kind, PlacedCode, Retired};
use super::stacks::unwinder;
use crate::arena::{Arena, ArenaError, Slot};
use crate::error::with_causes;
use crate::grace::{Judge, Judgement, Switches};
use crate::guest::{Gva, StoppedGuest};
use crate::space::Located;
use crate::tasks::{TaskAddr, TaskError, Windows, scan_of, tasks};

/// The retired code of one guest.
#[derive(Debug, Default)]
pub(super) struct Retirement {
    /// The number that was given last. Never given twice.
    last: u64,
    all: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    report: Retired,
    /// What was placed there, to find it again when the same is placed once more.
    content: Content,
    /// Nobody is in it any more, though it is kept.
    clear: bool,
    /// What is known of voluntary switches; `None` for code that may sleep or call.
    since: Option<Switches>,
}

/// What is needed to tell whether code is the same: the code, and the bytes it became.
#[derive(Clone, Debug)]
pub(super) struct Content {
    pub(super) code: Code,
    pub(super) linked: Vec<u8>,
}

impl Retirement {
    /// Takes over what `entry` jumped to.
    pub(super) fn add(&mut self, entry: &Applied, since_ms: u64, content: Content) {
        if let Some(placed) = &entry.code {
            // A probe's trampoline neither sleeps nor calls; new functions may do anything.
            let sleeps = entry.kind != Kind::Probe;
            self.add_placed(entry.id, placed, since_ms, sleeps, content);
        }
    }

    /// The same for code that was never hooked.
    pub(super) fn add_placed(
        &mut self,
        id: EntryId,
        placed: &PlacedCode,
        since_ms: u64,
        sleeps: bool,
        content: Content,
    ) {
        self.last += 1;
        self.all.push(Entry {
            number: self.last,
            report: Retired {
                id,
                code: placed.code,
                data: placed.data,
                goes_on: placed.goes_on.clone(),
                keep: placed.keep.clone(),
                since_ms,
                held_by: Vec::new(),
                holdouts: Vec::new(),
                stuck: None,
            },
            content,
            clear: false,
            since: (!sleeps).then(Switches::new),
        });
    }

    /// The number of what was unhooked last.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// Nobody is in anything any more that was unhooked up to `number`.
    pub(super) fn has_passed(&self, number: u64) -> bool {
        self.pending(number).next().is_none()
    }

    /// What somebody may still be in, up to `number`.
    pub(super) fn pending(&self, number: u64) -> impl Iterator<Item = &Retired> {
        let upto = self.all.iter().filter(move |entry| entry.number <= number);
        upto.filter(|entry| !entry.clear).map(|entry| &entry.report)
    }

    pub(super) fn report(&self) -> Vec<Retired> {
        self.all.iter().map(|entry| entry.report.clone()).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Where retired code is, and where it goes on in the guest's own text.
    pub(super) fn going_on(&self) -> impl Iterator<Item = (Slot, &[Gva])> {
        self.all
            .iter()
            .map(|entry| (entry.report.code, entry.report.goes_on.as_slice()))
    }

    /// A look at the guest may change something.
    pub(super) fn can_shrink(&self) -> bool {
        self.all
            .iter()
            .any(|entry| !entry.clear || entry.report.keep.is_none())
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

    /// Finds out what nobody is in, and frees what may be freed.
    pub(super) fn collect(
        &mut self,
        guest: &mut dyn StoppedGuest,
        located: &Located,
        know: &Knowledge,
        arena: &mut Arena,
    ) -> Collected {
        if !self.can_shrink() {
            return Collected {
                retired: self.report(),
                ..Collected::default()
            };
        }
        let judgements = match self.judge(guest, located, know) {
            Ok(judgements) => judgements,
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
        for (mut entry, judgement) in std::mem::take(&mut self.all).into_iter().zip(judgements) {
            collected.cleared.extend(judgement.cleared);
            entry.clear = judgement.holdouts.is_empty();
            entry.report.held_by = judgement.holdouts.iter().map(ToString::to_string).collect();
            entry.report.holdouts = judgement.holdouts;
            if entry.clear && entry.report.keep.is_none() {
                match free(guest, arena, &mut entry.report) {
                    Ok(()) => {
                        collected.freed.push(entry.report.id);
                        continue;
                    }
                    Err(error) => entry.report.stuck = Some(with_causes(&error)),
                }
            }
            kept.push(entry);
        }
        self.all = kept;
        collected.retired = self.report();
        collected
    }

    fn judge(
        &mut self,
        guest: &dyn StoppedGuest,
        located: &Located,
        know: &Knowledge,
    ) -> Result<Vec<Judgement>, TaskError> {
        let ranges = self.all.iter().map(|entry| entry.report.code.range());
        let windows = Windows::new(ranges);
        let memory = &guest;
        let space = located.space(memory);
        let tasks = tasks(&space, located, &know.tasks)?;
        let vcpus = guest.vcpus();
        let scanned = scan_of(&space, located, &know.tasks, vcpus, &windows, &tasks)?;
        if scanned.is_clear() {
            return Ok(self.all.iter().map(|_| Judgement::default()).collect());
        }
        let layout = know.stack.as_ref().ok();
        let unwinder = layout.map(|layout| unwinder(know, guest, &space, located, layout));
        let switches = |task: TaskAddr| {
            let field = know.switches.as_ref()?;
            space
                .read_sized(task.0.offset(field.offset), field.size)
                .ok()
        };
        let judge = Judge::new(&scanned, &tasks, unwinder.as_ref(), &switches);
        let all = self.all.iter_mut();
        Ok(all
            .map(|entry| judge.judge(&entry.report.code.range(), entry.since.as_mut()))
            .collect())
    }
}

fn free(
    guest: &mut dyn StoppedGuest,
    arena: &mut Arena,
    report: &mut Retired,
) -> Result<(), ArenaError> {
    if let Some(data) = report.data {
        arena.free(guest, data)?;
        report.data = None;
    }
    arena.free(guest, report.code)
}
