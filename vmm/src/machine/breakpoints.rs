//! What happens when a vCPU runs into an `int3` while there are breakpoints of ours.
//!
//! The guest's handler begins with a write to a port ([`patcher::patch::TRAP_PORT`]), which brings
//! the vCPU here with the exception delivered and nothing of the handler done. Where the `int3` is
//! ours the delivery is undone: instruction pointer, stack pointer and flags are again what the CPU
//! pushed. The vCPU is then held at the instruction, or goes on in its copy or in a loop. Every other
//! `int3` (the guest's probes, a user program's) goes on in the handler as if nothing had been.
//!
//! What is ours changes only in stops, and a vCPU sorts out its trap before it parks: there is no
//! trap that anybody has forgotten meanwhile.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VcpuFd;
use patcher::guest::{Gpa, GuestMemory, Gva};
use patcher::patch::{Breakpoint, EntryId, Settled, TRAP_PORT, TrapHandler};

use super::board::Board;
use super::gate::{Arrival, Gate};

/// RFLAGS.IF and RFLAGS.AC.
const INTERRUPTS: u64 = 1 << 9;
const ALIGNMENT_CHECK: u64 = 1 << 18;

#[derive(Clone, Copy, Debug)]
struct Place {
    id: EntryId,
    aside: Gva,
    spin: Option<Gva>,
}

#[derive(Debug, Default)]
struct State {
    trap: Option<TrapHandler>,
    places: BTreeMap<Gva, Place>,
}

/// The breakpoints of one board.
#[derive(Debug, Default)]
pub(super) struct Breakpoints(Mutex<State>);

/// What the CPU pushes, without SS (SDM volume 3, 6.14.2).
struct Frame {
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
}

impl Breakpoints {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A breakpoint was set. For whoever has the guest stopped, as all that follow.
    pub(super) fn add(&self, breakpoint: &Breakpoint) {
        let mut state = self.lock();
        state.trap = Some(breakpoint.trap);
        let place = Place {
            id: breakpoint.id,
            aside: breakpoint.aside,
            spin: breakpoint.spin,
        };
        state.places.insert(breakpoint.address, place);
    }

    /// Somebody looked after breakpoint `id`.
    pub(super) fn settled(&self, id: EntryId, settled: &Settled) {
        let mut state = self.lock();
        if !settled.armed {
            state.places.retain(|_, place| place.id != id);
        }
        if !settled.trapping {
            state.trap = None;
        }
    }

    /// The kernel is gone that they were in.
    pub(super) fn clear(&self) {
        *self.lock() = State::default();
    }

    /// Whether a write to `port` may be the trap's.
    pub(super) fn may_be(&self, port: u16) -> bool {
        port == u16::from(TRAP_PORT) && self.lock().trap.is_some()
    }

    fn look_up(&self, trapped_at: u64) -> Option<TrapHandler> {
        let trap = self.lock().trap?;
        (trap.behind_write().0 == trapped_at).then_some(trap)
    }

    fn at(&self, address: Gva) -> Option<Place> {
        self.lock().places.get(&address).copied()
    }
}

/// Sorts out a port write that [`Breakpoints::may_be`] the trap's and that KVM has completed, on the
/// vCPU's own thread.
pub(super) fn sort(fd: &VcpuFd, gate: &Gate, board: &Board, index: usize) -> Result<(), String> {
    let failed = |error| format!("after a trap: {error}");
    let mut regs = fd.get_regs().map_err(failed)?;
    let breakpoints = board.breakpoints();
    let Some(trap) = breakpoints.look_up(regs.rip) else {
        // A program of the guest writes to that port.
        return Ok(());
    };
    let ours = frame(fd, board, regs.rsp).and_then(|frame| {
        let at = Gva(frame.rip.wrapping_sub(1));
        let place = breakpoints.at(at).filter(|_| frame.cs & 3 == 0)?;
        Some((frame, at, place))
    });
    match ours {
        Some((frame, at, place)) => {
            let interrupts = frame.rflags & INTERRUPTS != 0;
            let goes_on = match gate.arrive(index, at, interrupts) {
                Arrival::Held => at,
                Arrival::Spins => place.spin.unwrap_or(place.aside),
                Arrival::Passes => place.aside,
            };
            regs.rip = goes_on.0;
            regs.rsp = frame.rsp;
            regs.rflags = frame.rflags;
        }
        None => {
            regs.rip = trap.resume.0;
            if trap.clears_ac {
                regs.rflags &= !ALIGNMENT_CHECK;
            }
        }
    }
    fd.set_regs(&regs).map_err(failed)
}

/// Reads what the CPU pushed a moment ago. `None`: not to be read, so not the kernel's.
fn frame(fd: &VcpuFd, board: &Board, rsp: u64) -> Option<Frame> {
    let word = |index: u64| {
        let at = fd.translate_gva(rsp.wrapping_add(index * 8)).ok()?;
        let there = (at.valid != 0).then_some(Gpa(at.physical_address))?;
        board.ram().read_u64(there).ok()
    };
    Some(Frame {
        rip: word(0)?,
        cs: word(1)?,
        rflags: word(2)?,
        rsp: word(3)?,
    })
}
