//! The text of loaded modules: read from the guest when a site is in one, and kept for as long as the
//! module is there.

use std::fmt::Display;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::PatchError;
use super::check::Check;
use super::function::Function;
use super::knowledge::Knowledge;
use crate::guest::Gva;
use crate::space::{Located, Space};
use crate::symbols::{LoadedModule, MemoryKind, Module, ModuleMemory, SiteError};
use crate::text::{ModuleSites, RegionError};
use crate::types::Types;

/// Texts that are kept though nothing of ours is in them.
const KEPT: usize = 16;

/// The text of a module.
#[derive(Debug)]
pub(super) struct ModuleText {
    loaded: LoadedModule,
    sites: ModuleSites,
    /// Its types, once somebody has asked.
    types: OnceLock<Result<Types, String>>,
}

/// The texts that were read, the latest last.
#[derive(Debug, Default)]
pub(super) struct ModuleTexts(Mutex<Vec<Arc<ModuleText>>>);

impl ModuleTexts {
    /// Those that were read.
    fn known(&self) -> Vec<Arc<ModuleText>> {
        let texts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        texts.clone()
    }

    fn keep(&self, text: Arc<ModuleText>) {
        let mut texts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if texts.len() >= KEPT {
            texts.remove(0);
        }
        texts.push(text);
    }
}

impl ModuleText {
    fn read(know: &Knowledge, space: &Space<'_>, module: Module) -> Result<Self, PatchError> {
        let symbols = match &know.modules {
            Some(layout) => layout.symbols(space, &module)?,
            None => {
                return Err(SiteError::NoModule {
                    module: module.name,
                }
                .into());
            }
        };
        Ok(Self {
            sites: know.module_tables.read(space, module.address)?,
            loaded: LoadedModule { module, symbols },
            types: OnceLock::new(),
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.loaded.module.name
    }

    pub(super) const fn sites(&self) -> &ModuleSites {
        &self.sites
    }

    /// This is the module, and it is where it was.
    fn is(&self, module: &Module) -> bool {
        let own = &self.loaded.module;
        own.address == module.address
            && own.name == module.name
            && own.source_version == module.source_version
            && own.symbols == module.symbols
            && texts(own).eq(texts(module))
    }

    pub(super) fn resolve(
        &self,
        name: &str,
        position: Option<u32>,
        offset: u64,
    ) -> Result<Gva, SiteError> {
        self.loaded.resolve(name, position, offset)
    }

    /// The function that `at` is in.
    pub(super) fn function(self: &Arc<Self>, at: Gva) -> Option<Function> {
        let mut all = texts(&self.loaded.module);
        all.find(|range| range.contains(&at))?;
        let place = self.loaded.place(at)?;
        Some(Function {
            start: place.symbol.address,
            size: place.symbol.size?,
            name: place.symbol.name,
            module: Some(self.clone()),
        })
    }

    /// Functions of a name.
    pub(super) fn named<'a>(self: &'a Arc<Self>, name: &'a str) -> impl Iterator<Item = Function> {
        let named = self.loaded.symbols.named(name);
        named.filter_map(|symbol| self.function(symbol.address()))
    }

    /// How many functions have a name.
    pub(super) fn functions(&self, name: &str) -> usize {
        let named = self.loaded.symbols.named(name);
        named.filter(|symbol| symbol.is_function()).count()
    }

    /// The function that `at` is in, when `len` bytes of its text may be changed there, in a guest that
    /// neither loads nor removes a module. Errors call the place `site`.
    pub(super) fn check(
        self: &Arc<Self>,
        at: Gva,
        len: u64,
        site: &dyn Display,
    ) -> Result<Function, PatchError> {
        let module = &self.loaded.module;
        let bytes = at..at.offset(len);
        let mut all = texts(module);
        let inside = all.any(|range| range.contains(&at) && bytes.end <= range.end);
        let not_text = || RegionError::NotText {
            site: site.to_string(),
            inside: Some(format!("module {}", module.name)),
        };
        let function = self.function(at).filter(|_| inside).ok_or_else(not_text)?;
        let whole = function.start..function.end();
        match self.sites.forbidden(&bytes, &whole) {
            None => Ok(function),
            Some(what) => Err(RegionError::Forbidden {
                site: site.to_string(),
                what: format!("module {}: {what}", module.name),
            }
            .into()),
        }
    }

    /// Its types on top of the kernel's. Parsed when first asked for.
    pub(super) fn types(&self, know: &Knowledge, space: &Space<'_>) -> Result<&Types, String> {
        let parse = || {
            let layout = know.modules.as_ref().ok_or("there are no modules")?;
            let data = layout.type_data(space, &self.loaded.module);
            let data = data.map_err(|error| error.to_string())?;
            let data = data.ok_or_else(|| format!("module {} has no types", self.name()))?;
            let parsed = Types::parse_split(&data, know.kernel.shared_types());
            parsed.map_err(|error| error.to_string())
        };
        self.types.get_or_init(parse).as_ref().map_err(Clone::clone)
    }

    /// Whether the module is still in the guest, where it was.
    pub(super) fn is_there(
        &self,
        know: &Knowledge,
        space: &Space<'_>,
        located: &Located,
    ) -> Result<bool, PatchError> {
        let Some(layout) = &know.modules else {
            return Ok(false);
        };
        let module = layout.module_at(space, located, self.loaded.module.address)?;
        Ok(module.is_some_and(|module| self.is(&module)))
    }
}

/// Where the functions are that stay with a module.
fn texts(module: &Module) -> impl Iterator<Item = Range<Gva>> + '_ {
    let text = |part: &&ModuleMemory| part.kind == MemoryKind::Text;
    module.memory.iter().filter(text).map(ModuleMemory::range)
}

impl Check<'_> {
    /// The text of the module that `at` is in, if it is in one.
    pub(super) fn module_at(&self, at: Gva) -> Result<Option<Arc<ModuleText>>, PatchError> {
        self.module(&|module| module.contains(at))
    }

    /// The text of the module of that name.
    pub(super) fn module_named(&self, name: &str) -> Result<Option<Arc<ModuleText>>, PatchError> {
        self.module(&|module| module.name == name)
    }

    fn module(
        &self,
        wanted: &dyn Fn(&Module) -> bool,
    ) -> Result<Option<Arc<ModuleText>>, PatchError> {
        let Some(layout) = &self.know.modules else {
            return Ok(None);
        };
        let space = self.located.space(&self.guest);
        let known = self.modules.known().into_iter().rev();
        for text in known.filter(|text| wanted(&text.loaded.module)) {
            if text.is_there(self.know, &space, self.located)? {
                return Ok(Some(text));
            }
        }
        let Some(module) = layout.find(&space, self.located, wanted)? else {
            return Ok(None);
        };
        let text = Arc::new(ModuleText::read(self.know, &space, module)?);
        self.modules.keep(text.clone());
        Ok(Some(text))
    }
}
