//! Pages of a guest, copied in one moment and looked at later.
//!
//! What work on a guest's memory will read is known best by doing it: [`Copies::follow`] does it on
//! the running guest, and remembers the pages; whatever comes of it is worth nothing. Then
//! [`Copies::refresh`] copies just these pages from the stopped guest, which takes no longer than
//! copying does; and the work is done again, on the copies. Guaranteed: what is read from copies
//! is of the moment of the last refresh, or is an error. What the guest has led elsewhere in
//! between is missing: such pages are remembered as well, for the next time.

use std::cell::RefCell;
use std::collections::HashMap;

use super::{Gpa, GuestMemory, MemoryError, RamRange};

const PAGE: usize = 1 << 12;

/// Most bytes that are copied unless [`Copies::with_limit`] says otherwise: several times the text
/// of any kernel.
pub const USUAL_COPIES: usize = 128 << 20;

/// Copied pages. Without any, every read is an error.
#[derive(Debug)]
pub struct Copies {
    inner: RefCell<Inner>,
    limit: usize,
}

#[derive(Debug, Default)]
struct Inner {
    bytes: Vec<u8>,
    /// Where each page is in `bytes`, by page number.
    places: HashMap<u64, usize>,
    /// How much of `bytes` was there at the last refresh; what is behind was wanted since.
    fresh: usize,
    ram: Vec<RamRange>,
    /// The limit was hit.
    full: bool,
}

/// A running guest whose pages are copied as they are read.
#[derive(Clone, Copy)]
pub struct Following<'a> {
    copies: &'a Copies,
    memory: &'a dyn GuestMemory,
}

/// Number and extent of the page at `at`, as far as `len` bytes from there go.
fn page(at: Gpa, len: usize) -> (u64, std::ops::Range<usize>) {
    let skip = usize::try_from(at.0).unwrap_or(usize::MAX) & (PAGE - 1);
    (at.0 / PAGE as u64, skip..PAGE.min(skip + len))
}

fn outside(at: Gpa, len: usize) -> MemoryError {
    MemoryError::OutOfRange {
        at,
        len: len as u64,
    }
}

impl Default for Copies {
    fn default() -> Self {
        Self::new()
    }
}

impl Copies {
    /// No pages yet.
    #[must_use]
    pub fn new() -> Self {
        Self::with_limit(USUAL_COPIES)
    }

    /// No pages yet, and never more than `limit` bytes of them.
    #[must_use]
    pub fn with_limit(limit: usize) -> Self {
        Self {
            inner: RefCell::default(),
            limit,
        }
    }

    /// A view of a running guest that remembers, page by page, what is read through it.
    #[must_use]
    pub fn follow<'a>(&'a self, memory: &'a dyn GuestMemory) -> Following<'a> {
        Following {
            copies: self,
            memory,
        }
    }

    /// Copies every page anew, and those that were missing. Room for them is there already.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] when a page is gone, which RAM never is.
    pub fn refresh(&mut self, memory: &dyn GuestMemory) -> Result<(), MemoryError> {
        let inner = self.inner.get_mut();
        inner.ram = memory.ram();
        let mut order: Vec<_> = inner.places.iter().map(|(&n, &at)| (n, at)).collect();
        order.sort_unstable();
        // Pages that were read one behind the other are copied in one piece.
        let touch = |a: &(u64, usize), b: &(u64, usize)| a.0 + 1 == b.0 && a.1 + PAGE == b.1;
        for run in order.chunk_by(touch) {
            let Some(&(number, at)) = run.first() else {
                continue;
            };
            if let Some(into) = inner.bytes.get_mut(at..at + run.len() * PAGE) {
                memory.read(Gpa(number * PAGE as u64), into)?;
            }
        }
        inner.fresh = inner.bytes.len();
        Ok(())
    }

    /// Whether something was wanted since the last refresh that had not been copied, and whether
    /// another refresh can help.
    #[must_use]
    pub fn lacks(&self) -> Option<Lack> {
        let inner = self.inner.borrow();
        match inner.full {
            true => Some(Lack::Room),
            false => (inner.fresh < inner.bytes.len()).then_some(Lack::Pages),
        }
    }

    /// Bytes that are copied.
    #[must_use]
    pub fn len(&self) -> usize {
        self.inner.borrow().bytes.len()
    }

    /// Whether nothing is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What copies lack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lack {
    /// Pages that the next [`Copies::refresh`] brings.
    Pages,
    /// There is no room for more.
    Room,
}

impl Inner {
    /// Makes room for a page.
    fn want(&mut self, number: u64, limit: usize) {
        if self.places.contains_key(&number) {
            return;
        }
        let at = self.bytes.len();
        if limit.saturating_sub(at) < PAGE {
            self.full = true;
            return;
        }
        // Written, so that the host need not give memory while the guest is stopped.
        self.bytes.resize(at + PAGE, 1);
        self.places.insert(number, at);
    }

    fn get(&self, number: u64) -> Option<&[u8]> {
        let &at = self.places.get(&number)?;
        self.bytes.get(..self.fresh)?.get(at..at.checked_add(PAGE)?)
    }
}

impl GuestMemory for Copies {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        let mut inner = self.inner.borrow_mut();
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let here = at.offset(done as u64);
            let (number, part) = page(here, rest.len());
            let Some(bytes) = inner.get(number).and_then(|page| page.get(part)) else {
                let lacking = inner.ram.iter().any(|range| {
                    here.0
                        .checked_sub(range.start.0)
                        .is_some_and(|skip| skip < range.len)
                });
                // What is no RAM at all will not come either.
                if lacking {
                    inner.want(number, self.limit);
                }
                return Err(outside(at, into.len()));
            };
            for (to, from) in rest.iter_mut().zip(bytes) {
                *to = *from;
            }
            done += bytes.len();
        }
        Ok(())
    }

    fn ram(&self) -> Vec<RamRange> {
        self.inner.borrow().ram.clone()
    }
}

impl GuestMemory for Following<'_> {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(at, into)?;
        let mut inner = self.copies.inner.borrow_mut();
        let mut done = 0;
        while done < into.len() {
            let (number, part) = page(at.offset(done as u64), into.len() - done);
            inner.want(number, self.copies.limit);
            done += part.len();
        }
        Ok(())
    }

    fn ram(&self) -> Vec<RamRange> {
        self.memory.ram()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{MemoryImage, StoppedGuest};

    fn image() -> MemoryImage {
        let ram = (0..0x4000_u32).map(|n| n.to_le_bytes()[1]).collect();
        MemoryImage::new(vec![(Gpa(0), ram)], Vec::new()).unwrap()
    }

    #[test]
    fn copies_are_of_one_moment() {
        let mut guest = image();
        let mut copies = Copies::new();
        let mut two = [0; 2];
        copies.follow(&guest).read(Gpa(0x1fff), &mut two).unwrap();
        assert_eq!(two, [0x1f, 0x20]);
        copies.refresh(&guest).unwrap();
        guest.write(Gpa(0x1ffe), &[7; 4]).unwrap();
        copies.read(Gpa(0x1fff), &mut two).unwrap();
        assert_eq!((two, copies.lacks()), ([0x1f, 0x20], None));
        copies.refresh(&guest).unwrap();
        copies.read(Gpa(0x1fff), &mut two).unwrap();
        assert_eq!((two, copies.len()), ([7, 7], 2 * PAGE));
    }

    #[test]
    fn what_is_missing_comes_with_the_next_refresh() {
        let guest = image();
        let mut copies = Copies::new();
        copies.refresh(&guest).unwrap();
        assert!(copies.read_u64(Gpa(0x2ffc)).is_err());
        assert_eq!(copies.lacks(), Some(Lack::Pages));
        assert!(copies.read_u64(Gpa(0x2ff0)).is_err());
        copies.refresh(&guest).unwrap();
        assert!(copies.read_u64(Gpa(0x2ffc)).is_err());
        copies.refresh(&guest).unwrap();
        assert_eq!(copies.read_u64(Gpa(0x2ffc)), guest.read_u64(Gpa(0x2ffc)));
        assert_eq!(copies.lacks(), None);
        // There is nothing to come.
        assert!(copies.read_u64(Gpa(0x4000)).is_err());
        assert_eq!(copies.lacks(), None);
    }

    #[test]
    fn there_is_a_limit() {
        let guest = image();
        let copies = Copies::with_limit(2 * PAGE);
        let mut bytes = [0; 0x3000];
        copies.follow(&guest).read(Gpa(0), &mut bytes).unwrap();
        assert_eq!((copies.len(), copies.lacks()), (2 * PAGE, Some(Lack::Room)));
    }
}
