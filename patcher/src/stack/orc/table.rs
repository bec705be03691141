//! A table of entries, found by address.

use super::format::{ENTRY, HASH, OrcFormat, Rule};
use crate::image::Image;

/// Bytes of text that one block of the index covers, at the least, as a power of two. The kernel's
/// own index (LOOKUP_BLOCK_ORDER) has the same.
const BLOCK: u32 = 8;

/// Why a table cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OrcError {
    /// The kernel was built with another unwinder.
    #[error("the kernel's file has no {section} section: it was built without the ORC unwinder")]
    Missing {
        /// The section.
        section: &'static str,
    },
    /// A format that came after this was written.
    #[error("the kernel's unwind tables are of a format that is not known (hash {hash})")]
    UnknownFormat {
        /// What `.orc_header` holds, in hexadecimal.
        hash: String,
    },
    /// The tables are cut off.
    #[error("the unwind tables have {addresses} bytes of addresses and {entries} of entries")]
    Lengths {
        /// Bytes of addresses, 4 for each entry.
        addresses: usize,
        /// Bytes of entries, 6 for each.
        entries: usize,
    },
    /// Entries that cannot be searched.
    #[error("the unwind tables are not sorted at entry {index}")]
    Unsorted {
        /// The first entry that is below the one before it, or too far away.
        index: usize,
    },
    /// An entry that its format does not have.
    #[error("entry {index} of the unwind tables is not of the format {format:?}")]
    BadEntry {
        /// The entry.
        index: usize,
        /// The format that was expected.
        format: OrcFormat,
    },
}

/// Unwind rules by address. Addresses are whatever they were built with: link addresses for a
/// kernel's file, virtual addresses for a module in guest memory.
pub struct OrcTable {
    format: OrcFormat,
    /// Address of the first entry.
    base: u64,
    /// Distance of each entry from the first, ascending.
    starts: Vec<u32>,
    rules: Vec<[u8; ENTRY]>,
    /// A block covers two to the power of this many bytes.
    shift: u32,
    /// For each block, how many entries start before it.
    blocks: Vec<u32>,
}

impl std::fmt::Debug for OrcTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} unwind rules ({:?})", self.len(), self.format)
    }
}

impl OrcTable {
    /// The table of a kernel's file.
    ///
    /// # Errors
    /// [`OrcError`]: none, of an unknown format, or damaged.
    pub fn of(image: &Image) -> Result<Self, OrcError> {
        let section = |name: &'static str| {
            let section = image.section(name);
            section
                .and_then(|section| Some((section.address.0, image.section_bytes(section)?)))
                .ok_or(OrcError::Missing { section: name })
        };
        let (slots, addresses) = section(".orc_unwind_ip")?;
        let (_, entries) = section(".orc_unwind")?;
        let format = match section(".orc_header") {
            Ok((_, hash)) => format_of(hash)?,
            Err(_) => OrcFormat::Plain,
        };
        Self::new(format, slots, addresses, entries)
    }

    /// A table whose addresses are relative to their own places, the first of which is `slots`.
    ///
    /// # Errors
    /// [`OrcError`] when it is damaged.
    pub fn new(
        format: OrcFormat,
        slots: u64,
        addresses: &[u8],
        entries: &[u8],
    ) -> Result<Self, OrcError> {
        let count = addresses.len() / 4;
        let whole = addresses.len() == count * 4 && entries.len() == count * ENTRY;
        if !whole || u32::try_from(count).is_err() {
            return Err(OrcError::Lengths {
                addresses: addresses.len(),
                entries: entries.len(),
            });
        }
        let addresses = chunks::<4>(addresses);
        let rules: Vec<[u8; ENTRY]> = chunks(entries).collect();
        let address = |index: usize, raw: [u8; 4]| {
            slots
                .wrapping_add(4 * index as u64)
                .wrapping_add_signed(i32::from_le_bytes(raw).into())
        };
        let base = addresses.clone().next().map_or(0, |raw| address(0, raw));
        let mut starts = Vec::with_capacity(count);
        let mut last = 0;
        for (index, raw) in addresses.enumerate() {
            let start = u32::try_from(address(index, raw).wrapping_sub(base));
            let start = start.ok().filter(|&start| start >= last);
            last = start.ok_or(OrcError::Unsorted { index })?;
            starts.push(last);
        }
        let bad = rules
            .iter()
            .position(|&raw| Rule::decode(format, raw).is_none());
        if let Some(index) = bad {
            return Err(OrcError::BadEntry { index, format });
        }
        let (shift, blocks) = index(&starts);
        Ok(Self {
            format,
            base,
            starts,
            rules,
            shift,
            blocks,
        })
    }

    /// How entries are written.
    #[must_use]
    pub const fn format(&self) -> OrcFormat {
        self.format
    }

    /// How many entries there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Bytes of memory that it takes.
    #[must_use]
    pub fn resident(&self) -> usize {
        self.starts.capacity() * 4 + self.rules.capacity() * ENTRY + self.blocks.capacity() * 4
    }

    /// The rule for `address`: that of the last entry that starts at or before it. Entries reach to
    /// the next one, the last of them has no end: the caller knows where the text ends.
    pub(in crate::stack) fn find(&self, address: u64) -> Option<Rule> {
        let distance = u32::try_from(address.checked_sub(self.base)?).ok()?;
        let block = usize::try_from(distance >> self.shift).ok()?;
        let below = |block| self.blocks.get(block).map_or(self.len(), |&n| n as usize);
        let (first, end) = (below(block), below(block.saturating_add(1)));
        let inside = self.starts.get(first..end)?;
        // Of equal addresses the last one counts: the others end what was before it.
        let index = first + inside.partition_point(|&start| start <= distance);
        Rule::decode(self.format, *self.rules.get(index.checked_sub(1)?)?)
    }
}

fn chunks<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> + Clone {
    bytes.chunks_exact(N).filter_map(|raw| raw.try_into().ok())
}

/// The format that the hash in `.orc_header` stands for.
pub(in crate::stack) fn format_of(header: &[u8]) -> Result<OrcFormat, OrcError> {
    let hash = header.get(..HASH).unwrap_or(header);
    OrcFormat::of_hash(hash).ok_or_else(|| OrcError::UnknownFormat {
        hash: hash.iter().map(|byte| format!("{byte:02x}")).collect(),
    })
}

/// For blocks of text, how many entries start before each. Never more blocks than entries.
fn index(starts: &[u32]) -> (u32, Vec<u32>) {
    let span = starts.last().copied().unwrap_or(0);
    let mut shift = BLOCK;
    while shift < 31 && (span >> shift) as usize > starts.len() {
        shift += 1;
    }
    let mut blocks = Vec::with_capacity((span >> shift) as usize + 2);
    for (before, start) in (0..).zip(starts) {
        let block = (start >> shift) as usize;
        if blocks.len() <= block {
            blocks.resize(block + 1, before);
        }
    }
    blocks.push(u32::try_from(starts.len()).unwrap_or(u32::MAX));
    (shift, blocks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::Orc;

    fn offset(table: &OrcTable, at: u64) -> Option<i64> {
        table.find(at).map(|rule| rule.cfa_offset)
    }

    fn table(starts: &[u64]) -> Result<OrcTable, OrcError> {
        let mut orc = Orc::new(0x9000);
        for (number, &start) in (1..).zip(starts) {
            orc.call(start, number);
        }
        let (addresses, entries) = orc.write(OrcFormat::Signal);
        OrcTable::new(OrcFormat::Signal, 0x9000, &addresses, &entries)
    }

    #[test]
    fn the_last_of_equal_addresses_counts() {
        let table = table(&[0x1000, 0x1010, 0x1010, 0x1010, 0x5000]).unwrap();
        for (at, expected) in [
            (0, None),
            (0xfff, None),
            (0x1000, Some(1)),
            (0x100f, Some(1)),
            (0x1010, Some(4)),
            (0x4fff, Some(4)),
            (0x5000, Some(5)),
            (0x9_0000_0000, None),
            (u64::MAX, None),
        ] {
            assert_eq!(offset(&table, at), expected, "{at:#x}");
        }
        assert_eq!(offset(&table, 0x8_0000), Some(5));
    }

    #[test]
    fn a_search_with_and_without_the_index_agrees() {
        let mut random = crate::synthetic::Random::new(7);
        let mut starts: Vec<u64> = (0..2000).map(|_| random.below(0x4_0000) as u64).collect();
        starts.sort_unstable();
        let table = table(&starts).unwrap();
        for at in 0..0x4_1000 {
            let below = starts.partition_point(|&start| start <= at);
            let expected = i64::try_from(below).ok().filter(|&n| n > 0);
            assert_eq!(offset(&table, at), expected, "{at:#x}");
        }
    }

    #[test]
    fn an_index_is_not_larger_than_its_table() {
        let table = table(&[0, 0x7000_0000]).unwrap();
        assert!(table.blocks.len() <= 4, "{}", table.blocks.len());
        assert_eq!(offset(&table, 0x6fff_ffff), Some(1));
        assert_eq!(offset(&table, 0x7000_0000), Some(2));
    }

    #[test]
    fn damaged_tables_are_refused() {
        assert_eq!(
            table(&[0x20, 0x10]).unwrap_err(),
            OrcError::Unsorted { index: 1 }
        );
        let new = |addresses: &[u8], entries: &[u8]| {
            OrcTable::new(OrcFormat::Plain, 0, addresses, entries).unwrap_err()
        };
        assert!(matches!(new(&[0; 7], &[0; 6]), OrcError::Lengths { .. }));
        assert!(matches!(new(&[0; 8], &[0; 6]), OrcError::Lengths { .. }));
        assert!(matches!(new(&[0; 4], &[0; 5]), OrcError::Lengths { .. }));
        let bad = new(&[0; 4], &[0, 0, 0, 0, 5, 0xff]);
        assert!(matches!(bad, OrcError::BadEntry { index: 0, .. }));
        let empty = OrcTable::new(OrcFormat::Plain, 0, &[], &[]).unwrap();
        assert!(empty.is_empty());
        assert_eq!(empty.find(0), None);
    }

    #[test]
    fn unknown_formats_are_refused() {
        let error = format_of(&[7; 20]).unwrap_err();
        assert!(error.to_string().contains("0707"), "{error}");
        assert!(format_of(&[]).is_err());
    }
}
