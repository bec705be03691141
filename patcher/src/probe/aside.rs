//! What a vCPU runs that comes to a breakpoint: the instruction that stood there, or a loop in which
//! it waits.

use super::Displaced;
use super::asm::Asm;
use super::callback::Needs;
use crate::guest::Gva;
use crate::patch::code::Code;

/// 1: pause; jmp 1b; then a jump to where the loop goes on.
const SPIN: [u8; 4] = [0xf3, 0x90, 0xeb, 0xfc];
/// What opens the loop: its jump leads to the next instruction. Offset and byte.
pub(crate) const OPEN: (u64, u8) = (3, 0);

/// The instruction at `at`, elsewhere, and in front of it a loop that goes on at `at` when there is
/// to be one. The second answer is where the instruction begins.
pub(crate) fn aside(displaced: &Displaced, at: Gva, spins: bool) -> (Code, u64) {
    let mut asm = Asm::default();
    if spins {
        add_loop(&mut asm, at);
    }
    let begins = asm.text.len() as u64;
    asm.append(&displaced.text, &displaced.fixups);
    if displaced.falls_through {
        asm.jump(at.offset(displaced.len as u64));
    }
    (code(asm, spins), begins)
}

/// A loop that goes on at `at` when it is opened.
pub(crate) fn spin(at: Gva) -> Code {
    let mut asm = Asm::default();
    add_loop(&mut asm, at);
    code(asm, true)
}

fn add_loop(asm: &mut Asm, at: Gva) {
    asm.raw(&SPIN);
    asm.jump(at);
}

fn code(asm: Asm, spins: bool) -> Code {
    Code {
        instructions: std::iter::once(0..asm.text.len()).collect(),
        text: asm.text,
        text_align: 16,
        // Code with data is not used a second time: a loop will have been opened.
        data: vec![0; if spins { 8 } else { 0 }],
        data_align: 8,
        fixups: asm.fixups,
        functions: Vec::new(),
        keeps_frames: false,
        keep: None,
        needs: Needs::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Slide;
    use crate::patch::code::{Placed, ReturnSites, link};
    use crate::probe::displace;

    const AT: Gva = Gva(0xffff_ffff_8123_4560);
    const SLOT: Gva = Gva(0xffff_ffff_ff80_0000);

    fn linked(code: &Code) -> Vec<u8> {
        let placed = Placed {
            code: SLOT,
            data: Gva(0xffff_ffff_ffa0_0040),
        };
        link(code, placed, Slide(0), ReturnSites::Ret).unwrap().0
    }

    fn leads_to(text: &[u8], at: usize) -> Gva {
        assert_eq!(text[at], 0xe9);
        let distance = i32::from_le_bytes(text[at + 1..at + 5].try_into().unwrap());
        SLOT.offset(at as u64 + 5).displace(distance.into())
    }

    #[test]
    fn the_instruction_runs_and_the_next_one_follows_where_it_stands() {
        // push %rbx; mov %rdi,%rbx: one instruction, not five bytes.
        let displaced = displace(AT, &[0x53, 0x48, 0x89, 0xfb], 1).unwrap();
        let (code, begins) = aside(&displaced, AT, false);
        let text = linked(&code);
        assert_eq!((begins, &text[..1]), (0, &[0x53][..]));
        assert_eq!(leads_to(&text, 1), AT.offset(1));
        assert!(code.data.is_empty());
    }

    #[test]
    fn a_loop_goes_on_at_the_instruction_itself() {
        let displaced = displace(AT, &[0x53, 0x90], 1).unwrap();
        let (code, begins) = aside(&displaced, AT, true);
        let mut text = linked(&code);
        assert_eq!(text[..4], SPIN);
        assert_eq!(leads_to(&text, 4), AT);
        assert_eq!((begins, text[9]), (9, 0x53));
        assert_eq!(leads_to(&text, 10), AT.offset(1));
        // Closed, it leads to its start; opened, to what follows.
        assert_eq!(text[2..4], [0xeb, 0xfc]);
        text[usize::try_from(OPEN.0).unwrap()] = OPEN.1;
        assert_eq!(text[2..4], [0xeb, 0x00]);
        assert!(!code.data.is_empty());
    }
}
