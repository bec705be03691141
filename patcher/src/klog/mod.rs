//! What the guest kernel said last, and whether it panicked.
//!
//! The log is read out of the kernel's own ring buffer (kernel/printk/printk_ringbuffer.h, 5.10
//! and later), with every offset from BTF. Records that are being written, were overwritten, or
//! do not fit together are left out; the walk is bounded by the number asked for. Nothing here
//! needs the kernel to be healthy: it is what one looks at when it is not.

mod layout;

use crate::Kernel;
use crate::guest::{Gva, Slide};
use crate::space::{Space, SpaceError};

pub use layout::{LogLayout, LogLayoutError};

/// One record of the kernel's log.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Record {
    /// Its number since boot.
    pub sequence: u64,
    /// Nanoseconds since boot.
    pub nanoseconds: u64,
    /// Its text, with what is not UTF-8 replaced.
    pub text: String,
}

/// Bytes of one record that are believed in: LOG_LINE_MAX is below this.
const MAX_TEXT: u64 = 4096;
/// Descriptors of a ring that are believed in (CONFIG_LOG_BUF_SHIFT is at most 25).
const MAX_BITS: u64 = 25;

/// Top two bits of a descriptor's state (printk_ringbuffer.h, `DESC_SV`).
const STATE_SHIFT: u32 = 62;
const COMMITTED: u64 = 1;
const FINALIZED: u64 = 2;

/// The last records of the log, oldest first, at most `limit`.
///
/// # Errors
/// [`SpaceError`] when the ring itself cannot be read; records that cannot are left out.
pub fn last_records(
    space: &Space<'_>,
    layout: &LogLayout,
    slide: Slide,
    limit: usize,
) -> Result<Vec<Record>, SpaceError> {
    let ring = space.read_pointer(layout.ring.at(slide))?;
    let count_bits = space.read_u32(ring.offset(layout.count_bits))?;
    let descriptors = space.read_pointer(ring.offset(layout.descriptors))?;
    let infos = space.read_pointer(ring.offset(layout.infos))?;
    let head = space.read_u64(ring.offset(layout.head_id))?;
    let size_bits = space.read_u32(ring.offset(layout.size_bits))?;
    let data = space.read_pointer(ring.offset(layout.data))?;
    if u64::from(count_bits) > MAX_BITS || u64::from(size_bits) > MAX_BITS + 5 {
        return Ok(Vec::new());
    }
    let text = TextRing {
        data,
        size: 1 << size_bits,
    };
    let count: u64 = 1 << count_bits;

    let mut records = Vec::new();
    for back in 0..count.min(limit as u64) {
        let id = head.wrapping_sub(back) & !(3 << STATE_SHIFT);
        let index = id & (count - 1);
        let descriptor = descriptors.offset(index * layout.descriptor_size);
        let info = infos.offset(index * layout.info_size);
        match record(space, layout, &text, id, descriptor, info) {
            Ok(record) => records.extend(record),
            Err(error) if error.is_bound() => return Err(error),
            Err(_) => {}
        }
    }
    records.reverse();
    Ok(records)
}

fn record(
    space: &Space<'_>,
    layout: &LogLayout,
    text: &TextRing,
    id: u64,
    descriptor: Gva,
    info: Gva,
) -> Result<Option<Record>, SpaceError> {
    let state = space.read_u64(descriptor.offset(layout.state))?;
    let written = matches!(state >> STATE_SHIFT, COMMITTED | FINALIZED);
    if !written || state & !(3 << STATE_SHIFT) != id {
        return Ok(None);
    }
    let begin = space.read_u64(descriptor.offset(layout.begin))?;
    let next = space.read_u64(descriptor.offset(layout.next))?;
    let len = space.read_sized(info.offset(layout.text_len), layout.text_len_size)?;
    let Some(text) = text.read(space, id, begin, next, len)? else {
        return Ok(None);
    };
    Ok(Some(Record {
        sequence: space.read_u64(info.offset(layout.sequence))?,
        nanoseconds: space.read_u64(info.offset(layout.nanoseconds))?,
        text,
    }))
}

/// The ring that holds the text.
struct TextRing {
    data: Gva,
    size: u64,
}

/// A block begins with the id of its descriptor.
const BLOCK_HEADER: u64 = 8;

impl TextRing {
    /// The text of a block between two logical positions. An odd position is no block at all
    /// (`FAILED_LPOS`, `NO_LPOS`).
    fn read(
        &self,
        space: &Space<'_>,
        id: u64,
        begin: u64,
        next: u64,
        len: u64,
    ) -> Result<Option<String>, SpaceError> {
        if begin & 1 != 0 || next & 1 != 0 {
            return Ok(None);
        }
        let mask = self.size - 1;
        // A block that would not fit before the end lies at the start, one wrap later.
        let wraps = begin / self.size != next.wrapping_sub(1) / self.size;
        let (start, room) = if wraps {
            (0, next & mask)
        } else {
            (begin & mask, next.wrapping_sub(begin))
        };
        let Some(room) = room.checked_sub(BLOCK_HEADER) else {
            return Ok(None);
        };
        if room > self.size || space.read_u64(self.data.offset(start))? != id {
            return Ok(None);
        }
        let len = len.min(room).min(MAX_TEXT);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        space.read(self.data.offset(start + BLOCK_HEADER), &mut bytes)?;
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }
}

/// Whether the kernel panicked: the CPU that did, or `None`.
///
/// # Errors
/// [`SpaceError`] when its variable cannot be read.
pub fn panicked(
    space: &Space<'_>,
    layout: &LogLayout,
    slide: Slide,
) -> Result<Option<u32>, SpaceError> {
    // PANIC_CPU_INVALID is -1 (include/linux/panic.h).
    let cpu = space.read_u32(layout.panic_cpu.at(slide))?;
    Ok((cpu != u32::MAX).then_some(cpu))
}

/// The line with which a panic begins, where it is among `records`, without its prefix.
#[must_use]
pub fn panic_message(records: &[Record]) -> Option<&str> {
    const PREFIX: &str = "Kernel panic - not syncing: ";
    records.iter().rev().find_map(|record| {
        let text = record.text.strip_prefix(PREFIX)?;
        Some(text.lines().next().unwrap_or(text))
    })
}

impl Kernel {
    /// Where this kernel keeps its log.
    ///
    /// # Errors
    /// [`LogLayoutError`] names what the file lacks.
    pub fn log_layout(&self) -> Result<LogLayout, LogLayoutError> {
        LogLayout::of(self)
    }
}
