//! Places in the text of a module that the guest rewrites by itself, counts on, or keeps probes out of.
//!
//! What the kernel's file tells of the kernel ([`super::tables`], [`super::regions`]), `struct module`
//! tells of a module. All of it stays as long as the module.

use std::ops::Range;

use super::tables::{DISTANCE, Leader, Rewriter, first_overlap, inside, places};
use crate::Kernel;
use crate::guest::Gva;
use crate::space::{Space, SpaceError};
use crate::text::decode::{MAX_INSTRUCTION, instruction_len};
use crate::types::{Field, Types};

/// More entries than any module's table has.
const MAX_ENTRIES: u64 = 1 << 18;

/// Where `struct module` tells of its text. A kernel may lack any of it.
#[derive(Clone, Debug)]
pub struct ModuleTables {
    tables: Vec<Table>,
    forbidden: Vec<(&'static str, Array)>,
    blacklist: Option<Array>,
}

/// Members of `struct module`: where something begins, and how long it is.
#[derive(Clone, Copy, Debug)]
struct Array {
    start: u64,
    len: Field,
}

#[derive(Clone, Copy, Debug)]
struct Table {
    array: Array,
    /// Bytes of an entry.
    entry: u64,
    rewriter: Rewriter,
    /// Offset of the distance to where the module goes on by itself.
    leads: Option<(u64, Leader)>,
}

/// What there is in the text of one module.
#[derive(Clone, Debug, Default)]
pub struct ModuleSites {
    sites: Vec<(u64, Rewriter)>,
    /// Where it goes on by itself.
    leads: Vec<(u64, Leader)>,
    forbidden: Vec<(&'static str, Range<Gva>)>,
    blacklist: Vec<Gva>,
}

impl ModuleTables {
    /// Looks them up in the kernel's types.
    #[must_use]
    pub fn of(kernel: &Kernel) -> Self {
        let types = kernel.types();
        let tables = [
            (
                "jump_entries",
                "num_jump_entries",
                ("jump_entry", Some(("target", Leader::JumpLabel))),
                Rewriter::JumpLabel,
            ),
            (
                "static_call_sites",
                "num_static_call_sites",
                ("static_call_site", None),
                Rewriter::StaticCall,
            ),
            (
                "extable",
                "num_exentries",
                ("exception_table_entry", Some(("fixup", Leader::Fault))),
                Rewriter::Fixup,
            ),
            ("bug_table", "num_bugs", ("bug_entry", None), Rewriter::Bug),
        ];
        let forbidden = [
            ("noinstr text", "noinstr_text_start", "noinstr_text_size"),
            ("kprobes text", "kprobes_text_start", "kprobes_text_size"),
        ];
        Self {
            tables: tables
                .into_iter()
                .filter_map(|(start, len, (entry, leads), rewriter)| {
                    let member = |(member, leader)| {
                        let member = types.field(entry, member);
                        member.map(|member| (member.offset, leader))
                    };
                    Some(Table {
                        array: array(types, start, len)?,
                        entry: types.size_of(entry).ok().filter(|&size| size >= DISTANCE)?,
                        rewriter,
                        leads: leads.map(member).transpose().ok()?,
                    })
                })
                .collect(),
            forbidden: forbidden
                .into_iter()
                .filter_map(|(what, start, len)| Some((what, array(types, start, len)?)))
                .collect(),
            blacklist: array(types, "kprobe_blacklist", "num_kprobe_blacklist"),
        }
    }

    /// What `struct module` at `module` tells of its text.
    ///
    /// # Errors
    /// [`SpaceError`] when it, or one of its tables, cannot be read.
    pub fn read(&self, space: &Space<'_>, module: Gva) -> Result<ModuleSites, SpaceError> {
        let extent = |array: &Array| {
            let start = space.read_pointer(module.offset(array.start))?;
            let len = space.read_sized(module.offset(array.len.offset), array.len.size)?;
            Ok::<_, SpaceError>((start, len))
        };
        let bytes = |start: Gva, count: u64, entry: u64| {
            let len = count.min(MAX_ENTRIES).saturating_mul(entry);
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            space.read(start, &mut bytes).map(|()| bytes)
        };
        let mut found = ModuleSites::default();
        for table in &self.tables {
            let (start, count) = extent(&table.array)?;
            let bytes = bytes(start, count, table.entry)?;
            let at = places(start.0, &bytes, table.entry, 0);
            found.sites.extend(at.map(|at| (at, table.rewriter)));
            if let Some((member, leader)) = table.leads {
                let at = places(start.0, &bytes, table.entry, member);
                found.leads.extend(at.map(|at| (at, leader)));
            }
        }
        found.sites.sort_by_key(|&(at, _)| at);
        found.leads.sort_by_key(|&(at, _)| at);
        for (what, array) in &self.forbidden {
            let (start, len) = extent(array)?;
            found.forbidden.push((what, start..start.offset(len)));
        }
        if let Some(array) = &self.blacklist {
            let (start, count) = extent(array)?;
            let raw = bytes(start, count, size_of::<u64>() as u64)?;
            let entries = raw.chunks_exact(size_of::<u64>());
            let entries = entries.filter_map(|raw| raw.try_into().ok());
            found
                .blacklist
                .extend(entries.map(|raw| Gva(u64::from_le_bytes(raw))));
        }
        Ok(found)
    }
}

impl ModuleSites {
    /// The first place that the guest rewrites or counts on among `len` bytes at `at`. Switching it
    /// does not change how long its instruction is, so the guest's memory tells.
    #[must_use]
    pub fn overlap(&self, space: &Space<'_>, at: Gva, len: u64) -> Option<(Gva, Rewriter)> {
        let size = |site: u64| {
            let mut code = [0; MAX_INSTRUCTION];
            let read = space.read(Gva(site), &mut code);
            read.ok().and_then(|()| instruction_len(&code))
        };
        let (site, rewriter) = first_overlap(&self.sites, at.0, len, size)?;
        Some((Gva(site), rewriter))
    }

    /// Where the module goes on by itself in `bytes`, but for the first of them: no jump need be in the
    /// text that leads there.
    pub fn leads_into(&self, bytes: &Range<Gva>) -> impl Iterator<Item = (Gva, Leader)> {
        let all = inside(&self.leads, bytes.start.0, bytes.end.0);
        all.map(|(to, leader)| (Gva(to), leader))
    }

    /// What part of the text that probes are kept out of `bytes` touch: by section, or as the
    /// `function` that they are in.
    #[must_use]
    pub fn forbidden(&self, bytes: &Range<Gva>, function: &Range<Gva>) -> Option<&'static str> {
        let touches = |range: &Range<Gva>| bytes.start < range.end && range.start < bytes.end;
        let mut sections = self.forbidden.iter();
        let section = sections.find(|(_, range)| touches(range));
        let listed = || self.blacklist.iter().any(|at| function.contains(at));
        match section {
            Some((what, _)) => Some(what),
            None => listed().then_some("a function that the kernel itself keeps probes out of"),
        }
    }
}

fn array(types: &Types, start: &str, len: &str) -> Option<Array> {
    Some(Array {
        start: types.field("module", start).ok()?.offset,
        len: types.field("module", len).ok()?,
    })
}
