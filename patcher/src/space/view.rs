//! Reading guest-virtual memory in bulk.
//!
//! A [`Space`] remembers translations for as long as it lives, so it is made for one stop (or one
//! look at a running guest, whose answer may then be torn) and dropped with it.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use super::bounds::{Bounds, Left};
use super::walk::{ADDRESS, Mapping, PRESENT, PageSize, Root, WalkError, walk};
use crate::guest::{Gpa, GuestMemory, Gva, MemoryError};

/// Translations remembered. Each page has one place, where it takes that of another: a guest that
/// knew how could make us forget, not slow.
const PLACES: usize = 1 << 11;
/// Places at first: most looks are at a few pages, and an empty place has to be made, too.
const FEW_PLACES: usize = 1 << 4;
/// Tables of small pages that are remembered.
const TABLES: usize = 64;
/// A large page is remembered as the 2 MiB that hold the address.
const LARGE_SHIFT: u32 = 21;
const SMALL_SHIFT: u32 = 12;

/// Why guest-virtual memory could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpaceError {
    /// There is no translation.
    #[error(transparent)]
    Walk(#[from] WalkError),
    /// The translation leads outside guest memory.
    #[error("{gva} is mapped to {gpa}, where the guest has no memory")]
    Memory {
        /// The virtual address.
        gva: Gva,
        /// Where its page tables lead.
        gpa: Gpa,
        /// What the memory said.
        source: MemoryError,
    },
    /// The guest's lists and tables lead on and on.
    #[error("there is no end to it after {limit} steps; the guest's data are not believed")]
    Steps {
        /// [`Bounds::steps`].
        limit: u64,
    },
    /// The guest has more to read than is read.
    #[error("there is more of it than {limit} bytes; the guest's data are not believed")]
    Bytes {
        /// [`Bounds::bytes`].
        limit: u64,
    },
    /// It took too long.
    #[error("there is no end to it after {} ms; the guest's data are not believed", limit.as_millis())]
    Time {
        /// [`Bounds::time`].
        limit: Duration,
    },
}

impl SpaceError {
    /// Whether a bound was hit: nothing more can be read in this look.
    #[must_use]
    pub const fn is_bound(&self) -> bool {
        matches!(
            self,
            Self::Steps { .. } | Self::Bytes { .. } | Self::Time { .. }
        )
    }
}

/// Guest-virtual memory as one top-level table maps it.
pub struct Space<'m> {
    memory: &'m dyn GuestMemory,
    root: Root,
    /// Empty until the first translation, then of [`FEW_PLACES`], at last of [`PLACES`].
    cache: RefCell<Vec<Cached>>,
    /// Translations that were not remembered.
    missed: Cell<usize>,
    /// The last page tables that were found at the end of a walk: most stacks are in small pages,
    /// and a table maps 512 of them.
    tables: RefCell<[Table; TABLES]>,
    left: Left,
}

/// A table of 4 KiB pages.
#[derive(Clone, Copy)]
struct Table {
    /// Which 2 MiB it maps, as the key of a large page.
    key: u64,
    at: Gpa,
}

#[derive(Clone, Copy)]
struct Cached {
    /// Which page: its number at the shift that it is remembered by, with the shift below it.
    key: u64,
    /// Physical address of the page.
    page: Gpa,
    /// Its size minus one.
    inside: u64,
}

/// No page has this key: there is no such shift.
const NONE: Cached = Cached {
    key: u64::MAX,
    page: Gpa(0),
    inside: 0,
};

const NO_TABLE: Table = Table {
    key: u64::MAX,
    at: Gpa(0),
};

const fn key(at: Gva, shift: u32) -> u64 {
    at.0 >> shift << 6 | shift as u64
}

/// Where a key has its place, of as many as there are: a power of two, or none.
fn place(key: u64, places: usize) -> usize {
    let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    usize::try_from(mixed).unwrap_or(0) & places.wrapping_sub(1)
}

impl<'m> Space<'m> {
    /// The memory that `root` maps, within the usual bounds.
    #[must_use]
    pub fn new(memory: &'m dyn GuestMemory, root: Root) -> Self {
        Self::bounded(memory, root, Bounds::USUAL)
    }

    /// The memory that `root` maps. Everything that is read through this one stays within `bounds`.
    #[must_use]
    pub fn bounded(memory: &'m dyn GuestMemory, root: Root, bounds: Bounds) -> Self {
        Self {
            left: Left::of(bounds),
            memory,
            root,
            cache: RefCell::default(),
            missed: Cell::new(0),
            tables: RefCell::new([NO_TABLE; TABLES]),
        }
    }

    /// The top-level table.
    #[must_use]
    pub const fn root(&self) -> Root {
        self.root
    }

    /// The bounds of what is read.
    #[must_use]
    pub const fn bounds(&self) -> Bounds {
        self.left.bounds()
    }

    /// The guest-physical memory below.
    #[must_use]
    pub const fn memory(&self) -> &'m dyn GuestMemory {
        self.memory
    }

    /// Where `at` leads and with which rights; always a fresh walk.
    ///
    /// # Errors
    /// [`WalkError`] when it has no translation.
    pub fn mapping(&self, at: Gva) -> Result<Mapping, WalkError> {
        walk(self.memory, self.root, at)
    }

    /// Fills `into` from `at`, across as many pages as it takes.
    ///
    /// # Errors
    /// [`SpaceError`] for the first byte that cannot be read; `into` is then unspecified.
    pub fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), SpaceError> {
        let mut rest = into;
        let mut at = at;
        while !rest.is_empty() {
            let (gpa, left) = self.translate(at)?;
            let take = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
            self.left.spend(take)?;
            let (now, later) = rest.split_at_mut(take);
            self.memory
                .read(gpa, now)
                .map_err(|source| SpaceError::Memory {
                    gva: at,
                    gpa,
                    source,
                })?;
            at = at.offset(take as u64);
            rest = later;
        }
        Ok(())
    }

    /// Reads a little-endian number of `size` bytes (1, 2, 4 or 8; more than 8 reads the low 8).
    ///
    /// # Errors
    /// As [`Space::read`].
    pub fn read_sized(&self, at: Gva, size: u64) -> Result<u64, SpaceError> {
        let mut raw = [0; 8];
        let size = usize::try_from(size).unwrap_or(8).min(8);
        if let Some(part) = raw.get_mut(..size) {
            self.read(at, part)?;
        }
        Ok(u64::from_le_bytes(raw))
    }

    /// Reads a little-endian u64.
    ///
    /// # Errors
    /// As [`Space::read`].
    pub fn read_u64(&self, at: Gva) -> Result<u64, SpaceError> {
        self.read_sized(at, 8)
    }

    /// Reads a little-endian u32.
    ///
    /// # Errors
    /// As [`Space::read`].
    pub fn read_u32(&self, at: Gva) -> Result<u32, SpaceError> {
        let mut raw = [0; 4];
        self.read(at, &mut raw)?;
        Ok(u32::from_le_bytes(raw))
    }

    /// Reads a pointer.
    ///
    /// # Errors
    /// As [`Space::read`].
    pub fn read_pointer(&self, at: Gva) -> Result<Gva, SpaceError> {
        self.read_u64(at).map(Gva)
    }

    /// Where a range is in guest-physical memory, page by page.
    ///
    /// # Errors
    /// [`SpaceError`] for the first page without a translation, or when there are too many.
    pub fn pieces(&self, at: Gva, len: u64) -> Result<Vec<Piece>, SpaceError> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut done = 0;
        while done < len {
            self.left.spend(0)?;
            let (gpa, left) = self.translate(at.offset(done))?;
            let take = left.min(len - done);
            match pieces.last_mut() {
                Some(last) if last.gpa.offset(last.len) == gpa => last.len += take,
                _ => pieces.push(Piece { gpa, len: take }),
            }
            done += take;
        }
        Ok(pieces)
    }

    fn remembered(&self, at: Gva) -> Option<Cached> {
        let cache = self.cache.borrow();
        [LARGE_SHIFT, SMALL_SHIFT].into_iter().find_map(|shift| {
            let key = key(at, shift);
            cache
                .get(place(key, cache.len()))
                .filter(|known| known.key == key)
                .copied()
        })
    }

    fn remember(&self, found: Cached) {
        let mut cache = self.cache.borrow_mut();
        let missed = self.missed.get();
        self.missed.set(missed.saturating_add(1));
        match missed {
            0 => cache.resize(FEW_PLACES, NONE),
            // What there was has another place now.
            FEW_PLACES => *cache = vec![NONE; PLACES],
            _ => {}
        }
        let at = place(found.key, cache.len());
        if let Some(place) = cache.get_mut(at) {
            *place = found;
        }
    }

    fn by_walk(&self, at: Gva) -> Result<Cached, WalkError> {
        let mapping = walk(self.memory, self.root, at)?;
        let inside = mapping.page.bytes() - 1;
        let large = inside >> (LARGE_SHIFT - 1) != 0;
        let region = key(at, LARGE_SHIFT);
        if !large {
            if let Some(table) = self.tables.borrow_mut().get_mut(place(region, TABLES)) {
                *table = Table {
                    key: region,
                    at: Gpa(mapping.entry.at.0 & ADDRESS),
                };
            }
        }
        Ok(Cached {
            key: key(at, if large { LARGE_SHIFT } else { SMALL_SHIFT }),
            page: Gpa(mapping.gpa.0 & !inside),
            inside,
        })
    }

    /// By a table of small pages that a walk has led to; the way there is the same.
    fn by_table(&self, at: Gva) -> Option<Cached> {
        let region = key(at, LARGE_SHIFT);
        let table = *self.tables.borrow().get(place(region, TABLES))?;
        let index = at.0 >> SMALL_SHIFT & 0x1ff;
        let raw = (table.key == region)
            .then(|| self.memory.read_u64(table.at.offset(index * 8)).ok())
            .flatten()?;
        (raw & PRESENT != 0).then_some(Cached {
            key: key(at, SMALL_SHIFT),
            page: Gpa(raw & ADDRESS),
            inside: PageSize::Small.bytes() - 1,
        })
    }

    /// The physical address of `at`, and how many bytes its page still has from there.
    fn translate(&self, at: Gva) -> Result<(Gpa, u64), WalkError> {
        let cached = match self.remembered(at) {
            Some(cached) => cached,
            None => {
                let cached = match self.by_table(at) {
                    Some(cached) => cached,
                    None => self.by_walk(at)?,
                };
                self.remember(cached);
                cached
            }
        };
        let offset = at.0 & cached.inside;
        Ok((cached.page.offset(offset), cached.inside - offset + 1))
    }
}

/// A part of a virtual range that is contiguous in guest-physical memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Piece {
    /// Its first byte.
    pub gpa: Gpa,
    /// Its length in bytes.
    pub len: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::fake::FakeGuest;

    const DATA: Gva = Gva(0xffff_c900_0000_0000);

    #[test]
    fn reads_run_across_pages_that_do_not_touch() {
        let mut guest = FakeGuest::new(0x20_0000);
        let first = guest.page(DATA, 0);
        guest.page(Gva(0x1000), 0);
        let second = guest.page(DATA.offset(0x1000), 0);
        assert_ne!(first.offset(0x1000), second);
        guest.put_u64(DATA.offset(0xffc), 0x1122_3344_5566_7788);
        let space = Space::new(&guest.image, guest.root());
        assert_eq!(
            space.read_u64(DATA.offset(0xffc)).unwrap(),
            0x1122_3344_5566_7788
        );
        assert_eq!(space.read_sized(DATA.offset(0xffc), 2).unwrap(), 0x7788);
        assert_eq!(space.read_u32(DATA.offset(0x1000)).unwrap(), 0x1122_3344);
        let pieces = space.pieces(DATA.offset(0xffc), 8).unwrap();
        assert_eq!(
            pieces,
            [
                Piece {
                    gpa: first.offset(0xffc),
                    len: 4
                },
                Piece {
                    gpa: second,
                    len: 4
                }
            ]
        );
    }

    #[test]
    fn many_pages_are_found_again() {
        const COUNT: u64 = 3 * FEW_PLACES as u64;
        let mut guest = FakeGuest::new(0x20_0000);
        let page = |index| DATA.offset(index * 0x1000);
        for index in 0..COUNT {
            guest.page(page(index), 0);
            guest.put_u64(page(index), index);
        }
        let space = Space::new(&guest.image, guest.root());
        for _ in 0..3 {
            for index in 0..COUNT {
                assert_eq!(space.read_u64(page(index)).unwrap(), index);
            }
        }
        assert_eq!(space.cache.borrow().len(), PLACES);
        let known = (0..COUNT).filter(|&index| space.remembered(page(index)).is_some());
        assert!(known.count() > 2 * FEW_PLACES);
    }

    #[test]
    fn a_read_that_leaves_the_mapping_fails() {
        let mut guest = FakeGuest::new(0x20_0000);
        guest.page(DATA, 0);
        let wild = guest.entry(DATA.offset(0x1000), 1);
        guest.set(wild, 0x000f_ffff_0000_0001);
        let space = Space::new(&guest.image, guest.root());
        let mut page = [0; 0x1008];
        let error = space.read(DATA, &mut page).unwrap_err();
        assert!(matches!(error, SpaceError::Memory { gva, .. } if gva == DATA.offset(0x1000)));
        assert!(space.read_u64(DATA.offset(0x2000)).is_err());
        assert!(space.read_u64(Gva(u64::MAX)).is_err());
        assert!(space.pieces(DATA, 0x3000).is_err());
    }
}
