//! Numbers that look random and can be had again.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::Failure;

/// What to begin with: `STILLPOINT_TEST_SEED`, else what the time is. Say it, so that it can be given.
///
/// # Errors
///
/// When what is given is no number.
pub fn seed() -> Result<u64, Failure> {
    match std::env::var("STILLPOINT_TEST_SEED") {
        Ok(text) => text
            .parse()
            .map_err(|_| Failure::new(format!("STILLPOINT_TEST_SEED is no number: {text}"))),
        Err(_) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
            Ok(u64::from(now.subsec_nanos()) ^ now.as_secs())
        }
    }
}

/// SplitMix64, as public domain code by Sebastiano Vigna describes it.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The series of a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Another series for each `number`.
    #[must_use]
    pub const fn fork(&self, number: u64) -> Self {
        Self(self.0 ^ number.wrapping_mul(0xd6e8_feb8_6659_fd93))
    }

    /// The next of 64 bits.
    #[allow(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    /// True so often of 100 times.
    pub fn percent(&mut self, of_hundred: u64) -> bool {
        self.below(100) < of_hundred
    }

    /// One of `all`, if there is one.
    pub fn one_of<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        let index = self.below(all.len() as u64);
        all.get(usize::try_from(index).ok()?)
    }

    /// The index of one of so many.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or(0)
    }

    /// Puts `all` into another order.
    pub fn shuffle<T>(&mut self, all: &mut [T]) {
        for end in (1..all.len()).rev() {
            let other = self.index(end + 1);
            all.swap(end, other);
        }
    }
}
