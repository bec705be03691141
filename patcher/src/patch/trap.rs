//! How the hypervisor hears of a guest's breakpoint exceptions (#BP, vector 3): by a write to an
//! I/O port that takes the place of the first instruction of the guest's own handler.
//!
//! Guaranteed: while the trap is there, every `int3` leads to that write before any other
//! instruction of the handler, with nothing changed but what the CPU itself does to deliver the
//! exception (Intel SDM volume 3, 6.12.1; AMD64 APM volume 2, 8.9). So the hypervisor can undo the
//! delivery, exactly, or do what the replaced instruction did and let the handler go on.
//!
//! Why not the hypervisor's own interception of #BP: emulated SVM does not have it (QEMU's asks for
//! the intercept of INTn instead), while a port write leaves the guest on every CPU. The write
//! needs no register, no stack and no memory of ours, so page table isolation does not matter.
//!
//! Known: handlers as Linux has had them since 5.8, with or without ENDBR64, whose first instruction
//! is ASM_CLAC or the nop in its place. What is not understood is refused. FRED delivers exceptions
//! in another way and is refused.

use iced_x86::{Decoder, DecoderOptions, Mnemonic};

use super::PatchError;
use super::check::Check;
use super::report::Evidence;
use super::writing::still_ours;
use crate::guest::{Activity, Gva};
use crate::patch::Applied;
use crate::text::MAX_INSTRUCTION;

/// The I/O port that the trap writes to: nothing is there on a PC, and nothing of the guest's.
pub const TRAP_PORT: u8 = 0xe4;
/// OUT imm8,AL: no flag and no register changes.
const OUT: [u8; 2] = [0xe6, TRAP_PORT];
const NOP: u8 = 0x90;
/// #BP.
const VECTOR: u64 = 3;
/// Bytes of a gate in 64-bit mode (SDM volume 3, 6.14.1).
const GATE: usize = 16;
/// Present, any DPL, 64-bit interrupt gate, in a gate's sixth byte.
const INTERRUPT_GATE: u8 = 0x8e;
const KIND_OF_GATE: u8 = 0x9f;
/// CR4.FRED.
const CR4_FRED: u64 = 1 << 32;

/// Where the hypervisor hears of breakpoints, and how the handler goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TrapHandler {
    /// Where the CPU goes for #BP: the trap, or an ENDBR64 in front of it.
    pub(super) entry: Gva,
    /// The port write.
    pub at: Gva,
    /// What follows the instructions that it takes the place of.
    pub resume: Gva,
    /// Those instructions cleared RFLAGS.AC, and did nothing else.
    pub clears_ac: bool,
}

impl TrapHandler {
    /// RIP when the port write is done.
    #[must_use]
    pub const fn behind_write(&self) -> Gva {
        Gva(self.at.0.wrapping_add(OUT.len() as u64))
    }
}

/// A handler whose first instructions can make room.
pub(super) struct TrapSite {
    pub(super) handler: TrapHandler,
    pub(super) before: Vec<u8>,
    pub(super) after: Vec<u8>,
    pub(super) evidence: Evidence,
}

impl Check<'_> {
    /// Finds the guest's handler of #BP by its vCPUs' interrupt descriptor tables.
    pub(super) fn trap_site(&self) -> Result<TrapSite, PatchError> {
        let refused = |why: String| PatchError::NoBreakpoints(why);
        let entry = self.gate()?;
        let text = self.know.regions.text();
        if !text.contains(&entry.linked(self.located.slide)) {
            return Err(refused(format!(
                "the handler of #BP at {entry} is not in the kernel's text"
            )));
        }
        let mut code = [0; 3 * MAX_INSTRUCTION];
        self.located.space(&self.guest).read(entry, &mut code)?;
        let Some((offset, len, count, clears_ac)) = room(entry, &code) else {
            return Err(refused(format!(
                "the handler of #BP at {entry} begins with instructions that are not known"
            )));
        };
        let at = entry.offset(offset as u64);
        let before = code.get(offset..offset + len).unwrap_or_default().to_vec();
        let mut after = OUT.to_vec();
        after.resize(len, NOP);
        let resume = at.offset(len as u64);
        Ok(TrapSite {
            handler: TrapHandler {
                entry,
                at,
                resume,
                clears_ac,
            },
            before,
            after,
            evidence: self.nobody_inside(&(at..resume), count == 1)?,
        })
    }

    /// Where the gate of #BP leads on every vCPU that has started.
    fn gate(&self) -> Result<Gva, PatchError> {
        let refused = |why: &str| PatchError::NoBreakpoints(why.to_owned());
        let vcpus = self.guest.vcpus().iter();
        let mut started = vcpus.filter(|vcpu| vcpu.activity != Activity::NotStarted);
        let mut found = None;
        started.try_for_each(|vcpu| {
            if vcpu.registers.cr4 & CR4_FRED != 0 {
                return Err(refused("it uses FRED"));
            }
            let mut gate = [0; GATE];
            let at = Gva(vcpu.registers.idt_base).offset(VECTOR * GATE as u64);
            self.located.space(&self.guest).read(at, &mut gate)?;
            let leads = gate_leads_to(gate)
                .ok_or_else(|| refused("the gate of #BP is no interrupt gate"))?;
            match found.replace(leads) {
                Some(other) if other != leads => {
                    Err(refused("its vCPUs have different handlers of #BP"))
                }
                _ => Ok(()),
            }
        })?;
        found.ok_or_else(|| refused("no vCPU has started"))
    }

    /// Nobody has begun to handle a breakpoint that the hypervisor has not heard of.
    pub(super) fn nobody_at(&self, trap: &TrapHandler) -> Result<(), PatchError> {
        // The first byte of a range is where nothing has begun yet; here, that counts too.
        let from = Gva(trap.entry.0.saturating_sub(1));
        self.nobody_inside(&(from..trap.resume), false).map(|_| ())
    }

    /// The trap is what was put there.
    pub(super) fn trap_stands(&self, entry: &Applied) -> Result<(), PatchError> {
        still_ours(self, entry)
    }
}

fn gate_leads_to(gate: [u8; GATE]) -> Option<Gva> {
    let [a, b, _, _, _, kind, c, d, e, f, g, h, ..] = gate;
    // DPL, bits 5 and 6, is 3 for #BP: user programs may use it.
    (kind & KIND_OF_GATE == INTERRUPT_GATE)
        .then(|| Gva(u64::from_le_bytes([a, b, c, d, e, f, g, h])))
}

/// Whole instructions that can make room for the port write: offset, length, how many they are, and
/// whether CLAC is among them.
fn room(entry: Gva, code: &[u8]) -> Option<(usize, usize, usize, bool)> {
    let mut decoder = Decoder::with_ip(64, code, entry.0, DecoderOptions::NONE);
    let (mut start, mut len, mut count, mut clears_ac) = (0, 0, 0, false);
    while len < OUT.len() {
        let instruction = decoder.decode();
        match instruction.mnemonic() {
            Mnemonic::Endbr64 if start == 0 && len == 0 => {
                start = instruction.len();
                continue;
            }
            Mnemonic::Nop => {}
            Mnemonic::Clac => clears_ac = true,
            _ => return None,
        }
        len += instruction.len();
        count += 1;
    }
    Some((start, len, count, clears_ac))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_leads_to_its_handler() {
        // DPL 3, present, interrupt gate, no IST.
        let mut gate = [0; GATE];
        gate[..2].copy_from_slice(&[0x10, 0x0b]);
        gate[2..4].copy_from_slice(&[0x10, 0]);
        gate[5] = 0xee;
        gate[6..8].copy_from_slice(&[0x20, 0x82]);
        gate[8..12].copy_from_slice(&[0xff; 4]);
        assert_eq!(gate_leads_to(gate), Some(Gva(0xffff_ffff_8220_0b10)));
        for other in [0x6e, 0xef, 0xe5] {
            gate[5] = other;
            assert_eq!(gate_leads_to(gate), None, "{other:#x}");
        }
    }

    #[test]
    fn nops_and_clac_make_room_and_nothing_else_does() {
        let at = Gva(0xffff_ffff_8200_0b10);
        let room = |code: &[u8]| {
            let mut longer = code.to_vec();
            longer.resize(45, 0xcc);
            room(at, &longer)
        };
        let clac = [0x0f, 0x01, 0xca];
        let endbr = [0xf3, 0x0f, 0x1e, 0xfa];
        assert_eq!(room(&clac), Some((0, 3, 1, true)));
        assert_eq!(room(&[0x0f, 0x1f, 0x00]), Some((0, 3, 1, false)));
        assert_eq!(room(&[0x90, 0x90, 0x90]), Some((0, 2, 2, false)));
        assert_eq!(room(&[&endbr[..], &clac].concat()), Some((4, 3, 1, true)));
        // cld; push $-1
        assert_eq!(room(&[0xfc, 0x6a, 0xff]), None);
        assert_eq!(room(&[0x90, 0xfc]), None);
        assert_eq!(room(&[&endbr[..], &endbr].concat()), None);
        assert_eq!(room(&[0x06]), None);
    }
}
