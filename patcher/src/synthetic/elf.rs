//! Writes x86-64 ELF executables of a few sections.

use crate::guest::LinkAddr;

/// A section to write.
#[derive(Clone, Debug)]
pub struct ElfSection {
    /// Its name.
    pub name: &'static str,
    /// Where it is linked.
    pub address: LinkAddr,
    /// Its contents.
    pub bytes: Vec<u8>,
    /// It holds instructions.
    pub executable: bool,
}

/// An executable in which each section has a segment of its own, and `.notes` a note segment.
#[must_use]
pub fn elf(sections: &[ElfSection]) -> Vec<u8> {
    const HEADER: usize = 64;
    const PROGRAM: usize = 56;
    let mut names = vec![0];
    let mut programs = Vec::new();
    let mut headers = vec![0; 64];
    let mut data = Vec::new();
    let count = sections.len() + usize::from(sections.iter().any(|s| s.name == ".notes"));
    let start = HEADER + PROGRAM * count;
    for section in sections {
        let (offset, len) = ((start + data.len()) as u64, section.bytes.len() as u64);
        let notes = section.name == ".notes";
        let flags: u32 = if section.executable { 5 } else { 4 };
        let kinds: &[u32] = if notes { &[1, 4] } else { &[1] };
        for kind in kinds {
            programs.extend(kind.to_le_bytes());
            programs.extend(flags.to_le_bytes());
            let physical = section.address.0 & 0x7fff_ffff;
            for word in [offset, section.address.0, physical, len, len, 8] {
                programs.extend(word.to_le_bytes());
            }
        }
        headers.extend((names.len() as u32).to_le_bytes());
        headers.extend(if notes { 7_u32 } else { 1 }.to_le_bytes());
        headers.extend(if section.executable { 6_u64 } else { 2 }.to_le_bytes());
        for word in [section.address.0, offset, len, 0, 8, 0] {
            headers.extend(word.to_le_bytes());
        }
        names.extend(section.name.bytes());
        names.push(0);
        data.extend(&section.bytes);
        data.resize(data.len().next_multiple_of(8), 0);
    }
    let strings = start + data.len();
    let name = names.len() as u32;
    names.extend(b".shstrtab\0");
    headers.extend(name.to_le_bytes());
    headers.extend(3_u32.to_le_bytes());
    for word in [0, 0, strings as u64, names.len() as u64, 0, 1, 0] {
        headers.extend(word.to_le_bytes());
    }
    names.resize(names.len().next_multiple_of(8), 0);

    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    out.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [0x0100_0000, HEADER as u64, (strings + names.len()) as u64] {
        out.extend(word.to_le_bytes());
    }
    out.extend([0; 4]);
    for half in [
        HEADER,
        PROGRAM,
        count,
        64,
        sections.len() + 2,
        sections.len() + 1,
    ] {
        out.extend((half as u16).to_le_bytes());
    }
    [out, programs, data, names, headers].concat()
}
