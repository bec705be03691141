//! Holding one vCPU at the gate while the others pass.
//!
//! It stands there as for a stop, so a stop finds it parked and the end of a stop leaves it there.

use std::time::{Duration, Instant};

use patcher::guest::Gva;

use super::held::{About, Arrival, Ticket, Unaskable};
use super::{Gate, Seat, State, deadline_in};
use crate::machine::hold::{EndOfHold, HoldEnd, HoldError, HoldInfo, HoldPhase};
use crate::machine::stop::StopError;

/// A hold to be.
#[derive(Clone, Debug)]
pub(in crate::machine) struct Wanted {
    /// Which vCPU.
    pub(in crate::machine) index: usize,
    pub(in crate::machine) about: About,
    /// How long it may take to come, to get to the site, and to be held.
    pub(in crate::machine) limit: Duration,
}

/// What became of a hold that is in force, or waits for its vCPU to get to a place.
#[derive(Clone, Debug)]
pub(in crate::machine) enum Turn {
    Held(HoldInfo),
    Over(EndOfHold),
}

/// The same as it is told, for a gate of `count` vCPUs.
fn told(why: Unaskable, index: usize, count: usize) -> HoldError {
    let vcpu = u32::try_from(index).unwrap_or(u32::MAX);
    match why {
        Unaskable::NoSuchVcpu => HoldError::NoSuchVcpu { vcpu, count },
        Unaskable::AlreadyHeld => HoldError::AlreadyHeld { vcpu },
    }
}

impl Gate {
    /// Whether vCPU `index` can be held, as far as other holds are concerned.
    pub(in crate::machine) fn askable(&self, index: usize) -> Result<(), HoldError> {
        let state = self.lock();
        let asked = state.held.askable(index);
        asked.map_err(|why| told(why, index, state.seats.len()))
    }

    /// Begins a hold of a vCPU whose breakpoint is set, or, with an address, of one that waits in a
    /// loop already. For whoever has the guest stopped.
    pub(in crate::machine) fn begin(
        &self,
        generation: u64,
        wanted: Wanted,
        spins_at: Option<Gva>,
    ) -> Result<Ticket, HoldError> {
        let now = Instant::now();
        let mut state = self.lock();
        if state.closing || state.generation != generation {
            return Err(StopError::Ended.into());
        }
        let count = state.seats.len();
        let asked = state
            .held
            .ask(wanted.index, wanted.about, wanted.limit, now);
        let ticket = asked.map_err(|why| told(why, wanted.index, count))?;
        match spins_at {
            None => state.held.arm(&ticket, now),
            Some(rip) => state.held.hold(&ticket, rip, true, now),
        };
        self.changed.notify_all();
        Ok(ticket)
    }

    /// Has a vCPU of this `generation` come to the gate, and keeps it there until the hold is
    /// settled or over.
    pub(in crate::machine) fn bring(
        &self,
        generation: u64,
        wanted: Wanted,
        kick: impl Fn(usize),
    ) -> Result<Ticket, HoldError> {
        let begun = Instant::now();
        let index = wanted.index;
        let vcpu = u32::try_from(index).unwrap_or(u32::MAX);
        let mut state = self.lock();
        if state.closing || state.generation != generation {
            return Err(StopError::Ended.into());
        }
        let count = state.seats.len();
        let asked = state.held.ask(index, wanted.about, wanted.limit, begun);
        let ticket = asked.map_err(|why| told(why, index, count))?;
        let seat = |state: &State| state.seats.get(index).copied().unwrap_or(Seat::Gone);
        if seat(&state) == Seat::Running {
            kick(index);
        }
        let comes = |state: &State| seat(state) == Seat::Running && ticket.end().is_none();
        state = self.wait_while(state, deadline_in(wanted.limit), comes);
        if seat(&state) == Seat::Parked && ticket.end().is_none() {
            return Ok(ticket);
        }
        let error = match ticket.end().map(|end| end.why) {
            Some(HoldEnd::GuestEnded) => StopError::Ended.into(),
            Some(_) => HoldError::ReleasedMeanwhile { vcpu },
            None if seat(&state) == Seat::Gone => StopError::Ended.into(),
            None => HoldError::Late {
                vcpu,
                waited: begun.elapsed(),
            },
        };
        let _ = state.held.end(&ticket, HoldEnd::Released, Instant::now());
        self.changed.notify_all();
        Err(error)
    }

    /// The vCPU that was brought stays. False when the hold is over.
    pub(in crate::machine) fn held_at(&self, ticket: &Ticket, rip: Gva, interrupts: bool) -> bool {
        self.lock()
            .held
            .hold(ticket, rip, interrupts, Instant::now())
    }

    /// vCPU `index`, whose thread this is, came to the breakpoint at `at`: what it is to do.
    pub(in crate::machine) fn arrive(&self, index: usize, at: Gva, interrupts: bool) -> Arrival {
        let mut state = self.lock();
        let arrival = state.held.arrive(index, at, interrupts, Instant::now());
        if arrival != Arrival::Passes {
            self.changed.notify_all();
        }
        arrival
    }

    /// Ends the hold of vCPU `index`.
    pub(in crate::machine) fn release_one(&self, index: usize, why: HoldEnd) -> Option<EndOfHold> {
        let end = self.lock().held.release(index, why, Instant::now())?;
        self.changed.notify_all();
        Some(end)
    }

    /// Ends this hold, if it is not over.
    pub(in crate::machine) fn give_up(&self, ticket: &Ticket, why: HoldEnd) {
        let _ = self.lock().held.end(ticket, why, Instant::now());
        self.changed.notify_all();
    }

    /// Waits for the next turn of this hold: that its vCPU is held, unless that was `told`, or
    /// that it is over. Ends it when its time is.
    pub(in crate::machine) fn next_turn(&self, ticket: &Ticket, told: bool) -> Turn {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            match state.held.info(ticket, now) {
                Some(info) if !told && matches!(info.phase, HoldPhase::Held { .. }) => {
                    return Turn::Held(info);
                }
                Some(info) if info.left.is_zero() => {
                    let _ = state.held.end(ticket, HoldEnd::Deadline, now);
                    self.changed.notify_all();
                }
                Some(info) => {
                    let before = info.phase.name();
                    state = self.wait_while(state, now + info.left, |state| {
                        let info = state.held.info(ticket, now);
                        info.is_some_and(|info| info.phase.name() == before)
                    });
                }
                None => {
                    // What is not in the table any more has its end.
                    let end = ticket.end().cloned();
                    return Turn::Over(end.unwrap_or_default());
                }
            }
        }
    }

    /// Waits until this hold is in force or over, at most until `deadline`. `None`: neither.
    pub(in crate::machine) fn wait_held(&self, ticket: &Ticket, deadline: Instant) -> Option<Turn> {
        let held = |state: &State| {
            let info = state.held.info(ticket, Instant::now())?;
            matches!(info.phase, HoldPhase::Held { .. }).then_some(info)
        };
        let waits = |state: &State| ticket.end().is_none() && held(state).is_none();
        let state = self.wait_while(self.lock(), deadline, waits);
        match (ticket.end(), held(&state)) {
            (Some(end), _) => Some(Turn::Over(end.clone())),
            (None, Some(info)) => Some(Turn::Held(info)),
            (None, None) => None,
        }
    }

    /// All holds, by vCPU.
    pub(in crate::machine) fn holds(&self) -> Vec<HoldInfo> {
        self.lock().held.all(Instant::now())
    }

    /// One hold. `None` when it is over.
    pub(in crate::machine) fn hold_info(&self, ticket: &Ticket) -> Option<HoldInfo> {
        self.lock().held.info(ticket, Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::super::fleet::Fleet;
    use super::*;
    use crate::machine::hold::HoldSite;
    use std::thread;

    const LONG: Duration = Duration::from_secs(10);

    fn wanted(index: usize, site: bool, limit: Duration) -> Wanted {
        let place = || HoldSite {
            address: Gva(0x10),
            place: "f".into(),
        };
        Wanted {
            index,
            about: About {
                site: site.then(place),
                ..About::default()
            },
            limit,
        }
    }

    fn bring(fleet: &Fleet, wanted: Wanted) -> Result<Ticket, HoldError> {
        fleet
            .gate
            .bring(fleet.generation, wanted, |i| fleet.kick(i))
    }

    fn begin(fleet: &Fleet, wanted: Wanted) -> Result<Ticket, HoldError> {
        fleet.gate.begin(fleet.generation, wanted, None)
    }

    fn release(fleet: &Fleet, index: usize) -> Option<EndOfHold> {
        fleet.gate.release_one(index, HoldEnd::Released)
    }

    fn next_turn(fleet: &Fleet, ticket: &Ticket, told: bool) -> Turn {
        fleet.gate.next_turn(ticket, told)
    }

    #[test]
    fn one_stays_out_while_the_others_run_and_are_stopped() {
        let fleet = Fleet::start(3);
        for _ in 0..50 {
            let ticket = bring(&fleet, wanted(1, false, LONG)).unwrap();
            assert!(fleet.gate.held_at(&ticket, Gva(1), true));
            fleet.comes_inside(0);
            fleet.comes_inside(2);
            // A stop finds it parked; the end of the stop leaves it so.
            fleet.hold().unwrap();
            assert_eq!(fleet.inside(), 0);
            fleet.gate.release();
            fleet.comes_inside(0);
            fleet.comes_inside(2);
            assert!(!fleet.is_inside(1));
            let refused = bring(&fleet, wanted(1, false, LONG));
            assert!(matches!(refused, Err(HoldError::AlreadyHeld { vcpu: 1 })));
            // Released in a stop, it goes on after it.
            fleet.hold().unwrap();
            let end = release(&fleet, 1).unwrap();
            assert!(end.held.is_some());
            assert_eq!(fleet.inside(), 0);
            fleet.gate.release();
            fleet.comes_inside(1);
            assert_eq!(release(&fleet, 1), None);
        }
        fleet.end();
    }

    #[test]
    fn all_of_them_can_be_held_each_by_itself() {
        let fleet = Fleet::start(2);
        for index in 0..2 {
            let ticket = bring(&fleet, wanted(index, false, LONG)).unwrap();
            assert!(fleet.gate.held_at(&ticket, Gva(1), true));
        }
        assert_eq!(fleet.inside(), 0);
        fleet.hold().unwrap();
        fleet.gate.release();
        release(&fleet, 0).unwrap();
        fleet.comes_inside(0);
        assert!(!fleet.is_inside(1));
        let holds = fleet.gate.holds();
        assert_eq!(holds.iter().map(|hold| hold.vcpu).collect::<Vec<_>>(), [1]);
        fleet.end();
    }

    #[test]
    fn it_runs_until_it_gets_there() {
        let fleet = Fleet::start(2);
        let ticket = begin(&fleet, wanted(0, true, LONG)).unwrap();
        assert!(matches!(
            fleet.gate.askable(0),
            Err(HoldError::AlreadyHeld { vcpu: 0 })
        ));
        assert!(fleet.gate.askable(1).is_ok());
        fleet.comes_inside(0);
        let soon = deadline_in(Duration::from_millis(20));
        assert!(fleet.gate.wait_held(&ticket, soon).is_none());
        fleet.gets_there(0, true);
        let turn = fleet.gate.wait_held(&ticket, deadline_in(LONG));
        assert!(matches!(turn, Some(Turn::Held(info)) if info.vcpu == 0));
        let Turn::Held(info) = next_turn(&fleet, &ticket, false) else {
            panic!("not told");
        };
        assert!(matches!(info.phase, HoldPhase::Held { rip: Gva(0x10), .. }));
        release(&fleet, 0).unwrap();
        // Nothing holds it there again.
        fleet.comes_inside(0);
        let turn = next_turn(&fleet, &ticket, true);
        assert!(matches!(turn, Turn::Over(end) if end.why == HoldEnd::Released));
        fleet.end();
    }

    #[test]
    fn a_hold_ends_by_itself_whether_it_came_to_be_or_not() {
        let fleet = Fleet::start(2);
        let limit = Duration::from_millis(30);
        let never = begin(&fleet, wanted(0, true, limit)).unwrap();
        let Turn::Over(end) = next_turn(&fleet, &never, false) else {
            panic!("it cannot be held");
        };
        assert_eq!((end.why, end.held), (HoldEnd::Deadline, None));
        let turn = fleet.gate.wait_held(&never, deadline_in(LONG));
        assert!(matches!(turn, Some(Turn::Over(_))));

        let short = bring(&fleet, wanted(0, false, limit)).unwrap();
        assert!(fleet.gate.held_at(&short, Gva(1), true));
        assert!(matches!(next_turn(&fleet, &short, false), Turn::Held(_)));
        let Turn::Over(end) = next_turn(&fleet, &short, true) else {
            panic!("told twice");
        };
        assert_eq!(end.why, HoldEnd::Deadline);
        assert!(end.held.is_some_and(|held| held >= limit));
        fleet.comes_inside(0);
        fleet.end();
    }

    #[test]
    fn a_vcpu_that_does_not_come_is_not_held() {
        let fleet = Fleet::start(1);
        fleet.comes_inside(0);
        let limit = Duration::from_millis(20);
        let asked = fleet
            .gate
            .bring(fleet.generation, wanted(0, false, limit), |_| ());
        assert!(matches!(asked, Err(HoldError::Late { vcpu: 0, .. })));
        assert!(fleet.gate.holds().is_empty());
        fleet.kick(0);
        fleet.comes_inside(0);
        let asked = bring(&fleet, wanted(1, false, limit));
        assert!(matches!(
            asked,
            Err(HoldError::NoSuchVcpu { vcpu: 1, count: 1 })
        ));
        fleet.end();
    }

    #[test]
    fn the_end_of_the_guest_ends_its_holds() {
        let fleet = Fleet::start(2);
        let ticket = bring(&fleet, wanted(0, false, LONG)).unwrap();
        assert!(fleet.gate.held_at(&ticket, Gva(1), true));
        let gate = fleet.gate.clone();
        let waiting = thread::spawn(move || gate.next_turn(&ticket, true));
        let generation = fleet.generation;
        let gate = fleet.gate.clone();
        fleet.end();
        let Turn::Over(end) = waiting.join().unwrap() else {
            panic!("not over");
        };
        assert_eq!(end.why, HoldEnd::GuestEnded);
        let late = gate.bring(generation, wanted(0, false, LONG), |_| ());
        assert!(matches!(late, Err(HoldError::Stop(StopError::Ended))));
    }
}
