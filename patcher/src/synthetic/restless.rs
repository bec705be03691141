//! Memory that changes while it is read.

use std::cell::{Cell, RefCell};

use super::Random;
use crate::guest::{Gpa, GuestMemory, MemoryError, MemoryImage, RamRange};

/// An image of which some reads are damaged: a guest that runs while it is looked at, or one that
/// lies differently each time.
#[derive(Debug)]
pub struct Restless<'a> {
    image: &'a MemoryImage,
    random: RefCell<Random>,
    /// One read in so many is damaged.
    rarity: usize,
    reads: Cell<u64>,
}

impl<'a> Restless<'a> {
    /// Damages one read of `image` in `rarity`, by numbers that depend on `seed` alone.
    #[must_use]
    pub fn new(image: &'a MemoryImage, seed: u64, rarity: usize) -> Self {
        Self {
            image,
            random: RefCell::new(Random::new(seed)),
            rarity: rarity.max(1),
            reads: Cell::new(0),
        }
    }

    /// How often it was read.
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.reads.get()
    }
}

impl GuestMemory for Restless<'_> {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.reads.set(self.reads.get() + 1);
        self.image.read(at, into)?;
        let mut random = self.random.borrow_mut();
        if !into.is_empty() && random.below(self.rarity) == 0 {
            random.damage(into);
        }
        Ok(())
    }

    fn ram(&self) -> Vec<RamRange> {
        self.image.ram()
    }
}
