//! Where do trampolines live? In memory that the guest neither sees in its memory map nor can
//! write, mapped into its kernel.
//!
//! The arena is two blocks of 2 MiB: one for code (the hypervisor maps it read-only, the guest's
//! page tables read-execute) and one for data (read-write, never executable). Both are mapped by
//! large entries in page tables that all of the guest's address spaces share, at addresses that
//! the kernel never uses (see [`place`]). Guaranteed: an entry is only filled when it was zero, and
//! zeroed again only when it still is what was written, but for what the CPU notes in it; empty
//! code is `int3`.
//!
//! Not present to present needs no TLB flush (Intel SDM volume 3, 4.10.2.3); the other way, the
//! hypervisor flushes when it takes the block away.

mod place;
mod slots;

use crate::guest::{BlockKind, Gpa, GuestMemory, Gva, MemoryError, StoppedGuest};
use crate::space::{ACCESSED, DIRTY, Entry, Located, Root, Space, WalkError};
pub use place::ArenaLayout;
use slots::Slots;

/// Bytes of each block: what one large entry maps.
pub const BLOCK: u64 = 2 << 20;

/// Why the arena could not be made or used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArenaError {
    /// No entry of the kernel's page tables is free where the arena may be.
    #[error(
        "the guest's page tables have no free 2 MiB entry for the arena ({looked} were looked at)"
    )]
    NoEntry {
        /// Entries looked at.
        looked: usize,
    },
    /// The kernel's own text has no translation: the page tables are not understood.
    #[error("the guest's kernel text is not mapped")]
    Text(#[from] WalkError),
    /// The hypervisor has no memory for it.
    #[error("the hypervisor has no room for the arena")]
    Block(#[source] MemoryError),
    /// The hypervisor put a block where an entry cannot point to.
    #[error("the block at {at} is not aligned to 2 MiB, or out of reach of a page table")]
    Misplaced {
        /// Where it is.
        at: Gpa,
    },
    /// A page table or a block cannot be written.
    #[error("the arena cannot be written")]
    Write(#[source] MemoryError),
    /// What was mapped does not translate as it should.
    #[error("{at} was mapped to {expected} and leads to {found}")]
    NotMapped {
        /// Address in the guest.
        at: Gva,
        /// Where it should lead.
        expected: Gpa,
        /// Where it leads.
        found: String,
    },
    /// The guest changed our entry in its page tables.
    #[error(
        "the guest changed the page table entry of the arena at {at} from {expected:#x} to {found:#x}"
    )]
    Changed {
        /// Where the entry is.
        at: Gpa,
        /// What we wrote.
        expected: u64,
        /// What is there.
        found: u64,
    },
    /// There is no room left.
    #[error("the arena has no room for {len:#x} bytes of {what}; revert something first")]
    Full {
        /// Code or data.
        what: &'static str,
        /// Bytes asked for.
        len: u64,
    },
}

/// A part of the arena.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Slot {
    /// Its address in the guest.
    pub at: Gva,
    /// Its length in bytes.
    pub len: u64,
}

impl Slot {
    /// The addresses that it occupies.
    #[must_use]
    pub fn range(&self) -> std::ops::Range<Gva> {
        self.at..self.at.offset(self.len)
    }
}

/// What the arena looks like from outside.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ArenaReport {
    /// Address of the code block in the guest.
    pub code: Gva,
    /// Address of the data block in the guest.
    pub data: Gva,
    /// Guest-physical address of the code block.
    pub code_gpa: Gpa,
    /// Guest-physical address of the data block.
    pub data_gpa: Gpa,
    /// Bytes of code in use, retired code included.
    pub code_used: u64,
    /// Slots of code in use.
    pub code_slots: usize,
    /// Bytes of data in use.
    pub data_used: u64,
}

#[derive(Debug)]
struct Block {
    at: Gva,
    gpa: Gpa,
    kind: BlockKind,
    /// Where its page table entry is, with the value we wrote.
    entry: Entry,
    slots: Slots,
}

/// The arena of one guest.
#[derive(Debug)]
pub struct Arena {
    code: Block,
    data: Block,
}

impl Arena {
    /// Adds both blocks to a stopped guest and maps them.
    ///
    /// # Errors
    /// [`ArenaError`]; the guest is then as it was.
    pub fn install(
        guest: &mut dyn StoppedGuest,
        located: &Located,
        layout: &ArenaLayout,
    ) -> Result<Self, ArenaError> {
        let plan = place::plan(&located.space(&&*guest), located, layout)?;
        let (code, data) = (BlockKind::Code, BlockKind::Data);
        let code = add(guest, located.root, &plan.code, plan.code_flags, code)?;
        let data = match add(guest, located.root, &plan.data, plan.data_flags, data) {
            Ok(data) => data,
            Err(error) => {
                let _ = take_away(guest, &code);
                return Err(error);
            }
        };
        Ok(Self { code, data })
    }

    /// Whether the guest's page tables still hold our entries.
    ///
    /// # Errors
    /// [`ArenaError::Changed`] when they do not.
    pub fn check(&self, guest: &dyn GuestMemory) -> Result<(), ArenaError> {
        for block in [&self.code, &self.data] {
            let found = guest.read_u64(block.entry.at).map_err(ArenaError::Write)?;
            if !block.is_mapped_by(found) {
                return Err(ArenaError::Changed {
                    at: block.entry.at,
                    expected: block.entry.raw,
                    found,
                });
            }
        }
        Ok(())
    }

    /// Takes room for code.
    ///
    /// # Errors
    /// [`ArenaError::Full`].
    pub fn take_code(&mut self, len: u64, align: u64) -> Result<Slot, ArenaError> {
        self.code.take(len, align, "code")
    }

    /// Takes room for data.
    ///
    /// # Errors
    /// [`ArenaError::Full`].
    pub fn take_data(&mut self, len: u64, align: u64) -> Result<Slot, ArenaError> {
        self.data.take(len, align, "data")
    }

    /// Fills a slot from its start, straight in the block's memory: whatever the guest has done to
    /// its page tables, nothing else is written.
    ///
    /// # Errors
    /// [`ArenaError::Write`] when it cannot be written, [`ArenaError::Full`] when it does not fit.
    pub fn fill(
        &self,
        guest: &mut dyn StoppedGuest,
        slot: Slot,
        bytes: &[u8],
    ) -> Result<(), ArenaError> {
        let block = self.block(slot.at);
        let len = bytes.len() as u64;
        if len > slot.len || !block.holds(slot.at) {
            return Err(ArenaError::Full {
                what: "content",
                len,
            });
        }
        let gpa = block.gpa.offset(slot.at.distance_from(block.at));
        guest.write(gpa, bytes).map_err(ArenaError::Write)
    }

    /// Bytes of a block, straight from its memory: whether or not the guest runs.
    ///
    /// # Errors
    /// [`ArenaError::Write`] when they cannot be read.
    pub fn read(
        &self,
        memory: &dyn GuestMemory,
        at: Gva,
        into: &mut [u8],
    ) -> Result<(), ArenaError> {
        let block = self.block(at);
        let gpa = block.gpa.offset(at.distance_from(block.at));
        memory.read(gpa, into).map_err(ArenaError::Write)
    }

    fn block(&self, at: Gva) -> &Block {
        if self.code.holds(at) {
            &self.code
        } else {
            &self.data
        }
    }

    /// Gives a slot back: code becomes `int3`, data zero.
    ///
    /// # Errors
    /// [`ArenaError::Write`] when it cannot be cleared; it then stays taken.
    pub fn free(&mut self, guest: &mut dyn StoppedGuest, slot: Slot) -> Result<(), ArenaError> {
        let len = usize::try_from(slot.len.min(BLOCK)).unwrap_or(0);
        let kind = self.block(slot.at).kind;
        self.fill(guest, slot, &vec![kind.filler(); len])?;
        let block = match kind {
            BlockKind::Code => &mut self.code,
            BlockKind::Data => &mut self.data,
        };
        block.slots.give_back(slot.at.distance_from(block.at));
        Ok(())
    }

    /// Unmaps the arena and gives its blocks back. Nothing may use it any more.
    ///
    /// # Errors
    /// [`ArenaError`] for the first block that could not be removed; the other is still tried.
    pub fn remove(self, guest: &mut dyn StoppedGuest) -> Result<(), ArenaError> {
        let code = take_away(guest, &self.code);
        let data = take_away(guest, &self.data);
        code.and(data)
    }

    /// Guest-physical addresses of the blocks, for a hypervisor that takes them away itself after
    /// the guest's memory was reset.
    #[must_use]
    pub fn blocks(&self) -> [Gpa; 2] {
        [self.code.gpa, self.data.gpa]
    }

    /// What it looks like.
    #[must_use]
    pub fn report(&self) -> ArenaReport {
        let (code_used, code_slots) = self.code.slots.used();
        ArenaReport {
            code: self.code.at,
            data: self.data.at,
            code_gpa: self.code.gpa,
            data_gpa: self.data.gpa,
            code_used,
            code_slots,
            data_used: self.data.slots.used().0,
        }
    }
}

impl Block {
    fn holds(&self, at: Gva) -> bool {
        at.distance_from(self.at) < BLOCK
    }

    /// Whether a page table entry is ours. The CPU sets two bits of it by itself: a kernel that turned
    /// write protection off and wrote to our code has set the dirty bit before the write was refused.
    const fn is_mapped_by(&self, entry: u64) -> bool {
        (entry ^ self.entry.raw) & !(ACCESSED | DIRTY) == 0
    }

    fn take(&mut self, len: u64, align: u64, what: &'static str) -> Result<Slot, ArenaError> {
        let offset = self
            .slots
            .take(len, align)
            .ok_or(ArenaError::Full { what, len })?;
        Ok(Slot {
            at: self.at.offset(offset),
            len: self.slots.len_at(offset),
        })
    }
}

/// Adds a block and maps it by `entry`, which is empty.
fn add(
    guest: &mut dyn StoppedGuest,
    root: Root,
    place: &place::Place,
    flags: u64,
    kind: BlockKind,
) -> Result<Block, ArenaError> {
    let gpa = guest.add_block(BLOCK, kind).map_err(ArenaError::Block)?;
    let mut block = Block {
        at: place.at,
        gpa,
        kind,
        entry: Entry {
            raw: 0,
            ..place.entry
        },
        slots: Slots::new(BLOCK),
    };
    let mut map = || {
        let raw = place::entry(gpa, flags).ok_or(ArenaError::Misplaced { at: gpa })?;
        guest
            .write(place.entry.at, &raw.to_le_bytes())
            .map_err(ArenaError::Write)?;
        block.entry.raw = raw;
        let found = Space::new(&&*guest, root).mapping(place.at);
        match found {
            Ok(mapping) if mapping.gpa == gpa => Ok(()),
            other => Err(ArenaError::NotMapped {
                at: place.at,
                expected: gpa,
                found: match other {
                    Ok(mapping) => mapping.gpa.to_string(),
                    Err(error) => error.to_string(),
                },
            }),
        }
    };
    match map() {
        Ok(()) => Ok(block),
        Err(error) => {
            let _ = take_away(guest, &block);
            Err(error)
        }
    }
}

/// Unmaps a block, where its entry is still ours, and gives it back.
fn take_away(guest: &mut dyn StoppedGuest, block: &Block) -> Result<(), ArenaError> {
    let ours = block.entry.raw != 0
        && guest
            .read_u64(block.entry.at)
            .is_ok_and(|now| block.is_mapped_by(now));
    let cleared = if ours {
        guest
            .write(block.entry.at, &0_u64.to_le_bytes())
            .map_err(ArenaError::Write)
    } else {
        Ok(())
    };
    cleared.and(guest.remove_block(block.gpa).map_err(ArenaError::Block))
}

#[cfg(test)]
mod tests;
