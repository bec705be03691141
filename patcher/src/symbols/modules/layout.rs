//! Where a kernel keeps its modules, taken from its symbols and its types.

use super::MemoryKind;
use crate::Kernel;
use crate::guest::LinkAddr;
use crate::space::{LayoutError, optional};
use crate::types::{Field, TypeError, Types};

/// Everything needed to find a guest's modules and what they are made of. Offsets and sizes are in
/// bytes.
#[derive(Clone, Debug)]
pub struct ModulesLayout {
    /// `modules`, the head of the list.
    pub(super) head: LinkAddr,
    pub(super) next: u64,
    /// `sizeof(struct module)`.
    pub(super) size: usize,
    pub(super) list: u64,
    pub(super) state: Field,
    pub(super) states: States,
    pub(super) name: Field,
    pub(super) users: Option<Field>,
    pub(super) taints: Option<Field>,
    pub(super) source_version: Option<Field>,
    pub(super) memory: Vec<Part>,
    pub(super) orc: Option<OrcFields>,
    pub(super) kallsyms: Option<KallsymsFields>,
    pub(super) exports: Option<ExportFields>,
    pub(super) types: Option<TypesFields>,
}

/// `btf_modules`: which modules have types of their own, and where.
#[derive(Clone, Copy, Debug)]
pub(super) struct TypesFields {
    pub(super) head: LinkAddr,
    /// Members of `btf_module`.
    pub(super) list: u64,
    pub(super) module: u64,
    pub(super) btf: u64,
    /// Members of `btf`.
    pub(super) data: u64,
    pub(super) size: Field,
}

/// Values of `enum module_state`.
#[derive(Clone, Copy, Debug)]
pub(super) struct States {
    pub(super) live: u64,
    pub(super) coming: u64,
    pub(super) going: u64,
    pub(super) unformed: u64,
}

/// A part of a module's memory: from `start` to `end` bytes behind its base.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) kind: MemoryKind,
    pub(super) base: Field,
    pub(super) start: Option<Field>,
    pub(super) end: Field,
}

/// Members of `module.arch`.
#[derive(Clone, Copy, Debug)]
pub(super) struct OrcFields {
    pub(super) count: Field,
    pub(super) instructions: Field,
    pub(super) entries: Field,
}

/// `module.kallsyms`, a pointer, and members of what it points to.
#[derive(Clone, Copy, Debug)]
pub(super) struct KallsymsFields {
    pub(super) pointer: Field,
    pub(super) size: usize,
    pub(super) symbols: Field,
    pub(super) count: Field,
    pub(super) strings: Field,
    pub(super) kinds: Field,
    pub(super) entry: SymbolFields,
}

/// Members of `Elf64_Sym`.
#[derive(Clone, Copy, Debug)]
pub(super) struct SymbolFields {
    pub(super) len: usize,
    pub(super) name: Field,
    pub(super) value: Field,
    pub(super) size: Field,
    pub(super) section: Field,
}

/// `module.syms`, and members of its elements.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExportFields {
    pub(super) array: Field,
    pub(super) count: Field,
    pub(super) len: usize,
    pub(super) value: Field,
    pub(super) name: Field,
}

impl ModulesLayout {
    /// Looks everything up in the kernel's file. `None` for a kernel that has no modules.
    ///
    /// # Errors
    /// [`LayoutError`] names what the file lacks.
    pub fn of(kernel: &Kernel) -> Result<Option<Self>, LayoutError> {
        let types = kernel.types();
        let Ok(size) = types.size_of("struct module") else {
            return Ok(None);
        };
        let head = match optional(kernel.symbols(), "modules") {
            Some(head) => head,
            None if kernel.symbols().named("modules").next().is_none() => return Ok(None),
            None => kernel.symbols().address("modules")?,
        };
        let module = |path| types.field("module", path);
        let state = |name| constant(types, "module_state", name);
        Ok(Some(Self {
            head,
            next: types.field("list_head", "next")?.offset,
            size: length(size),
            list: module("list")?.offset,
            state: module("state")?,
            states: States {
                live: state("MODULE_STATE_LIVE")?,
                coming: state("MODULE_STATE_COMING")?,
                going: state("MODULE_STATE_GOING")?,
                unformed: state("MODULE_STATE_UNFORMED")?,
            },
            name: module("name")?,
            users: module("refcnt.counter").ok(),
            taints: module("taints").ok(),
            source_version: module("srcversion").ok(),
            memory: memory(types)?,
            orc: orc(types),
            kallsyms: kallsyms(types),
            exports: exports(types),
            types: type_lists(kernel),
        }))
    }
}

pub(super) fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn constant(types: &Types, holder: &str, name: &str) -> Result<u64, LayoutError> {
    let value = types.constant(holder, name)?;
    u64::try_from(value).map_err(|_| LayoutError::Unknown {
        what: "numbering of module states",
    })
}

/// The kinds in the kernel's own words.
const KINDS: [(&str, MemoryKind); 7] = [
    ("MOD_TEXT", MemoryKind::Text),
    ("MOD_DATA", MemoryKind::Data),
    ("MOD_RODATA", MemoryKind::Rodata),
    ("MOD_RO_AFTER_INIT", MemoryKind::RoAfterInit),
    ("MOD_INIT_TEXT", MemoryKind::InitText),
    ("MOD_INIT_DATA", MemoryKind::InitData),
    ("MOD_INIT_RODATA", MemoryKind::InitRodata),
];

fn memory(types: &Types) -> Result<Vec<Part>, LayoutError> {
    if types.field("module", "mem").is_err() {
        return Ok(old_memory(types)?);
    }
    let part = |&(name, kind): &(&str, MemoryKind)| {
        let number = constant(types, "mod_mem_type", name)?;
        Ok(Part {
            kind,
            base: types.field("module", &format!("mem[{number}].base"))?,
            start: None,
            end: types.field("module", &format!("mem[{number}].size"))?,
        })
    };
    KINDS.iter().map(part).collect()
}

/// Up to 6.3 all parts are in one piece, one behind the other: text, constants, what becomes
/// constant, data.
fn old_memory(types: &Types) -> Result<Vec<Part>, TypeError> {
    use MemoryKind as Kind;
    let core = [Kind::Text, Kind::Rodata, Kind::RoAfterInit, Kind::Data];
    // Nothing becomes constant in what is freed then.
    let init = [
        Kind::InitText,
        Kind::InitRodata,
        Kind::InitData,
        Kind::InitData,
    ];
    let mut parts = Vec::new();
    for (layout, kinds) in [("core_layout", core), ("init_layout", init)] {
        let field = |name: &str| types.field("module", &format!("{layout}.{name}"));
        let base = field("base")?;
        let mut start = None;
        let ends = ["text_size", "ro_size", "ro_after_init_size", "size"];
        for (kind, end) in kinds.into_iter().zip(ends) {
            let end = field(end)?;
            parts.push(Part {
                kind,
                base,
                start,
                end,
            });
            start = Some(end);
        }
    }
    Ok(parts)
}

fn orc(types: &Types) -> Option<OrcFields> {
    let field = |path| types.field("module", path).ok();
    Some(OrcFields {
        count: field("arch.num_orcs")?,
        instructions: field("arch.orc_unwind_ip")?,
        entries: field("arch.orc_unwind")?,
    })
}

fn kallsyms(types: &Types) -> Option<KallsymsFields> {
    let field = |path| types.field("mod_kallsyms", path).ok();
    let symbol = |path| types.field("elf64_sym", path).ok();
    Some(KallsymsFields {
        pointer: types.field("module", "kallsyms").ok()?,
        size: length(types.size_of("mod_kallsyms").ok()?),
        symbols: field("symtab")?,
        count: field("num_symtab")?,
        strings: field("strtab")?,
        kinds: field("typetab")?,
        entry: SymbolFields {
            len: length(types.size_of("elf64_sym").ok()?),
            name: symbol("st_name")?,
            value: symbol("st_value")?,
            size: symbol("st_size")?,
            section: symbol("st_shndx")?,
        },
    })
}

fn exports(types: &Types) -> Option<ExportFields> {
    let symbol = |path| types.field("kernel_symbol", path).ok();
    Some(ExportFields {
        array: types.field("module", "syms").ok()?,
        count: types.field("module", "num_syms").ok()?,
        len: length(types.size_of("kernel_symbol").ok()?),
        value: symbol("value_offset")?,
        name: symbol("name_offset")?,
    })
}

fn type_lists(kernel: &Kernel) -> Option<TypesFields> {
    let field = |holder, path| kernel.types().field(holder, path).ok();
    Some(TypesFields {
        head: optional(kernel.symbols(), "btf_modules")?,
        list: field("btf_module", "list")?.offset,
        module: field("btf_module", "module")?.offset,
        btf: field("btf_module", "btf")?.offset,
        data: field("struct btf", "data")?.offset,
        size: field("struct btf", "data_size")?,
    })
}
