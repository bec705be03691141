//! Machine code put together instruction by instruction, with the relocations that it needs.

use super::callback::Needs;
use crate::guest::Gva;
use crate::patch::code::{Code, Fixup, Part, Resolved, Target, Width};

/// The sixteen general registers, by their number in an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reg {
    Rax,
    Rcx,
    Rdx,
    Rbx,
    Rbp,
    Rsi,
    Rdi,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
}

impl Reg {
    const fn number(self) -> u8 {
        match self {
            Self::Rax => 0,
            Self::Rcx => 1,
            Self::Rdx => 2,
            Self::Rbx => 3,
            Self::Rbp => 5,
            Self::Rsi => 6,
            Self::Rdi => 7,
            Self::R8 => 8,
            Self::R9 => 9,
            Self::R10 => 10,
            Self::R11 => 11,
            Self::R12 => 12,
            Self::R13 => 13,
            Self::R14 => 14,
            Self::R15 => 15,
        }
    }
}

/// A jump or call whose end is not known yet.
#[derive(Debug)]
#[must_use]
pub(super) struct Forward(usize);

/// Code that grows.
#[derive(Debug, Default)]
pub(super) struct Asm {
    pub(super) text: Vec<u8>,
    pub(super) fixups: Vec<Fixup>,
}

impl Asm {
    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.text.extend_from_slice(bytes);
    }

    /// Bytes that end with a 32-bit value, which is `target` plus `addend`.
    fn with_target(&mut self, bytes: &[u8], width: Width, target: Resolved, addend: i64) {
        self.raw(bytes);
        self.fixups.push(Fixup {
            part: Part::Code,
            offset: self.text.len(),
            width,
            target: Target::Kernel(target),
            addend,
        });
        self.raw(&[0; 4]);
    }

    pub(super) fn push(&mut self, reg: Reg) {
        self.with_register(0x50, reg);
    }

    pub(super) fn pop(&mut self, reg: Reg) {
        self.with_register(0x58, reg);
    }

    fn with_register(&mut self, opcode: u8, reg: Reg) {
        let number = reg.number();
        if number >= 8 {
            self.raw(&[0x41]);
        }
        self.raw(&[opcode | number & 7]);
    }

    /// `push $address`: kernel addresses are sign-extended.
    pub(super) fn push_address(&mut self, at: Gva) {
        self.with_target(&[0x68], Width::Signed32, Resolved::Absolute(at.0), 0);
    }

    /// An instruction whose ModR/M byte says "an absolute address": `opcode` ends with it and the
    /// SIB byte. Kernel addresses are sign-extended.
    pub(super) fn at_absolute(&mut self, opcode: &[u8], at: Gva) {
        self.with_target(opcode, Width::Signed32, Resolved::Absolute(at.0), 0);
    }

    /// The same for a variable of the CPU that runs, `addend` bytes into it. `opcode` begins with
    /// the prefix for GS.
    pub(super) fn at_per_cpu(&mut self, opcode: &[u8], variable: PerCpu, addend: i64) {
        let PerCpu { base, offset } = variable;
        let addend = addend.wrapping_add_unsigned(offset);
        self.with_target(opcode, Width::Signed32, base, addend);
    }

    /// The same for something of the kernel's.
    pub(super) fn at_symbol(&mut self, opcode: &[u8], symbol: Resolved) {
        self.with_target(opcode, Width::Signed32, symbol, 0);
    }

    /// Bytes that end with a displacement.
    pub(super) fn with_displacement(&mut self, bytes: &[u8], displacement: i32) {
        self.raw(bytes);
        self.raw(&displacement.to_le_bytes());
    }

    /// `movabs $value,reg`
    pub(super) fn load(&mut self, reg: Reg, value: u64) {
        let number = reg.number();
        self.raw(&[0x48 | number >> 3, 0xb8 | number & 7]);
        self.raw(&value.to_le_bytes());
    }

    /// A return as this kernel does it; `thunk` is `__x86_return_thunk`, where there is one.
    pub(super) fn ret(&mut self, thunk: Option<Resolved>) {
        let Some(thunk) = thunk else {
            self.raw(&[0xc3]);
            return;
        };
        self.raw(&[0xe9]);
        self.fixups.push(Fixup {
            part: Part::Code,
            offset: self.text.len(),
            width: Width::Relative32,
            target: Target::Return(thunk),
            addend: -4,
        });
        self.raw(&[0; 4]);
    }

    /// Code that begins with the first byte.
    pub(super) fn into_code(self) -> Code {
        Code {
            instructions: std::iter::once(0..self.text.len()).collect(),
            text: self.text,
            text_align: 16,
            data: Vec::new(),
            data_align: 16,
            fixups: self.fixups,
            functions: Vec::new(),
            needs: Needs::default(),
            keeps_frames: false,
            keep: None,
        }
    }

    /// `lock incq at`
    pub(super) fn count(&mut self, at: Gva) {
        self.at_absolute(&[0xf0, 0x48, 0xff, 0x04, 0x25], at);
    }

    pub(super) fn call(&mut self, to: Resolved) {
        self.with_target(&[0xe8], Width::Relative32, to, -4);
    }

    pub(super) fn jump(&mut self, to: Gva) {
        self.with_target(&[0xe9], Width::Relative32, Resolved::Absolute(to.0), -4);
    }

    /// A jump on a condition, by its second opcode byte (0x84: equal, ...).
    pub(super) fn jump_if(&mut self, condition: u8) -> Forward {
        self.raw(&[0x0f, condition, 0, 0, 0, 0]);
        Forward(self.text.len())
    }

    /// A call of what comes later.
    pub(super) fn call_ahead(&mut self) -> Forward {
        self.raw(&[0xe8, 0, 0, 0, 0]);
        Forward(self.text.len())
    }

    /// A jump to `to` bytes from the start.
    pub(super) fn jump_back(&mut self, to: usize) {
        let distance = i32::try_from(self.text.len() + 5 - to).unwrap_or(0);
        self.raw(&[0xe9]);
        self.raw(&(-distance).to_le_bytes());
    }

    /// Where `jump` leads.
    pub(super) fn here(&mut self, jump: Forward) {
        let distance = u32::try_from(self.text.len() - jump.0).unwrap_or(0);
        let from = jump.0.saturating_sub(4);
        if let Some(to) = self.text.get_mut(from..jump.0) {
            to.copy_from_slice(&distance.to_le_bytes());
        }
    }

    /// Code made elsewhere.
    pub(super) fn append(&mut self, text: &[u8], fixups: &[Fixup]) {
        let base = self.text.len();
        self.raw(text);
        self.fixups.extend(fixups.iter().map(|fixup| Fixup {
            offset: base + fixup.offset,
            ..*fixup
        }));
    }
}

/// Where a per-CPU variable is, as instructions of the kernel name it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PerCpu {
    pub(crate) base: Resolved,
    /// Of a member of it.
    pub(crate) offset: u64,
}
