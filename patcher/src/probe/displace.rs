//! Moving instructions to another place.
//!
//! What refers to its own address is written anew: operands relative to RIP, branches, and calls,
//! which are emulated (the address behind them is pushed, and they are jumped to), so that their
//! callees return to where the call stood.

use iced_x86::{
    ConstantOffsets, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register,
};

use crate::guest::Gva;
use crate::patch::code::{Fixup, Part, Resolved, Target, Width};
use crate::text::hex;

const CALL: &str = "a call can only be moved as the last instruction, because its callee returns \
                    to what follows it";

/// Why an instruction cannot be moved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the instruction at {at} ({bytes}) cannot be moved: {why}")]
pub struct DisplaceError {
    /// Where it is.
    pub at: Gva,
    /// Its bytes.
    pub bytes: String,
    /// What stands in the way.
    pub why: &'static str,
}

/// Instructions, ready to run elsewhere.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Displaced {
    /// Bytes that they have where they are.
    pub(crate) len: usize,
    /// How many they are.
    pub(crate) instructions: usize,
    /// What does the same elsewhere; offsets of `fixups` are into it.
    pub(crate) text: Vec<u8>,
    pub(crate) fixups: Vec<Fixup>,
    /// The last of them goes on to what follows.
    pub(crate) falls_through: bool,
    /// Where else they may go on by themselves.
    pub(crate) branches: Vec<Gva>,
}

/// Makes at least `least` bytes of whole instructions at `at` ready to be moved. `code` is what is
/// there now, and a little more.
pub(crate) fn displace(at: Gva, code: &[u8], least: usize) -> Result<Displaced, DisplaceError> {
    let mut decoder = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE);
    let mut moved = Displaced {
        falls_through: true,
        ..Displaced::default()
    };
    while moved.len < least {
        let instruction = decoder.decode();
        let bytes = code
            .get(moved.len..moved.len + instruction.len())
            .unwrap_or_default();
        let refuse = |why| DisplaceError {
            at: Gva(instruction.ip()),
            bytes: hex(bytes),
            why,
        };
        if instruction.is_invalid() || bytes.is_empty() {
            return Err(DisplaceError {
                bytes: hex(code.get(moved.len..).unwrap_or_default()),
                ..refuse("it is no instruction")
            });
        }
        let last = moved.len + bytes.len() >= least;
        let one = One {
            instruction: &instruction,
            bytes,
            offsets: decoder.get_constant_offsets(&instruction),
            last,
        };
        one.add_to(&mut moved).map_err(refuse)?;
        moved.len += bytes.len();
        moved.instructions += 1;
    }
    Ok(moved)
}

/// One instruction to be moved.
struct One<'a> {
    instruction: &'a Instruction,
    bytes: &'a [u8],
    offsets: ConstantOffsets,
    last: bool,
}

impl One<'_> {
    fn add_to(&self, moved: &mut Displaced) -> Result<(), &'static str> {
        if let Some(why) = bound_to_its_place(self.instruction) {
            return Err(why);
        }
        moved.falls_through = true;
        let target = Gva(self.instruction.near_branch_target());
        match self.instruction.flow_control() {
            FlowControl::Next => {
                // Room for a jump that nothing else uses.
                if self.instruction.mnemonic() == Mnemonic::Nop {
                    return Ok(());
                }
                self.copy(moved)
            }
            FlowControl::Return | FlowControl::IndirectBranch => {
                moved.falls_through = false;
                self.copy(moved)
            }
            FlowControl::UnconditionalBranch => {
                moved.falls_through = false;
                moved.jump(&[0xe9], target);
                moved.branches.push(target);
                Ok(())
            }
            FlowControl::ConditionalBranch => {
                self.conditional(moved, target)?;
                moved.branches.push(target);
                Ok(())
            }
            FlowControl::Call if self.instruction.is_call_near() => {
                self.push_return(moved)?;
                moved.jump(&[0xe9], target);
                Ok(())
            }
            FlowControl::IndirectCall => self.indirect_call(moved),
            FlowControl::Interrupt | FlowControl::Exception => {
                Err("it is a trap, which is told by its address")
            }
            FlowControl::XbeginXabortXend => Err("it is part of a transaction"),
            FlowControl::Call => Err("it leaves for a hypervisor or for user mode"),
        }
    }

    /// The instruction as it is, but for an operand relative to RIP.
    fn copy(&self, moved: &mut Displaced) -> Result<(), &'static str> {
        let start = moved.text.len();
        moved.text.extend_from_slice(self.bytes);
        if !self.instruction.is_ip_rel_memory_operand() {
            return Ok(());
        }
        let at = self.offsets.displacement_offset();
        let behind = i64::try_from(self.bytes.len() - at).unwrap_or(0);
        moved.fixups.push(Fixup {
            part: Part::Code,
            offset: start + at,
            width: Width::Relative32,
            target: Target::Kernel(Resolved::Absolute(self.instruction.ip_rel_memory_address())),
            addend: -behind,
        });
        Ok(())
    }

    fn conditional(&self, moved: &mut Displaced, target: Gva) -> Result<(), &'static str> {
        let instruction = self.instruction;
        if instruction.is_jcc_short_or_near() {
            // 7x rel8, or 0f 8x rel32.
            let opcode = match self.bytes.iter().find(|byte| (0x70..0x90).contains(*byte)) {
                Some(opcode) => 0x80 | (opcode & 0xf),
                None => return Err("its condition is not understood"),
            };
            moved.jump(&[0x0f, opcode], target);
            return Ok(());
        }
        // LOOPcc and JRCXZ reach 127 bytes: over the next jump, to the one that is taken.
        let Some((_, opcode)) = self.bytes.split_last() else {
            return Err("its condition is not understood");
        };
        moved.text.extend_from_slice(opcode);
        moved.text.extend_from_slice(&[2, 0xeb, 5]);
        moved.jump(&[0xe9], target);
        Ok(())
    }

    /// A call by the value of an operand: the same operand of a jump.
    fn indirect_call(&self, moved: &mut Displaced) -> Result<(), &'static str> {
        let instruction = self.instruction;
        let stack = |register: Register| register.full_register() == Register::RSP;
        let operand = instruction.op0_kind();
        let by_stack = match operand {
            OpKind::Register => stack(instruction.op0_register()),
            _ => stack(instruction.memory_base()) || stack(instruction.memory_index()),
        };
        if by_stack {
            return Err("its target depends on the stack pointer");
        }
        self.push_return(moved)?;
        let start = moved.text.len();
        self.copy(moved)?;
        // ff /2 is CALL, ff /4 is JMP.
        let new = moved.text.get_mut(start..).unwrap_or_default();
        let opcode = new.iter().position(|byte| *byte == 0xff);
        match opcode.and_then(|at| new.get_mut(at + 1)) {
            Some(modrm) if (*modrm >> 3) & 7 == 2 => {
                *modrm = (*modrm & !0x38) | (4 << 3);
                Ok(())
            }
            _ => Err("it is a far call"),
        }
    }

    /// PUSH imm32 is sign-extended: it reaches the kernel's half of the top 2 GiB.
    fn push_return(&self, moved: &mut Displaced) -> Result<(), &'static str> {
        if !self.last {
            return Err(CALL);
        }
        moved.falls_through = false;
        moved.text.push(0x68);
        moved.fixup(Width::Signed32, Gva(self.instruction.next_ip()), 0);
        moved.branches.push(Gva(self.instruction.next_ip()));
        Ok(())
    }
}

impl Displaced {
    fn jump(&mut self, opcode: &[u8], target: Gva) {
        self.text.extend_from_slice(opcode);
        self.fixup(Width::Relative32, target, -4);
    }

    fn fixup(&mut self, width: Width, target: Gva, addend: i64) {
        self.fixups.push(Fixup {
            part: Part::Code,
            offset: self.text.len(),
            width,
            target: Target::Kernel(Resolved::Absolute(target.0)),
            addend,
        });
        self.text.extend_from_slice(&[0; 4]);
    }
}

/// Instructions whose effect depends on where they are or on what comes next.
fn bound_to_its_place(instruction: &Instruction) -> Option<&'static str> {
    use Mnemonic as M;
    let loads_ss = instruction.op0_kind() == OpKind::Register
        && instruction.op0_register() == Register::SS
        && matches!(instruction.mnemonic(), M::Mov | M::Pop);
    match instruction.mnemonic() {
        _ if loads_ss => Some("interrupts wait for the instruction behind it"),
        M::Sti | M::Lss => Some("interrupts wait for the instruction behind it"),
        M::Endbr64 | M::Endbr32 => Some("it is where indirect calls may land"),
        M::Int3 | M::Int1 | M::Ud0 | M::Ud1 | M::Ud2 => {
            Some("it is a trap, which is told by its address")
        }
        M::Hlt | M::Mwait | M::Mwaitx | M::Umwait | M::Monitor | M::Monitorx => {
            Some("it waits for interrupts")
        }
        M::Iret
        | M::Iretd
        | M::Iretq
        | M::Sysretq
        | M::Sysret
        | M::Sysexit
        | M::Sysexitq
        | M::Syscall
        | M::Sysenter
        | M::Swapgs
        | M::Eretu
        | M::Erets => Some("it enters or leaves the kernel"),
        M::Retf => Some("it is a far return"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Gva = Gva(0xffff_ffff_8123_4560);

    fn moved(code: &[u8]) -> Displaced {
        let mut longer = code.to_vec();
        longer.extend_from_slice(&[0xc3; 16]);
        displace(AT, &longer, 5).unwrap()
    }

    fn refused(code: &[u8]) -> &'static str {
        let mut longer = code.to_vec();
        longer.extend_from_slice(&[0xc3; 16]);
        displace(AT, &longer, 5).unwrap_err().why
    }

    fn target(fixup: &Fixup) -> u64 {
        match fixup.target {
            Target::Kernel(Resolved::Absolute(target)) => target,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn plain_instructions_are_copied_whole() {
        // push %rbp; mov %rsp,%rbp; push %r12
        let code = [0x55, 0x48, 0x89, 0xe5, 0x41, 0x54];
        let moved = moved(&code);
        assert_eq!((moved.len, moved.instructions), (6, 3));
        assert_eq!(moved.text, code);
        assert!(moved.falls_through && moved.fixups.is_empty());
    }

    #[test]
    fn the_tracers_nop_takes_no_room() {
        let moved = moved(&[0x0f, 0x1f, 0x44, 0, 0]);
        assert_eq!((moved.len, moved.text.len()), (5, 0));
    }

    #[test]
    fn operands_relative_to_rip_still_mean_the_same() {
        // movl $7, 0x100(%rip): an immediate follows the displacement.
        let moved = moved(&[0xc7, 0x05, 0, 1, 0, 0, 7, 0, 0, 0]);
        let fixup = moved.fixups[0];
        assert_eq!(target(&fixup), AT.0 + 10 + 0x100);
        assert_eq!((fixup.offset, fixup.addend), (2, -8));
        assert_eq!(&moved.text[6..], [7, 0, 0, 0]);
    }

    #[test]
    fn branches_lead_where_they_led() {
        // je +0x10; xor %eax,%eax; nop
        let moved = moved(&[0x74, 0x10, 0x31, 0xc0, 0x90]);
        assert_eq!(&moved.text[..2], [0x0f, 0x84]);
        assert_eq!(target(&moved.fixups[0]), AT.0 + 0x12);
        assert_eq!(moved.branches, [AT.offset(0x12)]);
        assert_eq!(&moved.text[6..], [0x31, 0xc0]);

        // jrcxz -2: over the way on, to the way out.
        let moved = super::displace(AT, &[0xe3, 0xfe, 0x90, 0x90, 0x90, 0x90], 5).unwrap();
        assert_eq!(&moved.text[..5], [0xe3, 2, 0xeb, 5, 0xe9]);
        assert_eq!(target(&moved.fixups[0]), AT.0);
    }

    #[test]
    fn a_call_returns_to_where_it_stood() {
        let moved = moved(&[0xe8, 0x10, 0, 0, 0]);
        assert_eq!(moved.text, [0x68, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0]);
        assert_eq!(target(&moved.fixups[0]), AT.0 + 5);
        assert_eq!(moved.fixups[0].width, Width::Signed32);
        assert_eq!(target(&moved.fixups[1]), AT.0 + 0x15);
        assert!(!moved.falls_through);
        // push %rbx; call *%rax; xor %ebx,%ebx: more would follow the call.
        assert_eq!(refused(&[0x53, 0xff, 0xd0, 0x31, 0xdb]), CALL);
        // lea (%rax),%rbx ; call *0x10(%rax)
        let moved = super::displace(AT, &[0x48, 0x8d, 0x18, 0xff, 0x50, 0x10, 0xc3], 5).unwrap();
        assert_eq!(moved.text[3], 0x68);
        assert_eq!(&moved.text[8..], [0xff, 0x60, 0x10]);
        // call *0x8(%rsp): 5 bytes with a prefix
        assert!(refused(&[0x2e, 0xff, 0x54, 0x24, 0x08]).contains("stack pointer"));
    }

    #[test]
    fn what_is_told_by_its_address_stays() {
        assert!(refused(&[0x0f, 0x0b, 0x90, 0x90, 0x90]).contains("trap"));
        assert!(refused(&[0xcc, 0x90, 0x90, 0x90, 0x90]).contains("trap"));
        assert!(refused(&[0xfb, 0xf4, 0x90, 0x90, 0x90]).contains("interrupts"));
        assert!(refused(&[0xf3, 0x0f, 0x1e, 0xfa, 0x90]).contains("land"));
        assert!(refused(&[0x0f, 0x01, 0xf8, 0x90, 0x90]).contains("kernel"));
        assert!(refused(&[0x06]).contains("no instruction"));
    }
}
