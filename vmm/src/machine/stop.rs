//! The guard that exists while every vCPU is parked, and what a stop costs.

use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use kvm_ioctls::VcpuFd;
use patcher::guest::{BlockKind, Gpa, GuestMemory, Gva, MemoryError, RamRange, StoppedGuest, Vcpu};
use vm_memory::{Bytes, GuestAddress};

use super::board::Board;
use super::vcpu_state::{self, CpuState};

/// How long a stop took.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StopTimes {
    /// From the request until every vCPU was parked.
    pub to_stopped: Duration,
    /// From the first vCPU that parked until all were let go: what the guest missed. Zero when
    /// the guest had been stopped before.
    pub stalled: Duration,
}

/// Why the guest could not be stopped or continued.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// A vCPU did not leave guest mode in time.
    #[error("vCPU {vcpu} did not stop within {} ms; the guest runs on", waited.as_millis())]
    Deadline {
        /// The vCPU that did not come.
        vcpu: u32,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A device did not finish what it was doing in time.
    #[error("a device was still busy after {} ms; the guest runs on", waited.as_millis())]
    DeviceDeadline {
        /// How long it was waited for.
        waited: Duration,
    },
    /// Another operation has the guest stopped.
    #[error(
        "another operation kept the guest stopped for {} ms: try again when it is done",
        waited.as_millis()
    )]
    Busy {
        /// How long it was waited for.
        waited: Duration,
    },
    /// There is nothing to stop any more.
    #[error("the guest has ended")]
    Ended,
    /// Registers could not be read.
    #[error("vCPU {vcpu}: {what}")]
    Kvm {
        /// The vCPU concerned.
        vcpu: u32,
        /// What KVM said.
        what: String,
    },
}

impl StopError {
    /// The same after several waits, which took so long together.
    #[must_use]
    pub fn after(self, waited: Duration) -> Self {
        match self {
            Self::Deadline { vcpu, .. } => Self::Deadline { vcpu, waited },
            Self::DeviceDeadline { .. } => Self::DeviceDeadline { waited },
            Self::Busy { .. } => Self::Busy { waited },
            other => other,
        }
    }

    /// It might have gone well with more time.
    #[must_use]
    pub const fn is_late(&self) -> bool {
        matches!(
            self,
            Self::Deadline { .. } | Self::DeviceDeadline { .. } | Self::Busy { .. }
        )
    }
}

/// Proof that every vCPU is parked; dropping it lets go on exactly what it stopped.
///
/// It holds each vCPU's own lock, which the vCPU's thread needs to enter guest mode: no vCPU can
/// run while a value of this type exists.
pub struct Stopped<'a> {
    board: &'a Board,
    fds: Vec<MutexGuard<'a, VcpuFd>>,
    vcpus: Vec<Vcpu>,
}

impl<'a> Stopped<'a> {
    /// Takes every vCPU's lock. Only for a caller that holds the gate.
    pub(super) fn new(board: &'a Board) -> Result<Self, StopError> {
        let fds: Vec<_> = board.vcpus().iter().map(|vcpu| vcpu.lock()).collect();
        let vcpus = (0..)
            .zip(&fds)
            .map(|(index, fd)| vcpu_state::summary(index, fd))
            .collect::<Result<_, _>>()?;
        Ok(Self { board, fds, vcpus })
    }

    /// The full register state of vCPU `index`.
    ///
    /// # Errors
    /// [`StopError::Kvm`] when there is no such vCPU or KVM refuses.
    pub fn cpu_state(&self, index: u32) -> Result<CpuState, StopError> {
        let fd = usize::try_from(index).ok().and_then(|at| self.fds.get(at));
        let fd = fd.ok_or_else(|| StopError::Kvm {
            vcpu: index,
            what: "no such vCPU".into(),
        })?;
        vcpu_state::full(index, fd)
    }

    /// Tells the guest's watchdogs that time passed while it did not run.
    pub(super) fn tell_clock(&self) {
        self.fds.iter().for_each(|fd| tell_clock(fd));
    }
}

/// A stop shorter than this needs no word to the guest's watchdogs, which look every few seconds.
pub(super) const TELL_CLOCK_AFTER: Duration = Duration::from_millis(100);

/// Tells a vCPU's watchdog that time passed while it did not run.
pub(super) fn tell_clock(fd: &VcpuFd) {
    // A vCPU that has not set up its clock page yet has no watchdog to tell.
    let _ = fd.kvmclock_ctrl();
}

/// The memory of a guest that may run: its RAM, and our blocks beside it.
pub struct Memory(Arc<Board>);

impl Memory {
    pub(super) fn new(board: Arc<Board>) -> Self {
        Self(board)
    }
}

impl GuestMemory for Memory {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        read(&self.0, at, into)
    }

    fn ram(&self) -> Vec<RamRange> {
        self.0.ram().ram()
    }
}

fn read(board: &Board, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
    match board.ram().read(at, into) {
        Ok(()) => Ok(()),
        Err(_) => board.blocks().read(at, into),
    }
}

impl GuestMemory for Stopped<'_> {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        read(self.board, at, into)
    }

    fn ram(&self) -> Vec<RamRange> {
        self.board.ram().ram()
    }
}

impl StoppedGuest for Stopped<'_> {
    fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }

    fn write(&mut self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        let out_of_range = || MemoryError::OutOfRange {
            at,
            len: bytes.len() as u64,
        };
        let map = self.board.ram().map();
        if vm_memory::GuestMemoryBackend::check_range(map, GuestAddress(at.0), bytes.len()) {
            return map
                .write_slice(bytes, GuestAddress(at.0))
                .map_err(|_| out_of_range());
        }
        self.board.blocks().write(at, bytes)
    }

    fn set_rip(&mut self, vcpu: u32, to: Gva) -> Result<(), MemoryError> {
        let index = usize::try_from(vcpu).unwrap_or(usize::MAX);
        let fd = self.fds.get(index).ok_or(MemoryError::ReadOnly)?;
        let set = || {
            let mut regs = fd.get_regs()?;
            regs.rip = to.0;
            fd.set_regs(&regs)
        };
        set().map_err(|_| MemoryError::ReadOnly)?;
        if let Some(vcpu) = self.vcpus.get_mut(index) {
            vcpu.registers.rip = to.0;
        }
        Ok(())
    }

    fn add_block(&mut self, len: u64, kind: BlockKind) -> Result<Gpa, MemoryError> {
        self.board.blocks().add(self.board.vm(), len, kind)
    }

    fn remove_block(&mut self, at: Gpa) -> Result<(), MemoryError> {
        self.board.blocks().remove(self.board.vm(), at)
    }
}
