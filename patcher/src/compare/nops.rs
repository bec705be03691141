//! Filler: the nops that the kernel writes, and how it joins nops of its code into longer ones.
//!
//! Two ways are known (arch/x86/kernel/alternative.c, `optimize_nops`). Up to 6.4 runs of single
//! nops become nops of at most 8 bytes, one behind the other. From 6.5 on (d2408e043e72) any nops
//! in a row become one of at most 11 bytes, or a jump over int3 where it takes more. Which one it
//! is, the kernel's longest nop tells.

use iced_x86::{Decoder, DecoderOptions};

const NOPS: [&[u8]; 11] = [
    &[0x90],
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &[0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0, 0, 0, 0],
    &[0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
    &[0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
    &[0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
    &[0x66, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
];

const INT3: u8 = 0xcc;

/// The nop of `len` bytes (`x86_nops`), for lengths from 1 to 11.
pub(super) fn nop(len: usize) -> &'static [u8] {
    len.checked_sub(1)
        .and_then(|index| NOPS.get(index))
        .copied()
        .unwrap_or_default()
}

/// Which of the two ways a kernel has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Filler {
    /// Runs of single nops, as nops of at most 8 bytes.
    Runs,
    /// Any nops, as one instruction.
    One,
}

impl Filler {
    /// The way of a kernel whose nops (`x86nops`, one behind the other from the shortest on) are
    /// in `table`.
    pub(super) fn of(table: &[u8]) -> Option<Self> {
        let all = |most: usize| -> Vec<u8> {
            NOPS.iter().take(most).copied().flatten().copied().collect()
        };
        let (eight, eleven) = (all(8), all(11));
        if table.starts_with(&eleven) {
            Some(Self::One)
        } else {
            table.starts_with(&eight).then_some(Self::Runs)
        }
    }

    /// Joins the nops of the instructions in the first `len` bytes of `code`. What is behind those
    /// is only looked at.
    pub(super) fn join(self, code: &mut [u8], len: usize) {
        let mut at = 0;
        while at < len {
            let Some(size) = size(code, at) else { return };
            let mut next = at + size;
            match self {
                Self::Runs if size == 1 && code.get(at) == Some(&0x90) => {
                    let run = code.get(at..len).unwrap_or_default();
                    next = at + run.iter().take_while(|&&byte| byte == 0x90).count();
                    if let Some(run) = code.get_mut(at..next).filter(|run| run.len() > 1) {
                        Self::Runs.fill(run);
                    }
                }
                Self::One if is_nop(code, at) => {
                    // The last instruction is as long as it can be.
                    if next == len {
                        return;
                    }
                    while next < len && is_nop(code, next) {
                        match self::size(code, next) {
                            Some(more) => next += more,
                            None => break,
                        }
                    }
                    if let Some(run) = code.get_mut(at..next) {
                        Self::One.fill(run);
                    }
                }
                _ => {}
            }
            at = next;
        }
    }

    /// Fills `room` with nops (`add_nops`, `add_nop`).
    pub(super) fn fill(self, room: &mut [u8]) {
        match self {
            Self::Runs => {
                for piece in room.chunks_mut(8) {
                    let filler = nop(piece.len());
                    piece.copy_from_slice(filler);
                }
            }
            Self::One => {
                let len = room.len();
                if let Some(filler) = Some(nop(len)).filter(|filler| filler.len() == len) {
                    room.copy_from_slice(filler);
                    return;
                }
                room.fill(INT3);
                let jump = match i8::try_from(len.saturating_sub(2)) {
                    Ok(over) => vec![0xeb, over.to_le_bytes()[0]],
                    Err(_) => {
                        let over = u32::try_from(len.saturating_sub(5)).unwrap_or(0);
                        [vec![0xe9], over.to_le_bytes().to_vec()].concat()
                    }
                };
                for (to, from) in room.iter_mut().zip(jump) {
                    *to = from;
                }
            }
        }
    }
}

/// Length of the instruction at `at`.
fn size(code: &[u8], at: usize) -> Option<usize> {
    let mut decoder = Decoder::new(64, code.get(at..)?, DecoderOptions::NONE);
    let instruction = decoder.decode();
    (!instruction.is_invalid()).then_some(instruction.len())
}

/// Whether the instruction at `at` is one that the kernel takes for a nop (`insn_is_nop`).
fn is_nop(code: &[u8], at: usize) -> bool {
    let code = code.get(at..).unwrap_or_default();
    let legacy = |byte: &u8| {
        matches!(
            byte,
            0x66 | 0x67 | 0x2e | 0x3e | 0x26 | 0x36 | 0x64 | 0x65 | 0xf0 | 0xf2 | 0xf3
        )
    };
    let prefixes = code.iter().take_while(|byte| legacy(byte)).count();
    let rest = code.get(prefixes..).unwrap_or_default();
    let rest = match rest {
        [0x40..=0x4f, rest @ ..] => rest,
        rest => rest,
    };
    match rest {
        [0x90, ..] => code.first() != Some(&0xf3),
        [0x0f, 0x1f, ..] => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(filler: Filler, code: &[u8]) -> Vec<u8> {
        let mut code = code.to_vec();
        let len = code.len();
        filler.join(&mut code, len);
        code
    }

    #[test]
    fn runs_of_single_nops_become_long_ones() {
        let code = [[0x31, 0xc0].as_slice(), &[0x90; 10], &[0xc3]].concat();
        let expected = [[0x31, 0xc0].as_slice(), nop(8), nop(2), &[0xc3]].concat();
        assert_eq!(joined(Filler::Runs, &code), expected);
        assert_eq!(
            joined(Filler::Runs, &[0x66, 0x90, 0x90]),
            [0x66, 0x90, 0x90]
        );
    }

    #[test]
    fn all_nops_in_a_row_become_one() {
        let code = [nop(3), nop(5), &[0xc3, 0x90]].concat();
        assert_eq!(joined(Filler::One, &code), [nop(8), &[0xc3, 0x90]].concat());
        assert_eq!(joined(Filler::One, nop(8)), nop(8));
        assert_eq!(
            joined(Filler::One, &[0xf3, 0x90, 0x90, 0x90]),
            [0xf3, 0x90, 0x66, 0x90]
        );
        let long = joined(Filler::One, &[0x90; 14]);
        assert_eq!(long.first_chunk(), Some(&[0xeb, 12, 0xcc]));
        let longer = joined(Filler::One, &[0x90; 200]);
        assert_eq!(longer.first_chunk(), Some(&[0xe9, 195, 0, 0, 0, 0xcc]));
    }

    #[test]
    fn the_way_is_told_by_the_longest_nop() {
        let table = |most| {
            NOPS.iter()
                .take(most)
                .copied()
                .flatten()
                .copied()
                .collect::<Vec<u8>>()
        };
        assert_eq!(Filler::of(&table(11)), Some(Filler::One));
        assert_eq!(
            Filler::of(&[table(8), vec![0; 40]].concat()),
            Some(Filler::Runs)
        );
        assert_eq!(Filler::of(&table(7)), None);
    }
}
