//! The machine: guest memory, vCPU threads, boot, interrupts, and the ways in which it ends.
//!
//! [`Machine`] is the handle that everybody else has. [`Machine::run`] is the supervisor: it builds
//! one board after the other (a reset builds a new one) until the guest ends.

mod acpi;
mod autopsy;
mod blocks;
mod board;
mod boot;
mod breakpoints;
mod bus;
mod console;
mod cpuid;
mod event;
mod gate;
mod hold;
mod input;
mod kernel_file;
mod layout;
mod memory;
mod refused;
mod serial;
mod shared;
mod start;
mod stop;
mod supervisor;
mod terminal;
mod vcpu;
mod vcpu_state;
mod watch;

use std::sync::Arc;
use std::time::Duration;

pub use boot::{BootSource, KernelKind, NamedFile, check_kernel};
pub use event::{Event, EventSink, ResetCause, ShutdownCause};
pub use hold::{
    EndOfHold, HOLD_AT_MOST, HOLD_USUALLY, HoldEnd, HoldError, HoldInfo, HoldPhase, HoldRequest,
    HoldSite, HoldTicket, Settle,
};
pub use kernel_file::KernelFileError;
pub use memory::{GuestRam, RamRegion};
pub use refused::RefusedWrite;
pub use serial::SerialTarget;
pub use start::StartError;
pub use stop::{Memory, StopError, StopTimes, Stopped};
pub use supervisor::{End, preflight};
pub use vcpu_state::CpuState;

use shared::Shared;
pub use terminal::restore as restore_terminal;

/// What to build.
#[derive(Debug)]
pub struct MachineConfig {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// What to boot.
    pub boot: BootSource,
    /// Where the serial port leads to.
    pub serial: SerialTarget,
    /// A reset ends the machine.
    pub no_reboot: bool,
    /// Show VMX or SVM to the guest.
    pub nested: bool,
}

/// What the guest is doing, in the words of QMP's `query-status`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// The machine is being put together; no vCPU has run yet.
    Prelaunch,
    /// vCPUs run.
    Running,
    /// A client stopped the guest.
    Paused,
    /// The guest powered off or was told to quit; the process is about to end.
    Shutdown,
    /// The guest kernel panicked.
    GuestPanicked,
    /// KVM reported an error that the machine cannot go on from.
    InternalError,
}

/// One vCPU as `query-cpus-fast` shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CpuInfo {
    /// Index, which is also its APIC id.
    pub index: u32,
    /// Linux thread id of its thread.
    pub thread_id: i32,
}

/// A guest that goes on when this is dropped. A caller may send its answer first: where vCPUs have
/// to share a host CPU with it, they would run before.
#[must_use]
pub struct Resumed {
    /// How long it was stopped; zero when it was not.
    pub stalled: Duration,
    _let_go: Option<shared::LetGo>,
}

impl Resumed {
    /// Nothing is held any more.
    pub fn after(stalled: Duration) -> Self {
        Self {
            stalled,
            _let_go: None,
        }
    }
}

/// A handle on the machine; clones share it.
#[derive(Clone)]
pub struct Machine {
    shared: Arc<Shared>,
}

impl Machine {
    /// Checks the configuration and reserves what the machine needs; nothing runs yet.
    ///
    /// # Errors
    /// [`StartError`] names the remedy.
    pub fn new(config: MachineConfig) -> Result<Self, StartError> {
        Ok(Self {
            shared: Arc::new(Shared::new(config)?),
        })
    }

    /// Boots the guest and stays until it has ended.
    ///
    /// # Errors
    /// [`StartError`] when the machine cannot be put together.
    pub fn run(&self) -> Result<End, StartError> {
        supervisor::run(&self.shared)
    }

    /// What the guest is doing now.
    #[must_use]
    pub fn run_state(&self) -> RunState {
        self.shared.run_state()
    }

    /// Stops the guest on behalf of a client. It stays stopped until [`Machine::cont`]. Stopping a
    /// stopped guest is fine and takes no time.
    ///
    /// # Errors
    /// [`StopError`] names the vCPU that did not come by the deadline; the guest then runs on.
    pub fn stop(&self, deadline: Duration) -> Result<StopTimes, StopError> {
        self.shared.client_stop(deadline)
    }

    /// Lets a guest go on that [`Machine::stop`] stopped, as soon as the answer is dropped.
    /// Continuing a running guest is fine.
    ///
    /// # Errors
    /// [`StopError::Ended`] when the guest has ended or panicked.
    pub fn cont(&self) -> Result<Resumed, StopError> {
        self.shared.client_cont()
    }

    /// Ends the machine: the process exits with status 0.
    pub fn quit(&self) {
        self.shared.ask(supervisor::Wish::Quit);
    }

    /// Presses the ACPI power button.
    pub fn power_button(&self) {
        self.shared.press_power_button();
    }

    /// Resets the machine: it starts again from its kernel.
    pub fn reset(&self) {
        self.shared.ask(supervisor::Wish::Reset);
    }

    /// A signal asked this process to end: the guest is asked to power off, and made to if it does
    /// not in time.
    pub fn signal(&self) {
        self.shared.ask(supervisor::Wish::Signal);
    }

    /// The vCPUs and their threads.
    #[must_use]
    pub fn cpus(&self) -> Vec<CpuInfo> {
        self.shared.cpus()
    }

    /// Guest RAM, for reading. While the guest runs the answer may be torn: mark it so.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        self.shared.ram()
    }

    /// All memory of the guest, ours beside its RAM too, for reading. While the guest runs the answer
    /// may be torn: mark it so.
    ///
    /// # Errors
    /// [`StopError::Ended`] when there is no guest any more.
    pub fn memory(&self) -> Result<Memory, StopError> {
        self.shared.memory()
    }

    /// What was booted.
    #[must_use]
    pub fn boot_source(&self) -> &BootSource {
        self.shared.boot_source()
    }

    /// The kernel that was booted, opened now if it has not been: that takes a good part of a
    /// second and tens of megabytes.
    ///
    /// # Errors
    /// [`KernelFileError`] when its file cannot be read or understood.
    pub fn kernel(&self) -> Result<Arc<patcher::Kernel>, KernelFileError> {
        self.shared.kernel()
    }

    /// The kernel for a single look: opened as by [`Machine::kernel`], but forgotten with the answer
    /// if nobody else has it.
    ///
    /// # Errors
    /// As [`Machine::kernel`].
    pub fn borrow_kernel(&self) -> Result<Arc<patcher::Kernel>, KernelFileError> {
        self.shared.borrow_kernel()
    }

    /// How many times the machine has been reset; what was found out about the guest's kernel
    /// holds for one incarnation only.
    #[must_use]
    pub fn incarnation(&self) -> u64 {
        self.shared.incarnation()
    }

    /// Stops the guest, runs `work`, and lets go on exactly what it stopped.
    ///
    /// # Errors
    /// [`StopError`] when the guest could not be stopped in time; `work` then did not run.
    pub fn with_stopped<R>(
        &self,
        deadline: Duration,
        work: impl FnOnce(&mut Stopped<'_>) -> R,
    ) -> Result<(R, StopTimes), StopError> {
        self.shared.with_stopped(deadline, work)
    }

    /// Holds one vCPU hard, where it is. The hold ends by itself when its limit is over, with the event
    /// VCPU_RELEASED.
    ///
    /// # Errors
    /// [`HoldError`]; the vCPU runs as before.
    pub fn hold_vcpu(&self, vcpu: u32, limit: Duration) -> Result<HoldInfo, HoldError> {
        self.shared.hold_vcpu(vcpu, limit)
    }

    /// Whether a vCPU can be held, as far as other holds are concerned.
    ///
    /// # Errors
    /// [`HoldError::NoSuchVcpu`], [`HoldError::AlreadyHeld`].
    pub fn can_hold(&self, vcpu: u32) -> Result<(), HoldError> {
        self.shared.can_hold(vcpu)
    }

    /// Begins a hold whose change is in the guest: in the stop in which that was made. Its end is seen
    /// to by [`Machine::keep_hold`].
    ///
    /// # Errors
    /// [`HoldError`]: there is another hold, or the guest has ended.
    pub fn begin_hold(&self, request: HoldRequest) -> Result<HoldTicket, HoldError> {
        self.shared.begin_hold(request)
    }

    /// Sees to the end of a hold, and tells of its turns by events. `settle` is called before each.
    ///
    /// # Errors
    /// [`HoldError::NoThread`]; the hold is then over.
    pub fn keep_hold(&self, ticket: &HoldTicket, settle: Settle) -> Result<(), HoldError> {
        self.shared.keep_hold(ticket, settle)
    }

    /// How far a hold is. `None` when it is over.
    #[must_use]
    pub fn hold_info(&self, ticket: &HoldTicket) -> Option<HoldInfo> {
        self.shared.hold_info(ticket)
    }

    /// A breakpoint was set in the guest, in this stop.
    pub fn breakpoint_set(&self, breakpoint: &patcher::patch::Breakpoint) {
        if let Some(board) = self.shared.board() {
            board.breakpoints().add(breakpoint);
        }
    }

    /// Somebody looked after a breakpoint, in this stop.
    pub fn breakpoint_settled(
        &self,
        id: patcher::patch::EntryId,
        settled: &patcher::patch::Settled,
    ) {
        if let Some(board) = self.shared.board() {
            board.breakpoints().settled(id, settled);
        }
    }

    /// The kernel is gone that breakpoints were in.
    pub fn breakpoints_gone(&self) {
        if let Some(board) = self.shared.board() {
            board.breakpoints().clear();
        }
    }

    /// Waits until the vCPU of a hold stands still, or the hold is over; `None`: neither in this time.
    #[must_use]
    pub fn wait_held(
        &self,
        ticket: &HoldTicket,
        at_most: Duration,
    ) -> Option<Result<HoldInfo, EndOfHold>> {
        self.shared.wait_held(ticket, at_most)
    }

    /// Ends a hold that nobody wants any more, if it is not over.
    pub fn give_up_hold(&self, ticket: &HoldTicket) {
        self.shared.give_up_hold(ticket);
    }

    /// Lets a held vCPU go on, or takes back what waits for it.
    ///
    /// # Errors
    /// [`HoldError::NoSuchVcpu`], [`HoldError::NotHeld`], [`StopError::Ended`].
    pub fn release_vcpu(&self, vcpu: u32) -> Result<EndOfHold, HoldError> {
        self.shared.release_vcpu(vcpu)
    }

    /// The holds that are not over, by vCPU.
    #[must_use]
    pub fn holds(&self) -> Vec<HoldInfo> {
        self.shared.gate.holds()
    }

    /// Gets memory ready for a block of `len` bytes of code, which a stopped guest would wait for.
    pub fn get_block_ready(&self, len: u64) {
        self.shared.get_block_ready(len);
    }

    /// Adds a receiver of events. It is called on the thread on which the event happens and must
    /// return at once.
    pub fn subscribe(&self, sink: EventSink) {
        self.shared.subscribe(sink);
    }

    /// Tells everybody who listens.
    pub fn announce(&self, event: &Event) {
        self.shared.announce(event);
    }
}
