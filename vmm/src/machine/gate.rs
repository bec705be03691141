//! The gate at which vCPU threads and device threads stand while the guest is stopped.
//!
//! A *hold* closes the gate; it opens when the last hold is released. A vCPU thread passes the
//! gate before it enters KVM_RUN and comes back to it when it was kicked out. It is *parked* only
//! there: KVM has then finished every port and MMIO access that the vCPU had begun, because the
//! thread comes back from a kick only through EINTR, which KVM_RUN returns after completing
//! pending accesses (Documentation/virt/kvm/api.rst, `immediate_exit`).
//! Devices with threads of their own deliver input under a permit that a hold waits for.
//!
//! Single vCPUs can be kept here while the gate is open for the others: see [`held`] and [`one`].

#[cfg(test)]
mod fleet;
mod held;
mod one;

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub(super) use held::{About, Arrival, Ticket};
pub(super) use one::{Turn, Wanted};

use held::Held;

use super::stop::{StopError, TELL_CLOCK_AFTER};

/// Where a vCPU thread is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Seat {
    Running,
    Parked,
    Gone,
}

#[derive(Default)]
struct State {
    holds: u32,
    seats: Vec<Seat>,
    /// Who is kept out by himself.
    held: Held,
    first_parked: Option<Instant>,
    devices: u32,
    closing: bool,
    exclusive: bool,
    /// Nobody will be seated any more.
    retired: bool,
    /// Which set of vCPU threads has the seats.
    generation: u64,
}

impl State {
    fn running(&self) -> Option<usize> {
        self.seats.iter().position(|seat| *seat == Seat::Running)
    }
}

/// What a vCPU thread is to do after the gate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pass {
    /// Enter the guest.
    Go,
    /// Enter the guest; it was parked, and what it executes may have been changed meanwhile.
    GoAfterPark {
        /// It was held by itself so long that the guest's watchdog has to be told.
        late: bool,
    },
    /// End: the machine is taken down.
    Leave,
}

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while `condition` holds, at most until `deadline`.
    fn wait_while<'a>(
        &self,
        state: MutexGuard<'a, State>,
        deadline: Instant,
        condition: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        wait_while(&self.changed, state, deadline, condition)
    }

    /// Opens the gate for `vcpus` new threads, all of which count as running until they park.
    /// The answer names this set of threads to [`Gate::hold`].
    pub(super) fn seat(&self, vcpus: usize) -> u64 {
        let mut state = self.lock();
        state.seats = vec![Seat::Running; vcpus];
        state.held.begin(vcpus, Instant::now());
        state.closing = false;
        state.first_parked = None;
        state.generation += 1;
        self.changed.notify_all();
        state.generation
    }

    /// Waits while one set of threads has been told to leave, or none has been there, and the next
    /// has no seats yet.
    pub(super) fn wait_open(&self, deadline: Instant) {
        let shut = |state: &State| !state.retired && (state.closing || state.generation == 0);
        drop(self.wait_while(self.lock(), deadline, shut));
    }

    /// There will be no vCPU threads any more: nobody need wait for them.
    pub(super) fn retire(&self) {
        self.lock().retired = true;
        self.changed.notify_all();
    }

    /// Tells every vCPU thread to leave at the gate.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closing = true;
        state.held.end_all(Instant::now());
        self.changed.notify_all();
    }

    /// Passes vCPU `index` through, or parks it here until it may. `unkick` undoes a kick and is
    /// called with the gate locked, so no kick is lost.
    pub(super) fn pass(&self, index: usize, mut unkick: impl FnMut()) -> Pass {
        let mut state = self.lock();
        let mut parked = false;
        let mut held_since = None;
        loop {
            if state.closing {
                set(&mut state, index, Seat::Gone);
                self.changed.notify_all();
                return Pass::Leave;
            }
            let held = state.held.keeps_out(index);
            if state.holds == 0 && !held {
                set(&mut state, index, Seat::Running);
                unkick();
                let late = held_since.is_some_and(|i: Instant| i.elapsed() > TELL_CLOCK_AFTER);
                return match parked {
                    true => Pass::GoAfterPark { late },
                    false => Pass::Go,
                };
            }
            if held {
                held_since.get_or_insert_with(Instant::now);
            }
            if !parked {
                parked = true;
                set(&mut state, index, Seat::Parked);
                state.first_parked.get_or_insert_with(Instant::now);
                self.changed.notify_all();
            }
            state = self.wait(state);
        }
    }

    /// Vacates the seat of vCPU `index`, whose thread ends by itself.
    pub(super) fn leave(&self, index: usize) {
        set(&mut self.lock(), index, Seat::Gone);
        self.changed.notify_all();
    }

    /// Closes the gate and waits until every vCPU is parked and every device holds still.
    ///
    /// `kick` makes a vCPU of this `generation` leave guest mode; it is called with the gate locked.
    /// [`StopError::Ended`] when that generation has left.
    pub(super) fn hold(
        &self,
        generation: u64,
        deadline: Instant,
        kick: impl Fn(usize),
    ) -> Result<Instant, StopError> {
        let begun = Instant::now();
        let mut state = self.lock();
        if state.closing || state.generation != generation {
            return Err(StopError::Ended);
        }
        state.holds += 1;
        if state.holds == 1 {
            state.first_parked = None;
        }
        for (index, seat) in state.seats.iter().enumerate() {
            if *seat == Seat::Running {
                kick(index);
            }
        }
        let busy = |state: &State| state.running().is_some() || state.devices > 0;
        state = self.wait_while(state, deadline, |state| busy(state) && !state.closing);
        if !busy(&state) {
            return Ok(state.first_parked.unwrap_or(begun));
        }
        let error = match state.running() {
            _ if state.closing => StopError::Ended,
            Some(vcpu) => StopError::Deadline {
                vcpu: u32::try_from(vcpu).unwrap_or(u32::MAX),
                waited: begun.elapsed(),
            },
            None => StopError::DeviceDeadline {
                waited: begun.elapsed(),
            },
        };
        self.unhold(&mut state);
        Err(error)
    }

    /// Takes back one hold.
    pub(super) fn release(&self) {
        self.unhold(&mut self.lock());
    }

    fn unhold(&self, state: &mut State) {
        state.holds = state.holds.saturating_sub(1);
        if state.holds == 0 {
            state.first_parked = None;
            self.changed.notify_all();
        }
    }

    /// Whether the gate is closed.
    pub(super) fn held(&self) -> bool {
        self.lock().holds > 0
    }

    /// Waits until no other operation works on the stopped guest.
    pub(super) fn claim(&self, deadline: Instant) -> Result<Claim<'_>, StopError> {
        let begun = Instant::now();
        let mut state = self.wait_while(self.lock(), deadline, |state| state.exclusive);
        if state.exclusive {
            return Err(StopError::Busy {
                waited: begun.elapsed(),
            });
        }
        state.exclusive = true;
        Ok(Claim { gate: self })
    }

    /// A device's leave to touch the guest; waits while the gate is closed.
    pub(super) fn device_permit(&self) -> DevicePermit<'_> {
        let mut state = self.lock();
        while state.holds > 0 && !state.closing {
            state = self.wait(state);
        }
        state.devices += 1;
        DevicePermit { gate: self }
    }
}

fn set(state: &mut State, index: usize, seat: Seat) {
    if let Some(place) = state.seats.get_mut(index) {
        *place = seat;
    }
}

/// The right to work on the stopped guest, which only one operation has at a time.
pub(super) struct Claim<'a> {
    gate: &'a Gate,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.gate.lock().exclusive = false;
        self.gate.changed.notify_all();
    }
}

/// While it lives, a device may change guest-visible state.
pub(super) struct DevicePermit<'a> {
    gate: &'a Gate,
}

impl Drop for DevicePermit<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        state.devices = state.devices.saturating_sub(1);
        self.gate.changed.notify_all();
    }
}

/// Waits at `changed` while `condition` holds, at most until `deadline`.
pub(super) fn wait_while<'a, T>(
    changed: &Condvar,
    state: MutexGuard<'a, T>,
    deadline: Instant,
    condition: impl Fn(&T) -> bool,
) -> MutexGuard<'a, T> {
    let left = deadline.saturating_duration_since(Instant::now());
    changed
        .wait_timeout_while(state, left, |state| condition(state))
        .unwrap_or_else(PoisonError::into_inner)
        .0
}

/// The instant `after` from now, however long that is.
pub(super) fn deadline_in(after: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(after)
        .unwrap_or_else(|| now + Duration::from_secs(86_400))
}

#[cfg(test)]
mod tests {
    use super::fleet::Fleet;
    use super::*;
    use std::thread;

    #[test]
    fn nobody_is_inside_while_held_and_holds_nest() {
        let fleet = Fleet::start(3);
        for _ in 0..200 {
            fleet.hold().unwrap();
            assert_eq!(fleet.inside(), 0);
            fleet.hold().unwrap();
            fleet.gate.release();
            thread::yield_now();
            assert_eq!(fleet.inside(), 0, "one hold is left");
            fleet.gate.release();
        }
        fleet.end();
    }

    #[test]
    fn a_vcpu_that_does_not_come_is_named_and_the_rest_go_on() {
        let gate = Gate::default();
        gate.seat(2);
        assert_eq!(gate.pass(0, || ()), Pass::Go);
        gate.leave(0);
        let error = gate
            .hold(1, deadline_in(Duration::from_millis(20)), |_| ())
            .unwrap_err();
        assert!(
            matches!(error, StopError::Deadline { vcpu: 1, .. }),
            "{error}"
        );
        assert!(!gate.held());
    }

    #[test]
    fn a_device_in_the_middle_of_something_is_waited_for() {
        let gate = Gate::default();
        gate.seat(0);
        let permit = gate.device_permit();
        let error = gate
            .hold(1, deadline_in(Duration::from_millis(20)), |_| ())
            .unwrap_err();
        assert!(matches!(error, StopError::DeviceDeadline { .. }), "{error}");
        drop(permit);
        gate.hold(1, deadline_in(Duration::from_millis(20)), |_| ())
            .unwrap();
        gate.release();
    }

    #[test]
    fn one_operation_at_a_time() {
        let gate = Gate::default();
        let claim = gate.claim(deadline_in(Duration::ZERO)).unwrap();
        assert!(matches!(
            gate.claim(deadline_in(Duration::from_millis(5))),
            Err(StopError::Busy { .. })
        ));
        drop(claim);
        assert!(gate.claim(deadline_in(Duration::ZERO)).is_ok());
    }
}
