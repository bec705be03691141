//! The text as it should be: a copy of the file's code that is changed as the boot changes it.

use std::ops::Range;

use super::report::Class;
use crate::Kernel;
use crate::guest::{Gva, LinkAddr, Slide};

/// A stretch of code.
struct Part {
    start: LinkAddr,
    bytes: Vec<u8>,
}

/// A place that the guest's kernel writes, or may write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Mark {
    pub(super) at: LinkAddr,
    pub(super) len: u8,
    pub(super) class: Class,
}

impl Mark {
    pub(super) fn range(&self) -> Range<LinkAddr> {
        self.at..self.at.offset(self.len.into())
    }
}

/// Code by link address, and the places in it that were written.
///
/// Beside the kernel's text it holds the replacements of alternatives, which the boot patches as
/// well before it copies them.
pub(super) struct Sheet {
    parts: Vec<Part>,
    marks: Vec<Mark>,
    also: Vec<(LinkAddr, Vec<u8>)>,
    pub(super) slide: Slide,
}

impl Sheet {
    /// The code of `kernel`'s file.
    pub(super) fn of(kernel: &Kernel, slide: Slide) -> Self {
        let image = kernel.image();
        let code = image.sections().iter().filter(|section| {
            section.allocated && section.executable && !section.name.starts_with(".exit")
        });
        let parts = code.filter_map(|section| {
            Some(Part {
                start: section.address,
                bytes: image.section_bytes(section)?.to_vec(),
            })
        });
        Self {
            parts: parts.collect(),
            marks: Vec::new(),
            also: Vec::new(),
            slide,
        }
    }

    fn part(&self, at: LinkAddr, len: usize) -> Option<(usize, Range<usize>)> {
        self.parts.iter().enumerate().find_map(|(index, part)| {
            let from = usize::try_from(at.0.checked_sub(part.start.0)?).ok()?;
            let range = from..from.checked_add(len)?;
            (range.end <= part.bytes.len()).then_some((index, range))
        })
    }

    /// The `len` bytes at `at`.
    pub(super) fn get(&self, at: LinkAddr, len: usize) -> Option<&[u8]> {
        let (index, range) = self.part(at, len)?;
        self.parts.get(index)?.bytes.get(range)
    }

    /// The bytes from `at` on, `most` of them or as many as there are.
    pub(super) fn from(&self, at: LinkAddr, most: usize) -> Option<&[u8]> {
        let (index, range) = self.part(at, 1)?;
        let rest = self.parts.get(index)?.bytes.get(range.start..)?;
        rest.get(..most).or(Some(rest))
    }

    /// The four bytes at `at` as a distance.
    pub(super) fn distance(&self, at: LinkAddr) -> Option<i64> {
        let raw = self.get(at, 4)?.try_into().ok()?;
        Some(i32::from_le_bytes(raw).into())
    }

    /// Where the direct jump or call of 5 bytes at `at` leads.
    pub(super) fn target(&self, at: LinkAddr) -> Option<LinkAddr> {
        Some(at.offset(5).displace(self.distance(at.offset(1))?))
    }

    /// Writes, without a mark. Whether it is code that is known.
    pub(super) fn set(&mut self, at: LinkAddr, bytes: &[u8]) -> bool {
        let Some((index, range)) = self.part(at, bytes.len()) else {
            return false;
        };
        let to = self.parts.get_mut(index);
        let Some(to) = to.and_then(|part| part.bytes.get_mut(range)) else {
            return false;
        };
        to.copy_from_slice(bytes);
        true
    }

    /// Writes what belongs to a place of `class`.
    pub(super) fn put(&mut self, at: LinkAddr, bytes: &[u8], class: Class) {
        if self.set(at, bytes) {
            self.mark(at, bytes.len(), class);
        }
    }

    /// Remembers a place of `class` whose bytes stay as they are.
    pub(super) fn mark(&mut self, at: LinkAddr, len: usize, class: Class) {
        let len = u8::try_from(len).unwrap_or(u8::MAX);
        self.marks.push(Mark { at, len, class });
    }

    /// Remembers that `bytes` can stand at `at` as well: what is there depends on the past.
    pub(super) fn also(&mut self, at: LinkAddr, bytes: &[u8]) {
        self.also.push((at, bytes.to_vec()));
    }

    /// Makes of every such place what `found` tells, when that is what it can be.
    pub(super) fn settle<'f>(&mut self, found: impl Fn(LinkAddr, usize) -> Option<&'f [u8]>) {
        for (at, bytes) in std::mem::take(&mut self.also) {
            if found(at, bytes.len()).is_some_and(|found| found == bytes) {
                self.set(at, &bytes);
            }
        }
    }

    /// Every place, by address; of several at one, the last written is last.
    pub(super) fn marks(&mut self) -> &[Mark] {
        self.marks.sort_by_key(|mark| mark.at);
        &self.marks
    }

    /// Where `at` is in the guest.
    pub(super) fn run_time(&self, at: LinkAddr) -> Gva {
        at.at(self.slide)
    }

    /// A direct jump or call of 5 bytes at `at`; `None` when `target` is out of its reach.
    pub(super) fn branch(&self, opcode: u8, at: LinkAddr, target: Gva) -> Option<[u8; 5]> {
        let next = self.run_time(at.offset(5));
        let distance = i32::try_from(target.displacement_from(next)).ok()?;
        let [a, b, c, d] = distance.to_le_bytes();
        Some([opcode, a, b, c, d])
    }
}
