//! Which code an address is in, and how to get from its frame to the one below.

use std::cell::OnceCell;
use std::ops::Range;

use super::Why;
use super::layout::{BpfLayout, StackLayout, TrampolineLayout};
use super::orc::{OrcTable, Rule};
use crate::guest::{Gva, LinkAddr};
use crate::space::{Located, Space, SpaceError};
use crate::symbols::{Module, ModuleSymbols, ModulesLayout};

/// Trampolines of ftrace and programs of BPF that are looked at; what comes behind is unknown code.
const MAX_LISTED: usize = 1 << 14;
/// Entries of one module's table. The largest of Debian's modules has a tenth of that.
const MAX_ENTRIES: u64 = 1 << 18;
/// Longest name of a BPF program that is shown.
const MAX_NAME: u64 = 64;

/// Code that is not the guest's own and that is known to keep frame pointers: in each of its
/// functions, wherever it calls another one, BP points to the caller's BP and the return address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GeneratedCode {
    /// Where it is.
    pub range: Range<Gva>,
    /// What it is called in a trace.
    pub name: String,
}

/// Code that the guest's kernel has beside its own text and that is not modules'.
#[derive(Default, Debug)]
struct Generated {
    trampolines: Vec<Trampoline>,
    programs: Vec<Program>,
}

/// A copy of one of ftrace's own trampolines.
#[derive(Debug)]
struct Trampoline {
    range: Range<u64>,
    copied_from: LinkAddr,
}

/// What BPF's compiler made.
#[derive(Debug)]
struct Program {
    range: Range<u64>,
    name: String,
    /// Where the frame pointer is set up, when the kernel says so.
    frame_pointer: Option<Range<u64>>,
}

struct Loaded {
    module: Module,
    table: OnceCell<Option<OrcTable>>,
    symbols: OnceCell<Option<ModuleSymbols>>,
}

/// All code of one stopped guest.
pub(super) struct Code<'a, 'm> {
    space: &'a Space<'m>,
    located: &'a Located,
    layout: &'a StackLayout,
    table: Option<&'a OrcTable>,
    modules: Vec<Loaded>,
    modules_layout: Option<&'a ModulesLayout>,
    ours: Vec<GeneratedCode>,
    generated: OnceCell<Generated>,
}

/// What is known of the frame of an address.
pub(super) struct Found {
    pub(super) rule: Rule,
    /// Why the rule is only a guess.
    pub(super) doubt: Option<Why>,
}

impl<'a, 'm> Code<'a, 'm> {
    pub(super) fn new(
        space: &'a Space<'m>,
        located: &'a Located,
        layout: &'a StackLayout,
        table: Option<&'a OrcTable>,
    ) -> Self {
        Self {
            space,
            located,
            layout,
            table,
            modules: Vec::new(),
            modules_layout: None,
            ours: Vec::new(),
            generated: OnceCell::new(),
        }
    }

    /// `layout` is needed for the names of their functions only.
    pub(super) fn add_modules(
        &mut self,
        layout: Option<&'a ModulesLayout>,
        modules: impl IntoIterator<Item = Module>,
    ) {
        self.modules_layout = layout;
        self.modules
            .extend(modules.into_iter().map(|module| Loaded {
                module,
                table: OnceCell::new(),
                symbols: OnceCell::new(),
            }));
    }

    pub(super) fn add_ours(&mut self, ours: impl IntoIterator<Item = GeneratedCode>) {
        self.ours.extend(ours);
    }

    /// The rule for a frame that goes on at `ip`. A return address is one behind its call, and what
    /// follows a call that does not return may be another function: then what counts is the call.
    pub(super) fn find(&self, ip: u64, interrupted: bool) -> Result<Found, Why> {
        let at = if interrupted { ip } else { ip.wrapping_sub(1) };
        let known = |rule: Option<Rule>| match rule {
            Some(rule) => Ok(Found { rule, doubt: None }),
            None => Err(Why::Undefined { at: Gva(ip) }),
        };
        let guess = |why: fn(Gva) -> Why| {
            Ok(Found {
                rule: Rule::FRAME_POINTER,
                doubt: Some(why(Gva(ip))),
            })
        };
        if at == 0 {
            return Ok(Found {
                rule: Rule::NULL_CALL,
                doubt: Some(Why::UnknownCode { at: Gva(ip) }),
            });
        }
        let link = Gva(at).linked(self.located.slide);
        if self.is_kernel_text(link) {
            return known(self.table.and_then(|table| table.find(link.0)));
        }
        if let Some(module) = self.module(Gva(at)) {
            return match self.table_of(module) {
                Some(table) => known(table.find(at)),
                None => guess(|at| Why::NoModuleTables { at }),
            };
        }
        if self.ours.iter().any(|code| code.range.contains(&Gva(at))) {
            // Before and after the frame is set up, BP is still the caller's.
            return match interrupted {
                true => guess(|at| Why::GeneratedCode { at }),
                false => known(Some(Rule::FRAME_POINTER)),
            };
        }
        let generated = self.generated();
        let trampoline = generated.trampolines.iter();
        if let Some(copy) = trampoline.clone().find(|copy| copy.range.contains(&at)) {
            let original = copy.copied_from.offset(at - copy.range.start);
            return known(self.table.and_then(|table| table.find(original.0)));
        }
        if let Some(program) = program(generated, at) {
            let set_up = program.frame_pointer.as_ref();
            return match set_up.is_some_and(|range| range.contains(&at)) {
                true => known(Some(Rule::FRAME_POINTER)),
                false => guess(|at| Why::GeneratedCode { at }),
            };
        }
        guess(|at| Why::UnknownCode { at })
    }

    fn is_kernel_text(&self, at: LinkAddr) -> bool {
        let init = self.layout.init_text.as_ref();
        self.layout.text.contains(&at) || init.is_some_and(|text| text.contains(&at))
    }

    fn module(&self, at: Gva) -> Option<&Loaded> {
        let mut all = self.modules.iter();
        all.find(|loaded| loaded.module.text().any(|text| text.contains(&at)))
    }

    /// The table of a module, read when the first frame needs it.
    fn table_of<'s>(&self, loaded: &'s Loaded) -> Option<&'s OrcTable> {
        let read = || {
            let tables = loaded.module.orc?;
            let count = usize::try_from(tables.count.min(MAX_ENTRIES)).ok()?;
            let (mut addresses, mut entries) = (vec![0; 4 * count], vec![0; 6 * count]);
            self.space.read(tables.instructions, &mut addresses).ok()?;
            self.space.read(tables.entries, &mut entries).ok()?;
            let format = self.table?.format();
            let slots = tables.instructions.0;
            OrcTable::new(format, slots, &addresses, &entries).ok()
        };
        let table = loaded.table.get_or_init(read).as_ref();
        table.filter(|table| !table.is_empty())
    }

    /// Function, offset and size in a module, as the kernel prints them.
    fn name_in(&self, loaded: &Loaded, at: Gva, back: u64) -> Option<String> {
        let module = &loaded.module;
        let part = module.text().find(|text| text.contains(&at))?;
        let symbols = loaded
            .symbols
            .get_or_init(|| self.modules_layout?.symbols(self.space, module).ok());
        let function = symbols.as_ref().and_then(|symbols| symbols.below(at));
        let inside = function.filter(|(symbol, _)| symbol.address() >= part.start);
        let Some((symbol, next)) = inside else {
            let offset = at.distance_from(part.start) + back;
            return Some(format!("[{}]+{offset:#x}", module.name));
        };
        let start = symbol.address();
        let end = next.unwrap_or(part.end).min(part.end);
        let (offset, size) = (at.distance_from(start) + back, end.distance_from(start));
        Some(format!(
            "{}+{offset:#x}/{size:#x} [{}]",
            symbol.name(),
            module.name
        ))
    }

    /// A list that cannot be read to its end is used as far as it goes: code that is missing in it
    /// is unknown.
    fn generated(&self) -> &Generated {
        self.generated.get_or_init(|| {
            let mut generated = Generated::default();
            if let Some(layout) = &self.layout.trampolines {
                let _ = self.trampolines(layout, &mut generated.trampolines);
            }
            if let Some(layout) = &self.layout.bpf {
                let _ = self.programs(layout, &mut generated.programs);
            }
            generated
        })
    }

    fn trampolines(
        &self,
        layout: &TrampolineLayout,
        into: &mut Vec<Trampoline>,
    ) -> Result<(), SpaceError> {
        let slide = self.located.slide;
        let space = self.space;
        let end = layout.end.map(|end| end.at(slide));
        let mut ops = space.read_pointer(layout.first.at(slide))?;
        for _ in 0..MAX_LISTED {
            if ops.0 == 0 || Some(ops) == end {
                break;
            }
            let start = space.read_u64(ops.offset(layout.start))?;
            let size = space.read_u64(ops.offset(layout.size))?;
            let flags = space.read_sized(ops.offset(layout.flags.offset), layout.flags.size)?;
            if start != 0 && size != 0 {
                into.push(Trampoline {
                    range: start..start.saturating_add(size),
                    copied_from: match flags & layout.with_regs {
                        0 => layout.plain,
                        _ => layout.regs,
                    },
                });
            }
            ops = space.read_pointer(ops.offset(layout.next))?;
        }
        Ok(())
    }

    fn programs(&self, layout: &BpfLayout, into: &mut Vec<Program>) -> Result<(), SpaceError> {
        let space = self.space;
        let head = layout.list.at(self.located.slide);
        let mut node = space.read_pointer(head)?;
        let mut name = vec![0; usize::try_from(layout.name.size.min(MAX_NAME)).unwrap_or(0)];
        for _ in 0..MAX_LISTED {
            if node == head || node.0 == 0 {
                break;
            }
            let base = Gva(node.0.wrapping_sub(layout.node));
            let start = space.read_u64(base.offset(layout.start))?;
            let end = space.read_u64(base.offset(layout.end))?;
            space.read(base.offset(layout.name.offset), &mut name)?;
            let len = name.iter().position(|&byte| byte == 0);
            let shown = name.get(..len.unwrap_or(name.len())).unwrap_or_default();
            let mut frame_pointer = None;
            if let Some((from, to)) = &layout.frame_pointer {
                let read = |field: &crate::types::Field| {
                    space.read_sized(base.offset(field.offset), field.size)
                };
                let (from, to) = (read(from)?, read(to)?);
                frame_pointer = Some(start.saturating_add(from)..start.saturating_add(to));
            }
            into.push(Program {
                range: start..end,
                name: String::from_utf8_lossy(shown).into_owned(),
                frame_pointer,
            });
            node = space.read_pointer(node)?;
        }
        Ok(())
    }

    /// What code that is not in the kernel's symbols is called, and how far into it `at` and `back`
    /// bytes more are.
    pub(super) fn name(&self, at: Gva, back: u64) -> Option<String> {
        if let Some(loaded) = self.module(at) {
            return self.name_in(loaded, at, back);
        }
        let told = |name: &str, start: u64| {
            let offset = at.0.wrapping_sub(start).wrapping_add(back);
            Some(format!("{name}+{offset:#x}"))
        };
        if let Some(code) = self.ours.iter().find(|code| code.range.contains(&at)) {
            return told(&format!("[stillpoint {}]", code.name), code.range.start.0);
        }
        let generated = self.generated();
        let mut trampolines = generated.trampolines.iter();
        if let Some(copy) = trampolines.find(|copy| copy.range.contains(&at.0)) {
            return told("[ftrace trampoline]", copy.range.start);
        }
        let program = program(generated, at.0)?;
        told(&format!("[bpf {}]", program.name), program.range.start)
    }
}

fn program(generated: &Generated, at: u64) -> Option<&Program> {
    let mut programs = generated.programs.iter();
    programs.find(|program| program.range.contains(&at))
}
