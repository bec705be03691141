//! Everybody in the guest who changes text at run time, by the guest's own lists: kprobes, users
//! of ftrace, BPF trampolines.
//!
//! The guest may lie in all of them: every walk is bounded, and one that hit its bound is an error.

use super::view::View;
use crate::guest::{Gva, LinkAddr};
use crate::space::{LayoutError, SpaceError};

/// More of anything than a kernel has.
const MOST: usize = 1 << 16;
/// Buckets of a hash that are believed (FTRACE_HASH_MAX_BITS is 12).
const MAX_BITS: u64 = 16;
/// Longest name that is read.
const NAME: usize = 128;

/// Why the users of text are not known.
#[derive(Debug, thiserror::Error)]
pub(super) enum UserError {
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Read(#[from] SpaceError),
    #[error("the list at {0} does not end")]
    Endless(Gva),
}

impl From<crate::types::TypeError> for UserError {
    fn from(error: crate::types::TypeError) -> Self {
        Self::Layout(error.into())
    }
}

/// A kprobe.
pub(super) struct Probe {
    pub(super) at: Gva,
    /// The symbol that it was asked for by.
    pub(super) name: Option<String>,
    /// Where its jump leads when it is optimised.
    pub(super) detour: Option<Gva>,
}

/// A user of ftrace (`struct ftrace_ops`).
pub(super) struct Tracer {
    pub(super) at: Gva,
    pub(super) func: Gva,
    /// Its own trampoline, where it has one.
    pub(super) trampoline: Option<Gva>,
    /// Entries that it is for, sorted; `None` for all.
    only: Option<Vec<u64>>,
    /// Entries that it is not for, sorted.
    not: Vec<u64>,
}

impl Tracer {
    /// Whether it wants to hear of the function with this entry.
    pub(super) fn wants(&self, entry: Gva) -> bool {
        let only = self.only.as_ref();
        only.is_none_or(|only| only.binary_search(&entry.0).is_ok())
            && self.not.binary_search(&entry.0).is_err()
    }
}

/// Code that BPF made.
pub(super) struct Program {
    pub(super) start: Gva,
    pub(super) end: Gva,
    pub(super) name: String,
}

/// The text at `at` up to its end.
fn name(view: &View<'_>, at: Gva) -> Option<String> {
    let mut name = Vec::new();
    while name.len() < NAME {
        let byte = view
            .space
            .read_sized(at.offset(name.len() as u64), 1)
            .ok()?;
        match u8::try_from(byte) {
            Ok(0) | Err(_) => break,
            Ok(byte) => name.push(byte),
        }
    }
    Some(String::from_utf8_lossy(&name).into_owned()).filter(|name| !name.is_empty())
}

/// The elements of a list that ends with a null pointer; the link is the first word of each.
fn chain(view: &View<'_>, first: Gva) -> Result<Vec<Gva>, UserError> {
    let mut all = Vec::new();
    let mut at = first;
    while at.0 != 0 {
        if all.len() > MOST {
            return Err(UserError::Endless(first));
        }
        all.push(at);
        at = view.space.read_pointer(at)?;
    }
    Ok(all)
}

/// The elements of a `list_head`.
fn ring(view: &View<'_>, head: Gva) -> Result<Vec<Gva>, UserError> {
    let mut all = Vec::new();
    let mut at = view.space.read_pointer(head)?;
    while at != head {
        if all.len() > MOST {
            return Err(UserError::Endless(head));
        }
        all.push(at);
        at = view.space.read_pointer(at)?;
    }
    Ok(all)
}

/// Every kprobe (`kprobe_table`).
pub(super) fn probes(view: &View<'_>) -> Result<Vec<Probe>, UserError> {
    let Some(table) = view.kernel.symbols().named("kprobe_table").next() else {
        return Ok(Vec::new());
    };
    let types = view.kernel.types();
    let offset = |member| types.field("kprobe", member).map(|field| field.offset);
    let (node, address, symbol) = (offset("hlist")?, offset("addr")?, offset("symbol_name")?);
    let detour = types
        .field("optimized_kprobe", "optinsn.insn")
        .ok()
        .map(|field| field.offset);
    let (Some(start), Some(size)) = (table.address(), table.size()) else {
        return Ok(Vec::new());
    };
    let mut all = Vec::new();
    // KPROBE_TABLE_SIZE; the symbol may seem longer than it is, never shorter.
    for bucket in 0..(size / 8).min(64) {
        let first = view
            .space
            .read_pointer(view.run_time(start.offset(bucket * 8)))?;
        for link in chain(view, first)? {
            let probe = Gva(link.0.wrapping_sub(node));
            let symbol = view.space.read_pointer(probe.offset(symbol))?;
            // A plain kprobe is shorter than an optimised one: what is behind it means nothing,
            // and no jump leads there.
            let detour = detour.and_then(|at| view.space.read_pointer(probe.offset(at)).ok());
            all.push(Probe {
                at: view.space.read_pointer(probe.offset(address))?,
                name: name(view, symbol).filter(|_| symbol.0 != 0),
                detour: detour.filter(|detour| detour.0 != 0),
            });
        }
    }
    Ok(all)
}

/// Every user of ftrace (`ftrace_ops_list`).
pub(super) fn tracers(view: &View<'_>) -> Result<Vec<Tracer>, UserError> {
    let (Some(head), Some(end)) = (
        view.symbol("ftrace_ops_list"),
        view.symbol("ftrace_list_end"),
    ) else {
        return Ok(Vec::new());
    };
    let types = view.kernel.types();
    let offset = |member| types.field("ftrace_ops", member).map(|field| field.offset);
    let (next, func, trampoline, hash) = (
        offset("next")?,
        offset("func")?,
        offset("trampoline")?,
        offset("func_hash")?,
    );
    let hash_offset = |member| {
        let field = types.field("ftrace_ops_hash", member);
        field.map(|field| field.offset)
    };
    let (filter, notrace) = (hash_offset("filter_hash")?, hash_offset("notrace_hash")?);
    let end = view.run_time(end);
    let mut all = Vec::new();
    let mut at = view.space.read_pointer(view.run_time(head))?;
    while at != end && at.0 != 0 {
        if all.len() > MOST {
            return Err(UserError::Endless(view.run_time(head)));
        }
        let hash = view.space.read_pointer(at.offset(hash))?;
        let only = entries(view, view.space.read_pointer(hash.offset(filter))?)?;
        let not = entries(view, view.space.read_pointer(hash.offset(notrace))?)?;
        let trampoline = view.space.read_pointer(at.offset(trampoline))?;
        all.push(Tracer {
            at,
            func: view.space.read_pointer(at.offset(func))?,
            trampoline: Some(trampoline).filter(|at| at.0 != 0),
            only: Some(only).filter(|only| !only.is_empty()),
            not,
        });
        at = view.space.read_pointer(at.offset(next))?;
    }
    Ok(all)
}

/// The functions in a `struct ftrace_hash`, sorted.
fn entries(view: &View<'_>, hash: Gva) -> Result<Vec<u64>, UserError> {
    if hash.0 == 0 {
        return Ok(Vec::new());
    }
    let types = view.kernel.types();
    let field = |member| types.field("ftrace_hash", member);
    let (bits, buckets, count) = (field("size_bits")?, field("buckets")?, field("count")?);
    let ip = types.field("ftrace_func_entry", "ip")?.offset;
    let link = types.field("ftrace_func_entry", "hlist")?.offset;
    let read =
        |field: crate::types::Field| view.space.read_sized(hash.offset(field.offset), field.size);
    let (bits, buckets, count) = (read(bits)?, Gva(read(buckets)?), read(count)?);
    if count == 0 || buckets.0 == 0 {
        return Ok(Vec::new());
    }
    let mut all = Vec::new();
    for bucket in 0..1_u64 << bits.min(MAX_BITS) {
        let first = view.space.read_pointer(buckets.offset(bucket * 8))?;
        for entry in chain(view, first)? {
            let entry = Gva(entry.0.wrapping_sub(link));
            all.push(view.space.read_u64(entry.offset(ip))?);
        }
        if all.len() > MOST {
            return Err(UserError::Endless(hash));
        }
    }
    all.sort_unstable();
    Ok(all)
}

/// All code that BPF made (`bpf_kallsyms`).
pub(super) fn programs(view: &View<'_>) -> Result<Vec<Program>, UserError> {
    let Some(head) = view.symbol("bpf_kallsyms") else {
        return Ok(Vec::new());
    };
    let types = view.kernel.types();
    let offset = |member| types.field("bpf_ksym", member).map(|field| field.offset);
    let (start, end, text, node) = (
        offset("start")?,
        offset("end")?,
        offset("name")?,
        offset("lnode")?,
    );
    let all = ring(view, view.run_time(head))?.into_iter().map(|link| {
        let symbol = Gva(link.0.wrapping_sub(node));
        Ok(Program {
            start: view.space.read_pointer(symbol.offset(start))?,
            end: view.space.read_pointer(symbol.offset(end))?,
            name: name(view, symbol.offset(text)).unwrap_or_default(),
        })
    });
    all.collect()
}

/// The newest function that a livepatch has in the place of another, by its user of ftrace
/// (`struct klp_ops`).
pub(super) fn livepatched(view: &View<'_>, tracer: &Tracer) -> Option<Gva> {
    let types = view.kernel.types();
    let fops = types.field("klp_ops", "fops").ok()?.offset;
    let stack = types.field("klp_ops", "func_stack").ok()?.offset;
    let node = types.field("klp_func", "stack_node").ok()?.offset;
    let new = types.field("klp_func", "new_func").ok()?.offset;
    let ops = Gva(tracer.at.0.wrapping_sub(fops));
    let first = view.space.read_pointer(ops.offset(stack)).ok()?;
    let func = Gva(first.0.wrapping_sub(node));
    view.space.read_pointer(func.offset(new)).ok()
}

/// An address as function and offset where it is in the kernel's text.
pub(super) fn called(view: &View<'_>, at: Gva) -> String {
    let link: LinkAddr = at.linked(view.located.slide);
    match view.kernel.symbols().at(link) {
        Some(place) if place.offset == 0 => place.symbol.name(),
        Some(place) => format!("{}+{:#x}", place.symbol.name(), place.offset),
        None => at.to_string(),
    }
}
