//! Probes: what happens whenever a site is reached.
//!
//! A site with probes is one change of the text: a jump to a trampoline that does what all of them
//! ask for. Another set of probes is another trampoline: the jump is changed in one stop, and the
//! old trampoline is retired together with what only it had. A site with a permanent probe keeps a
//! trampoline when no probe is left, which passes straight through.

mod callback;
mod report;
mod request;
mod returning;
mod site;

use std::collections::{BTreeMap, BTreeSet};

use super::hook::{Hook, Lead, Means};
use super::report::{Applied, Evidence, Kind, Origin, PlacedCode, Reverted};
use super::retire::{Content, Leaving};
use super::writing::{Seen, may_go, still_ours};
use super::{EntryId, PatchError, Patcher};
use crate::guest::{Gva, StoppedGuest};
use crate::probe::{Act, Displaced, Plan, Returning, Variables, trampoline};
use crate::space::Located;
use crate::text::instruction_len;
pub(super) use callback::{Attached, Prepared, Ready, Wanted, variables};
pub use callback::{Callback, Does};
pub(super) use report::hexadecimal;
pub use report::{
    AllDetached, Detached, Histogram, Measured, NewProbe, ProbeInfo, Recorded, Records,
};
pub use request::{PreparedProbe, ProbeRequest};
pub use returning::ReturnError;
use site::{JUMP, nothing_leads_inside, place};

/// The probes of one site, in the order in which they act.
#[derive(Debug)]
pub(super) struct ProbeSite {
    at: Gva,
    displaced: Displaced,
    /// It is where the kernel's own tracer would be.
    entry: bool,
    variables: Option<Variables>,
    /// What is known of the function's return, when a probe has asked for it.
    returning: Option<Returning>,
    /// It stays hooked without a probe.
    permanent: bool,
    attached: Vec<Attached>,
}

/// A probe that was taken out, and the change that it was in.
pub(super) struct Gone {
    pub(super) probe: ProbeInfo,
    entry: Applied,
    evidence: Evidence,
}

/// The sites with probes, by the number of their change.
pub(super) type ProbeSites = BTreeMap<EntryId, ProbeSite>;

impl ProbeSite {
    /// The trampoline for `acts` at this site.
    fn trampoline(&self, acts: &[Act]) -> super::code::Code {
        trampoline(&Plan {
            site: self.at,
            displaced: &self.displaced,
            acts,
            entry: self.entry,
            called: false,
            variables: self.variables.as_ref(),
            returning: self.returning,
        })
    }

    fn acts(&self) -> Vec<Act> {
        self.attached
            .iter()
            .map(|probe| probe.act.clone())
            .collect()
    }

    /// Where one with `priority` comes.
    fn index(&self, priority: i32) -> usize {
        let others = self.attached.iter().map(|probe| probe.priority);
        crate::probe::index(priority, others)
    }

    /// Takes note of what a probe needs that comes to it.
    fn needs(&mut self, prepared: &PreparedProbe, returning: Option<Returning>) {
        self.variables = self.variables.or(prepared.variables);
        self.permanent |= prepared.permanent;
        let words = |known: &Returning| known.stack_words;
        self.returning = [self.returning, returning]
            .into_iter()
            .flatten()
            .max_by_key(words);
    }

    /// Nobody sleeps in its trampoline, and nothing is called from there.
    fn is_plain(&self) -> bool {
        self.attached.iter().all(Attached::is_plain)
    }
}

impl Patcher {
    /// Attaches a probe to a site of the stopped guest.
    ///
    /// # Errors
    /// [`PatchError`]; where [`PatchError::passes`], let the guest run on and try again.
    pub fn attach_probe(
        &mut self,
        guest: &mut dyn StoppedGuest,
        prepared: &PreparedProbe,
        origin: &Origin,
    ) -> Result<NewProbe, PatchError> {
        let found = self.identify(guest)?;
        self.check(&found, guest).idle()?;
        self.put_in(guest, &found, prepared, origin)
    }

    /// Attaches a probe to a guest that is not changing its text.
    fn put_in(
        &mut self,
        guest: &mut dyn StoppedGuest,
        found: &Located,
        prepared: &PreparedProbe,
        origin: &Origin,
    ) -> Result<NewProbe, PatchError> {
        let check = self.check(found, guest);
        let (asked, function) = check.target(&prepared.site, prepared.link, JUMP as u64)?;
        let place = place(&check, &function, asked)?;
        let returning = prepared.returning_from(&check, &function, &place)?;
        let at = place.at;
        let here = |site: &&EntryId| self.sites.get(site).is_some_and(|site| site.at == at);
        if let Some(&id) = self.sites.keys().find(here) {
            return self.attach_more(guest, found, id, (prepared, returning), origin);
        }
        let (displaced, before) = place.instructions(&function)?;
        let back = at.offset(displaced.len as u64);
        let len = displaced.len as u64;
        let ftrace = check.owners(&self.ledger, Some(&function), at, len)?;
        let one = displaced.instructions == 1;
        if !one {
            nothing_leads_inside(&check, &function, &(at..back))?;
        }
        // What an earlier trampoline has left on stacks is the address behind the first byte.
        let first = instruction_len(&before).unwrap_or(1);
        let evidence = check.nobody_behind(&(at..back), first, one)?;
        let mut goes_on = displaced.branches.clone();
        if displaced.falls_through {
            goes_on.push(back);
        }
        let mut site = ProbeSite {
            at,
            displaced,
            entry: place.entry,
            variables: prepared.variables,
            returning,
            permanent: prepared.permanent,
            attached: Vec::new(),
        };
        let ready = self.put_callback(guest, found, prepared, at)?;
        let hook = Hook {
            kind: Kind::Probe,
            site: prepared.site.to_string(),
            place: function.place(at),
            module: function.module,
            evidence,
            lead: Lead {
                at,
                before: &before,
                ftrace,
                code: &site.trampoline(std::slice::from_ref(&ready.act)),
                entry: 0,
                goes_on,
                means: Means::Jump,
            },
        };
        let applied = match self.hook(guest, found, hook, origin) {
            Ok(applied) => applied,
            Err(error) => {
                self.undo(guest, ready, origin);
                return Err(error);
            }
        };
        site.attached
            .push(attached(applied.id, prepared, ready, origin));
        self.sites.insert(applied.id, site);
        self.new_probe(&&*guest, applied.id, applied.id)
    }

    /// Adds a probe to a site that has some.
    fn attach_more(
        &mut self,
        guest: &mut dyn StoppedGuest,
        found: &Located,
        change: EntryId,
        (prepared, returning): (&PreparedProbe, Option<Returning>),
        origin: &Origin,
    ) -> Result<NewProbe, PatchError> {
        let site = self.site(change)?;
        let (at, index, mut acts) = (site.at, site.index(prepared.priority), site.acts());
        let ready = self.put_callback(guest, found, prepared, at)?;
        acts.insert(index, ready.act.clone());
        if let Some(site) = self.sites.get_mut(&change) {
            site.needs(prepared, returning);
        }
        let id = self.ledger.next();
        let plain = self.site(change)?.is_plain();
        match self.rehook(guest, found, change, &acts, origin) {
            Err(error) => {
                self.undo(guest, ready, origin);
                Err(error)
            }
            Ok((old, content)) => {
                let leaving = Leaving::new(id, &old, content, origin.at_ms);
                self.retired.add(leaving.sleeps(!plain).of_site(at));
                if let Some(site) = self.sites.get_mut(&change) {
                    site.attached
                        .insert(index, attached(id, prepared, ready, origin));
                }
                self.new_probe(&&*guest, change, id)
            }
        }
    }

    /// Attaches several probes in one stop: all or none.
    ///
    /// # Errors
    /// Those of [`Patcher::attach_probe`], of the first that cannot be attached.
    pub fn attach_probes(
        &mut self,
        guest: &mut dyn StoppedGuest,
        prepared: &[PreparedProbe],
        origin: &Origin,
    ) -> Result<Vec<NewProbe>, PatchError> {
        let found = self.identify(guest)?;
        self.check(&found, guest).idle()?;
        let mut new: Vec<NewProbe> = Vec::with_capacity(prepared.len());
        for probe in prepared {
            match self.put_in(guest, &found, probe, origin) {
                Ok(attached) => new.push(attached),
                Err(error) => {
                    for id in new.iter().rev().map(|new| new.probe.id) {
                        self.take_out(guest, &found, (id, Seen::Never), origin)?;
                    }
                    self.collect_in(guest, &found);
                    return Err(error);
                }
            }
        }
        Ok(new)
    }

    /// Detaches a probe, and frees retired code that nobody is in. A site with a permanent probe stays
    /// hooked; [`Patcher::revert`] of its change ends that.
    ///
    /// # Errors
    /// Those of [`Patcher::revert`]; [`PatchError::NoSuchProbe`] for what is no probe.
    pub fn detach_probe(
        &mut self,
        guest: &mut dyn StoppedGuest,
        id: EntryId,
        origin: &Origin,
    ) -> Result<Detached, PatchError> {
        let found = self.identify(guest)?;
        self.check(&found, guest).idle()?;
        let gone = self.take_out(guest, &found, (id, Seen::Perhaps), origin)?;
        Ok(Detached {
            probe: gone.probe,
            reverted: Reverted {
                entry: gone.entry,
                evidence: gone.evidence,
                origin: origin.clone(),
                collected: self.collect_in(guest, &found),
            },
        })
    }

    /// Detaches several probes in one stop, all or none, and frees retired code that nobody is in: one
    /// look serves all of them.
    ///
    /// # Errors
    /// Those of [`Patcher::detach_probe`], of the first that cannot be detached.
    pub fn detach_probes(
        &mut self,
        guest: &mut dyn StoppedGuest,
        ids: &[EntryId],
        origin: &Origin,
    ) -> Result<AllDetached, PatchError> {
        let found = self.identify(guest)?;
        let mut seen = BTreeSet::new();
        if let Some(twice) = ids.iter().find(|id| !seen.insert(**id)) {
            return Err(PatchError::Request(format!("probe {twice} is named twice")));
        }
        {
            let check = self.check(&found, guest);
            check.idle()?;
            for &id in ids {
                let (change, _) = self.probe_at(id)?;
                let entry = self.ledger.get(change);
                may_go(&check, entry.ok_or(PatchError::NoSuchProbe { id })?)?;
            }
        }
        let mut probes = Vec::with_capacity(ids.len());
        for &id in ids {
            let gone = self.take_out(guest, &found, (id, Seen::Perhaps), origin)?;
            probes.push(gone.probe);
        }
        Ok(AllDetached {
            probes,
            collected: self.collect_in(guest, &found),
        })
    }

    /// The probes of a change that is a site with probes, and whether it stays hooked without any.
    #[must_use]
    pub fn probes_at(&self, change: EntryId) -> Option<(Vec<EntryId>, bool)> {
        let site = self.sites.get(&change)?;
        Some((self.probes_of(change), site.permanent))
    }

    /// The probes that are in a change.
    pub(super) fn probes_of(&self, change: EntryId) -> Vec<EntryId> {
        let site = self.sites.get(&change);
        let attached = site.map(|site| site.attached.iter());
        attached
            .into_iter()
            .flatten()
            .map(|probe| probe.id)
            .collect()
    }

    /// The change that a probe is in, and which of its site's probes it is.
    fn probe_at(&self, id: EntryId) -> Result<(EntryId, usize), PatchError> {
        let of = |site: &ProbeSite| site.attached.iter().position(|probe| probe.id == id);
        let mut sites = self.sites.iter();
        sites
            .find_map(|(change, site)| Some((*change, of(site)?)))
            .ok_or(PatchError::NoSuchProbe { id })
    }

    /// Detaches a probe of a guest that is not changing its text. What it leaves behind is retired.
    pub(super) fn take_out(
        &mut self,
        guest: &mut dyn StoppedGuest,
        found: &Located,
        (id, seen): (EntryId, Seen),
        origin: &Origin,
    ) -> Result<Gone, PatchError> {
        let (change, index) = self.probe_at(id)?;
        let probe = self.probe_info(&&*guest, change, id)?;
        let site = self.site(change)?;
        if site.attached.len() == 1 && !site.permanent {
            let (entry, evidence) = self.unhook(guest, found, (change, seen), id, origin)?;
            return Ok(Gone {
                probe,
                entry,
                evidence,
            });
        }
        let (at, plain) = (site.at, site.is_plain());
        let mut acts = site.acts();
        acts.remove(index);
        self.set_out(guest, change, Some(id), true)?;
        let rehooked = self.rehook(guest, found, change, &acts, origin);
        if rehooked.is_err() {
            self.set_out(guest, change, Some(id), false)?;
        }
        let (old, content) = rehooked?;
        let mut leaving = Leaving::new(id, &old, content, origin.at_ms)
            .sleeps(!plain)
            .of_site(at);
        if let Some(site) = self.sites.get_mut(&change) {
            leaving = site.attached.remove(index).leave(leaving);
        }
        self.retired.add(leaving);
        let entry = self.ledger.get(change);
        Ok(Gone {
            probe,
            entry: entry.ok_or(PatchError::NoSuchProbe { id })?.clone(),
            evidence: Evidence::SingleInstruction,
        })
    }

    /// All that the probes of a site leave behind whose jump is gone.
    pub(super) fn leave_site(&mut self, change: EntryId, leaving: Leaving) -> Leaving {
        let Some(site) = self.sites.remove(&change) else {
            return leaving;
        };
        let leaving = leaving.sleeps(!site.is_plain()).of_site(site.at);
        let all = site.attached.into_iter();
        all.fold(leaving, |leaving, probe| probe.leave(leaving))
    }

    /// Makes another trampoline for a site and changes its jump. Tells what it was before.
    fn rehook(
        &mut self,
        guest: &mut dyn StoppedGuest,
        found: &Located,
        change_id: EntryId,
        acts: &[Act],
        origin: &Origin,
    ) -> Result<(PlacedCode, Content), PatchError> {
        let site = self.site(change_id)?;
        let code = site.trampoline(acts);
        let at = site.at;
        let lost = PatchError::NoSuchProbe { id: change_id };
        let entry = self.ledger.get(change_id).ok_or(lost.clone())?.clone();
        {
            let check = self.check(found, guest);
            still_ours(&check, &entry)?;
            let end = at.offset(entry.after.0.len() as u64);
            check.no_kprobe(&(at..end))?;
            // A jump takes the place of a jump.
            check.nobody_inside(&(at..end), true)?;
        }
        let old = entry.code.clone().ok_or(lost)?;
        let lead = Lead {
            at,
            before: &entry.before.0,
            ftrace: None,
            code: &code,
            entry: 0,
            goes_on: old.goes_on.clone(),
            means: Means::Jump,
        };
        let led = self.lead(guest, found, lead, origin)?;
        let old_content = self.contents.insert(change_id, led.content.clone());
        self.ledger.add(Applied {
            after: led.after,
            code: Some(led.placed),
            ..entry
        });
        Ok((old, old_content.unwrap_or(led.content)))
    }

    fn put_callback(
        &mut self,
        guest: &mut dyn StoppedGuest,
        found: &Located,
        prepared: &PreparedProbe,
        at: Gva,
    ) -> Result<Ready, PatchError> {
        let wanted = Wanted {
            prepared: &prepared.callback,
            when: prepared.when,
            only_if: prepared.only_if,
            only_if_called: prepared.only_if_called,
            value: prepared.value,
            at,
            cpus: found.per_cpu.cpus().count() as u64,
        };
        wanted.put(guest, self.placing(found))
    }

    pub(super) fn undo(&mut self, guest: &mut dyn StoppedGuest, ready: Ready, origin: &Origin) {
        let arena = self.arena.as_mut();
        if let Some((placed, content)) = arena.and_then(|arena| ready.undo(guest, arena)) {
            self.retire_again(&placed, content, origin);
        }
    }

    fn site(&self, change: EntryId) -> Result<&ProbeSite, PatchError> {
        let site = self.sites.get(&change);
        site.ok_or(PatchError::NoSuchProbe { id: change })
    }
}

fn attached(id: EntryId, prepared: &PreparedProbe, ready: Ready, origin: &Origin) -> Attached {
    let site = prepared.site.to_string();
    Attached::new(id, &site, prepared.priority, ready, origin)
}

impl Attached {
    pub(super) fn new(
        id: EntryId,
        site: &str,
        priority: i32,
        ready: Ready,
        origin: &Origin,
    ) -> Self {
        Self {
            id,
            site: site.to_owned(),
            priority,
            act: ready.act,
            data: ready.data,
            code: ready.code,
            origin: origin.clone(),
        }
    }

    /// What only this probe had goes with its trampoline.
    pub(super) fn leave(self, leaving: Leaving) -> Leaving {
        leaving.with(self.code, self.data)
    }
}
