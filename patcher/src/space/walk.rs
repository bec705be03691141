//! The page walk: from a guest-virtual address to a guest-physical one.
//!
//! Guaranteed: at most five table reads for an address, whatever the tables hold. Tables that
//! point to themselves or outside RAM give a wrong translation or an error, never a loop or a
//! panic. Known: 64-bit paging with four or five levels (Intel SDM volume 3, 4.5). Not done:
//! protection keys, SMEP/SMAP, and reserved bits that depend on the physical address width; the
//! rights reported are those of the entries.

use crate::guest::{Gpa, GuestMemory, Gva, MemoryError, VcpuRegisters};

const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
/// Bit that tells a user-mode top-level table from the kernel's: arch/x86/mm/pti.c pairs them.
const PTI_USER_TABLE: u64 = 1 << 12;

pub(crate) const PRESENT: u64 = 1;
pub(crate) const WRITABLE: u64 = 1 << 1;
pub(crate) const USER: u64 = 1 << 2;
pub(crate) const ACCESSED: u64 = 1 << 5;
pub(crate) const DIRTY: u64 = 1 << 6;
pub(crate) const LARGE: u64 = 1 << 7;
pub(crate) const GLOBAL: u64 = 1 << 8;
pub(crate) const NO_EXECUTE: u64 = 1 << 63;
/// Bits 12 to 51 of an entry: the physical address.
pub(crate) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Level whose entries map 2 MiB each.
pub(crate) const LEVEL_2M: u8 = 2;

/// A top-level page table and how many levels hang below it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Root {
    /// Where the table is.
    pub table: Gpa,
    /// 4, or 5 with CR4.LA57.
    pub levels: u8,
}

impl Root {
    /// The table that a vCPU uses now.
    ///
    /// # Errors
    /// [`WalkError::NotLongMode`] when the vCPU does not translate as 64-bit kernels do.
    pub fn current(registers: &VcpuRegisters) -> Result<Self, WalkError> {
        let long = registers.cr0 & CR0_PG != 0
            && registers.cr4 & CR4_PAE != 0
            && registers.efer & EFER_LMA != 0;
        if !long {
            return Err(WalkError::NotLongMode {
                cr0: registers.cr0,
                cr4: registers.cr4,
                efer: registers.efer,
            });
        }
        Ok(Self {
            table: Gpa(registers.cr3 & ADDRESS),
            levels: if registers.cr4 & CR4_LA57 == 0 { 4 } else { 5 },
        })
    }

    /// The tables in which the kernel may be mapped for a vCPU, the likelier first.
    ///
    /// With page table isolation a CPU in user mode, and for some instructions on the way in and
    /// out, uses a table that leaves nearly all of the kernel out. The kernel's own is its
    /// partner: the pair is aligned to 8 KiB and bit 12 selects the user half. Without isolation
    /// newer kernels allocate single pages, where bit 12 is part of the address; so both are
    /// candidates, and the caller takes the one in which it finds the kernel.
    ///
    /// # Errors
    /// As [`Root::current`].
    pub fn candidates(registers: &VcpuRegisters) -> Result<[Self; 2], WalkError> {
        let current = Self::current(registers)?;
        let partner = Self {
            table: Gpa(current.table.0 & !PTI_USER_TABLE),
            ..current
        };
        Ok([partner, current])
    }
}

/// One entry of a page table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Entry {
    /// Where the entry itself is.
    pub at: Gpa,
    /// 1 for the table of 4 KiB pages, up to 5 for the top.
    pub level: u8,
    /// Its value.
    pub raw: u64,
}

/// How much one entry maps.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 2 MiB.
    Large,
    /// 1 GiB.
    Huge,
}

impl PageSize {
    /// Its size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Small => 1 << 12,
            Self::Large => 1 << 21,
            Self::Huge => 1 << 30,
        }
    }
}

/// What an address leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Mapping {
    /// The guest-physical address of the byte that was asked for.
    pub gpa: Gpa,
    /// The size of the page around it.
    pub page: PageSize,
    /// The entry that maps it.
    pub entry: Entry,
    /// Every level allows writing.
    pub writable: bool,
    /// No level forbids execution.
    pub executable: bool,
    /// Every level admits user mode.
    pub user: bool,
    /// The translation survives a change of CR3.
    pub global: bool,
}

/// Why an address has no translation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WalkError {
    /// The vCPU is not in 64-bit mode with paging.
    #[error("the vCPU is not in 64-bit mode (CR0 {cr0:#x}, CR4 {cr4:#x}, EFER {efer:#x})")]
    NotLongMode {
        /// CR0.
        cr0: u64,
        /// CR4.
        cr4: u64,
        /// EFER.
        efer: u64,
    },
    /// The address is in the hole between the halves of the address space.
    #[error("{gva} is not a canonical address with {levels} levels of page tables")]
    NotCanonical {
        /// The address.
        gva: Gva,
        /// Levels in use.
        levels: u8,
    },
    /// An entry on the way is not present.
    #[error("{gva} is not mapped: the level {} entry at {} is {:#x}", entry.level, entry.at, entry.raw)]
    NotPresent {
        /// The address.
        gva: Gva,
        /// The entry that ended the walk.
        entry: Entry,
    },
    /// An entry on the way has reserved bits set: this is no page table.
    #[error("{gva}: the level {} entry at {} is {:#x}, which no CPU accepts", entry.level, entry.at, entry.raw)]
    Reserved {
        /// The address.
        gva: Gva,
        /// The entry.
        entry: Entry,
    },
    /// A table lies outside guest memory.
    #[error("{gva}: its level {level} page table cannot be read")]
    Table {
        /// The address.
        gva: Gva,
        /// Level of the table.
        level: u8,
        /// What the memory said.
        source: MemoryError,
    },
}

impl WalkError {
    /// The entry that would have to be filled to map the address, when that is all that is missing.
    #[must_use]
    pub const fn missing(&self) -> Option<Entry> {
        match self {
            Self::NotPresent { entry, .. } => Some(*entry),
            _ => None,
        }
    }
}

/// Follows the tables below `root` to `gva`.
///
/// # Errors
/// [`WalkError`]; [`WalkError::NotPresent`] tells which entry is empty.
pub fn walk(memory: &dyn GuestMemory, root: Root, gva: Gva) -> Result<Mapping, WalkError> {
    let levels = root.levels.clamp(4, 5);
    // All bits above those that are translated repeat the highest of these.
    let translated = 12 + 9 * u32::from(levels);
    let high = gva.0 >> (translated - 1);
    if high != 0 && high != u64::MAX >> (translated - 1) {
        return Err(WalkError::NotCanonical { gva, levels });
    }
    let mut table = root.table;
    let mut rights = WRITABLE | USER;
    let mut executable = true;
    let mut level = levels;
    loop {
        let shift = 12 + 9 * u32::from(level - 1);
        let at = table.offset((gva.0 >> shift & 0x1ff) * 8);
        let raw = memory
            .read_u64(at)
            .map_err(|source| WalkError::Table { gva, level, source })?;
        let entry = Entry { at, level, raw };
        if raw & PRESENT == 0 {
            return Err(WalkError::NotPresent { gva, entry });
        }
        rights &= raw;
        executable &= raw & NO_EXECUTE == 0;
        let page = match (level, raw & LARGE != 0) {
            (1, _) => Some(PageSize::Small),
            (2, true) => Some(PageSize::Large),
            (3, true) => Some(PageSize::Huge),
            (4 | 5, true) => return Err(WalkError::Reserved { gva, entry }),
            _ => None,
        };
        let Some(page) = page else {
            table = Gpa(raw & ADDRESS);
            level -= 1;
            continue;
        };
        let inside = page.bytes() - 1;
        // Bit 12 of a large entry selects the memory type; the others below the page are reserved.
        if page != PageSize::Small && raw & ADDRESS & inside & !(1 << 12) != 0 {
            return Err(WalkError::Reserved { gva, entry });
        }
        return Ok(Mapping {
            gpa: Gpa((raw & ADDRESS & !inside) | (gva.0 & inside)),
            page,
            entry,
            writable: rights & WRITABLE != 0,
            executable,
            user: rights & USER != 0,
            global: raw & GLOBAL != 0,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::fake::{self, FakeGuest};
    use crate::guest::{MemoryImage, StoppedGuest};

    const TEXT: Gva = Gva(0xffff_ffff_8100_0000);

    #[test]
    fn pages_of_every_size_are_found_with_their_rights() {
        let mut guest = FakeGuest::new(0x20_0000);
        let small = guest.page(TEXT, fake::GLOBAL);
        let large = guest.entry(TEXT.offset(0x20_0000), 2);
        guest.set(large, 0x60_0000 | 0x1a1);
        let huge = guest.entry(Gva(0xffff_8880_4000_0000), 3);
        guest.set(huge, 0x4000_0000 | 0xe3 | fake::NO_EXECUTE);

        let found = walk(&guest.image, guest.root(), TEXT.offset(0x123)).unwrap();
        assert_eq!(found.gpa, small.offset(0x123));
        assert_eq!(found.page, PageSize::Small);
        assert!(found.executable && found.global && !found.writable && !found.user);

        let found = walk(&guest.image, guest.root(), TEXT.offset(0x2f_f123)).unwrap();
        assert_eq!(found.gpa, Gpa(0x6f_f123));
        assert_eq!((found.page, found.entry.at), (PageSize::Large, large));
        assert!(found.executable && !found.writable);

        let found = walk(&guest.image, guest.root(), Gva(0xffff_8880_4567_89ab)).unwrap();
        assert_eq!(found.gpa, Gpa(0x4567_89ab));
        assert!(!found.executable && found.writable);
    }

    #[test]
    fn an_empty_entry_says_where_it_is() {
        let mut guest = FakeGuest::new(0x20_0000);
        guest.page(TEXT, 0);
        let error = walk(&guest.image, guest.root(), TEXT.offset(0x40_0000)).unwrap_err();
        let entry = error.missing().unwrap();
        assert_eq!((entry.level, entry.raw), (2, 0));
        assert_eq!(entry.at, guest.entry(TEXT.offset(0x40_0000), 2));
    }

    #[test]
    fn wild_tables_end_in_errors_or_wrong_answers_but_end() {
        let mut guest = FakeGuest::new(0x20_0000);
        let top = guest.entry(TEXT, 4);
        // To itself: every level is the same table.
        guest.set(top, guest.root.0 | 3);
        let _ = walk(&guest.image, guest.root(), TEXT);
        let _ = walk(&guest.image, guest.root(), Gva(u64::MAX));
        // Out of RAM.
        guest.set(top, 0x000f_ffff_ffff_f003);
        let error = walk(&guest.image, guest.root(), TEXT).unwrap_err();
        assert!(
            matches!(error, WalkError::Table { level: 3, .. }),
            "{error}"
        );
        // A large page where there is none.
        guest.set(top, 0x83);
        assert!(matches!(
            walk(&guest.image, guest.root(), TEXT).unwrap_err(),
            WalkError::Reserved { .. }
        ));
        // A large page that is not aligned.
        guest.set(top, 0);
        let large = guest.entry(TEXT, 2);
        guest.set(large, 0x60_2000 | 0x83);
        assert!(matches!(
            walk(&guest.image, guest.root(), TEXT).unwrap_err(),
            WalkError::Reserved { .. }
        ));
    }

    #[test]
    fn addresses_in_the_hole_are_not_canonical() {
        let guest = FakeGuest::new(0x20_0000);
        for (gva, levels) in [(1 << 47, 4), (1 << 56, 5), (0x1234_5678_9abc_def0, 4)] {
            let root = Root {
                levels,
                ..guest.root()
            };
            assert!(matches!(
                walk(&guest.image, root, Gva(gva)).unwrap_err(),
                WalkError::NotCanonical { .. }
            ));
        }
    }

    #[test]
    fn five_levels_use_bits_48_to_56() {
        let ram = vec![(Gpa(0), vec![0; 0x10_0000])];
        let mut image = MemoryImage::new(ram, Vec::new()).unwrap();
        let gva = Gva(0x00ab_cdef_1234_5678);
        for (level, next) in [(5_u32, 0x2000_u64), (4, 0x3000), (3, 0x4000), (2, 0x5000)] {
            let index = gva.0 >> (12 + 9 * (level - 1)) & 0x1ff;
            let table = next - 0x1000;
            image
                .write(Gpa(table + index * 8), &(next | 7).to_le_bytes())
                .unwrap();
        }
        let index = gva.0 >> 12 & 0x1ff;
        image
            .write(Gpa(0x5000 + index * 8), &0x7007_u64.to_le_bytes())
            .unwrap();
        let root = Root {
            table: Gpa(0x1000),
            levels: 5,
        };
        let found = walk(&image, root, gva).unwrap();
        assert_eq!(found.gpa, Gpa(0x7678));
        assert!(found.user && found.writable);
    }

    #[test]
    fn the_kernel_half_of_a_pair_comes_first() {
        let mut registers = fake::kernel_registers(Gpa(0x5000));
        registers.cr3 |= 0x8000_0000_0000_0123;
        let roots = Root::candidates(&registers).unwrap();
        assert_eq!(roots.map(|r| r.table), [Gpa(0x4000), Gpa(0x5000)]);
        registers.cr4 |= CR4_LA57;
        assert_eq!(Root::current(&registers).unwrap().levels, 5);
        registers.cr0 = 0;
        assert!(matches!(
            Root::candidates(&registers),
            Err(WalkError::NotLongMode { .. })
        ));
    }
}
