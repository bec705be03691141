//! The patcher of the running machine, and the stops that its changes take.
//!
//! Everything that can be done while the guest runs is done before it is stopped. A change that the
//! guest stands in the way of is tried again, each time in a new stop, until the deadline.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use patcher::Kernel;
use patcher::arena::BLOCK;
use patcher::guest::{GuestMemory, StoppedGuest};
use patcher::patch::{Collected, EntryId, Origin, PatchError, Patcher};
use patcher::space::Bounds;

use super::error::refusal;
use crate::control::command::{Context, StopRecord};
use crate::control::protocol::{QmpError, Reason};
use crate::machine::{Event, GuestRam, Machine, StopError, StopTimes};

/// The first pause between two tries; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// How long the patcher is kept from others at a time while the guest cannot be stopped: much of what
/// they ask it takes no stop.
const TURN: Duration = Duration::from_secs(1);

/// The patcher of one machine; clones share it.
#[derive(Clone)]
pub struct Patching {
    machine: Machine,
    bounds: Bounds,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    patcher: Option<Patcher>,
    /// The incarnation of the machine that the patcher knows.
    incarnation: u64,
    /// The thread that looks after what is in the guest.
    looking: Option<Thread>,
    /// Callbacks on tracepoints that the guest is at, and that nobody waits for any more.
    orphans: Vec<EntryId>,
}

/// What the stops of one command cost the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct StopReport {
    /// How many stops it took.
    pub stops: u32,
    /// Microseconds from the last request until every vCPU was parked.
    pub to_stopped_us: u64,
    /// Microseconds that the guest missed in the last stop.
    pub stalled_us: u64,
    /// Microseconds that the guest missed in all of them.
    pub stalled_in_all_us: u64,
}

impl StopReport {
    /// For the end of an error's text.
    fn told(&self) -> String {
        let stops = match self.stops {
            1 => "1 stop".to_owned(),
            stops => format!("{stops} stops"),
        };
        format!(
            "; the guest stood still for {} µs in {stops}",
            self.stalled_in_all_us
        )
    }

    /// These stops, and later ones.
    fn and(self, later: Self) -> Self {
        Self {
            stops: self.stops + later.stops,
            stalled_in_all_us: self
                .stalled_in_all_us
                .saturating_add(later.stalled_in_all_us),
            ..later
        }
    }

    fn add(&mut self, times: StopTimes) {
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.stops += 1;
        self.to_stopped_us = us(times.to_stopped);
        self.stalled_us = us(times.stalled);
        self.stalled_in_all_us = self.stalled_in_all_us.saturating_add(self.stalled_us);
    }
}

/// An answer, and what it cost the guest.
#[derive(Debug, serde::Serialize)]
pub struct WithStop<R> {
    #[serde(flatten)]
    answer: R,
    stop: StopReport,
}

impl<R> WithStop<R> {
    /// The same with another answer.
    pub fn map<S>(self, change: impl FnOnce(R) -> S) -> WithStop<S> {
        WithStop {
            answer: change(self.answer),
            stop: self.stop,
        }
    }

    /// The answer.
    pub fn answer(&self) -> &R {
        &self.answer
    }

    /// The answer of a later command, with the cost of both.
    pub fn then<S>(self, later: WithStop<S>) -> WithStop<S> {
        WithStop {
            stop: self.stop.and(later.stop),
            answer: later.answer,
        }
    }

    /// The answer alone.
    pub fn into_answer(self) -> R {
        self.answer
    }

    /// The same with what is made of the answer.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn try_map<S>(
        self,
        make: impl FnOnce(R) -> Result<S, QmpError>,
    ) -> Result<WithStop<S>, QmpError> {
        Ok(WithStop {
            answer: make(self.answer)?,
            stop: self.stop,
        })
    }
}

fn out_of_time(in_the_way: &PatchError, stop: &StopReport) -> QmpError {
    let text = format!("nothing was changed: {}", refusal(in_the_way));
    QmpError::new(Reason::Deadline, text).and(&stop.told())
}

impl Patching {
    /// Nothing is opened yet. No look at the guest will go beyond `bounds`.
    #[must_use]
    pub fn new(machine: Machine, bounds: Bounds) -> Self {
        Self {
            machine,
            bounds,
            state: Arc::default(),
        }
    }

    /// The guest's kernel, opened now if it has not been.
    ///
    /// # Errors
    /// [`Reason::Io`] when its file cannot be read or understood.
    pub fn kernel(&self) -> Result<Arc<Kernel>, QmpError> {
        self.machine
            .kernel()
            .map_err(|error| QmpError::new(Reason::Io, error.to_string()))
    }

    /// The guest's RAM, which changes while it is read.
    #[must_use]
    pub fn ram(&self) -> GuestRam {
        self.machine.ram().clone()
    }

    /// Which of the guests this is that the machine has run, one after the other.
    pub(super) fn incarnation(&self) -> u64 {
        self.machine.incarnation()
    }

    /// Tells clients that want to know.
    pub(super) fn tell(&self, name: &'static str, data: serde_json::Value) {
        self.machine.announce(&Event::Own { name, data });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works with the patcher, without the guest.
    ///
    /// # Errors
    /// Those of [`Patching::kernel`], and of `work`.
    pub fn with<R>(
        &self,
        work: impl FnOnce(&mut Patcher) -> Result<R, PatchError>,
    ) -> Result<R, QmpError> {
        let kernel = self.kernel()?;
        let mut state = self.lock();
        let patcher = self.current(&mut state, kernel)?;
        work(patcher).map_err(|error| refusal(&error))
    }

    /// Does what the arena needs and what can be done while the guest runs.
    pub fn get_arena_ready(&self) {
        self.machine.get_block_ready(BLOCK);
    }

    /// Works with the patcher on the stopped guest, again and again until it succeeds, is refused
    /// for good, the deadline passes, or nobody waits for the answer any more.
    ///
    /// # Errors
    /// [`Reason::Deadline`] names who stood in the way last; refusals of `work` as they are. The
    /// guest runs on, unchanged.
    pub fn stopped<R>(
        &self,
        context: &Context,
        command: &'static str,
        within: Duration,
        work: impl FnMut(&mut Patcher, &mut dyn StoppedGuest) -> Result<R, PatchError>,
    ) -> Result<WithStop<R>, QmpError> {
        let wanted = || !context.peer.is_gone();
        self.stopped_while(&wanted, context, command, within, work)
    }

    /// The same for what has to be done whether or not somebody waits for it.
    ///
    /// # Errors
    /// As [`Patching::stopped`].
    pub(super) fn stopped_at_last<R>(
        &self,
        context: &Context,
        command: &'static str,
        within: Duration,
        work: impl FnMut(&mut Patcher, &mut dyn StoppedGuest) -> Result<R, PatchError>,
    ) -> Result<WithStop<R>, QmpError> {
        self.stopped_while(&|| true, context, command, within, work)
    }

    fn stopped_while<R>(
        &self,
        wanted: &dyn Fn() -> bool,
        context: &Context,
        command: &'static str,
        within: Duration,
        mut work: impl FnMut(&mut Patcher, &mut dyn StoppedGuest) -> Result<R, PatchError>,
    ) -> Result<WithStop<R>, QmpError> {
        let kernel = self.kernel()?;
        // Opening the kernel's file, once, is not time in which the guest could have been stopped.
        let begun = Instant::now();
        let deadline = begun + within;
        let mut pause = FIRST_PAUSE;
        let mut turn = TURN;
        let mut stop = StopReport::default();
        let mut in_the_way = None;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let tried = {
                let mut state = self.lock();
                let patcher = self.current(&mut state, kernel.clone())?;
                self.stop_and(patcher, left.min(turn).max(FIRST_PAUSE), &mut work)
            };
            let (result, times) = match (tried, &in_the_way) {
                (Ok(tried), _) => tried,
                (Err(error), _) if error.is_late() && wanted() && left > turn => {
                    if !matches!(error, StopError::Busy { .. }) {
                        // A vCPU that is slow to stop would begin anew at each turn.
                        turn = within;
                    }
                    thread::sleep(LONGEST_PAUSE);
                    continue;
                }
                // It would have been the last try: what stood in the way before says more.
                (Err(error), Some(earlier)) if error.is_late() => {
                    return Err(out_of_time(earlier, &stop));
                }
                (Err(error), _) => return Err(error.after(begun.elapsed()).into()),
            };
            stop.add(times);
            context.services.record_stop(StopRecord {
                command,
                to_stopped: times.to_stopped,
                stalled: Some(times.stalled),
            });
            let error = match result {
                Ok(answer) => return Ok(WithStop { answer, stop }),
                Err(error) => error,
            };
            if !error.passes() {
                return Err(refusal(&error).and(&stop.told()));
            }
            if !wanted() {
                return Err(QmpError::new(
                    Reason::Cancelled,
                    "nobody waits for the answer",
                ));
            }
            if Instant::now() + pause >= deadline {
                return Err(out_of_time(&error, &stop));
            }
            // Who only waits can wait until the guest has run for a while.
            let pause_at_least = match error {
                PatchError::Waiting { .. } => times.stalled * RUN_PER_STOP,
                _ => Duration::ZERO,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            thread::sleep(pause.max(pause_at_least).min(left));
            // A lock that is taken again and again is free for short moments only.
            let longest = match error {
                PatchError::Busy(_) => LONGEST_PAUSE / 5,
                _ => LONGEST_PAUSE,
            };
            pause = (pause * 2).min(longest);
            in_the_way = Some(error);
        }
    }

    /// Works with the patcher on the stopped guest, and tells clients what was found to be gone.
    fn stop_and<R>(
        &self,
        patcher: &mut Patcher,
        within: Duration,
        work: impl FnOnce(&mut Patcher, &mut dyn StoppedGuest) -> Result<R, PatchError>,
    ) -> Result<(Result<R, PatchError>, StopTimes), StopError> {
        let done = self
            .machine
            .with_stopped(within, |guest| work(patcher, guest));
        for unloaded in patcher.take_unloaded() {
            self.announce_lost(&unloaded.why, &unloaded.changes);
        }
        if let Ok((Err(PatchError::Gone { why, lost }), _)) = &done {
            self.announce_gone(why, lost);
        }
        done
    }

    /// Looks at what is in the guest while it runs.
    ///
    /// # Errors
    /// A [`QmpError`] with the patcher's reason; [`Reason::Refused`] when there is no guest any more.
    pub(super) fn peek<R>(
        &self,
        look: impl FnOnce(&Patcher, &dyn GuestMemory) -> Result<R, PatchError>,
    ) -> Result<R, QmpError> {
        let memory = self.machine.memory()?;
        self.with(|patcher| look(patcher, &memory))
    }

    /// The same for nobody who waits: until it succeeds, is refused for good, or the machine is
    /// another one.
    ///
    /// # Errors
    /// As [`Patching::stopped`], without a deadline.
    pub fn persist<R>(
        &self,
        mut work: impl FnMut(&mut Patcher, &mut dyn StoppedGuest) -> Result<R, PatchError>,
    ) -> Result<R, QmpError> {
        let kernel = self.kernel()?;
        let incarnation = self.machine.incarnation();
        let mut pause = FIRST_PAUSE;
        loop {
            let tried = {
                let mut state = self.lock();
                if self.machine.incarnation() != incarnation {
                    return Err(StopError::Ended.into());
                }
                let patcher = self.current(&mut state, kernel.clone())?;
                self.stop_and(patcher, LOOK_DEADLINE, &mut work)
            };
            let stalled = match tried {
                Ok((Ok(answer), _)) => return Ok(answer),
                Ok((Err(error), times)) => {
                    if !error.passes() {
                        return Err(refusal(&error));
                    }
                    times.stalled
                }
                Err(StopError::Ended) => return Err(StopError::Ended.into()),
                Err(_) => Duration::ZERO,
            };
            thread::sleep(pause.max(stalled * RUN_PER_STOP).min(LOOK_EVERY));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// The patcher for this incarnation of the machine.
    fn current<'s>(
        &self,
        state: &'s mut State,
        kernel: Arc<Kernel>,
    ) -> Result<&'s mut Patcher, QmpError> {
        let incarnation = self.machine.incarnation();
        if state.incarnation != incarnation {
            state.incarnation = incarnation;
            self.forget(state);
        }
        match &mut state.patcher {
            Some(patcher) => Ok(patcher),
            none => {
                let mut patcher = Patcher::new(kernel)
                    .map_err(|error| QmpError::new(Reason::Refused, error.to_string()))?;
                patcher.set_bounds(self.bounds);
                Ok(none.insert(patcher))
            }
        }
    }

    /// After a reset nothing of ours is in the guest: its memory was cleared, its blocks are gone.
    fn forget(&self, state: &mut State) {
        let Some(patcher) = &mut state.patcher else {
            return;
        };
        let why = "the machine was reset";
        let lost = patcher.forget(why).ids();
        if !lost.is_empty() {
            self.announce_gone(why, &lost);
        }
    }

    /// Notices a reset, or a kernel that replaced itself (kexec), and frees what nobody is in any
    /// more. Tells when to look again.
    pub(super) fn look(&self) -> Duration {
        let mut guard = self.lock();
        let state = &mut *guard;
        let incarnation = self.machine.incarnation();
        if state.incarnation != incarnation {
            state.incarnation = incarnation;
            self.forget(state);
        }
        let Some(patcher) = &mut state.patcher else {
            return LOOK_EVERY;
        };
        let unfinished = patcher.unfinished_tracepoints();
        state.orphans.retain(|id| unfinished.contains(id));
        let ready = match self.machine.memory() {
            Ok(memory) => {
                let done = |id: &&EntryId| patcher.tracepoint_ready(&memory, **id) == Ok(true);
                state.orphans.iter().find(done).copied()
            }
            Err(_) => None,
        };
        let collect = patcher.has_to_collect() || patcher.has_left_marks();
        if !collect && !patcher.has_applied() {
            return LOOK_EVERY;
        }
        let looked = self.stop_and(patcher, LOOK_DEADLINE, |patcher, guest| {
            if let Some(id) = ready {
                // What the guest refused is not there, as nobody waits for it.
                let _ = patcher.finish_tracepoint(guest, id, &ourselves());
            }
            if collect {
                patcher.collect(guest)
            } else {
                patcher.locate(guest).map(|_| Collected::default())
            }
        });
        let again = patcher.has_to_collect();
        drop(guard);
        if let Ok((Ok(collected), times)) = looked {
            self.announce_freed(&collected);
            if again {
                return (times.stalled * RUN_PER_STOP).clamp(LOOK_SOONEST, LOOK_EVERY);
            }
        }
        LOOK_EVERY
    }

    /// The thread that calls [`Patching::look`].
    pub(super) fn wake_by(&self, looking: Thread) {
        self.lock().looking = Some(looking);
    }

    /// Something was unhooked: tells what was freed at once, and has the rest looked after.
    pub fn retired(&self, collected: &Collected) {
        self.announce_freed(collected);
        if let Some(looking) = self
            .lock()
            .looking
            .as_ref()
            .filter(|_| !collected.retired.is_empty())
        {
            looking.unpark();
        }
    }

    /// Nobody waits any more for what the guest is at.
    pub(super) fn see_to_tracepoints(&self) {
        let mut state = self.lock();
        if let Some(patcher) = &state.patcher {
            state.orphans = patcher.unfinished_tracepoints();
        }
    }

    fn announce_freed(&self, collected: &Collected) {
        if !collected.freed.is_empty() {
            self.tell(
                "TRAMPOLINE_FREED",
                serde_json::json!({ "changes": collected.freed }),
            );
        }
    }

    fn announce_gone(&self, why: &str, changes: &[EntryId]) {
        self.machine.breakpoints_gone();
        self.announce_lost(why, changes);
    }

    fn announce_lost(&self, why: &str, changes: &[EntryId]) {
        self.tell(
            "PATCHES_GONE",
            serde_json::json!({ "reason": why, "changes": changes }),
        );
    }
}

/// Who sees to what nobody waits for.
fn ourselves() -> Origin {
    Origin {
        who: "stillpoint".into(),
        at_ms: super::commands::now_ms(),
    }
}

/// How often the guest is looked at while something of ours is in it.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How soon it is looked at again while somebody is in retired code.
const LOOK_SOONEST: Duration = Duration::from_millis(10);
/// How many times as long as it stood still the guest runs before somebody looks again who only
/// waits: it stands still for at most 1 % of the time.
const RUN_PER_STOP: u32 = 99;
/// How long [`Patching::look`] waits for the guest to stop.
const LOOK_DEADLINE: Duration = Duration::from_millis(200);
