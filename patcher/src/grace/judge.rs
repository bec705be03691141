//! Who still holds a resource up, and by what evidence the others do not.

use std::ops::Range;

use super::evidence::{Evidence, Switches, Witness, evidence};
use crate::guest::Gva;
use crate::rules::{self, Rule};
use crate::stack::{OnVcpu, Reliability, Trace, Unwinder};
use crate::tasks::{Context, Found, Hit, Scanned, Task, TaskAddr};

/// A context that an address was found in, and that is clear.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Clearance {
    /// Whose.
    pub context: Context,
    /// Why it is clear.
    pub evidence: Evidence,
}

/// A context that may come back to a resource.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Holdout {
    /// Whose.
    pub context: Context,
    /// What was found, for people.
    pub found: String,
    /// Address in the resource that it has.
    pub address: Gva,
    /// What evidence is missing.
    pub missing: String,
}

impl std::fmt::Display for Holdout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}; {}", self.found, self.missing)
    }
}

/// What is said about one resource at one stop.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Judgement {
    /// Who holds it up. Nobody: it may be freed.
    pub holdouts: Vec<Holdout>,
    /// Who has a stale address in it.
    pub cleared: Vec<Clearance>,
}

/// What is known at one stop.
pub struct Judge<'a, 'u, 'm> {
    scanned: &'a Scanned,
    tasks: &'a [Task],
    /// `None` where the kernel has no usable unwind tables.
    unwinder: Option<&'a Unwinder<'u, 'm>>,
    /// Voluntary switches of a task so far; `None` where they cannot be read, or where they prove
    /// nothing.
    switches: &'a dyn Fn(TaskAddr) -> Option<u64>,
}

impl<'a, 'u, 'm> Judge<'a, 'u, 'm> {
    /// A judge with all there is to know.
    pub fn new(
        scanned: &'a Scanned,
        tasks: &'a [Task],
        unwinder: Option<&'a Unwinder<'u, 'm>>,
        switches: &'a dyn Fn(TaskAddr) -> Option<u64>,
    ) -> Self {
        Self {
            scanned,
            tasks,
            unwinder,
            switches,
        }
    }

    /// Who may come back to `range`. `since` is what earlier stops saw, and what this one adds;
    /// `None` for a resource in which a context may sleep, or which calls.
    #[must_use]
    pub fn judge(&self, range: &Range<Gva>, mut since: Option<&mut Switches>) -> Judgement {
        let mut judgement = Judgement::default();
        for hit in self.scanned.about(range) {
            // A context is told once, however many stale words it has.
            let told = |context: &Context| *context == hit.context;
            if judgement
                .holdouts
                .iter()
                .any(|holdout| told(&holdout.context))
                || judgement.cleared.iter().any(|clear| told(&clear.context))
            {
                continue;
            }
            match self.clear(hit, range, since.as_deref_mut()) {
                Ok(evidence) => judgement.cleared.push(Clearance {
                    context: hit.context.clone(),
                    evidence,
                }),
                Err(missing) => judgement.holdouts.push(Holdout {
                    context: hit.context.clone(),
                    found: hit.to_string(),
                    address: hit.address,
                    missing,
                }),
            }
        }
        if self.scanned.more {
            judgement.holdouts.push(Holdout {
                context: Context::Unknown,
                found: "more contexts than were told".into(),
                address: range.start,
                missing: "too many contexts have addresses of retired code".into(),
            });
        }
        judgement
    }

    fn clear(
        &self,
        hit: &Hit,
        range: &Range<Gva>,
        since: Option<&mut Switches>,
    ) -> Result<Evidence, String> {
        match hit.found {
            Found::NestedGuest => return Err("its vCPU runs a nested guest".into()),
            Found::UnknownStack(_) => return Err("it is not known what it would return to".into()),
            Found::Register(_) | Found::Stack(_) | Found::ShadowReturn(_) => {}
        }
        match &hit.context {
            Context::Unknown => Err("it is not known which it is".into()),
            Context::Task { task, .. } => {
                let task = self.find(*task)?;
                self.task(task, range, since)
            }
            Context::Vcpu { index } => {
                let on = self.on(|on| on.vcpu.index == *index)?;
                self.vcpu(on, range)
            }
            Context::Cpu { cpu, .. } => {
                let on = self.on(|on| on.cpu == Some(*cpu))?;
                if on.vcpu.cpl() == 3 && !on.vcpu.nested {
                    return Ok(Evidence::UserMode);
                }
                self.vcpu(on, range)
            }
        }
    }

    fn task(
        &self,
        task: &Task,
        range: &Range<Gva>,
        since: Option<&mut Switches>,
    ) -> Result<Evidence, String> {
        let witness = TaskInRange {
            judge: self,
            task,
            range,
        };
        evidence(task.address, &witness, since)
    }

    fn vcpu(&self, on: &OnVcpu, range: &Range<Gva>) -> Result<Evidence, String> {
        let unwinder = self.unwinder.ok_or(NO_UNWINDER)?;
        let current = on.current.ok_or("its current task is not known")?;
        clear_by(&unwinder.task(self.find(current)?), range).map(|()| Evidence::UnwindClear)
    }

    fn find(&self, address: TaskAddr) -> Result<&'a Task, String> {
        let mut tasks = self.tasks.iter();
        let found = tasks.find(|task| task.address == address);
        found.ok_or_else(|| "its task is on no list".into())
    }

    fn on(&self, wanted: impl Fn(&OnVcpu) -> bool) -> Result<&'a OnVcpu, String> {
        let unwinder = self.unwinder.ok_or(NO_UNWINDER)?;
        let found = unwinder.vcpus().iter().find(|on| wanted(on));
        found.ok_or_else(|| "no vCPU is known to be that CPU".into())
    }
}

/// A task that has an address in a range.
struct TaskInRange<'a, 'j, 'u, 'm> {
    judge: &'a Judge<'j, 'u, 'm>,
    task: &'a Task,
    range: &'a Range<Gva>,
}

impl Witness for TaskInRange<'_, '_, '_, '_> {
    type Doubt = String;

    fn is_in_user_mode(&self) -> bool {
        let unwinder = self.judge.unwinder;
        let on = unwinder.and_then(|unwinder| unwinder.vcpu_of(self.task));
        on.is_some_and(|on| {
            on.vcpu.cpl() == 3 && !on.vcpu.nested && on.current == Some(self.task.address)
        })
    }

    fn switches(&self) -> Option<u64> {
        (self.judge.switches)(self.task.address)
    }

    fn unwind(&self) -> Result<(), String> {
        let unwinder = self.judge.unwinder.ok_or(NO_UNWINDER)?;
        clear_by(&unwinder.task(self.task), self.range)
    }
}

const NO_UNWINDER: &str = "this kernel's stacks cannot be unwound";

fn clear_by(trace: &Trace, range: &Range<Gva>) -> Result<(), String> {
    let inside = trace
        .frames
        .iter()
        .position(|frame| range.contains(&frame.address));
    match (inside, &trace.reliability) {
        (Some(0), _) => Err("it is there now".into()),
        (Some(frame), _) if rules::holds(Rule::ReturnAddresses) => {
            Err(format!("it returns there from {frame} frames above"))
        }
        (None, Reliability::Reliable(_)) | (Some(_), _) => Ok(()),
        (None, Reliability::Unreliable(doubt)) => {
            Err(format!("its stack cannot be followed: {}", doubt.why))
        }
    }
}
