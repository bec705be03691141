//! Where in the kernel's address space the arena goes.
//!
//! First entries 508 to 510 of `level2_fixmap_pgt`: 6 MB from 0xffffffffff800000 on that Linux
//! keeps reserved above its fixmap (Documentation/arch/x86/x86_64/mm.rst). They are in reach of
//! rel32 jumps from the kernel and from modules wherever KASLR put those, and
//! `virt_addr_valid()` is false there. Then free entries of `level2_kernel_pgt`, beside the image;
//! there the kernel would take our memory for its own image, so that is the second choice.
//!
//! The tables are found by the walk, never by a constant; a table that is not the one its symbol
//! names is left alone.

use super::{ArenaError, BLOCK};
use crate::Kernel;
use crate::guest::{Gpa, Gva, LinkAddr};
use crate::space::{
    ACCESSED, ADDRESS, DIRTY, Entry, GLOBAL, LARGE, LEVEL_2M, LayoutError, Located, NO_EXECUTE,
    PRESENT, Space, WRITABLE,
};

/// The reserved hole above the fixmap.
const HOLE: Gva = Gva(0xffff_ffff_ff80_0000);
const HOLE_ENTRIES: u64 = 3;
/// `__START_KERNEL_map`, and how much `level2_kernel_pgt` maps from there.
const KERNEL_MAP: Gva = Gva(0xffff_ffff_8000_0000);
const KERNEL_MAP_ENTRIES: u64 = 512;

/// Where the kernel's page tables are.
#[derive(Clone, Debug)]
pub struct ArenaLayout {
    pub(super) fixmap: LinkAddr,
    pub(super) kernel: LinkAddr,
    pub(super) text: LinkAddr,
}

impl ArenaLayout {
    /// Looks them up in the kernel's file.
    ///
    /// # Errors
    /// [`LayoutError`] names what the file lacks.
    pub fn of(kernel: &Kernel) -> Result<Self, LayoutError> {
        let symbols = kernel.symbols();
        Ok(Self {
            fixmap: symbols.address("level2_fixmap_pgt")?,
            kernel: symbols.address("level2_kernel_pgt")?,
            text: symbols.address("_stext")?,
        })
    }
}

/// An address and the empty entry that will map it.
pub(super) struct Place {
    pub(super) at: Gva,
    pub(super) entry: Entry,
}

pub(super) struct Plan {
    pub(super) code: Place,
    pub(super) data: Place,
    pub(super) code_flags: u64,
    pub(super) data_flags: u64,
}

pub(super) fn plan(
    space: &Space<'_>,
    located: &Located,
    layout: &ArenaLayout,
) -> Result<Plan, ArenaError> {
    // Under page table isolation the kernel maps itself without the global bit: do as it does.
    let global = space.mapping(layout.text.at(located.slide))?.entry.raw & GLOBAL;
    let mut looked = 0;
    let mut free = candidates()
        .inspect(|_| looked += 1)
        .filter_map(|(at, in_fixmap)| {
            let table = if in_fixmap {
                layout.fixmap
            } else {
                layout.kernel
            };
            let entry = space.mapping(at).err()?.missing()?;
            let table = space.mapping(table.at(located.slide)).ok()?.gpa;
            let ours =
                entry.level == LEVEL_2M && entry.raw == 0 && Gpa(entry.at.0 & !0xfff) == table;
            ours.then_some(Place { at, entry })
        });
    let (first, second) = (free.next(), free.next());
    drop(free);
    match (first, second) {
        (Some(code), Some(data)) => Ok(Plan {
            code,
            data,
            code_flags: PRESENT | ACCESSED | LARGE | global,
            data_flags: PRESENT | WRITABLE | ACCESSED | DIRTY | LARGE | global | NO_EXECUTE,
        }),
        _ => Err(ArenaError::NoEntry { looked }),
    }
}

fn candidates() -> impl Iterator<Item = (Gva, bool)> {
    let hole = (0..HOLE_ENTRIES).map(|index| (HOLE.offset(index * BLOCK), true));
    let image = (0..KERNEL_MAP_ENTRIES)
        .rev()
        .map(|index| (KERNEL_MAP.offset(index * BLOCK), false));
    hole.chain(image)
}

/// The entry that maps a block at `gpa`; `None` when no entry can.
pub(super) fn entry(gpa: Gpa, flags: u64) -> Option<u64> {
    let fits = gpa.0 % BLOCK == 0 && gpa.0 & !ADDRESS == 0;
    fits.then_some(gpa.0 | flags)
}
