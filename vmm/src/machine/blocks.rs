//! Blocks of memory beside guest RAM: where the patcher's arena lives.
//!
//! A block is a memslot of its own, above RAM and outside the hole below 4 GiB. A block for code
//! cannot be written by the guest: each attempt leaves guest mode and is counted here.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use patcher::guest::{BlockKind, Gpa, MemoryError};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion, VolatileMemory,
};

use super::layout::{GIB, HIGH_RAM_START};
use super::memory::GuestRam;

const ALIGNMENT: u64 = 2 << 20;

struct Block {
    slot: u32,
    range: Range<u64>,
    kind: BlockKind,
    map: GuestMemoryMmap,
}

/// Memory that will be a block.
struct Filled {
    kind: BlockKind,
    len: u64,
    memory: MmapRegion,
}

impl Filled {
    fn new(len: u64, kind: BlockKind) -> Result<Self, MemoryError> {
        let memory = MmapRegion::new(usize::try_from(len).map_err(no_slot)?).map_err(no_slot)?;
        // Fresh memory is zero already, and not resident until it is touched.
        if kind.filler() != 0 {
            let all = memory.as_volatile_slice();
            let page = [kind.filler(); 4096];
            for at in (0..memory.len()).step_by(page.len()) {
                all.write(&page, at).map_err(no_slot)?;
            }
        }
        Ok(Self { kind, len, memory })
    }
}

#[derive(Default)]
struct State {
    blocks: Vec<Block>,
    /// For the next block of its kind and length.
    ready: Option<Filled>,
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

fn aligned(len: u64) -> Result<u64, MemoryError> {
    len.checked_next_multiple_of(ALIGNMENT)
        .filter(|len| *len > 0)
        .ok_or_else(|| no_slot("a block of no size"))
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

    /// Gets the memory of the first block for code ready, so that a stopped guest need not wait
    /// until it is filled. Without effect when there is a block for code.
    pub(super) fn get_ready(&self, len: u64) {
        let kind = BlockKind::Code;
        let in_use = |state: &State| {
            state.ready.is_some() || state.blocks.iter().any(|block| block.kind == kind)
        };
        if in_use(&self.lock()) {
            return;
        }
        // Without the lock: the guest's own exits take it. Memory that is not to be had is missed
        // when the block is added.
        let ready = aligned(len).and_then(|len| Filled::new(len, kind)).ok();
        let mut state = self.lock();
        if !in_use(&state) {
            state.ready = ready;
        }
    }

    pub(super) fn add(&self, vm: &VmFd, len: u64, kind: BlockKind) -> Result<Gpa, MemoryError> {
        let mut state = self.lock();
        let len = aligned(len)?;
        let start = state.free_range(&self.room, len).ok_or_else(|| {
            no_slot(format_args!(
                "no room for {len:#x} bytes in the guest's physical addresses"
            ))
        })?;
        let slot = (self.first_slot..)
            .find(|slot| state.blocks.iter().all(|block| block.slot != *slot))
            .ok_or_else(|| no_slot("no slot number is free"))?;
        let ready = state
            .ready
            .take_if(|ready| (ready.kind, ready.len) == (kind, len));
        let memory = ready.map_or_else(|| Filled::new(len, kind), Ok)?.memory;
        let region = GuestRegionMmap::new(memory, GuestAddress(start))
            .ok_or_else(|| no_slot("the block wraps"))?;
        let map = GuestMemoryMmap::from_regions(vec![region]).map_err(no_slot)?;
        let host = map.get_host_address(GuestAddress(start)).map_err(no_slot)?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: match kind {
                BlockKind::Code => KVM_MEM_READONLY,
                BlockKind::Data => 0,
            },
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
            kind,
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

    /// Counts a guest write if it hit a block for code; the answer is how many there were.
    pub(super) fn refuse_write(&self, at: u64) -> Option<u64> {
        let mut state = self.lock();
        state
            .at(Gpa(at))
            .filter(|block| block.kind == BlockKind::Code)?;
        state.refused_writes += 1;
        Some(state.refused_writes)
    }

    /// Whether `at` lies in a block for code.
    pub(super) fn is_read_only(&self, at: u64) -> bool {
        self.lock()
            .at(Gpa(at))
            .is_some_and(|block| block.kind == BlockKind::Code)
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
