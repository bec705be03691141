//! How kallsyms tables are laid out.
//!
//! Written by scripts/kallsyms.c. Each table starts on a boundary of 8 bytes, or 4 (from 7.0).
//!
//! | layout | kernels | order of the tables |
//! |-|-|-|
//! | A | to 6.3 | offsets, relative_base, num_syms, names, markers, \[seqs_of_names (6.2 on, and backports)\], token_table, token_index |
//! | B | 6.4 to 6.19 (404bad70fcf7) | num_syms, names, markers, token_table, token_index, offsets, relative_base, \[seqs_of_names\] |
//! | C | 7.0 on (a081b5789255) | as B without relative_base |
//!
//! | form of an offset `o` | kernels |
//! |-|-|
//! | per-CPU: `o` ≥ 0 is an absolute value, else relative_base − 1 − `o` | SMP to 6.14 |
//! | base: relative_base + `o`, unsigned | UP; all from 6.15 (01157ddc58dc) |
//! | self: address of the offset + `o`, signed | layout C |

use std::ops::Range;

use super::names::Tokens;
use crate::guest::LinkAddr;

/// Read-only data of a kernel at the address where it is linked.
#[derive(Clone, Copy)]
pub(super) struct Region<'a> {
    pub(super) base: LinkAddr,
    pub(super) bytes: &'a [u8],
}

impl Region<'_> {
    pub(super) fn word(&self, at: usize) -> Option<u32> {
        self.bytes
            .get(at..)?
            .first_chunk()
            .map(|raw| u32::from_le_bytes(*raw))
    }

    pub(super) fn long(&self, at: usize) -> Option<u64> {
        self.bytes
            .get(at..)?
            .first_chunk()
            .map(|raw| u64::from_le_bytes(*raw))
    }

    pub(super) fn address(&self, at: usize) -> LinkAddr {
        self.base.offset(at as u64)
    }

    /// Bytes from `at` up to the next boundary.
    pub(super) fn padding(&self, at: usize, align: usize) -> usize {
        let over = self.address(at).0 % align as u64;
        if over == 0 {
            0
        } else {
            align - usize::try_from(over).unwrap_or(0)
        }
    }

    pub(super) fn up(&self, at: usize, align: usize) -> usize {
        at + self.padding(at, align)
    }

    pub(super) fn aligned(&self, at: usize, align: usize) -> bool {
        self.padding(at, align) == 0
    }
}

/// Order of the tables: see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[allow(missing_docs, reason = "letters of the table above")]
pub enum Layout {
    A,
    B,
    C,
}

/// Form of the offsets: see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OffsetForm {
    /// Absolute values beside those relative to a base.
    PerCpu,
    /// All relative to a base.
    Base,
    /// Relative to their own place.
    Own,
}

/// How a kernel's symbol table is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Format {
    /// Order of the tables.
    pub layout: Layout,
    /// Form of the offsets.
    pub offsets: OffsetForm,
    /// Boundary in bytes on which tables start. Where 8 and 4 fit alike it is 8.
    pub align: usize,
    /// The names' order is there too (`kallsyms_seqs_of_names`).
    pub sorted_names: bool,
}

/// Where everything is, as offsets in the region.
#[derive(Clone, Debug)]
pub(super) struct Tables {
    pub(super) format: Format,
    pub(super) tokens: Tokens,
    pub(super) names: Range<usize>,
    pub(super) count: usize,
    /// Where the offsets start.
    pub(super) offsets: usize,
    /// kallsyms_relative_base, where there is one.
    pub(super) base: u64,
    /// Where the names' order would start, unless it is in front of the tokens.
    pub(super) behind: usize,
}

impl Tables {
    /// The value of symbol `index`.
    pub(super) fn value(&self, region: &Region<'_>, index: usize) -> Option<u64> {
        let at = self.offsets.checked_add(index.checked_mul(4)?)?;
        let raw = region.word(at)?;
        let signed = i64::from(i32::from_le_bytes(raw.to_le_bytes()));
        Some(match self.format.offsets {
            OffsetForm::PerCpu if signed >= 0 => u64::from(raw),
            OffsetForm::PerCpu => self.base.wrapping_sub(1).wrapping_add_signed(-signed),
            OffsetForm::Base => self.base.wrapping_add(u64::from(raw)),
            OffsetForm::Own => region.address(at).0.wrapping_add_signed(signed),
        })
    }
}
