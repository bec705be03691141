//! Instruction boundaries.
//!
//! The decoder goes from the start of a function straight through to the place of interest, over
//! the bytes that are in guest memory now. Compilers put no data between the instructions of a
//! kernel function, so that finds the boundaries that the CPU sees; bytes that are no instruction
//! end it with an error. It does not look for jumps into the middle of a range.

use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Mnemonic};

use crate::guest::Gva;

/// Longest x86 instruction.
pub(crate) const MAX_INSTRUCTION: usize = 15;
/// The 5-byte nop that ftrace leaves at the entry of a function (`x86_nops[5]`).
pub(crate) const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];

/// Why bytes cannot be replaced as whole instructions.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The range begins or ends inside an instruction.
    #[error("{at} is inside the {len}-byte instruction at {instruction} ({bytes})")]
    NotABoundary {
        /// Where the range begins or ends.
        at: Gva,
        /// Start of the instruction around it.
        instruction: Gva,
        /// Its length.
        len: usize,
        /// Its bytes.
        bytes: String,
    },
    /// Decoding met bytes that are no instruction.
    #[error("the bytes at {at} are no instruction ({bytes})")]
    NotCode {
        /// Where.
        at: Gva,
        /// The bytes there.
        bytes: String,
    },
    /// The bytes to write do not end with an instruction.
    #[error("the new bytes end inside the instruction that begins at byte {offset} of them")]
    CutOff {
        /// Offset of the unfinished instruction.
        offset: usize,
    },
}

/// Where instructions begin in `len` bytes at `code[from..]`, when those are whole instructions of
/// the function that begins at `code[0]`. The first is `from`.
///
/// `code` must reach at least one instruction beyond the range.
pub(crate) fn boundaries(
    start: Gva,
    code: &[u8],
    from: usize,
    len: usize,
) -> Result<Vec<usize>, DecodeError> {
    let end = from.saturating_add(len);
    let mut found = Vec::new();
    let mut decoder = Decoder::with_ip(64, code, start.0, DecoderOptions::NONE);
    let mut at = 0;
    while at < end {
        let instruction = decoder.decode();
        let len = instruction.len();
        if instruction.is_invalid() || len == 0 {
            let bytes = code.get(at..).unwrap_or_default();
            return Err(DecodeError::NotCode {
                at: start.offset(at as u64),
                bytes: hex(bytes.get(..MAX_INSTRUCTION).unwrap_or(bytes)),
            });
        }
        let next = at + len;
        for edge in [from, end] {
            if at < edge && edge < next {
                return Err(DecodeError::NotABoundary {
                    at: start.offset(edge as u64),
                    instruction: start.offset(at as u64),
                    len,
                    bytes: hex(code.get(at..next).unwrap_or_default()),
                });
            }
        }
        if at >= from {
            found.push(at);
        }
        at = next;
    }
    Ok(found)
}

/// Where instructions begin in bytes that are to be written at `at`.
pub(crate) fn whole(at: Gva, bytes: &[u8]) -> Result<Vec<usize>, DecodeError> {
    let mut found = Vec::new();
    let mut decoder = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE);
    let mut offset = 0;
    while offset < bytes.len() {
        let instruction = decoder.decode();
        if instruction.is_invalid() || instruction.len() == 0 {
            let rest = bytes.get(offset..).unwrap_or_default();
            // More bytes would have made it an instruction: then it is cut off, not nonsense.
            let mut longer = rest.to_vec();
            longer.resize(MAX_INSTRUCTION, 0);
            let complete = Decoder::new(64, &longer, DecoderOptions::NONE).decode();
            if !complete.is_invalid() && complete.len() > rest.len() {
                return Err(DecodeError::CutOff { offset });
            }
            return Err(DecodeError::NotCode {
                at: at.offset(offset as u64),
                bytes: hex(rest),
            });
        }
        found.push(offset);
        offset += instruction.len();
    }
    Ok(found)
}

/// The direct jumps and calls in `code` that lead into `bytes` and do not come from there: where
/// each is and where it leads. Decoding goes on behind bytes that are no instruction.
pub(crate) fn branches_into(start: Gva, code: &[u8], bytes: &Range<Gva>) -> Vec<(Gva, Gva)> {
    let mut decoder = Decoder::with_ip(64, code, start.0, DecoderOptions::NONE);
    let mut found = Vec::new();
    while decoder.can_decode() {
        let instruction = decoder.decode();
        let direct = instruction.is_call_near()
            || instruction.is_jmp_short_or_near()
            || instruction.is_jcc_short_or_near()
            || instruction.is_loop()
            || instruction.is_loopcc()
            || instruction.is_jcx_short();
        let (from, to) = (Gva(instruction.ip()), Gva(instruction.near_branch_target()));
        if direct && bytes.contains(&to) && !bytes.contains(&from) {
            found.push((from, to));
        }
    }
    found
}

/// The first jump in `code` whose target is computed, through a thunk or not.
pub(crate) fn indirect_jump(
    start: Gva,
    code: &[u8],
    is_thunk: &dyn Fn(Gva) -> bool,
) -> Option<Gva> {
    let decoder = Decoder::with_ip(64, code, start.0, DecoderOptions::NONE);
    decoder
        .into_iter()
        .find(|instruction| match instruction.flow_control() {
            FlowControl::IndirectBranch => true,
            FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
                is_thunk(Gva(instruction.near_branch_target()))
            }
            _ => false,
        })
        .map(|instruction| Gva(instruction.ip()))
}

/// Whether any instruction in `code` leaves a function whose parts are `within` for good: it returns,
/// or jumps to elsewhere or to an address that it computes.
pub(crate) fn leaves(start: Gva, code: &[u8], within: &[Range<Gva>]) -> bool {
    let mut decoder = Decoder::with_ip(64, code, start.0, DecoderOptions::NONE);
    let elsewhere = |target: Gva| !within.iter().any(|part| part.contains(&target));
    decoder
        .iter()
        .any(|instruction| match instruction.flow_control() {
            FlowControl::Return | FlowControl::IndirectBranch => true,
            FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
                elsewhere(Gva(instruction.near_branch_target()))
            }
            _ => false,
        })
}

/// Length of the instruction that `bytes` begin with, when they begin with one.
pub(crate) fn instruction_len(bytes: &[u8]) -> Option<u64> {
    let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
    (!instruction.is_invalid()).then_some(instruction.len() as u64)
}

/// What stands at the entry of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntrySite {
    /// ftrace's nop, free to be taken, at this offset from the start.
    Nop(usize),
    /// Something else at this offset, where the nop would have been.
    Other(usize),
}

/// Looks for ftrace's nop in the first bytes of a function: at its start, or behind an ENDBR64 or
/// the 4-byte nop that replaces one when the kernel seals the function (`ibt_endbr_seal`).
pub(crate) fn entry_site(start: Gva, code: &[u8]) -> EntrySite {
    let mut decoder = Decoder::with_ip(64, code, start.0, DecoderOptions::NONE);
    let first = decoder.decode();
    let landing = match first.mnemonic() {
        Mnemonic::Endbr64 => true,
        Mnemonic::Nop => first.len() == 4,
        _ => false,
    };
    let at = if landing { first.len() } else { 0 };
    match code.get(at..at + NOP5.len()) {
        Some(bytes) if bytes == NOP5 => EntrySite::Nop(at),
        _ => EntrySite::Other(at),
    }
}

/// Offsets of instructions of at least `least` bytes that everybody comes to who enters the function:
/// behind the place of ftrace's nop, whatever is there now, and before the function jumps, calls or
/// locks anything.
pub(crate) fn on_the_way_in(start: Gva, code: &[u8], least: usize) -> Vec<usize> {
    let from = match entry_site(start, code) {
        EntrySite::Nop(at) => at + NOP5.len(),
        // What ftrace has put there is a call.
        EntrySite::Other(at) if code.get(at) == Some(&0xe8) => at + NOP5.len(),
        EntrySite::Other(at) => at,
    };
    let rest = code.get(from..).unwrap_or_default();
    let ip = start.offset(from as u64).0;
    let mut decoder = Decoder::with_ip(64, rest, ip, DecoderOptions::NONE);
    let mut found = Vec::new();
    while decoder.can_decode() {
        let at = from + decoder.position();
        let instruction = decoder.decode();
        let goes_on = instruction.flow_control() == FlowControl::Next;
        let locks = instruction.has_lock_prefix() || instruction.mnemonic() == Mnemonic::Xchg;
        if !goes_on || locks {
            break;
        }
        if instruction.len() >= least {
            found.push(at);
        }
    }
    found
}

/// Bytes as people write them: `0f 1f 44 00 00`.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 3);
    for (i, byte) in bytes.iter().enumerate() {
        if i > 0 {
            text.push(' ');
        }
        for digit in [byte >> 4, byte & 0xf] {
            text.push(char::from_digit(digit.into(), 16).unwrap_or('?'));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Gva = Gva(0xffff_ffff_8100_0000);
    // endbr64; nop5; push rbp; mov rbp,rsp; call +0; ret; int3
    const CODE: &[u8] = &[
        0xf3, 0x0f, 0x1e, 0xfa, 0x0f, 0x1f, 0x44, 0, 0, 0x55, 0x48, 0x89, 0xe5, 0xe8, 0, 0, 0, 0,
        0xc3, 0xcc, 0xcc, 0xcc,
    ];

    #[test]
    fn whole_instructions_are_found() {
        assert_eq!(boundaries(START, CODE, 4, 5).unwrap(), [4]);
        assert_eq!(boundaries(START, CODE, 9, 9).unwrap(), [9, 10, 13]);
        assert_eq!(
            boundaries(START, CODE, 0, 19).unwrap(),
            [0, 4, 9, 10, 13, 18]
        );
    }

    #[test]
    fn a_range_that_cuts_an_instruction_is_refused() {
        let error = boundaries(START, CODE, 10, 2).unwrap_err();
        assert_eq!(
            error.to_string(),
            "0xffffffff8100000c is inside the 3-byte instruction at 0xffffffff8100000a (48 89 e5)"
        );
        assert!(boundaries(START, CODE, 5, 4).is_err());
        assert!(boundaries(START, CODE, 6, 1).is_err());
    }

    #[test]
    fn bytes_that_are_no_code_are_refused() {
        assert!(matches!(
            boundaries(START, &[0x06, 0x90], 1, 1),
            Err(DecodeError::NotCode { .. })
        ));
        assert!(boundaries(START, &[0x90], 0, 2).is_err());
        assert_eq!(
            whole(START, &[0x06]).unwrap_err().to_string(),
            "the bytes at 0xffffffff81000000 are no instruction (06)"
        );
    }

    #[test]
    fn new_bytes_must_be_whole_instructions() {
        assert_eq!(whole(START, &[0x90, 0xc3]).unwrap(), [0, 1]);
        assert_eq!(
            whole(START, &[0x90, 0xe8, 0, 0]).unwrap_err(),
            DecodeError::CutOff { offset: 1 }
        );
        assert_eq!(whole(START, &[]).unwrap(), []);
    }

    #[test]
    fn jumps_into_a_range_are_found() {
        // jmp +2 ; jne +0 ; nop ; nop ; call 4 ; ret
        let code = [
            0xeb, 2, 0x75, 0, 0x90, 0x90, 0xe8, 0xf9, 0xff, 0xff, 0xff, 0xc3,
        ];
        let at = |offset| START.offset(offset);
        let found = branches_into(START, &code, &(at(4)..at(6)));
        assert_eq!(found, [(at(0), at(4)), (at(2), at(4)), (at(6), at(4))]);
        assert!(branches_into(START, &code, &(at(5)..at(6))).is_empty());
        assert!(branches_into(START, &[0x06, 0xeb], &(at(0)..at(9))).is_empty());
    }

    #[test]
    fn what_everybody_comes_to_is_behind_the_entry_and_before_the_first_call() {
        // push %rbp; mov $0x11223344,%rbx; mov %gs:0x10,%rax; push %rbx; call; mov $1,%eax
        let body: &[u8] = &[
            0x55, 0x48, 0xc7, 0xc3, 0x44, 0x33, 0x22, 0x11, 0x65, 0x48, 0x8b, 0x04, 0x25, 0x10, 0,
            0, 0, 0x53, 0xe8, 0, 0, 0, 0, 0xb8, 1, 0, 0, 0,
        ];
        let at = |entry: &[u8]| on_the_way_in(Gva(0x1000), &[entry, body].concat(), 5);
        assert_eq!(at(&NOP5), [6, 13]);
        assert_eq!(at(&[0xe8, 1, 2, 3, 4]), [6, 13], "while it is traced");
        assert_eq!(at(&[0x0f, 0x1f, 0x40, 0, 0xe8, 1, 2, 3, 4]), [10, 17]);
        assert_eq!(at(&[]), [1, 8]);
        assert_eq!(at(&[0xf0, 0x48, 0xff, 0x00]), [0; 0], "a locked one");
    }

    #[test]
    fn the_entry_nop_is_where_it_is() {
        assert_eq!(entry_site(START, CODE), EntrySite::Nop(4));
        assert_eq!(entry_site(START, &CODE[4..]), EntrySite::Nop(0));
        let sealed = [0x66, 0x0f, 0x1f, 0, 0x0f, 0x1f, 0x44, 0, 0];
        assert_eq!(entry_site(START, &sealed), EntrySite::Nop(4));
        let newer = [0x0f, 0x1f, 0x40, 0xd6, 0x0f, 0x1f, 0x44, 0, 0];
        assert_eq!(entry_site(START, &newer), EntrySite::Nop(4));
        let traced = [0xf3, 0x0f, 0x1e, 0xfa, 0xe8, 1, 2, 3, 4];
        assert_eq!(entry_site(START, &traced), EntrySite::Other(4));
        assert_eq!(entry_site(START, &[0xcc]), EntrySite::Other(0));
        assert_eq!(entry_site(START, &[]), EntrySite::Other(0));
    }
}
