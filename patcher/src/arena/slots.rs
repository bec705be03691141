//! Which parts of a block are taken.

use std::collections::BTreeMap;

/// Slots begin at multiples of this, so that jumps to them land on a fetch boundary.
pub(crate) const SLOT_ALIGN: u64 = 16;

/// First-fit allocation of a block: offsets and lengths only, no memory.
#[derive(Clone, Debug)]
pub(crate) struct Slots {
    len: u64,
    /// Offset of each taken slot, and its length rounded up to [`SLOT_ALIGN`].
    taken: BTreeMap<u64, u64>,
}

impl Slots {
    pub(crate) const fn new(len: u64) -> Self {
        Self {
            len,
            taken: BTreeMap::new(),
        }
    }

    /// Takes `len` bytes (at least one) at an offset that is a multiple of `align`.
    pub(crate) fn take(&mut self, len: u64, align: u64) -> Option<u64> {
        let align = align.max(SLOT_ALIGN);
        let len = len.max(1).checked_next_multiple_of(SLOT_ALIGN)?;
        let mut from: u64 = 0;
        for (&start, &size) in &self.taken {
            let at = from.checked_next_multiple_of(align)?;
            if at.checked_add(len)? <= start {
                break;
            }
            from = start + size;
        }
        let at = from.checked_next_multiple_of(align)?;
        if at.checked_add(len)? > self.len {
            return None;
        }
        self.taken.insert(at, len);
        Some(at)
    }

    /// Gives a slot back and tells its length; `None` when none begins at `offset`.
    pub(crate) fn give_back(&mut self, offset: u64) -> Option<u64> {
        self.taken.remove(&offset)
    }

    /// Length of the slot that begins at `offset`; 0 when none does.
    pub(crate) fn len_at(&self, offset: u64) -> u64 {
        self.taken.get(&offset).copied().unwrap_or(0)
    }

    /// Bytes taken, and how many slots they are in.
    pub(crate) fn used(&self) -> (u64, usize) {
        (self.taken.values().sum(), self.taken.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_do_not_overlap_and_fill_gaps() {
        let mut slots = Slots::new(0x100);
        assert_eq!(slots.take(1, 1), Some(0));
        assert_eq!(slots.take(17, 1), Some(0x10));
        assert_eq!(slots.take(0x20, 0x40), Some(0x40));
        // Before the aligned one there is room for one more.
        assert_eq!(slots.take(0x10, 1), Some(0x30));
        assert_eq!(slots.take(0xa0, 1), Some(0x60));
        assert_eq!(slots.take(1, 1), None);
        assert_eq!(slots.give_back(0x10), Some(0x20));
        assert_eq!(slots.give_back(0x10), None);
        assert_eq!(slots.take(0x21, 1), None);
        assert_eq!(slots.take(0x20, 1), Some(0x10));
        assert_eq!(slots.used(), (0x100, 5));
    }

    #[test]
    fn absurd_sizes_are_refused() {
        let mut slots = Slots::new(0x100);
        assert_eq!(slots.take(u64::MAX, 1), None);
        assert_eq!(slots.take(1, 1 << 63), Some(0));
        assert_eq!(slots.take(1, 1 << 63), None);
        assert_eq!(slots.take(0, 0), Some(0x10));
    }
}
