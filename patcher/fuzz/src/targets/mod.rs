//! The targets.

mod files;
mod guest;
mod stack;

pub use files::{btf, core, image, kallsyms, orc};
pub use guest::{log, modules, page_walk, tasks};
pub use stack::stacks;

pub(crate) use stack::orc_sections;
