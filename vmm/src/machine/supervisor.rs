//! The life of the machine: what is checked before it, and what follows from each way to end.

use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::autopsy;
use super::board::{Board, require_capabilities};
use super::event::{Event, ResetCause, ShutdownCause};
use super::shared::Shared;
use super::start::StartError;
use super::stop::Stopped;
use super::vcpu::{self, Ending};
use super::watch;
use super::{MachineConfig, RunState, check_kernel};

/// How the machine ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset and is not to be started again.
    Reset,
    /// A client, the user or a signal ended it.
    Quit,
    /// The guest kernel panicked; what it said last.
    Panicked(String),
    /// The guest died of a triple fault.
    TripleFault,
    /// The host could not go on.
    Error(String),
}

/// What the supervisor is asked to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Wish {
    Quit,
    Reset,
    Signal,
    /// By a vCPU of this generation of vCPU threads.
    Ended(u64, Ending),
}

/// A guest that was asked to power off by a signal has this long to do it.
const SIGNAL_PATIENCE: Duration = Duration::from_secs(5);
/// Output of the guest is written for this long after it ended.
const DRAIN_PATIENCE: Duration = Duration::from_millis(500);
/// While a reset waits for a command that works on the stopped guest (a dump, for instance), it
/// looks this often whether the machine is to end instead.
const CLAIM_PATIENCE: Duration = Duration::from_secs(1);
/// The least memory in which any of the kernels we know gets through its first lines.
const MIN_MEMORY_MIB: u64 = 64;

/// Checks what can be checked before anything starts.
///
/// # Errors
/// [`StartError`] names the remedy.
pub fn preflight(config: &MachineConfig) -> Result<Kvm, StartError> {
    check_kernel(&config.boot.kernel)?;
    let kvm = open_kvm()?;
    let max = u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX);
    if config.cpus == 0 || config.cpus > max {
        return Err(StartError::Cpus {
            given: config.cpus,
            max,
        });
    }
    if config.memory < MIN_MEMORY_MIB << 20 {
        return Err(StartError::TooLittleMemory {
            given: config.memory >> 20,
            needed: MIN_MEMORY_MIB,
        });
    }
    Ok(kvm)
}

fn open_kvm() -> Result<Kvm, StartError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => StartError::NoKvm,
        libc::EACCES | libc::EPERM => StartError::KvmPermission,
        _ => StartError::Kvm {
            what: "opening /dev/kvm",
            source: error.into(),
        },
    })?;
    if !cpu_virtualises() {
        return Err(StartError::NoHardware);
    }
    require_capabilities(&kvm)?;
    Ok(kvm)
}

/// Whether the CPU has VMX or SVM; a KVM without either emulates ring 0 and cannot run a stock
/// kernel.
fn cpu_virtualises() -> bool {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    info.lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| {
            line.split_whitespace()
                .any(|flag| flag == "vmx" || flag == "svm")
        })
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Runs incarnation after incarnation until the machine ends.
pub(super) fn run(shared: &Arc<Shared>) -> Result<End, StartError> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(|error| StartError::Host {
        what: "installing the kick signal",
        source: std::io::Error::from_raw_os_error(error.errno()),
    })?;
    if let Some(console) = shared
        .console
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .as_mut()
    {
        console.start_input(&shared.outbox, shared.clone())?;
    }
    watch::start(Arc::downgrade(shared)).map_err(|source| StartError::Host {
        what: "starting the watching thread",
        source,
    })?;
    let result = incarnations(shared);
    shared.retire();
    shared.outbox.drain(DRAIN_PATIENCE);
    shared
        .console
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    result
}

/// Lives one incarnation after the other.
fn incarnations(shared: &Arc<Shared>) -> Result<End, StartError> {
    // A signal that asked for the end holds across a reset.
    let mut patience_ends = None;
    loop {
        // Memory is cleared for the next board: nobody may be at work on it for the last one.
        let claim = loop {
            match shared.claim(CLAIM_PATIENCE) {
                Ok(claim) => break claim,
                Err(_) if to_end(shared) => return Ok(End::Quit),
                Err(_) => {}
            }
        };
        let board = shared.build_board()?;
        let generation = shared.gate.seat(board.vcpus().len());
        shared.install(board.clone(), generation);
        drop(claim);
        if let Some(end) = live(shared, &board, generation, &mut patience_ends)? {
            return Ok(end);
        }
    }
}

/// Whether somebody asked for the end while there was no guest.
fn to_end(shared: &Shared) -> bool {
    let inbox = shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
    inbox
        .try_iter()
        .any(|wish| matches!(wish, Wish::Quit | Wish::Signal))
}

/// Lets one incarnation run. `None` asks for the next one.
fn live(
    shared: &Arc<Shared>,
    board: &Arc<Board>,
    generation: u64,
    patience_ends: &mut Option<Instant>,
) -> Result<Option<End>, StartError> {
    let threads = start_vcpus(shared, board, generation)?;
    let verdict = wait(shared, generation, patience_ends);

    shared.gate.close();
    for vcpu in board.vcpus() {
        vcpu.kick();
    }
    for thread in threads {
        // A vCPU thread that panicked has been reported by the panic hook.
        let _ = thread.join();
    }
    let verdict = name_panic(shared, board, verdict);
    Ok(conclude(shared, verdict))
}

fn start_vcpus(
    shared: &Arc<Shared>,
    board: &Arc<Board>,
    generation: u64,
) -> Result<Vec<JoinHandle<()>>, StartError> {
    let mut threads = Vec::new();
    for (index, slot) in board.vcpus().iter().enumerate() {
        let (shared, board) = (shared.clone(), board.clone());
        let thread = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(256 * 1024)
            .spawn(move || vcpu::run(&shared.gate, generation, &board, index, &*shared))
            .map_err(|source| StartError::Host {
                what: "starting a vCPU thread",
                source,
            })?;
        slot.set_thread(&thread);
        threads.push(thread);
    }
    Ok(threads)
}

/// Waits for something that ends the incarnation.
fn wait(shared: &Shared, generation: u64, patience_ends: &mut Option<Instant>) -> Wish {
    let inbox = shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let wish = match patience_ends {
            None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(end) => inbox.recv_timeout(end.saturating_duration_since(Instant::now())),
        };
        match wish {
            Ok(Wish::Signal) => {
                let again = patience_ends.is_some();
                if again || !shared.press_power_button() {
                    return Wish::Signal;
                }
                *patience_ends = Some(Instant::now() + SIGNAL_PATIENCE);
            }
            // From the guest before a reset.
            Ok(Wish::Ended(from, _)) if from != generation => {}
            Ok(wish) => return wish,
            Err(_) => return Wish::Signal,
        }
    }
}

/// A guest that reset or died may have panicked before: its memory still says so.
fn name_panic(shared: &Shared, board: &Board, wish: Wish) -> Wish {
    if !matches!(wish, Wish::Ended(_, Ending::Reset | Ending::TripleFault)) {
        return wish;
    }
    let found = Stopped::new(board)
        .ok()
        .zip(shared.borrow_kernel().ok())
        .and_then(|(stopped, kernel)| autopsy::examine(&stopped, &kernel));
    let Wish::Ended(generation, _) = wish else {
        return wish;
    };
    found.map_or(wish, |panic| Wish::Ended(generation, Ending::Panic(panic)))
}

/// Announces what happened and decides whether the machine starts again.
fn conclude(shared: &Shared, wish: Wish) -> Option<End> {
    let (state, cause, end) = match wish {
        Wish::Reset => {
            shared.announce(&Event::Reset(ResetCause::HostQmpSystemReset));
            return None;
        }
        Wish::Ended(_, Ending::Reset) if !shared.config().no_reboot => {
            shared.announce(&Event::Reset(ResetCause::GuestReset));
            return None;
        }
        Wish::Ended(_, Ending::Reset) => {
            (RunState::Shutdown, ShutdownCause::GuestReset, End::Reset)
        }
        Wish::Quit => (RunState::Shutdown, ShutdownCause::HostQmpQuit, End::Quit),
        Wish::Signal => (RunState::Shutdown, ShutdownCause::HostSignal, End::Quit),
        Wish::Ended(_, Ending::PowerOff) => (
            RunState::Shutdown,
            ShutdownCause::GuestShutdown,
            End::PowerOff,
        ),
        Wish::Ended(_, Ending::Panic(panic)) => {
            shared.announce(&Event::GuestPanicked(panic.message.clone()));
            for line in &panic.last_lines {
                tracing::error!(target: "guest", "{line}");
            }
            (
                RunState::GuestPanicked,
                ShutdownCause::GuestPanic,
                End::Panicked(panic.message),
            )
        }
        Wish::Ended(_, Ending::TripleFault) => (
            RunState::Shutdown,
            ShutdownCause::GuestPanic,
            End::TripleFault,
        ),
        Wish::Ended(_, Ending::Error(what)) => (
            RunState::InternalError,
            ShutdownCause::HostError,
            End::Error(what),
        ),
    };
    shared.set_run_state(state);
    shared.announce(&Event::Shutdown(cause));
    Some(end)
}
