//! The symbols of a running guest: its kernel's, moved by KASLR, and those of its modules.
//!
//! Made from what one stop has read, and used without the guest. Addresses are run-time addresses;
//! modules that come or go later are not noticed.

use std::fmt;

use super::{Module, ModuleSymbol, ModuleSymbols, Site, SiteError, Symbol, Symbols, glob};
use crate::guest::{Gva, Slide};

/// A module with its symbols.
#[derive(Debug)]
pub struct LoadedModule {
    /// The module.
    pub module: Module,
    /// Its symbols.
    pub symbols: ModuleSymbols,
}

impl LoadedModule {
    /// The run-time address of a symbol of the module, `offset` bytes from its start.
    ///
    /// # Errors
    /// [`SiteError`]: unknown, ambiguous, or beyond the end of the symbol.
    pub fn resolve(
        &self,
        name: &str,
        position: Option<u32>,
        offset: u64,
    ) -> Result<Gva, SiteError> {
        let symbol = self.select(name, position)?;
        let size = symbol_size(symbol, &self.module, &self.symbols).unwrap_or(0);
        if offset != 0 && offset >= size {
            return Err(SiteError::OutsideSymbol {
                name: format!("{}:{name}", self.module.name),
                offset,
                size,
            });
        }
        Ok(symbol.address().offset(offset))
    }

    /// The symbol of the module that covers `at`.
    #[must_use]
    pub fn place(&self, at: Gva) -> Option<PlaceInfo> {
        let (symbol, _) = self.symbols.below(at)?;
        let size = symbol_size(symbol, &self.module, &self.symbols)?;
        let offset = at.distance_from(symbol.address());
        (offset < size).then(|| PlaceInfo {
            symbol: SymbolInfo {
                size: Some(size),
                ..module_symbol(symbol, &self.module)
            },
            offset,
        })
    }

    fn select<'a>(
        &'a self,
        name: &'a str,
        position: Option<u32>,
    ) -> Result<ModuleSymbol<'a>, SiteError> {
        let all: Vec<_> = self.symbols.named(name).collect();
        let shown = || format!("{}:{name}", self.module.name);
        match (&all[..], position) {
            ([], _) => Err(SiteError::Unknown {
                name: shown(),
                near: Vec::new(),
            }),
            ([only], None) => Ok(*only),
            (_, None) => Err(SiteError::Ambiguous {
                name: shown(),
                count: all.len(),
            }),
            (_, Some(position)) => {
                let index = usize::try_from(position)
                    .ok()
                    .and_then(|p| p.checked_sub(1));
                let found = index.and_then(|index| all.get(index));
                found.copied().ok_or_else(|| SiteError::NoSuchPosition {
                    name: shown(),
                    position,
                    count: all.len(),
                })
            }
        }
    }
}

/// What one stop told of symbols: where the kernel is, and its modules.
#[derive(Debug)]
pub struct Loaded {
    /// What KASLR added to the kernel's addresses.
    pub slide: Slide,
    /// The modules.
    pub modules: Vec<LoadedModule>,
}

/// The symbols of a running guest.
#[derive(Clone, Copy, Debug)]
pub struct GuestSymbols<'a> {
    kernel: &'a Symbols,
    loaded: &'a Loaded,
}

/// A symbol as it is shown.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SymbolInfo {
    /// Run-time address. Of a per-CPU variable the offset in every CPU's area (before 6.15), or the
    /// address to which a CPU's offset is added.
    pub address: Gva,
    /// Its type as /proc/kallsyms has it.
    #[serde(rename = "type")]
    pub kind: char,
    /// Bytes up to the next symbol, or what a module's own table says; absent where neither does.
    pub size: Option<u64>,
    /// Its name.
    pub name: String,
    /// The module that it is in; absent for the kernel itself.
    pub module: Option<String>,
}

/// A place in a symbol.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PlaceInfo {
    /// The symbol.
    pub symbol: SymbolInfo,
    /// Bytes from its start.
    pub offset: u64,
}

impl fmt::Display for PlaceInfo {
    /// As the kernel prints it: `name+0x12/0x80 [module]`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { symbol, offset } = self;
        write!(
            f,
            "{}+{offset:#x}/{:#x}",
            symbol.name,
            symbol.size.unwrap_or(0)
        )?;
        match &symbol.module {
            Some(module) => write!(f, " [{module}]"),
            None => Ok(()),
        }
    }
}

/// Which symbols are asked for.
#[derive(Clone, Debug)]
pub struct SymbolQuery<'q> {
    /// Pattern of the name, with `*`, `?` and `[a-z]`.
    pub pattern: &'q str,
    /// Only of this module; `vmlinux` is the kernel itself.
    pub module: Option<&'q str>,
    /// Matches that are left out at the beginning.
    pub skip: usize,
    /// Matches that are told at the most.
    pub limit: usize,
}

impl<'a> GuestSymbols<'a> {
    /// The symbols of `kernel` and of what is loaded.
    #[must_use]
    pub const fn new(kernel: &'a Symbols, loaded: &'a Loaded) -> Self {
        Self { kernel, loaded }
    }

    /// The symbols that match, in the order of the guest's /proc/kallsyms, and how many more do.
    #[must_use]
    pub fn matching(&self, query: &SymbolQuery<'_>) -> (Vec<SymbolInfo>, usize) {
        let mut found = Vec::new();
        let mut count = 0_usize;
        let mut add = |make: &dyn Fn() -> SymbolInfo| {
            if count >= query.skip && found.len() < query.limit {
                found.push(make());
            }
            count += 1;
        };
        if query.module.is_none_or(|module| module == "vmlinux") {
            for symbol in self.kernel.matching(query.pattern) {
                add(&|| self.kernel_symbol(symbol));
            }
        }
        for loaded in &self.loaded.modules {
            if query.module.is_some_and(|name| name != loaded.module.name) {
                continue;
            }
            let all = loaded.symbols.iter();
            let pattern = query.pattern.as_bytes();
            for symbol in all.filter(|symbol| glob::matches(pattern, symbol.raw_name())) {
                add(&|| module_symbol(symbol, &loaded.module));
            }
        }
        let more = count.saturating_sub(query.skip.saturating_add(found.len()));
        (found, more)
    }

    /// The symbol that covers `at`, as the kernel itself would name the place.
    #[must_use]
    pub fn at(&self, at: Gva) -> Option<PlaceInfo> {
        let containing = |loaded: &&LoadedModule| loaded.module.contains(at);
        if let Some(loaded) = self.loaded.modules.iter().find(containing) {
            return loaded.place(at);
        }
        let place = self.kernel.at(at.linked(self.loaded.slide))?;
        let mut symbol = self.kernel_symbol(place.symbol);
        symbol.size = Some(place.size);
        Some(PlaceInfo {
            symbol,
            offset: place.offset,
        })
    }

    /// The run-time address of a site, `module:symbol` included.
    ///
    /// # Errors
    /// [`SiteError`]: unknown, ambiguous, or beyond the end of the symbol.
    pub fn resolve(&self, site: &Site) -> Result<Gva, SiteError> {
        let (module, name, position, offset) = match site {
            Site::Address(address) => return Ok(*address),
            Site::Symbol {
                module: Some(module),
                name,
                position,
                offset,
            } => (module, name, *position, *offset),
            Site::Symbol { .. } => {
                let link = site.resolve(self.kernel)?;
                let link = link.ok_or_else(|| SiteError::Unknown {
                    name: site.to_string(),
                    near: Vec::new(),
                })?;
                return Ok(link.at(self.loaded.slide));
            }
        };
        let mut loaded = self.loaded.modules.iter();
        let loaded = loaded
            .find(|loaded| loaded.module.name == *module)
            .ok_or_else(|| SiteError::NoModule {
                module: module.clone(),
            })?;
        loaded.resolve(name, position, offset)
    }

    fn kernel_symbol(&self, symbol: Symbol<'_>) -> SymbolInfo {
        let slid = symbol.address().map(|link| link.at(self.loaded.slide));
        SymbolInfo {
            address: slid.unwrap_or(Gva(symbol.value())),
            kind: symbol.kind(),
            size: symbol.size(),
            name: symbol.name(),
            module: None,
        }
    }
}

fn module_symbol(symbol: ModuleSymbol<'_>, module: &Module) -> SymbolInfo {
    SymbolInfo {
        address: symbol.address(),
        kind: symbol.kind(),
        size: Some(symbol.size()).filter(|&size| size > 0),
        name: symbol.name(),
        module: Some(module.name.clone()),
    }
}

/// Bytes to the next symbol or the end of the memory that the symbol is in, which is how the kernel
/// itself reckons (`find_kallsyms_symbol()`).
fn symbol_size(symbol: ModuleSymbol<'_>, module: &Module, all: &ModuleSymbols) -> Option<u64> {
    let at = symbol.address();
    let part = module
        .memory
        .iter()
        .find(|part| part.range().contains(&at))?;
    let (_, next) = all.below(at)?;
    let end = part.range().end;
    let end = next.map_or(end, |next| next.min(end));
    Some(end.distance_from(at))
}

#[cfg(test)]
mod tests {
    use super::super::format::Region;
    use super::super::{Layout, MemoryKind, ModuleMemory, ModuleState, OffsetForm};
    use super::*;
    use crate::synthetic::{Kallsyms, RODATA, TEXT};

    const MODULE: Gva = Gva(0xffff_ffff_c000_0000);
    const SLIDE: Slide = Slide(0x1000_0000);

    fn kernel() -> Symbols {
        let bytes = Kallsyms::example(Layout::B, OffsetForm::PerCpu, 700).write(RODATA);
        Symbols::read(&Region {
            base: RODATA,
            bytes: &bytes,
        })
        .unwrap()
    }

    fn loaded() -> Loaded {
        let rows = [
            ("f", b't', 0x10, 0x20),
            ("twin", b'T', 0x40, 0),
            ("twin", b't', 0x60, 0),
        ];
        let module = Module {
            address: Gva(0),
            name: "mod".into(),
            state: ModuleState::Live,
            memory: vec![ModuleMemory {
                kind: MemoryKind::Text,
                base: MODULE,
                size: 0x80,
            }],
            users: 0,
            taints: 0,
            source_version: None,
            symbols: None,
            exports: None,
            orc: None,
            types: None,
        };
        let rows = rows.map(|(name, kind, at, size)| (name, kind, MODULE.0 + at, size));
        Loaded {
            slide: SLIDE,
            modules: vec![LoadedModule {
                module,
                symbols: ModuleSymbols::of(&rows),
            }],
        }
    }

    #[test]
    fn patterns_find_both_and_are_told_in_pages() {
        let (kernel, loaded) = (kernel(), loaded());
        let symbols = GuestSymbols::new(&kernel, &loaded);
        let ask = |pattern, module, skip, limit| {
            let query = SymbolQuery {
                pattern,
                module,
                skip,
                limit,
            };
            let (found, more) = symbols.matching(&query);
            let names: Vec<_> = found.iter().map(|symbol| symbol.name.clone()).collect();
            (names, more)
        };
        let all = kernel.len() + 3;
        assert_eq!(
            ask("*", None, 0, 2),
            (vec!["__per_cpu_start".into(), "cpu_number".into()], all - 2)
        );
        assert_eq!(ask("*", None, all - 1, 9), (vec!["twin".into()], 0));
        assert_eq!(ask("*", None, all + 7, 9), (vec![], 0));
        assert_eq!(ask("twin", Some("mod"), 0, 1), (vec!["twin".into()], 1));
        assert_eq!(ask("twin", Some("vmlinux"), 0, 1).0.len(), 0);
        let (found, _) = symbols.matching(&SymbolQuery {
            pattern: "cpu_number",
            module: None,
            skip: 0,
            limit: 1,
        });
        // A per-CPU variable is not moved.
        assert_eq!(found[0].address, Gva(0x1000));
    }

    #[test]
    fn places_are_told_as_the_kernel_prints_them() {
        let (kernel, loaded) = (kernel(), loaded());
        let symbols = GuestSymbols::new(&kernel, &loaded);
        let at = |at| symbols.at(at).map(|place| place.to_string());
        let inside = MODULE.offset(0x31);
        assert_eq!(at(inside).as_deref(), Some("f+0x21/0x30 [mod]"));
        assert_eq!(
            at(MODULE.offset(0x7f)).as_deref(),
            Some("twin+0x1f/0x20 [mod]")
        );
        // In front of its first symbol, and behind it.
        assert_eq!(at(MODULE.offset(0x8)), None);
        assert_eq!(at(MODULE.offset(0x80)), None);
        let function = at(TEXT.offset(0x152).at(SLIDE));
        assert_eq!(function.as_deref(), Some("function_1+0x2/0x30"));
        assert_eq!(at(Gva(TEXT.0)), None);
    }

    #[test]
    fn sites_in_modules_are_found() {
        let (kernel, loaded) = (kernel(), loaded());
        let symbols = GuestSymbols::new(&kernel, &loaded);
        let resolve = |text: &str| symbols.resolve(&text.parse().unwrap());
        assert_eq!(resolve("mod:f+0x2f"), Ok(MODULE.offset(0x3f)));
        assert_eq!(resolve("mod:twin@2"), Ok(MODULE.offset(0x60)));
        assert_eq!(resolve("_text"), Ok(TEXT.at(SLIDE)));
        assert_eq!(resolve("0x1234+0x1"), Ok(Gva(0x1235)));
        for (text, refused) in [
            ("mod:f+0x30", "OutsideSymbol"),
            ("mod:twin", "Ambiguous"),
            ("mod:twin@3", "NoSuchPosition"),
            ("mod:g", "Unknown"),
            ("other:f", "NoModule"),
        ] {
            let error = format!("{:?}", resolve(text).unwrap_err());
            assert!(error.starts_with(refused), "{text}: {error}");
        }
    }
}
