//! A memory image: guest RAM and vCPU registers that were saved from a guest, held in memory.
//!
//! It implements the same traits as a live guest, writes and blocks included, so everything in
//! this crate can be tried on it; what is written stays in the image and reaches no guest.
//! An image has no CPUs that could run: nothing here says what the guest would have done.

use object::Endianness;
use object::elf::{FileHeader64, PT_LOAD, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader};

use super::{
    Activity, BlockKind, Gpa, GuestMemory, Gva, MemoryError, RamRange, StoppedGuest, Vcpu,
    VcpuRegisters,
};

/// Blocks are placed from here up when RAM ends below: clear of RAM and of every PCI window.
const FIRST_BLOCK: u64 = 1 << 36;
const BLOCK_ALIGN: u64 = 2 << 20;
/// What an image lends to blocks altogether.
const MAX_BLOCKS: u64 = 1 << 30;
/// More vCPUs than any hypervisor offers; a core with more is not believed.
const MAX_VCPUS: u32 = 8192;
/// SCE, LME, LMA and NXE: what every 64-bit Linux kernel sets.
const EFER_OF_A_64_BIT_KERNEL: u64 = 0xd01;

/// Why a memory image could not be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryImageError {
    /// It is not an ELF core as `dump-guest-memory` writes it.
    #[error("not a guest memory dump: {0}")]
    NotACore(String),
    /// RAM ranges overlap, wrap, or lie outside the file.
    #[error("guest RAM at {start} + {len:#x} overlaps another range or is not in the file")]
    BadRange {
        /// First byte of the range.
        start: Gpa,
        /// Its length in bytes.
        len: u64,
    },
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    start: u64,
    len: u64,
    /// Where its bytes begin in the backing store.
    offset: usize,
}

#[derive(Clone, Debug)]
struct Block {
    start: u64,
    bytes: Vec<u8>,
    kind: BlockKind,
}

/// Guest RAM and vCPU registers held in memory.
#[derive(Clone, Debug)]
pub struct MemoryImage {
    backing: Vec<u8>,
    pieces: Vec<Piece>,
    blocks: Vec<Block>,
    vcpus: Vec<Vcpu>,
}

impl MemoryImage {
    /// An image of the given RAM ranges, in any order.
    ///
    /// # Errors
    /// [`MemoryImageError::BadRange`] when ranges overlap or wrap.
    pub fn new(ram: Vec<(Gpa, Vec<u8>)>, vcpus: Vec<Vcpu>) -> Result<Self, MemoryImageError> {
        let mut backing = Vec::new();
        let mut pieces = Vec::new();
        for (start, bytes) in ram {
            pieces.push(Piece {
                start: start.0,
                len: bytes.len() as u64,
                offset: backing.len(),
            });
            backing.extend_from_slice(&bytes);
        }
        Self::assemble(backing, pieces, vcpus)
    }

    /// Opens the ELF core that `dump-guest-memory` writes without paging.
    ///
    /// Such a core does not hold every register: EFER is taken to be that of a 64-bit kernel, and
    /// MSR_LSTAR is zero until [`MemoryImage::vcpus_mut`] is used to set it.
    ///
    /// # Errors
    /// [`MemoryImageError`] when the file is not such a core or its ranges overlap.
    pub fn from_core(file: Vec<u8>) -> Result<Self, MemoryImageError> {
        let not = |what: &dyn std::fmt::Display| MemoryImageError::NotACore(what.to_string());
        let mut pieces = Vec::new();
        let mut vcpus = Vec::new();
        {
            let data = file.as_slice();
            let header = FileHeader64::<Endianness>::parse(data).map_err(|e| not(&e))?;
            let endian = header.endian().map_err(|e| not(&e))?;
            for segment in header.program_headers(endian, data).map_err(|e| not(&e))? {
                match segment.p_type(endian) {
                    PT_LOAD => {
                        let (offset, len) = segment.file_range(endian);
                        let start = Gpa(segment.p_paddr(endian));
                        let inside = offset
                            .checked_add(len)
                            .is_some_and(|end| end <= data.len() as u64);
                        let offset = usize::try_from(offset)
                            .ok()
                            .filter(|_| inside)
                            .ok_or(MemoryImageError::BadRange { start, len })?;
                        pieces.push(Piece {
                            start: start.0,
                            len,
                            offset,
                        });
                    }
                    PT_NOTE => {
                        let Some(mut notes) = segment.notes(endian, data).map_err(|e| not(&e))?
                        else {
                            continue;
                        };
                        while let Some(note) = notes.next().map_err(|e| not(&e))? {
                            let index = u32::try_from(vcpus.len()).unwrap_or(u32::MAX);
                            if note.name() == b"QEMU" && index < MAX_VCPUS {
                                vcpus.extend(QemuNote(note.desc()).vcpu(index));
                            }
                        }
                    }
                    _ => {}
                }
            }
        }
        if pieces.is_empty() {
            return Err(not(&"it holds no memory"));
        }
        Self::assemble(file, pieces, vcpus)
    }

    fn assemble(
        backing: Vec<u8>,
        mut pieces: Vec<Piece>,
        vcpus: Vec<Vcpu>,
    ) -> Result<Self, MemoryImageError> {
        pieces.retain(|p| p.len > 0);
        pieces.sort_by_key(|p| p.start);
        let mut free_from = 0;
        for piece in &pieces {
            let end = piece.start.checked_add(piece.len);
            match end {
                Some(end) if piece.start >= free_from => free_from = end,
                _ => {
                    return Err(MemoryImageError::BadRange {
                        start: Gpa(piece.start),
                        len: piece.len,
                    });
                }
            }
        }
        Ok(Self {
            backing,
            pieces,
            blocks: Vec::new(),
            vcpus,
        })
    }

    /// The vCPUs, to complete what the image's source did not know about them.
    pub fn vcpus_mut(&mut self) -> &mut Vec<Vcpu> {
        &mut self.vcpus
    }

    /// Whether the guest itself could write to `at`: RAM or a block that is not read-only.
    #[must_use]
    pub fn guest_may_write(&self, at: Gpa) -> bool {
        self.blocks
            .iter()
            .find(|b| {
                at.0.checked_sub(b.start)
                    .is_some_and(|o| o < b.bytes.len() as u64)
            })
            .map_or_else(
                || self.slice(at, 1).is_some(),
                |b| b.kind == BlockKind::Data,
            )
    }

    fn slice(&self, at: Gpa, len: usize) -> Option<&[u8]> {
        for block in &self.blocks {
            if let Some(range) = within(at.0, len, block.start, block.bytes.len() as u64) {
                return block.bytes.get(range);
            }
        }
        let index = self.piece_before(at)?;
        let piece = self.pieces.get(index)?;
        let range = within(at.0, len, piece.start, piece.len)?;
        self.backing
            .get(range.start.checked_add(piece.offset)?..range.end.checked_add(piece.offset)?)
    }

    fn slice_mut(&mut self, at: Gpa, len: usize) -> Option<&mut [u8]> {
        let block = self
            .blocks
            .iter()
            .position(|b| within(at.0, len, b.start, b.bytes.len() as u64).is_some());
        if let Some(index) = block {
            let block = self.blocks.get_mut(index)?;
            let range = within(at.0, len, block.start, block.bytes.len() as u64)?;
            return block.bytes.get_mut(range);
        }
        let index = self.piece_before(at)?;
        let piece = *self.pieces.get(index)?;
        let range = within(at.0, len, piece.start, piece.len)?;
        self.backing
            .get_mut(range.start.checked_add(piece.offset)?..range.end.checked_add(piece.offset)?)
    }

    fn piece_before(&self, at: Gpa) -> Option<usize> {
        self.pieces
            .partition_point(|p| p.start <= at.0)
            .checked_sub(1)
    }
}

/// The part of a range of `size` bytes at `start` that `len` bytes at `at` make up.
fn within(at: u64, len: usize, start: u64, size: u64) -> Option<std::ops::Range<usize>> {
    let first = at.checked_sub(start)?;
    let end = first.checked_add(len as u64)?;
    if end > size {
        return None;
    }
    Some(usize::try_from(first).ok()?..usize::try_from(end).ok()?)
}

impl GuestMemory for MemoryImage {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        // A range may run through several pieces that touch.
        let out_of_range = MemoryError::OutOfRange {
            at,
            len: into.len() as u64,
        };
        if let Some(bytes) = self.slice(at, into.len()) {
            into.copy_from_slice(bytes);
            return Ok(());
        }
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let here = at.offset(done as u64);
            let piece = self
                .piece_before(here)
                .and_then(|i| self.pieces.get(i))
                .ok_or_else(|| out_of_range.clone())?;
            let left = piece.len.saturating_sub(here.0.wrapping_sub(piece.start));
            let take = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let bytes = (take > 0)
                .then(|| self.slice(here, take))
                .flatten()
                .ok_or_else(|| out_of_range.clone())?;
            for (to, from) in rest.iter_mut().zip(bytes) {
                *to = *from;
            }
            done += take;
        }
        Ok(())
    }

    fn ram(&self) -> Vec<RamRange> {
        self.pieces
            .iter()
            .map(|p| RamRange {
                start: Gpa(p.start),
                len: p.len,
            })
            .collect()
    }
}

impl StoppedGuest for MemoryImage {
    fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }

    fn write(&mut self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        let to = self
            .slice_mut(at, bytes.len())
            .ok_or(MemoryError::OutOfRange {
                at,
                len: bytes.len() as u64,
            })?;
        to.copy_from_slice(bytes);
        Ok(())
    }

    fn set_rip(&mut self, vcpu: u32, to: Gva) -> Result<(), MemoryError> {
        let mut vcpus = self.vcpus.iter_mut();
        let vcpu = vcpus.find(|known| known.index == vcpu);
        vcpu.ok_or(MemoryError::ReadOnly)?.registers.rip = to.0;
        Ok(())
    }

    fn add_block(&mut self, len: u64, kind: BlockKind) -> Result<Gpa, MemoryError> {
        let used: u64 = self.blocks.iter().map(|b| b.bytes.len() as u64).sum();
        if len == 0 || len > MAX_BLOCKS.saturating_sub(used) {
            return Err(MemoryError::NoSlot(format!("no room for {len:#x} bytes")));
        }
        let no_room = || MemoryError::NoSlot("no address left".into());
        let ram_end = self
            .pieces
            .last()
            .map_or(0, |p| p.start.saturating_add(p.len));
        let blocks_end = self
            .blocks
            .iter()
            .map(|b| b.start + b.bytes.len() as u64)
            .max()
            .unwrap_or(0);
        let start = ram_end
            .max(blocks_end)
            .max(FIRST_BLOCK)
            .checked_next_multiple_of(BLOCK_ALIGN)
            .filter(|start| start.checked_add(len).is_some())
            .ok_or_else(no_room)?;
        let size = usize::try_from(len).map_err(|_| no_room())?;
        self.blocks.push(Block {
            start,
            bytes: vec![kind.filler(); size],
            kind,
        });
        Ok(Gpa(start))
    }

    fn remove_block(&mut self, at: Gpa) -> Result<(), MemoryError> {
        let index = self
            .blocks
            .iter()
            .position(|b| b.start == at.0)
            .ok_or_else(|| MemoryError::NoSlot(format!("no block starts at {at}")))?;
        self.blocks.remove(index);
        Ok(())
    }
}

/// The register note that QEMU adds to a core: `QEMUCPUState`, version 1, in its
/// target/i386/arch_dump.c. A version and a size, 18 general registers (rax, rbx, rcx, rdx, rsi,
/// rdi, rsp, rbp, r8 to r15, rip, rflags), 10 segments of 24 bytes (cs, ds, es, fs, gs, ss, ldt,
/// tr, gdt, idt), cr0 to cr4, and kernel_gs_base where `size` says that it is there.
struct QemuNote<'a>(&'a [u8]);

impl QemuNote<'_> {
    const SEGMENTS: usize = 8 + 18 * 8;
    const SEGMENT: usize = 24;
    const CONTROL: usize = Self::SEGMENTS + 10 * Self::SEGMENT;
    const KERNEL_GS_BASE: usize = Self::CONTROL + 5 * 8;

    fn word(&self, at: usize) -> Option<u64> {
        let raw = self.0.get(at..at.checked_add(8)?)?;
        Some(u64::from_le_bytes(raw.try_into().ok()?))
    }

    fn selector(&self, segment: usize) -> Option<u16> {
        let at = Self::SEGMENTS + segment * Self::SEGMENT;
        let raw = self.0.get(at..at.checked_add(2)?)?;
        Some(u16::from_le_bytes(raw.try_into().ok()?))
    }

    fn base(&self, segment: usize) -> Option<u64> {
        self.word(Self::SEGMENTS + segment * Self::SEGMENT + 16)
    }

    fn vcpu(&self, index: u32) -> Option<Vcpu> {
        if self.0.get(..4)? != 1_u32.to_le_bytes() {
            return None;
        }
        let general = |n: usize| self.word(8 + n * 8);
        let control = |n: usize| self.word(Self::CONTROL + n * 8);
        let registers = VcpuRegisters {
            rax: general(0)?,
            rbx: general(1)?,
            rcx: general(2)?,
            rdx: general(3)?,
            rsi: general(4)?,
            rdi: general(5)?,
            rsp: general(6)?,
            rbp: general(7)?,
            r8: general(8)?,
            r9: general(9)?,
            r10: general(10)?,
            r11: general(11)?,
            r12: general(12)?,
            r13: general(13)?,
            r14: general(14)?,
            r15: general(15)?,
            rip: general(16)?,
            rflags: general(17)?,
            cs: self.selector(0)?,
            ss: self.selector(5)?,
            fs_base: self.base(3)?,
            gs_base: self.base(4)?,
            idt_base: self.base(9)?,
            cr0: control(0)?,
            cr3: control(3)?,
            cr4: control(4)?,
            efer: EFER_OF_A_64_BIT_KERNEL,
            kernel_gs_base: self.word(Self::KERNEL_GS_BASE).unwrap_or(0),
            lstar: 0,
        };
        let paging = registers.cr0 & (1 << 31) != 0;
        Some(Vcpu {
            index,
            // A processor that was never started is dumped in its reset state.
            activity: if paging {
                Activity::Running
            } else {
                Activity::NotStarted
            },
            registers,
            nested: false,
            reinjects: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> MemoryImage {
        MemoryImage::new(
            vec![
                (Gpa(0x2000), vec![2; 0x1000]),
                (Gpa(0), vec![1; 0x2000]),
                (Gpa(0x10_0000), vec![3; 0x1000]),
            ],
            Vec::new(),
        )
        .unwrap()
    }

    #[test]
    fn reads_across_ranges_that_touch() {
        let mut out = [0; 4];
        image().read(Gpa(0x1ffe), &mut out).unwrap();
        assert_eq!(out, [1, 1, 2, 2]);
        assert!(image().read(Gpa(0x2ffe), &mut out).is_err());
        assert!(image().read(Gpa(u64::MAX - 1), &mut out).is_err());
    }

    #[test]
    fn overlapping_or_wrapping_ram_is_refused() {
        for second in [0xfff, 0, u64::MAX - 2] {
            let ram = vec![(Gpa(0), vec![0; 0x1000]), (Gpa(second), vec![0; 8])];
            assert!(MemoryImage::new(ram, Vec::new()).is_err(), "{second:#x}");
        }
    }

    #[test]
    fn blocks_come_and_go() {
        let mut image = image();
        let code = image.add_block(0x20_0000, BlockKind::Code).unwrap();
        let data = image.add_block(0x20_0000, BlockKind::Data).unwrap();
        assert_ne!(code, data);
        assert_eq!(code.0 % BLOCK_ALIGN, 0);
        assert!(!image.guest_may_write(code));
        assert!(image.guest_may_write(data));
        assert_eq!(image.read_u64(code).unwrap(), u64::from_le_bytes([0xcc; 8]));
        assert_eq!(image.read_u64(data).unwrap(), 0);
        image.write(code.offset(8), &[9]).unwrap();
        assert_eq!(image.read_u64(code.offset(8)).unwrap() & 0xff, 9);
        assert!(image.write(code.offset(0x1f_ffff), &[9, 9]).is_err());
        image.remove_block(code).unwrap();
        assert!(image.read_u64(code).is_err());
        assert!(image.remove_block(code).is_err());
        assert!(image.add_block(u64::MAX, BlockKind::Code).is_err());
        assert!(image.add_block(0, BlockKind::Code).is_err());
    }

    #[test]
    fn what_is_not_a_core_is_refused() {
        for file in [Vec::new(), vec![0; 64], b"\x7fELF\x02\x01\x01".to_vec()] {
            assert!(matches!(
                MemoryImage::from_core(file),
                Err(MemoryImageError::NotACore(_))
            ));
        }
    }
}
