//! Guest RAM: reserved address space, filled by the host as the guest touches it.

use patcher::guest::{Gpa, GuestMemory, MemoryError, RamRange};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress,
};

use super::layout::{HIGH_RAM_START, LOW_RAM_END};
use super::start::StartError;

/// One contiguous range of guest RAM and where it is mapped in this process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RamRegion {
    /// Guest-physical start.
    pub start: Gpa,
    /// Length in bytes.
    pub len: u64,
    /// Address of its first byte in this process.
    pub host: u64,
}

/// Guest RAM, for reading. Clones share the memory.
#[derive(Clone)]
pub struct GuestRam {
    map: GuestMemoryMmap,
    regions: Vec<RamRegion>,
}

impl GuestRam {
    /// Reserves `bytes` of address space in one or two regions around the 32-bit hole. The host
    /// gives pages as they are touched.
    pub(super) fn reserve(bytes: u64) -> Result<Self, StartError> {
        let low = bytes.min(LOW_RAM_END);
        let mut ranges = vec![(GuestAddress(0), to_usize(low)?)];
        if bytes > low {
            ranges.push((GuestAddress(HIGH_RAM_START), to_usize(bytes - low)?));
        }
        let map = GuestMemoryMmap::from_ranges(&ranges).map_err(|error| StartError::Memory {
            bytes,
            why: error.to_string(),
        })?;
        let regions = map
            .iter()
            .map(|region| {
                let host = region
                    .get_host_address(MemoryRegionAddress(0))
                    .map_err(|error| StartError::Memory {
                        bytes,
                        why: error.to_string(),
                    })?;
                Ok(RamRegion {
                    start: Gpa(region.start_addr().raw_value()),
                    len: region.len(),
                    host: host as u64,
                })
            })
            .collect::<Result<_, StartError>>()?;
        Ok(Self { map, regions })
    }

    /// The regions in ascending order.
    #[must_use]
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// The mapping itself: whoever has it can write guest memory, so it stays in this module's
    /// parent.
    pub(super) fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// Gives every page back to the host; the guest's memory then reads as zero.
    pub(super) fn clear(&self) -> std::io::Result<()> {
        for region in &self.regions {
            let len = usize::try_from(region.len).map_err(std::io::Error::other)?;
            // SAFETY: the range is exactly one private anonymous mapping that `self.map` keeps
            // alive, and no vCPU runs on it while the machine is between two incarnations.
            // Discarding its pages makes it read as zero, which every bit pattern reader allows.
            let result = unsafe {
                libc::madvise(region.host as *mut libc::c_void, len, libc::MADV_DONTNEED)
            };
            if result != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

fn to_usize(bytes: u64) -> Result<usize, StartError> {
    usize::try_from(bytes).map_err(|_| StartError::Memory {
        bytes,
        why: "more than this host can address".into(),
    })
}

impl GuestMemory for GuestRam {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        let len = into.len();
        self.map
            .read_slice(into, GuestAddress(at.0))
            .map_err(|_| MemoryError::OutOfRange {
                at,
                len: len as u64,
            })
    }

    fn ram(&self) -> Vec<RamRange> {
        self.regions
            .iter()
            .map(|region| RamRange {
                start: region.start,
                len: region.len,
            })
            .collect()
    }
}
