//! Breakpoints: places at which one vCPU is to be held while the others run on.
//!
//! A breakpoint is an `int3` in place of the first byte of an instruction. Whoever comes there traps
//! ([`super::trap`]), and the hypervisor decides: the vCPU that is waited for is held with its
//! instruction pointer at the site; every other one runs a copy of the instruction, in the arena,
//! that goes on behind it. For a vCPU that is to go on serving interrupts meanwhile there is a loop in
//! front of the copy; opened, it goes on at the site, whoever is in it by then.
//!
//! What may be taken is what a probe may take, but for one instruction only: no other part of the
//! kernel need be kept from jumping behind it. The copies and loops are retired like every other
//! trampoline, with two rules of their own: a byte is put back only when nobody is between an
//! `int3` and the trap, and a loop is retired when it is opened.

use std::collections::BTreeMap;

use super::check::Check;
use super::function::Function;
use super::hook::{Hook, Lead, Means};
use super::placing::NewPlace;
use super::report::{Applied, Bytes, Collected, Evidence, Kind, Origin};
use super::retire::{Content, Leaving};
use super::trap::{TrapHandler, TrapSite};
use super::writing::change;
use super::{EntryId, PatchError, Patcher};
use crate::arena::Slot;
use crate::guest::{Activity, Gva, StoppedGuest, Vcpu};
use crate::probe::{Displaced, OPEN, aside, displace, spin};
use crate::space::Located;
use crate::symbols::Site;
use crate::text::{EntrySite, MAX_INSTRUCTION, boundaries, entry_site, instruction_len};

/// RFLAGS.IF.
const INTERRUPTS: u64 = 1 << 9;

/// Where a vCPU is to be held.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BreakpointRequest {
    /// Any instruction of a function, or its entry.
    pub site: Site,
    /// It is to wait in a loop, and serve interrupts.
    pub soft: bool,
}

/// A breakpoint that is in the guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Breakpoint {
    /// Its number.
    pub id: EntryId,
    /// Address of the instruction.
    pub address: Gva,
    /// Function and offset.
    pub place: String,
    /// Where others run the instruction.
    pub aside: Gva,
    /// The loop to wait in, for a soft one.
    pub spin: Option<Gva>,
    /// Where the hypervisor hears of it.
    pub trap: TrapHandler,
}

/// A vCPU that waits in a loop.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Spinning {
    /// The number of the loop.
    pub id: EntryId,
    /// Where it goes on when the loop is opened.
    pub address: Gva,
    /// Function and offset of that.
    pub place: String,
}

/// What is left after a look at a breakpoint.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Settled {
    /// Its byte is in the guest.
    pub armed: bool,
    /// There are breakpoints, and the trap.
    pub trapping: bool,
    /// What became of retired code.
    pub collected: Collected,
}

/// Loops in which a vCPU is held: nothing leads there any more, and nobody leaves them by himself.
#[derive(Debug, Default)]
pub(super) struct Spins(BTreeMap<EntryId, (Applied, Content)>);

impl Spins {
    pub(super) fn all(&self) -> impl Iterator<Item = &Applied> {
        self.0.values().map(|(entry, _)| entry)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// An instruction that can be run elsewhere.
struct One {
    at: Gva,
    displaced: Displaced,
    before: u8,
}

impl Patcher {
    /// Sets a breakpoint in the stopped guest. One that is there already serves all who do not ask
    /// for a loop.
    ///
    /// # Errors
    /// [`PatchError`]: what stands in the way at the site, or that the hypervisor cannot hear of it;
    /// where [`PatchError::passes`], let the guest run on and try again.
    pub fn arm_breakpoint(
        &mut self,
        guest: &mut dyn StoppedGuest,
        request: &BreakpointRequest,
        origin: &Origin,
    ) -> Result<Breakpoint, PatchError> {
        let found = self.identify(guest)?;
        let check = self.check(&found, guest);
        check.idle()?;
        let site = &request.site;
        let link = site.resolve(self.know.kernel.symbols())?;
        let (at, function) = check.target(site, link, 1)?;
        let asked = if request.soft { None } else { Some(at) };
        if let Some(shared) = asked.and_then(|at| self.shared(at)) {
            return Ok(shared);
        }
        let one = one_instruction(&check, &function, at)?;
        if let Some(shared) = asked.and_then(|_| self.shared(one.at)) {
            return Ok(shared);
        }
        let len = one.displaced.len as u64;
        let behind = one.at.offset(len);
        let ftrace = check.owners(&self.ledger, Some(&function), one.at, len)?;
        let evidence = check.nobody_inside(&(one.at..behind), true)?;
        let (id, trap) = self.trap(guest, &found, origin)?;
        let (code, begins) = aside(&one.displaced, one.at, request.soft);
        let mut goes_on = one.displaced.branches.clone();
        goes_on.extend(one.displaced.falls_through.then_some(behind));
        goes_on.extend(request.soft.then_some(one.at));
        let hook = Hook {
            kind: Kind::Breakpoint,
            site: request.site.to_string(),
            place: function.place(one.at),
            module: function.module,
            evidence,
            lead: Lead {
                at: one.at,
                before: &[one.before],
                ftrace,
                code: &code,
                entry: begins,
                goes_on,
                means: Means::Trap,
            },
        };
        match self.hook(guest, &found, hook, origin) {
            Ok(entry) => self.breakpoint(&entry, trap),
            Err(error) => {
                if !self.any_breakpoint() {
                    // Nobody has met it: no breakpoint was there.
                    if self.revert_for(guest, id, id, origin).is_ok() {
                        self.trap = None;
                    }
                }
                Err(error)
            }
        }
    }

    /// Has a vCPU that is somewhere in the kernel wait there in a loop.
    ///
    /// # Errors
    /// [`PatchError::NotHere`] while it is where it cannot be, which passes, and others.
    pub fn spin_vcpu(
        &mut self,
        guest: &mut dyn StoppedGuest,
        vcpu: u32,
        origin: &Origin,
    ) -> Result<Spinning, PatchError> {
        let found = self.identify(guest)?;
        let check = self.check(&found, guest);
        check.idle()?;
        let (at, function) = may_wait(&check, vcpu)?;
        let code = spin(at);
        let NewPlace {
            mut placed,
            content,
            fresh,
        } = self.placing(&found).place(guest, &code, 0)?;
        placed.goes_on = vec![at];
        if let Err(error) = guest.set_rip(vcpu, placed.entry) {
            self.unplace(guest, &placed, content, fresh, origin);
            return Err(error.into());
        }
        let id = self.ledger.next();
        let place = function.place(at);
        let entry = Applied {
            id,
            kind: Kind::Breakpoint,
            site: at.to_string(),
            place: place.clone(),
            address: at,
            before: Bytes::default(),
            after: Bytes::default(),
            evidence: Evidence::SingleInstruction,
            ftrace: None,
            code: Some(placed),
            module: function.module.map(|text| text.name().to_owned()),
            origin: origin.clone(),
        };
        self.spins.0.insert(id, (entry, content));
        Ok(Spinning {
            id,
            address: at,
            place,
        })
    }

    /// Takes a breakpoint away that nobody waits at any more, and opens its loop when nobody is to
    /// stay in it. May be called again and again; one that is gone is fine.
    ///
    /// # Errors
    /// [`PatchError::NotOurs`] when the guest has changed the byte, and others; where
    /// [`PatchError::passes`], let the guest run on and try again.
    pub fn settle_breakpoint(
        &mut self,
        guest: &mut dyn StoppedGuest,
        id: EntryId,
        waited_for: bool,
        spinning: bool,
        origin: &Origin,
    ) -> Result<Settled, PatchError> {
        let found = self.identify(guest)?;
        let mut collected = Collected::default();
        if !waited_for && self.is_breakpoint(id) {
            collected = self.lift(guest, &found, id, origin)?;
        }
        if !spinning && self.open(guest, id, origin)? {
            collected = self.collect_in(guest, &found);
        }
        if let (Some((trap, _)), false) = (self.trap, self.any_breakpoint()) {
            self.revert_for(guest, trap, trap, origin)?;
            self.trap = None;
        }
        Ok(Settled {
            armed: self.is_breakpoint(id),
            trapping: self.trap.is_some(),
            collected,
        })
    }

    fn lift(
        &mut self,
        guest: &mut dyn StoppedGuest,
        found: &Located,
        id: EntryId,
        origin: &Origin,
    ) -> Result<Collected, PatchError> {
        if let Some((_, trap)) = &self.trap {
            self.check(found, guest).nobody_at(trap)?;
        }
        // Somebody may be in its loop, which is opened before it is retired.
        let entry = self.ledger.get(id).cloned();
        let placed = entry.and_then(|entry| entry.code);
        let content = match placed {
            Some(placed) if placed.entry != placed.code.at => self.contents.remove(&id),
            _ => None,
        };
        match (self.revert_for(guest, id, id, origin), content) {
            (Ok(reverted), content) => {
                if let Some(content) = content {
                    self.spins.0.insert(id, (reverted.entry, content));
                }
                Ok(reverted.collected)
            }
            (Err(error), content) => {
                self.contents.extend(content.map(|content| (id, content)));
                Err(error)
            }
        }
    }

    /// Opens a loop: whoever is in it goes on at the site. Tells whether there was one.
    fn open(
        &mut self,
        guest: &mut dyn StoppedGuest,
        id: EntryId,
        origin: &Origin,
    ) -> Result<bool, PatchError> {
        let Some((entry, _)) = self.spins.0.get(&id) else {
            return Ok(false);
        };
        if let (Some(placed), Some(arena)) = (&entry.code, &self.arena) {
            let (offset, open) = OPEN;
            let byte = Slot {
                at: placed.code.at.offset(offset),
                len: 1,
            };
            arena.fill(guest, byte, &[open])?;
        }
        if let Some((entry, content)) = self.spins.0.remove(&id) {
            if let Some(placed) = &entry.code {
                let leaving = Leaving::new(id, placed, content, origin.at_ms);
                self.retired.add(leaving.sleeps(false));
            }
        }
        Ok(true)
    }

    /// The trap, put into the guest now when it is not there.
    fn trap(
        &mut self,
        guest: &mut dyn StoppedGuest,
        found: &Located,
        origin: &Origin,
    ) -> Result<(EntryId, TrapHandler), PatchError> {
        if let Some((id, trap)) = self.trap {
            let entry = self.ledger.get(id).ok_or(PatchError::NoSuchEntry { id })?;
            self.check(found, guest).trap_stands(entry)?;
            return Ok((id, trap));
        }
        let TrapSite {
            handler,
            before,
            after,
            evidence,
        } = self.check(found, guest).trap_site()?;
        change(guest, found.root, None, handler.at, &after)?;
        let id = self.ledger.next();
        let link = handler.at.linked(found.slide);
        let place = self.know.function(link, found.slide);
        let place = place.map(|function| function.place(handler.at));
        self.ledger.add(Applied {
            id,
            kind: Kind::Trap,
            site: handler.at.to_string(),
            place: place.unwrap_or_else(|| handler.at.to_string()),
            address: handler.at,
            before: Bytes(before),
            after: Bytes(after),
            evidence,
            ftrace: None,
            code: None,
            module: None,
            origin: origin.clone(),
        });
        self.trap = Some((id, handler));
        Ok((id, handler))
    }

    /// Who takes back what a hold made would leave an `int3` behind that nobody knows.
    pub(super) fn is_no_part_of_a_hold(&self, id: EntryId) -> Result<(), PatchError> {
        let entry = self.ledger.get(id);
        match entry.filter(|entry| matches!(entry.kind, Kind::Breakpoint | Kind::Trap)) {
            None => Ok(()),
            Some(entry) => Err(PatchError::Request(format!(
                "change {id} ({}) is part of holding a vCPU: release the vCPU instead",
                entry.place
            ))),
        }
    }

    fn is_breakpoint(&self, id: EntryId) -> bool {
        let entry = self.ledger.get(id);
        entry.is_some_and(|entry| entry.kind == Kind::Breakpoint)
    }

    fn any_breakpoint(&self) -> bool {
        let mut applied = self.ledger.applied();
        applied.any(|entry| entry.kind == Kind::Breakpoint)
    }

    /// The breakpoint at `at` that has no loop.
    fn shared(&self, at: Gva) -> Option<Breakpoint> {
        let (_, trap) = self.trap?;
        let here = |entry: &&Applied| entry.kind == Kind::Breakpoint && entry.address == at;
        let entry = self.ledger.applied().find(here)?;
        let found = self.breakpoint(entry, trap).ok()?;
        found.spin.is_none().then_some(found)
    }

    fn breakpoint(&self, entry: &Applied, trap: TrapHandler) -> Result<Breakpoint, PatchError> {
        let id = entry.id;
        let placed = entry.code.as_ref().ok_or(PatchError::NoSuchEntry { id })?;
        Ok(Breakpoint {
            id,
            address: entry.address,
            place: entry.place.clone(),
            aside: placed.entry,
            spin: (placed.entry != placed.code.at).then_some(placed.code.at),
            trap,
        })
    }
}

/// The instruction at `asked`, or, at the start of a function, the one behind the landing place of
/// indirect calls.
fn one_instruction(check: &Check<'_>, function: &Function, asked: Gva) -> Result<One, PatchError> {
    let start = function.start;
    let code = check.code(function, asked.offset(2 * MAX_INSTRUCTION as u64))?;
    let from = match usize::try_from(asked.distance_from(start)).unwrap_or(usize::MAX) {
        0 => match entry_site(start, &code) {
            EntrySite::Nop(offset) | EntrySite::Other(offset) => offset,
        },
        asked => asked,
    };
    let at = start.offset(from as u64);
    let here = code.get(from..).unwrap_or_default();
    let len = instruction_len(here).and_then(|len| usize::try_from(len).ok());
    boundaries(start, &code, from, len.unwrap_or(1))?;
    // Its breakpoint would be taken for the instruction.
    check.no_kprobe(&(at..at.offset(1)))?;
    let displaced = displace(at, here, 1)?;
    if from as u64 + displaced.len as u64 > function.size {
        return Err(PatchError::Request(format!(
            "{} ends within the instruction at {}",
            function.name,
            function.place(at)
        )));
    }
    Ok(One {
        at,
        displaced,
        before: here.first().copied().unwrap_or_default(),
    })
}

/// Where a vCPU is that may wait in a loop: in kernel text that may be interrupted anywhere, with
/// interrupts enabled and no event on its way.
fn may_wait(check: &Check<'_>, index: u32) -> Result<(Gva, Function), PatchError> {
    let refused = |why: String| PatchError::NotHere { vcpu: index, why };
    let mut vcpus = check.guest.vcpus().iter();
    let vcpu: &Vcpu = vcpus
        .find(|vcpu| vcpu.index == index)
        .ok_or_else(|| PatchError::Request(format!("there is no vCPU {index}")))?;
    let at = Gva(vcpu.registers.rip);
    match vcpu.activity {
        Activity::Running => {}
        Activity::Halted => return Err(refused("it is idle".into())),
        Activity::NotStarted => return Err(refused("it has not started".into())),
    }
    if vcpu.cpl() != 0 {
        return Err(refused("it is in user mode".into()));
    }
    if vcpu.registers.rflags & INTERRUPTS == 0 || vcpu.reinjects {
        return Err(refused(format!("at {at} it takes no interrupt")));
    }
    let function = check.function(at, 1, &at);
    function
        .map(|function| (at, function))
        .map_err(|error| refused(error.to_string()))
}
