//! Kernels that never ran and guests that never booted: small images, symbol tables, type
//! information, tasks and modules made to order.
//!
//! For tests and fuzzers (feature `synthetic`). What is written follows the same descriptions of
//! the formats as the readers do, but shares no code with them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "writes small tables for tests; a value that does not fit is a mistake in the test"
)]

mod btf;
mod bzimage;
mod core;
mod elf;
mod guest;
mod kallsyms;
mod orc;
mod plan;
pub mod ram;
mod restless;
mod shape;

pub use btf::Btf;
pub use bzimage::{Packing, bzimage, pack};
pub use core::core;
pub use elf::{ElfSection, elf};
pub use guest::{Guest, SLIDE};
pub use kallsyms::{Kallsyms, SyntheticSymbol};
pub use orc::Orc;
pub use plan::{PER_CPU_SIZE, Plan, STACK_SIZE, VARIABLES};
pub use ram::{FakeGuest, Place};
pub use restless::Restless;
pub use shape::{Shape, Span};

use crate::guest::LinkAddr;

/// Where the text of a synthetic kernel is linked.
pub const TEXT: LinkAddr = LinkAddr(0xffff_ffff_8100_0000);
/// Where its read-only data are linked.
pub const RODATA: LinkAddr = LinkAddr(0xffff_ffff_8200_0000);
/// Where its type information is linked.
pub const TYPES: LinkAddr = LinkAddr(0xffff_ffff_8280_0000);
/// Its version string.
pub const BANNER: &str = "Linux version 6.99.0-synthetic (nobody@nowhere) (cc 1) #1 SMP";
/// Its build id.
pub const BUILD_ID: [u8; 20] = *b"a synthetic build id";

/// A vmlinux with text, a version string, the symbols that `kallsyms` writes, a few types and a
/// build id. `linux_banner` must be one of the symbols: see [`Kallsyms::example`].
#[must_use]
pub fn vmlinux(kallsyms: &Kallsyms) -> Vec<u8> {
    vmlinux_with(kallsyms, &[])
}

/// As [`vmlinux`], with more sections.
#[must_use]
pub fn vmlinux_with(kallsyms: &Kallsyms, more: &[ElfSection]) -> Vec<u8> {
    let mut rodata = [BANNER.as_bytes(), b"\n\0"].concat();
    rodata.resize(0x100, 0);
    rodata.extend(kallsyms.write(RODATA.offset(0x100)));
    rodata.extend([0; 64]);
    let notes = [
        &4_u32.to_le_bytes()[..],
        &20_u32.to_le_bytes(),
        &3_u32.to_le_bytes(),
        b"GNU\0",
        &BUILD_ID,
    ];
    let section = |name, address, bytes, executable| ElfSection {
        name,
        address,
        bytes,
        executable,
    };
    let mut sections = vec![
        section(".text", TEXT, vec![0xcc; 0x2_0000], true),
        section(".rodata", RODATA, rodata, false),
        section(".BTF", TYPES, Btf::example().write(), false),
        section(".notes", TYPES.offset(0x10_0000), notes.concat(), false),
    ];
    sections.extend_from_slice(more);
    elf(&sections)
}

/// A small, fast, repeatable source of numbers (xorshift64*).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Numbers that depend on `seed` alone.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) as usize % bound
    }

    /// Damages `bytes` in one to eight places.
    pub fn damage(&mut self, bytes: &mut [u8]) {
        for _ in 0..=self.below(8) {
            let at = self.below(bytes.len());
            bytes[at] = match self.below(4) {
                0 => 0,
                1 => 0xff,
                2 => bytes[at] ^ 1 << self.below(8),
                _ => self.below(256) as u8,
            };
        }
    }
}
