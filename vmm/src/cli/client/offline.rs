//! What a memory dump says, in the words in which a running guest's commands say it.

use patcher::Kernel;
use patcher::compare::compare;
use patcher::error::with_causes;
use patcher::guest::{MemoryImage, StoppedGuest};
use patcher::space::{LayoutError, Located, Space};
use patcher::stack::{StackLayout, StacksRequest, Unwinder, unwind, vcpus};
use patcher::symbols::ModulesLayout;
use patcher::tasks::{SurveyLayout, TaskLayout, survey, tasks_to_show};
use serde_json::{Value, json};

use crate::cli::args::Part;

/// A dump whose kernel was found.
pub(super) struct Offline<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) image: &'a MemoryImage,
    pub(super) located: &'a Located,
    /// Only tasks of this process, or this thread.
    pub(super) pid: Option<u32>,
}

/// The text of any error.
fn text(error: impl std::error::Error) -> String {
    with_causes(&error)
}

impl Offline<'_> {
    /// A part of what there is to say: its name in the answer, and what is said.
    pub(super) fn part(&self, part: Part) -> Result<(&'static str, Value), String> {
        let space = self.located.space(self.image);
        Ok(match part {
            Part::Cpus => ("cpus", self.cpus(&space)?),
            Part::Tasks => ("tasks", self.tasks(&space)?),
            Part::Modules => ("modules", self.modules(&space)?),
            Part::Stacks => ("stacks", self.stacks(&space)?),
            Part::Text => {
                let compared = compare(self.kernel, &space, self.located, &[]);
                ("text", json!(compared.map_err(text)?))
            }
        })
    }

    fn tasks(&self, space: &Space<'_>) -> Result<Value, String> {
        let layout = TaskLayout::of(self.kernel).map_err(text)?;
        let more = SurveyLayout::of(self.kernel).map_err(text)?;
        let vcpus = self.image.vcpus();
        let told = survey(space, self.located, &layout, &more, vcpus).map_err(text)?;
        let wanted = |pid, tgid| {
            self.pid
                .is_none_or(|wanted| wanted == pid || wanted == tgid)
        };
        let tasks = told.tasks.iter();
        let tasks: Vec<_> = tasks.filter(|task| wanted(task.pid, task.tgid)).collect();
        Ok(json!({
            "tasks": tasks,
            "more": 0,
            "counts": told.counts,
            "disagreements": told.disagreements,
        }))
    }

    fn modules(&self, space: &Space<'_>) -> Result<Value, String> {
        let layout = ModulesLayout::of(self.kernel).map_err(text)?;
        let modules = layout.map(|layout| layout.modules(space, self.located));
        let modules = modules.transpose().map_err(text)?.unwrap_or_default();
        let row = |module| {
            let mut row = json!(module);
            row["size"] = patcher::symbols::Module::size(module).into();
            row
        };
        Ok(modules.iter().map(row).collect())
    }

    /// Unwinds with all that is known of code; where modules cannot be told, theirs is not.
    fn unwinding<R>(
        &self,
        space: &Space<'_>,
        work: impl FnOnce(&Unwinder<'_, '_>, &TaskLayout, &StackLayout) -> R,
    ) -> Result<R, LayoutError> {
        let tasks = TaskLayout::of(self.kernel)?;
        let stacks = StackLayout::of(self.kernel)?;
        let layout = ModulesLayout::of(self.kernel)?;
        let modules = layout
            .as_ref()
            .and_then(|layout| layout.modules(space, self.located).ok());
        let vcpus = self.image.vcpus();
        let unwinder = Unwinder::new(self.kernel, &stacks, &tasks, space, self.located, vcpus)
            .with_modules(layout.as_ref(), modules.unwrap_or_default());
        Ok(work(&unwinder, &tasks, &stacks))
    }

    fn stacks(&self, space: &Space<'_>) -> Result<Value, String> {
        let request = StacksRequest {
            pid: self.pid,
            ..StacksRequest::default()
        };
        let slide = self.located.slide;
        let told = self.unwinding(space, |unwinder, layout, stacks| {
            let tasks = tasks_to_show(space, self.located, layout)?;
            Ok(unwind(unwinder, slide, tasks, &request).named(self.kernel, stacks))
        });
        let told: Result<_, patcher::tasks::TaskError> = told.map_err(text)?;
        Ok(json!(told.map_err(text)?))
    }

    /// As `query-vcpus` tells it, without the threads of the host.
    fn cpus(&self, space: &Space<'_>) -> Result<Value, String> {
        let slide = self.located.slide;
        let told = self.unwinding(space, |unwinder, layout, stacks| {
            vcpus(unwinder, space, layout, slide, self.kernel, stacks)
        });
        let row = |vcpu: patcher::stack::VcpuReport| {
            let mut row = json!(vcpu);
            row["cpu-index"] = vcpu.index.into();
            row
        };
        Ok(told.map_err(text)?.into_iter().map(row).collect())
    }
}
