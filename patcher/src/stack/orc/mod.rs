//! The kernel's own unwind tables (ORC): how to get from one frame to the one below it.
//!
//! Guaranteed: a format is recognised by the hash that the kernel keeps in `.orc_header`, never by
//! its release; one that is not known is refused; and every entry of a table is checked when the
//! table is read. Known formats (arch/x86/include/asm/orc_types.h):
//!
//! | format | kernels | recognised by |
//! |-|-|-|
//! | [`OrcFormat::Plain`] | 5.10, 6.1 | no header, and no bit set that it does not have |
//! | [`OrcFormat::Signal`] | 6.12 | hash fe5d32bf… |
//! | [`OrcFormat::Renumbered`] | 7.2, 7.3 | hash 137c36ad… |

mod format;
mod table;

pub use format::OrcFormat;
pub(super) use format::{BasePointer, CfaBase, Kind, Rule, SavedRegister};
pub use table::{OrcError, OrcTable};
