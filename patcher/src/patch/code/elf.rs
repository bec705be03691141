//! Reading a relocatable x86-64 ELF object.
//!
//! Executable sections come first in the code part, read-only data behind them; writable sections
//! go to the data part. Sections that only describe code to the kernel's own loader, and that code
//! can do without, are left out ([`IGNORED`]); sections that mean something to the running kernel
//! are refused ([`REFUSED`]).

use std::collections::HashMap;

use object::elf::{
    EM_X86_64, R_X86_64_32, R_X86_64_32S, R_X86_64_64, R_X86_64_NONE, R_X86_64_PC32, R_X86_64_PC64,
    R_X86_64_PLT32, SHF_ALLOC, SHF_EXECINSTR, SHF_TLS, SHF_WRITE, SHT_NOBITS,
};
use object::read::elf::{ElfFile64, ElfSection64, SectionHeader};
use object::{
    LittleEndian, Object as _, ObjectKind, ObjectSection as _, ObjectSymbol as _, RelocationFlags,
    RelocationTarget, SectionIndex, SymbolKind, SymbolSection,
};

use super::{Code, Fixup, Function, Part, Resolved, Target, Width};
use crate::probe::Needs;
use crate::text::NOP5;

/// Most bytes that one object may put into either block.
pub(super) const MAX_CODE: usize = 1 << 20;
const MAX_ALIGN: u64 = 4096;
const MAX_RELOCATIONS: usize = 1 << 17;

/// Where a callback says what it needs (include/stillpoint.h): a version and flags.
const DECLARATION: &str = ".stillpoint";
const DECLARATION_VERSION: u32 = 1;

/// A section whose absence changes nothing for code that runs in the arena.
const IGNORED: &[&str] = &[
    DECLARATION,
    ".eh_frame",
    ".orc_unwind",
    ".orc_unwind_ip",
    ".orc_header",
    ".call_sites",
    ".return_sites",
    ".retpoline_sites",
    ".cfi_sites",
    ".ibt_endbr_seal",
    "__mcount_loc",
    "__patchable_function_entries",
    ".smp_locks",
    ".modinfo",
];

/// A section that the guest's kernel itself would have to read, and why it cannot.
const REFUSED: &[(&str, &str)] = &[
    (
        "__ex_table",
        "the guest would not find its exception handlers",
    ),
    (
        "__bug_table",
        "the guest would not find its WARN and BUG entries",
    ),
    (
        ".altinstructions",
        "its alternative instructions would not be applied",
    ),
    (
        ".altinstr_replacement",
        "its alternative instructions would not be applied",
    ),
    (
        ".parainstructions",
        "its paravirtual calls would not be patched",
    ),
    (
        ".static_call_sites",
        "its static calls would never be updated",
    ),
    (
        ".static_call_tramp_key",
        "its static calls would never be updated",
    ),
    ("__jump_table", "its jump labels would never be switched"),
    (
        ".data..percpu",
        "per-CPU variables of its own need the guest's allocator",
    ),
    ("__tracepoints", "its tracepoints would not be registered"),
    (
        "__tracepoints_ptrs",
        "its tracepoints would not be registered",
    ),
    (".init_array", "its constructors would not be called"),
    (".ctors", "its constructors would not be called"),
    (
        ".gnu.linkonce.this_module",
        "it is a whole module, not an object",
    ),
];

/// Why an object cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// There is no code in it.
    #[error("there is no code in it")]
    Empty,
    /// It does not fit.
    #[error("it is {size:#x} bytes; at most {MAX_CODE:#x} fit into a block")]
    TooLarge {
        /// Its size in bytes.
        size: usize,
    },
    /// It is something else, or broken.
    #[error("not a relocatable x86-64 ELF object: {0}")]
    NotAnObject(String),
    /// It has a section that the guest's kernel would have to know about.
    #[error("section {section}: {why}; build it without")]
    Section {
        /// Name of the section.
        section: String,
        /// What would go wrong.
        why: &'static str,
    },
    /// It refers to something that is not there.
    #[error("symbol {symbol}: {why}")]
    Symbol {
        /// Name of the symbol.
        symbol: String,
        /// Why it cannot be used.
        why: String,
    },
    /// It needs a relocation that kernel code does not have.
    #[error(
        "relocation type {kind} against {symbol} in {section}: build it as kernel code is built \
         (-mcmodel=kernel -fno-pic)"
    )]
    Relocation {
        /// Section with the relocation.
        section: String,
        /// Symbol it refers to.
        symbol: String,
        /// ELF type number.
        kind: u32,
    },
    /// A relocation points outside its section.
    #[error("relocation at {section}+{offset:#x} is outside its section")]
    Outside {
        /// Section with the relocation.
        section: String,
        /// Offset in it.
        offset: u64,
    },
    /// What it says that it needs is not understood.
    #[error(
        "its section .stillpoint is not one of version {DECLARATION_VERSION} with known flags; build it with \
         the stillpoint.h of this version"
    )]
    Declaration,
    /// Which function to jump to is not clear.
    #[error("it has no function {wanted} to jump to; it has: {functions}")]
    NoEntry {
        /// The function that was looked for.
        wanted: String,
        /// Functions that there are.
        functions: String,
    },
}

type Section<'d, 'f> = ElfSection64<'d, 'f, LittleEndian>;

fn broken(error: object::Error) -> ObjectError {
    ObjectError::NotAnObject(error.to_string())
}

pub(super) fn parse(
    file: &[u8],
    resolve: &dyn Fn(&str) -> Result<Resolved, String>,
) -> Result<Code, ObjectError> {
    let elf = ElfFile64::<LittleEndian>::parse(file).map_err(broken)?;
    if elf.kind() != ObjectKind::Relocatable
        || elf.elf_header().e_machine.get(LittleEndian) != EM_X86_64
    {
        return Err(ObjectError::NotAnObject(format!("{:?}", elf.kind())));
    }
    let mut layout = Layout::default();
    let placed: Vec<_> = elf
        .sections()
        .map(|section| Ok((Group::of(&section)?, section)))
        .collect::<Result<_, ObjectError>>()?;
    for group in [Group::Instructions, Group::Constants, Group::Variables] {
        for (_, section) in placed.iter().filter(|(g, _)| *g == Some(group)) {
            layout.place(group, section)?;
        }
    }
    if layout.instructions.is_empty() {
        return Err(ObjectError::Empty);
    }
    let mut code = Code {
        text: std::mem::take(&mut layout.text),
        text_align: layout.text_align.max(16),
        instructions: std::mem::take(&mut layout.instructions),
        data: std::mem::take(&mut layout.data),
        data_align: layout.data_align.max(16),
        fixups: Vec::new(),
        functions: functions(&elf, &layout),
        needs: needs(&elf)?,
        keeps_frames: false,
        keep: None,
    };
    for (_, section) in &placed {
        if let Some(&home) = layout.homes.get(&section.index()) {
            relocations(&elf, section, home, &layout, resolve, &mut code)?;
        }
    }
    Ok(code)
}

/// What a callback says that it needs.
fn needs(elf: &ElfFile64<'_, LittleEndian>) -> Result<Needs, ObjectError> {
    let Some(section) = elf.section_by_name(DECLARATION) else {
        return Ok(Needs::default());
    };
    let data = section.data().map_err(broken)?;
    let word = |at: usize| {
        let bytes = data.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(bytes))
    };
    match (word(0), word(4), data.len()) {
        (Some(DECLARATION_VERSION), Some(bits), 8) => Needs::from_bits(bits),
        _ => None,
    }
    .ok_or(ObjectError::Declaration)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Group {
    Instructions,
    Constants,
    Variables,
}

impl Group {
    fn of(section: &Section<'_, '_>) -> Result<Option<Self>, ObjectError> {
        let flags = section.elf_section_header().sh_flags(LittleEndian);
        let has = |flag: object::elf::SectionFlags| flags.0 & flag.0 != 0;
        let name = section.name().map_err(broken)?;
        if !has(SHF_ALLOC) {
            return Ok(None);
        }
        let refused = REFUSED.iter().find(|(refused, _)| {
            name == *refused
                || name
                    .strip_prefix(refused)
                    .is_some_and(|rest| rest.starts_with('.'))
        });
        if let Some((_, why)) = refused.filter(|_| section.size() > 0) {
            return Err(ObjectError::Section {
                section: name.to_owned(),
                why,
            });
        }
        if has(SHF_TLS) {
            return Err(ObjectError::Section {
                section: name.to_owned(),
                why: "the kernel has no thread-local storage",
            });
        }
        if IGNORED.contains(&name) || name.starts_with(".note") || name.starts_with(".discard") {
            return Ok(None);
        }
        Ok(Some(if has(SHF_EXECINSTR) {
            if has(SHF_WRITE) {
                return Err(ObjectError::Section {
                    section: name.to_owned(),
                    why: "it is writable and executable",
                });
            }
            Self::Instructions
        } else if has(SHF_WRITE) {
            Self::Variables
        } else {
            Self::Constants
        }))
    }
}

#[derive(Default)]
struct Layout {
    text: Vec<u8>,
    text_align: u64,
    instructions: Vec<std::ops::Range<usize>>,
    data: Vec<u8>,
    data_align: u64,
    homes: HashMap<SectionIndex, Home>,
}

#[derive(Clone, Copy)]
struct Home {
    part: Part,
    offset: usize,
    size: usize,
}

impl Layout {
    fn place(&mut self, group: Group, section: &Section<'_, '_>) -> Result<(), ObjectError> {
        let size = usize::try_from(section.size()).unwrap_or(usize::MAX);
        if size == 0 {
            return Ok(());
        }
        let align = section.align().max(1);
        if !align.is_power_of_two() || align > MAX_ALIGN {
            return Err(ObjectError::NotAnObject(format!(
                "a section aligned to {align:#x}"
            )));
        }
        let (part, bytes, most, filler) = match group {
            Group::Instructions => (Part::Code, &mut self.text, &mut self.text_align, 0xcc),
            Group::Constants => (Part::Code, &mut self.text, &mut self.text_align, 0),
            Group::Variables => (Part::Data, &mut self.data, &mut self.data_align, 0),
        };
        *most = align.max(*most);
        let step = usize::try_from(align).unwrap_or(1);
        let offset = bytes.len().next_multiple_of(step);
        let end = offset.checked_add(size).filter(|end| *end <= MAX_CODE);
        let end = end.ok_or(ObjectError::TooLarge { size })?;
        bytes.resize(offset, filler);
        if section.elf_section_header().sh_type(LittleEndian) == SHT_NOBITS {
            bytes.resize(end, 0);
        } else {
            let content = section.data().map_err(broken)?;
            if content.len() != size {
                return Err(ObjectError::NotAnObject("a section is cut short".into()));
            }
            bytes.extend_from_slice(content);
        }
        if group == Group::Instructions {
            self.instructions.push(offset..end);
        }
        self.homes
            .insert(section.index(), Home { part, offset, size });
        Ok(())
    }
}

fn functions(elf: &ElfFile64<'_, LittleEndian>, layout: &Layout) -> Vec<Function> {
    elf.symbols()
        .filter(|symbol| symbol.kind() == SymbolKind::Text)
        .filter_map(|symbol| {
            let home = layout.homes.get(&symbol.section_index()?)?;
            let inside = usize::try_from(symbol.address()).ok()?;
            (home.part == Part::Code && inside < home.size).then(|| Function {
                name: symbol.name().unwrap_or_default().to_owned(),
                offset: (home.offset + inside) as u64,
                global: symbol.is_global(),
            })
        })
        .collect()
}

fn relocations(
    elf: &ElfFile64<'_, LittleEndian>,
    section: &Section<'_, '_>,
    home: Home,
    layout: &Layout,
    resolve: &dyn Fn(&str) -> Result<Resolved, String>,
    code: &mut Code,
) -> Result<(), ObjectError> {
    let name = section.name().map_err(broken)?;
    for (offset, relocation) in section.relocations() {
        if code.fixups.len() >= MAX_RELOCATIONS {
            return Err(ObjectError::NotAnObject("too many relocations".into()));
        }
        let RelocationFlags::Elf { r_type } = relocation.flags() else {
            continue;
        };
        if r_type == R_X86_64_NONE {
            continue;
        }
        let RelocationTarget::Symbol(index) = relocation.target() else {
            return Err(ObjectError::NotAnObject(
                "a relocation without a symbol".into(),
            ));
        };
        let symbol = elf.symbol_by_index(index).map_err(broken)?;
        let symbol_name = symbol.name().unwrap_or_default();
        let width = match r_type {
            R_X86_64_64 => Width::Absolute64,
            R_X86_64_32 => Width::Unsigned32,
            R_X86_64_32S => Width::Signed32,
            R_X86_64_PC32 | R_X86_64_PLT32 => Width::Relative32,
            R_X86_64_PC64 => Width::Relative64,
            other => {
                return Err(ObjectError::Relocation {
                    section: name.to_owned(),
                    symbol: symbol_name.to_owned(),
                    kind: other.0,
                });
            }
        };
        let size = match width {
            Width::Absolute64 | Width::Relative64 => 8,
            _ => 4,
        };
        let at = usize::try_from(offset)
            .ok()
            .filter(|at| at.checked_add(size).is_some_and(|end| end <= home.size))
            .ok_or_else(|| ObjectError::Outside {
                section: name.to_owned(),
                offset,
            })?
            + home.offset;
        let target = match symbol.section() {
            SymbolSection::Section(index) => {
                let to = layout
                    .homes
                    .get(&index)
                    .ok_or_else(|| ObjectError::Symbol {
                        symbol: symbol_name.to_owned(),
                        why: "it is in a section that is not placed".into(),
                    })?;
                Target::Own(to.part, (to.offset as u64).wrapping_add(symbol.address()))
            }
            SymbolSection::Undefined => {
                // The compiler's call to the tracer, which the kernel turns into a nop as well.
                if symbol_name == "__fentry__" && nop_call(code, home.part, at) {
                    continue;
                }
                let resolved = resolve(symbol_name).map_err(|why| ObjectError::Symbol {
                    symbol: symbol_name.to_owned(),
                    why,
                })?;
                if symbol_name == "__x86_return_thunk" {
                    Target::Return(resolved)
                } else {
                    Target::Kernel(resolved)
                }
            }
            SymbolSection::Absolute => Target::Kernel(Resolved::Absolute(symbol.address())),
            _ => {
                return Err(ObjectError::Symbol {
                    symbol: symbol_name.to_owned(),
                    why: "it is not defined in a section; build with -fno-common".into(),
                });
            }
        };
        code.fixups.push(Fixup {
            part: home.part,
            offset: at,
            width,
            target,
            addend: relocation.addend(),
        });
    }
    Ok(())
}

/// Replaces a 5-byte call whose displacement is at `at` by a nop.
fn nop_call(code: &mut Code, part: Part, at: usize) -> bool {
    let call = at
        .checked_sub(1)
        .filter(|_| part == Part::Code)
        .and_then(|start| code.text.get_mut(start..start + NOP5.len()));
    match call {
        Some(bytes) if bytes.first() == Some(&0xe8) => {
            bytes.copy_from_slice(&NOP5);
            true
        }
        _ => false,
    }
}
