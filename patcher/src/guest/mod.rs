//! What a stopped guest is: its memory, its vCPUs' registers, and the right to change it.
//!
//! [`GuestMemory`] reads guest-physical memory and may be implemented by anything, running or not.
//! [`StoppedGuest`] is the witness that every vCPU is parked; only through it can guest memory be
//! written. A hypervisor implements it on the guard that keeps the vCPUs parked, so that a write
//! to a running guest does not compile.

mod address;
mod copies;
mod image;
mod memory;
mod vcpu;

#[cfg(test)]
pub(crate) use crate::synthetic::ram as fake;
pub use address::{Gpa, Gva, LinkAddr, Slide};
pub use copies::{Copies, Following, Lack, USUAL_COPIES};
pub use image::{MemoryImage, MemoryImageError};
pub use memory::{GuestMemory, MemoryError, RamRange};
pub use vcpu::{Activity, Vcpu, VcpuRegisters};

/// What a block of [`StoppedGuest::add_block`] is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockKind {
    /// The guest cannot write it at all, whatever its page tables say; [`StoppedGuest::write`]
    /// still can.
    Code,
    /// The guest may write it.
    Data,
}

impl BlockKind {
    /// What fills it where nothing was put: `int3`, on which a stray jump ends, or zero.
    #[must_use]
    pub fn filler(self) -> u8 {
        match self {
            Self::Code => 0xcc,
            Self::Data => 0,
        }
    }
}

/// A guest all of whose vCPUs are parked outside guest mode, with their registers synchronised.
///
/// Ordering law: a value of an implementing type exists only while the vCPUs are parked, and
/// dropping it lets them go on. After [`StoppedGuest::write`] changed guest text, each vCPU
/// executes a serialising instruction on the host before it enters the guest again; the
/// implementation does this without being asked.
pub trait StoppedGuest: GuestMemory {
    /// The vCPUs in index order, as they were when the guest stopped.
    fn vcpus(&self) -> &[Vcpu];

    /// Writes guest-physical memory. The whole range is written or none of it.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] when any byte of the range is not guest RAM or an arena slot.
    fn write(&mut self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError>;

    /// Adds a block of memory to the guest-physical address space, outside guest RAM and within
    /// the guest's physical address width, aligned to 2 MiB. Every byte of it is
    /// [`BlockKind::filler`].
    ///
    /// # Errors
    /// [`MemoryError::NoSlot`] when the hypervisor has no room for it.
    fn add_block(&mut self, len: u64, kind: BlockKind) -> Result<Gpa, MemoryError>;

    /// Takes a block away again and flushes every translation that led to it.
    ///
    /// # Errors
    /// [`MemoryError::NoSlot`] when no block of [`StoppedGuest::add_block`] starts at `at`.
    fn remove_block(&mut self, at: Gpa) -> Result<(), MemoryError>;

    /// Has a vCPU go on at `to`. [`StoppedGuest::vcpus`] tells so from then on.
    ///
    /// # Errors
    /// [`MemoryError::ReadOnly`] where registers cannot be changed, or there is no such vCPU.
    fn set_rip(&mut self, vcpu: u32, to: Gva) -> Result<(), MemoryError>;
}
