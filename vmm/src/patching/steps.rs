//! `steps-apply`, `steps-revert`, `steps-cancel` and `query-steps`: changes that have to come one after
//! the other, each in force for everybody before the next.
//!
//! Either all steps are made or none: where one cannot be made in time, or somebody cancels, what was
//! made is taken back, the last first, again with everybody out of one before the one before it, also
//! when the client has gone. What cannot be taken back in time either stays, and is listed.

mod plans;

use std::time::{Duration, Instant};

use patcher::guest::StoppedGuest;
use patcher::patch::{EntryId, PatchError, Patcher, PreparedChange, Step};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::commands::{TextPatch, TextRedirect, invalid, origin, redirect_request, text_request};
use super::session::{Patching, WithStop};
use crate::control::command::{Context, DeadlineArgument, NoArguments, Registry};
use crate::control::protocol::{QmpError, Reason};
use plans::{Plan, Plans, StepState};

/// Changes that one request may have, in all its steps.
const MAX_CHANGES: usize = 1000;

/// Bytes that the name of a step may have.
const MAX_NAME: usize = 256;

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct Apply {
    steps: Vec<NamedStep>,
    #[serde(default)]
    deadline: DeadlineArgument,
}

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct NamedStep {
    name: String,
    /// Changes of bytes, as `text-patch` takes them.
    #[serde(default)]
    text: Vec<TextPatch>,
    /// Functions to send elsewhere, as `text-redirect` takes them.
    #[serde(default)]
    redirect: Vec<TextRedirect>,
}

impl NamedStep {
    fn changes(&self) -> usize {
        self.text.len() + self.redirect.len()
    }
}

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct Revert {
    id: u64,
    #[serde(default)]
    deadline: DeadlineArgument,
}

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct Cancel {
    id: u64,
}

#[derive(Serialize)]
struct All {
    steps: Vec<Plan>,
}

/// Somebody who works on a plan.
struct Work<'a> {
    patching: &'a Patching,
    context: &'a Context,
    plans: &'a Plans,
    command: &'static str,
    id: u64,
}

/// Adds the commands.
pub(super) fn register(registry: &mut Registry, patching: &Patching) {
    let plans = Plans::default();
    let (p, all) = (patching.clone(), plans.clone());
    registry.slow("steps-apply", move |context, arguments: Apply| {
        let within = arguments.deadline.or_usual();
        let steps = prepared(&p, arguments.steps)?;
        let names = steps.iter().map(|(name, _)| name.clone());
        let id = all.begin(p.incarnation(), &context.peer.to_string(), names);
        let work = Work {
            patching: &p,
            context,
            plans: &all,
            command: "steps-apply",
            id,
        };
        work.apply(&steps, within)
    });
    let (p, all) = (patching.clone(), plans.clone());
    registry.slow("steps-revert", move |context, arguments: Revert| {
        let id = arguments.id;
        all.claim(p.incarnation(), id)?;
        let work = Work {
            patching: &p,
            context,
            plans: &all,
            command: "steps-revert",
            id,
        };
        let taken = work.take_back(arguments.deadline.or_usual());
        all.settled(id);
        taken.map(|()| json!({"id": id}))
    });
    let (p, all) = (patching.clone(), plans.clone());
    registry.slow("steps-cancel", move |_, arguments: Cancel| {
        all.cancel(p.incarnation(), arguments.id)?;
        Ok(json!({"id": arguments.id}))
    });
    let p = patching.clone();
    registry.slow("query-steps", move |_, _: NoArguments| {
        let steps = plans.list(p.incarnation());
        Ok(All { steps })
    });
}

/// Checks what can be checked without the guest.
fn prepared(
    patching: &Patching,
    steps: Vec<NamedStep>,
) -> Result<Vec<(String, Vec<PreparedChange>)>, QmpError> {
    let changes: usize = steps.iter().map(NamedStep::changes).sum();
    if steps.iter().any(|step| step.changes() == 0) || changes == 0 {
        return Err(invalid("steps", "give at least one, each with a change"));
    }
    if let Some(step) = steps.iter().find(|step| step.name.len() > MAX_NAME) {
        let text = format!("a name of {} bytes; {MAX_NAME} are kept", step.name.len());
        return Err(invalid("steps", text));
    }
    if changes > MAX_CHANGES {
        let text = format!("{changes} changes; {MAX_CHANGES} can be made in steps");
        return Err(invalid("steps", text));
    }
    let step = |step: NamedStep| {
        let mut changes = Vec::with_capacity(step.changes());
        for text in step.text {
            let request = text_request(text)?;
            let prepared = patching.with(|patcher| patcher.prepare_text(request))?;
            changes.push(PreparedChange::Text(prepared));
        }
        for redirect in step.redirect {
            let request = redirect_request(redirect)?;
            let prepared = patching.with(|patcher| patcher.prepare_redirect(request))?;
            changes.push(PreparedChange::Redirect(prepared));
        }
        Ok((step.name, changes))
    };
    let prepared: Vec<_> = steps
        .into_iter()
        .map(step)
        .collect::<Result<_, QmpError>>()?;
    let mut all = prepared.iter().flat_map(|(_, changes)| changes);
    if all.any(|change| matches!(change, PreparedChange::Redirect(_))) {
        patching.get_arena_ready();
    }
    Ok(prepared)
}

impl Work<'_> {
    fn apply(
        &self,
        steps: &[(String, Vec<PreparedChange>)],
        within: Duration,
    ) -> Result<WithStop<Plan>, QmpError> {
        let until = Instant::now() + within;
        let mut stops = None;
        for (index, (_, changes)) in steps.iter().enumerate() {
            let last = index + 1 == steps.len();
            let made = self.one(index, changes, until, last);
            let made = made.map_err(|error| {
                let taken = self.take_back(within);
                self.plans.settled(self.id);
                match taken {
                    Ok(()) => error.and("; no step is in force"),
                    Err(why) => error.and(&format!("; {why}")),
                }
            })?;
            stops = Some(match stops {
                None => made,
                Some(before) => WithStop::then(before, made),
            });
        }
        self.plans.settled(self.id);
        let plan = self.plans.get(self.id)?;
        let stops = stops.ok_or_else(|| invalid("steps", "there are none"))?;
        Ok(stops.map(|_| plan))
    }

    /// Makes one step, and waits until everybody has left what it changed. Nothing comes after the
    /// last, so that need not be seen.
    fn one(
        &self,
        index: usize,
        changes: &[PreparedChange],
        until: Instant,
        last: bool,
    ) -> Result<WithStop<()>, QmpError> {
        let origin = origin(self.context);
        let made =
            self.patching
                .stopped(self.context, self.command, left(until), |patcher, guest| {
                    self.is_wanted()?;
                    patcher.commit_step(guest, changes, &origin)
                })?;
        self.is(index, StepState::Applied, made.answer());
        let passed = self.pass(index, made.answer(), until, StepState::Passed);
        match passed {
            Ok(None) => Ok(made.map(|_| ())),
            Ok(Some(looked)) => Ok(made.then(looked)),
            Err(_) if last && self.is_wanted().is_ok() => Ok(made.map(|_| ())),
            Err(error) => Err(error),
        }
    }

    /// Waits until everybody has left; no further stop is needed when nobody was there.
    fn pass(
        &self,
        index: usize,
        step: &Step,
        until: Instant,
        then: StepState,
    ) -> Result<Option<WithStop<()>>, QmpError> {
        let mut passage = step.passage.clone();
        let looked = match passage.inside() {
            [] => None,
            _ => {
                let look = |patcher: &mut Patcher, guest: &mut dyn StoppedGuest| {
                    if then == StepState::Passed {
                        self.is_wanted()?;
                    }
                    let passed = patcher.has_passed(guest, &mut passage);
                    self.plans.tell(self.id, index, passage.inside());
                    passed
                };
                let (p, context, command) = (self.patching, self.context, self.command);
                Some(match then {
                    StepState::TakenBack => {
                        p.stopped_at_last(context, command, left(until), look)?
                    }
                    _ => p.stopped(context, command, left(until), look)?,
                })
            }
        };
        self.is(index, then, step);
        Ok(looked)
    }

    /// Takes back what was made, the last first.
    fn take_back(&self, within: Duration) -> Result<(), QmpError> {
        let until = Instant::now() + within;
        let made = self.plans.made(self.id);
        for (nth, (index, changes)) in made.iter().enumerate().rev() {
            let taken = self.take_back_one(*index, changes, until, nth == 0);
            taken.map_err(|error| {
                let text = format!(
                    "what was made before step {index} is still in place: steps-revert {} takes it back",
                    self.id
                );
                error.and(&format!("; {text}"))
            })?;
        }
        Ok(())
    }

    fn take_back_one(
        &self,
        index: usize,
        changes: &[EntryId],
        until: Instant,
        first: bool,
    ) -> Result<(), QmpError> {
        let origin = origin(self.context);
        let taken = self.patching.stopped_at_last(
            self.context,
            self.command,
            left(until),
            |patcher, guest| patcher.revert_step(guest, changes, &origin),
        )?;
        self.patching.retired(&taken.answer().collected);
        self.is(index, StepState::TakenBack, taken.answer());
        match first {
            true => Ok(()),
            false => self
                .pass(index, taken.answer(), until, StepState::TakenBack)
                .map(drop),
        }
    }

    fn is_wanted(&self) -> Result<(), PatchError> {
        match self.plans.is_cancelled(self.id) {
            false => Ok(()),
            true => Err(PatchError::Request("it was cancelled".into())),
        }
    }

    fn is(&self, index: usize, state: StepState, step: &Step) {
        let changes = step.changes.iter().map(|change| change.id).collect();
        self.plans.set(self.id, index, state, changes);
        self.plans.tell(
            self.id,
            index,
            match state {
                StepState::Applied => step.passage.inside(),
                _ => &[],
            },
        );
        self.patching.tell(
            "STEP",
            json!({"id": self.id, "step": index, "state": state}),
        );
    }
}

/// There is always time for one try.
fn left(until: Instant) -> Duration {
    const LEAST: Duration = Duration::from_millis(500);
    until.saturating_duration_since(Instant::now()).max(LEAST)
}

impl From<plans::NoPlan> for QmpError {
    fn from(error: plans::NoPlan) -> Self {
        let reason = match error {
            plans::NoPlan::Unknown { .. } => Reason::NotFound,
            plans::NoPlan::Busy { .. } => Reason::Busy,
            plans::NoPlan::Done { .. } => Reason::Refused,
        };
        Self::new(reason, error.to_string())
    }
}
