//! Changes in steps: what one step changes is in force for everybody before the next begins.
//!
//! A step is any number of changes of bytes and redirects of functions, made or taken back in one stop,
//! all or none. Whoever is in one of the changed functions then, in any part of it or on the way back to
//! it, may have run some of the old bytes and go on to others that a later step changes; and whoever is
//! in new code when its redirect is taken back goes on in that. So what comes next waits until each of
//! those has left, once; calls that begin after the stop are nobody's concern.
//!
//! Every vCPU is serialised on its way out of the stop, as after any other change.

use std::ops::Range;

use super::look::Look;
use super::redirect::PreparedRedirect;
use super::report::{Applied, Collected, Origin};
use super::text_patch::PreparedText;
use super::writing::{Seen, may_go};
use super::{EntryId, PatchError, Patcher};
use crate::grace::Holdout;
use crate::guest::{Gva, StoppedGuest};
use crate::rules::{self, Rule};
use crate::space::Located;
use crate::tasks::Context;

/// A change that can be part of a step.
#[derive(Clone, Debug)]
pub enum PreparedChange {
    /// Of bytes.
    Text(PreparedText),
    /// Of where the callers of a function go.
    Redirect(PreparedRedirect),
}

/// What a step changed, and who has to leave that.
#[derive(Clone, Debug)]
pub struct Step {
    /// The changes that were made, or were taken back.
    pub changes: Vec<Applied>,
    /// Who has to leave.
    pub passage: Passage,
    /// What became of retired code.
    pub collected: Collected,
}

/// Everybody who was in changed functions at one moment, until he has left.
#[derive(Clone, Debug, Default)]
pub struct Passage {
    ranges: Vec<Range<Gva>>,
    /// Who has not left, as far as is known.
    inside: Vec<Holdout>,
}

impl Passage {
    /// Who has not been seen outside yet.
    #[must_use]
    pub fn inside(&self) -> &[Holdout] {
        &self.inside
    }

    fn still(&mut self, found: Vec<Holdout>) {
        let was_inside = |found: &Holdout| {
            let mut before = self.inside.iter();
            before.any(|holdout| holdout.context == found.context)
        };
        // Of those that nobody can tell, any may be one of them.
        let still = |found: &Holdout| found.context == Context::Unknown || was_inside(found);
        self.inside = found.into_iter().filter(still).collect();
    }
}

impl Patcher {
    /// Makes all changes of a step in the stopped guest, or none.
    ///
    /// # Errors
    /// [`PatchError`] of the first that cannot be made; where [`PatchError::passes`], let the guest run
    /// on and try again.
    pub fn commit_step(
        &mut self,
        guest: &mut dyn StoppedGuest,
        prepared: &[PreparedChange],
        origin: &Origin,
    ) -> Result<Step, PatchError> {
        let mut changes: Vec<Applied> = Vec::with_capacity(prepared.len());
        for change in prepared {
            let made = match change {
                PreparedChange::Text(text) => self.commit_text(guest, text, origin),
                PreparedChange::Redirect(redirect) => self.commit_redirect(guest, redirect, origin),
            };
            match made {
                Ok(change) => changes.push(change),
                Err(error) => return Err(self.unseen(guest, &changes, origin, error)),
            }
        }
        match self.passage(guest, &changes) {
            Ok(passage) => {
                self.in_steps.extend(changes.iter().map(|change| change.id));
                Ok(Step {
                    changes,
                    passage,
                    collected: Collected::default(),
                })
            }
            Err(error) => Err(self.unseen(guest, &changes, origin, error)),
        }
    }

    /// Takes changes back that were made in this stop: the guest has not run, and seen none of them.
    fn unseen(
        &mut self,
        guest: &mut dyn StoppedGuest,
        changes: &[Applied],
        origin: &Origin,
        why: PatchError,
    ) -> PatchError {
        let mut last_first = changes.iter().rev().map(|change| change.id);
        let undone = self.identify(guest).and_then(|found| {
            last_first.try_for_each(|id| {
                let gone = self.unhook(guest, &found, (id, Seen::Never), id, origin);
                gone.map(drop)
            })
        });
        undone.err().unwrap_or(why)
    }

    /// Who takes back a part of a step breaks the order that the steps are for.
    pub(super) fn is_no_part_of_steps(&self, id: EntryId) -> Result<(), PatchError> {
        match self.in_steps.contains(&id) && self.ledger.get(id).is_some() {
            false => Ok(()),
            true => Err(PatchError::Request(format!(
                "change {id} is part of ordered steps: take those back (steps-revert; query-steps lists \
                 them)"
            ))),
        }
    }

    /// Takes back all changes of a step, or none.
    ///
    /// # Errors
    /// As [`Patcher::commit_step`].
    pub fn revert_step(
        &mut self,
        guest: &mut dyn StoppedGuest,
        changes: &[EntryId],
        origin: &Origin,
    ) -> Result<Step, PatchError> {
        let found = self.identify(guest)?;
        let check = self.check(&found, guest);
        check.idle()?;
        // One that is gone with its module needs nothing any more.
        let there = changes.iter().filter_map(|id| self.ledger.get(*id));
        let entries: Vec<_> = there.cloned().collect();
        for entry in &entries {
            may_go(&check, entry)?;
        }
        // Who is inside is no other before and after, and may not be known.
        let passage = self.passage(guest, &entries)?;
        let mut taken = Vec::with_capacity(entries.len());
        for Applied { id, .. } in entries.into_iter().rev() {
            let (entry, _) = self.unhook(guest, &found, (id, Seen::Perhaps), id, origin)?;
            taken.push(entry);
            self.in_steps.remove(&id);
        }
        Ok(Step {
            changes: taken,
            passage,
            collected: self.collect_in(guest, &found),
        })
    }

    /// Looks who has left since the step was made.
    ///
    /// # Errors
    /// [`PatchError::NotLeft`] names who has not: let the guest run on and try again.
    pub fn has_passed(
        &mut self,
        guest: &mut dyn StoppedGuest,
        passage: &mut Passage,
    ) -> Result<(), PatchError> {
        if !passage.inside.is_empty() {
            let found = self.identify(guest)?;
            let inside = self.inside(guest, &found, &passage.ranges)?;
            passage.still(inside);
        }
        match passage.inside.is_empty() {
            true => Ok(()),
            false => Err(PatchError::NotLeft {
                holdouts: passage.inside.clone(),
            }),
        }
    }

    fn passage(
        &mut self,
        guest: &mut dyn StoppedGuest,
        changes: &[Applied],
    ) -> Result<Passage, PatchError> {
        let found = self.identify(guest)?;
        let ranges = self.ranges(guest, &found, changes);
        let inside = self.inside(guest, &found, &ranges)?;
        Ok(Passage { ranges, inside })
    }

    /// The functions that were changed, and code of ours that goes on there by itself.
    fn ranges(
        &self,
        guest: &dyn StoppedGuest,
        found: &Located,
        changes: &[Applied],
    ) -> Vec<Range<Gva>> {
        let mut all = Vec::new();
        let check = self.check(found, guest);
        for change in changes {
            let bytes = change.address..change.address.offset(change.after.0.len() as u64);
            let function = check.function_around(change.address);
            let parts = function.map(|function| self.know.parts(&function, found.slide));
            let parts = parts.iter().flatten();
            all.extend(parts.map(|part| part.start..part.end()));
            all.extend(change.code.as_ref().map(|placed| placed.code.range()));
            let covers = |range: &Range<Gva>| range.start <= bytes.start && bytes.end <= range.end;
            if !all.iter().any(covers) {
                all.push(bytes);
            }
        }
        // Several changes of a function are one place to be in.
        all.sort_by_key(|range| (range.start, range.end));
        all.dedup();
        let leads_there = |goes_on: &[Gva]| {
            let mut addresses = goes_on.iter();
            addresses.any(|at| all.iter().any(|range| range.contains(at)))
        };
        let generated: Vec<_> = check
            .generated()
            .filter(|(_, goes_on)| leads_there(goes_on))
            .map(|(code, _)| code)
            .collect();
        all.extend(generated);
        all
    }

    fn inside(
        &self,
        guest: &dyn StoppedGuest,
        found: &Located,
        ranges: &[Range<Gva>],
    ) -> Result<Vec<Holdout>, PatchError> {
        if !rules::holds(Rule::Steps) {
            return Ok(Vec::new());
        }
        let hooked = self.hooked_trampolines();
        let look = Look {
            know: &self.know,
            located: found,
            guest,
            trampolines: self.retired.trampolines().chain(hooked).collect(),
        };
        let inside = look.at(ranges.iter().cloned(), false, |judge| {
            let found = ranges.iter().map(|range| judge.judge(range, None));
            let mut inside: Vec<Holdout> = found.flat_map(|one| one.holdouts).collect();
            inside.dedup_by(|a, b| a.context == b.context);
            inside
        })?;
        Ok(inside.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::TaskAddr;

    fn holdout(pid: u32) -> Holdout {
        Holdout {
            context: Context::Task {
                task: TaskAddr(Gva(u64::from(pid) << 12)),
                pid,
                comm: "cat".into(),
            },
            found: String::new(),
            address: Gva(1),
            missing: String::new(),
        }
    }

    #[test]
    fn who_has_left_once_may_come_again() {
        let mut passage = Passage {
            ranges: Vec::new(),
            inside: vec![holdout(1), holdout(2)],
        };
        // 3 came later, and runs the new bytes.
        passage.still(vec![holdout(2), holdout(3)]);
        assert_eq!(passage.inside(), [holdout(2)]);
        passage.still(vec![holdout(1), holdout(3)]);
        assert!(passage.inside().is_empty());
    }
}
