//! What a trampoline does at one moment: saving what its acts need, the acts, and restoring.
//!
//! How much is saved depends on what the acts need:
//!
//! * counting needs the flags only;
//! * how long a function took, and a callback at its entry or return that looks at no registers: those
//!   that a function may change;
//! * everything else: all general registers, as `struct stillpoint_args` shows them.
//!
//! At a site the saved frame begins with an address of the site and the frame pointer, so that an
//! unwinder that meets unknown code and follows frame pointers (`orc_fp_entry`,
//! arch/x86/kernel/unwind_orc.c) comes to the probed function. When a function has returned, the frame
//! that waited for it is still there, and leads to the function's caller.

use super::asm::Reg::{self, *};
use super::asm::{Asm, Forward};
use super::returning::ReturnFrame;
use super::trampoline::{Act, Action, Plan};
use crate::guest::Gva;

/// What is saved around the acts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Frame {
    Flags,
    Scratch { guarded: bool },
    All,
}

/// What a called function may change, but for what is free at its entry: r10 and r11 (as in
/// `save_mcount_regs`, arch/x86/kernel/ftrace_64.S).
const SCRATCH: [Reg; 7] = [Rax, Rcx, Rdx, Rsi, Rdi, R8, R9];
/// All but the stack and frame pointers, in the order of [`Register::saved_at`] from the end.
///
/// [`Register::saved_at`]: super::callback::Register::saved_at
const ALL: [Reg; 14] = [
    Rdi, Rsi, Rdx, Rcx, Rax, R8, R9, R10, R11, Rbx, R12, R13, R14, R15,
];
/// Bytes between the stack pointer at the site and the first saved register: address of the site,
/// frame pointer and flags.
const HEAD_BYTES: u8 = 3 * 8;
/// Value, site and stack pointer: what callbacks are shown beside registers.
const TAIL_BYTES: u8 = 3 * 8;
/// Where the flags are in a whole frame, from the stack pointer on.
pub(super) const FLAGS_AT: u8 = TAIL_BYTES + 14 * 8;

/// A part that is jumped to rarely, and comes back.
pub(super) struct Aside {
    pub(super) from: Vec<Forward>,
    pub(super) count: Gva,
    pub(super) back: usize,
}

/// All that is done at one moment.
pub(super) struct Section<'a> {
    pub(super) plan: &'a Plan<'a>,
    pub(super) frame: Frame,
    /// The frame that waited for the function's return, when this is after it.
    pub(super) waited: Option<&'a ReturnFrame>,
    acts: Vec<&'a Act>,
}

impl<'a> Section<'a> {
    /// Before what was displaced.
    pub(super) fn reached(plan: &'a Plan<'a>, acts: Vec<&'a Act>) -> Self {
        Self {
            plan,
            frame: Frame::of(&acts, plan.entry),
            waited: None,
            acts,
        }
    }

    /// After the function has returned, in `frame`.
    pub(super) fn returned(plan: &'a Plan<'a>, acts: Vec<&'a Act>, frame: &'a ReturnFrame) -> Self {
        Self {
            plan,
            frame: Frame::of(&acts, true),
            waited: Some(frame),
            acts,
        }
    }

    /// Puts its code behind what is there.
    pub(super) fn put(&self, asm: &mut Asm, asides: &mut Vec<Aside>) {
        if self.acts.is_empty() {
            return;
        }
        self.save(asm);
        if self.waited.is_some_and(|frame| frame.timed) {
            ReturnFrame::put_duration(asm);
        }
        if guarded(&self.acts) {
            self.level(asm);
        }
        for act in &self.acts {
            self.act(act, asm, asides);
        }
        self.restore(asm);
    }

    fn save(&self, asm: &mut Asm) {
        match (self.frame, self.waited) {
            (Frame::Flags, _) | (Frame::Scratch { .. }, Some(_)) => {}
            (Frame::All, Some(_)) => asm.raw(&[0xff, 0x75, 0]), // push (%rbp): the caller's
            (Frame::Scratch { .. } | Frame::All, None) => {
                if !self.plan.called {
                    // Unwinders look up what is before a return address.
                    asm.push_address(self.plan.site.offset(1));
                }
                asm.push(Rbp);
                asm.raw(&[0x48, 0x89, 0xe5]); // mov %rsp,%rbp
            }
        }
        asm.raw(&[0x9c]); // pushfq
        match self.frame {
            Frame::Flags => {}
            Frame::Scratch { guarded } => {
                SCRATCH.iter().for_each(|reg| asm.push(*reg));
                if guarded {
                    asm.push(Rbx);
                    asm.push(R12);
                }
            }
            Frame::All => {
                ALL.iter().for_each(|reg| asm.push(*reg));
                match self.waited {
                    // lea 8(%rbp),%rax: as at the entry
                    Some(_) => asm.raw(&[0x48, 0x8d, 0x45, 8]),
                    None => {
                        let above = HEAD_BYTES + 14 * 8 - if self.plan.called { 8 } else { 0 };
                        // lea above(%rsp),%rax
                        asm.raw(&[0x48, 0x8d, 0x84, 0x24, above, 0, 0, 0]);
                    }
                }
                asm.push(Rax);
                asm.push_address(self.plan.site);
                asm.push(Rax); // the value of the act, later
            }
        }
    }

    fn restore(&self, asm: &mut Asm) {
        match self.frame {
            Frame::Flags => {}
            Frame::Scratch { guarded } => {
                if guarded {
                    asm.pop(R12);
                    asm.pop(Rbx);
                }
                SCRATCH.iter().rev().for_each(|reg| asm.pop(*reg));
            }
            Frame::All => {
                asm.raw(&[0x48, 0x8d, 0x64, 0x24, TAIL_BYTES]); // lea 24(%rsp),%rsp
                ALL.iter().rev().for_each(|reg| asm.pop(*reg));
            }
        }
        asm.raw(&[0x9d]); // popfq
        // What is below the frame that waited goes with it.
        if self.frame != Frame::Flags && self.waited.is_none() {
            asm.pop(Rbp);
            if !self.plan.called {
                asm.raw(&[0x48, 0x8d, 0x64, 0x24, 0x08]); // lea 8(%rsp),%rsp
            }
        }
    }

    /// How deep in interrupts this is, in %ebx: 0 in a task, 1 in a softirq, 2 to 8 where softirqs are
    /// off, 9 to 12 in an interrupt, 13 to 16 in a non-maskable one; and the task in %r12.
    fn level(&self, asm: &mut Asm) {
        let Some(variables) = self.plan.variables else {
            return;
        };
        // movzwl %gs:preempt+1,%ebx: softirq, hardirq and NMI counts
        asm.at_per_cpu(&[0x65, 0x0f, 0xb7, 0x1c, 0x25], variables.preempt, 1);
        asm.raw(&[0x8d, 0x5c, 0x1b, 0x01]); // lea 1(%rbx,%rbx),%ebx
        asm.raw(&[0x0f, 0xbd, 0xdb]); // bsr %ebx,%ebx
        // mov %gs:task,%r12
        asm.at_per_cpu(&[0x65, 0x4c, 0x8b, 0x24, 0x25], variables.task, 0);
    }
}

impl Frame {
    fn of(acts: &[&Act], scratch_is_free: bool) -> Self {
        let counts = |act: &Act| act.action == Action::Count && act.only_if.is_none();
        let short = |act: &Act| match &act.action {
            Action::Count | Action::Latency => act.only_if.is_none(),
            Action::Call { needs, .. } => {
                let plain = needs.no_registers && !needs.may_sleep && !needs.needs_rcu;
                scratch_is_free && plain && act.only_if.is_none()
            }
            Action::Histogram(_) | Action::Record { .. } => false,
        };
        if acts.iter().all(|act| counts(act)) {
            Self::Flags
        } else if acts.iter().all(|act| short(act)) {
            Self::Scratch {
                guarded: guarded(acts),
            }
        } else {
            Self::All
        }
    }
}

fn guarded(acts: &[&Act]) -> bool {
    let nests = |act: &&Act| matches!(act.action, Action::Call { nests: true, .. });
    acts.iter().any(nests)
}

/// Puts what is jumped to rarely behind everything.
pub(super) fn put_asides(asm: &mut Asm, asides: Vec<Aside>) {
    for aside in asides {
        for from in aside.from {
            asm.here(from);
        }
        asm.count(aside.count);
        asm.jump_back(aside.back);
    }
}
