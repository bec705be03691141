//! What a site jumps to.

use super::Displaced;
use crate::guest::Gva;
use crate::patch::code::{Code, Fixup, Part, Resolved, Target, Width};

/// Counters share no cache line with another's.
const COUNTER_ALIGN: u64 = 64;

/// Counts, does what was displaced, and goes back to `back`. The count is the first word of its
/// data: a locked increment, so that it is exact whatever CPUs come by. Flags are kept, also where
/// the code in front of the site has none to lose.
pub(crate) fn counting(displaced: &Displaced, back: Gva) -> Code {
    let mut text = vec![
        0x9c, // pushfq
        0xf0, 0x48, 0xff, 0x05, 0, 0, 0, 0,    // lock incq count(%rip)
        0x9d, // popfq
    ];
    let mut fixups = vec![Fixup {
        part: Part::Code,
        offset: 5,
        width: Width::Relative32,
        target: Target::Own(Part::Data, 0),
        addend: -4,
    }];
    let base = text.len();
    text.extend_from_slice(&displaced.text);
    fixups.extend(displaced.fixups.iter().map(|fixup| Fixup {
        offset: base + fixup.offset,
        ..*fixup
    }));
    if displaced.falls_through {
        text.push(0xe9);
        fixups.push(Fixup {
            part: Part::Code,
            offset: text.len(),
            width: Width::Relative32,
            target: Target::Kernel(Resolved::Absolute(back.0)),
            addend: -4,
        });
        text.extend_from_slice(&[0; 4]);
    }
    Code {
        instructions: std::iter::once(0..text.len()).collect(),
        text,
        text_align: 16,
        data: vec![0; 8],
        data_align: COUNTER_ALIGN,
        fixups,
        functions: Vec::new(),
        keep: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Slide;
    use crate::patch::code::{Placed, ReturnSites, link};
    use crate::probe::displace;

    const AT: Gva = Gva(0xffff_ffff_8123_4560);

    fn linked(code: &[u8]) -> Vec<u8> {
        let displaced = displace(AT, code, 5).unwrap();
        let code = counting(&displaced, AT.offset(displaced.len as u64));
        let placed = Placed {
            code: Gva(0xffff_ffff_ff80_0000),
            data: Gva(0xffff_ffff_ffa0_0040),
        };
        link(&code, placed, Slide(0), ReturnSites::Ret).unwrap().0
    }

    #[test]
    fn a_hit_costs_five_instructions_where_a_nop_was() {
        let text = linked(&[0x0f, 0x1f, 0x44, 0, 0]);
        assert_eq!(text.len(), 15);
        let counter = i32::from_le_bytes(text[5..9].try_into().unwrap());
        assert_eq!(counter, 0x20_0040 - 9);
        let back = i32::from_le_bytes(text[11..15].try_into().unwrap());
        let end = Gva(0xffff_ffff_ff80_000f);
        assert_eq!(end.displace(back.into()), AT.offset(5));
    }

    #[test]
    fn code_that_does_not_come_back_needs_no_way_back() {
        // jmp +0
        let text = linked(&[0xe9, 0, 0, 0, 0]);
        assert_eq!(text.len(), 15);
        assert_eq!(text[10], 0xe9);
    }
}
