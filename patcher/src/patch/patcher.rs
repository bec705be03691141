//! The patcher of one guest: what a hypervisor calls.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::breakpoint::Spins;
use super::check::Check;
use super::hook::{Hook, Lead, Means};
use super::knowledge::Knowledge;
use super::ledger::Ledger;
use super::marks::Marks;
use super::module_text::ModuleTexts;
use super::probe::ProbeSites;
use super::redirect::{PreparedRedirect, RedirectRequest};
use super::report::{
    Applied, Bytes, Collected, Evidence, Forgotten, KernelReport, Kind, Listing, Origin, Reverted,
};
use super::retire::{Content, Leaving, Retirement};
use super::text_patch::{PreparedText, TextRequest};
use super::tracepoint::Tracepoints;
use super::trap::TrapHandler;
use super::unloaded::InModules;
use super::writing::{Seen, change, is_there, may_go};
use super::{EntryId, PatchError};
use crate::Kernel;
use crate::arena::Arena;
use crate::error::with_causes;
use crate::guest::StoppedGuest;
use crate::space::{Bounds, LayoutError, LocateError, Located};
use crate::symbols::{Loaded, Module, Site};
use crate::tasks::{Survey, Task, survey, tasks};
use crate::text::NOP5;

/// The changes to one guest's kernel.
///
/// `prepare_*` needs no guest and does all that can be done without one; `commit_*`, `revert` and
/// `collect` run while the guest is stopped, check, and write. An operation either is done
/// completely or leaves the guest as it was. At each of them the kernel is identified again: when
/// it is not the one that was changed, [`PatchError::Gone`] tells once what went with it, and the
/// next call begins anew.
#[derive(Debug)]
pub struct Patcher {
    pub(super) know: Knowledge,
    /// Where the kernel was found last.
    pub(super) found: Option<Arc<Located>>,
    pub(super) ledger: Ledger,
    pub(super) arena: Option<Arena>,
    /// What the code of each applied redirect is.
    pub(super) contents: BTreeMap<EntryId, Content>,
    pub(super) retired: Retirement,
    pub(super) sites: ProbeSites,
    pub(super) tracepoints: Tracepoints,
    /// Where the hypervisor hears of breakpoints, while there are any.
    pub(super) trap: Option<(EntryId, TrapHandler)>,
    /// Loops in which a vCPU is held.
    pub(super) spins: Spins,
    /// Changes that are part of ordered steps.
    pub(super) in_steps: BTreeSet<EntryId>,
    pub(super) modules: ModuleTexts,
    /// Changes in modules, and what has become of them.
    pub(super) in_modules: InModules,
    /// What ftrace is still kept away from.
    pub(super) marks: Marks,
}

impl Patcher {
    /// A patcher for guests that run `kernel`.
    ///
    /// # Errors
    /// [`LayoutError`] names what the kernel's file lacks.
    pub fn new(kernel: Arc<Kernel>) -> Result<Self, LayoutError> {
        Ok(Self {
            know: Knowledge::of(kernel)?,
            found: None,
            ledger: Ledger::default(),
            arena: None,
            contents: BTreeMap::new(),
            retired: Retirement::default(),
            sites: ProbeSites::new(),
            tracepoints: Tracepoints::new(),
            trap: None,
            spins: Spins::default(),
            in_steps: BTreeSet::new(),
            modules: ModuleTexts::default(),
            in_modules: InModules::default(),
            marks: Marks::new(),
        })
    }

    /// From now on no look at the guest goes beyond `bounds`.
    pub fn set_bounds(&mut self, bounds: Bounds) {
        self.know.landmarks.bounds = bounds;
    }

    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> &Arc<Kernel> {
        &self.know.kernel
    }

    /// Where the kernel was found last.
    #[must_use]
    pub fn located(&self) -> Option<&Located> {
        self.found.as_deref()
    }

    /// Finds the kernel in the stopped guest, or checks that it is still there.
    ///
    /// # Errors
    /// [`PatchError::Locate`], [`PatchError::Gone`].
    pub fn locate(&mut self, guest: &mut dyn StoppedGuest) -> Result<KernelReport, PatchError> {
        let found = self.identify(guest)?;
        Ok(self.kernel_report(&found))
    }

    /// Every task of the stopped guest.
    ///
    /// # Errors
    /// [`PatchError::Tasks`], and those of [`Patcher::locate`].
    pub fn tasks(&mut self, guest: &mut dyn StoppedGuest) -> Result<Vec<Task>, PatchError> {
        let found = self.identify(guest)?;
        let memory = &&*guest;
        let space = found.space(memory);
        Ok(tasks(&space, &found, &self.know.tasks)?)
    }

    /// Every task of the stopped guest as it is shown, whether or not the counts agree.
    ///
    /// # Errors
    /// [`PatchError::Tasks`], [`PatchError::Layout`], and those of [`Patcher::locate`].
    pub fn survey(&mut self, guest: &mut dyn StoppedGuest) -> Result<Survey, PatchError> {
        let found = self.identify(guest)?;
        let more = self.know.survey.as_ref().map_err(Clone::clone)?;
        let memory = &&*guest;
        let space = found.space(memory);
        let vcpus = guest.vcpus();
        Ok(survey(&space, &found, &self.know.tasks, more, vcpus)?)
    }

    /// The modules that are loaded in the stopped guest.
    ///
    /// # Errors
    /// [`PatchError::Modules`], and those of [`Patcher::locate`].
    pub fn modules(&mut self, guest: &mut dyn StoppedGuest) -> Result<Vec<Module>, PatchError> {
        let found = self.identify(guest)?;
        let Some(layout) = &self.know.modules else {
            return Ok(Vec::new());
        };
        let memory = &&*guest;
        let space = found.space(memory);
        Ok(layout.modules(&space, &found)?)
    }

    /// Where the kernel is, and its modules with the symbols of those that are `wanted`.
    ///
    /// # Errors
    /// [`PatchError::Modules`], and those of [`Patcher::locate`].
    pub fn loaded(
        &mut self,
        guest: &mut dyn StoppedGuest,
        wanted: &dyn Fn(&Module) -> bool,
    ) -> Result<Loaded, PatchError> {
        let found = self.identify(guest)?;
        let memory = &&*guest;
        let space = found.space(memory);
        let modules = match &self.know.modules {
            Some(layout) => {
                let modules = layout.modules(&space, &found)?;
                layout.with_symbols(&space, modules, wanted)?
            }
            None => Vec::new(),
        };
        Ok(Loaded {
            slide: found.slide,
            modules,
        })
    }

    /// Whether there is such a place, as far as that can be told without the guest.
    ///
    /// # Errors
    /// [`PatchError::Site`].
    pub fn check_site(&self, site: &Site) -> Result<(), PatchError> {
        site.resolve(self.know.kernel.symbols())?;
        Ok(())
    }

    /// Checks a change of bytes as far as it can be done without the guest.
    ///
    /// # Errors
    /// [`PatchError`]: unknown or forbidden site, bytes that are no instructions.
    pub fn prepare_text(&self, request: TextRequest) -> Result<PreparedText, PatchError> {
        PreparedText::new(&self.know, request)
    }

    /// Changes bytes of the stopped guest.
    ///
    /// # Errors
    /// [`PatchError`]; where [`PatchError::passes`], let the guest run on and try again.
    pub fn commit_text(
        &mut self,
        guest: &mut dyn StoppedGuest,
        prepared: &PreparedText,
        origin: &Origin,
    ) -> Result<Applied, PatchError> {
        let found = self.identify(guest)?;
        let ready = prepared.check(&self.check(&found, guest), &self.ledger)?;
        let request = &prepared.request;
        let address = ready.at;
        change(guest, found.root, ready.ftrace, address, &request.write)?;
        let module = ready.function.as_ref().and_then(|f| f.module.clone());
        let entry = Applied {
            id: self.ledger.next(),
            kind: Kind::Text,
            site: request.site.to_string(),
            place: ready
                .function
                .as_ref()
                .map_or_else(|| address.to_string(), |f| f.place(address)),
            address,
            before: Bytes(request.expect.clone()),
            after: Bytes(request.write.clone()),
            evidence: ready.evidence,
            ftrace: ready.ftrace,
            code: None,
            module: module.as_ref().map(|text| text.name().to_owned()),
            origin: origin.clone(),
        };
        self.add(entry.clone(), module);
        Ok(entry)
    }

    /// Prepares to send the callers of a function to new code.
    ///
    /// # Errors
    /// [`PatchError`]: unknown or forbidden site, code that cannot be used.
    pub fn prepare_redirect(
        &self,
        request: RedirectRequest,
    ) -> Result<PreparedRedirect, PatchError> {
        PreparedRedirect::new(&self.know, request)
    }

    /// Places the new code in the stopped guest and lets the function jump to it.
    ///
    /// # Errors
    /// [`PatchError`]; where [`PatchError::passes`], let the guest run on and try again.
    pub fn commit_redirect(
        &mut self,
        guest: &mut dyn StoppedGuest,
        prepared: &PreparedRedirect,
        origin: &Origin,
    ) -> Result<Applied, PatchError> {
        let found = self.identify(guest)?;
        let ready = prepared.check(&self.check(&found, guest), &self.ledger)?;
        let hook = Hook {
            kind: Kind::Redirect,
            site: prepared.site.to_string(),
            place: ready.function.place(ready.nop),
            module: ready.function.module,
            evidence: ready.evidence,
            lead: Lead {
                at: ready.nop,
                before: &NOP5,
                ftrace: ready.ftrace,
                code: &prepared.code,
                entry: ready.entry,
                goes_on: Vec::new(),
                means: Means::Jump,
            },
        };
        self.hook(guest, &found, hook, origin)
    }

    /// Takes a change back, and frees retired code that nobody is in.
    ///
    /// # Errors
    /// [`PatchError::NotOurs`] when the guest has changed the bytes, and others; where
    /// [`PatchError::passes`], let the guest run on and try again.
    pub fn revert(
        &mut self,
        guest: &mut dyn StoppedGuest,
        id: EntryId,
        origin: &Origin,
    ) -> Result<Reverted, PatchError> {
        self.is_no_part_of_a_hold(id)?;
        self.is_no_part_of_steps(id)?;
        self.revert_for(guest, id, id, origin)
    }

    /// The same, where the code is then told of by the number `told`.
    pub(super) fn revert_for(
        &mut self,
        guest: &mut dyn StoppedGuest,
        id: EntryId,
        told: EntryId,
        origin: &Origin,
    ) -> Result<Reverted, PatchError> {
        let found = self.identify(guest)?;
        self.ledger.get(id).ok_or(PatchError::NoSuchEntry { id })?;
        self.check(&found, guest).idle()?;
        let (entry, evidence) = self.unhook(guest, &found, (id, Seen::Perhaps), told, origin)?;
        Ok(Reverted {
            entry,
            evidence,
            origin: origin.clone(),
            collected: self.collect_in(guest, &found),
        })
    }

    /// Takes a change back, in a guest that is not changing its text. Its code is then told of by the
    /// number `told`.
    pub(super) fn unhook(
        &mut self,
        guest: &mut dyn StoppedGuest,
        found: &Located,
        (id, seen): (EntryId, Seen),
        told: EntryId,
        origin: &Origin,
    ) -> Result<(Applied, Evidence), PatchError> {
        let entry = self
            .ledger
            .get(id)
            .ok_or(PatchError::NoSuchEntry { id })?
            .clone();
        let evidence = match seen {
            Seen::Perhaps => may_go(&self.check(found, guest), &entry)?,
            Seen::Never => entry.evidence.clone(),
        };
        self.set_out(guest, id, None, true)?;
        let unmark = self.leave_mark(guest, found, &entry);
        let changed = change(guest, found.root, unmark, entry.address, &entry.before.0);
        if changed.is_err() {
            self.set_out(guest, id, None, false)?;
        }
        changed?;
        self.ledger.revert(id, origin.clone());
        self.leave(&entry, told, origin);
        Ok((entry, evidence))
    }

    /// Nothing leads to the code of a change any more: it is retired, and told of by the number `told`.
    pub(super) fn leave(&mut self, entry: &Applied, told: EntryId, origin: &Origin) {
        let content = self.contents.remove(&entry.id);
        if let (Some(content), Some(placed)) = (content, &entry.code) {
            let leaving = Leaving::new(told, placed, content, origin.at_ms)
                .sleeps(entry.kind != Kind::Breakpoint);
            let leaving = self.leave_site(entry.id, leaving);
            self.retired.add(leaving);
        }
    }

    /// Frees retired code that nobody is in any more, and lets ftrace have the functions back that nobody
    /// traces.
    ///
    /// # Errors
    /// Those of [`Patcher::locate`].
    pub fn collect(&mut self, guest: &mut dyn StoppedGuest) -> Result<Collected, PatchError> {
        if self.retired.is_empty() && self.marks.is_empty() {
            return Ok(Collected::default());
        }
        let found = self.identify(guest)?;
        Ok(self.collect_in(guest, &found))
    }

    /// Everything that was done.
    #[must_use]
    pub fn list(&self) -> Listing {
        Listing {
            applied: self.ledger.applied().cloned().collect(),
            held: self.spins.all().cloned().collect(),
            retired: self.retired.report(),
            closed: self.ledger.closed().cloned().collect(),
            arena: self.arena.as_ref().map(Arena::report),
        }
    }

    /// The guest was reset: nothing of ours is in it any more. The hypervisor takes the blocks
    /// away that are returned.
    pub fn forget(&mut self, why: &str) -> Forgotten {
        self.found = None;
        self.contents.clear();
        self.retired.clear();
        self.sites.clear();
        let tracepoints = std::mem::take(&mut self.tracepoints);
        self.trap = None;
        self.spins.clear();
        self.in_modules.clear();
        self.in_steps.clear();
        self.marks.clear();
        Forgotten {
            lost: self.ledger.void(why),
            tracepoints: tracepoints.into_keys().collect(),
            blocks: self
                .arena
                .take()
                .map(|arena| arena.blocks().to_vec())
                .unwrap_or_default(),
        }
    }

    /// Unmaps the arena and gives its memory back, when nothing is in it. Tells whether it is gone.
    ///
    /// # Errors
    /// [`PatchError::Arena`] when the guest or the hypervisor does not let go of it.
    pub fn release(&mut self, guest: &mut dyn StoppedGuest) -> Result<bool, PatchError> {
        let empty = |arena: &mut Arena| arena.report().code_slots == 0;
        match self.arena.take_if(empty) {
            Some(arena) => arena.remove(guest).map(|()| true).map_err(Into::into),
            None => Ok(self.arena.is_none()),
        }
    }

    pub(super) fn check<'a>(
        &'a self,
        located: &'a Located,
        guest: &'a dyn StoppedGuest,
    ) -> Check<'a> {
        Check {
            know: &self.know,
            located,
            guest,
            ledger: &self.ledger,
            retired: &self.retired,
            spins: &self.spins,
            modules: &self.modules,
        }
    }

    /// Finds the kernel, and notices when it is not the one that was changed.
    pub(super) fn identify(
        &mut self,
        guest: &mut dyn StoppedGuest,
    ) -> Result<Arc<Located>, PatchError> {
        let located = Located::find(guest, &self.know.landmarks);
        let why = match (&self.found, located) {
            (Some(found), Ok(located)) if **found == located => {
                let found = found.clone();
                if !self.is_overwritten(&found, guest) {
                    self.notice_unloaded(guest, &found);
                    return Ok(found);
                }
                "another kernel of the same image is where the changed one was".to_owned()
            }
            (None, Ok(located)) => return Ok(self.remember(located)),
            (Some(_), Ok(located)) => {
                let why = "the guest has booted again".to_owned();
                if self.is_idle() {
                    return Ok(self.remember(located));
                }
                why
            }
            // It is there, and cannot be changed at the moment.
            (_, Err(error @ (LocateError::Nested | LocateError::NotRunning { .. }))) => {
                return Err(error.into());
            }
            (_, Err(error)) if self.is_idle() => {
                self.found = None;
                return Err(error.into());
            }
            (_, Err(error)) => with_causes(&error),
        };
        let forgotten = self.forget(&why);
        let lost = forgotten.ids();
        for block in forgotten.blocks {
            // The new kernel does not know of it; when it stays, nothing of the guest's is there.
            let _ = guest.remove_block(block);
        }
        Err(PatchError::Gone { why, lost })
    }

    /// The arena is unmapped and none of the changes is there any more. A guest that wanted to could
    /// do that, but only a new kernel in the same place does.
    fn is_overwritten(&self, located: &Located, guest: &dyn StoppedGuest) -> bool {
        let unmapped = |arena: &Arena| arena.check(&guest).is_err();
        self.arena.as_ref().is_some_and(unmapped)
            && !self
                .ledger
                .applied()
                .any(|entry| is_there(&located.space(&guest), entry))
    }

    /// Whether there is any change in the guest.
    #[must_use]
    pub fn has_applied(&self) -> bool {
        self.ledger.applied().next().is_some() || !self.spins.is_empty()
    }

    /// Whether there is retired code that is freed when nobody is in it any more.
    #[must_use]
    pub fn has_to_collect(&self) -> bool {
        self.retired.can_shrink()
    }

    /// Nothing of ours is in the guest.
    fn is_idle(&self) -> bool {
        self.arena.is_none() && self.spins.is_empty() && self.ledger.applied().next().is_none()
    }

    fn remember(&mut self, located: Located) -> Arc<Located> {
        // Marks are in the kernel that they were made in.
        self.marks.clear();
        let found = Arc::new(located);
        self.found = Some(found.clone());
        found
    }

    fn kernel_report(&self, located: &Located) -> KernelReport {
        let kernel = &self.know.kernel;
        KernelReport {
            release: kernel.release().to_owned(),
            banner: kernel.banner().text.clone(),
            build_id: kernel.build_id().map(|id| Bytes(id.bytes.clone())),
            slide: located.slide,
            text: self.know.regions.text().start.at(located.slide),
            page_table: located.root.table,
            levels: located.root.levels,
            phys_base: located.phys_base,
            page_offset_base: located.page_offset_base,
            possible_cpus: located.per_cpu.cpus().count(),
        }
    }

    pub(super) fn collect_in(
        &mut self,
        guest: &mut dyn StoppedGuest,
        located: &Located,
    ) -> Collected {
        self.unmark_left(guest, located);
        let hooked = self.hooked_trampolines();
        match &mut self.arena {
            Some(arena) => self
                .retired
                .collect(guest, located, &self.know, &hooked, arena),
            None => Collected::default(),
        }
    }
}
