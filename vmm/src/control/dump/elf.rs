//! The headers of an ELF core file.

use patcher::guest::{Gpa, RamRange};

/// A part of guest-physical memory; its end fits into 64 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    start: u64,
    end: u64,
}

impl Range {
    /// `None` when it is empty or reaches beyond 2^64.
    #[must_use]
    pub fn new(begin: u64, length: u64) -> Option<Self> {
        let end = begin.checked_add(length)?;
        (length > 0).then_some(Self { start: begin, end })
    }
}

/// The ranges of RAM within `part`.
pub(super) fn select(ram: &[RamRange], part: Option<Range>) -> Vec<RamRange> {
    let Some(part) = part else {
        return ram.to_vec();
    };
    ram.iter()
        .filter_map(|range| {
            let start = range.start.0.max(part.start);
            let end = range.start.0.saturating_add(range.len).min(part.end);
            (start < end).then(|| RamRange {
                start: Gpa(start),
                len: end - start,
            })
        })
        .collect()
}

const EHDR: u64 = 64;
const PHDR: u64 = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// Memory begins at a page of the file, so that holes in the one are holes in the other.
const ALIGN: u64 = 4096;

/// Everything before memory: the ELF header, the program headers, the notes, and padding. The
/// ranges follow one after the other.
///
/// Numbers are those of the System V ABI (gABI chapter 4 and 5; the AMD64 supplement for the
/// machine). p_vaddr is p_paddr, as QEMU has it: gdb then reads memory by its physical address.
pub(super) fn headers(ranges: &[RamRange], notes: &[u8]) -> Vec<u8> {
    let count = ranges.len() as u64 + 1;
    let notes_at = EHDR + PHDR * count;
    let notes_len = notes.len() as u64;
    let mut memory_at = (notes_at + notes_len).next_multiple_of(ALIGN);

    let mut out = Vec::new();
    out.extend_from_slice(&[
        0x7f, b'E', b'L', b'F', 2, // 64-bit
        1, // little-endian
        1, // version
        0, 0, 0, 0, 0, 0, 0, 0, 0,
    ]);
    let half = |out: &mut Vec<u8>, value: u16| out.extend_from_slice(&value.to_le_bytes());
    let word = |out: &mut Vec<u8>, value: u32| out.extend_from_slice(&value.to_le_bytes());
    let long = |out: &mut Vec<u8>, value: u64| out.extend_from_slice(&value.to_le_bytes());
    half(&mut out, 4); // ET_CORE
    half(&mut out, 62); // EM_X86_64
    word(&mut out, 1);
    long(&mut out, 0); // no entry point
    long(&mut out, EHDR);
    long(&mut out, 0); // no sections
    word(&mut out, 0);
    half(&mut out, 64);
    half(&mut out, 56);
    // Guest RAM is a handful of ranges.
    half(&mut out, u16::try_from(count).unwrap_or(u16::MAX));
    half(&mut out, 0);
    half(&mut out, 0);
    half(&mut out, 0);

    let mut segment = |kind: u32, offset: u64, address: u64, len: u64| {
        word(&mut out, kind);
        word(&mut out, 0);
        for value in [offset, address, address, len, len, 0] {
            long(&mut out, value);
        }
    };
    segment(PT_NOTE, notes_at, 0, notes_len);
    for range in ranges {
        segment(PT_LOAD, memory_at, range.start.0, range.len);
        memory_at = memory_at.saturating_add(range.len);
    }
    out.extend_from_slice(notes);
    out.resize(out.len().next_multiple_of(4096), 0);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> RamRange {
        RamRange {
            start: Gpa(start),
            len,
        }
    }

    #[test]
    fn parts_are_cut_at_the_ends_of_ram() {
        let ram = [range(0, 0x1000), range(0x10_0000, 0x1000)];
        let cut = |begin, length| select(&ram, Range::new(begin, length));
        assert_eq!(select(&ram, None), ram);
        assert_eq!(cut(0, 1), [range(0, 1)]);
        assert_eq!(
            cut(0xfff, 0x10_0000),
            [range(0xfff, 1), range(0x10_0000, 0xfff)]
        );
        assert_eq!(cut(0x1000, 0xf_f000), []);
        assert_eq!(cut(0, u64::MAX), ram);
        assert_eq!(Range::new(0, 0), None);
        assert_eq!(Range::new(2, u64::MAX), None);
        let odd = [range(u64::MAX - 1, u64::MAX)];
        assert_eq!(
            select(&odd, Range::new(u64::MAX - 1, 1)).len(),
            1,
            "no overflow"
        );
    }

    #[test]
    fn memory_begins_at_a_page_of_the_file() {
        for notes in [0, 1, 4096, 5000] {
            let bytes = headers(&[range(0, 0x1000)], &vec![0; notes]);
            assert_eq!(bytes.len() % 4096, 0);
        }
    }
}
