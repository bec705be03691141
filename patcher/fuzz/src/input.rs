//! Numbers out of fuzzed bytes.

/// Bytes that are used up from the front. When there are none left, every number is 0.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of `bytes`.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether all is used up.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `len` bytes, or as many as are left.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (now, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        now
    }

    /// What is left.
    #[must_use]
    pub const fn rest(&self) -> &'a [u8] {
        self.0
    }

    /// A byte.
    pub fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    /// Two bytes, little-endian.
    pub fn short(&mut self) -> u16 {
        u16::from(self.byte()) | u16::from(self.byte()) << 8
    }

    /// Eight bytes, little-endian.
    pub fn long(&mut self) -> u64 {
        let mut raw = [0; 8];
        for (to, from) in raw.iter_mut().zip(self.bytes(8)) {
            *to = *from;
        }
        u64::from_le_bytes(raw)
    }

    /// One of `all`.
    pub fn pick<'t, T>(&mut self, all: &'t [T]) -> Option<&'t T> {
        let number = usize::from(self.short());
        all.get(number.checked_rem(all.len())?)
    }
}
