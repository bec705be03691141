//! What the host does in one stop each: the engine's decisions over the model's guest.
//!
//! Numbers, order and cookies ([`Queue`]), what speaks for a task ([`evidence`]), where nobody must
//! be ([`interior`]) and the order of probes ([`index`]) are the engine's own code; that it looks at
//! every context, and writes what it decided, is modelled.

use std::ops::Range;

use patcher::grace::{Evidence, Queue, Switches, Witness, evidence, interior};
use patcher::guest::Gva;
use patcher::probe::index;
use patcher::tasks::TaskAddr;

use super::guest::{Act, CALLEE, Code, Fault, Probe, Runs, SITES, State, TEXT, USER, slot_range};
use super::rules::Rule;
use super::scenario::{Ask, Lost, Scenario};

/// A site with a jump.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Site {
    /// Where the jump leads.
    pub(crate) slot: usize,
    /// In the order in which they act.
    pub(crate) acts: Vec<Act>,
}

/// A trampoline that was unhooked, and what goes with it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Entry {
    site: usize,
    slot: usize,
    acts: Vec<Act>,
    /// What only a probe had that is gone.
    gone: Option<Act>,
    since: Option<Switches>,
}

/// A client of the host.
#[derive(Clone, PartialEq, Eq, Hash, Default, Debug)]
pub(crate) struct Client {
    /// How much it has asked for.
    pub(crate) next: usize,
    cookie: u64,
    /// Tasks that were in unhooked code when it took the cookie, and have not left it.
    owed: Vec<usize>,
}

struct InEntry<'a> {
    state: &'a State,
    scenario: &'a Scenario,
    task: usize,
    ranges: &'a [Range<Gva>],
}

impl Witness for InEntry<'_> {
    type Doubt = ();

    fn is_in_user_mode(&self) -> bool {
        let task = &self.state.tasks[self.task];
        let idle = self.scenario.tasks[self.task].idle;
        matches!(task.runs, Runs::On(_)) && task.at == USER && !idle
    }

    fn switches(&self) -> Option<u64> {
        Some(self.state.tasks[self.task].switches)
    }

    fn unwind(&self) -> Result<(), ()> {
        let task = &self.state.tasks[self.task];
        let lost = match self.scenario.lost {
            Lost::Nowhere => false,
            Lost::InCallee => task.at == CALLEE,
            Lost::Everywhere => true,
        };
        if lost && self.scenario.rules.has(Rule::ReliableUnwind) {
            return Err(());
        }
        let behind = task.stack.iter().filter(|_| !lost).map(|frame| frame.to);
        match behind.chain([task.at]).any(|at| is_in(self.ranges, at)) {
            true => Err(()),
            false => Ok(()),
        }
    }
}

fn is_in(ranges: &[Range<Gva>], at: Gva) -> bool {
    ranges.iter().any(|range| range.contains(&at))
}

impl State {
    /// What a client asks for next; `None` when it has to wait, or is done.
    pub(crate) fn ask(&mut self, client: usize, scenario: &Scenario) -> Option<Result<(), Fault>> {
        let asks = &scenario.clients[client];
        let done = match asks.get(self.clients[client].next)? {
            Ask::Attach(site, probe) => self.attach(*site, *probe, scenario)?,
            Ask::Detach(probe) => self.detach(*probe, scenario)?,
            Ask::Snapshot => {
                let owed = self.in_unhooked_code();
                let client = &mut self.clients[client];
                client.cookie = self.queue.last();
                client.owed = owed;
                Ok(())
            }
            Ask::Wait => {
                let client = &mut self.clients[client];
                if !has_passed(&self.queue, client.cookie, scenario) {
                    return None;
                }
                match std::mem::take(&mut client.owed).is_empty() {
                    true => Ok(()),
                    false => Err(Fault::CookiePassedEarly),
                }
            }
        };
        self.clients[client].next += 1;
        Some(done)
    }

    /// Puts a probe on a site, beside others of the same site. `None` when that is not possible now.
    fn attach(
        &mut self,
        at: usize,
        probe: Probe,
        scenario: &Scenario,
    ) -> Option<Result<(), Fault>> {
        let bytes = &SITES[at];
        let mut others = SITES.iter().zip(&self.sites).enumerate();
        let taken = |(index, (other, site)): (usize, (&Range<u64>, &Option<Site>))| {
            index != at && site.is_some() && other.start < bytes.end && bytes.start < other.end
        };
        if others.any(taken) || (self.sites[at].is_none() && !self.nobody_inside(at, scenario)) {
            return None;
        }
        let data = self.data.iter().position(Option::is_none)?;
        let callback = self.place(Code::Callback(probe), scenario)?;
        let act = Act {
            probe,
            callback,
            data,
        };
        let old = self.sites[at].clone();
        let mut acts = old.as_ref().map_or_else(Vec::new, |old| old.acts.clone());
        let others = acts.iter().map(|act| act.probe.priority);
        acts.insert(index(probe.priority, others), act);
        self.data[data] = Some(probe);
        Some(self.rehook(at, old, acts, None, scenario)?.map(|_| ()))
    }

    /// Takes a probe off its site and frees what may be freed.
    fn detach(&mut self, probe: Probe, scenario: &Scenario) -> Option<Result<(), Fault>> {
        let has = |site: &Option<Site>| {
            let acts = site.iter().flat_map(|site| &site.acts);
            acts.clone().position(|act| act.probe == probe)
        };
        let mut sites = self.sites.iter().enumerate();
        let (at, gone) = sites.find_map(|(at, site)| Some((at, has(site)?)))?;
        let old = self.sites[at].clone();
        let mut acts = old.as_ref()?.acts.clone();
        let gone = acts.remove(gone);
        let replaced = self.rehook(at, old, acts, Some(gone), scenario)?;
        Some(replaced.and_then(|_| self.collect(scenario).1))
    }

    /// Another set of probes: another trampoline, or the bytes that were there. The old one is
    /// retired with what only `gone` had.
    fn rehook(
        &mut self,
        at: usize,
        old: Option<Site>,
        acts: Vec<Act>,
        gone: Option<Act>,
        scenario: &Scenario,
    ) -> Option<Result<bool, Fault>> {
        if let (Some(old), false, false) =
            (&old, acts.is_empty(), scenario.rules.has(Rule::OnePair))
        {
            let slot = old.slot;
            self.sites[at] = Some(Site { slot, acts });
            return Some(Ok(false));
        }
        self.sites[at] = match acts.is_empty() {
            true => None,
            false => Some(Site {
                slot: self.trampoline(at, &acts, scenario)?,
                acts,
            }),
        };
        if let Some(old) = old {
            let sleeps = old.acts.iter().any(|act| act.probe.sleeps);
            let sleeps = (sleeps || scenario.callee) && scenario.rules.has(Rule::SleepersByStack);
            let line = TEXT.offset(SITES[at].start);
            let entry = Entry {
                site: at,
                slot: old.slot,
                acts: old.acts,
                gone,
                since: (!sleeps).then(Switches::new),
            };
            let line = Some(line).filter(|_| scenario.rules.has(Rule::SiteOrder));
            self.queue.add(entry, line);
        }
        Some(Ok(true))
    }

    /// A trampoline with the same bytes that waits to be freed is used again.
    fn trampoline(&mut self, site: usize, acts: &[Act], scenario: &Scenario) -> Option<usize> {
        let bytes = |act: &Act| (act.callback, act.data);
        let same = |entry: &Entry| {
            entry.site == site
                && entry.gone.is_none()
                && entry.acts.iter().map(bytes).eq(acts.iter().map(bytes))
        };
        let code = Code::Trampoline {
            site,
            acts: acts.to_vec(),
        };
        match self.queue.take(same) {
            Some(entry) => {
                self.code[entry.slot] = Some(code);
                Some(entry.slot)
            }
            None => self.place(code, scenario),
        }
    }

    fn place(&mut self, code: Code, scenario: &Scenario) -> Option<usize> {
        let retired = |slot: usize| self.queue.iter().any(|entry| entry.slot == slot);
        let free = |slot: &usize| {
            self.code[*slot].is_none()
                || (!scenario.rules.has(Rule::FreedSlotsOnly) && retired(*slot))
        };
        let slot = (0..self.code.len()).find(free)?;
        self.code[slot] = Some(code);
        Some(slot)
    }

    /// Looks at every context, and frees what nobody can come back to.
    pub(crate) fn collect(&mut self, scenario: &Scenario) -> (Vec<Evidence>, Result<(), Fault>) {
        let mut queue = std::mem::take(&mut self.queue);
        let mut cleared = Vec::new();
        let found: Vec<_> = queue
            .iter_mut()
            .map(|entry| self.holders(entry, scenario, &mut cleared))
            .collect();
        let mut done = Ok(());
        let free = |entry: &mut Entry| {
            let mut slots = vec![entry.slot];
            if let Some(gone) = entry.gone {
                slots.push(gone.callback);
                if self.data[gone.data].take().is_none() {
                    done = Err(Fault::FreedTwice);
                }
            }
            for slot in slots {
                if self.code[slot].take().is_none() {
                    done = Err(Fault::FreedTwice);
                }
            }
            true
        };
        queue.settle(found, |_, _| {}, free);
        self.queue = queue;
        (cleared, done)
    }

    fn holders(
        &self,
        entry: &mut Entry,
        scenario: &Scenario,
        cleared: &mut Vec<Evidence>,
    ) -> Vec<usize> {
        let slots = [Some(entry.slot), entry.gone.map(|gone| gone.callback)];
        let ranges: Vec<_> = slots.into_iter().flatten().map(slot_range).collect();
        let mut holders = Vec::new();
        for task in 0..self.tasks.len() {
            if !self.words(task, scenario).any(|at| is_in(&ranges, at)) {
                continue;
            }
            let witness = InEntry {
                state: self,
                scenario,
                task,
                ranges: &ranges,
            };
            let name = TaskAddr(Gva(task as u64));
            match evidence(name, &witness, entry.since.as_mut()) {
                Ok(evidence) => cleared.push(evidence),
                Err(()) => holders.push(task),
            }
        }
        holders
    }

    /// Nobody is behind the first instruction of a site, nor will be.
    fn nobody_inside(&self, site: usize, scenario: &Scenario) -> bool {
        if site == SITES.len() - 1 || !scenario.rules.has(Rule::Interior) {
            // The last site is one instruction.
            return true;
        }
        let at = |offset: u64| TEXT.offset(offset);
        let goes_on: Vec<_> = SITES.iter().map(|site| [at(site.end)]).collect();
        let hooked = self.sites.iter().enumerate();
        let hooked = hooked.filter_map(|(at, site)| Some((at, site.as_ref()?.slot)));
        let retired = self.queue.iter().map(|entry| (entry.site, entry.slot));
        let generated = hooked
            .chain(retired)
            .filter(|_| scenario.rules.has(Rule::Closure))
            .map(|(site, slot)| (slot_range(slot), &goes_on[site][..]));
        let bytes = at(SITES[site].start)..at(SITES[site].end);
        let windows: Vec<_> = interior(&bytes, generated).collect();
        (0..self.tasks.len()).all(|task| {
            let mut words = self.words(task, scenario);
            !words.any(|at| is_in(&windows, at))
        })
    }

    /// Every address that is found in a context.
    fn words<'s>(
        &'s self,
        index: usize,
        scenario: &'s Scenario,
    ) -> impl Iterator<Item = Gva> + use<'s> {
        let rules = scenario.rules;
        let (task, nature) = (&self.tasks[index], scenario.tasks[index]);
        let vcpu = match task.runs {
            Runs::On(vcpu) => Some(vcpu),
            _ => None,
        };
        let delayed = vcpu.is_some_and(|vcpu| self.held[vcpu]) && !rules.has(Rule::DelayedVcpu);
        let counted = (task.listed || rules.has(Rule::ExitingTasks))
            && (!nature.idle || rules.has(Rule::IdleTasks));
        let stack = counted && !delayed;
        let pointer = match vcpu {
            Some(_) => rules.has(Rule::Registers) && !delayed,
            // It was saved on the stack.
            None => rules.has(Rule::Stacks) && stack,
        };
        let frames = task.stack.iter().filter(move |frame| {
            stack
                && match frame.shadow {
                    true => rules.has(Rule::ShadowReturns),
                    false => rules.has(Rule::Stacks),
                }
        });
        let stale = task.stale.filter(|_| stack && rules.has(Rule::Stacks));
        let pointer = Some(task.at).filter(|_| pointer);
        let frames = frames.map(|frame| frame.to);
        frames.chain(stale).chain(pointer)
    }

    /// Tasks that are in code that nothing leads to any more, or will return there.
    fn in_unhooked_code(&self) -> Vec<usize> {
        let leads_to = |code: &Code| {
            let mut sites = self.sites.iter().flatten();
            match code {
                Code::Trampoline { .. } => {
                    sites.any(|site| self.code[site.slot].as_ref() == Some(code))
                }
                Code::Callback(probe) => {
                    sites.any(|site| site.acts.iter().any(|act| act.probe == *probe))
                }
            }
        };
        let tasks = self.tasks.iter().enumerate();
        let inside = tasks.filter(|(_, task)| {
            let frames = task.stack.iter().map(|frame| &frame.code);
            !frames.chain(&task.within).all(leads_to)
        });
        inside.map(|(index, _)| index).collect()
    }

    /// Notes who has left.
    pub(crate) fn settle_debts(&mut self) {
        if self.clients.iter().all(|client| client.owed.is_empty()) {
            return;
        }
        let inside = self.in_unhooked_code();
        for client in &mut self.clients {
            client.owed.retain(|task| inside.contains(task));
        }
    }
}

fn has_passed(queue: &Queue<Entry>, cookie: u64, scenario: &Scenario) -> bool {
    let upto = |number| queue.pending(number).count();
    match scenario.rules.has(Rule::CookieCoversAll) {
        true => queue.has_passed(cookie),
        false => upto(cookie) == upto(cookie.saturating_sub(1)),
    }
}
