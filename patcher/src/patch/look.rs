//! One look at all contexts of a stopped guest, for whoever has to know who may come back to code.

use std::ops::Range;

use super::knowledge::Knowledge;
use super::stacks::unwinder;
use crate::grace::Judge;
use crate::guest::{Gva, StoppedGuest};
use crate::rules::{self, Rule};
use crate::space::Located;
use crate::stack::GeneratedCode;
use crate::tasks::{Context, Hit, Task, TaskAddr, TaskError, Windows, awake, scan_of, tasks};

/// What a look needs.
pub(super) struct Look<'a> {
    pub(super) know: &'a Knowledge,
    pub(super) located: &'a Located,
    pub(super) guest: &'a dyn StoppedGuest,
    /// Trampolines that stacks can be followed through.
    pub(super) trampolines: Vec<GeneratedCode>,
}

impl Look<'_> {
    /// Has `judge` say what it wants to know about `ranges`. `None`: nobody has an address in any of
    /// them. Where `nobody_sleeps` in them, nor in what they call, the stacks of sleepers are not
    /// read: whoever sleeps has gone to sleep by its own will.
    pub(super) fn at<R>(
        self,
        ranges: impl IntoIterator<Item = Range<Gva>>,
        nobody_sleeps: bool,
        judge: impl FnOnce(&Judge<'_, '_, '_>) -> R,
    ) -> Result<Option<R>, TaskError> {
        let Self {
            know,
            located,
            guest,
            trampolines,
        } = self;
        let windows = Windows::new(ranges);
        let memory = &guest;
        let space = located.space(memory);
        let vcpus = guest.vcpus();
        let nobody_sleeps = know.switches.is_some() && nobody_sleeps;
        let find = if nobody_sleeps { awake } else { tasks };
        let looked_at = find(&space, located, &know.tasks)?;
        let mut scanned = scan_of(&space, located, &know.tasks, vcpus, &windows, &looked_at)?;
        scanned.hits.retain(|hit| counts(hit, &looked_at));
        if scanned.is_clear() || !rules::holds(Rule::GracePeriod) {
            return Ok(None);
        }
        let tasks = if nobody_sleeps {
            tasks(&space, located, &know.tasks)?
        } else {
            looked_at
        };
        let layout = know.stack.as_ref().ok();
        let unwinder = layout
            .map(|layout| unwinder(know, guest, &space, located, layout))
            .map(|unwinder| unwinder.with_generated(trampolines));
        let switches = |task: TaskAddr| {
            let field = know.switches.as_ref()?;
            space
                .read_sized(task.0.offset(field.offset), field.size)
                .ok()
        };
        Ok(Some(judge(&Judge::new(
            &scanned,
            &tasks,
            unwinder.as_ref(),
            &switches,
        ))))
    }
}

/// Whether a context that has an address counts: every one does.
fn counts(hit: &Hit, tasks: &[Task]) -> bool {
    let (idle, running) = match &hit.context {
        Context::Task { task, pid, .. } => {
            let found = tasks.iter().find(|known| known.address == *task);
            (*pid == 0, found.is_some_and(|task| task.on_cpu))
        }
        Context::Vcpu { .. } | Context::Cpu { .. } => (false, true),
        Context::Unknown => (false, false),
    };
    (!idle || rules::holds(Rule::IdleTasks)) && (!running || rules::holds(Rule::RunningTasks))
}
