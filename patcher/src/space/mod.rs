//! Where does this address live? Page tables, the kernel's own address space, per-CPU areas.
//!
//! Everything here reads page tables and kernel data that the guest controls: each walk is
//! bounded, as is everything that is read in one look ([`Bounds`]), and an answer is either what
//! the CPU would compute or an error.

mod bounds;
mod dump;
mod located;
mod percpu;
mod view;
mod walk;

pub use bounds::Bounds;
pub use dump::complete_registers;
pub use located::{Landmarks, LocateError, Located};
pub use percpu::{PerCpu, PerCpuVariable};
pub use view::{Piece, Space, SpaceError};
pub(crate) use walk::{
    ACCESSED, ADDRESS, DIRTY, GLOBAL, LARGE, LEVEL_2M, NO_EXECUTE, PRESENT, WRITABLE,
};
pub use walk::{Entry, Mapping, PageSize, Root, WalkError, walk};

use std::ops::Range;

use crate::Kernel;
use crate::guest::LinkAddr;
use crate::symbols::{SiteError, Symbols};
use crate::types::TypeError;

/// The only symbol of that name, where a kernel has one. Quicker than an error that nobody sees.
pub(crate) fn optional(symbols: &Symbols, name: &str) -> Option<LinkAddr> {
    let mut all = symbols.named(name);
    match (all.next(), all.next()) {
        (Some(only), None) => only.address(),
        _ => None,
    }
}

/// The range between two symbols, where a kernel has both.
pub(crate) fn optional_range(kernel: &Kernel, start: &str, end: &str) -> Option<Range<LinkAddr>> {
    Some(optional(kernel.symbols(), start)?..optional(kernel.symbols(), end)?)
}

/// The kernel's file does not tell what is needed: nothing in the guest can be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A symbol is missing.
    #[error("this kernel lacks a symbol that is needed")]
    Symbol(#[from] SiteError),
    /// A type or member is missing.
    #[error("this kernel lacks a type that is needed")]
    Type(#[from] TypeError),
    /// Something that is found in one of several ways is found in none.
    #[error("this kernel's {what} cannot be found in any known way")]
    Unknown {
        /// What was looked for.
        what: &'static str,
    },
}
