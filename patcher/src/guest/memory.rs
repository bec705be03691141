//! Reading guest-physical memory.

use super::Gpa;

/// A contiguous range of guest RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct RamRange {
    /// First byte.
    pub start: Gpa,
    /// Length in bytes.
    pub len: u64,
}

/// Why guest memory could not be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// The range is not, or not wholly, guest memory.
    #[error("guest-physical range {at} + {len:#x} is not guest memory")]
    OutOfRange {
        /// First byte asked for.
        at: Gpa,
        /// Bytes asked for.
        len: u64,
    },
    /// The hypervisor could not add or remove a block.
    #[error("memory block: {0}")]
    NoSlot(String),
    /// The guest's memory cannot be written through this view (a dump, for instance).
    #[error("this view of guest memory is read-only")]
    ReadOnly,
}

/// Guest-physical memory that can be read.
pub trait GuestMemory {
    /// Fills `into` from guest-physical address `at`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] when any byte is not guest memory; `into` is then unspecified.
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError>;

    /// The guest's RAM, in ascending order, without arena blocks.
    fn ram(&self) -> Vec<RamRange>;

    /// Reads a little-endian u64.
    ///
    /// # Errors
    /// As [`GuestMemory::read`].
    fn read_u64(&self, at: Gpa) -> Result<u64, MemoryError> {
        let mut raw = [0; 8];
        self.read(at, &mut raw)?;
        Ok(u64::from_le_bytes(raw))
    }
}

impl<T: GuestMemory + ?Sized> GuestMemory for &T {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        (**self).read(at, into)
    }

    fn ram(&self) -> Vec<RamRange> {
        (**self).ram()
    }
}
