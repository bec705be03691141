//! The modules that are loaded in a guest, read from its memory.
//!
//! Guaranteed: the guest's list is read to its end or the answer is an error; offsets come from
//! the kernel's types, and the walk is bounded in steps and memory. What a module says of itself
//! (its ranges and tables) is checked for size only: the addresses are the guest's word.
//!
//! Known are kernels with `module.mem` (6.4 and later) and with `module.core_layout` (before). All
//! addresses are run-time addresses; modules have no link addresses.

mod layout;
mod list;
mod table;

use std::fmt;
use std::ops::Range;

pub use layout::ModulesLayout;
pub use table::{ModuleSymbol, ModuleSymbols};

use crate::guest::Gva;
use crate::space::SpaceError;

/// Why the modules of a guest could not be told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModulesError {
    /// A pointer leads nowhere.
    #[error("the guest's {what} cannot be read")]
    Unreadable {
        /// What was being read.
        what: &'static str,
        /// Where it failed.
        source: SpaceError,
    },
    /// The list came back to an entry that it had been at.
    #[error("the guest's {what} runs in a circle through {at}; it is not believed")]
    Circle {
        /// The list.
        what: &'static str,
        /// The entry seen twice.
        at: Gva,
    },
    /// The list has more entries than any kernel has modules.
    #[error("the guest's {what} has more than {limit} entries; it is not believed")]
    Endless {
        /// The list.
        what: &'static str,
        /// The bound that was hit.
        limit: usize,
    },
    /// A number that cannot be.
    #[error("module {module} of the guest says that its {what} is {value:#x}; it is not believed")]
    Unbelievable {
        /// The module's name.
        module: String,
        /// What is wrong.
        what: &'static str,
        /// Its value.
        value: u64,
    },
}

/// How far a module is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModuleState {
    /// In use.
    Live,
    /// Complete, and its init function runs.
    Coming,
    /// Being removed.
    Going,
    /// Still being put together: little of it is valid.
    Unformed,
    /// A state that this kernel's types do not name.
    Unknown(u64),
}

impl fmt::Display for ModuleState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Live => f.write_str("live"),
            Self::Coming => f.write_str("coming"),
            Self::Going => f.write_str("going"),
            Self::Unformed => f.write_str("unformed"),
            Self::Unknown(value) => write!(f, "{value:#x}"),
        }
    }
}

/// What a part of a module's memory holds (`enum mod_mem_type` of 6.4 and later).
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryKind {
    /// Instructions.
    Text,
    /// Data.
    Data,
    /// Constants.
    Rodata,
    /// Data that cannot be written any more once the module is live.
    RoAfterInit,
    /// Instructions that are freed once the module is live.
    InitText,
    /// Data that are freed once the module is live.
    InitData,
    /// Constants that are freed once the module is live.
    InitRodata,
}

/// A part of a module's memory.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ModuleMemory {
    /// What it holds.
    pub kind: MemoryKind,
    /// Its first byte.
    pub base: Gva,
    /// Its length in bytes, never 0; the end does not wrap.
    pub size: u64,
}

impl ModuleMemory {
    /// Its addresses.
    #[must_use]
    pub const fn range(&self) -> Range<Gva> {
        self.base..self.base.offset(self.size)
    }
}

/// A module's unwinding tables, sorted by the kernel when it loads the module.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct OrcTables {
    /// `mod.arch.orc_unwind_ip`: a signed 32-bit distance from each element to its instruction.
    pub instructions: Gva,
    /// `mod.arch.orc_unwind`: what to do there.
    pub entries: Gva,
    /// How many there are of each.
    pub count: u64,
}

/// A module's own symbol table (`struct mod_kallsyms`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SymbolTable {
    /// Elf64_Sym, `count` times.
    pub symbols: Gva,
    /// Their names.
    pub strings: Gva,
    /// Type letters, one byte each.
    pub kinds: Gva,
    /// How many there are.
    pub count: u64,
}

/// An array of the guest's: `kernel_symbol`, for instance.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Array {
    /// Its first element.
    pub at: Gva,
    /// How many elements it has.
    pub count: u64,
}

/// A module that is in the guest.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Module {
    /// Its `struct module`.
    pub address: Gva,
    /// Its name, as lsmod prints it.
    pub name: String,
    /// How far it is in its life.
    pub state: ModuleState,
    /// Its memory, parts that it does not have left out.
    pub memory: Vec<ModuleMemory>,
    /// Users that keep it from being removed, as lsmod prints them; negative while it goes.
    pub users: i64,
    /// TAINT_ flags that it brought, a bit each (include/linux/panic.h).
    pub taints: u64,
    /// The hash of its source, when it has one.
    pub source_version: Option<String>,
    /// Its symbols. The table of its whole life once it is live.
    pub symbols: Option<SymbolTable>,
    /// Symbols that it exports to everybody (not those under the GPL, before 7.x).
    pub exports: Option<Array>,
    /// Its unwinding tables.
    pub orc: Option<OrcTables>,
    /// Its types beside those of the kernel (split BTF), where it has any: `count` bytes.
    pub types: Option<Array>,
}

impl Module {
    /// Bytes of memory that it takes in all, as lsmod prints them.
    #[must_use]
    pub fn size(&self) -> u64 {
        let sizes = self.memory.iter().map(|part| part.size);
        sizes.fold(0, u64::saturating_add)
    }

    /// Where its instructions are, those of its init functions included while they are there.
    pub fn text(&self) -> impl Iterator<Item = Range<Gva>> + '_ {
        self.memory
            .iter()
            .filter(|part| matches!(part.kind, MemoryKind::Text | MemoryKind::InitText))
            .map(ModuleMemory::range)
    }

    /// Whether `at` is in memory of this module.
    #[must_use]
    pub fn contains(&self, at: Gva) -> bool {
        self.memory.iter().any(|part| part.range().contains(&at))
    }
}

#[cfg(test)]
mod tests;
