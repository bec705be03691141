//! ELF core dumps of the guest, as QEMU writes them, for crash, drgn and gdb.
//!
//! The file holds the ELF header, one PT_NOTE and one PT_LOAD for each range of guest RAM, with
//! guest-physical addresses. The notes hold, for each vCPU, its registers as NT_PRSTATUS and as
//! QEMU's own note, and the guest kernel's VMCOREINFO when it was found. The guest is stopped while
//! the dump is written, and goes on afterwards if it was running, whether or not the dump succeeded;
//! nothing of guest memory is copied beforehand. Blocks of memory that the VMM added for patches
//! are not guest RAM and not part of the dump.
//!
//! [`elf`] and [`notes`] compute bytes; [`target`] writes them where a client wants them; this
//! module brings both together.

mod elf;
mod notes;
mod state;
mod target;

use std::sync::Arc;

use patcher::guest::{Gpa, MemoryError, RamRange};

pub use elf::Range;
pub use state::{DumpState, Progress, Running, Status};
pub use target::{Target, TargetError};

use super::host::StoppedHost;
use crate::machine::StopError;

/// Reads the text of the guest kernel's VMCOREINFO while the guest is stopped; `None` when there is
/// none or it cannot be believed.
pub type VmcoreinfoReader = Box<dyn Fn(&dyn StoppedHost) -> Option<Vec<u8>>>;

/// Gives a reader. What takes long is done here, before the guest is stopped.
pub type VmcoreinfoSource = Arc<dyn Fn() -> Option<VmcoreinfoReader> + Send + Sync>;

/// Guest memory is copied in pieces of this size.
const CHUNK: usize = 64 << 10;

/// What is looked at for being all zero.
const PAGE: usize = 4 << 10;

/// Linux writes one page of it (`VMCOREINFO_BYTES`); more is not believed.
const MAX_VMCOREINFO: usize = 64 << 10;

/// Why a dump failed.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// Where it goes could not be written.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// Registers could not be read.
    #[error("reading registers: {0}")]
    Registers(#[from] StopError),
    /// Guest memory could not be read.
    #[error("reading guest memory: {0}")]
    Memory(#[from] MemoryError),
    /// The range asked for holds no RAM.
    #[error("begin, length: no guest RAM there; RAM is at {0}")]
    NoMemory(String),
}

/// What is dumped: all RAM, or a part.
///
/// # Errors
/// [`DumpError::NoMemory`] when nothing is left.
pub fn select(ram: &[RamRange], part: Option<Range>) -> Result<Vec<RamRange>, DumpError> {
    let chosen = elf::select(ram, part);
    if chosen.is_empty() {
        let ranges: Vec<String> = ram
            .iter()
            .map(|range| format!("{} to {}", range.start, range.start.offset(range.len)))
            .collect();
        return Err(DumpError::NoMemory(ranges.join(", ")));
    }
    Ok(chosen)
}

/// Writes a dump of the stopped guest. `running` is told how far it is; `cancelled` is asked now and
/// then.
///
/// # Errors
/// [`DumpError`]; what was written so far stays with the target.
pub fn write(
    guest: &mut dyn StoppedHost,
    ranges: &[RamRange],
    vmcoreinfo: Option<&VmcoreinfoReader>,
    target: &mut Target,
    running: &Running,
    cancelled: &dyn Fn() -> bool,
) -> Result<(), DumpError> {
    let vmcoreinfo = vmcoreinfo
        .and_then(|read| read(guest))
        .filter(|text| text.len() <= MAX_VMCOREINFO);
    let indexes: Vec<u32> = guest.vcpus().iter().map(|vcpu| vcpu.index).collect();
    let cpus = indexes
        .iter()
        .map(|index| guest.cpu_state(*index))
        .collect::<Result<Vec<_>, _>>()?;
    let notes = notes::all(&cpus, vmcoreinfo.as_deref());
    target.write(&elf::headers(ranges, &notes), cancelled)?;

    let mut chunk = vec![0; CHUNK];
    for range in ranges {
        let mut done = 0;
        while done < range.len {
            let len = (range.len - done).min(CHUNK as u64);
            let piece = usize::try_from(len).unwrap_or(CHUNK);
            let bytes = chunk.get_mut(..piece).unwrap_or_default();
            guest.read(Gpa(range.start.0 + done), bytes)?;
            copy(bytes, target, cancelled)?;
            done += len;
            running.advance(len);
        }
    }
    target.finish()?;
    Ok(())
}

/// Writes memory, leaving holes where it is zero.
fn copy(
    mut bytes: &[u8],
    target: &mut Target,
    cancelled: &dyn Fn() -> bool,
) -> Result<(), TargetError> {
    let zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    while !bytes.is_empty() {
        let first = zero(bytes.get(..PAGE).unwrap_or(bytes));
        let alike = bytes.chunks(PAGE).take_while(|page| zero(page) == first);
        let len: usize = alike.map(<[u8]>::len).sum();
        let (run, rest) = bytes.split_at_checked(len).unwrap_or((bytes, &[]));
        if first {
            target.skip(run, cancelled)?;
        } else {
            target.write(run, cancelled)?;
        }
        bytes = rest;
    }
    Ok(())
}
