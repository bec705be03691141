//! Blocks of memory beside guest RAM: where the patcher's arena lives.
//!
//! A block is a memslot of its own, above RAM and outside the hole below 4 GiB. A read-only block
//! cannot be written by the guest: each attempt leaves guest mode and is counted here.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use patcher::guest::{Gpa, MemoryError};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::layout::{GIB, HIGH_RAM_START};
use super::memory::GuestRam;

const ALIGNMENT: u64 = 2 << 20;

struct Block {
    slot: u32,
    range: Range<u64>,
    read_only: bool,
    map: GuestMemoryMmap,
}

#[derive(Default)]
struct State {
    blocks: Vec<Block>,
    refused_writes: u64,
}

/// The blocks of one machine.
pub(super) struct Blocks {
    state: Mutex<State>,
    /// Slots below this number are RAM.
    first_slot: u32,
    /// Guest-physical addresses that blocks may take.
    room: Range<u64>,
}

fn no_slot(what: impl std::fmt::Display) -> MemoryError {
    MemoryError::NoSlot(what.to_string())
}

impl Blocks {
    /// Blocks above `ram`, within `physical_bits` bits of physical address.
    pub(super) fn new(ram: &GuestRam, physical_bits: u32) -> Self {
        let top = ram
            .regions()
            .iter()
            .map(|region| region.start.0 + region.len)
            .max();
        let start = top.unwrap_or(0).max(HIGH_RAM_START).next_multiple_of(GIB);
        let end = 1_u64.checked_shl(physical_bits).unwrap_or(u64::MAX);
        Self {
            state: Mutex::default(),
            first_slot: u32::try_from(ram.regions().len()).unwrap_or(u32::MAX / 2),
            room: start..end,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, vm: &VmFd, len: u64, read_only: bool) -> Result<Gpa, MemoryError> {
        let mut state = self.lock();
        let len = len
            .checked_next_multiple_of(ALIGNMENT)
            .filter(|len| *len > 0)
            .ok_or_else(|| no_slot("a block of no size"))?;
        let start = state.free_range(&self.room, len).ok_or_else(|| {
            no_slot(format_args!(
                "no room for {len:#x} bytes in the guest's physical addresses"
            ))
        })?;
        let slot = (self.first_slot..)
            .find(|slot| state.blocks.iter().all(|block| block.slot != *slot))
            .ok_or_else(|| no_slot("no slot number is free"))?;
        let size = usize::try_from(len).map_err(no_slot)?;
        let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(start), size)]).map_err(no_slot)?;
        let host = map.get_host_address(GuestAddress(start)).map_err(no_slot)?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: if read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: start,
            memory_size: len,
            userspace_addr: host as u64,
        };
        // SAFETY: the region is the mapping in `map`, which stays in `blocks` until the slot is
        // deleted, and it overlaps neither RAM nor another block.
        unsafe { vm.set_user_memory_region(region) }.map_err(no_slot)?;
        state.blocks.push(Block {
            slot,
            range: start..start + len,
            read_only,
            map,
        });
        Ok(Gpa(start))
    }

    pub(super) fn remove(&self, vm: &VmFd, at: Gpa) -> Result<(), MemoryError> {
        let mut state = self.lock();
        let index = state
            .blocks
            .iter()
            .position(|block| block.range.start == at.0)
            .ok_or_else(|| no_slot(format_args!("no block at {at}")))?;
        let region = kvm_userspace_memory_region {
            slot: state.blocks.get(index).map_or(0, |block| block.slot),
            memory_size: 0,
            ..kvm_userspace_memory_region::default()
        };
        // SAFETY: deleting a slot takes memory away from the guest only; the mapping is dropped
        // after KVM has let go of it.
        unsafe { vm.set_user_memory_region(region) }.map_err(no_slot)?;
        state.blocks.remove(index);
        Ok(())
    }

    pub(super) fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        let len = into.len();
        let error = MemoryError::OutOfRange {
            at,
            len: len as u64,
        };
        let state = self.lock();
        let block = state.at(at).ok_or_else(|| error.clone())?;
        block
            .map
            .read_slice(into, GuestAddress(at.0))
            .map_err(|_| error)
    }

    pub(super) fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        let error = MemoryError::OutOfRange {
            at,
            len: bytes.len() as u64,
        };
        let state = self.lock();
        let block = state.at(at).ok_or_else(|| error.clone())?;
        if !block.map.check_range(GuestAddress(at.0), bytes.len()) {
            return Err(error);
        }
        block
            .map
            .write_slice(bytes, GuestAddress(at.0))
            .map_err(|_| error)
    }

    /// Counts a guest write if it hit a read-only block; the answer is how many there were.
    pub(super) fn refuse_write(&self, at: u64) -> Option<u64> {
        let mut state = self.lock();
        state.at(Gpa(at)).filter(|block| block.read_only)?;
        state.refused_writes += 1;
        Some(state.refused_writes)
    }

    /// Whether `at` lies in a read-only block.
    pub(super) fn is_read_only(&self, at: u64) -> bool {
        self.lock().at(Gpa(at)).is_some_and(|block| block.read_only)
    }
}

impl State {
    fn at(&self, at: Gpa) -> Option<&Block> {
        self.blocks.iter().find(|block| block.range.contains(&at.0))
    }

    fn free_range(&self, room: &Range<u64>, len: u64) -> Option<u64> {
        let mut start = room.start;
        loop {
            let end = start.checked_add(len)?;
            if end > room.end {
                return None;
            }
            let clash = self
                .blocks
                .iter()
                .find(|block| block.range.start < end && start < block.range.end);
            match clash {
                None => return Some(start),
                Some(block) => start = block.range.end,
            }
        }
    }
}

/// RAM regions as memslots, numbered from zero.
pub(super) fn ram_slots(ram: &GuestRam) -> Vec<kvm_userspace_memory_region> {
    (0..)
        .zip(ram.map().iter())
        .map(|(slot, region)| kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region
                .get_host_address(vm_memory::MemoryRegionAddress(0))
                .map_or(0, |host| host as u64),
        })
        .collect()
}
