//! Text that follows a variable: jump labels, static calls, runtime constants.
//!
//! The tables are those of the kernel's file; the variables are read from the guest, as they are
//! now. While the guest is itself changing one of them the text may be either way: see
//! [`crate::text::BusyLayout`].

use std::collections::HashMap;

use super::depth::Depth;
use super::nops::nop;
use super::report::{Class, CompareError};
use super::returns::{RET, Returns};
use super::sheet::Sheet;
use super::view::{Table, View};
use crate::guest::{Gva, LinkAddr};
use crate::space::{LayoutError, SpaceError, optional_range};
use crate::symbols::Symbol;
use crate::types::Field;

const CALL: u8 = 0xe8;
const JUMP: u8 = 0xe9;
const SHORT_JUMP: u8 = 0xeb;
/// `cs cs cs xor %eax, %eax`: what takes the place of a call of `__static_call_return0`.
const XOR5: [u8; 5] = [0x2e, 0x2e, 0x2e, 0x31, 0xc0];
/// `ud1 (%edx), %rdi`: what takes the place of a call of `__WARN_trap` (6.19 and later).
const WARN: [u8; 5] = [0x67, 0x48, 0x0f, 0xb9, 0x3a];
/// Flags in the low bits of a pointer to a key.
const FLAGS: u64 = 3;

/// The little-endian number in `field` of `entry`, sign-extended.
fn signed(entry: &[u8], field: Field) -> Option<i64> {
    let at = usize::try_from(field.offset).ok()?;
    let rest = entry.get(at..)?;
    match field.size {
        4 => Some(i32::from_le_bytes(*rest.first_chunk()?).into()),
        8 => Some(i64::from_le_bytes(*rest.first_chunk()?)),
        _ => None,
    }
}

/// Entries of a table whose fields are distances from themselves.
struct Relative<'a> {
    start: LinkAddr,
    bytes: &'a [u8],
    size: usize,
    fields: Vec<Field>,
}

impl<'a> Relative<'a> {
    fn of(
        view: &View<'a>,
        table: &Table,
        holder: &str,
        members: &[&str],
    ) -> Result<Option<Self>, LayoutError> {
        let Some((start, bytes)) = view.table(table) else {
            return Ok(None);
        };
        let types = view.kernel.types();
        let size = usize::try_from(types.size_of(holder)?).unwrap_or(0);
        let fields = members.iter().map(|member| types.field(holder, member));
        Ok(Some(Self {
            start,
            bytes,
            size: size.max(1),
            fields: fields.collect::<Result<_, _>>()?,
        }))
    }

    /// What each entry points to, field by field.
    fn entries(&self) -> impl Iterator<Item = Vec<LinkAddr>> + '_ {
        (0_u64..)
            .zip(self.bytes.chunks_exact(self.size))
            .map(move |(n, entry)| {
                let entry_at = self.start.offset(n * self.size as u64);
                let target = |field: &Field| {
                    let distance = signed(entry, *field)?;
                    Some(entry_at.offset(field.offset).displace(distance))
                };
                self.fields.iter().filter_map(target).collect()
            })
    }
}

/// Variables that were read already: many places share one.
struct Read<'a> {
    view: &'a View<'a>,
    known: HashMap<LinkAddr, u64>,
    size: u64,
}

impl<'a> Read<'a> {
    fn new(view: &'a View<'a>, size: u64) -> Self {
        Self {
            view,
            known: HashMap::new(),
            size,
        }
    }

    fn get(&mut self, at: LinkAddr) -> Result<u64, SpaceError> {
        if let Some(&value) = self.known.get(&at) {
            return Ok(value);
        }
        let value = self
            .view
            .space
            .read_sized(self.view.run_time(at), self.size)?;
        self.known.insert(at, value);
        Ok(value)
    }
}

/// Jump labels: a jump where the key says so, a nop else (kernel/jump_label.c,
/// `jump_label_type`; arch/x86/kernel/jump_label.c).
pub(super) fn jump_labels(view: &View<'_>, sheet: &mut Sheet) -> Result<(), CompareError> {
    let table = Table::Between("__start___jump_table", "__stop___jump_table");
    let members = ["code", "target", "key"];
    let Some(table) = Relative::of(view, &table, "jump_entry", &members)? else {
        return Ok(());
    };
    let enabled = view
        .kernel
        .types()
        .field("static_key", "enabled")
        .map_err(LayoutError::from)?;
    let mut keys = Read::new(view, enabled.size);
    for entry in table.entries() {
        let [code, target, tagged] = entry[..] else {
            continue;
        };
        let Some(first) = sheet.get(code, 2).and_then(|two| two.first_chunk::<2>()) else {
            continue;
        };
        // The length stays what the assembler chose.
        let len = match *first {
            [SHORT_JUMP, _] | [0x66, 0x90] => 2,
            _ => 5,
        };
        let key = LinkAddr(tagged.0 & !FLAGS).offset(enabled.offset);
        let on = keys.get(key).map_err(|source| CompareError::Read {
            what: "a static key",
            source,
        })? != 0;
        let jumps = on != (tagged.0 & 1 != 0);
        let jump = match len {
            2 => i8::try_from(target.displacement_from(code.offset(2)))
                .ok()
                .map(|distance| vec![SHORT_JUMP, distance.to_le_bytes()[0]]),
            _ => sheet
                .branch(JUMP, code, sheet.run_time(target))
                .map(|jump| jump.to_vec()),
        };
        match (jumps, jump) {
            (false, _) => sheet.put(code, nop(len), Class::JumpLabel),
            (true, Some(jump)) => sheet.put(code, &jump, Class::JumpLabel),
            (true, None) => sheet.mark(code, len, Class::JumpLabel),
        }
    }
    Ok(())
}

/// Static calls and their trampolines (arch/x86/kernel/static_call.c).
///
/// One that returns at once was written either before or after the boot chose how returns look, so
/// it may be a plain return.
pub(super) fn static_calls(
    view: &View<'_>,
    sheet: &mut Sheet,
    returns: &Returns,
    depth: Option<&Depth>,
) -> Result<(), CompareError> {
    let table = Table::Between("__start_static_call_sites", "__stop_static_call_sites");
    let Some(table) = Relative::of(view, &table, "static_call_site", &["addr", "key"])? else {
        return Ok(());
    };
    let func = view
        .kernel
        .types()
        .field("static_call_key", "func")
        .map_err(LayoutError::from)?;
    let mut keys = Read::new(view, func.size);
    let function = |name| view.symbol(name).map(|at| view.run_time(at));
    let (nothing, warning) = (function("__static_call_return0"), function("__WARN_trap"));
    let unreadable = |source| CompareError::Read {
        what: "a static call's key",
        source,
    };
    for entry in table.entries() {
        let [site, tagged] = entry[..] else { continue };
        let Some(&first) = sheet.get(site, 6).and_then(|bytes| bytes.first()) else {
            continue;
        };
        let key = LinkAddr(tagged.0 & !FLAGS).offset(func.offset);
        let func = Gva(keys.get(key).map_err(unreadable)?);
        let tail = tagged.0 & 1 != 0;
        let func = match depth {
            Some(depth) if !tail && func.0 != 0 => depth.translate_run_time(sheet, func),
            _ => func,
        };
        let bytes = match (tail, func.0) {
            (false, 0) => Some(nop(5).to_vec()),
            (false, _) if Some(func) == nothing => Some(XOR5.to_vec()),
            (false, _) if Some(func) == warning => Some(WARN.to_vec()),
            (false, _) => sheet.branch(CALL, site, func).map(|call| call.to_vec()),
            (true, _) if first == 0x0f => conditional(sheet, returns, site, func),
            (true, 0) => Some(returns.at(sheet, site).to_vec()),
            (true, _) => sheet.branch(JUMP, site, func).map(|jump| jump.to_vec()),
        };
        match bytes {
            Some(bytes) => sheet.put(site, &bytes, Class::StaticCall),
            None => sheet.mark(site, 5, Class::StaticCall),
        }
        if tail && func.0 == 0 && first != 0x0f {
            sheet.also(site, &RET);
        }
    }
    for trampoline in trampolines(view) {
        let name = trampoline.name().replacen("__SCT__", "__SCK__", 1);
        let key = view.kernel.symbols().named(&name).next();
        let (Some(at), Some(key)) = (
            trampoline.address(),
            key.and_then(|symbol| symbol.address()),
        ) else {
            continue;
        };
        let func = Gva(keys.get(key.offset(func.offset)).map_err(unreadable)?);
        let bytes = match func.0 {
            0 => Some(returns.at(sheet, at)),
            _ => sheet.branch(JUMP, at, func),
        };
        match bytes {
            Some(bytes) => sheet.put(at, &bytes, Class::StaticCallTrampoline),
            None => sheet.mark(at, 5, Class::StaticCallTrampoline),
        }
        if func.0 == 0 {
            sheet.also(at, &RET);
        }
    }
    Ok(())
}

/// The trampolines of static calls, which stand together in the text.
fn trampolines<'a>(view: &View<'a>) -> Vec<Symbol<'a>> {
    let symbols = view.kernel.symbols();
    let range = optional_range(
        view.kernel,
        "__static_call_text_start",
        "__static_call_text_end",
    );
    let Some(range) = range else {
        return symbols.matching("__SCT__*").collect();
    };
    let mut all = Vec::new();
    let mut at = range.start;
    while let Some(place) = symbols.at(at).filter(|_| range.contains(&at)) {
        at = at.offset(place.size.saturating_sub(place.offset).max(1));
        all.push(place.symbol);
    }
    all
}

/// A conditional jump to a static call: to its function, or to a return.
fn conditional(sheet: &Sheet, returns: &Returns, site: LinkAddr, func: Gva) -> Option<Vec<u8>> {
    let condition = *sheet.get(site, 2)?.last()?;
    let target = match func.0 {
        0 => returns.stand_in()?,
        _ => func,
    };
    let [_, a, b, c, d] = sheet.branch(JUMP, site.offset(1), target)?;
    Some(vec![0x0f, condition, a, b, c, d])
}
