//! The plans of changes in steps that somebody works on, or that are in the guest.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use patcher::grace::Holdout;
use patcher::patch::EntryId;
use serde::Serialize;

/// How far a step is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum StepState {
    /// Nothing was done.
    Waiting,
    /// It was made; somebody may still be in what it changed.
    Applied,
    /// Everybody has left what it changed.
    Passed,
    /// It was made, and taken back.
    TakenBack,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct StepInfo {
    name: String,
    state: StepState,
    changes: Vec<EntryId>,
    /// Who has not left.
    holdouts: Vec<Holdout>,
}

/// A plan.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Plan {
    id: u64,
    who: String,
    /// Somebody works on it.
    underway: bool,
    cancelled: bool,
    steps: Vec<StepInfo>,
    #[serde(skip)]
    incarnation: u64,
}

/// Why a plan cannot be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum NoPlan {
    #[error("there are no steps {id} in the guest; query-steps lists them")]
    Unknown { id: u64 },
    #[error("steps {id} are being made or taken back: cancel them, or wait")]
    Busy { id: u64 },
    #[error(
        "steps {id} are made, and cannot be cancelled any more: take them back with steps-revert"
    )]
    Done { id: u64 },
}

#[derive(Debug, Default)]
struct State {
    last: u64,
    all: BTreeMap<u64, Plan>,
}

/// All plans.
#[derive(Clone, Debug, Default)]
pub(super) struct Plans(Arc<Mutex<State>>);

impl Plans {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of a guest that was reset are gone with it.
    fn of(&self, incarnation: u64) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state
            .all
            .retain(|_, plan| plan.underway || plan.incarnation == incarnation);
        state
    }

    /// A new one, that somebody works on.
    pub(super) fn begin(
        &self,
        incarnation: u64,
        who: &str,
        names: impl Iterator<Item = String>,
    ) -> u64 {
        let mut state = self.lock();
        state.last += 1;
        let id = state.last;
        let steps = names.map(|name| StepInfo {
            name,
            state: StepState::Waiting,
            changes: Vec::new(),
            holdouts: Vec::new(),
        });
        let plan = Plan {
            id,
            who: who.to_owned(),
            underway: true,
            cancelled: false,
            steps: steps.collect(),
            incarnation,
        };
        state.all.insert(id, plan);
        id
    }

    /// For somebody who works on it from now on.
    pub(super) fn claim(&self, incarnation: u64, id: u64) -> Result<(), NoPlan> {
        let mut state = self.of(incarnation);
        match state.all.get_mut(&id) {
            None => Err(NoPlan::Unknown { id }),
            Some(plan) if plan.underway => Err(NoPlan::Busy { id }),
            Some(plan) => {
                plan.underway = true;
                Ok(())
            }
        }
    }

    /// Nobody works on it any more. One of which nothing is in the guest is gone.
    pub(super) fn settled(&self, id: u64) {
        let mut state = self.lock();
        if let Some(plan) = state.all.get_mut(&id) {
            plan.underway = false;
            if !plan.steps.iter().any(StepInfo::is_made) {
                state.all.remove(&id);
            }
        }
    }

    pub(super) fn cancel(&self, incarnation: u64, id: u64) -> Result<(), NoPlan> {
        let mut state = self.of(incarnation);
        match state.all.get_mut(&id) {
            None => Err(NoPlan::Unknown { id }),
            Some(plan) if !plan.underway => Err(NoPlan::Done { id }),
            Some(plan) => {
                plan.cancelled = true;
                Ok(())
            }
        }
    }

    pub(super) fn is_cancelled(&self, id: u64) -> bool {
        self.lock().all.get(&id).is_some_and(|plan| plan.cancelled)
    }

    pub(super) fn get(&self, id: u64) -> Result<Plan, NoPlan> {
        let state = self.lock();
        state.all.get(&id).cloned().ok_or(NoPlan::Unknown { id })
    }

    pub(super) fn list(&self, incarnation: u64) -> Vec<Plan> {
        self.of(incarnation).all.values().cloned().collect()
    }

    /// The steps that are made, and their changes, in order.
    pub(super) fn made(&self, id: u64) -> Vec<(usize, Vec<EntryId>)> {
        let state = self.lock();
        let steps = state.all.get(&id).map_or(&[][..], |plan| &plan.steps);
        let made = steps.iter().enumerate().filter(|(_, step)| step.is_made());
        made.map(|(index, step)| (index, step.changes.clone()))
            .collect()
    }

    pub(super) fn set(&self, id: u64, index: usize, to: StepState, changes: Vec<EntryId>) {
        self.with(id, index, |step| {
            step.state = to;
            step.changes = changes;
        });
    }

    /// Who has not left what a step changed.
    pub(super) fn tell(&self, id: u64, index: usize, holdouts: &[Holdout]) {
        self.with(id, index, |step| step.holdouts = holdouts.to_vec());
    }

    fn with(&self, id: u64, index: usize, change: impl FnOnce(&mut StepInfo)) {
        let mut state = self.lock();
        let plan = state.all.get_mut(&id);
        if let Some(step) = plan.and_then(|plan| plan.steps.get_mut(index)) {
            change(step);
        }
    }
}

impl StepInfo {
    fn is_made(&self) -> bool {
        matches!(self.state, StepState::Applied | StepState::Passed)
    }
}
