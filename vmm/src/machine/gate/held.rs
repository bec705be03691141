//! Which vCPUs are held one by one, as a state machine without threads, clocks or KVM.
//!
//! A hold is asked for ([`Phase::Coming`]: the vCPU is on its way to the gate), and then either is
//! in force ([`Phase::Held`]) or waits for the vCPU to get to a place ([`Phase::Armed`]), where it
//! comes to be in force. A soft hold is in force while its vCPU runs on in a loop. From every phase it may end, once; its [`Ticket`] then says how.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use patcher::guest::Gva;
use patcher::patch::EntryId;

use crate::machine::hold::{EndOfHold, HoldEnd, HoldInfo, HoldPhase, HoldSite};

/// Names one hold, and says how it ended when it has.
#[derive(Clone, Debug, Default)]
pub(in crate::machine) struct Ticket(Arc<OnceLock<EndOfHold>>);

impl Ticket {
    /// How the hold ended, if it has.
    pub(in crate::machine) fn end(&self) -> Option<&EndOfHold> {
        self.0.get()
    }

    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// How far a hold is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Coming,
    Armed,
    Held {
        since: Instant,
        rip: Gva,
        interrupts: bool,
    },
}

/// What a hold is about.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(in crate::machine) struct About {
    pub(in crate::machine) site: Option<HoldSite>,
    /// The vCPU runs on in a loop.
    pub(in crate::machine) soft: bool,
    /// The change to the guest that it takes.
    pub(in crate::machine) change: Option<EntryId>,
}

/// What a vCPU is to do that comes to a breakpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::machine) enum Arrival {
    /// It is held, right there.
    Held,
    /// It waits in the loop.
    Spins,
    /// It is not waited for.
    Passes,
}

#[derive(Clone, Debug)]
struct Hold {
    ticket: Ticket,
    about: About,
    /// How often other vCPUs came by while this one was waited for.
    passed: u64,
    /// How long each phase may last.
    limit: Duration,
    phase: Phase,
    /// When this phase ends the hold.
    deadline: Instant,
}

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Held {
    by_vcpu: Vec<Option<Hold>>,
}

/// Why a hold cannot be asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::machine) enum Unaskable {
    NoSuchVcpu,
    AlreadyHeld,
}

impl Held {
    /// Begins anew with so many vCPUs.
    pub(super) fn begin(&mut self, vcpus: usize, now: Instant) {
        self.end_all(now);
        self.by_vcpu = vec![None; vcpus];
    }

    fn get(&self, index: usize) -> Option<&Hold> {
        self.by_vcpu.get(index)?.as_ref()
    }

    fn find(&mut self, ticket: &Ticket) -> Option<&mut Hold> {
        let mut holds = self.by_vcpu.iter_mut().flatten();
        holds.find(|hold| hold.ticket.is(ticket))
    }

    /// Whether vCPU `index` can be asked to come to the gate.
    pub(super) fn askable(&self, index: usize) -> Result<(), Unaskable> {
        match self.by_vcpu.get(index) {
            None => Err(Unaskable::NoSuchVcpu),
            Some(Some(_)) => Err(Unaskable::AlreadyHeld),
            Some(None) => Ok(()),
        }
    }

    /// Asks vCPU `index` to come to the gate.
    pub(super) fn ask(
        &mut self,
        index: usize,
        about: About,
        limit: Duration,
        now: Instant,
    ) -> Result<Ticket, Unaskable> {
        match self.by_vcpu.get_mut(index) {
            None => Err(Unaskable::NoSuchVcpu),
            Some(Some(_)) => Err(Unaskable::AlreadyHeld),
            Some(free) => {
                let ticket = Ticket::default();
                *free = Some(Hold {
                    ticket: ticket.clone(),
                    about,
                    passed: 0,
                    limit,
                    phase: Phase::Coming,
                    deadline: later(now, limit),
                });
                Ok(ticket)
            }
        }
    }

    /// Whether vCPU `index` has to stay out of the guest.
    pub(super) fn keeps_out(&self, index: usize) -> bool {
        self.get(index).is_some_and(|hold| match hold.phase {
            Phase::Coming => !hold.about.soft,
            Phase::Armed => false,
            Phase::Held { .. } => !hold.about.soft,
        })
    }

    /// Its breakpoint is set, and the vCPU runs until it gets there. False when the hold is over.
    pub(super) fn arm(&mut self, ticket: &Ticket, now: Instant) -> bool {
        match self.find(ticket) {
            Some(hold) if hold.phase == Phase::Coming => {
                hold.phase = Phase::Armed;
                hold.deadline = later(now, hold.limit);
                true
            }
            _ => false,
        }
    }

    /// The vCPU that came stays where it is. False when the hold is over.
    pub(super) fn hold(
        &mut self,
        ticket: &Ticket,
        rip: Gva,
        interrupts: bool,
        now: Instant,
    ) -> bool {
        match self.find(ticket) {
            Some(hold) if hold.phase == Phase::Coming => {
                hold.is_held(rip, interrupts, now);
                true
            }
            _ => false,
        }
    }

    /// vCPU `index` came to the breakpoint at `at`, with interrupts enabled or not.
    pub(super) fn arrive(
        &mut self,
        index: usize,
        at: Gva,
        interrupts: bool,
        now: Instant,
    ) -> Arrival {
        match self.by_vcpu.get_mut(index) {
            Some(Some(hold)) if hold.waits_at(at) => {
                hold.is_held(at, interrupts, now);
                match hold.about.soft {
                    true => Arrival::Spins,
                    false => Arrival::Held,
                }
            }
            _ => {
                let holds = self.by_vcpu.iter_mut().flatten();
                holds
                    .filter(|hold| hold.waits_at(at))
                    .for_each(|hold| hold.passed += 1);
                Arrival::Passes
            }
        }
    }

    /// Ends the hold of vCPU `index`. `None` when there is none.
    pub(super) fn release(
        &mut self,
        index: usize,
        why: HoldEnd,
        now: Instant,
    ) -> Option<EndOfHold> {
        let hold = self.by_vcpu.get_mut(index)?.take()?;
        let end = EndOfHold {
            vcpu: u32::try_from(index).unwrap_or(u32::MAX),
            why,
            site: hold.about.site,
            soft: hold.about.soft,
            change: hold.about.change,
            held: match hold.phase {
                Phase::Held { since, .. } => Some(now.saturating_duration_since(since)),
                Phase::Coming | Phase::Armed => None,
            },
        };
        // Only here, and only once: the hold is not in the table any more.
        let _ = hold.ticket.0.set(end.clone());
        Some(end)
    }

    /// Ends this hold, if it is not over. Says whether it was not.
    pub(super) fn end(&mut self, ticket: &Ticket, why: HoldEnd, now: Instant) -> Option<usize> {
        let index = self
            .by_vcpu
            .iter()
            .position(|hold| hold.as_ref().is_some_and(|hold| hold.ticket.is(ticket)))?;
        self.release(index, why, now).map(|_| index)
    }

    /// The vCPUs go away, and every hold with them.
    pub(super) fn end_all(&mut self, now: Instant) {
        for index in 0..self.by_vcpu.len() {
            let _ = self.release(index, HoldEnd::GuestEnded, now);
        }
    }

    /// This hold as it is told. `None` when it is over.
    pub(super) fn info(&self, ticket: &Ticket, now: Instant) -> Option<HoldInfo> {
        let mut infos = self.infos(now);
        infos.find_map(|(hold, info)| hold.ticket.is(ticket).then_some(info))
    }

    /// All holds as they are told, by vCPU.
    pub(super) fn all(&self, now: Instant) -> Vec<HoldInfo> {
        self.infos(now).map(|(_, info)| info).collect()
    }

    fn infos(&self, now: Instant) -> impl Iterator<Item = (&Hold, HoldInfo)> {
        let holds = (0..).zip(&self.by_vcpu);
        holds.filter_map(move |(vcpu, hold)| {
            let hold = hold.as_ref()?;
            let info = HoldInfo {
                vcpu,
                phase: match hold.phase {
                    Phase::Coming => HoldPhase::Coming,
                    Phase::Armed => HoldPhase::Armed,
                    Phase::Held {
                        since,
                        rip,
                        interrupts,
                    } => HoldPhase::Held {
                        held: now.saturating_duration_since(since),
                        rip,
                        interrupts,
                    },
                },
                site: hold.about.site.clone(),
                soft: hold.about.soft,
                change: hold.about.change,
                passed: hold.passed,
                limit: hold.limit,
                left: hold.deadline.saturating_duration_since(now),
            };
            Some((hold, info))
        })
    }
}

impl Hold {
    fn waits_at(&self, at: Gva) -> bool {
        let site = self.about.site.as_ref();
        self.phase == Phase::Armed && site.is_some_and(|site| site.address == at)
    }

    fn is_held(&mut self, rip: Gva, interrupts: bool, now: Instant) {
        self.phase = Phase::Held {
            since: now,
            rip,
            interrupts,
        };
        self.deadline = later(now, self.limit);
    }
}

/// No limit is longer than [`crate::machine::HOLD_AT_MOST`].
fn later(now: Instant, by: Duration) -> Instant {
    now.checked_add(by).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);
    const RIP: Gva = Gva(0xffff_ffff_8100_0000);

    fn site() -> About {
        About {
            site: Some(HoldSite {
                address: RIP,
                place: "f+0x4".into(),
            }),
            ..About::default()
        }
    }

    fn held(vcpus: usize) -> (Held, Instant) {
        let now = Instant::now();
        let mut held = Held::default();
        held.begin(vcpus, now);
        (held, now)
    }

    #[test]
    fn a_hold_where_the_vcpu_is() {
        let (mut held, now) = held(2);
        let ticket = held.ask(1, About::default(), LIMIT, now).unwrap();
        assert!(held.keeps_out(1) && !held.keeps_out(0));
        assert!(held.hold(&ticket, RIP, true, now));
        assert!(!held.hold(&ticket, RIP, true, now), "it is held already");
        assert!(!held.arm(&ticket, now));
        assert_eq!(held.arrive(1, RIP, false, now), Arrival::Passes);
        assert_eq!(held.all(now).len(), 1);
        let later = now + Duration::from_secs(3);
        let info = held.info(&ticket, later).unwrap();
        assert_eq!(info.left, Duration::from_secs(7));

        let end = held.release(1, HoldEnd::Released, later).unwrap();
        assert_eq!(end.held, Some(Duration::from_secs(3)));
        assert_eq!(ticket.end(), Some(&end));
        assert!(!held.keeps_out(1) && held.all(later).is_empty());
        assert_eq!(held.release(1, HoldEnd::Released, later), None);
    }

    #[test]
    fn a_hold_at_a_place() {
        let (mut held, now) = held(2);
        let ticket = held.ask(0, site(), LIMIT, now).unwrap();
        assert!(held.keeps_out(0));
        assert!(held.arm(&ticket, now));
        assert!(!held.keeps_out(0));
        let later = now + Duration::from_secs(4);
        // Neither another place nor another vCPU.
        assert_eq!(held.arrive(0, Gva(1), true, later), Arrival::Passes);
        assert_eq!(held.arrive(1, RIP, true, later), Arrival::Passes);
        assert_eq!(held.arrive(0, RIP, true, later), Arrival::Held);
        assert!(held.keeps_out(0));
        assert_eq!(held.arrive(1, RIP, true, later), Arrival::Passes);
        // It has its whole limit from there on.
        assert_eq!(held.info(&ticket, later).unwrap().left, LIMIT);
        let info = held.info(&ticket, later).unwrap();
        assert_eq!(info.passed, 1);
        assert_eq!(
            info.phase,
            HoldPhase::Held {
                held: Duration::ZERO,
                rip: RIP,
                interrupts: true
            }
        );
    }

    #[test]
    fn one_at_a_time_and_each_vcpu_apart() {
        let (mut held, now) = held(3);
        let first = held.ask(0, About::default(), LIMIT, now).unwrap();
        assert_eq!(
            held.ask(0, site(), LIMIT, now).unwrap_err(),
            Unaskable::AlreadyHeld
        );
        assert_eq!(
            held.ask(3, About::default(), LIMIT, now).unwrap_err(),
            Unaskable::NoSuchVcpu
        );
        let other = held.ask(2, site(), LIMIT, now).unwrap();
        assert!(held.hold(&first, RIP, true, now) && held.arm(&other, now));
        assert_eq!(held.end(&first, HoldEnd::Deadline, now), Some(0));
        assert_eq!(held.arrive(2, RIP, true, now), Arrival::Held);
        assert_eq!(held.end(&first, HoldEnd::Deadline, now), None);
        assert_eq!(first.end().map(|end| end.why), Some(HoldEnd::Deadline));
        assert!(other.end().is_none());
    }

    #[test]
    fn whatever_its_phase_it_can_end_and_then_nothing_happens_any_more() {
        let (mut held, now) = held(1);
        for phase in 0..3 {
            let ticket = held.ask(0, site(), LIMIT, now).unwrap();
            assert!(phase < 1 || held.arm(&ticket, now));
            assert!(phase < 2 || held.arrive(0, RIP, false, now) == Arrival::Held);
            let end = held.release(0, HoldEnd::Released, now).unwrap();
            assert_eq!(end.held.is_some(), phase == 2);
            assert!(!held.arm(&ticket, now) && !held.hold(&ticket, RIP, true, now));
            assert_eq!(held.arrive(0, RIP, false, now), Arrival::Passes);
            assert!(!held.keeps_out(0));
            assert_eq!(held.info(&ticket, now), None);
        }
    }

    #[test]
    fn a_reset_ends_all_of_them() {
        let (mut held, now) = held(2);
        let tickets = [0, 1].map(|index| held.ask(index, About::default(), LIMIT, now).unwrap());
        held.begin(4, now);
        for ticket in &tickets {
            assert_eq!(ticket.end().map(|end| end.why), Some(HoldEnd::GuestEnded));
            assert!(!held.hold(ticket, RIP, true, now));
        }
        assert!(held.ask(3, About::default(), LIMIT, now).is_ok());
    }

    #[test]
    fn a_soft_hold_keeps_nobody_out() {
        let (mut held, now) = held(1);
        let soft = About {
            soft: true,
            ..site()
        };
        let ticket = held.ask(0, soft, LIMIT, now).unwrap();
        assert!(held.arm(&ticket, now));
        assert_eq!(held.arrive(0, RIP, true, now), Arrival::Spins);
        assert!(!held.keeps_out(0));
        assert!(held.info(&ticket, now).unwrap().soft);
        // In the loop it may come by again, in another task.
        assert_eq!(held.arrive(0, RIP, true, now), Arrival::Passes);
        assert!(held.release(0, HoldEnd::Released, now).unwrap().soft);
    }
}
