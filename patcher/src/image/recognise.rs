//! Tells from a file's first bytes which kind of kernel it is, without unpacking anything.
//!
//! The bzImage header is that of Documentation/arch/x86/boot.rst. All offsets here are file
//! offsets. Recognising a file does not promise that the rest of it is sound.

use super::ImageError;

/// As many bytes of a file as [`recognise`] can make use of. With fewer it still tells the kind,
/// but may not see the release.
pub const HEADER_LEN: usize = 0x10000;

/// Kinds of kernel files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A compressed image with the Linux/x86 boot header (vmlinuz).
    BzImage(BootHeader),
    /// An x86-64 ELF executable (vmlinux).
    Vmlinux,
}

/// What the boot header of a bzImage says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootHeader {
    /// Boot protocol, major in the upper byte (0x20f is 2.15).
    pub protocol: u16,
    /// The kernel states that it has the 64-bit entry point (XLF_KERNEL_64, protocol 2.12).
    pub entry64: bool,
    /// Release and build, as `uname -r` and `uname -v` would print them, where the header has it.
    pub version: Option<String>,
    /// File offset of the compressed payload.
    pub payload_offset: u64,
    /// Bytes of compressed payload, the size that follows it included.
    pub payload_len: u64,
    /// Bytes that the kernel needs to unpack itself and start.
    pub init_size: u32,
}

const EI_CLASS: usize = 4;
const EI_DATA: usize = 5;
const E_TYPE: usize = 0x10;
const E_MACHINE: usize = 0x12;

/// Offset of "HdrS".
const MAGIC: usize = 0x202;
const SETUP_SECTS: usize = 0x1f1;
const VERSION: usize = 0x206;
const KERNEL_VERSION: usize = 0x20e;
const XLOADFLAGS: usize = 0x236;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const INIT_SIZE: usize = 0x260;
const XLF_KERNEL_64: u16 = 1;

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|raw| u16::from_le_bytes(*raw))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|raw| u32::from_le_bytes(*raw))
}

/// Says which kind of kernel starts with `header`, the first [`HEADER_LEN`] bytes of a file, or
/// the whole file if it is shorter.
///
/// # Errors
/// [`ImageError::NotAKernel`], [`ImageError::ThirtyTwoBit`], [`ImageError::OtherArchitecture`],
/// [`ImageError::OldProtocol`], or [`ImageError::Truncated`] when the header itself is cut off.
pub fn recognise(header: &[u8]) -> Result<Kind, ImageError> {
    if header.starts_with(b"\x7fELF") {
        return elf(header);
    }
    if header.get(MAGIC..MAGIC + 4) == Some(b"HdrS") {
        return boot_header(header).map(Kind::BzImage);
    }
    // Documentation/arch/arm64/booting.rst and riscv/boot-image-header.rst put a magic at 0x38.
    match header.get(0x38..0x3c) {
        Some(b"ARM\x64") => return Err(other("arm64")),
        Some(b"RSC\x05") => return Err(other("RISC-V")),
        _ => {}
    }
    Err(ImageError::NotAKernel {
        found: describe(header),
    })
}

fn other(name: &str) -> ImageError {
    ImageError::OtherArchitecture {
        name: name.to_owned(),
    }
}

fn describe(header: &[u8]) -> &'static str {
    match header {
        [] => "the file is empty",
        [0x1f, 0x8b, ..] => "a gzip file (unpack it first if a kernel is inside)",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "a zstd file (unpack it first if a kernel is inside)",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "an xz file (unpack it first if a kernel is inside)",
        [b'0', b'7', b'0', b'7', b'0', ..] => "a cpio archive (an initramfs?)",
        [b'!', b'<', b'a', b'r', b'c', b'h', b'>', ..] => "an archive (a Debian package?)",
        [b'M', b'Z', ..] if header.get(4..8) == Some(b"zimg") => "an EFI zboot image",
        [b'M', b'Z', ..] => "a PE program without a Linux boot header",
        [b'#', b'!', ..] => "a script",
        _ => "neither an ELF file nor one with the Linux/x86 boot header",
    }
}

fn elf(header: &[u8]) -> Result<Kind, ImageError> {
    let (Some(&class), Some(&data), Some(kind), Some(machine)) = (
        header.get(EI_CLASS),
        header.get(EI_DATA),
        u16_at(header, E_TYPE),
        u16_at(header, E_MACHINE),
    ) else {
        return Err(cut("the ELF header", 64, header.len()));
    };
    if data != object::elf::ELFDATA2LSB.0 {
        return Err(other("a big-endian processor"));
    }
    match (object::elf::Machine(machine), class) {
        (object::elf::EM_X86_64, 2) => {}
        (object::elf::EM_386 | object::elf::EM_X86_64, _) => return Err(ImageError::ThirtyTwoBit),
        (object::elf::EM_AARCH64, _) => return Err(other("arm64")),
        (object::elf::EM_RISCV, _) => return Err(other("RISC-V")),
        (object::elf::EM_S390, _) => return Err(other("s390")),
        (object::elf::EM_PPC64, _) => return Err(other("powerpc64")),
        (object::elf::EM_LOONGARCH, _) => return Err(other("LoongArch")),
        _ => return Err(other(&format!("ELF machine {machine:#x}"))),
    }
    match object::elf::FileType(kind) {
        object::elf::ET_EXEC => Ok(Kind::Vmlinux),
        object::elf::ET_REL => Err(ImageError::NotAKernel {
            found: "a relocatable ELF object (a kernel module?)",
        }),
        object::elf::ET_CORE => Err(ImageError::NotAKernel {
            found: "an ELF core dump",
        }),
        _ => Err(ImageError::NotAKernel {
            found: "an ELF program or library of user space",
        }),
    }
}

fn boot_header(header: &[u8]) -> Result<BootHeader, ImageError> {
    let short = || cut("the boot header", INIT_SIZE + 4, header.len());
    let protocol = u16_at(header, VERSION).ok_or_else(short)?;
    if protocol < 0x208 {
        return Err(ImageError::OldProtocol { version: protocol });
    }
    let setup_sects = *header.get(SETUP_SECTS).ok_or_else(short)?;
    let flags = u16_at(header, XLOADFLAGS).ok_or_else(short)?;
    let offset = u32_at(header, PAYLOAD_OFFSET).ok_or_else(short)?;
    let len = u32_at(header, PAYLOAD_LENGTH).ok_or_else(short)?;
    let init_size = u32_at(header, INIT_SIZE).ok_or_else(short)?;
    let pointer = u16_at(header, KERNEL_VERSION).ok_or_else(short)?;
    let entry64 = protocol >= 0x20c && flags & XLF_KERNEL_64 != 0;
    if protocol >= 0x20c && !entry64 {
        return Err(ImageError::ThirtyTwoBit);
    }
    // "For backwards compatibility, if the setup_sects field contains 0, the real value is 4."
    let setup_sects = if setup_sects == 0 {
        4
    } else {
        u64::from(setup_sects)
    };
    Ok(BootHeader {
        protocol,
        entry64,
        version: version_string(header, pointer),
        payload_offset: (setup_sects + 1) * 512 + u64::from(offset),
        payload_len: u64::from(len),
        init_size,
    })
}

/// The string that `kernel_version` points to, counted from 0x200, when it is text.
fn version_string(header: &[u8], pointer: u16) -> Option<String> {
    if pointer == 0 {
        return None;
    }
    let from = header.get(usize::from(pointer) + 0x200..)?;
    let from = from.get(..512).unwrap_or(from);
    let text = from.get(..from.iter().position(|&byte| byte == 0)?)?;
    let text = std::str::from_utf8(text).ok()?;
    let plain = text.chars().all(|c| !c.is_control());
    (plain && !text.is_empty()).then(|| text.to_owned())
}

fn cut(what: &'static str, need: usize, have: usize) -> ImageError {
    ImageError::Truncated {
        what,
        need: need as u64,
        have: have as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf_header(class: u8, machine: u16, kind: u16) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, 1]);
        bytes[E_TYPE..E_TYPE + 2].copy_from_slice(&kind.to_le_bytes());
        bytes[E_MACHINE..E_MACHINE + 2].copy_from_slice(&machine.to_le_bytes());
        bytes
    }

    fn boot(protocol: u16, flags: u16) -> Vec<u8> {
        let mut bytes = vec![0; 0x300];
        bytes[SETUP_SECTS] = 0x27;
        bytes[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        bytes[VERSION..VERSION + 2].copy_from_slice(&protocol.to_le_bytes());
        bytes[XLOADFLAGS..XLOADFLAGS + 2].copy_from_slice(&flags.to_le_bytes());
        bytes[KERNEL_VERSION..KERNEL_VERSION + 2].copy_from_slice(&0x80_u16.to_le_bytes());
        bytes[0x280..0x28a].copy_from_slice(b"6.99-test\0");
        bytes[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&0x2cc_u32.to_le_bytes());
        bytes[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&0x1000_u32.to_le_bytes());
        bytes
    }

    #[test]
    fn kinds_are_told_apart() {
        assert_eq!(recognise(&elf_header(2, 62, 2)).unwrap(), Kind::Vmlinux);
        let Kind::BzImage(header) = recognise(&boot(0x20f, 0x7f)).unwrap() else {
            panic!()
        };
        assert_eq!(header.version.as_deref(), Some("6.99-test"));
        assert_eq!(header.payload_offset, 0x28 * 512 + 0x2cc);
        assert!(header.entry64);
        let Kind::BzImage(old) = recognise(&boot(0x20a, 0)).unwrap() else {
            panic!()
        };
        assert!(!old.entry64);
    }

    #[test]
    fn refusals_are_distinct() {
        let refused = |bytes: &[u8]| recognise(bytes).unwrap_err();
        assert!(matches!(
            refused(&elf_header(1, 3, 2)),
            ImageError::ThirtyTwoBit
        ));
        assert!(matches!(
            refused(&elf_header(1, 62, 2)),
            ImageError::ThirtyTwoBit
        ));
        assert!(matches!(
            refused(&boot(0x20f, 0x7e)),
            ImageError::ThirtyTwoBit
        ));
        assert!(matches!(
            refused(&elf_header(2, 183, 2)),
            ImageError::OtherArchitecture { .. }
        ));
        assert!(matches!(
            refused(&elf_header(2, 62, 1)),
            ImageError::NotAKernel { .. }
        ));
        assert!(matches!(
            refused(&elf_header(2, 62, 3)),
            ImageError::NotAKernel { .. }
        ));
        assert!(matches!(
            refused(&boot(0x207, 0)),
            ImageError::OldProtocol { version: 0x207 }
        ));
        assert!(matches!(
            refused(&boot(0x20f, 1)[..0x230]),
            ImageError::Truncated { .. }
        ));
        for other in [&b""[..], b"070701", &[0; 4096], b"#!/bin/sh\n"] {
            assert!(matches!(refused(other), ImageError::NotAKernel { .. }));
        }
    }

    #[test]
    fn no_prefix_of_a_header_panics() {
        for whole in [elf_header(2, 62, 2), boot(0x20f, 1)] {
            for len in 0..whole.len() {
                let _ = recognise(&whole[..len]);
            }
        }
    }
}
