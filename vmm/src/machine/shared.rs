//! The state behind [`super::Machine`]: stops, events, and the board that is current.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use patcher::Kernel;

use super::board::{Board, Parts};
use super::console::{Console, Keyboard};
use super::event::{Event, EventSink};
use super::gate::{Claim, Gate, deadline_in};
use super::kernel_file::{KernelFile, KernelFileError};
use super::memory::GuestRam;
use super::refused::RefusedWrite;
use super::serial::Outbox;
use super::start::StartError;
use super::stop::{Memory, StopError, StopTimes, Stopped, TELL_CLOCK_AFTER, tell_clock};
use super::supervisor::{Wish, preflight};
use super::vcpu::{Ending, Reports};
use super::{BootSource, CpuInfo, MachineConfig, Resumed, RunState};

/// What changes while the machine lives.
struct State {
    run_state: RunState,
    /// A client stopped the guest at this time.
    stopped_since: Option<Instant>,
    board: Option<Arc<Board>>,
    incarnation: u64,
    /// There was a board, and there will be none any more.
    over: bool,
}

pub(super) struct Shared {
    kvm: Kvm,
    ram: GuestRam,
    config: MachineConfig,
    kernel: KernelFile,
    pub(super) gate: Gate,
    state: Mutex<State>,
    sinks: Mutex<Vec<EventSink>>,
    wishes: Sender<Wish>,
    pub(super) inbox: Mutex<Receiver<Wish>>,
    pub(super) outbox: Outbox,
    pub(super) console: Mutex<Option<Console>>,
}

/// Refused writes are counted in full, but only so many of them are announced.
const ANNOUNCED_WRITES: u64 = 100;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(config: MachineConfig) -> Result<Self, StartError> {
        let kvm = preflight(&config)?;
        let ram = GuestRam::reserve(config.memory)?;
        let outbox = Outbox::default();
        let console = Console::open(&config.serial, &outbox)?;
        let (wishes, inbox) = channel();
        Ok(Self {
            kvm,
            ram,
            config,
            kernel: KernelFile::default(),
            gate: Gate::default(),
            state: Mutex::new(State {
                run_state: RunState::Prelaunch,
                stopped_since: None,
                board: None,
                incarnation: 0,
                over: false,
            }),
            sinks: Mutex::default(),
            wishes,
            inbox: Mutex::new(inbox),
            outbox,
            console: Mutex::new(Some(console)),
        })
    }

    pub(super) fn config(&self) -> &MachineConfig {
        &self.config
    }

    pub(super) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    pub(super) fn memory(&self) -> Result<Memory, StopError> {
        let board = self.board().ok_or(StopError::Ended)?;
        Ok(Memory::new(board))
    }

    pub(super) fn boot_source(&self) -> &BootSource {
        &self.config.boot
    }

    pub(super) fn kernel(&self) -> Result<Arc<Kernel>, KernelFileError> {
        self.kernel.get(&self.config.boot.kernel)
    }

    /// The kernel for a single look: what nobody else uses is forgotten again.
    pub(super) fn borrow_kernel(&self) -> Result<Arc<Kernel>, KernelFileError> {
        self.kernel.borrow(&self.config.boot.kernel)
    }

    pub(super) fn incarnation(&self) -> u64 {
        lock(&self.state).incarnation
    }

    pub(super) fn run_state(&self) -> RunState {
        lock(&self.state).run_state
    }

    pub(super) fn set_run_state(&self, to: RunState) {
        lock(&self.state).run_state = to;
    }

    /// Builds a board over cleared memory.
    pub(super) fn build_board(&self) -> Result<Arc<Board>, StartError> {
        self.ram.clear().map_err(|source| StartError::Host {
            what: "clearing guest memory",
            source,
        })?;
        let parts = Parts {
            kvm: &self.kvm,
            ram: &self.ram,
            boot: &self.config.boot,
            cpus: self.config.cpus,
            nested: self.config.nested,
            console: self.outbox.clone(),
        };
        Board::new(&parts).map(Arc::new)
    }

    /// Makes `board` the current one, whose vCPUs have the seats of `generation`.
    pub(super) fn install(&self, board: Arc<Board>, generation: u64) {
        let mut state = lock(&self.state);
        state.incarnation = generation;
        state.run_state = match state.stopped_since {
            Some(_) => RunState::Paused,
            None => RunState::Running,
        };
        state.board = Some(board);
    }

    /// There is no board any more, and there will be none.
    pub(super) fn retire(&self) {
        let mut state = lock(&self.state);
        state.board = None;
        state.over = true;
        drop(state);
        self.gate.retire();
    }

    pub(super) fn board(&self) -> Option<Arc<Board>> {
        lock(&self.state).board.clone()
    }

    /// The current board, and the incarnation that it is.
    pub(super) fn current(&self) -> Option<(Arc<Board>, u64)> {
        let state = lock(&self.state);
        state.board.clone().map(|board| (board, state.incarnation))
    }

    pub(super) fn get_block_ready(&self, len: u64) {
        if let Some(board) = self.board() {
            board.blocks().get_ready(len);
        }
    }

    pub(super) fn cpus(&self) -> Vec<CpuInfo> {
        let board = self.board();
        let slots = board.iter().flat_map(|board| board.vcpus());
        (0..)
            .zip(slots)
            .map(|(index, slot)| CpuInfo {
                index,
                thread_id: slot.tid(),
            })
            .collect()
    }

    /// Stops the vCPUs of the board that is current, waiting for the next one during a reset.
    fn hold(&self, deadline: Instant) -> Result<(Arc<Board>, Instant), StopError> {
        loop {
            self.gate.wait_open(deadline);
            match self.try_hold(deadline) {
                Err(StopError::Ended) if Instant::now() < deadline && !self.is_over() => {
                    thread::yield_now();
                }
                held => return held,
            }
        }
    }

    /// Stops the vCPUs of the board that is current now, if there is one.
    fn try_hold(&self, deadline: Instant) -> Result<(Arc<Board>, Instant), StopError> {
        let (board, generation) = self.current().ok_or(StopError::Ended)?;
        let first_parked = self.gate.hold(generation, deadline, |index| {
            if let Some(slot) = board.vcpus().get(index) {
                slot.kick();
            }
        })?;
        Ok((board, first_parked))
    }

    /// There was a board, and there will be none any more.
    fn is_over(&self) -> bool {
        lock(&self.state).over
    }

    pub(super) fn with_stopped<R>(
        &self,
        within: Duration,
        work: impl FnOnce(&mut Stopped<'_>) -> R,
    ) -> Result<(R, StopTimes), StopError> {
        let asked = Instant::now();
        let deadline = deadline_in(within);
        let (claim, was_running, (board, first_parked)) = loop {
            // The next board is built under a claim: ours must not be what it waits for.
            self.gate.wait_open(deadline);
            let claim = self.gate.claim(deadline)?;
            let was_running = !self.gate.held();
            match self.try_hold(deadline) {
                Ok(held) => break (claim, was_running, held),
                Err(StopError::Ended) if Instant::now() < deadline && !self.is_over() => {
                    drop(claim);
                    thread::yield_now();
                }
                Err(error) => return Err(error),
            }
        };
        let hold = Release(&self.gate);
        let to_stopped = asked.elapsed();
        let mut stopped = Stopped::new(&board)?;
        let result = work(&mut stopped);
        if first_parked.elapsed() > TELL_CLOCK_AFTER {
            stopped.tell_clock();
        }
        drop(stopped);
        let stalled = if was_running {
            first_parked.elapsed()
        } else {
            Duration::ZERO
        };
        drop(hold);
        drop(claim);
        Ok((
            result,
            StopTimes {
                to_stopped,
                stalled,
            },
        ))
    }

    pub(super) fn client_stop(&self, within: Duration) -> Result<StopTimes, StopError> {
        let asked = Instant::now();
        if lock(&self.state).stopped_since.is_some() {
            return Ok(StopTimes::default());
        }
        let (_, first_parked) = self.hold(deadline_in(within))?;
        let to_stopped = asked.elapsed();
        {
            let mut state = lock(&self.state);
            if state.stopped_since.is_some() {
                drop(state);
                self.gate.release();
                return Ok(StopTimes::default());
            }
            state.stopped_since = Some(first_parked);
            state.run_state = RunState::Paused;
        }
        self.announce(&Event::Stop);
        Ok(StopTimes {
            to_stopped,
            stalled: Duration::ZERO,
        })
    }

    /// Waits until nobody works on the stopped guest, and keeps it so.
    pub(super) fn claim(&self, within: Duration) -> Result<Claim<'_>, StopError> {
        self.gate.claim(deadline_in(within))
    }

    pub(super) fn client_cont(self: &Arc<Self>) -> Result<Resumed, StopError> {
        let board = self.board().ok_or(StopError::Ended)?;
        let since = lock(&self.state).stopped_since;
        let Some(since) = since else {
            return Ok(Resumed::after(Duration::ZERO));
        };
        // Every vCPU is parked by the client's own hold, unless another client lets go of it at this
        // moment: then there is nothing to tell.
        if let Ok(claim) = self.gate.claim(deadline_in(TELL_CLOCK_PATIENCE)) {
            for fd in board.vcpus().iter().filter_map(|vcpu| vcpu.try_lock()) {
                tell_clock(&fd);
            }
            drop(claim);
        }
        {
            let mut state = lock(&self.state);
            if state.stopped_since.take().is_none() {
                return Ok(Resumed::after(Duration::ZERO));
            }
            state.run_state = RunState::Running;
        }
        let let_go = LetGo(self.clone());
        self.announce(&Event::Resume);
        Ok(Resumed {
            stalled: since.elapsed(),
            _let_go: Some(let_go),
        })
    }

    pub(super) fn press_power_button(&self) -> bool {
        let Some(board) = self.board() else {
            return false;
        };
        let listens = board.bus().press_power_button(board.vm());
        self.announce(&Event::Powerdown);
        listens
    }

    pub(super) fn subscribe(&self, sink: EventSink) {
        lock(&self.sinks).push(sink);
    }

    pub(super) fn announce(&self, event: &Event) {
        for sink in lock(&self.sinks).iter() {
            sink(event);
        }
    }

    pub(super) fn ask(&self, wish: Wish) {
        // The supervisor is gone only when the machine has ended.
        let _ = self.wishes.send(wish);
    }
}

/// How long a resume waits for another operation before it goes on without telling the clock.
const TELL_CLOCK_PATIENCE: Duration = Duration::from_millis(100);

/// Releases a hold when dropped, also when the work panics.
struct Release<'a>(&'a Gate);

impl Drop for Release<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// As [`Release`], for a hold that outlives the call.
pub(super) struct LetGo(Arc<Shared>);

impl Drop for LetGo {
    fn drop(&mut self) {
        self.0.gate.release();
    }
}

impl Reports for Shared {
    fn ended(&self, generation: u64, ending: Ending) {
        self.ask(Wish::Ended(generation, ending));
    }

    fn write_refused(&self, write: RefusedWrite) {
        if write.count <= ANNOUNCED_WRITES {
            tracing::warn!(
                vcpu = write.vcpu,
                address = %write.address,
                count = write.count,
                "the guest tried to write the code arena"
            );
            self.announce(&Event::Own {
                name: "ARENA_WRITE_REFUSED",
                data: serde_json::to_value(write).unwrap_or_default(),
            });
        }
    }
}

impl Keyboard for Arc<Shared> {
    fn input(&self, bytes: &[u8]) -> usize {
        let permit = self.gate.device_permit();
        // Between two boards nobody takes anything.
        let taken = self.board().map_or(0, |board| board.serial_input(bytes));
        drop(permit);
        taken
    }

    fn leave(&self) {
        self.ask(Wish::Quit);
    }
}
