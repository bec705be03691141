//! Changes in modules, which are gone with them.
//!
//! A guest that removes a module frees its text, and may soon have something else there. So whether a
//! module is still where it was is looked up at the beginning of each stop, before anything is written;
//! what was in one that is not there any more is forgotten, and its code in the arena retired.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::module_text::ModuleText;
use super::report::{Applied, Origin};
use super::{EntryId, Patcher};
use crate::guest::StoppedGuest;
use crate::space::{Located, Space};

/// What is gone with a module.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Unloaded {
    /// Which module it was, and what has become of it.
    pub why: String,
    /// Changes that were in it, and probes.
    pub changes: Vec<EntryId>,
}

/// The changes that are in modules, and those that were and nobody has been told of.
#[derive(Debug, Default)]
pub(super) struct InModules {
    texts: BTreeMap<EntryId, Arc<ModuleText>>,
    unloaded: Vec<Unloaded>,
}

impl InModules {
    pub(super) fn clear(&mut self) {
        self.texts.clear();
    }
}

impl Patcher {
    /// Takes note of a change that was made.
    pub(super) fn add(&mut self, entry: Applied, module: Option<Arc<ModuleText>>) {
        if let Some(module) = module {
            self.in_modules.texts.insert(entry.id, module);
        }
        self.ledger.add(entry);
    }

    /// The module that a change is in.
    pub(super) fn module_of(&self, id: EntryId) -> Option<Arc<ModuleText>> {
        self.in_modules.texts.get(&id).cloned()
    }

    /// A module is where it was, as far as can be told; the kernel itself always is.
    pub(super) fn is_loaded(
        &self,
        guest: &dyn StoppedGuest,
        found: &Located,
        module: Option<&ModuleText>,
    ) -> bool {
        let space = found.space(&guest);
        let there = module.map(|text| text.is_there(&self.know, &space, found));
        there.is_none_or(|there| there == Ok(true))
    }

    /// What was found to be gone with modules since this was asked last.
    pub fn take_unloaded(&mut self) -> Vec<Unloaded> {
        std::mem::take(&mut self.in_modules.unloaded)
    }

    /// Forgets what was in modules that are not there any more. Nothing is written to the guest but
    /// to the arena.
    pub(super) fn notice_unloaded(&mut self, guest: &mut dyn StoppedGuest, found: &Located) {
        let ledger = &self.ledger;
        let texts = &mut self.in_modules.texts;
        texts.retain(|id, _| ledger.get(*id).is_some());
        if texts.is_empty() {
            return;
        }
        let mut gone: Vec<(EntryId, String)> = Vec::new();
        {
            let memory = &&*guest;
            let space = found.space(memory);
            let mut verdicts: Vec<(Arc<ModuleText>, bool)> = Vec::new();
            for (id, text) in texts.iter() {
                let known = verdicts.iter().find(|(other, _)| Arc::ptr_eq(other, text));
                let there = match known {
                    Some((_, there)) => *there,
                    None => {
                        // What cannot be told is taken for what it was: then nothing can be written.
                        let there = text.is_there(&self.know, &space, found).unwrap_or(true);
                        verdicts.push((text.clone(), there));
                        there
                    }
                };
                let fresh = || {
                    let entry = ledger.get(*id);
                    entry.is_some_and(|entry| is_as_before(&space, entry))
                };
                let why = match there {
                    false => "was removed",
                    true if fresh() => "was loaded again",
                    true => continue,
                };
                gone.push((*id, format!("module {} {why}", text.name())));
            }
        }
        for (id, why) in gone {
            self.in_modules.texts.remove(&id);
            let changes = self.lose(guest, id, &why);
            let unloaded = &mut self.in_modules.unloaded;
            match unloaded.iter_mut().find(|known| known.why == why) {
                Some(known) => known.changes.extend(changes),
                None => unloaded.push(Unloaded { why, changes }),
            }
        }
    }

    /// Forgets a change whose place is gone. Tells the numbers of everything that went with it.
    fn lose(&mut self, guest: &mut dyn StoppedGuest, id: EntryId, why: &str) -> Vec<EntryId> {
        let mut ids = self.probes_of(id);
        if !ids.contains(&id) {
            ids.insert(0, id);
        }
        // Whoever is in a function that it was at the return of returns without it.
        let _ = self.set_out(guest, id, None, true);
        if let Some(entry) = self.ledger.lose(id, why) {
            let origin = Origin {
                who: why.to_owned(),
                ..entry.origin.clone()
            };
            self.leave(&entry, id, &origin);
        }
        ids
    }
}

/// The bytes at the place of a change are those that were there before it.
fn is_as_before(space: &Space<'_>, entry: &Applied) -> bool {
    let mut found = vec![0; entry.before.0.len()];
    !found.is_empty() && space.read(entry.address, &mut found).is_ok() && found == entry.before.0
}
