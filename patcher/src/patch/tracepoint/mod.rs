//! Callbacks on the guest's own tracepoints.
//!
//! The guest's kernel adds and removes them itself: it is asked to call
//! `tracepoint_probe_register_prio()` and `tracepoint_probe_unregister()` (kernel/tracepoint.c) in a
//! worker of its own ([`errand`]). So its locks are held as it holds them, arrays of callbacks come
//! from its allocator and go back there, tracepoints that have to be switched on are, and its own
//! users of the same tracepoint come and go as they like. Each callback has a function of its own in
//! the arena, which carries its data. After its removal the guest waits for its readers, a delayed
//! vCPU among them (`tracepoint_synchronize_unregister()`), and then the function is retired like all
//! code of ours: whoever is still in it, or in what it calls, holds it up.

mod errand;

use std::collections::BTreeMap;

use super::code::Resolved;
use super::placing::NewPlace;
use super::probe::{Attached, Callback, Does, Prepared, Wanted};
use super::report::{Collected, Origin, PlacedCode};
use super::retire::{Content, Leaving};
use super::{EntryId, PatchError, Patcher};
use crate::guest::{GuestMemory, Gva, LinkAddr, StoppedGuest};
use crate::probe::{Call, Plan, Predicate, When, data, return_now, trampoline};
use crate::rules::{self, Rule};
use crate::space::Located;
use errand::{Begun, Means, Progress};

/// What the guest's own users have when they do not say.
pub const USUAL_PRIORITY: i32 = 10;

/// Which tracepoint, and what to do there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TracepointRequest {
    /// Its name, such as `sched_switch`.
    pub name: String,
    /// What it does. Registers are those of the call: `di` is the data, `si` the first argument of
    /// the tracepoint, then `dx`, `cx`, `r8`, `r9`.
    pub callback: Callback,
    /// What a callback of somebody else's is given.
    pub value: u64,
    /// Callbacks with a higher one come first, the guest's own among them.
    pub priority: i32,
    /// It does it only where this holds.
    pub only_if: Option<Predicate>,
}

/// A callback that was checked as far as it can be without the guest.
#[derive(Clone, Debug)]
pub struct PreparedTracepoint {
    name: String,
    tracepoint: LinkAddr,
    callback: Prepared,
    value: u64,
    priority: i32,
    only_if: Option<Predicate>,
    means: Means,
    register: Resolved,
    unregister: Resolved,
    /// What the guest calls to wait for its readers.
    synchronize: Vec<(Resolved, Option<Resolved>)>,
}

/// How far a callback is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TracepointState {
    /// The guest was asked to add it.
    Attaching,
    /// It is called.
    Attached,
    /// The guest was asked to remove it.
    Detaching,
}

/// A callback on a tracepoint of the guest.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TracepointInfo {
    /// Its number.
    pub id: EntryId,
    /// Name of the tracepoint.
    pub name: String,
    /// Address of the `struct tracepoint`.
    pub address: Gva,
    /// How far it is.
    pub state: TracepointState,
    /// The function that the guest calls.
    pub function: Gva,
    /// What it does.
    #[serde(flatten)]
    pub does: Does,
    /// What its callback is given.
    #[serde(serialize_with = "super::probe::hexadecimal")]
    pub data: u64,
    /// Those with a higher one come first.
    pub priority: i32,
    /// It does it only where this holds.
    pub only_if: Option<Predicate>,
    /// How often it was called.
    pub hits: u64,
    /// How often its callback was not called: nested in a callback, or where it may not be.
    pub skipped: u64,
    /// Who attached it, and when.
    pub origin: Origin,
}

/// A callback that is in the guest, or on its way.
#[derive(Debug)]
pub(super) struct Traced {
    prepared: PreparedTracepoint,
    address: Gva,
    state: TracepointState,
    /// The function that the guest calls.
    pub(super) function: (PlacedCode, Content),
    pub(super) probe: Attached,
    errand: Option<Begun>,
}

impl Traced {
    /// Name of the tracepoint.
    pub(super) fn name(&self) -> &str {
        &self.prepared.name
    }
}

/// Callbacks on tracepoints by their number.
pub(super) type Tracepoints = BTreeMap<EntryId, Traced>;

/// What became of an errand that was looked after.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum Outcome {
    /// The callback is called from now on.
    Attached(Box<TracepointInfo>),
    /// It is not called any more. What became of its code, and of others'.
    Detached {
        /// The callback, with its last counts.
        tracepoint: Box<TracepointInfo>,
        /// What became of retired code.
        collected: Collected,
    },
}

impl Patcher {
    /// Checks a callback as far as it can be done without the guest.
    ///
    /// # Errors
    /// [`PatchError`]: no such tracepoint, a callback that cannot be used, a kernel that cannot be
    /// asked.
    pub fn prepare_tracepoint(
        &self,
        request: TracepointRequest,
    ) -> Result<PreparedTracepoint, PatchError> {
        let know = &self.know;
        let symbol = |name: &str| {
            let resolved = know.resolve(name);
            resolved.map_err(|why| PatchError::Request(format!("{name}: {why}")))
        };
        let variable = format!("__tracepoint_{}", request.name);
        let tracepoint = match know.resolve(&variable) {
            Ok(Resolved::Linked(address)) => address,
            _ => {
                return Err(PatchError::Request(format!(
                    "this kernel has no tracepoint {}; `symbols '__tracepoint_*'` lists those that it \
                     has (those of modules are not looked at)",
                    request.name
                )));
            }
        };
        let callback = Prepared::new(know, request.callback)?;
        if callback.acts(When::Reached) != When::Reached {
            return Err(PatchError::Request(
                "a tracepoint is a place and takes no time: measure a function".into(),
            ));
        }
        let means = Means::of(know)?;
        callback.check(&means.variables)?;
        let mut synchronize = vec![(symbol("synchronize_rcu")?, None)];
        // Until 6.18 its own SRCU; tracepoints that may fault are under Tasks Trace RCU after that.
        if let (Ok(wait), Ok(domain)) = (
            know.resolve("synchronize_srcu"),
            know.resolve("tracepoint_srcu"),
        ) {
            synchronize.push((wait, Some(domain)));
        }
        if let Ok(wait) = know.resolve("synchronize_rcu_tasks_trace") {
            synchronize.push((wait, None));
        }
        Ok(PreparedTracepoint {
            tracepoint,
            callback,
            value: request.value,
            priority: request.priority,
            only_if: request.only_if,
            means,
            register: symbol("tracepoint_probe_register_prio")?,
            unregister: symbol("tracepoint_probe_unregister")?,
            synchronize,
            name: request.name,
        })
    }

    /// Puts a callback into the stopped guest, and asks the guest to call it. It is there when
    /// [`Patcher::tracepoint_ready`] says so and [`Patcher::finish_tracepoint`] agrees.
    ///
    /// # Errors
    /// [`PatchError`]; where [`PatchError::passes`], let the guest run on and try again.
    pub fn begin_tracepoint(
        &mut self,
        guest: &mut dyn StoppedGuest,
        prepared: &PreparedTracepoint,
        origin: &Origin,
    ) -> Result<EntryId, PatchError> {
        let found = self.identify(guest)?;
        self.check(&found, guest).idle()?;
        let address = prepared.tracepoint.at(found.slide);
        let wanted = Wanted {
            prepared: &prepared.callback,
            when: When::Reached,
            only_if: prepared.only_if,
            only_if_called: None,
            value: prepared.value,
            at: address,
            cpus: found.per_cpu.cpus().count() as u64,
        };
        let ready = wanted.put(guest, self.placing(&found))?;
        let code = trampoline(&Plan {
            site: address,
            displaced: &return_now(prepared.means.return_thunk),
            acts: std::slice::from_ref(&ready.act),
            entry: true,
            called: true,
            variables: Some(&prepared.means.variables),
            returning: None,
        });
        let placed = self.placing(&found).place(guest, &code, 0);
        let NewPlace {
            placed, content, ..
        } = match placed {
            Ok(placed) => placed,
            Err(error) => {
                self.undo(guest, ready, origin);
                return Err(error);
            }
        };
        let call = Call {
            function: prepared.register,
            arguments: vec![
                address.0,
                placed.entry.0,
                prepared.value,
                0_u64.wrapping_add_signed(prepared.priority.into()),
            ],
        };
        match self.begin_errand(guest, &found, &prepared.means, &[call], origin) {
            Ok(errand) => {
                let id = self.ledger.next();
                let traced = Traced {
                    address,
                    state: TracepointState::Attaching,
                    function: (placed, content),
                    probe: Attached::new(id, &prepared.name, prepared.priority, ready, origin),
                    errand: Some(errand),
                    prepared: prepared.clone(),
                };
                self.tracepoints.insert(id, traced);
                Ok(id)
            }
            Err(error) => {
                self.give_back(guest, placed.code);
                self.undo(guest, ready, origin);
                Err(error)
            }
        }
    }

    /// Whether the guest has done what it was asked for, and [`Patcher::finish_tracepoint`] has
    /// something to do. The guest may run.
    ///
    /// # Errors
    /// [`PatchError::NoSuchProbe`], [`PatchError::Arena`].
    pub fn tracepoint_ready(
        &self,
        memory: &dyn GuestMemory,
        id: EntryId,
    ) -> Result<bool, PatchError> {
        let traced = self.tracepoints.get(&id);
        let traced = traced.ok_or(PatchError::NoSuchProbe { id })?;
        match &traced.errand {
            Some(errand) => Ok(matches!(self.progress(memory, errand)?, Progress::Done(_))),
            None => Ok(true),
        }
    }

    /// Ends what the guest has done, or has not begun.
    ///
    /// # Errors
    /// [`PatchError::Refused`] when the guest refused or nobody came by: nothing was changed then.
    /// [`PatchError::Underway`] when the guest is at it.
    pub fn finish_tracepoint(
        &mut self,
        guest: &mut dyn StoppedGuest,
        id: EntryId,
        origin: &Origin,
    ) -> Result<Outcome, PatchError> {
        let found = self.identify(guest)?;
        let gone = PatchError::NoSuchProbe { id };
        let traced = self.tracepoints.get_mut(&id).ok_or(gone.clone())?;
        let state = traced.state;
        let name = traced.prepared.name.clone();
        let Some(errand) = traced.errand.take() else {
            return Ok(Outcome::Attached(Box::new(
                self.tracepoint_info(&&*guest, id)?,
            )));
        };
        let progress = match self.progress(&&*guest, &errand) {
            Ok(progress) => progress,
            Err(error) => {
                self.put_errand(id, errand);
                return Err(error);
            }
        };
        if progress == Progress::Underway {
            self.put_errand(id, errand);
            return Err(PatchError::Underway { id });
        }
        if let Err(left) = self.end_errand(guest, &found, errand, origin) {
            let (errand, error) = *left;
            self.put_errand(id, errand);
            return Err(error);
        }
        let first = match &progress {
            Progress::Done(results) => results.first().copied(),
            _ => None,
        };
        match (state, first) {
            (TracepointState::Attaching, Some(0)) => {
                self.set_state(id, TracepointState::Attached);
                self.collect_in(guest, &found);
                let info = self.tracepoint_info(&&*guest, id)?;
                Ok(Outcome::Attached(Box::new(info)))
            }
            (TracepointState::Attaching, refused) => {
                // The guest has seen its address only if it was asked.
                let _ = self.leave_tracepoint(guest, &found, id, origin);
                Err(PatchError::Refused {
                    what: format!("to add a callback to tracepoint {name}"),
                    why: answer(refused),
                })
            }
            (_, Some(result)) if errno(result).is_none() => {
                let tracepoint = Box::new(self.tracepoint_info(&&*guest, id)?);
                let collected = self.leave_tracepoint(guest, &found, id, origin)?;
                Ok(Outcome::Detached {
                    tracepoint,
                    collected,
                })
            }
            (_, refused) => {
                self.set_state(id, TracepointState::Attached);
                Err(PatchError::Refused {
                    what: format!("to remove a callback from tracepoint {name}"),
                    why: answer(refused),
                })
            }
        }
    }

    /// Asks the guest not to call a callback any more.
    ///
    /// # Errors
    /// [`PatchError::NoSuchProbe`]; [`PatchError::Underway`] when the guest is still at something.
    pub fn begin_detach_tracepoint(
        &mut self,
        guest: &mut dyn StoppedGuest,
        id: EntryId,
        origin: &Origin,
    ) -> Result<(), PatchError> {
        let found = self.identify(guest)?;
        let traced = self.tracepoints.get(&id);
        let traced = traced.ok_or(PatchError::NoSuchProbe { id })?;
        if traced.errand.is_some() {
            return Err(PatchError::Underway { id });
        }
        let prepared = traced.prepared.clone();
        let mut calls = vec![Call {
            function: prepared.unregister,
            arguments: vec![traced.address.0, traced.function.0.entry.0, prepared.value],
        }];
        let value = |symbol: &Resolved| match symbol {
            Resolved::Linked(address) => address.at(found.slide).0,
            Resolved::Absolute(value) => *value,
        };
        let waits = prepared.synchronize.iter();
        let waits = waits.filter(|_| rules::holds(Rule::Readers));
        calls.extend(waits.map(|(function, domain)| Call {
            function: *function,
            arguments: domain.iter().map(value).collect(),
        }));
        let errand = self.begin_errand(guest, &found, &prepared.means, &calls, origin)?;
        self.put_errand(id, errand);
        self.set_state(id, TracepointState::Detaching);
        Ok(())
    }

    /// The callbacks on tracepoints of the guest, which may run.
    ///
    /// # Errors
    /// [`PatchError::Arena`] when a count cannot be read.
    pub fn tracepoints(&self, memory: &dyn GuestMemory) -> Result<Vec<TracepointInfo>, PatchError> {
        let all = self.tracepoints.keys();
        all.map(|id| self.tracepoint_info(memory, *id)).collect()
    }

    /// Errands that somebody has to look after.
    #[must_use]
    pub fn unfinished_tracepoints(&self) -> Vec<EntryId> {
        let all = self.tracepoints.iter();
        all.filter(|(_, traced)| traced.errand.is_some())
            .map(|(id, _)| *id)
            .collect()
    }

    fn tracepoint_info(
        &self,
        memory: &dyn GuestMemory,
        id: EntryId,
    ) -> Result<TracepointInfo, PatchError> {
        let traced = self.tracepoints.get(&id);
        let traced = traced.ok_or(PatchError::NoSuchProbe { id })?;
        let probe = &traced.probe;
        let word = |at| self.word(memory, probe.act.data.offset(at));
        Ok(TracepointInfo {
            id,
            name: traced.prepared.name.clone(),
            address: traced.address,
            state: traced.state,
            function: traced.function.0.entry,
            does: probe.does(),
            data: probe.act.value,
            priority: probe.priority,
            only_if: probe.act.only_if,
            hits: word(data::HITS)?,
            skipped: word(data::SKIPPED)?,
            origin: probe.origin.clone(),
        })
    }

    /// Whether a probe is one of our own, by which the guest is asked for something.
    pub(super) fn is_errand(&self, probe: EntryId) -> bool {
        let errands = self
            .tracepoints
            .values()
            .filter_map(|traced| traced.errand.as_ref());
        errands.into_iter().any(|errand| errand.probe == probe)
    }

    fn put_errand(&mut self, id: EntryId, errand: Begun) {
        if let Some(traced) = self.tracepoints.get_mut(&id) {
            traced.errand = Some(errand);
        }
    }

    fn set_state(&mut self, id: EntryId, state: TracepointState) {
        if let Some(traced) = self.tracepoints.get_mut(&id) {
            traced.state = state;
        }
    }

    /// The guest does not call it any more: its code is retired.
    fn leave_tracepoint(
        &mut self,
        guest: &mut dyn StoppedGuest,
        found: &Located,
        id: EntryId,
        origin: &Origin,
    ) -> Result<Collected, PatchError> {
        let traced = self.tracepoints.remove(&id);
        let traced = traced.ok_or(PatchError::NoSuchProbe { id })?;
        let sleeps = !traced.probe.is_plain();
        let (placed, content) = traced.function;
        let leaving = Leaving::new(id, &placed, content, origin.at_ms).sleeps(sleeps);
        self.retired.add(traced.probe.leave(leaving));
        Ok(self.collect_in(guest, found))
    }
}

/// The error in what a function of the kernel returned.
fn errno(result: u64) -> Option<i32> {
    // `int` in the lower half of the register.
    let [a, b, c, d, ..] = result.to_le_bytes();
    let value = i32::from_le_bytes([a, b, c, d]);
    (-4095..0).contains(&value).then_some(-value)
}

fn answer(result: Option<u64>) -> String {
    match result {
        None => "nobody came by to do it".into(),
        Some(result) => match errno(result) {
            Some(errno) => std::io::Error::from_raw_os_error(errno).to_string(),
            None => format!("it returned {result:#x}"),
        },
    }
}
