//! Why there are no symbols, or not the one that was asked for.

use crate::guest::LinkAddr;

/// Why no symbol table was found in a kernel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SymbolsError {
    /// No token table: the kernel was built without symbols, or its tables have a new form.
    #[error("the kernel has no kallsyms token table (built without CONFIG_KALLSYMS?)")]
    NoTokens,
    /// A token table, but no list of names that leads up to it.
    #[error(
        "unknown kallsyms layout: no names belong to the token table at {tokens}; this release of stillpoint does not know this kernel's format"
    )]
    NoNames {
        /// Where the token table is.
        tokens: LinkAddr,
    },
    /// Names, but no reading of the addresses that makes sense.
    #[error(
        "unknown kallsyms layout: {count} names at {names}, but no known form of addresses fits them"
    )]
    NoAddresses {
        /// Where the names are.
        names: LinkAddr,
        /// How many there are.
        count: u32,
    },
    /// More than one reading makes sense, so none is believed.
    #[error("the kernel's kallsyms can be read in {readings} ways; none of them is believed")]
    Ambiguous {
        /// How many ways.
        readings: usize,
    },
    /// The search was given up.
    #[error("the kernel's data offer too many possible symbol tables; the file is not believed")]
    TooComplex,
    /// The symbols belong to another kernel, or are wrong.
    #[error("kallsyms puts linux_banner at {symbol}, but the version string is at {found}")]
    BannerMismatch {
        /// Where the symbol points.
        symbol: LinkAddr,
        /// Where the string is.
        found: LinkAddr,
    },
}

/// Why a symbol, or a site, could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SiteError {
    /// No such symbol.
    #[error("no symbol {name:?} in this kernel{}", did_you_mean(.near))]
    Unknown {
        /// As it was given.
        name: String,
        /// Names that are spelled nearly so.
        near: Vec<String>,
    },
    /// Several symbols of that name.
    #[error(
        "{count} symbols are called {name:?}; say which one: {name}@1 to {name}@{count}, in order of address"
    )]
    Ambiguous {
        /// As it was given.
        name: String,
        /// How many there are.
        count: usize,
    },
    /// Fewer symbols of that name than asked for.
    #[error("no {name}@{position}: {count} symbols are called so")]
    NoSuchPosition {
        /// As it was given.
        name: String,
        /// The one that was asked for, counted from 1.
        position: u32,
        /// How many there are.
        count: usize,
    },
    /// The offset leads out of the symbol.
    #[error("{name}+{offset:#x} is outside of {name}, which has {size:#x} bytes")]
    OutsideSymbol {
        /// The symbol.
        name: String,
        /// Offset in bytes.
        offset: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// A per-CPU or absolute symbol has no address of its own.
    #[error(
        "{name} is not at an address of the image: its value {value:#x} is absolute or per-CPU"
    )]
    Absolute {
        /// The symbol.
        name: String,
        /// Its value.
        value: u64,
    },
    /// No such module.
    #[error("no module {module:?} is loaded in the guest")]
    NoModule {
        /// As it was given.
        module: String,
    },
    /// Not a site.
    #[error(
        "{text:?} is not a site: {why}; write symbol, symbol+0x12, symbol@2+0x12, module:symbol or 0xffff..."
    )]
    Syntax {
        /// As it was given.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

fn did_you_mean(near: &[String]) -> String {
    if near.is_empty() {
        String::new()
    } else {
        format!(" (did you mean {}?)", near.join(", "))
    }
}
