//! One entry of six bytes, in each of the formats.

/// Length of an entry in bytes.
pub(super) const ENTRY: usize = 6;

/// Length of the hash in `.orc_header` (scripts/orc_hash.sh: SHA-1 of the format's definition).
pub(super) const HASH: usize = 20;

const SIGNAL: [u8; HASH] = [
    0xfe, 0x5d, 0x32, 0xbf, 0x58, 0x1b, 0xd6, 0x3b, 0x2c, 0xa9, 0xa5, 0xc6, 0x5b, 0xa5, 0xa6, 0x25,
    0xea, 0xb3, 0xfe, 0x24,
];
const RENUMBERED: [u8; HASH] = [
    0x13, 0x7c, 0x36, 0xad, 0x76, 0x27, 0xc4, 0xdd, 0x55, 0x93, 0x21, 0x76, 0xbb, 0x0e, 0xcd, 0xbd,
    0x50, 0x41, 0xfc, 0x82,
];

/// How entries are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OrcFormat {
    /// What interrupts is told by the type alone, the end of a stack by a bit of its own.
    Plain,
    /// The end of a stack is a type, and a bit says that a frame was interrupted.
    Signal,
    /// The same with other numbers for the registers.
    Renumbered,
}

impl OrcFormat {
    /// The format that has this hash.
    pub(super) fn of_hash(hash: &[u8]) -> Option<Self> {
        [(SIGNAL, Self::Signal), (RENUMBERED, Self::Renumbered)]
            .into_iter()
            .find_map(|(known, format)| (known == hash).then_some(format))
    }
}

/// What an entry says about the frame of the code that it covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::stack) struct Rule {
    pub(in crate::stack) kind: Kind,
    /// Where the frame's upper end (CFA) is.
    pub(in crate::stack) cfa: CfaBase,
    /// Bytes that are added to it.
    pub(in crate::stack) cfa_offset: i64,
    pub(in crate::stack) bp: BasePointer,
    /// The frame below was interrupted: its address is of an instruction that has yet to run.
    pub(in crate::stack) signal: bool,
}

/// What is at the upper end of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::stack) enum Kind {
    /// Nothing that is known.
    Undefined,
    /// The stack ends here.
    End,
    /// A return address.
    Call,
    /// All registers (`struct pt_regs`).
    Regs,
    /// The five words that an interrupt pushes.
    PartialRegs,
}

/// What the upper end of a frame is counted from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::stack) enum CfaBase {
    Sp,
    Bp,
    /// The word at the stack pointer; the offset is added to it.
    AtSp,
    /// The word at the base pointer plus the offset.
    AtBp,
    /// A register that only an interrupted frame is known to have.
    Saved(SavedRegister),
    Unknown,
}

/// Registers that functions with a realigned stack count from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::stack) enum SavedRegister {
    Ax,
    Dx,
    Di,
    R10,
    R13,
}

/// Where the caller's base pointer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::stack) enum BasePointer {
    Unchanged,
    /// This far from the frame's upper end.
    AtCfa(i64),
    /// This far from where the base pointer points.
    AtBp(i64),
}

impl Rule {
    /// Generated code that keeps frame pointers: both words are where BP points.
    pub(in crate::stack) const FRAME_POINTER: Self = Self {
        kind: Kind::Call,
        cfa: CfaBase::Bp,
        cfa_offset: 16,
        bp: BasePointer::AtCfa(-16),
        signal: false,
    };

    /// A call of address 0: only the return address is on the stack.
    pub(in crate::stack) const NULL_CALL: Self = Self {
        kind: Kind::Call,
        cfa: CfaBase::Sp,
        cfa_offset: 8,
        bp: BasePointer::Unchanged,
        signal: false,
    };

    /// Decodes an entry; `None` when it has a number that its format does not have.
    pub(super) fn decode(format: OrcFormat, raw: [u8; ENTRY]) -> Option<Self> {
        let [cfa_low, cfa_high, bp_low, bp_high, registers, last] = raw;
        let (cfa, bp) = (registers & 0xf, registers >> 4);
        let bp_offset = i64::from(i16::from_le_bytes([bp_low, bp_high]));
        let (kind, signal) = match format {
            OrcFormat::Plain => plain_kind(cfa, last)?,
            OrcFormat::Signal | OrcFormat::Renumbered => kind(last)?,
        };
        Some(Self {
            kind,
            cfa: base(format, cfa)?,
            cfa_offset: i16::from_le_bytes([cfa_low, cfa_high]).into(),
            bp: match (format, bp) {
                (_, 0) => BasePointer::Unchanged,
                (OrcFormat::Renumbered, 8) | (OrcFormat::Plain | OrcFormat::Signal, 1) => {
                    BasePointer::AtCfa(bp_offset)
                }
                (_, 4) => BasePointer::AtBp(bp_offset),
                // A number that the format does not have.
                _ => return None,
            },
            signal,
        })
    }
}

/// Type in bits 0 and 1, end in bit 2. Formats that came later and have no header either set other
/// bits, by which they are told apart.
fn plain_kind(cfa: u8, last: u8) -> Option<(Kind, bool)> {
    let end = last & 4 != 0;
    Some(match (last & !4, cfa, end) {
        (0, 0, true) => (Kind::End, false),
        (0..=2, 0, false) => (Kind::Undefined, false),
        (0, _, false) => (Kind::Call, false),
        (1, _, false) => (Kind::Regs, true),
        (2, _, false) => (Kind::PartialRegs, true),
        _ => return None,
    })
}

/// Type in bits 0 to 2, signal in bit 3.
fn kind(last: u8) -> Option<(Kind, bool)> {
    let kind = match last & 7 {
        0 => Kind::Undefined,
        1 => Kind::End,
        2 => Kind::Call,
        3 => Kind::Regs,
        4 => Kind::PartialRegs,
        _ => return None,
    };
    (last >> 4 == 0).then_some((kind, last & 8 != 0))
}

fn base(format: OrcFormat, number: u8) -> Option<CfaBase> {
    use SavedRegister as S;
    // The older numbers, as the newer ones. The caller's stack pointer is no base for itself.
    let number = match (format, number) {
        (OrcFormat::Renumbered, number) => number,
        (_, 0) => 0,
        (_, 1) => 8,
        (_, 2) => 2,
        (_, 3) => 5,
        (_, 4) => 4,
        (_, 5) => 3,
        (_, 6) => 6,
        (_, 7) => 7,
        (_, 8) => 10,
        (_, 9) => 9,
        _ => return None,
    };
    Some(match number {
        0 | 8 => CfaBase::Unknown,
        1 => CfaBase::Saved(S::Ax),
        2 => CfaBase::Saved(S::Dx),
        3 => CfaBase::Sp,
        4 => CfaBase::Bp,
        5 => CfaBase::Saved(S::Di),
        6 => CfaBase::Saved(S::R10),
        7 => CfaBase::Saved(S::R13),
        9 => CfaBase::AtSp,
        10 => CfaBase::AtBp,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(format: OrcFormat, raw: [u8; ENTRY]) -> Rule {
        Rule::decode(format, raw).unwrap()
    }

    #[test]
    fn the_same_frame_in_three_formats() {
        let call = |signal| Rule {
            kind: Kind::Call,
            cfa: CfaBase::Sp,
            cfa_offset: 0x30,
            bp: BasePointer::AtCfa(-0x10),
            signal,
        };
        for (format, raw) in [
            (OrcFormat::Plain, [0x30, 0, 0xf0, 0xff, 0x15, 0]),
            (OrcFormat::Signal, [0x30, 0, 0xf0, 0xff, 0x15, 2]),
            (OrcFormat::Renumbered, [0x30, 0, 0xf0, 0xff, 0x83, 2]),
        ] {
            assert_eq!(rule(format, raw), call(false), "{format:?}");
        }
        let signal = rule(OrcFormat::Signal, [0x30, 0, 0xf0, 0xff, 0x15, 10]);
        assert_eq!(signal, call(true));
    }

    #[test]
    fn ends_and_interrupts() {
        let kind = |format, registers, last| {
            let rule = rule(format, [0, 0, 0, 0, registers, last]);
            (rule.kind, rule.signal)
        };
        for (format, registers, last, expected) in [
            (OrcFormat::Plain, 0, 4, (Kind::End, false)),
            (OrcFormat::Plain, 0, 0, (Kind::Undefined, false)),
            (OrcFormat::Plain, 5, 1, (Kind::Regs, true)),
            (OrcFormat::Plain, 9, 2, (Kind::PartialRegs, true)),
            (OrcFormat::Signal, 0, 0, (Kind::Undefined, false)),
            (OrcFormat::Signal, 0, 1, (Kind::End, false)),
            (OrcFormat::Signal, 5, 11, (Kind::Regs, true)),
            (OrcFormat::Renumbered, 3, 12, (Kind::PartialRegs, true)),
        ] {
            assert_eq!(kind(format, registers, last), expected, "{format:?} {last}");
        }
    }

    #[test]
    fn what_a_format_does_not_have_is_refused() {
        for (format, registers, last) in [
            (OrcFormat::Plain, 5, 3),
            (OrcFormat::Plain, 5, 4),
            (OrcFormat::Plain, 5, 9),
            (OrcFormat::Plain, 10, 0),
            (OrcFormat::Plain, 0x25, 0),
            (OrcFormat::Signal, 5, 5),
            (OrcFormat::Signal, 5, 0x12),
            (OrcFormat::Signal, 0xa5, 2),
            (OrcFormat::Renumbered, 11, 2),
            (OrcFormat::Renumbered, 0x13, 2),
        ] {
            let raw = [0, 0, 0, 0, registers, last];
            assert_eq!(Rule::decode(format, raw), None, "{format:?} {raw:x?}");
        }
    }
}
