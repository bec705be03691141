//! The symbols of one module, as the guest's own /proc/kallsyms shows them.

use std::collections::HashMap;

use super::layout::ModulesLayout;
use super::list::{Check, Record, text, unreadable};
use super::{Module, ModuleState, ModulesError, SymbolTable};
use crate::guest::Gva;
use crate::space::Space;
use crate::symbols::LoadedModule;

/// Most symbols of one module that are read; the largest modules of Debian have 30,000.
const MAX_SYMBOLS: u64 = 1 << 20;
/// Most bytes of names of one module.
const MAX_STRINGS: u64 = 64 << 20;
/// Most bytes of the symbols of all modules.
const MAX_RESIDENT: usize = 256 << 20;
/// KSYM_NAME_LEN of 6.1 and later; the kernel cuts longer names off.
const MAX_NAME: usize = 512;
/// Most exported symbols of one module.
const MAX_EXPORTS: u64 = 1 << 16;

/// All symbols of a module that was loaded when they were read.
pub struct ModuleSymbols {
    /// Names, one behind the other.
    names: Vec<u8>,
    /// In the order of the module's table.
    entries: Vec<Entry>,
    /// Entries that may cover an address, by address.
    by_address: Vec<u32>,
}

struct Entry {
    name: std::ops::Range<u32>,
    kind: u8,
    value: u64,
    size: u64,
}

/// A symbol of a module.
#[derive(Clone, Copy)]
pub struct ModuleSymbol<'a> {
    symbols: &'a ModuleSymbols,
    entry: &'a Entry,
}

impl ModulesLayout {
    /// Reads the symbols of those modules that are `wanted`; the others get none.
    ///
    /// # Errors
    /// As [`ModulesLayout::symbols`].
    pub fn with_symbols(
        &self,
        space: &Space<'_>,
        modules: Vec<Module>,
        wanted: &dyn Fn(&Module) -> bool,
    ) -> Result<Vec<LoadedModule>, ModulesError> {
        let mut resident = 0;
        let mut read = |module: Module| {
            let symbols = if wanted(&module) {
                self.symbols(space, &module)?
            } else {
                ModuleSymbols::new(Vec::new(), Vec::new())
            };
            resident += symbols.resident();
            if resident > MAX_RESIDENT {
                let check = Check {
                    module: &module.name,
                };
                return Err(check.wrong(
                    "symbols' size together with those before it",
                    resident as u64,
                ));
            }
            Ok(LoadedModule { module, symbols })
        };
        modules.into_iter().map(&mut read).collect()
    }

    /// Reads a module's symbols. Those without a name are left out, as the kernel does; a type is
    /// upper-case when everybody may use the symbol.
    ///
    /// # Errors
    /// [`ModulesError`]: a table cannot be read, or is larger than any module's.
    pub fn symbols(
        &self,
        space: &Space<'_>,
        module: &Module,
    ) -> Result<ModuleSymbols, ModulesError> {
        let (Some(fields), Some(table)) = (self.kallsyms, module.symbols) else {
            return Ok(ModuleSymbols::new(Vec::new(), Vec::new()));
        };
        let check = Check {
            module: &module.name,
        };
        let raw = RawTable::read(space, &check, table, fields.entry.len)?;
        let exports = self.exported(space, module)?;
        let mut strings = Vec::new();
        let records = || {
            raw.symbols
                .chunks_exact(fields.entry.len.max(1))
                .map(Record)
        };
        let last = records()
            .map(|symbol| symbol.number(fields.entry.name))
            .max();
        if let Some(last) = last {
            strings = read_strings(space, &check, table.strings, last)?;
        }
        let (mut names, mut entries) = (Vec::new(), Vec::new());
        for (symbol, &kind) in records().zip(&raw.kinds) {
            let start = usize::try_from(symbol.number(fields.entry.name)).unwrap_or(usize::MAX);
            let rest = strings.get(start..).unwrap_or_default();
            let len = memchr::memchr(0, rest).unwrap_or(rest.len());
            let name = rest.get(..len.min(MAX_NAME - 1)).unwrap_or_default();
            if name.is_empty() || symbol.number(fields.entry.section) == 0 {
                continue;
            }
            let value = symbol.number(fields.entry.value);
            let open = exports
                .get(&value)
                .is_some_and(|all| all.iter().any(|exported| exported.as_bytes() == name));
            if names.len() as u64 > MAX_STRINGS {
                return Err(check.wrong("length of symbol names", names.len() as u64));
            }
            let start = narrow(names.len());
            names.extend_from_slice(name);
            entries.push(Entry {
                name: start..narrow(names.len()),
                kind: if open {
                    kind.to_ascii_uppercase()
                } else {
                    kind.to_ascii_lowercase()
                },
                value,
                size: symbol.number(fields.entry.size),
            });
        }
        Ok(ModuleSymbols::new(names, entries))
    }

    /// What the module exports to everybody: names by address (`is_exported()` of kernel/module).
    fn exported(
        &self,
        space: &Space<'_>,
        module: &Module,
    ) -> Result<HashMap<u64, Vec<String>>, ModulesError> {
        let mut exported: HashMap<u64, Vec<String>> = HashMap::new();
        let (Some(fields), Some(array)) = (self.exports, module.exports) else {
            return Ok(exported);
        };
        if module.state == ModuleState::Unformed {
            return Ok(exported);
        }
        let check = Check {
            module: &module.name,
        };
        if array.count > MAX_EXPORTS {
            return Err(check.wrong("number of exports", array.count));
        }
        let len = fields.len.max(1);
        let count = usize::try_from(array.count).unwrap_or(0);
        let mut bytes = vec![0; count * len.min(64)];
        space
            .read(array.at, &mut bytes)
            .map_err(unreadable("module's exports"))?;
        for (index, raw) in bytes.chunks_exact(len).enumerate() {
            let record = Record(raw);
            let at = array.at.offset((index * len) as u64);
            // Each is a signed distance from where it stands itself.
            let target =
                |field: crate::types::Field| at.offset(field.offset).displace(record.signed(field));
            let name = text(space, target(fields.name), MAX_NAME as u64)
                .map_err(unreadable("module's exports"))?;
            exported
                .entry(target(fields.value).0)
                .or_default()
                .push(name);
        }
        Ok(exported)
    }
}

/// The tables as they are in the guest.
struct RawTable {
    symbols: Vec<u8>,
    kinds: Vec<u8>,
}

impl RawTable {
    fn read(
        space: &Space<'_>,
        check: &Check<'_>,
        table: SymbolTable,
        len: usize,
    ) -> Result<Self, ModulesError> {
        if table.count > MAX_SYMBOLS || len > 64 {
            return Err(check.wrong("number of symbols", table.count));
        }
        let count = usize::try_from(table.count).unwrap_or(0);
        let mut raw = Self {
            symbols: vec![0; count * len],
            kinds: vec![0; count],
        };
        for (at, into) in [
            (table.symbols, &mut raw.symbols),
            (table.kinds, &mut raw.kinds),
        ] {
            space
                .read(at, into)
                .map_err(unreadable("module's symbol table"))?;
        }
        Ok(raw)
    }
}

/// The names, up to the end of the one that starts at `last`.
fn read_strings(
    space: &Space<'_>,
    check: &Check<'_>,
    at: Gva,
    last: u64,
) -> Result<Vec<u8>, ModulesError> {
    let failed = "module's symbol names";
    if last > MAX_STRINGS {
        return Err(check.wrong("length of symbol names", last));
    }
    let mut strings = vec![0; usize::try_from(last).unwrap_or(0)];
    space.read(at, &mut strings).map_err(unreadable(failed))?;
    let end = text(space, at.offset(last), MAX_NAME as u64).map_err(unreadable(failed))?;
    strings.extend_from_slice(end.as_bytes());
    strings.push(0);
    Ok(strings)
}

fn narrow(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

impl ModuleSymbols {
    fn new(names: Vec<u8>, entries: Vec<Entry>) -> Self {
        let mut by_address: Vec<u32> = (0..narrow(entries.len())).collect();
        by_address.sort_by_key(|&number| entries.get(number as usize).map(|entry| entry.value));
        Self {
            names,
            entries,
            by_address,
        }
    }

    /// Symbols to order: name, type, address and size.
    #[cfg(test)]
    pub(in super::super) fn of(rows: &[(&str, u8, u64, u64)]) -> Self {
        let mut names = Vec::new();
        let mut entries = Vec::new();
        for &(name, kind, value, size) in rows {
            let start = narrow(names.len());
            names.extend_from_slice(name.as_bytes());
            entries.push(Entry {
                name: start..narrow(names.len()),
                kind,
                value,
                size,
            });
        }
        Self::new(names, entries)
    }

    /// Bytes of memory that they take.
    #[must_use]
    pub fn resident(&self) -> usize {
        self.names.capacity()
            + self.entries.capacity() * size_of::<Entry>()
            + self.by_address.capacity() * 4
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All of them, in the order of the module's table.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = ModuleSymbol<'_>> {
        self.entries.iter().map(|entry| ModuleSymbol {
            symbols: self,
            entry,
        })
    }

    /// Those called exactly `name`, in order of address.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = ModuleSymbol<'a>> {
        let sorted = self.by_address.iter();
        let sorted = sorted.filter_map(|&number| self.entries.get(number as usize));
        sorted
            .map(|entry| ModuleSymbol {
                symbols: self,
                entry,
            })
            .filter(move |symbol| symbol.raw_name() == name.as_bytes())
    }

    /// The last symbol at or below `at` (of several at one address the first in the table), and
    /// where the next one starts. Whether `at` is in the module at all is for the caller to know.
    #[must_use]
    pub fn below(&self, at: Gva) -> Option<(ModuleSymbol<'_>, Option<Gva>)> {
        let entry = |number: &u32| self.entries.get(*number as usize);
        let value = |number: &u32| entry(number).map_or(0, |entry| entry.value);
        let above = self
            .by_address
            .partition_point(|number| value(number) <= at.0);
        let start = value(self.by_address.get(above.checked_sub(1)?)?);
        let first = self
            .by_address
            .partition_point(|number| value(number) < start);
        let symbol = ModuleSymbol {
            symbols: self,
            entry: entry(self.by_address.get(first)?)?,
        };
        let next = self.by_address.get(above).map(|number| Gva(value(number)));
        Some((symbol, next))
    }
}

impl<'a> ModuleSymbol<'a> {
    pub(in super::super) fn raw_name(&self) -> &'a [u8] {
        let name = self.entry.name.start as usize..self.entry.name.end as usize;
        self.symbols.names.get(name).unwrap_or_default()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        String::from_utf8_lossy(self.raw_name()).into_owned()
    }

    /// Its type as nm prints it, upper-case when it is exported to everybody.
    #[must_use]
    pub fn kind(&self) -> char {
        char::from(self.entry.kind)
    }

    /// Its run-time address. That of a per-CPU variable is a per-CPU pointer.
    #[must_use]
    pub fn address(&self) -> Gva {
        Gva(self.entry.value)
    }

    /// Its size in bytes as the module's own table says; 0 when that does not.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.entry.size
    }

    /// Whether it is code that can be called: not data, and not the padding in front of a function.
    #[must_use]
    pub fn is_function(&self) -> bool {
        let padding = [&b"__pfx_"[..], b"__cfi_"];
        matches!(self.kind(), 't' | 'T' | 'w' | 'W')
            && !padding
                .iter()
                .any(|prefix| self.raw_name().starts_with(prefix))
    }
}

impl std::fmt::Debug for ModuleSymbols {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} symbols of a module", self.len())
    }
}

impl std::fmt::Debug for ModuleSymbol<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.address(), self.kind(), self.name())
    }
}
