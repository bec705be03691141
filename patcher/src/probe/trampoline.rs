//! What a site jumps to.
//!
//! A trampoline does what every probe of its site asks for, in order, then what was displaced, and
//! goes back. Each probe's data are immediates in it, so that a callback and its data cannot be torn
//! apart: another set of probes is another trampoline. Everything that it needs is saved before and
//! restored after, flags included; how much that is depends on what the probes need:
//!
//! * counting needs the flags only;
//! * a callback at a function's entry that looks at no registers: those that a function may change;
//! * everything else: all general registers, as `struct stillpoint_args` shows them.
//!
//! The saved frame begins with an address of the site and the frame pointer, so that an unwinder
//! that meets unknown code and follows frame pointers (`orc_fp_entry`, arch/x86/kernel/unwind_orc.c)
//! comes to the probed function.

use super::asm::{Asm, Forward, PerCpu, Reg};
use super::callback::{Needs, Predicate, Register};
use super::displace::Displaced;
use crate::guest::Gva;
use crate::patch::code::{Code, Resolved};
use crate::rules::{self, Rule};

/// Offsets in the data of a probe, all of them in one cache line that no other probe has.
pub(crate) mod data {
    /// How often it was called, or its site reached.
    pub(crate) const HITS: u64 = 0;
    /// How often it was skipped: nested, or where it may not be called.
    pub(crate) const SKIPPED: u64 = 8;
    /// What `struct stillpoint_args` begins with, for callbacks that look at nothing else.
    pub(crate) const ARGS: u64 = 16;
    /// Records that were not made.
    pub(crate) const LOST: u64 = 32;
    /// Number of the next record.
    pub(crate) const HEAD: u64 = 40;
    /// Histograms and records.
    pub(crate) const MORE: u64 = 64;
}

/// Buckets of a histogram: values without a bit set, and one for each highest bit.
pub(crate) const BUCKETS: u64 = 65;
/// Bytes of a record: its number plus one, a time stamp, the task, the CPU, four registers.
pub(crate) const RECORD: u64 = 64;
/// Set in the number of a record that is being written.
pub(crate) const UNFINISHED: u64 = 1 << 63;
/// Registers of a record.
pub(crate) const RECORDED: usize = 4;

/// Where the guest's kernel keeps what trampolines look at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Variables {
    /// Number of the CPU: 32 bits.
    pub(crate) cpu: PerCpu,
    /// The task that runs.
    pub(crate) task: PerCpu,
    /// `__preempt_count`.
    pub(crate) preempt: PerCpu,
    /// Offset of `task_struct.trace_recursion`.
    pub(crate) recursion: u64,
    /// `rcu_is_watching()`.
    pub(crate) rcu_is_watching: Resolved,
    /// The preempt count counts: without CONFIG_PREEMPT_COUNT it is always 0.
    pub(crate) counted: bool,
}

/// What a probe does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Action {
    Count,
    Call {
        function: Gva,
        /// It can come to a probe while it runs.
        nests: bool,
        needs: Needs,
    },
    Histogram(Register),
    Record {
        registers: Vec<Register>,
        /// A power of two.
        records: u64,
    },
}

/// One probe of a site.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Act {
    pub(crate) action: Action,
    pub(crate) only_if: Option<Predicate>,
    /// What the callback is given.
    pub(crate) value: u64,
    /// Where its data are.
    pub(crate) data: Gva,
}

/// A site, and everything that is done there.
#[derive(Clone, Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) site: Gva,
    pub(crate) displaced: &'a Displaced,
    pub(crate) acts: &'a [Act],
    /// It is where the kernel's own tracer would be: what a called function may change is free.
    pub(crate) entry: bool,
    /// It is no site but a function that somebody calls: what is on the stack is where it returns to.
    pub(crate) called: bool,
    pub(crate) variables: Option<&'a Variables>,
}

/// What is saved around the acts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Frame {
    Flags,
    Scratch { guarded: bool },
    All,
}

use Reg::*;

/// What a called function may change, but for what is free at its entry: r10 and r11 (as in
/// `save_mcount_regs`, arch/x86/kernel/ftrace_64.S).
const SCRATCH: [Reg; 7] = [Rax, Rcx, Rdx, Rsi, Rdi, R8, R9];
/// All but the stack and frame pointers, in the order of [`Register::saved_at`] from the end.
const ALL: [Reg; 14] = [
    Rdi, Rsi, Rdx, Rcx, Rax, R8, R9, R10, R11, Rbx, R12, R13, R14, R15,
];
/// Bytes between the stack pointer at the site and the first saved register: address of the site,
/// frame pointer and flags.
const HEAD_BYTES: u8 = 3 * 8;
/// Value, site and stack pointer: what callbacks are shown beside registers.
const TAIL_BYTES: u8 = 3 * 8;
/// Where the flags are in a whole frame, from the stack pointer on.
const FLAGS_AT: u8 = TAIL_BYTES + 14 * 8;

impl Frame {
    fn of(plan: &Plan<'_>) -> Self {
        let short = |act: &Act| match &act.action {
            Action::Count => act.only_if.is_none(),
            Action::Call { needs, .. } => {
                let plain = needs.no_registers && !needs.may_sleep && !needs.needs_rcu;
                plan.entry && plain && act.only_if.is_none()
            }
            Action::Histogram(_) | Action::Record { .. } => false,
        };
        let counts = |act: &Act| act.action == Action::Count && act.only_if.is_none();
        if plan.acts.iter().all(counts) {
            Self::Flags
        } else if plan.acts.iter().all(short) {
            Self::Scratch {
                guarded: plan.guarded(),
            }
        } else {
            Self::All
        }
    }
}

impl Plan<'_> {
    fn guarded(&self) -> bool {
        let nests = |act: &Act| matches!(act.action, Action::Call { nests: true, .. });
        self.acts.iter().any(nests)
    }
}

/// A part that is jumped to rarely, and comes back.
struct Aside {
    from: Vec<Forward>,
    count: Gva,
    back: usize,
}

struct Builder<'a> {
    asm: Asm,
    frame: Frame,
    asides: Vec<Aside>,
    plan: &'a Plan<'a>,
}

/// The trampoline of a site.
pub(crate) fn trampoline(plan: &Plan<'_>) -> Code {
    let mut builder = Builder {
        asm: Asm::default(),
        frame: Frame::of(plan),
        asides: Vec::new(),
        plan,
    };
    if !plan.acts.is_empty() {
        builder.save();
        for act in plan.acts {
            builder.act(act);
        }
        builder.restore();
    }
    let displaced = plan.displaced;
    builder.asm.append(&displaced.text, &displaced.fixups);
    if displaced.falls_through {
        builder.asm.jump(plan.site.offset(displaced.len as u64));
    }
    builder.put_asides();
    builder.asm.into_code()
}

impl Builder<'_> {
    fn save(&mut self) {
        let asm = &mut self.asm;
        if self.frame == Frame::Flags {
            asm.raw(&[0x9c]); // pushfq
            return;
        }
        if !self.plan.called {
            // Unwinders look up what is before a return address.
            asm.push_address(self.plan.site.offset(1));
        }
        asm.push(Rbp);
        asm.raw(&[0x48, 0x89, 0xe5]); // mov %rsp,%rbp
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
                let above = HEAD_BYTES + 14 * 8 - if self.plan.called { 8 } else { 0 };
                asm.raw(&[0x48, 0x8d, 0x84, 0x24, above, 0, 0, 0]); // lea above(%rsp),%rax
                asm.push(Rax);
                asm.push_address(self.plan.site);
                asm.push(Rax); // the value of the act, later
            }
        }
        if self.plan.guarded() {
            self.level();
        }
    }

    /// How deep in interrupts this is, in %ebx: 0 in a task, 1 in a softirq, 2 to 8 where softirqs are
    /// off, 9 to 12 in an interrupt, 13 to 16 in a non-maskable one; and the task in %r12.
    fn level(&mut self) {
        let Some(variables) = self.plan.variables else {
            return;
        };
        let asm = &mut self.asm;
        // movzwl %gs:preempt+1,%ebx: softirq, hardirq and NMI counts
        asm.at_per_cpu(&[0x65, 0x0f, 0xb7, 0x1c, 0x25], variables.preempt, 1);
        asm.raw(&[0x8d, 0x5c, 0x1b, 0x01]); // lea 1(%rbx,%rbx),%ebx
        asm.raw(&[0x0f, 0xbd, 0xdb]); // bsr %ebx,%ebx
        // mov %gs:task,%r12
        asm.at_per_cpu(&[0x65, 0x4c, 0x8b, 0x24, 0x25], variables.task, 0);
    }

    fn restore(&mut self) {
        let asm = &mut self.asm;
        match self.frame {
            Frame::Flags => {
                asm.raw(&[0x9d]); // popfq
                return;
            }
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
        asm.pop(Rbp);
        if !self.plan.called {
            asm.raw(&[0x48, 0x8d, 0x64, 0x24, 0x08]); // lea 8(%rsp),%rsp
        }
    }

    fn act(&mut self, act: &Act) {
        let not = act.only_if.map(|predicate| self.unless(predicate));
        let hits = act.data.offset(data::HITS);
        match &act.action {
            Action::Count => self.asm.count(hits),
            Action::Call {
                function,
                nests,
                needs,
            } => self.call(act, *function, *nests, *needs),
            Action::Histogram(register) => {
                self.asm.count(hits);
                self.histogram(act, *register);
            }
            Action::Record { registers, records } => {
                self.asm.count(hits);
                self.record(act, registers, *records);
            }
        }
        if let Some(not) = not {
            self.asm.here(not);
        }
    }

    fn load(&mut self, register: Register) {
        let at = register.saved_at();
        // mov at(%rsp),%rax
        self.asm.raw(&[0x48, 0x8b, 0x84, 0x24, at, 0, 0, 0]);
    }

    fn unless(&mut self, predicate: Predicate) -> Forward {
        self.load(predicate.register);
        self.asm.raw(&[0x48, 0xb9]); // movabs $value,%rcx
        self.asm.raw(&predicate.value.to_le_bytes());
        self.asm.raw(&[0x48, 0x39, 0xc8]); // cmp %rcx,%rax
        self.asm.jump_if(predicate.comparison.unless())
    }

    fn call(&mut self, act: &Act, function: Gva, nests: bool, needs: Needs) {
        const NOT_ZERO: u8 = 0x85;
        const ZERO: u8 = 0x84;
        const CARRY: u8 = 0x82;
        let mut skip = Vec::new();
        let variables = self.plan.variables;
        if let (false, Some(variables)) = (needs.nmi, variables) {
            // testb $NMI_MASK >> 16,%gs:preempt+2
            self.asm
                .at_per_cpu(&[0x65, 0xf6, 0x04, 0x25], variables.preempt, 2);
            self.asm.raw(&[0xf0]);
            skip.push(self.asm.jump_if(NOT_ZERO));
        }
        if let (true, Some(variables)) = (needs.may_sleep, variables) {
            // mov %gs:preempt,%eax ; add %eax,%eax: but for the bit that says "reschedule"
            self.asm
                .at_per_cpu(&[0x65, 0x8b, 0x04, 0x25], variables.preempt, 0);
            self.asm.raw(&[0x01, 0xc0]);
            skip.push(self.asm.jump_if(NOT_ZERO));
            // testb $IF >> 8,flags+1(%rsp)
            self.asm
                .raw(&[0xf6, 0x84, 0x24, FLAGS_AT + 1, 0, 0, 0, 0x02]);
            skip.push(self.asm.jump_if(ZERO));
        }
        let needs_rcu = needs.needs_rcu && rules::holds(Rule::RcuWatching);
        if let (true, Some(variables)) = (needs_rcu, variables) {
            self.asm.call(variables.rcu_is_watching);
            self.asm.raw(&[0x84, 0xc0]); // test %al,%al
            skip.push(self.asm.jump_if(ZERO));
        }
        let guard = variables.filter(|_| nests);
        if let Some(variables) = guard {
            self.guard(0xab, variables); // bts
            skip.push(self.asm.jump_if(CARRY));
        }
        self.asm.count(act.data.offset(data::HITS));
        if self.frame == Frame::All {
            self.put_value(act.value);
            self.asm.raw(&[0x48, 0x89, 0xe7]); // mov %rsp,%rdi
        } else {
            // mov $args,%rdi
            let args = act.data.offset(data::ARGS);
            self.asm.at_absolute(&[0x48, 0xc7, 0xc7], args);
        }
        self.asm.call(Resolved::Absolute(function.0));
        if let Some(variables) = guard {
            self.guard(0xb3, variables); // btr
        }
        if !skip.is_empty() {
            self.asides.push(Aside {
                from: skip,
                count: act.data.offset(data::SKIPPED),
                back: self.asm.text.len(),
            });
        }
    }

    /// Sets or clears the bit of this level in the upper half of the task's `trace_recursion`, where
    /// the kernel has none of its own (include/linux/trace_recursion.h). An interrupt in between has
    /// another level, and leaves this bit as it was.
    fn guard(&mut self, opcode: u8, variables: &Variables) {
        let offset = u32::try_from(variables.recursion + 4).unwrap_or(0);
        self.asm.raw(&[0x41, 0x0f, opcode, 0x9c, 0x24]); // bts %ebx,offset(%r12)
        self.asm.raw(&offset.to_le_bytes());
    }

    fn put_value(&mut self, value: u64) {
        if let Ok(short) = i32::try_from(Gva(value).displacement_from(Gva(0))) {
            self.asm.raw(&[0x48, 0xc7, 0x04, 0x24]); // movq $value,(%rsp)
            self.asm.raw(&short.to_le_bytes());
        } else {
            self.asm.raw(&[0x48, 0xb8]); // movabs $value,%rax
            self.asm.raw(&value.to_le_bytes());
            self.asm.raw(&[0x48, 0x89, 0x04, 0x24]); // mov %rax,(%rsp)
        }
    }

    fn histogram(&mut self, act: &Act, register: Register) {
        let Some(variables) = self.plan.variables else {
            return;
        };
        self.load(register);
        self.asm.raw(&[0x48, 0xc7, 0xc2, 0xff, 0xff, 0xff, 0xff]); // mov $-1,%rdx
        self.asm.raw(&[0x48, 0x0f, 0xbd, 0xc8]); // bsr %rax,%rcx
        self.asm.raw(&[0x48, 0x0f, 0x44, 0xca]); // cmovz %rdx,%rcx
        // mov %gs:cpu,%eax
        self.asm
            .at_per_cpu(&[0x65, 0x8b, 0x04, 0x25], variables.cpu, 0);
        self.asm.raw(&[0x48, 0x69, 0xc0]); // imul $row,%rax,%rax
        let row = u32::try_from(BUCKETS * 8).unwrap_or(0);
        self.asm.raw(&row.to_le_bytes());
        // lock incq buckets+8(%rax,%rcx,8)
        let buckets = act.data.offset(data::MORE + 8);
        self.asm
            .at_absolute(&[0xf0, 0x48, 0xff, 0x84, 0xc8], buckets);
    }

    /// Takes the next record and fills it, if nobody else is still busy with its place.
    fn record(&mut self, act: &Act, registers: &[Register], records: u64) {
        const NOT_EQUAL: u8 = 0x85;
        const ABOVE: u8 = 0x87;
        let Some(variables) = self.plan.variables else {
            return;
        };
        let asm = &mut self.asm;
        asm.raw(&[0x41, 0xb8, 1, 0, 0, 0]); // mov $1,%r8d
        // lock xadd %r8,head
        let head = act.data.offset(data::HEAD);
        asm.at_absolute(&[0xf0, 0x4c, 0x0f, 0xc1, 0x04, 0x25], head);
        asm.raw(&[0x4c, 0x89, 0xc1]); // mov %r8,%rcx
        asm.raw(&[0x81, 0xe1]); // and $mask,%ecx
        let mask = u32::try_from(records.saturating_sub(1)).unwrap_or(0);
        asm.raw(&mask.to_le_bytes());
        asm.raw(&[0x48, 0xc1, 0xe1, 6]); // shl $6,%rcx
        // add $first,%rcx
        asm.at_absolute(&[0x48, 0x81, 0xc1], act.data.offset(data::MORE));
        asm.raw(&[0x48, 0x8b, 0x01]); // mov (%rcx),%rax
        asm.raw(&[0x4c, 0x39, 0xc0]); // cmp %r8,%rax: unfinished ones are above all others
        let busy = asm.jump_if(ABOVE);
        asm.raw(&[0x49, 0x8d, 0x50, 0x01]); // lea 1(%r8),%rdx
        asm.raw(&[0x48, 0x0f, 0xba, 0xea, 63]); // bts $63,%rdx
        asm.raw(&[0xf0, 0x48, 0x0f, 0xb1, 0x11]); // lock cmpxchg %rdx,(%rcx)
        let taken = asm.jump_if(NOT_EQUAL);
        asm.raw(&[0x0f, 0x31]); // rdtsc
        asm.raw(&[0x48, 0xc1, 0xe2, 32]); // shl $32,%rdx
        asm.raw(&[0x48, 0x09, 0xd0]); // or %rdx,%rax
        asm.raw(&[0x48, 0x89, 0x41, 8]); // mov %rax,8(%rcx)
        // mov %gs:task,%rax
        asm.at_per_cpu(&[0x65, 0x48, 0x8b, 0x04, 0x25], variables.task, 0);
        asm.raw(&[0x48, 0x89, 0x41, 16]); // mov %rax,16(%rcx)
        // mov %gs:cpu,%eax
        asm.at_per_cpu(&[0x65, 0x8b, 0x04, 0x25], variables.cpu, 0);
        asm.raw(&[0x48, 0x89, 0x41, 24]); // mov %rax,24(%rcx)
        for (at, register) in (32..).step_by(8).zip(registers.iter().take(RECORDED)) {
            self.load(*register);
            self.asm.raw(&[0x48, 0x89, 0x41, at]); // mov %rax,at(%rcx)
        }
        self.asm.raw(&[0x49, 0xff, 0xc0]); // inc %r8
        self.asm.raw(&[0x4c, 0x89, 0x01]); // mov %r8,(%rcx)
        self.asides.push(Aside {
            from: vec![busy, taken],
            count: act.data.offset(data::LOST),
            back: self.asm.text.len(),
        });
    }

    fn put_asides(&mut self) {
        for aside in std::mem::take(&mut self.asides) {
            for from in aside.from {
                self.asm.here(from);
            }
            self.asm.count(aside.count);
            self.asm.jump_back(aside.back);
        }
    }
}

#[cfg(test)]
#[path = "trampoline_tests.rs"]
mod tests;
