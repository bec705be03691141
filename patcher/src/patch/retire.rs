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
use super::look::Look;
use super::report::{Collected, PlacedCode, Retired};
use crate::arena::{Arena, ArenaError, Slot};
use crate::error::with_causes;
use crate::grace::{Holdout, Judge, Judgement, Queue, Switches};
use crate::guest::{Gva, StoppedGuest};
use crate::rules::{self, Rule};
use crate::space::Located;
use crate::stack::GeneratedCode;
use crate::tasks::TaskError;

/// The retired code of one guest.
#[derive(Debug, Default)]
pub(super) struct Retirement {
    /// Trampolines of one site are one line.
    all: Queue<Entry>,
}

/// Code that was unhooked in this stop.
#[derive(Debug)]
pub(super) struct Leaving {
    report: Retired,
    content: Content,
    /// Somebody may sleep in it, or in what it calls.
    sleeps: bool,
    site: Option<Gva>,
    kept: Vec<Self>,
}

impl Leaving {
    /// What `id` had placed, or placed anew.
    pub(super) fn new(id: EntryId, placed: &PlacedCode, content: Content, since_ms: u64) -> Self {
        Self {
            report: Retired {
                id,
                code: placed.code,
                callbacks: Vec::new(),
                data: placed.data.into_iter().collect(),
                goes_on: placed.goes_on.clone(),
                keep: placed.keep.clone(),
                since_ms,
                held_by: Vec::new(),
                holdouts: Vec::new(),
                stuck: None,
            },
            content,
            sleeps: true,
            site: None,
            kept: Vec::new(),
        }
    }

    /// Whether somebody may sleep in it; if nobody says, somebody may.
    pub(super) fn sleeps(self, sleeps: bool) -> Self {
        Self { sleeps, ..self }
    }

    /// It was a trampoline of this site. Earlier ones may use what goes with it.
    pub(super) fn of_site(self, at: Gva) -> Self {
        let site = Some(at);
        Self { site, ..self }
    }

    /// Code that only it called, and data that only it used, go with it.
    pub(super) fn with(mut self, code: Option<(PlacedCode, Content)>, data: Slot) -> Self {
        self.report.data.push(data);
        match code {
            Some((placed, content)) if placed.keep.is_some() => {
                let (id, since_ms) = (self.report.id, self.report.since_ms);
                let kept = Self::new(id, &placed, content, since_ms);
                self.kept.push(Self {
                    site: self.site,
                    ..kept
                });
            }
            Some((placed, _)) => {
                self.report.callbacks.push(placed.code);
                self.report.data.extend(placed.data);
            }
            None => {}
        }
        self
    }
}

#[derive(Debug)]
struct Entry {
    report: Retired,
    /// What was placed there, to find it again when the same is placed once more.
    content: Content,
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
    /// Takes over what nothing jumps to any more.
    pub(super) fn add(&mut self, leaving: Leaving) {
        let entry = Entry {
            report: leaving.report,
            content: leaving.content,
            since: (!leaving.sleeps || !rules::holds(Rule::Sleepers)).then(Switches::new),
        };
        self.all.add(entry, leaving.site);
        // It comes after what called it, and outlives that.
        for kept in leaving.kept {
            self.add(kept);
        }
    }

    /// The number of what was unhooked last.
    pub(super) fn last(&self) -> u64 {
        self.all.last()
    }

    /// Nobody is in anything any more that was unhooked up to `number`.
    pub(super) fn has_passed(&self, number: u64) -> bool {
        self.all.has_passed(number)
    }

    /// What somebody may still be in, up to `number`.
    pub(super) fn pending(&self, number: u64) -> impl Iterator<Item = &Retired> {
        self.all.pending(number).map(|entry| &entry.report)
    }

    pub(super) fn report(&self) -> Vec<Retired> {
        self.all.iter().map(|entry| entry.report.clone()).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Where retired code is, and where it goes on in the guest's own text.
    pub(super) fn going_on(&self) -> impl Iterator<Item = (Slot, &[Gva])> {
        let all = self.all.iter().map(|entry| &entry.report);
        all.map(|report| (report.code, report.goes_on.as_slice()))
    }

    /// A look at the guest may change something.
    pub(super) fn can_shrink(&self) -> bool {
        !self.has_passed(u64::MAX) || self.all.iter().any(|entry| entry.report.keep.is_none())
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
        let entry = self.all.take(|entry| {
            entry.report.data.is_empty()
                && entry.report.callbacks.is_empty()
                && entry.content.code == *code
                && linked_at(entry.report.code).as_ref() == Some(&entry.content.linked)
        })?;
        Some((entry.report.code, entry.content))
    }

    /// Retired trampolines, whose frames are known.
    pub(super) fn trampolines(&self) -> impl Iterator<Item = GeneratedCode> + '_ {
        let all = self.all.iter();
        let framed = all.filter(|entry| entry.content.code.keeps_frames);
        framed.map(|entry| GeneratedCode {
            range: entry.report.code.range(),
            name: format!("retired {}", entry.report.id),
        })
    }

    /// Finds out what nobody is in, and frees what may be freed. `hooked` are trampolines that are in
    /// use.
    pub(super) fn collect(
        &mut self,
        guest: &mut dyn StoppedGuest,
        located: &Located,
        know: &Knowledge,
        hooked: &[GeneratedCode],
        arena: &mut Arena,
    ) -> Collected {
        let mut collected = Collected::default();
        if self.can_shrink() {
            match self.judge(guest, located, know, hooked) {
                Ok(judgements) => self.settle(guest, arena, judgements, &mut collected),
                Err(error) => collected.undecided = Some(with_causes(&error)),
            }
        }
        collected.retired = self.report();
        collected
    }

    fn settle(
        &mut self,
        guest: &mut dyn StoppedGuest,
        arena: &mut Arena,
        judgements: Vec<Judgement>,
        collected: &mut Collected,
    ) {
        let Collected { freed, cleared, .. } = collected;
        let found = judgements.into_iter().map(|judgement| {
            cleared.extend(judgement.cleared);
            judgement.holdouts
        });
        let tell = |entry: &mut Entry, holdouts: Vec<Holdout>| {
            entry.report.held_by = holdouts.iter().map(ToString::to_string).collect();
            entry.report.holdouts = holdouts;
        };
        let free = |entry: &mut Entry| {
            if entry.report.keep.is_some() {
                return false;
            }
            let done = free(guest, arena, &mut entry.report);
            match &done {
                Ok(()) => freed.push(entry.report.id),
                Err(error) => entry.report.stuck = Some(with_causes(error)),
            }
            done.is_ok()
        };
        self.all.settle(found, tell, free);
    }

    /// No task sleeps in any of it, nor in what it calls.
    fn nobody_sleeps(&self) -> bool {
        let mut pending = self.all.pending(u64::MAX);
        pending.all(|entry| entry.since.is_some())
    }

    fn judge(
        &mut self,
        guest: &dyn StoppedGuest,
        located: &Located,
        know: &Knowledge,
        hooked: &[GeneratedCode],
    ) -> Result<Vec<Judgement>, TaskError> {
        let look = Look {
            know,
            located,
            guest,
            trampolines: self.trampolines().chain(hooked.iter().cloned()).collect(),
        };
        let ranges: Vec<_> = self.all.iter().flat_map(Entry::ranges).collect();
        let nobody_sleeps = self.nobody_sleeps();
        let all = &mut self.all;
        let judged = look.at(ranges, nobody_sleeps, |judge| {
            let entries = all.iter_mut();
            entries.map(|entry| entry.judged(judge)).collect()
        })?;
        let clear = || self.all.iter().map(|_| Judgement::default()).collect();
        Ok(judged.unwrap_or_else(clear))
    }
}

impl Entry {
    /// Where a context must not be.
    fn ranges(&self) -> impl Iterator<Item = std::ops::Range<Gva>> + '_ {
        let all = std::iter::once(&self.report.code).chain(&self.report.callbacks);
        all.map(Slot::range)
    }

    fn judged(&mut self, judge: &Judge<'_, '_, '_>) -> Judgement {
        let mut all = Judgement::default();
        for range in self.ranges().collect::<Vec<_>>() {
            let one = judge.judge(&range, self.since.as_mut());
            all.holdouts.extend(one.holdouts);
            all.cleared.extend(one.cleared);
        }
        all
    }
}

fn free(
    guest: &mut dyn StoppedGuest,
    arena: &mut Arena,
    report: &mut Retired,
) -> Result<(), ArenaError> {
    for slots in [&mut report.data, &mut report.callbacks] {
        while let Some(slot) = slots.last() {
            arena.free(guest, *slot)?;
            slots.pop();
        }
    }
    arena.free(guest, report.code)
}
