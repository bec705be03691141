//! Why a file is not a kernel that can be used.

use super::unpack::Compression;

/// What was wrong with a file given as a kernel.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It is something else.
    #[error("not a Linux kernel: {found}; give a bzImage (vmlinuz) or a vmlinux")]
    NotAKernel {
        /// What it looks like.
        found: &'static str,
    },
    /// A kernel for 32-bit x86.
    #[error("a 32-bit x86 kernel; only x86-64 kernels can be booted and patched")]
    ThirtyTwoBit,
    /// A kernel for another processor.
    #[error("a kernel for {name}; only x86-64 kernels can be booted and patched")]
    OtherArchitecture {
        /// The processor, or its ELF machine number.
        name: String,
    },
    /// A bzImage older than Linux 2.6.26, which does not say where its payload is.
    #[error("boot protocol {}.{:02} is too old: 2.08 (Linux 2.6.26) or later is needed", .version >> 8, .version & 0xff)]
    OldProtocol {
        /// As in the header: major in the upper byte.
        version: u16,
    },
    /// The payload of a bzImage starts with none of the signatures that Linux uses.
    #[error(
        "unknown compression of the kernel (payload starts {magic:02x?}); unpack it and give the vmlinux"
    )]
    UnknownCompression {
        /// The first bytes of the payload.
        magic: [u8; 4],
    },
    /// The file ends early.
    #[error("the kernel file is cut off: {what} ends at {need:#x}, the file at {have:#x}")]
    Truncated {
        /// The part that is not all there.
        what: &'static str,
        /// Where that part ends, as a file offset.
        need: u64,
        /// Length of the file.
        have: u64,
    },
    /// A size that no kernel has.
    #[error("{what} would be {size:#x} bytes, which no kernel needs (limit {limit:#x})")]
    ImplausibleSize {
        /// What has that size.
        what: &'static str,
        /// The size in bytes.
        size: u64,
        /// The most that is believed.
        limit: u64,
    },
    /// The payload does not unpack.
    #[error("the kernel's {compression} payload is damaged")]
    Unpack {
        /// How it is compressed.
        compression: Compression,
        /// What the decompressor said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The ELF file, or the one inside the bzImage, is malformed.
    #[error("the kernel's ELF file is malformed: {0}")]
    BadElf(String),
}
