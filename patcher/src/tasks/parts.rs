//! Members of a structure, read together.
//!
//! A `task_struct` has thousands of bytes, of which a few dozen are wanted, in some places close
//! together. What is close is read at once: neither member by member nor all of it.

use crate::guest::Gva;
use crate::space::{Space, SpaceError};
use crate::types::Field;

/// Bytes between two members that are read along with them: less than another read costs.
const GAP: u64 = 192;
/// A member larger than this is not believed.
const MAX_FIELD: u64 = 256;

/// The parts of a structure that hold some of its members.
#[derive(Clone, Debug, Default)]
pub(crate) struct Parts {
    /// Offset in the structure, length, and where it begins in what is read.
    parts: Vec<Part>,
    len: usize,
}

#[derive(Clone, Copy, Debug)]
struct Part {
    offset: u64,
    len: usize,
    start: usize,
}

/// Members of one structure.
pub(crate) struct Record<'p> {
    parts: &'p Parts,
    bytes: Vec<u8>,
}

impl Parts {
    /// The parts that hold `fields`.
    pub(crate) fn of(fields: impl IntoIterator<Item = Field>) -> Self {
        let mut spans: Vec<(u64, u64)> = fields
            .into_iter()
            .map(|field| {
                let end = field.offset.saturating_add(field.size.min(MAX_FIELD));
                (field.offset, end)
            })
            .collect();
        spans.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (start, end) in spans {
            match merged.last_mut() {
                Some((_, last)) if start <= last.saturating_add(GAP) => *last = end.max(*last),
                _ => merged.push((start, end)),
            }
        }
        let mut parts = Self::default();
        for (offset, end) in merged {
            let len = usize::try_from(end - offset).unwrap_or(0);
            let start = parts.len;
            parts.parts.push(Part { offset, len, start });
            parts.len += len;
        }
        parts
    }

    /// Room for them, of which nothing has been read.
    pub(crate) fn empty(&self) -> Record<'_> {
        Record {
            parts: self,
            bytes: vec![0; self.len],
        }
    }
}

impl Record<'_> {
    /// Reads them from the structure at `base`. After an error they are unspecified.
    pub(crate) fn fill(&mut self, space: &Space<'_>, base: Gva) -> Result<(), SpaceError> {
        let mut rest = self.bytes.as_mut_slice();
        for part in &self.parts.parts {
            let (now, later) = rest.split_at_mut(part.len.min(rest.len()));
            space.read(base.offset(part.offset), now)?;
            rest = later;
        }
        Ok(())
    }

    /// The bytes of a member; none of one that was not asked for.
    pub(crate) fn bytes(&self, field: Field) -> &[u8] {
        let found = self.parts.parts.iter().find_map(|part| {
            let skip = usize::try_from(field.offset.checked_sub(part.offset)?).ok()?;
            let end = skip.checked_add(usize::try_from(field.size.min(MAX_FIELD)).ok()?)?;
            (end <= part.len).then(|| part.start + skip..part.start + end)
        });
        found
            .and_then(|range| self.bytes.get(range))
            .unwrap_or_default()
    }

    /// A number of up to 8 bytes, of a bit field its bits.
    pub(crate) fn number(&self, field: Field) -> u64 {
        let raw = little_endian(self.bytes(field));
        field.bits.map_or(raw, |bits| bits.extract(raw))
    }

    /// The pointer at an offset.
    pub(crate) fn pointer(&self, offset: u64) -> Gva {
        Gva(self.number(pointer_at(offset)))
    }
}

/// The first 8 bytes as a number, or all of them when there are fewer.
fn little_endian(bytes: &[u8]) -> u64 {
    match *bytes {
        [a] => a.into(),
        [a, b] => u16::from_le_bytes([a, b]).into(),
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]).into(),
        [a, b, c, d, e, f, g, h, ..] => u64::from_le_bytes([a, b, c, d, e, f, g, h]),
        _ => bytes
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | u64::from(*byte)),
    }
}

/// A pointer as a member.
pub(crate) const fn pointer_at(offset: u64) -> Field {
    Field {
        offset,
        size: 8,
        bits: None,
        pointer: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::fake::FakeGuest;

    const DATA: Gva = Gva(0xffff_c900_0000_0f00);

    #[test]
    fn members_are_where_they_are_without_the_rest() {
        let mut guest = FakeGuest::new(0x10_0000);
        guest.map(DATA, 0x1200, 0);
        for offset in 0..0x1000_u64 {
            guest.put(DATA.offset(offset), &[offset.to_le_bytes()[0]]);
        }
        let field = |offset, size| Field {
            size,
            ..pointer_at(offset)
        };
        let all = [
            field(0x20, 4),
            field(0x10, 8),
            field(0x28, 16),
            field(0xff8, 2),
        ];
        let parts = Parts::of(all);
        assert_eq!((parts.parts.len(), parts.len), (2, 0x28 + 2));
        let space = crate::space::Space::new(&guest.image, guest.root());
        let mut record = parts.empty();
        record.fill(&space, DATA).unwrap();
        assert_eq!(record.number(field(0x20, 4)), 0x2322_2120);
        assert_eq!(record.pointer(0x10), Gva(0x1716_1514_1312_1110));
        assert_eq!(record.bytes(field(0x28, 16)).len(), 16);
        assert_eq!(record.number(field(0xff8, 2)), 0xf9f8);
        // It was not asked for.
        assert_eq!(record.number(field(0x800, 8)), 0);
        assert!(record.fill(&space, DATA.offset(0x2000)).is_err());
    }
}
