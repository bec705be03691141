//! Numbers that look random, and come again from the same seed.

use std::time::{SystemTime, UNIX_EPOCH};

/// Marsaglia's xorshift with 64 bits.
pub(crate) struct Random {
    seed: u64,
    state: u64,
}

impl Random {
    /// From `STILLPOINT_TEST_SEED`, else from the time.
    pub(crate) fn new() -> Self {
        let given = std::env::var("STILLPOINT_TEST_SEED").ok();
        let given = given.and_then(|text| {
            let text = text.trim_start_matches("0x");
            u64::from_str_radix(text, 16).ok()
        });
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(1, |now| {
            now.as_secs() ^ (u64::from(now.subsec_nanos()) << 20)
        });
        let seed = given.unwrap_or(now).max(1);
        Self { seed, state: seed }
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    /// Below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 11) % end
    }

    pub(crate) fn shuffle<T>(&mut self, all: &mut [T]) {
        for end in (1..all.len()).rev() {
            let other = self.below(end as u64 + 1);
            all.swap(end, usize::try_from(other).unwrap_or(0));
        }
    }
}
