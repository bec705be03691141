//! The code of what probes do.

use super::asm::{Asm, Forward};
use super::callback::{Needs, Predicate, Register};
use super::returning::ReturnFrame;
use super::section::{Aside, FLAGS_AT, Frame, Section};
use super::trampoline::{Act, Action, BUCKETS, RECORDED, Variables, data};
use crate::guest::Gva;
use crate::patch::code::Resolved;
use crate::rules::{self, Rule};

const CARRY: u8 = 0x82;
const ZERO: u8 = 0x84;
const NOT_ZERO: u8 = 0x85;
const ABOVE: u8 = 0x87;

impl Section<'_> {
    /// What one probe does, where its conditions hold.
    pub(super) fn act(&self, act: &Act, asm: &mut Asm, asides: &mut Vec<Aside>) {
        let not = self.conditions(act, asm);
        let hits = act.data.offset(data::HITS);
        match &act.action {
            Action::Count => asm.count(hits),
            Action::Call {
                function,
                nests,
                needs,
            } => asides.extend(self.call(asm, act, *function, *nests, *needs)),
            Action::Histogram(register) => {
                asm.count(hits);
                load(asm, *register);
                self.histogram(asm, act);
            }
            Action::Latency => {
                asm.count(hits);
                ReturnFrame::load_duration(asm);
                self.histogram(asm, act);
            }
            Action::Record { registers, records } => {
                asm.count(hits);
                asides.extend(self.record(asm, act, registers, *records));
            }
        }
        for not in not {
            asm.here(not);
        }
    }

    /// Jumps that are taken where it is not to act.
    fn conditions(&self, act: &Act, asm: &mut Asm) -> Vec<Forward> {
        let mut not = Vec::new();
        if let Some(frame) = self.waited {
            // testb $1,out
            asm.at_absolute(&[0xf6, 0x04, 0x25], act.data.offset(data::OUT));
            asm.raw(&[1]);
            not.push(asm.jump_if(NOT_ZERO));
            let called = act.only_if_called;
            not.extend(called.and_then(|condition| frame.unless(asm, condition)));
        }
        not.extend(act.only_if.map(|condition| unless(asm, condition)));
        not
    }

    fn call(
        &self,
        asm: &mut Asm,
        act: &Act,
        function: Gva,
        nests: bool,
        needs: Needs,
    ) -> Option<Aside> {
        let mut skip = Vec::new();
        let variables = self.plan.variables;
        if let (false, Some(variables)) = (needs.nmi, variables) {
            // testb $NMI_MASK >> 16,%gs:preempt+2
            asm.at_per_cpu(&[0x65, 0xf6, 0x04, 0x25], variables.preempt, 2);
            asm.raw(&[0xf0]);
            skip.push(asm.jump_if(NOT_ZERO));
        }
        if let (true, Some(variables)) = (needs.may_sleep, variables) {
            // mov %gs:preempt,%eax ; add %eax,%eax: but for the bit that says "reschedule"
            asm.at_per_cpu(&[0x65, 0x8b, 0x04, 0x25], variables.preempt, 0);
            asm.raw(&[0x01, 0xc0]);
            skip.push(asm.jump_if(NOT_ZERO));
            // testb $IF >> 8,flags+1(%rsp)
            asm.raw(&[0xf6, 0x84, 0x24, FLAGS_AT + 1, 0, 0, 0, 0x02]);
            skip.push(asm.jump_if(ZERO));
        }
        let needs_rcu = needs.needs_rcu && rules::holds(Rule::RcuWatching);
        if let (true, Some(variables)) = (needs_rcu, variables) {
            asm.call(variables.rcu_is_watching);
            asm.raw(&[0x84, 0xc0]); // test %al,%al
            skip.push(asm.jump_if(ZERO));
        }
        let guarded = variables.filter(|_| nests);
        if let Some(variables) = guarded {
            guard(asm, 0xab, variables); // bts
            skip.push(asm.jump_if(CARRY));
        }
        asm.count(act.data.offset(data::HITS));
        if self.frame == Frame::All {
            put_value(asm, act.value);
            asm.raw(&[0x48, 0x89, 0xe7]); // mov %rsp,%rdi
        } else {
            // mov $args,%rdi
            let args = act.data.offset(data::ARGS);
            asm.at_absolute(&[0x48, 0xc7, 0xc7], args);
        }
        asm.call(Resolved::Absolute(function.0));
        if let Some(variables) = guarded {
            guard(asm, 0xb3, variables); // btr
        }
        (!skip.is_empty()).then(|| Aside {
            from: skip,
            count: act.data.offset(data::SKIPPED),
            back: asm.text.len(),
        })
    }

    /// Counts the value in ax by its magnitude.
    fn histogram(&self, asm: &mut Asm, act: &Act) {
        let Some(variables) = self.plan.variables else {
            return;
        };
        asm.raw(&[0x48, 0xc7, 0xc2, 0xff, 0xff, 0xff, 0xff]); // mov $-1,%rdx
        asm.raw(&[0x48, 0x0f, 0xbd, 0xc8]); // bsr %rax,%rcx
        asm.raw(&[0x48, 0x0f, 0x44, 0xca]); // cmovz %rdx,%rcx
        // mov %gs:cpu,%eax
        asm.at_per_cpu(&[0x65, 0x8b, 0x04, 0x25], variables.cpu, 0);
        asm.raw(&[0x48, 0x69, 0xc0]); // imul $row,%rax,%rax
        let row = u32::try_from(BUCKETS * 8).unwrap_or(0);
        asm.raw(&row.to_le_bytes());
        // lock incq buckets+8(%rax,%rcx,8)
        let buckets = act.data.offset(data::MORE + 8);
        asm.at_absolute(&[0xf0, 0x48, 0xff, 0x84, 0xc8], buckets);
    }

    /// Takes the next record and fills it, if nobody else is still busy with its place.
    fn record(
        &self,
        asm: &mut Asm,
        act: &Act,
        registers: &[Register],
        records: u64,
    ) -> Option<Aside> {
        let variables = self.plan.variables?;
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
        let taken = asm.jump_if(NOT_ZERO);
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
            load(asm, *register);
            asm.raw(&[0x48, 0x89, 0x41, at]); // mov %rax,at(%rcx)
        }
        asm.raw(&[0x49, 0xff, 0xc0]); // inc %r8
        asm.raw(&[0x4c, 0x89, 0x01]); // mov %r8,(%rcx)
        Some(Aside {
            from: vec![busy, taken],
            count: act.data.offset(data::LOST),
            back: asm.text.len(),
        })
    }
}

/// Loads a saved register into ax.
fn load(asm: &mut Asm, register: Register) {
    let at = register.saved_at();
    // mov at(%rsp),%rax
    asm.raw(&[0x48, 0x8b, 0x84, 0x24, at, 0, 0, 0]);
}

fn unless(asm: &mut Asm, predicate: Predicate) -> Forward {
    load(asm, predicate.register);
    asm.raw(&[0x48, 0xb9]); // movabs $value,%rcx
    asm.raw(&predicate.value.to_le_bytes());
    asm.raw(&[0x48, 0x39, 0xc8]); // cmp %rcx,%rax
    asm.jump_if(predicate.comparison.unless())
}

/// Sets or clears the bit of this level in the upper half of the task's `trace_recursion`, where
/// the kernel has none of its own (include/linux/trace_recursion.h). An interrupt in between has
/// another level, and leaves this bit as it was.
fn guard(asm: &mut Asm, opcode: u8, variables: &Variables) {
    let offset = u32::try_from(variables.recursion + 4).unwrap_or(0);
    asm.raw(&[0x41, 0x0f, opcode, 0x9c, 0x24]); // bts %ebx,offset(%r12)
    asm.raw(&offset.to_le_bytes());
}

fn put_value(asm: &mut Asm, value: u64) {
    if let Ok(short) = i32::try_from(Gva(value).displacement_from(Gva(0))) {
        asm.raw(&[0x48, 0xc7, 0x04, 0x24]); // movq $value,(%rsp)
        asm.raw(&short.to_le_bytes());
    } else {
        asm.raw(&[0x48, 0xb8]); // movabs $value,%rax
        asm.raw(&value.to_le_bytes());
        asm.raw(&[0x48, 0x89, 0x04, 0x24]); // mov %rax,(%rsp)
    }
}
