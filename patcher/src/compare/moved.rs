//! What KASLR moved, where the kernel's file does not say it.

use std::collections::HashSet;
use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions};

use super::report::Class;
use super::sheet::Sheet;
use super::view::View;
use crate::guest::LinkAddr;

/// A longer function is not looked at.
const LONGEST: u64 = 1 << 20;

/// The operands of a function's instructions that a relocation may be for.
struct Operands {
    function: Range<LinkAddr>,
    /// Where each begins: the low four bytes of it, if it has more.
    starts: HashSet<LinkAddr>,
}

impl Operands {
    /// Those of the function around `at`.
    fn around(view: &View<'_>, sheet: &Sheet, at: LinkAddr) -> Option<Self> {
        let place = view.kernel.symbols().at(at)?;
        let start = place.symbol.address()?;
        let size = usize::try_from(place.size.min(LONGEST)).ok()?;
        let code = sheet.from(start, size)?;
        let mut decoder = Decoder::with_ip(64, code, start.0, DecoderOptions::NONE);
        let mut starts = HashSet::new();
        while decoder.can_decode() {
            let instruction = decoder.decode();
            let offsets = decoder.get_constant_offsets(&instruction);
            let at = LinkAddr(instruction.ip());
            if offsets.has_immediate() && offsets.immediate_size() >= 4 {
                starts.insert(at.offset(offsets.immediate_offset() as u64));
            }
            if offsets.has_displacement() && offsets.displacement_size() >= 4 {
                starts.insert(at.offset(offsets.displacement_offset() as u64));
            }
        }
        Some(Self {
            function: start..start.offset(place.size),
            starts,
        })
    }
}

/// Takes the differences away that are operands which have grown, or shrunk, by exactly the slide.
pub(super) fn moved<'f>(
    view: &View<'_>,
    sheet: &mut Sheet,
    differences: &mut Vec<LinkAddr>,
    found: &impl Fn(LinkAddr, usize) -> Option<&'f [u8]>,
) {
    let Ok(slide) = i32::try_from(sheet.slide.0) else {
        return;
    };
    let number = |bytes: &[u8]| bytes.first_chunk().map(|raw| i32::from_le_bytes(*raw));
    let mut known: Option<Range<LinkAddr>> = None;
    let mut operands: Option<Operands> = None;
    differences.retain(|&at| {
        if known.as_ref().is_some_and(|known| known.contains(&at)) {
            return false;
        }
        let here = operands.take().filter(|o| o.function.contains(&at));
        operands = here.or_else(|| Operands::around(view, sheet, at));
        let Some(operands) = &operands else {
            return true;
        };
        for back in 0..4_u64 {
            let start = LinkAddr(at.0.wrapping_sub(back));
            if !operands.starts.contains(&start) {
                continue;
            }
            let (Some(expected), Some(now)) = (
                sheet.get(start, 4).and_then(number),
                found(start, 4).and_then(number),
            ) else {
                continue;
            };
            let grown = expected.wrapping_add(slide) == now;
            if grown || expected.wrapping_sub(slide) == now {
                sheet.put(start, &now.to_le_bytes(), Class::Relocation);
                known = Some(start..start.offset(4));
                return false;
            }
        }
        true
    });
}
