//! Recognising a kernel file and placing it and its initramfs in guest memory.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use linux_loader::bootparam::{XLF_KERNEL_64, setup_header};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Address, Bytes, GuestAddress};

use super::super::layout::{GIB, HIMEM, MIB};
use super::super::memory::GuestRam;
use super::super::start::StartError;
use super::{NamedFile, ram_mib};

/// What kind of kernel file this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KernelKind {
    /// A compressed kernel with a boot header.
    BzImage,
    /// An ELF executable.
    Vmlinux,
}

/// A kernel in guest memory.
pub(in super::super) struct LoadedKernel {
    pub(in super::super) entry: u64,
    /// First byte behind everything the kernel uses before it knows its memory map.
    pub(in super::super) end: u64,
    pub(in super::super) header: Option<setup_header>,
    pub(in super::super) cmdline_max: usize,
    /// The initramfs must end below this address.
    initrd_limit: u64,
}

/// An initramfs in guest memory.
#[derive(Clone, Copy)]
pub(in super::super) struct LoadedInitrd {
    pub(in super::super) start: u64,
    pub(in super::super) len: u64,
}

/// Bytes at the start of a file that tell a kernel: the boot header ends at 0x26c.
const HEAD: usize = 0x290;
/// The oldest boot protocol with a 64-bit entry point and an `init_size`.
const MIN_PROTOCOL: u16 = 0x020c;
/// COMMAND_LINE_SIZE of x86 (arch/x86/include/asm/setup.h), less the NUL.
const CMDLINE_MAX: usize = 2047;
/// What a vmlinux needs behind its last byte: early page tables and the brk area.
const VMLINUX_SLACK: u64 = 8 * MIB;
/// A bzImage is loaded where a kernel likes to be (CONFIG_PHYSICAL_START).
const BZIMAGE_AT: u64 = 16 * MIB;
/// `initrd_addr_max` of every kernel with this boot protocol, for a vmlinux, which cannot say.
const INITRD_MAX: u64 = 0x7fff_ffff;
/// `__START_KERNEL_map` (arch/x86/include/asm/page_64_types.h): kernels are linked above it.
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// A file beyond this size is no kernel.
const MAX_FILE: u64 = GIB;

const HDRS: u32 = 0x5372_6448;
const ELF_X86_64: u16 = 62;

/// Recognises a kernel file by its first bytes.
///
/// # Errors
/// [`StartError::Kernel`] says what it is instead and what would do.
pub fn check_kernel(kernel: &NamedFile) -> Result<KernelKind, StartError> {
    let refuse = |why: &str| StartError::Kernel {
        path: kernel.path.clone(),
        why: why.into(),
    };
    let unreadable = |source| StartError::File {
        what: "kernel",
        path: kernel.path.clone(),
        source,
    };
    let mut file = &kernel.file;
    let len = file.metadata().map_err(unreadable)?.len();
    let mut head = Vec::new();
    file.rewind().map_err(unreadable)?;
    file.take(HEAD as u64)
        .read_to_end(&mut head)
        .map_err(unreadable)?;

    if head.starts_with(b"\x7fELF") {
        check_elf(&head).map_err(refuse)?;
        let segments = load_segments(file).unwrap_or_default();
        if !segments.iter().any(|segment| segment.address >= KERNEL_MAP) {
            return Err(refuse(
                "an ELF program, but not a kernel (it is not linked for the kernel's addresses): \
                 give a vmlinux or a bzImage",
            ));
        }
        return Ok(KernelKind::Vmlinux);
    }
    if word(&head, 0x202) == Some(HDRS) {
        return check_bzimage(&head, len)
            .map_err(refuse)
            .map(|()| KernelKind::BzImage);
    }
    if head.get(56..60) == Some(b"ARMd") || head.get(56..60) == Some(b"RSC\x05") {
        return Err(refuse(
            "a kernel for another architecture: give an x86-64 kernel",
        ));
    }
    Err(refuse(
        "not a Linux kernel: give a bzImage (vmlinuz) or a vmlinux",
    ))
}

fn check_elf(head: &[u8]) -> Result<(), &'static str> {
    if head.get(4) == Some(&1) {
        return Err("a 32-bit ELF file: give a 64-bit kernel");
    }
    if half(head, 18) != Some(ELF_X86_64) || head.get(5) != Some(&1) {
        return Err("an ELF file for another architecture: give an x86-64 kernel");
    }
    match half(head, 16) {
        Some(2 | 3) => Ok(()),
        _ => Err("an ELF file, but not an executable: give a vmlinux or a bzImage"),
    }
}

fn check_bzimage(head: &[u8], len: u64) -> Result<(), &'static str> {
    let version = half(head, 0x206).unwrap_or(0);
    if version < MIN_PROTOCOL {
        return Err("its boot protocol is older than 2.12: give a kernel of 3.8 or later");
    }
    if half(head, 0x236).unwrap_or(0) & XLF_KERNEL_64 == 0 {
        return Err("a 32-bit kernel: give a 64-bit kernel");
    }
    let setup = (u64::from(head.get(0x1f1).copied().unwrap_or(0).max(1)) + 1) * 512;
    let payload =
        u64::from(word(head, 0x248).unwrap_or(0)) + u64::from(word(head, 0x24c).unwrap_or(0));
    if len > MAX_FILE || setup + payload > len {
        return Err("a truncated kernel: the file is shorter than its header says");
    }
    Ok(())
}

fn half(head: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(head.get(at..at + 2)?.try_into().ok()?))
}

fn word(head: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(head.get(at..at + 4)?.try_into().ok()?))
}

/// RAM from address 0 up to the 32-bit hole.
fn low_ram(ram: &GuestRam) -> u64 {
    ram.regions().first().map_or(0, |region| region.len)
}

pub(super) fn load(ram: &GuestRam, kernel: &NamedFile) -> Result<LoadedKernel, StartError> {
    let kind = check_kernel(kernel)?;
    let refuse = |why: String| StartError::Kernel {
        path: kernel.path.clone(),
        why,
    };
    let mut file = reopen(kernel)?;
    let too_little = |needed: u64| StartError::TooLittleMemory {
        given: ram_mib(ram),
        needed: needed.div_ceil(MIB),
    };

    match kind {
        KernelKind::BzImage => {
            let needed =
                bzimage_end(&mut file).ok_or_else(|| refuse("a truncated kernel".into()))?;
            if needed > low_ram(ram) {
                return Err(too_little(needed));
            }
            let loaded = BzImage::load(
                ram.map(),
                Some(GuestAddress(BZIMAGE_AT)),
                &mut file,
                Some(GuestAddress(HIMEM)),
            )
            .map_err(|error| refuse(error.to_string()))?;
            let header = loaded
                .setup_header
                .ok_or_else(|| refuse("no boot header".into()))?;
            Ok(LoadedKernel {
                // The 64-bit entry point is 0x200 behind the start of the loaded kernel.
                entry: BZIMAGE_AT + 0x200,
                end: needed.max(loaded.kernel_end),
                cmdline_max: usize::try_from(header.cmdline_size)
                    .unwrap_or(CMDLINE_MAX)
                    .clamp(255, 64 * 1024),
                initrd_limit: u64::from(header.initrd_addr_max),
                header: Some(header),
            })
        }
        KernelKind::Vmlinux => {
            let end = vmlinux_end(&file)
                .ok_or_else(|| refuse("no segment to load: not a kernel, or truncated".into()))?;
            if end + VMLINUX_SLACK > low_ram(ram) {
                return Err(too_little(end + VMLINUX_SLACK));
            }
            let loaded = Elf::load(ram.map(), None, &mut file, None)
                .map_err(|error| refuse(error.to_string()))?;
            let entry = loaded.kernel_load.raw_value();
            if entry < HIMEM || entry >= end {
                return Err(refuse(format!(
                    "its entry point {entry:#x} is outside what it loads: give a vmlinux that \
                     was linked for physical entry"
                )));
            }
            Ok(LoadedKernel {
                entry,
                end: end + VMLINUX_SLACK,
                header: None,
                cmdline_max: CMDLINE_MAX,
                initrd_limit: INITRD_MAX,
            })
        }
    }
}

fn reopen(kernel: &NamedFile) -> Result<File, StartError> {
    kernel.file.try_clone().map_err(|source| StartError::File {
        what: "kernel",
        path: kernel.path.clone(),
        source,
    })
}

/// End of what a bzImage needs while it unpacks itself: `init_size` from its start.
fn bzimage_end(file: &mut File) -> Option<u64> {
    let mut head = [0; HEAD];
    file.rewind().ok()?;
    file.read_exact(&mut head).ok()?;
    let init_size = u64::from(word(&head, 0x260)?);
    let len = file.seek(SeekFrom::End(0)).ok()?;
    Some(BZIMAGE_AT + init_size.max(len))
}

/// A loadable segment of an ELF file.
struct LoadSegment {
    offset: u64,
    address: u64,
    physical: u64,
    file_size: u64,
    memory_size: u64,
}

/// The loadable segments of a 64-bit ELF file that take memory.
fn load_segments(mut file: &File) -> Option<Vec<LoadSegment>> {
    let mut head = [0; 64];
    file.rewind().ok()?;
    file.read_exact(&mut head).ok()?;
    let quad = |raw: &[u8], at: usize| -> Option<u64> {
        Some(u64::from_le_bytes(raw.get(at..at + 8)?.try_into().ok()?))
    };
    let mut segments = Vec::new();
    file.seek(SeekFrom::Start(quad(&head, 32)?)).ok()?;
    for _ in 0..half(&head, 56)? {
        let mut header = [0; 56];
        file.read_exact(&mut header).ok()?;
        let segment = LoadSegment {
            offset: quad(&header, 8)?,
            address: quad(&header, 16)?,
            physical: quad(&header, 24)?,
            file_size: quad(&header, 32)?,
            memory_size: quad(&header, 40)?,
        };
        if word(&header, 0)? == 1 && segment.memory_size > 0 {
            segments.push(segment);
        }
    }
    Some(segments)
}

/// End of the last segment of a vmlinux, if all of its segments lie above 1 MiB and in the file.
fn vmlinux_end(file: &File) -> Option<u64> {
    let len = file.metadata().ok()?.len();
    let mut end = None;
    for segment in load_segments(file)? {
        let in_file = segment.offset.checked_add(segment.file_size)? <= len;
        if !in_file || segment.file_size > segment.memory_size || segment.physical < HIMEM {
            return None;
        }
        end = end.max(Some(segment.physical.checked_add(segment.memory_size)?));
    }
    end
}

/// Places the initramfs as high as the kernel allows below the 32-bit hole.
pub(super) fn load_initrd(
    ram: &GuestRam,
    initrd: &NamedFile,
    kernel: &LoadedKernel,
) -> Result<LoadedInitrd, StartError> {
    let unreadable = |source| StartError::File {
        what: "initramfs",
        path: initrd.path.clone(),
        source,
    };
    let mut file = initrd.file.try_clone().map_err(unreadable)?;
    let len = file.seek(SeekFrom::End(0)).map_err(unreadable)?;
    file.rewind().map_err(unreadable)?;
    let top = low_ram(ram).min(kernel.initrd_limit.saturating_add(1));
    let start = top
        .checked_sub(len)
        .map(|start| start & !0xfff)
        .filter(|start| *start >= kernel.end)
        .ok_or_else(|| StartError::InitrdTooLarge {
            initrd: len.div_ceil(MIB),
            memory: ram_mib(ram),
            needed: (kernel.end + len).div_ceil(MIB) + 64,
        })?;
    let size = usize::try_from(len).map_err(|_| StartError::Placement("the initramfs"))?;
    ram.map()
        .read_exact_volatile_from(GuestAddress(start), &mut file, size)
        .map_err(|error| unreadable(std::io::Error::other(error.to_string())))?;
    Ok(LoadedInitrd { start, len })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(bytes: &[u8]) -> NamedFile {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        NamedFile {
            path: "test-kernel".into(),
            file,
        }
    }

    fn refusal(bytes: &[u8]) -> String {
        check_kernel(&file(bytes)).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_kernel_is_said_so() {
        assert!(refusal(b"").contains("not a Linux kernel"));
        assert!(refusal(b"#!/bin/sh\n").contains("not a Linux kernel"));
        assert!(refusal(&[0xff; 4096]).contains("not a Linux kernel"));
        let mut elf32 = b"\x7fELF\x01\x01\x01".to_vec();
        elf32.resize(64, 0);
        assert!(refusal(&elf32).contains("32-bit"));
        let mut arm = b"\x7fELF\x02\x01\x01".to_vec();
        arm.resize(64, 0);
        arm[18] = 183;
        assert!(refusal(&arm).contains("another architecture"));
        let program = std::fs::read("/proc/self/exe").unwrap();
        assert!(refusal(&program).contains("not a kernel"));
    }

    fn bzimage(xloadflags: u16, payload: u32) -> Vec<u8> {
        let mut image = vec![0; 4096];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(&HDRS.to_le_bytes());
        image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[0x236..0x238].copy_from_slice(&xloadflags.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&payload.to_le_bytes());
        image
    }

    #[test]
    fn bzimages_are_checked_for_width_and_length() {
        assert_eq!(
            check_kernel(&file(&bzimage(XLF_KERNEL_64, 100))).unwrap(),
            KernelKind::BzImage
        );
        assert!(refusal(&bzimage(0, 100)).contains("32-bit"));
        assert!(refusal(&bzimage(XLF_KERNEL_64, 1 << 20)).contains("truncated"));
    }

    #[test]
    fn a_vmlinux_with_wild_segments_is_refused() {
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(64 + 56, 0);
        elf[32] = 64;
        elf[56] = 1;
        elf[64] = 1;
        elf[64 + 24..64 + 32].copy_from_slice(&u64::MAX.to_le_bytes());
        elf[64 + 40..64 + 48].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(vmlinux_end(&file(&elf).file), None);
    }
}
