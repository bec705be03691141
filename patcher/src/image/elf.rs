//! Reads the section and program headers of a kernel's ELF file.

use std::ops::Range;

use object::LittleEndian;
use object::elf;
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};

use super::{ImageError, Section, Segment};
use crate::guest::LinkAddr;

type Header = elf::FileHeader64<LittleEndian>;

/// Where x86-64 links the kernel: the top 2 GiB (Documentation/arch/x86/x86_64/mm.rst).
pub(super) const KERNEL_START: u64 = 0xffff_ffff_8000_0000;

/// More headers than this are not believed. A kernel built with a section for each function and
/// then not linked would not be ET_EXEC.
const MAX_HEADERS: usize = 4096;

pub(super) struct Layout {
    pub(super) entry: u64,
    pub(super) sections: Vec<Section>,
    pub(super) segments: Vec<Segment>,
    /// File range and link address of every note section or segment.
    pub(super) notes: Vec<(LinkAddr, Range<usize>)>,
    /// Where the file ends that the headers describe.
    pub(super) end: usize,
}

pub(super) fn layout(file: &[u8]) -> Result<Layout, ImageError> {
    let bad = |error: object::read::Error| ImageError::BadElf(error.to_string());
    let header = Header::parse(file).map_err(bad)?;
    let endian = header.endian().map_err(bad)?;
    let mut notes = Vec::new();

    let programs = header.program_headers(endian, file).map_err(bad)?;
    let table = header.sections(endian, file).map_err(bad)?;
    if programs.len() > MAX_HEADERS || table.len() > MAX_HEADERS {
        return Err(ImageError::ImplausibleSize {
            what: "the number of ELF headers",
            size: programs.len().max(table.len()) as u64,
            limit: MAX_HEADERS as u64,
        });
    }

    let mut segments = Vec::new();
    for program in programs {
        let at = LinkAddr(program.p_vaddr(endian));
        let (offset, len) = program.file_range(endian);
        if program.p_type(endian) == elf::PT_NOTE {
            notes.push((at, range(file, "a note", offset, len)?));
        }
        if program.p_type(endian) != elf::PT_LOAD {
            continue;
        }
        let flags = program.p_flags(endian);
        segments.push(Segment {
            address: at,
            physical: program.p_paddr(endian),
            size: fits(at, program.p_memsz(endian))?,
            executable: flags.contains(elf::PF_X),
            writable: flags.contains(elf::PF_W),
            file: range(file, "a segment", offset, len)?,
        });
    }
    if !segments.iter().any(|s| s.address.0 >= KERNEL_START) {
        return Err(ImageError::NotAKernel {
            found: "an ELF program of user space",
        });
    }

    let mut sections = Vec::new();
    for section in table.iter() {
        let flags = section.sh_flags(endian);
        let kind = section.sh_type(endian);
        if kind == elf::SHT_NULL {
            continue;
        }
        let at = LinkAddr(section.sh_addr(endian));
        let name = table.section_name(endian, section).map_err(bad)?;
        let file = match section.file_range(endian) {
            Some((offset, len)) => Some(range(file, "a section", offset, len)?),
            None => None,
        };
        if let (elf::SHT_NOTE, Some(file)) = (kind, &file) {
            notes.push((at, file.clone()));
        }
        let allocated = flags.contains(elf::SHF_ALLOC);
        let size = section.sh_size(endian);
        sections.push(Section {
            name: String::from_utf8_lossy(name).into_owned(),
            address: at,
            size: if allocated { fits(at, size)? } else { size },
            allocated,
            executable: flags.contains(elf::SHF_EXECINSTR),
            writable: flags.contains(elf::SHF_WRITE),
            file,
        });
    }
    let headers = header
        .e_shoff(endian)
        .saturating_add(u64::from(header.e_shentsize(endian)).saturating_mul(table.len() as u64));
    let parts = sections.iter().filter_map(|section| section.file.as_ref());
    let parts = parts.chain(segments.iter().map(|segment| &segment.file));
    let end = parts.map(|part| part.end).max().unwrap_or(0);
    Ok(Layout {
        end: end.max(usize::try_from(headers).unwrap_or(usize::MAX)),
        entry: header.e_entry(endian),
        sections,
        segments,
        notes,
    })
}

/// `size` when the range from `at` does not go beyond the end of the address space.
fn fits(at: LinkAddr, size: u64) -> Result<u64, ImageError> {
    let limit = super::unpack::LIMIT * 2;
    if size > limit || at.0.checked_add(size).is_none() {
        return Err(ImageError::ImplausibleSize {
            what: "a part of the kernel",
            size,
            limit,
        });
    }
    Ok(size)
}

fn range(file: &[u8], what: &'static str, at: u64, len: u64) -> Result<Range<usize>, ImageError> {
    let have = file.len() as u64;
    match at.checked_add(len) {
        Some(need) if need <= have => {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            Ok(at..at.saturating_add(usize::try_from(len).unwrap_or(usize::MAX)))
        }
        need => Err(ImageError::Truncated {
            what,
            need: need.unwrap_or(u64::MAX),
            have,
        }),
    }
}

/// Finds the GNU build id in the bytes of a note section (elf(5), NT_GNU_BUILD_ID).
pub(super) fn build_id(notes: &[u8]) -> Option<Range<usize>> {
    let word = |at: usize| {
        let raw = notes
            .get(at..)?
            .first_chunk()
            .map(|raw| u32::from_le_bytes(*raw))?;
        usize::try_from(raw).ok()
    };
    let mut at = 0_usize;
    loop {
        let (name_len, len, kind) = (word(at)?, word(at + 4)?, word(at + 8)?);
        let name = at.checked_add(12)?;
        let desc = name.checked_add(name_len)?.checked_next_multiple_of(4)?;
        let end = desc.checked_add(len)?;
        if end > notes.len() {
            return None;
        }
        let owner = notes.get(name..name.checked_add(name_len)?)?;
        if owner == b"GNU\0" && kind == 3 && (4..=64).contains(&len) {
            return Some(desc..end);
        }
        at = end.checked_next_multiple_of(4)?;
    }
}
