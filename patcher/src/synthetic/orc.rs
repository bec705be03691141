//! Writes unwind tables as objtool and sorttable do.

use crate::stack::OrcFormat;

/// Unwind tables to write.
#[derive(Clone, Debug)]
pub struct Orc {
    slots: u64,
    entries: Vec<Entry>,
}

/// An entry, with the numbers of the format of 6.12.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    start: u64,
    offset: i16,
    register: u8,
    kind: u8,
    bp: u8,
    bp_offset: i16,
}

const SP: u8 = 5;
const AT_SP: u8 = 9;
const PREV_SP: u8 = 1;
const SIGNAL: u8 = 8;

impl Orc {
    /// Tables whose addresses are written from `slots` on.
    #[must_use]
    pub const fn new(slots: u64) -> Self {
        Self {
            slots,
            entries: Vec::new(),
        }
    }

    fn add(&mut self, start: u64, offset: i16, register: u8, kind: u8) {
        self.entries.push(Entry {
            start,
            offset,
            register,
            kind,
            ..Entry::default()
        });
    }

    /// From `start` on the return address is below `offset` bytes of stack.
    pub fn call(&mut self, start: u64, offset: i16) {
        self.add(start, offset, SP, 2);
    }

    /// As [`Orc::call`], and the caller's base pointer is `bp` bytes from there.
    pub fn call_with_bp(&mut self, start: u64, offset: i16, bp: i16) {
        self.entries.push(Entry {
            start,
            offset,
            register: SP,
            kind: 2,
            bp: PREV_SP,
            bp_offset: bp,
        });
    }

    /// From `start` on there are `offset` bytes of stack below saved registers.
    pub fn regs(&mut self, start: u64, offset: i16) {
        self.add(start, offset, SP, 3 | SIGNAL);
    }

    /// From `start` on there are `offset` bytes of stack below what an interrupt pushes.
    pub fn partial(&mut self, start: u64, offset: i16) {
        self.add(start, offset, SP, 4 | SIGNAL);
    }

    /// From `start` on the word at the stack pointer leads to another stack.
    pub fn indirect(&mut self, start: u64, offset: i16) {
        self.add(start, offset, AT_SP, 2);
    }

    /// From `start` on nothing is known.
    pub fn undefined(&mut self, start: u64) {
        self.add(start, 0, 0, 0);
    }

    /// From `start` on there are no callers.
    pub fn end(&mut self, start: u64) {
        self.add(start, 0, 0, 1);
    }

    /// Addresses and entries, in a format.
    #[must_use]
    pub fn write(&self, format: OrcFormat) -> (Vec<u8>, Vec<u8>) {
        let (mut addresses, mut entries) = (Vec::new(), Vec::new());
        for (index, entry) in self.entries.iter().enumerate() {
            let slot = self.slots + 4 * index as u64;
            addresses.extend((entry.start.wrapping_sub(slot) as u32).to_le_bytes());
            entries.extend(entry.offset.to_le_bytes());
            entries.extend(entry.bp_offset.to_le_bytes());
            let Entry {
                register, kind, bp, ..
            } = *entry;
            let (register, bp, last) = match format {
                OrcFormat::Plain => match kind & 7 {
                    0 => (0, bp, 0),
                    1 => (0, bp, 4),
                    other => (register, bp, other - 2),
                },
                OrcFormat::Signal => (register, bp, kind),
                OrcFormat::Renumbered => {
                    let register = if register == 5 { 3 } else { register };
                    (register, bp << 3, kind)
                }
            };
            entries.extend([register | bp << 4, last]);
        }
        (addresses, entries)
    }
}
