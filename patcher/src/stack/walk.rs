//! From frame to frame (arch/x86/kernel/unwind_orc.c).

use super::areas::Areas;
use super::code::Code;
use super::layout::RegsLayout;
use super::orc::{BasePointer, CfaBase, Kind, Rule, SavedRegister};
use super::repair::Repairs;
use super::{Doubt, End, Frame, FrameKind, Reliability, StackKind, Trace, Why};
use crate::guest::{Gva, VcpuRegisters};

/// More frames than fit on all stacks that one context can be on.
const MAX_FRAMES: usize = 4096;
/// Privilege level in a code segment selector: not 0 is user mode.
const CPL: u64 = 3;

/// Registers that only an interrupted frame is known to have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Saved {
    bp: u64,
    ax: u64,
    dx: u64,
    di: u64,
    r10: u64,
    r13: u64,
}

impl Saved {
    pub(super) const fn of(registers: &VcpuRegisters) -> Self {
        Self {
            bp: registers.rbp,
            ax: registers.rax,
            dx: registers.rdx,
            di: registers.rdi,
            r10: registers.r10,
            r13: registers.r13,
        }
    }

    const fn get(&self, register: SavedRegister) -> u64 {
        match register {
            SavedRegister::Ax => self.ax,
            SavedRegister::Dx => self.dx,
            SavedRegister::Di => self.di,
            SavedRegister::R10 => self.r10,
            SavedRegister::R13 => self.r13,
        }
    }
}

/// Where a context is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Position {
    pub(super) ip: u64,
    pub(super) sp: u64,
    pub(super) bp: u64,
    /// The instruction at `ip` has yet to run; otherwise the one before it is a call.
    pub(super) interrupted: bool,
    pub(super) saved: Option<Saved>,
}

/// One walk down a stack.
pub(super) struct Walk<'w, 'a, 'm> {
    pub(super) code: &'w Code<'a, 'm>,
    pub(super) regs: &'w RegsLayout,
    pub(super) areas: Areas<'a, 'm>,
    pub(super) repairs: Repairs<'a, 'm>,
}

/// What one step led to.
enum Step {
    Frame { position: Position, frame: Frame },
    End(End),
}

impl Walk<'_, '_, '_> {
    /// Walks from `start`, whose address `frame` is, to the end of the stack.
    pub(super) fn run(mut self, start: Position, frame: Frame) -> Trace {
        let mut frames = Vec::with_capacity(16);
        frames.push(frame);
        let mut position = start;
        let mut doubt = None;
        loop {
            if frames.len() > MAX_FRAMES {
                doubt.get_or_insert(Doubt {
                    frame: MAX_FRAMES,
                    why: Why::TooDeep { limit: MAX_FRAMES },
                });
                break;
            }
            let here = frames.len() - 1;
            let mut note = |why| {
                doubt.get_or_insert(Doubt { frame: here, why });
            };
            match self.step(position, &mut note) {
                Ok(Step::Frame {
                    position: next,
                    frame,
                }) => {
                    frames.push(frame);
                    position = next;
                }
                Ok(Step::End(end)) => {
                    let reliability =
                        doubt.map_or(Reliability::Reliable(end), Reliability::Unreliable);
                    return Trace {
                        frames,
                        reliability,
                    };
                }
                Err(why) => {
                    note(why);
                    break;
                }
            }
        }
        let unknown = || Doubt {
            frame: frames.len(),
            why: Why::NoTables,
        };
        let doubt = doubt.unwrap_or_else(unknown);
        Trace {
            frames,
            reliability: Reliability::Unreliable(doubt),
        }
    }

    fn step(&mut self, from: Position, note: &mut dyn FnMut(Why)) -> Result<Step, Why> {
        let found = self.code.find(from.ip, from.interrupted)?;
        let rule = found.rule;
        if let Some(why) = found.doubt {
            note(why);
        }
        let at = Gva(from.ip);
        match rule.kind {
            Kind::Undefined => return Err(Why::Undefined { at }),
            // Thunks for indirect jumps are marked in the same way, for want of knowing whether they
            // were called (arch/x86/lib/retpoline.S before 6.4): there the stack goes on.
            Kind::End if from.interrupted && !self.areas.is_end(from.sp, self.regs.size) => {
                return Err(Why::Undefined { at });
            }
            Kind::End => return Ok(Step::End(End::Bottom)),
            Kind::Call | Kind::Regs | Kind::PartialRegs => {}
        }
        // The walk may have begun in code that ends a stack, with a stack pointer of user mode.
        if self.areas.kind().is_none() {
            self.areas.go_to(from.sp, 0)?;
        }
        let before = self.areas.kind();
        let cfa = self.cfa(&rule, from)?;
        let mut next = from;
        next.interrupted = rule.signal;
        let slot = match rule.kind {
            Kind::Call => {
                let slot = cfa.wrapping_sub(8);
                next.ip = self.areas.word(slot)?;
                next.sp = cfa;
                next.saved = None;
                slot
            }
            _ => {
                if let Some(end) = self.registers(rule.kind, cfa, &mut next)? {
                    return Ok(Step::End(end));
                }
                // Interrupted in the first instruction behind a return.
                next.sp.wrapping_sub(8)
            }
        };
        let stack = self.areas.kind().unwrap_or(StackKind::Register);
        let raw = next.ip;
        next.ip = self.repairs.real(raw, slot)?;
        next.bp = self.base_pointer(&rule, cfa, from, &next)?;
        let stayed = self.areas.kind() == before && self.areas.on_current(next.sp);
        if stayed && next.sp <= from.sp {
            return Err(Why::Backwards { sp: Gva(next.sp) });
        }
        let kind = match rule.signal {
            true => FrameKind::Interrupted,
            false => FrameKind::Called,
        };
        let frame = Frame {
            address: Gva(next.ip),
            kind,
            stack,
            repaired_from: (raw != next.ip).then_some(Gva(raw)),
        };
        Ok(Step::Frame {
            position: next,
            frame,
        })
    }

    /// The upper end of the frame.
    fn cfa(&mut self, rule: &Rule, from: Position) -> Result<u64, Why> {
        let offset = rule.cfa_offset;
        let lost = Why::LostRegister { at: Gva(from.ip) };
        Ok(match rule.cfa {
            CfaBase::Sp => from.sp.wrapping_add_signed(offset),
            CfaBase::Bp => from.bp.wrapping_add_signed(offset),
            CfaBase::AtSp => self.areas.word(from.sp)?.wrapping_add_signed(offset),
            CfaBase::AtBp => self.areas.word(from.bp.wrapping_add_signed(offset))?,
            CfaBase::Saved(register) => from.saved.ok_or(lost)?.get(register),
            CfaBase::Unknown => return Err(lost),
        })
    }

    /// Takes what was saved at `cfa` when the frame below was interrupted. Tells when that was user
    /// mode.
    fn registers(&mut self, kind: Kind, cfa: u64, next: &mut Position) -> Result<Option<End>, Why> {
        let layout = self.regs;
        let full = kind == Kind::Regs;
        // An interrupt pushes the last five words of the structure.
        let (base, len) = match full {
            true => (cfa, layout.size),
            false => (
                cfa.wrapping_sub(layout.ip),
                layout.size.saturating_sub(layout.ip),
            ),
        };
        self.areas.go_to(cfa, len)?;
        let areas = &mut self.areas;
        let mut word = |offset: u64| areas.word(base.wrapping_add(offset));
        next.ip = word(layout.ip)?;
        next.sp = word(layout.sp)?;
        if word(layout.cs)? & CPL != 0 {
            return Ok(Some(End::UserMode));
        }
        if full {
            next.saved = Some(Saved {
                bp: word(layout.bp)?,
                ax: word(layout.ax)?,
                dx: word(layout.dx)?,
                di: word(layout.di)?,
                r10: word(layout.r10)?,
                r13: word(layout.r13)?,
            });
        }
        Ok(None)
    }

    fn base_pointer(
        &mut self,
        rule: &Rule,
        cfa: u64,
        from: Position,
        next: &Position,
    ) -> Result<u64, Why> {
        match rule.bp {
            BasePointer::Unchanged => Ok(next.saved.map_or(from.bp, |saved| saved.bp)),
            BasePointer::AtCfa(offset) => self.areas.word(cfa.wrapping_add_signed(offset)),
            BasePointer::AtBp(offset) => self.areas.word(from.bp.wrapping_add_signed(offset)),
        }
    }
}
