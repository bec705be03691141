//! The stacks of the guest's tasks, and what its vCPUs are doing.

use std::sync::Arc;

use super::knowledge::Knowledge;
use super::report::PlacedCode;
use super::retire::Content;
use super::{PatchError, Patcher};
use crate::guest::StoppedGuest;
use crate::space::{Located, Space};
use crate::stack::{
    GeneratedCode, StackLayout, StacksReport, StacksRequest, Unwinder, Unwound, VcpuReport, unwind,
    vcpus,
};
use crate::tasks::tasks;

impl Patcher {
    /// Unwinds the stacks of the stopped guest's tasks. [`Patcher::name_stacks`] gives them names.
    ///
    /// # Errors
    /// [`PatchError::Tasks`], [`PatchError::Layout`], and those of [`Patcher::locate`].
    pub fn stacks(
        &mut self,
        guest: &mut dyn StoppedGuest,
        request: &StacksRequest,
    ) -> Result<Unwound, PatchError> {
        let found = self.identify(guest)?;
        let layout = self.stack_layout()?;
        let memory = &&*guest;
        let space = found.space(memory);
        let tasks = tasks(&space, &found, &self.know.tasks)?;
        let unwinder = unwinder(&self.know, guest, &space, &found, layout)
            .with_generated(self.all_trampolines());
        Ok(unwind(&unwinder, found.slide, tasks, request))
    }

    /// Looks up the names of functions, for which the guest need not be stopped.
    ///
    /// # Errors
    /// [`PatchError::Layout`].
    pub fn name_stacks(&self, stacks: Unwound) -> Result<StacksReport, PatchError> {
        Ok(stacks.named(&self.know.kernel, self.stack_layout()?))
    }

    /// What each vCPU of the stopped guest is doing.
    ///
    /// # Errors
    /// [`PatchError::Layout`], and those of [`Patcher::locate`].
    pub fn vcpus(&mut self, guest: &mut dyn StoppedGuest) -> Result<Vec<VcpuReport>, PatchError> {
        let found: Arc<Located> = self.identify(guest)?;
        let layout = self.stack_layout()?;
        let memory = &&*guest;
        let space = found.space(memory);
        let unwinder = unwinder(&self.know, guest, &space, &found, layout)
            .with_generated(self.all_trampolines());
        Ok(vcpus(
            &unwinder,
            &space,
            &self.know.tasks,
            found.slide,
            &self.know.kernel,
            layout,
        ))
    }

    fn all_trampolines(&self) -> Vec<GeneratedCode> {
        let mut all = self.hooked_trampolines();
        all.extend(self.retired.trampolines());
        all
    }

    /// Trampolines that are in use: their frames are known.
    pub(super) fn hooked_trampolines(&self) -> Vec<GeneratedCode> {
        let named = |placed: &PlacedCode, content: &Content, name: &str| {
            content.code.keeps_frames.then(|| GeneratedCode {
                range: placed.code.range(),
                name: name.to_owned(),
            })
        };
        let sites = self.ledger.applied().filter_map(|entry| {
            let content = self.contents.get(&entry.id)?;
            named(entry.code.as_ref()?, content, &entry.place)
        });
        let tracepoints = self.tracepoints.values().filter_map(|traced| {
            let (placed, content) = &traced.function;
            named(placed, content, traced.name())
        });
        sites.chain(tracepoints).collect()
    }

    fn stack_layout(&self) -> Result<&StackLayout, PatchError> {
        Ok(self.know.stack.as_ref().map_err(Clone::clone)?)
    }
}

/// When the guest's list of modules cannot be believed, their code is unknown.
pub(super) fn unwinder<'a, 'm>(
    know: &'a Knowledge,
    guest: &dyn StoppedGuest,
    space: &'a Space<'m>,
    found: &'a Located,
    layout: &'a StackLayout,
) -> Unwinder<'a, 'm> {
    let modules = know.modules.as_ref();
    let loaded = modules.and_then(|modules| modules.modules(space, found).ok());
    let vcpus = guest.vcpus();
    Unwinder::new(&know.kernel, layout, &know.tasks, space, found, vcpus)
        .with_modules(modules, loaded.unwrap_or_default())
}
