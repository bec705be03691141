//! Errands: what the guest's kernel is asked to do itself, and how far it is.

use super::super::code::{Code, Resolved};
use super::super::knowledge::Knowledge;
use super::super::placing::give_back;
use super::super::probe::{Prepared, PreparedProbe, variables};
use super::super::report::{Origin, PlacedCode};
use super::super::retire::{Content, Leaving};
use super::super::writing::Seen;
use super::super::{EntryId, PatchError, Patcher};
use crate::arena::Slot;
use crate::guest::{GuestMemory, StoppedGuest};
use crate::probe::{Call, Errand, Needs, Variables, errand_data};
use crate::space::Located;
use crate::symbols::Site;
use crate::text::{NOP5, on_the_way_in};

/// What every running kernel calls often: in the interrupt of its timer. A place in the first of
/// these that it has is taken that nobody else uses.
const OFTEN: [&str; 4] = [
    "hrtimer_interrupt",
    "update_process_times",
    "schedule",
    "tick_handle_periodic",
];
/// How many bytes of such a function are looked at for a place.
const LOOKED_AT: u64 = 64;
/// Work items of the kernel's own that are never queued while it lives: what ours has to look like.
/// Where there are several, any will do.
const PATTERN: &str = "poweroff_work";

/// What errands need of a kernel.
#[derive(Clone, Debug)]
pub(super) struct Means {
    pub(super) variables: Variables,
    pub(super) return_thunk: Option<Resolved>,
    queue: Resolved,
    queue_pointer: Resolved,
    pattern: crate::guest::LinkAddr,
    bytes: u64,
    entry: u64,
    function: u64,
}

impl Means {
    pub(super) fn of(know: &Knowledge) -> Result<Self, PatchError> {
        let types = know.kernel.types();
        let lacks = |why: String| {
            PatchError::Request(format!("this kernel cannot be asked to do anything: {why}"))
        };
        let symbol = |name: &str| {
            know.resolve(name)
                .map_err(|why| lacks(format!("{name}: {why}")))
        };
        let field = |path| {
            let field = types.field("work_struct", path);
            field
                .map(|field| field.offset)
                .map_err(|why| lacks(why.to_string()))
        };
        // Its workers run on any CPU: one that is delayed does not delay them. 6.18 has renamed it.
        let queue_pointer = symbol("system_dfl_wq").or_else(|_| symbol("system_unbound_wq"))?;
        let bytes = types
            .size_of("work_struct")
            .map_err(|why| lacks(why.to_string()))?;
        if bytes > errand_data::WORK_BYTES {
            return Err(lacks(format!("its work items have {bytes} bytes")));
        }
        let mut patterns = know.kernel.symbols().named(PATTERN);
        let pattern = patterns
            .find_map(|symbol| symbol.address())
            .ok_or_else(|| lacks(format!("it has no {PATTERN}")))?;
        Ok(Self {
            variables: variables(know)?,
            return_thunk: know.resolve("__x86_return_thunk").ok(),
            queue: symbol("queue_work_on")?,
            queue_pointer,
            pattern,
            bytes,
            entry: field("entry")?,
            function: field("func")?,
        })
    }
}

/// How far an errand is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Progress {
    /// Nobody has come by to begin it.
    Waiting,
    /// The guest is at it.
    Underway,
    /// Done: what the functions returned.
    Done(Vec<u64>),
}

/// An errand that was begun.
#[derive(Debug)]
pub(super) struct Begun {
    /// The probe that triggers it.
    pub(super) probe: EntryId,
    code: (PlacedCode, Content),
    data: Slot,
    calls: usize,
}

impl Patcher {
    /// Asks the guest's kernel to call functions, one after the other, and not at once.
    pub(super) fn begin_errand(
        &mut self,
        guest: &mut dyn StoppedGuest,
        found: &Located,
        means: &Means,
        calls: &[Call],
        origin: &Origin,
    ) -> Result<Begun, PatchError> {
        let data = self.errand_data(guest, found)?;
        let errand = Errand {
            queue: means.queue,
            queue_pointer: means.queue_pointer,
            cpu: means.variables.cpu,
            return_thunk: means.return_thunk,
            data: data.at,
        };
        let code = self.work(guest, found, means, (&errand, data), calls);
        let begun = code.and_then(|code| {
            let trigger = self.trigger(guest, found, means, errand.trigger(), origin);
            match trigger {
                Ok(probe) => Ok(Begun {
                    probe,
                    code,
                    data,
                    calls: calls.len(),
                }),
                Err(error) => {
                    self.give_back(guest, code.0.code);
                    Err(error)
                }
            }
        });
        if begun.is_err() {
            self.give_back(guest, data);
        }
        begun
    }

    fn errand_data(
        &mut self,
        guest: &mut dyn StoppedGuest,
        found: &Located,
    ) -> Result<Slot, PatchError> {
        let mut placing = self.placing(found);
        let arena = placing.arena(guest)?;
        Ok(arena.take_data(errand_data::BYTES, 64)?)
    }

    /// Puts the work item and its function in place.
    fn work(
        &mut self,
        guest: &mut dyn StoppedGuest,
        found: &Located,
        means: &Means,
        (errand, data): (&Errand, Slot),
        calls: &[Call],
    ) -> Result<(PlacedCode, Content), PatchError> {
        let mut raw = vec![0; usize::try_from(errand_data::BYTES).unwrap_or(0)];
        let len = usize::try_from(means.bytes).unwrap_or(0);
        {
            let memory = &&*guest;
            let space = found.space(memory);
            let work = raw.get_mut(..len).unwrap_or_default();
            space.read(means.pattern.at(found.slide), work)?;
        }
        let new = self.placing(found).place(guest, &errand.work(calls), 0)?;
        let mut put = |at: u64, value: u64| {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            if let Some(to) = at.checked_add(8).and_then(|end| raw.get_mut(at..end)) {
                to.copy_from_slice(&value.to_le_bytes());
            }
        };
        // An empty list points to itself.
        let entry = data.at.offset(means.entry).0;
        put(means.entry, entry);
        put(means.entry + 8, entry);
        put(means.function, new.placed.entry.0);
        put(errand_data::ARMED, 1);
        let filled = match &mut self.arena {
            Some(arena) => arena.fill(guest, data, &raw).map_err(PatchError::from),
            None => Ok(()),
        };
        match filled {
            Ok(()) => Ok((new.placed, new.content)),
            Err(error) => {
                self.give_back(guest, new.placed.code);
                Err(error)
            }
        }
    }

    /// Places that the guest comes by often. Inside a function the guest's tracer and we are not in each
    /// other's way.
    fn often(&self, guest: &dyn StoppedGuest, found: &Located) -> Result<Vec<Site>, PatchError> {
        let check = self.check(found, guest);
        let mut all = Vec::new();
        for name in OFTEN {
            let Ok(Resolved::Linked(link)) = self.know.resolve(name) else {
                continue;
            };
            let Some(function) = self.know.function(link, found.slide) else {
                continue;
            };
            let end = function.start.offset(function.size.min(LOOKED_AT));
            let code = check.code(&function, end)?;
            let offsets = on_the_way_in(function.start, &code, NOP5.len());
            all.extend(offsets.iter().map(|offset| format!("{name}+{offset:#x}")));
            all.push(name.to_owned());
        }
        let all = all.into_iter();
        all.map(|site| site.parse().map_err(|_| PatchError::Request(site)))
            .collect()
    }

    fn trigger(
        &mut self,
        guest: &mut dyn StoppedGuest,
        found: &Located,
        means: &Means,
        code: Code,
        origin: &Origin,
    ) -> Result<EntryId, PatchError> {
        let mut refused = None;
        for site in self.often(guest, found)? {
            let prepared = PreparedProbe::internal(
                &self.know,
                site,
                Prepared::Code {
                    code: code.clone(),
                    entry: 0,
                    nests: true,
                    needs: Needs::default(),
                },
                means.variables,
            );
            let attached = prepared.and_then(|probe| self.attach_probe(guest, &probe, origin));
            match attached {
                Ok(new) => return Ok(new.probe.id),
                Err(error) if error.passes() => return Err(error),
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        let none = || PatchError::Request("there is no place to ask the guest from".into());
        Err(refused.unwrap_or_else(none))
    }

    /// How far an errand is; the guest may run.
    pub(super) fn progress(
        &self,
        memory: &dyn GuestMemory,
        begun: &Begun,
    ) -> Result<Progress, PatchError> {
        let word = |at| self.word(memory, begun.data.at.offset(at));
        if word(errand_data::DONE)? != 0 {
            let results = (errand_data::RESULTS..).step_by(8).take(begun.calls);
            return Ok(Progress::Done(results.map(word).collect::<Result<_, _>>()?));
        }
        Ok(match word(errand_data::ARMED)? & 0xffff_ffff {
            0 => Progress::Underway,
            _ => Progress::Waiting,
        })
    }

    /// Takes an errand back that is done, or that nobody has begun.
    pub(super) fn end_errand(
        &mut self,
        guest: &mut dyn StoppedGuest,
        found: &Located,
        begun: Begun,
        origin: &Origin,
    ) -> Result<(), Box<(Begun, PatchError)>> {
        let idle = self.check(found, guest).idle();
        let gone =
            idle.and_then(|()| self.take_out(guest, found, (begun.probe, Seen::Perhaps), origin));
        let site = match gone {
            Ok(gone) => gone.probe.address,
            Err(error) => return Err(Box::new((begun, error))),
        };
        // Where it cannot be disarmed, what it would use stays for good.
        if self.disarm(guest, begun.data).is_ok() {
            let (placed, content) = begun.code;
            let leaving = Leaving::new(begun.probe, &placed, content, origin.at_ms);
            // Whoever is still in the trigger looks at the data.
            self.retired
                .add(leaving.with(None, begun.data).of_site(site));
        }
        Ok(())
    }

    /// Whoever is in the trigger at this moment does not begin the errand any more.
    fn disarm(&self, guest: &mut dyn StoppedGuest, data: Slot) -> Result<(), PatchError> {
        let armed = Slot {
            at: data.at.offset(errand_data::ARMED),
            len: 4,
        };
        Ok(self.arena_or_lost()?.fill(guest, armed, &[0; 4])?)
    }

    pub(super) fn give_back(&mut self, guest: &mut dyn StoppedGuest, slot: Slot) {
        if let Some(arena) = &mut self.arena {
            give_back(guest, arena, slot, None);
        }
    }
}
