//! Where is it? The kernel's own symbol table (kallsyms), read out of its image.
//!
//! Guaranteed: symbols come only from a table that can be read in exactly one known way (see
//! [`Layout`] and [`OffsetForm`]); the data are untrusted and the search is bounded. Not
//! guaranteed: that a name is unique, that a size is exact (a symbol ends where the next one
//! starts, as in the kernel's own reckoning), or that a function is one piece (compilers split
//! off `.cold` parts).
//!
//! Addresses are link addresses. The index keeps the names compressed: about 40 bytes for each
//! symbol.

mod addresses;
mod error;
mod find;
mod format;
mod glob;
mod guest;
mod modules;
mod names;
mod near;
mod parts;
mod site;

use std::ops::Range;

pub use error::{SiteError, SymbolsError};
pub use format::{Format, Layout, OffsetForm};
pub use guest::{GuestSymbols, Loaded, LoadedModule, PlaceInfo, SymbolInfo, SymbolQuery};
pub use modules::{
    Array, MemoryKind, Module, ModuleMemory, ModuleState, ModuleSymbol, ModuleSymbols,
    ModulesError, ModulesLayout, OrcTables, SymbolTable,
};
pub use parts::FunctionParts;
pub use site::Site;

use crate::guest::LinkAddr;
use crate::hash::hash;
use crate::image::Image;
use addresses::KERNEL_START;
use format::Region;
use names::Tokens;

/// All symbols of a kernel.
pub struct Symbols {
    format: Format,
    tokens: Tokens,
    /// Compressed names, as in the kernel.
    names: Vec<u8>,
    /// Where in `names` each symbol's entry starts, in the table's order.
    entries: Vec<u32>,
    /// Value of each symbol, in the table's order.
    values: Vec<u64>,
    /// Symbols that have an address, by address, those at the same one in the table's order.
    by_address: Vec<u32>,
    /// (hash of the name, symbol), sorted.
    by_name: Vec<(u32, u32)>,
    /// Where code and data are; symbols do not reach beyond the end of the part they are in.
    parts: Vec<Range<u64>>,
}

/// One symbol.
#[derive(Clone, Copy)]
pub struct Symbol<'a> {
    symbols: &'a Symbols,
    index: usize,
}

/// A symbol and a place in it.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The symbol that covers the place. Of several at the same address, the one that the kernel
    /// itself would print.
    pub symbol: Symbol<'a>,
    /// Bytes from its start.
    pub offset: u64,
    /// Bytes from its start to the next symbol, or to the end of what it is in.
    pub size: u64,
}

impl Symbols {
    /// Reads the symbols out of a kernel's image.
    ///
    /// # Errors
    /// [`SymbolsError`] when there are none, or not exactly one way to read them.
    pub fn of(image: &Image) -> Result<Self, SymbolsError> {
        let mut found = Vec::new();
        let mut reason = SymbolsError::NoTokens;
        for (base, bytes) in image.data() {
            match Self::read(&Region { base, bytes }) {
                Ok(symbols) => found.push(symbols),
                Err(SymbolsError::NoTokens) => {}
                Err(error) => reason = error,
            }
        }
        let readings = found.len();
        let mut symbols = found.pop().ok_or(reason)?;
        if readings > 1 {
            return Err(SymbolsError::Ambiguous { readings });
        }
        symbols.parts = image
            .sections()
            .iter()
            .filter(|section| section.allocated && section.address.0 >= KERNEL_START)
            .map(|section| section.range())
            .chain(
                image
                    .segments()
                    .iter()
                    .map(|s| s.address..s.address.offset(s.size)),
            )
            .map(|range| range.start.0..range.end.0)
            .collect();
        let named = symbols
            .named("linux_banner")
            .next()
            .and_then(|symbol| symbol.address());
        if let (Some(symbol), Some(banner)) = (named, image.banner()) {
            if image.banner_at(symbol).is_none() {
                return Err(SymbolsError::BannerMismatch {
                    symbol,
                    found: banner.address,
                });
            }
        }
        Ok(symbols)
    }

    fn read(region: &Region<'_>) -> Result<Self, SymbolsError> {
        let tables = find::find(region)?;
        let names = region
            .bytes
            .get(tables.names.clone())
            .unwrap_or_default()
            .to_vec();
        let mut symbols = Self {
            format: tables.format,
            tokens: tables.tokens.clone(),
            names,
            entries: Vec::with_capacity(tables.count),
            values: Vec::with_capacity(tables.count),
            by_address: Vec::with_capacity(tables.count),
            by_name: Vec::with_capacity(tables.count),
            parts: Vec::new(),
        };
        let mut name = Vec::new();
        let mut at = 0;
        for index in 0..tables.count {
            let (Some((entry, next)), Some(value), Ok(number)) = (
                names::entry(&symbols.names, at),
                tables.value(region, index),
                u32::try_from(index),
            ) else {
                break;
            };
            names::expand(&symbols.tokens, entry, &mut name);
            symbols
                .by_name
                .push((hash(name.get(1..).unwrap_or_default()), number));
            symbols.entries.push(u32::try_from(at).unwrap_or(u32::MAX));
            symbols.values.push(value);
            if value >= KERNEL_START {
                symbols.by_address.push(number);
            }
            at = next;
        }
        symbols.by_name.sort_unstable();
        let values = &symbols.values;
        let value = |number: &u32| values.get(*number as usize).copied().unwrap_or(0);
        symbols
            .by_address
            .sort_by_key(|number| (value(number), *number));
        Ok(symbols)
    }

    /// How many symbols there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are none. There are always some.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// How the kernel lays its table out.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// Bytes of memory that the index takes.
    #[must_use]
    pub fn resident(&self) -> usize {
        self.tokens.resident()
            + self.names.capacity()
            + self.entries.capacity() * 4
            + self.values.capacity() * 8
            + self.by_address.capacity() * 4
            + self.by_name.capacity() * 8
            + self.parts.capacity() * 16
    }

    /// All symbols in the table's order, which is that of addresses but for a few.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Symbol<'_>> {
        (0..self.len()).map(|index| Symbol {
            symbols: self,
            index,
        })
    }

    /// The symbols called exactly `name`, in order of address. The first is what livepatch calls
    /// sympos 1.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Symbol<'a>> {
        self.called(name.as_bytes())
    }

    fn called<'a>(&'a self, name: &'a [u8]) -> impl Iterator<Item = Symbol<'a>> {
        let wanted = hash(name);
        let start = self.by_name.partition_point(|&(hash, _)| hash < wanted);
        let run = self.by_name.get(start..).unwrap_or_default();
        run.iter()
            .take_while(move |&&(hash, _)| hash == wanted)
            .map(|&(_, number)| Symbol {
                symbols: self,
                index: number as usize,
            })
            .filter(move |symbol| symbol.with_name(|found| found == name))
    }

    /// The only symbol called `name`.
    ///
    /// # Errors
    /// [`SiteError::Unknown`] or [`SiteError::Ambiguous`].
    pub fn unique(&self, name: &str) -> Result<Symbol<'_>, SiteError> {
        let all: Vec<_> = self.named(name).map(|symbol| symbol.index).collect();
        match all[..] {
            [] => Err(SiteError::Unknown {
                name: name.to_owned(),
                near: near::names(self, name),
            }),
            [index] => Ok(Symbol {
                symbols: self,
                index,
            }),
            _ => Err(SiteError::Ambiguous {
                name: name.to_owned(),
                count: all.len(),
            }),
        }
    }

    /// The link address of the only symbol called `name`.
    ///
    /// # Errors
    /// As [`Symbols::unique`], and [`SiteError::Absolute`] for a symbol without an address.
    pub fn address(&self, name: &str) -> Result<LinkAddr, SiteError> {
        let symbol = self.unique(name)?;
        symbol.address().ok_or_else(|| SiteError::Absolute {
            name: name.to_owned(),
            value: symbol.value(),
        })
    }

    /// The symbols whose names match a pattern of `*`, `?` and `[a-z]`, in the table's order.
    pub fn matching<'a>(&'a self, pattern: &'a str) -> impl Iterator<Item = Symbol<'a>> {
        self.iter()
            .filter(move |symbol| symbol.with_name(|name| glob::matches(pattern.as_bytes(), name)))
    }

    /// The symbol that covers `at`, as the kernel itself would name the place.
    #[must_use]
    pub fn at(&self, at: LinkAddr) -> Option<Place<'_>> {
        let above = self
            .by_address
            .partition_point(|&number| self.raw(number) <= at.0);
        let (mut first, end) = (above.checked_sub(1)?, above);
        let start = self.raw(*self.by_address.get(first)?);
        while first > 0 && self.by_address.get(first - 1).map(|&n| self.raw(n)) == Some(start) {
            first -= 1;
        }
        self.place(first, end, at)
    }

    /// The function that covers `at`. The padding in front of a function (`__pfx_`, `__cfi_`)
    /// belongs to none, and data are none.
    #[must_use]
    pub fn function_at(&self, at: LinkAddr) -> Option<Place<'_>> {
        let place = self.at(at)?;
        let start = LinkAddr(place.symbol.value());
        let symbol = self.functions_from(start).next()?;
        Some(Place { symbol, ..place })
    }

    /// Every function that begins at `at`: one and the same, by all of its names.
    pub fn functions_from(&self, at: LinkAddr) -> impl Iterator<Item = Symbol<'_>> {
        let first = self
            .by_address
            .partition_point(|&number| self.raw(number) < at.0);
        let all = self.by_address.get(first..).unwrap_or_default().iter();
        let here = all.take_while(move |&&number| self.raw(number) == at.0);
        here.map(|&number| Symbol {
            symbols: self,
            index: number as usize,
        })
        .filter(Symbol::is_function)
    }

    fn raw(&self, number: u32) -> u64 {
        self.values.get(number as usize).copied().unwrap_or(0)
    }

    /// The place `at` in the symbol that is `first` in the order of addresses, when it reaches
    /// that far; the next symbol at another address is `end`.
    fn place(&self, first: usize, end: usize, at: LinkAddr) -> Option<Place<'_>> {
        let number = *self.by_address.get(first)?;
        let start = self.raw(number);
        let next = self.by_address.get(end).map(|&number| self.raw(number));
        let part = self
            .parts
            .iter()
            .find(|part| part.contains(&start))
            .map(|part| part.end);
        let end = match (next, part) {
            (Some(next), Some(part)) => next.min(part),
            (next, part) => next.or(part)?,
        };
        (at.0 < end).then(|| Place {
            symbol: Symbol {
                symbols: self,
                index: number as usize,
            },
            offset: at.0 - start,
            size: end - start,
        })
    }
}

impl<'a> Symbol<'a> {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        self.with_name(|name| String::from_utf8_lossy(name).into_owned())
    }

    /// Its type as nm prints it: `T` and `t` are code, `A` absolute, capitals are global.
    #[must_use]
    pub fn kind(&self) -> char {
        let entry = self.entry();
        let first = entry
            .iter()
            .find_map(|&token| self.symbols.tokens.get(token).first());
        first.map_or('?', |&byte| char::from(byte))
    }

    /// Its link address, unless it is absolute (as per-CPU variables are in kernels before 6.15).
    #[must_use]
    pub fn address(&self) -> Option<LinkAddr> {
        let value = self.value();
        (value >= KERNEL_START).then_some(LinkAddr(value))
    }

    /// Its value: the link address, or the absolute value (for a per-CPU variable, its offset in
    /// the per-CPU area).
    #[must_use]
    pub fn value(&self) -> u64 {
        self.symbols.values.get(self.index).copied().unwrap_or(0)
    }

    /// Bytes to the next symbol, where it has an address.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        Some(self.symbols.at(self.address()?)?.size)
    }

    /// Which of the symbols of its name it is, counted from 1.
    #[must_use]
    pub fn position(&self) -> usize {
        self.with_name(|name| {
            let same = self.symbols.called(name);
            same.take_while(|other| other.index <= self.index).count()
        })
    }

    /// Whether it is code that can be called: not data, and not the padding in front of a function.
    #[must_use]
    pub fn is_function(&self) -> bool {
        matches!(self.kind(), 't' | 'T' | 'w' | 'W')
            && !self.with_name(|name| name.starts_with(b"__pfx_") || name.starts_with(b"__cfi_"))
    }

    fn entry(&self) -> &'a [u8] {
        let at = self
            .symbols
            .entries
            .get(self.index)
            .map_or(usize::MAX, |&at| at as usize);
        names::entry(&self.symbols.names, at).map_or(&[], |(entry, _)| entry)
    }

    fn with_name<R>(&self, use_it: impl FnOnce(&[u8]) -> R) -> R {
        let mut name = Vec::with_capacity(64);
        names::expand(&self.symbols.tokens, self.entry(), &mut name);
        use_it(name.get(1..).unwrap_or_default())
    }
}

impl std::fmt::Debug for Symbols {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} symbols ({:?})", self.len(), self.format)
    }
}

impl std::fmt::Debug for Symbol<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x} {} {}", self.value(), self.kind(), self.name())
    }
}

#[cfg(test)]
mod tests;
