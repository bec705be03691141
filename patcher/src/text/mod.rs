//! What may be changed here and what will it mean?
//!
//! Three kinds of answers: by place, from the kernel's file ([`Regions`]); by the moment, from a
//! stopped guest ([`BusyLayout`], [`FtraceLayout`], [`KprobesLayout`], [`Rewritten`]); and by the
//! bytes, from decoding what is in guest memory now. Writing is the last step and the only one
//! that changes the guest.

mod busy;
mod decode;
mod ftrace;
mod kprobes;
mod module_sites;
mod regions;
mod survey;
mod tables;
mod tracers;
mod write;

pub use busy::{Busy, BusyError, BusyLayout};
pub use decode::{DecodeError, hex};
pub(crate) use decode::{
    EntrySite, MAX_INSTRUCTION, NOP5, boundaries, branches_into, entry_site, indirect_jump,
    instruction_len, leaves, on_the_way_in, whole,
};
pub use ftrace::{FtraceError, FtraceLayout, FtraceRecord};
pub use kprobes::KprobesLayout;
pub use module_sites::{ModuleSites, ModuleTables};
pub use regions::{RegionError, Regions};
pub use survey::{FunctionVerdict, Survey, Surveyor};
pub use tables::{Leader, Rewriter, Rewritten};
pub use write::WriteError;
pub(crate) use write::write;
