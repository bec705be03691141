//! Code that the boot chooses by the features of its CPU (arch/x86/kernel/alternative.c).
//!
//! The choices for one place are made one after the other, each on what the one before left. Two
//! generations are known, told apart by the entries: with 12 bytes (up to 6.2) a replacement is
//! moved only when it is a single call or jump, and "not" is a bit of the feature's number; with
//! 14 bytes (since 6.3) every relative operand is moved.

use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions, Instruction};

use super::nops::Filler;
use super::report::{Class, CompareError};
use super::sheet::Sheet;
use super::view::{Table, View};
use crate::Kernel;
use crate::guest::{Gva, LinkAddr};
use crate::space::LayoutError;

/// ALT_FLAG_NOT and ALT_FLAG_DIRECT_CALL of a kernel with flags of their own.
const NOT: u64 = 1;
const DIRECT_CALL: u64 = 2;
/// ALTINSTR_FLAG_INV of a kernel without.
const INVERTED: u64 = 1 << 15;
/// Beyond a place, so that an instruction that begins in it is seen whole.
const MORE: usize = 16;

const CALL: u8 = 0xe8;
const JUMP: u8 = 0xe9;
const SHORT_JUMP: u8 = 0xeb;
const INT3: u8 = 0xcc;

/// One choice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Choice {
    pub(super) at: LinkAddr,
    replacement: LinkAddr,
    pub(super) feature: u32,
    pub(super) not: bool,
    direct_call: bool,
    len: u8,
    replacement_len: u8,
}

/// Which generation a kernel is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    SingleBranch,
    EveryOperand,
}

/// All choices, in the order in which the boot makes them.
pub(super) struct Alternatives {
    choices: Vec<Choice>,
    form: Form,
    filler: Filler,
}

impl Alternatives {
    pub(super) fn of(kernel: &Kernel, view: &View<'_>) -> Result<Self, CompareError> {
        let unknown = |what| LayoutError::Unknown { what };
        let types = kernel.types();
        let member = |name| types.field("alt_instr", name);
        let size = types.size_of("alt_instr").map_err(LayoutError::from)?;
        let (instr, repl) = (
            member("instr_offset").map_err(LayoutError::from)?.offset,
            member("repl_offset").map_err(LayoutError::from)?.offset,
        );
        let feature = member("cpuid").map_err(LayoutError::from)?;
        let flags = member("flags").ok();
        let (len, replacement_len) = (
            member("instrlen").map_err(LayoutError::from)?,
            member("replacementlen").map_err(LayoutError::from)?,
        );
        let nops = kernel
            .symbols()
            .address("x86nops")
            .map_err(LayoutError::from)?;
        let filler = (36..=66)
            .rev()
            .find_map(|len| kernel.image().read(nops, len))
            .and_then(Filler::of)
            .ok_or(unknown("way of filling with nops"))?;
        let (start, bytes) = view
            .table(&Table::Section(".altinstructions"))
            .ok_or(unknown("table of alternatives"))?;
        let step = usize::try_from(size).unwrap_or(0).max(1);
        let mut choices = Vec::with_capacity(bytes.len() / step);
        for (n, entry) in (0_u64..).zip(bytes.chunks_exact(step)) {
            let entry_at = start.offset(n * size);
            let number = |offset: u64, size: u64| -> u64 {
                let at = usize::try_from(offset).unwrap_or(usize::MAX);
                let mut raw = [0; 8];
                let from = entry.get(at..).unwrap_or_default().iter();
                let size = usize::try_from(size).unwrap_or(0);
                raw.iter_mut()
                    .zip(from.take(size))
                    .for_each(|(to, from)| *to = *from);
                u64::from_le_bytes(raw)
            };
            let distance = |offset: u64| {
                let raw = entry.get(usize::try_from(offset).ok()?..)?.first_chunk()?;
                Some(
                    entry_at
                        .offset(offset)
                        .displace(i32::from_le_bytes(*raw).into()),
                )
            };
            let (Some(at), Some(replacement)) = (distance(instr), distance(repl)) else {
                continue;
            };
            let bits = |field: crate::types::Field| {
                let raw = number(field.offset, field.size);
                field.bits.map_or(raw, |bits| bits.extract(raw))
            };
            let (id, flags) = match flags {
                Some(flags) => (bits(feature), bits(flags)),
                None => {
                    let id = bits(feature);
                    (id & !INVERTED, if id & INVERTED == 0 { 0 } else { NOT })
                }
            };
            choices.push(Choice {
                at,
                replacement,
                feature: u32::try_from(id).unwrap_or(u32::MAX),
                not: flags & NOT != 0,
                direct_call: flags & DIRECT_CALL != 0,
                len: u8::try_from(bits(len)).unwrap_or(0),
                replacement_len: u8::try_from(bits(replacement_len)).unwrap_or(0),
            });
        }
        Ok(Self {
            choices,
            form: match flags {
                Some(_) => Form::EveryOperand,
                None => Form::SingleBranch,
            },
            filler,
        })
    }

    /// The choices for places in `range`.
    pub(super) fn within(&self, range: Range<LinkAddr>) -> impl Iterator<Item = &Choice> {
        let all = self.choices.iter();
        all.filter(move |choice| range.contains(&choice.at))
    }

    /// Whether the function `name` has code that depends on `feature`.
    pub(super) fn asks(&self, kernel: &Kernel, name: &str, feature: u32) -> bool {
        kernel.symbols().named(name).any(|symbol| {
            let (Some(at), Some(size)) = (symbol.address(), symbol.size()) else {
                return false;
            };
            self.within(at..at.offset(size))
                .any(|choice| choice.feature == feature)
        })
    }

    /// Makes all choices (`apply_alternatives`).
    pub(super) fn apply(&self, view: &View<'_>, sheet: &mut Sheet) -> Result<(), CompareError> {
        let mut rest = self.choices.as_slice();
        while let Some(first) = rest.first() {
            let same = rest.iter().take_while(|choice| choice.at == first.at);
            let (site, others) = rest.split_at(same.count());
            rest = others;
            // Since 6.9 all choices for a place know the room of the largest.
            let room = match self.form {
                Form::EveryOperand => site.iter().map(|choice| choice.len).max(),
                Form::SingleBranch => None,
            };
            for choice in site {
                self.choose(view, sheet, choice, room.unwrap_or(choice.len))?;
            }
        }
        Ok(())
    }

    fn choose(
        &self,
        view: &View<'_>,
        sheet: &mut Sheet,
        choice: &Choice,
        len: u8,
    ) -> Result<(), CompareError> {
        let len = usize::from(len);
        let Some(behind) = sheet.from(choice.at, len + MORE).map(<[u8]>::to_vec) else {
            return Ok(());
        };
        let has = view.has(choice.feature).ok_or(LayoutError::Unknown {
            what: "number of CPU features",
        })?;
        let mut code = behind.clone();
        if has != choice.not {
            let Some(new) = sheet.get(choice.replacement, choice.replacement_len.into()) else {
                return Ok(());
            };
            let mut new = new.to_vec();
            if choice.direct_call {
                self.direct_call(view, sheet, choice, &mut new)?;
            }
            if self.form == Form::SingleBranch {
                single_branch(choice, &mut new);
            }
            new.resize(new.len().max(len), 0x90);
            if self.form == Form::EveryOperand {
                every_operand(choice, &mut new, len);
            }
            for (to, from) in code.iter_mut().zip(&new) {
                *to = *from;
            }
        }
        self.filler.join(&mut code, len);
        if let Some(code) = code.get(..len) {
            sheet.put(choice.at, code, Class::Alternative);
        }
        Ok(())
    }

    /// An indirect call through a table becomes a direct one (`alt_replace_call`).
    fn direct_call(
        &self,
        view: &View<'_>,
        sheet: &Sheet,
        choice: &Choice,
        new: &mut Vec<u8>,
    ) -> Result<(), CompareError> {
        let through = sheet.get(choice.at, 2) == Some(&[0xff, 0x15]);
        let (Some(distance), true) = (sheet.distance(choice.at.offset(2)), through) else {
            return Ok(());
        };
        let pointer = choice.at.offset(6).displace(distance);
        let what = "a paravirt operation";
        let target = view
            .space
            .read_pointer(view.run_time(pointer))
            .map_err(|source| CompareError::Read { what, source })?;
        let named = |name| view.symbol(name).map(|at| view.run_time(at));
        if named("nop_func") == Some(target) {
            new.clear();
            return Ok(());
        }
        let target = match target.0 {
            0 => named("BUG_func").unwrap_or(Gva(0)),
            _ => target,
        };
        // As if the replacement were called where it stands: it is moved like any other.
        if let Some(call) = sheet.branch(CALL, choice.replacement, target) {
            *new = call.to_vec();
        }
        Ok(())
    }
}

/// Moves a replacement that is one call or jump (`recompute_jump` and before it).
fn single_branch(choice: &Choice, new: &mut [u8]) {
    let (5, Some(&opcode)) = (choice.replacement_len, new.first()) else {
        return;
    };
    let Some(raw) = new.get(1..5).and_then(|raw| raw.first_chunk()) else {
        return;
    };
    let target = choice
        .replacement
        .offset(5)
        .displace(i32::from_le_bytes(*raw).into());
    let away = target.displacement_from(choice.at);
    let put = |new: &mut [u8], opcode, distance: i64| {
        let Ok(distance) = i32::try_from(distance) else {
            return;
        };
        let bytes = std::iter::once(opcode).chain(distance.to_le_bytes());
        new.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    };
    match opcode {
        CALL => put(new, CALL, away - 5),
        JUMP | SHORT_JUMP => {
            // A short jump only forward: the kernel's test for the other direction never holds.
            if let Some(short) = i8::try_from(away - 2).ok().filter(|_| away >= 0) {
                let bytes = [SHORT_JUMP, short.to_le_bytes()[0], 0x0f, 0x1f, 0x00];
                new.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
            } else {
                put(new, JUMP, away - 5);
            }
        }
        _ => {}
    }
}

/// Moves every relative operand that leads out of a replacement (`__apply_relocation`).
fn every_operand(choice: &Choice, new: &mut [u8], len: usize) {
    let moved = choice.replacement.displacement_from(choice.at);
    let mut at = 0;
    while at < len {
        let code = new.get(at..).unwrap_or_default();
        let mut decoder = Decoder::with_ip(64, code, at as u64, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            return;
        }
        let next = at + instruction.len();
        let offsets = decoder.get_constant_offsets(&instruction);
        if is_branch(&instruction) && offsets.has_immediate() {
            let (place, size) = (at + offsets.immediate_offset(), offsets.immediate_size());
            let distance = operand(new, place, size);
            if leads_out(choice, next, distance) {
                add(new, place, size, moved);
            }
            if new.get(at) == Some(&JUMP) {
                shorten(new, at, distance.saturating_add(moved).saturating_add(3));
            }
        }
        if instruction.is_ip_rel_memory_operand() {
            let (place, size) = (
                at + offsets.displacement_offset(),
                offsets.displacement_size(),
            );
            if leads_out(choice, next, operand(new, place, size)) {
                add(new, place, size, moved);
            }
        }
        at = next;
    }
}

fn is_branch(instruction: &Instruction) -> bool {
    instruction.is_call_near()
        || instruction.is_jmp_short_or_near()
        || instruction.is_jcc_short_or_near()
}

/// Whether `distance` from offset `next` leads out of the replacement.
fn leads_out(choice: &Choice, next: usize, distance: i64) -> bool {
    let target = i64::try_from(next).unwrap_or(0).saturating_add(distance);
    target < 0 || target > i64::from(choice.replacement_len)
}

fn operand(code: &[u8], at: usize, size: usize) -> i64 {
    match (
        code.get(at),
        code.get(at..).and_then(|raw| raw.first_chunk()),
    ) {
        (Some(&byte), _) if size == 1 => i8::from_le_bytes([byte]).into(),
        (_, Some(raw)) if size == 4 => i32::from_le_bytes(*raw).into(),
        _ => 0,
    }
}

fn add(code: &mut [u8], at: usize, size: usize, moved: i64) {
    let sum = operand(code, at, size).wrapping_add(moved).to_le_bytes();
    let to = code.get_mut(at..).unwrap_or_default().iter_mut();
    to.zip(sum).take(size).for_each(|(to, from)| *to = from);
}

/// Makes a jump that reaches a short one, with int3 behind it.
fn shorten(code: &mut [u8], at: usize, distance: i64) {
    let Ok(short) = i8::try_from(distance) else {
        return;
    };
    let bytes = [SHORT_JUMP, short.to_le_bytes()[0], INT3, INT3, INT3];
    let to = code.get_mut(at..).unwrap_or_default().iter_mut();
    to.zip(bytes).for_each(|(to, from)| *to = from);
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: LinkAddr = LinkAddr(0xffff_ffff_8100_1000);

    fn choice(replacement: LinkAddr, len: u8) -> Choice {
        Choice {
            at: AT,
            replacement,
            feature: 0,
            not: false,
            direct_call: false,
            len,
            replacement_len: len,
        }
    }

    #[test]
    fn a_single_branch_is_moved() {
        let choice = choice(AT.offset(0x100), 5);
        let mut call = [CALL, 0x10, 0, 0, 0];
        single_branch(&choice, &mut call);
        assert_eq!(call, [CALL, 0x10, 1, 0, 0]);
        let mut far = [JUMP, 0x10, 0, 0, 0];
        single_branch(&choice, &mut far);
        assert_eq!(far, [JUMP, 0x10, 1, 0, 0]);
        // To AT + 0x20: a short jump and a nop reach that; backwards there is none.
        let mut near = [JUMP, 0x1b, 0xff, 0xff, 0xff];
        single_branch(&choice, &mut near);
        assert_eq!(near, [SHORT_JUMP, 0x1e, 0x0f, 0x1f, 0x00]);
        let mut back = [JUMP, 0xeb, 0xfe, 0xff, 0xff];
        single_branch(&choice, &mut back);
        assert_eq!(back, [JUMP, 0xeb, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn every_operand_that_leads_out_is_moved() {
        // mov 0x10(%rip),%rax ; je +2 (inside) ; nop ; nop
        let choice = choice(AT.offset(0x100), 11);
        let mut code = [0x48, 0x8b, 0x05, 0x10, 0, 0, 0, 0x74, 0x02, 0x90, 0x90];
        every_operand(&choice, &mut code, 11);
        assert_eq!(
            code,
            [0x48, 0x8b, 0x05, 0x10, 1, 0, 0, 0x74, 0x02, 0x90, 0x90]
        );
        // A jump that gets short is followed by int3.
        let choice = self::choice(AT.offset(0x100), 5);
        let mut code = [JUMP, 0x1b, 0xff, 0xff, 0xff];
        every_operand(&choice, &mut code, 5);
        assert_eq!(code, [SHORT_JUMP, 0x1e, INT3, INT3, INT3]);
        // What is no code ends it.
        let mut odd = [0x06, 0xe8, 0, 0, 0];
        every_operand(&choice, &mut odd, 5);
        assert_eq!(odd, [0x06, 0xe8, 0, 0, 0]);
    }
}
