//! What the boot writes once, and what needs no more than a table: relocations, the calls of the
//! tracer, calls through `pv_ops`, sealed ENDBRs, lock prefixes.

use super::nops::{Filler, nop};
use super::report::{Class, CompareError};
use super::sheet::Sheet;
use super::view::{Table, View};
use crate::guest::{Gva, LinkAddr};
use crate::image::Relocation;
use crate::space::LayoutError;

const CALL: u8 = 0xe8;
const ENDBR: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
/// What takes the place of a sealed ENDBR (`gen_endbr_poison`): up to 6.14, and later.
const POISONS: [[u8; 4]; 2] = [[0x66, 0x0f, 0x1f, 0x00], [0x0f, 0x1f, 0x40, 0xd6]];
const LOCK: u8 = 0xf0;
/// A segment override that does nothing.
const DS: u8 = 0x3e;

/// Adds the slide where the kernel's file says so. Whether it does say.
pub(super) fn relocate(view: &View<'_>, sheet: &mut Sheet) -> bool {
    let Some(relocations) = view.kernel.image().relocations() else {
        return false;
    };
    let slide = sheet.slide.0;
    // A slide is below 1 GiB: the low half says all.
    let [a, b, c, d, ..] = slide.to_le_bytes();
    let short = u32::from_le_bytes([a, b, c, d]);
    for (at, form) in relocations.iter() {
        let len = if form == Relocation::Long { 8 } else { 4 };
        let Some(bytes) = sheet.get(at, len) else {
            continue;
        };
        let word = bytes.first_chunk().map(|raw| u32::from_le_bytes(*raw));
        let long = bytes.first_chunk().map(|raw| u64::from_le_bytes(*raw));
        let new = match (form, word, long) {
            (Relocation::Long, _, Some(long)) => long.wrapping_add(slide).to_le_bytes().to_vec(),
            (Relocation::Word, Some(word), _) => word.wrapping_add(short).to_le_bytes().to_vec(),
            (Relocation::Inverse, Some(word), _) => word.wrapping_sub(short).to_le_bytes().to_vec(),
            _ => continue,
        };
        sheet.put(at, &new, Class::Relocation);
    }
    true
}

/// The calls of the tracer at the entries of functions become nops (`ftrace_init`).
pub(super) fn entries(view: &View<'_>, sheet: &mut Sheet) {
    let table = Table::Between("__start_mcount_loc", "__stop_mcount_loc");
    let (_, bytes) = view.table(&table).unwrap_or_default();
    for raw in bytes.chunks_exact(8) {
        let at = LinkAddr(raw.first_chunk().map_or(0, |raw| u64::from_le_bytes(*raw)));
        if sheet.get(at, 1) == Some(&[CALL]) {
            sheet.put(at, nop(5), Class::Fentry);
        }
    }
}

/// ftrace's own calls: of what was traced with last, or of the function that goes through all
/// tracers; the kernel leaves the last one there (`ftrace_update_ftrace_func`).
pub(super) fn tracers(view: &View<'_>, sheet: &mut Sheet) -> Result<(), CompareError> {
    let named = |name| view.symbol(name).map(|at| view.run_time(at));
    let targets = [
        view.variable("ftrace_trace_function", 8)?.map(Gva),
        named("arch_ftrace_ops_list_func"),
        named("ftrace_ops_list_func"),
    ];
    for at in ["ftrace_call", "ftrace_regs_call"].map(|name| view.symbol(name)) {
        let Some(at) = at.filter(|&at| sheet.get(at, 1) == Some(&[CALL])) else {
            continue;
        };
        sheet.mark(at, 5, Class::FtraceCall);
        for target in targets.into_iter().flatten() {
            if let Some(call) = sheet.branch(CALL, at, target) {
                sheet.also(at, &call);
            }
        }
    }
    Ok(())
}

/// Calls through `pv_ops` become direct (`apply_paravirt`, up to 6.7).
pub(super) fn paravirt(view: &View<'_>, sheet: &mut Sheet) -> Result<(), CompareError> {
    let Some((_, bytes)) = view.table(&Table::Section(".parainstructions")) else {
        return Ok(());
    };
    let types = view.kernel.types();
    let member = |name| {
        types
            .field("paravirt_patch_site", name)
            .map_err(LayoutError::from)
    };
    let (instr, kind, len) = (member("instr")?, member("type")?, member("len")?);
    let size = types
        .size_of("paravirt_patch_site")
        .map_err(LayoutError::from)?;
    let step = usize::try_from(size).unwrap_or(0).max(1);
    let symbols = view.kernel.symbols();
    let ops = symbols.address("pv_ops").map_err(LayoutError::from)?;
    let operations = types
        .size_of("paravirt_patch_template")
        .map_err(LayoutError::from)?
        .min(1 << 12);
    let operations = view.bytes(
        ops,
        usize::try_from(operations).unwrap_or(0),
        "the paravirt operations",
    )?;
    let named = |name| view.symbol(name).map(|at| view.run_time(at));
    let (nothing, bug) = (named("_paravirt_nop"), named("paravirt_BUG"));
    for entry in bytes.chunks_exact(step) {
        let byte = |offset: u64| {
            let at = usize::try_from(offset).unwrap_or(usize::MAX);
            entry.get(at).copied().unwrap_or(0)
        };
        let from = usize::try_from(instr.offset).unwrap_or(usize::MAX);
        let Some(raw) = entry.get(from..).and_then(|raw| raw.first_chunk()) else {
            continue;
        };
        let at = LinkAddr(u64::from_le_bytes(*raw));
        let room = usize::from(byte(len.offset));
        let slot = usize::from(byte(kind.offset)) * 8;
        let Some(target) = operations.get(slot..).and_then(|raw| raw.first_chunk()) else {
            continue;
        };
        let target = Gva(u64::from_le_bytes(*target));
        let target = if target.0 == 0 {
            bug
        } else {
            Some(target).filter(|_| Some(target) != nothing)
        };
        let mut new = match target {
            Some(target) => sheet
                .branch(CALL, at, target)
                .map_or_else(Vec::new, |call| call.to_vec()),
            None => Vec::new(),
        };
        let used = new.len();
        new.resize(room.max(used), 0x90);
        if let Some(rest) = new.get_mut(used..) {
            Filler::Runs.fill(rest);
        }
        sheet.put(at, &new, Class::Paravirt);
    }
    Ok(())
}

/// ENDBRs of functions that are never called indirectly (`apply_seal_endbr`).
pub(super) fn seals(view: &View<'_>, sheet: &mut Sheet) -> Result<(), CompareError> {
    let mut places = view
        .places(&Table::Section(".ibt_endbr_seal"))
        .filter(|&at| sheet.get(at, 4) == Some(&ENDBR))
        .collect::<Vec<_>>()
        .into_iter()
        .peekable();
    if places.peek().is_none() {
        return Ok(());
    }
    let poison = poison(view, sheet).ok_or(LayoutError::Unknown {
        what: "filler for sealed ENDBRs",
    })?;
    for at in places {
        sheet.put(at, &poison, Class::Endbr);
    }
    Ok(())
}

/// The filler is an operand of the function that writes it.
fn poison(view: &View<'_>, sheet: &Sheet) -> Option<[u8; 4]> {
    let writers = ["apply_seal_endbr", "poison_endbr", "apply_ibt_endbr"];
    let code = writers.into_iter().filter_map(|name| {
        let symbol = view.kernel.symbols().named(name).next()?;
        let size = usize::try_from(symbol.size()?).ok()?.min(4096);
        sheet.get(symbol.address()?, size)
    });
    let code = code.collect::<Vec<_>>();
    let mut known = POISONS.into_iter().filter(|poison| {
        code.iter()
            .any(|code| memchr::memmem::find(code, poison).is_some())
    });
    match (known.next(), known.next()) {
        (Some(only), None) => Some(only),
        _ => None,
    }
}

/// With one CPU there is no need for lock prefixes (`alternatives_smp_unlock`).
pub(super) fn locks(view: &View<'_>, sheet: &mut Sheet) -> Result<(), CompareError> {
    let single = view.variable("uniproc_patched", 1)? == Some(1);
    for at in view.places(&Table::Section(".smp_locks")) {
        if sheet.get(at, 1) == Some(&[LOCK]) {
            let prefix = if single { DS } else { LOCK };
            sheet.put(at, &[prefix], Class::SmpLock);
        }
    }
    Ok(())
}
