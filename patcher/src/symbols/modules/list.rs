//! Walks a guest's list of modules.

use std::collections::{HashMap, HashSet};

use super::layout::{ModulesLayout, Part};
use super::{Array, Module, ModuleMemory, ModuleState, ModulesError, OrcTables, SymbolTable};
use crate::guest::Gva;
use crate::space::{Located, Space, SpaceError};
use crate::types::Field;

/// More modules than any kernel has.
const MAX_MODULES: usize = 1 << 16;
/// A `struct module` larger than this is not believed; it has 1,280 bytes in 7.2.
const MAX_STRUCTURE: usize = 1 << 16;
/// Most bytes of one part of a module: all of the space for modules is less.
const MAX_PART: u64 = 1 << 31;
/// Most entries of a module's table of any kind.
const MAX_ENTRIES: u64 = 1 << 24;
/// Longest name and longest source version that are shown.
const MAX_TEXT: u64 = 64;

impl ModulesLayout {
    /// Every module of a stopped guest, in the order of its list: the last one loaded comes first.
    ///
    /// # Errors
    /// [`ModulesError`]: the list or a module cannot be read to the end, or cannot be.
    pub fn modules(
        &self,
        space: &Space<'_>,
        located: &Located,
    ) -> Result<Vec<Module>, ModulesError> {
        let addresses = self.addresses(space, located)?;
        let types = self.types(space, located)?;
        let read = |&address: &Gva| {
            let module = self.module(space, address)?;
            let types = types.get(&address).copied();
            Ok(Module { types, ..module })
        };
        addresses.iter().map(read).collect()
    }

    /// The first module of a stopped guest that is `wanted`.
    ///
    /// # Errors
    /// As [`ModulesLayout::modules`].
    pub fn find(
        &self,
        space: &Space<'_>,
        located: &Located,
        wanted: &dyn Fn(&Module) -> bool,
    ) -> Result<Option<Module>, ModulesError> {
        for address in self.addresses(space, located)? {
            let module = self.module(space, address)?;
            if wanted(&module) {
                let types = self.types(space, located)?.get(&address).copied();
                return Ok(Some(Module { types, ..module }));
            }
        }
        Ok(None)
    }

    /// The module whose `struct module` is at `address`, without its types; `None` when there is none.
    ///
    /// # Errors
    /// As [`ModulesLayout::modules`].
    pub fn module_at(
        &self,
        space: &Space<'_>,
        located: &Located,
        address: Gva,
    ) -> Result<Option<Module>, ModulesError> {
        let listed = self.addresses(space, located)?.contains(&address);
        listed.then(|| self.module(space, address)).transpose()
    }

    /// The name of a module that is being loaded or removed, if there is one.
    ///
    /// # Errors
    /// As [`ModulesLayout::modules`].
    pub fn unsettled(
        &self,
        space: &Space<'_>,
        located: &Located,
    ) -> Result<Option<String>, ModulesError> {
        for address in self.addresses(space, located)? {
            let at = address.offset(self.state.offset);
            let state = space.read_sized(at, self.state.size);
            if state.map_err(unreadable("module"))? != self.states.live {
                let at = address.offset(self.name.offset);
                return text(space, at, self.name.size.min(MAX_TEXT))
                    .map(Some)
                    .map_err(unreadable("module"));
            }
        }
        Ok(None)
    }

    /// The `struct module` of every module.
    fn addresses(&self, space: &Space<'_>, located: &Located) -> Result<Vec<Gva>, ModulesError> {
        let head = self.head.at(located.slide);
        self.entries(space, "list of modules", head, self.list)
    }

    /// The structures on a list, `member` bytes before their entries.
    fn entries(
        &self,
        space: &Space<'_>,
        what: &'static str,
        head: Gva,
        member: u64,
    ) -> Result<Vec<Gva>, ModulesError> {
        let next = |entry: Gva| {
            let next = space.read_pointer(entry.offset(self.next));
            next.map_err(unreadable(what))
        };
        let limit = MAX_MODULES.min(space.bounds().entries);
        let mut found = Vec::new();
        let mut seen = HashSet::new();
        let mut at = next(head)?;
        while at != head {
            if !seen.insert(at) {
                return Err(ModulesError::Circle { what, at });
            }
            if found.len() == limit {
                return Err(ModulesError::Endless { what, limit });
            }
            found.push(Gva(at.0.wrapping_sub(member)));
            at = next(at)?;
        }
        Ok(found)
    }

    /// Where the types are that modules have beside those of the kernel, by `struct module`.
    fn types(
        &self,
        space: &Space<'_>,
        located: &Located,
    ) -> Result<HashMap<Gva, Array>, ModulesError> {
        const WHAT: &str = "list of modules' types";
        let mut found = HashMap::new();
        let Some(fields) = self.types else {
            return Ok(found);
        };
        let head = fields.head.at(located.slide);
        for entry in self.entries(space, WHAT, head, fields.list)? {
            let pointer = |at: Gva| space.read_pointer(at).map_err(unreadable(WHAT));
            let module = pointer(entry.offset(fields.module))?;
            let btf = pointer(entry.offset(fields.btf))?;
            if btf.0 == 0 {
                continue;
            }
            let size = btf.offset(fields.size.offset);
            let size = space.read_sized(size, fields.size.size);
            let array = Array {
                at: pointer(btf.offset(fields.data))?,
                count: size.map_err(unreadable(WHAT))?,
            };
            found.insert(module, array);
        }
        Ok(found)
    }

    /// The types that a module has beside those of the kernel, as BTF that is split from the
    /// kernel's (`Types::parse_split`); `None` when it has none.
    ///
    /// # Errors
    /// [`ModulesError`]: they cannot be read, or are larger than any module's.
    pub fn type_data(
        &self,
        space: &Space<'_>,
        module: &Module,
    ) -> Result<Option<Vec<u8>>, ModulesError> {
        let Some(types) = module.types else {
            return Ok(None);
        };
        let check = Check {
            module: &module.name,
        };
        let size = check.entries("size of types", types.count)?;
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        space
            .read(types.at, &mut bytes)
            .map_err(unreadable("module's types"))?;
        Ok(Some(bytes))
    }

    fn module(&self, space: &Space<'_>, address: Gva) -> Result<Module, ModulesError> {
        let mut bytes = vec![0; self.size.min(MAX_STRUCTURE)];
        space
            .read(address, &mut bytes)
            .map_err(unreadable("module"))?;
        let record = Record(&bytes);
        let name = record.text(self.name);
        let check = Check { module: &name };
        let state = self.module_state(record.number(self.state));
        let pointer = |field| Gva(record.number(field));
        let orc = self.orc.map(|fields| {
            let count = check.entries("number of ORC entries", record.number(fields.count))?;
            Ok(OrcTables {
                instructions: pointer(fields.instructions),
                entries: pointer(fields.entries),
                count,
            })
        });
        let exports = self.exports.map(|fields| {
            let count = check.entries("number of exports", record.number(fields.count))?;
            let at = pointer(fields.array);
            Ok(Array { at, count })
        });
        let symbols = match self.kallsyms.map(|fields| pointer(fields.pointer)) {
            // Not there yet.
            Some(at) if at.0 != 0 && state != ModuleState::Unformed => {
                Some(self.symbol_table(space, &check, at)?)
            }
            _ => None,
        };
        let source = self.source_version.map(pointer).filter(|at| at.0 != 0);
        let source_version = match source {
            Some(at) if state != ModuleState::Unformed => {
                Some(text(space, at, MAX_TEXT).map_err(unreadable("module"))?)
            }
            _ => None,
        };
        Ok(Module {
            address,
            state,
            memory: self.memory(&record, &check)?,
            users: self.users.map_or(0, |field| record.users(field)),
            taints: self.taints.map_or(0, |field| record.number(field)),
            source_version,
            symbols,
            exports: exports.transpose()?.filter(|array| array.count > 0),
            orc: orc.transpose()?.filter(|tables| tables.count > 0),
            types: None,
            name,
        })
    }

    fn module_state(&self, raw: u64) -> ModuleState {
        let states = self.states;
        match raw {
            _ if raw == states.live => ModuleState::Live,
            _ if raw == states.coming => ModuleState::Coming,
            _ if raw == states.going => ModuleState::Going,
            _ if raw == states.unformed => ModuleState::Unformed,
            other => ModuleState::Unknown(other),
        }
    }

    fn memory(
        &self,
        record: &Record<'_>,
        check: &Check<'_>,
    ) -> Result<Vec<ModuleMemory>, ModulesError> {
        let mut memory: Vec<ModuleMemory> = Vec::new();
        for &Part {
            kind,
            base,
            start,
            end,
        } in &self.memory
        {
            let (base, end) = (Gva(record.number(base)), record.number(end));
            let start = start.map_or(0, |field| record.number(field));
            if end <= start {
                continue;
            }
            if end > MAX_PART || base.0.checked_add(end).is_none() {
                return Err(check.wrong("size", end));
            }
            memory.push(ModuleMemory {
                kind,
                base: base.offset(start),
                size: end - start,
            });
        }
        Ok(memory)
    }

    fn symbol_table(
        &self,
        space: &Space<'_>,
        check: &Check<'_>,
        at: Gva,
    ) -> Result<SymbolTable, ModulesError> {
        let Some(fields) = self.kallsyms else {
            return Err(check.wrong("symbol table", at.0));
        };
        let mut bytes = vec![0; fields.size.min(MAX_STRUCTURE)];
        space
            .read(at, &mut bytes)
            .map_err(unreadable("module's symbol table"))?;
        let record = Record(&bytes);
        Ok(SymbolTable {
            symbols: Gva(record.number(fields.symbols)),
            strings: Gva(record.number(fields.strings)),
            kinds: Gva(record.number(fields.kinds)),
            count: check.entries("number of symbols", record.number(fields.count))?,
        })
    }
}

/// The bytes of a structure of the guest's.
pub(super) struct Record<'a>(pub(super) &'a [u8]);

impl Record<'_> {
    /// A little-endian number; 0 where the structure is shorter than its type says.
    pub(super) fn number(&self, field: Field) -> u64 {
        let mut raw = [0; 8];
        let bytes = self.part(field);
        for (to, from) in raw.iter_mut().zip(bytes) {
            *to = *from;
        }
        u64::from_le_bytes(raw)
    }

    /// A signed number of 32 bits.
    pub(super) fn signed(&self, field: Field) -> i64 {
        let [a, b, c, d, ..] = self.number(field).to_le_bytes();
        i32::from_le_bytes([a, b, c, d]).into()
    }

    fn part(&self, field: Field) -> &[u8] {
        let start = usize::try_from(field.offset).unwrap_or(usize::MAX);
        let size = usize::try_from(field.size).unwrap_or(usize::MAX);
        let end = start.saturating_add(size);
        self.0.get(start..end).unwrap_or_default()
    }

    fn text(&self, field: Field) -> String {
        until_nul(self.part(field))
    }

    /// `module_refcount()`: one reference is the module's own (MODULE_REF_BASE).
    fn users(&self, field: Field) -> i64 {
        self.signed(field) - 1
    }
}

/// Errors about one module.
pub(super) struct Check<'a> {
    pub(super) module: &'a str,
}

impl Check<'_> {
    pub(super) fn wrong(&self, what: &'static str, value: u64) -> ModulesError {
        ModulesError::Unbelievable {
            module: self.module.to_owned(),
            what,
            value,
        }
    }

    fn entries(&self, what: &'static str, count: u64) -> Result<u64, ModulesError> {
        if count > MAX_ENTRIES {
            return Err(self.wrong(what, count));
        }
        Ok(count)
    }
}

pub(super) fn unreadable(what: &'static str) -> impl FnOnce(SpaceError) -> ModulesError {
    move |source| ModulesError::Unreadable { what, source }
}

/// A text of at most `most` bytes that ends with NUL, at whichever page it may end.
pub(super) fn text(space: &Space<'_>, at: Gva, most: u64) -> Result<String, SpaceError> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < most {
        let now = at.offset(bytes.len() as u64);
        // Not across a page's end before it is known that the text goes on there.
        let left = (0x1000 - (now.0 & 0xfff)).min(most - bytes.len() as u64);
        let mut piece = vec![0; usize::try_from(left).unwrap_or(0)];
        space.read(now, &mut piece)?;
        let end = memchr::memchr(0, &piece);
        bytes.extend_from_slice(piece.get(..end.unwrap_or(piece.len())).unwrap_or_default());
        if end.is_some() {
            break;
        }
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn until_nul(bytes: &[u8]) -> String {
    let end = memchr::memchr(0, bytes).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}
