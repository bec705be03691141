//! Holding one vCPU while the others run: what a host does to a vCPU that it preempts.
//!
//! Held hard, a vCPU does not enter the guest at all, whatever waits for it there. Held softly, it
//! runs in a loop of ours, serves its interrupts, and goes on where it was; the guest may run other
//! tasks on it meanwhile. It is held where it is, or when it comes to a place, before the instruction
//! there: see [`super::breakpoints`] for how it gets there, and [`crate::holding`] for who looks
//! after what that takes in the guest.
//!
//! Stops come and go while a vCPU is held; a stop finds it parked, and it stays held after. A hold
//! ends when it is released, when its time is over, and with the run of the guest that it is in
//! (reset, power off, quit). A thread for each hold waits for its end and tells of it.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use patcher::guest::{Activity, Gva};
use patcher::patch::EntryId;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::board::{Board, VcpuSlot};
use super::event::Event;
use super::gate::{About, Ticket, Turn, Wanted, deadline_in};
use super::shared::Shared;
use super::stop::StopError;
use super::vcpu_state;

/// How long a hold lasts when it is not said.
pub const HOLD_USUALLY: Duration = Duration::from_secs(10);
/// How long it may last at the most.
pub const HOLD_AT_MOST: Duration = Duration::from_secs(60 * 60);

/// RFLAGS.IF.
const INTERRUPTS: u64 = 1 << 9;

/// Where a vCPU is to be held.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct HoldSite {
    /// Run-time address of an instruction.
    #[serde(rename = "at")]
    pub address: Gva,
    /// The same as people write it.
    pub place: String,
}

/// A hold that takes a change to the guest.
#[derive(Clone, Debug)]
pub struct HoldRequest {
    /// Index of the vCPU.
    pub vcpu: u32,
    /// Where.
    pub site: HoldSite,
    /// It is to wait in a loop.
    pub soft: bool,
    /// The change: a breakpoint that it will come to, or a loop.
    pub change: EntryId,
    /// It waits in the loop already.
    pub spins: bool,
    /// How long it may take to get there, and then how long it is held; [`HOLD_AT_MOST`] at most.
    pub limit: Duration,
}

/// How far a hold is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HoldPhase {
    /// It was asked for, and the vCPU is on its way out of the guest.
    Coming,
    /// The vCPU runs until it gets to the place.
    Armed,
    /// The vCPU stands still, or waits in its loop.
    Held {
        /// For how long so far.
        held: Duration,
        /// Where.
        rip: Gva,
        /// Interrupts were enabled there.
        interrupts: bool,
    },
}

impl HoldPhase {
    /// As programs read it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Coming => "coming",
            Self::Armed => "armed",
            Self::Held { .. } => "held",
        }
    }
}

/// A hold that is not over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HoldInfo {
    /// Index of the vCPU.
    pub vcpu: u32,
    /// How far it is.
    pub phase: HoldPhase,
    /// Where the vCPU is to be held, or is.
    pub site: Option<HoldSite>,
    /// It waits in a loop, and serves interrupts.
    pub soft: bool,
    /// The change to the guest that it takes.
    pub change: Option<EntryId>,
    /// How often other vCPUs came to the place while this one was waited for.
    pub passed: u64,
    /// How long each phase may last.
    pub limit: Duration,
    /// Until it ends by itself.
    pub left: Duration,
}

impl HoldInfo {
    /// As programs read it: `vcpu`, `state`, `soft`, `at`, `place` and `passed`, `rip`, `interrupts`,
    /// `limit-us`, `held-us` and `left-us`.
    #[must_use]
    pub fn to_value(&self) -> Value {
        let mut members = Map::new();
        let mut add = |name: &str, value: Value| members.insert(name.to_owned(), value);
        add("vcpu", json!(self.vcpu));
        add("state", json!(self.phase.name()));
        if let Some(site) = &self.site {
            add("at", json!(site.address));
            add("place", json!(site.place));
            add("passed", json!(self.passed));
        }
        add("soft", json!(self.soft));
        if let HoldPhase::Held {
            held,
            rip,
            interrupts,
        } = self.phase
        {
            add("rip", json!(rip));
            add("interrupts", json!(interrupts));
            add("held-us", micros(held));
        }
        add("limit-us", micros(self.limit));
        add("left-us", micros(self.left));
        Value::Object(members)
    }
}

fn micros(time: Duration) -> Value {
    json!(u64::try_from(time.as_micros()).unwrap_or(u64::MAX))
}

/// Why a hold ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HoldEnd {
    /// Somebody asked for it.
    Released,
    /// Its time was over.
    Deadline,
    /// This run of the guest is over: reset, power off, quit.
    #[default]
    GuestEnded,
}

/// How a hold ended.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct EndOfHold {
    /// Index of the vCPU.
    pub vcpu: u32,
    /// Why.
    pub why: HoldEnd,
    /// Where the vCPU was to be held.
    pub site: Option<HoldSite>,
    /// It waited in a loop.
    pub soft: bool,
    /// The change to the guest that it took.
    pub change: Option<EntryId>,
    /// How long it was held. `None`: it never came there.
    pub held: Option<Duration>,
}

impl EndOfHold {
    /// As programs read it: `vcpu`, `reason`, `at` and `place`, `held-us`.
    #[must_use]
    pub fn to_value(&self) -> Value {
        let mut members = Map::new();
        let mut add = |name: &str, value: Value| members.insert(name.to_owned(), value);
        add("vcpu", json!(self.vcpu));
        add("reason", json!(self.why));
        if let Some(site) = &self.site {
            add("at", json!(site.address));
            add("place", json!(site.place));
        }
        if let Some(held) = self.held {
            add("held-us", micros(held));
        }
        Value::Object(members)
    }
}

/// Why a vCPU is not held, or cannot be released. It runs as before.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// The machine has fewer.
    #[error("there is no vCPU {vcpu}; the guest has {count}, counted from 0")]
    NoSuchVcpu {
        /// As it was given.
        vcpu: u32,
        /// How many there are.
        count: usize,
    },
    /// One hold at a time.
    #[error("vCPU {vcpu} is held, or to be held, already: release it first")]
    AlreadyHeld {
        /// The vCPU.
        vcpu: u32,
    },
    /// There is nothing to release.
    #[error("vCPU {vcpu} is not held")]
    NotHeld {
        /// The vCPU.
        vcpu: u32,
    },
    /// Somebody released it before it was held.
    #[error("vCPU {vcpu} was released before it was held")]
    ReleasedMeanwhile {
        /// The vCPU.
        vcpu: u32,
    },
    /// It has no context.
    #[error("the guest has not started vCPU {vcpu}: it is nowhere yet")]
    NotStarted {
        /// The vCPU.
        vcpu: u32,
    },
    /// It did not leave guest mode in time.
    #[error("vCPU {vcpu} did not stop within {} ms; it runs on", waited.as_millis())]
    Late {
        /// The vCPU.
        vcpu: u32,
        /// How long it was waited for.
        waited: Duration,
    },
    /// There is no machine, or another operation has it.
    #[error(transparent)]
    Stop(#[from] StopError),
    /// The host has no thread to spare.
    #[error("no thread to keep the hold: {0}")]
    NoThread(std::io::Error),
}

/// A hold that was asked for and came to be.
#[derive(Clone, Debug)]
pub struct HoldTicket(Ticket);

/// What the end of a phase takes in the guest.
pub type Settle = Box<dyn Fn() + Send>;

impl HoldInfo {
    /// The vCPU stands still at this moment.
    #[must_use]
    pub const fn is_still(&self) -> bool {
        matches!(self.phase, HoldPhase::Held { .. }) && !self.soft
    }
}

fn kick(board: &Board) -> impl Fn(usize) {
    |index| {
        if let Some(slot) = board.vcpus().get(index) {
            slot.kick();
        }
    }
}

fn index_of(vcpu: u32) -> usize {
    usize::try_from(vcpu).unwrap_or(usize::MAX)
}

impl Shared {
    /// Holds a vCPU hard, where it is.
    pub(super) fn hold_vcpu(
        self: &Arc<Self>,
        vcpu: u32,
        limit: Duration,
    ) -> Result<HoldInfo, HoldError> {
        let limit = limit.min(HOLD_AT_MOST);
        let deadline = deadline_in(limit);
        self.gate.wait_open(deadline);
        // Whoever works on the stopped guest has every vCPU to himself.
        let claim = self.gate.claim(deadline)?;
        let (board, generation) = self.current().ok_or(StopError::Ended)?;
        let index = index_of(vcpu);
        let wanted = Wanted {
            index,
            about: About::default(),
            limit,
        };
        let ticket = self.gate.bring(generation, wanted, kick(&board))?;
        let settled = match board.vcpus().get(index) {
            Some(slot) => self.stay(&ticket, vcpu, slot),
            None => Err(StopError::Ended.into()),
        };
        drop(claim);
        let info = match settled {
            Ok(true) => self.gate.hold_info(&ticket),
            Ok(false) => None,
            Err(error) => {
                self.gate.give_up(&ticket, HoldEnd::Released);
                return Err(error);
            }
        };
        let info = info.ok_or(HoldError::ReleasedMeanwhile { vcpu })?;
        self.keep_hold(&HoldTicket(ticket), Box::new(|| ()))?;
        Ok(info)
    }

    /// Keeps a vCPU that is parked. False when the hold is over.
    fn stay(&self, ticket: &Ticket, vcpu: u32, slot: &VcpuSlot) -> Result<bool, HoldError> {
        let Some(fd) = slot.try_lock() else {
            // It was parked, and runs again.
            return Ok(false);
        };
        let state = vcpu_state::summary(vcpu, &fd)?;
        if state.activity == Activity::NotStarted {
            return Err(HoldError::NotStarted { vcpu });
        }
        let registers = state.registers;
        let interrupts = registers.rflags & INTERRUPTS != 0;
        Ok(self.gate.held_at(ticket, Gva(registers.rip), interrupts))
    }

    /// Whether a vCPU can be held, as far as other holds are concerned.
    pub(super) fn can_hold(&self, vcpu: u32) -> Result<(), HoldError> {
        self.gate.askable(index_of(vcpu))
    }

    /// Begins a hold whose change is in the guest, for whoever has it stopped.
    pub(super) fn begin_hold(&self, request: HoldRequest) -> Result<HoldTicket, HoldError> {
        let (_, generation) = self.current().ok_or(StopError::Ended)?;
        let spins_at = request.spins.then_some(request.site.address);
        let wanted = Wanted {
            index: index_of(request.vcpu),
            about: About {
                site: Some(request.site),
                soft: request.soft,
                change: Some(request.change),
            },
            limit: request.limit.min(HOLD_AT_MOST),
        };
        self.gate
            .begin(generation, wanted, spins_at)
            .map(HoldTicket)
    }

    /// Starts the thread that sees to the end of a hold and tells of it. `settle` is called before
    /// it is told that the vCPU is held, and before it is told that the hold is over.
    pub(super) fn keep_hold(
        self: &Arc<Self>,
        ticket: &HoldTicket,
        settle: Settle,
    ) -> Result<(), HoldError> {
        let (shared, kept) = (self.clone(), ticket.0.clone());
        thread::Builder::new()
            .name("hold".into())
            .stack_size(512 * 1024)
            .spawn(move || shared.tell_turns(&kept, &settle))
            .map(drop)
            .map_err(|error| {
                self.gate.give_up(&ticket.0, HoldEnd::Released);
                HoldError::NoThread(error)
            })
    }

    fn tell_turns(&self, ticket: &Ticket, settle: &Settle) {
        let mut told = false;
        loop {
            let (name, data) = match self.gate.next_turn(ticket, told) {
                Turn::Held(info) => ("VCPU_HELD", info.to_value()),
                Turn::Over(end) => match end.held {
                    Some(_) => ("VCPU_RELEASED", end.to_value()),
                    None => ("VCPU_NOT_REACHED", end.to_value()),
                },
            };
            settle();
            let over = name != "VCPU_HELD";
            self.announce(&Event::Own { name, data });
            if over {
                return;
            }
            told = true;
        }
    }

    pub(super) fn hold_info(&self, ticket: &HoldTicket) -> Option<HoldInfo> {
        self.gate.hold_info(&ticket.0)
    }

    pub(super) fn wait_held(
        &self,
        ticket: &HoldTicket,
        at_most: Duration,
    ) -> Option<Result<HoldInfo, EndOfHold>> {
        let until = Instant::now() + at_most;
        self.gate
            .wait_held(&ticket.0, until)
            .map(|turn| match turn {
                Turn::Held(info) => Ok(info),
                Turn::Over(end) => Err(end),
            })
    }

    pub(super) fn give_up_hold(&self, ticket: &HoldTicket) {
        self.gate.give_up(&ticket.0, HoldEnd::Released);
    }

    pub(super) fn release_vcpu(&self, vcpu: u32) -> Result<EndOfHold, HoldError> {
        let (board, _) = self.current().ok_or(StopError::Ended)?;
        let index = index_of(vcpu);
        let count = board.vcpus().len();
        if index >= count {
            return Err(HoldError::NoSuchVcpu { vcpu, count });
        }
        let end = self.gate.release_one(index, HoldEnd::Released);
        end.ok_or(HoldError::NotHeld { vcpu })
    }
}
