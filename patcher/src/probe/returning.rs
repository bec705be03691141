//! The frame that a trampoline has on the stack while the function runs whose return it waits for.
//!
//! From its frame pointer down: when the function was called, which conditions held then, and a copy
//! of the arguments that its caller has put on the stack, right above the address that it returns to.
//! Above are the caller's frame pointer and the address to return to in the end, as in any function
//! that keeps frame pointers: unwinders get through.

use super::asm::{Asm, Forward};
use super::callback::{Predicate, Register};
use super::trampoline::{Act, Action};
use crate::patch::code::Resolved;

/// What is to be known of a function to wait for its return.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Returning {
    /// Words of arguments that its callers put on the stack, at most.
    pub(crate) stack_words: u32,
    /// `__x86_return_thunk`, where there is one.
    pub(crate) thunk: Option<Resolved>,
}

/// Bytes of a word.
const WORD: i32 = 8;
/// Where the stack pointer was at the entry, from the frame pointer on.
const ENTRY_SP: u8 = 8;
/// Where the arguments on the stack begin, from the frame pointer on.
const ARGUMENTS: i32 = 16;
/// The words that are there for a moment while the frame is made: flags, then these registers.
const SAVED_AX: i32 = 2;
const SAVED_DX: i32 = 3;

/// The frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct ReturnFrame {
    /// It knows when the function was called.
    pub(super) timed: bool,
    /// What was tested when the function was called, each with a bit.
    conditions: Vec<Predicate>,
    stack_words: i32,
}

impl ReturnFrame {
    pub(super) fn of(acts: &[&Act], returning: Returning) -> Self {
        let mut conditions = Vec::new();
        for predicate in acts.iter().filter_map(|act| act.only_if_called) {
            if !conditions.contains(&predicate) {
                conditions.push(predicate);
            }
        }
        Self {
            timed: acts.iter().any(|act| act.action == Action::Latency),
            conditions,
            stack_words: i32::try_from(returning.stack_words).unwrap_or(0),
        }
    }

    /// Makes it, where the stack is as the function is to find it. Nothing but the frame pointer and
    /// the stack pointer is changed.
    pub(super) fn make(&self, asm: &mut Asm) {
        asm.raw(&[0x55]); // push %rbp
        asm.raw(&[0x48, 0x89, 0xe5]); // mov %rsp,%rbp
        let kept = self.kept();
        if kept > 0 {
            // lea -kept(%rsp),%rsp
            asm.with_displacement(&[0x48, 0x8d, 0xa4, 0x24], -kept);
        }
        for word in 0..self.condition_words() {
            // movq $0,conditions(%rbp)
            let at = self.conditions_at() - word * WORD;
            asm.with_displacement(&[0x48, 0xc7, 0x85], at);
            asm.raw(&[0; 4]);
        }
        if self.timed || !self.conditions.is_empty() {
            asm.raw(&[0x9c, 0x50, 0x52]); // pushfq ; push %rax ; push %rdx
            for (index, condition) in self.conditions.iter().enumerate() {
                self.test(asm, *condition, index);
            }
            if self.timed {
                time_stamp(asm);
                // mov %rax,stamp(%rbp)
                asm.with_displacement(&[0x48, 0x89, 0x85], -WORD);
            }
            asm.raw(&[0x5a, 0x58, 0x9d]); // pop %rdx ; pop %rax ; popfq
        }
        for word in (0..self.stack_words).rev() {
            // push argument(%rbp)
            asm.with_displacement(&[0xff, 0xb5], ARGUMENTS + word * WORD);
        }
    }

    /// Puts how long the function took in the place of when it was called. Changes flags, ax and dx.
    pub(super) fn put_duration(asm: &mut Asm) {
        time_stamp(asm);
        // sub stamp(%rbp),%rax
        asm.with_displacement(&[0x48, 0x2b, 0x85], -WORD);
        // Time stamp counters of two CPUs may differ a little.
        asm.raw(&[0xba, 0, 0, 0, 0]); // mov $0,%edx
        asm.raw(&[0x48, 0x0f, 0x42, 0xc2]); // cmovb %rdx,%rax
        // mov %rax,stamp(%rbp)
        asm.with_displacement(&[0x48, 0x89, 0x85], -WORD);
    }

    /// Loads that into ax.
    pub(super) fn load_duration(asm: &mut Asm) {
        // mov stamp(%rbp),%rax
        asm.with_displacement(&[0x48, 0x8b, 0x85], -WORD);
    }

    /// A jump that is taken where `condition` did not hold when the function was called.
    pub(super) fn unless(&self, asm: &mut Asm, condition: Predicate) -> Option<Forward> {
        const ZERO: u8 = 0x84;
        let index = self.conditions.iter().position(|one| *one == condition)?;
        let (at, mask) = self.bit(index);
        // testb $mask,at(%rbp)
        asm.with_displacement(&[0xf6, 0x85], at);
        asm.raw(&[mask]);
        Some(asm.jump_if(ZERO))
    }

    /// Sets the bit of a condition that holds.
    fn test(&self, asm: &mut Asm, condition: Predicate, index: usize) {
        asm.raw(&[0x48, 0xb8]); // movabs $value,%rax
        asm.raw(&condition.value.to_le_bytes());
        // cmp %rax,register
        match condition.register {
            Register::Ax => self.compare_saved(asm, SAVED_AX),
            Register::Dx => self.compare_saved(asm, SAVED_DX),
            Register::Bp => asm.raw(&[0x48, 0x39, 0x45, 0]),
            Register::Sp => {
                asm.raw(&[0x48, 0x8d, 0x55, ENTRY_SP]); // lea 8(%rbp),%rdx
                asm.raw(&[0x48, 0x39, 0xc2]);
            }
            register => {
                let number = register.number();
                asm.raw(&[0x48 | number >> 3, 0x39, 0xc0 | number & 7]);
            }
        }
        let not = asm.jump_if(condition.comparison.unless());
        let (at, mask) = self.bit(index);
        // orb $mask,at(%rbp)
        asm.with_displacement(&[0x80, 0x8d], at);
        asm.raw(&[mask]);
        asm.here(not);
    }

    fn compare_saved(&self, asm: &mut Asm, word: i32) {
        asm.with_displacement(&[0x48, 0x39, 0x85], -self.kept() - word * WORD);
    }

    /// Where the bit of a condition is, from the frame pointer on.
    fn bit(&self, index: usize) -> (i32, u8) {
        let (word, bit) = (index / 64, index % 64);
        let word = i32::try_from(word).unwrap_or(0);
        let byte = i32::try_from(bit / 8).unwrap_or(0);
        (self.conditions_at() - word * WORD + byte, 1 << (bit % 8))
    }

    /// Where the first word of conditions is; the others are below.
    fn conditions_at(&self) -> i32 {
        -WORD * (1 + i32::from(self.timed))
    }

    fn condition_words(&self) -> i32 {
        i32::try_from(self.conditions.len().div_ceil(64)).unwrap_or(0)
    }

    /// Bytes between the frame pointer and the copied arguments. With those it is a multiple of 16, as
    /// what an aligned argument is aligned to may be relative to the others only.
    fn kept(&self) -> i32 {
        let words = i32::from(self.timed) + self.condition_words();
        let odd = (words + self.stack_words) & 1;
        (words + odd) * WORD
    }
}

/// The time stamp counter in ax. Changes flags and dx.
fn time_stamp(asm: &mut Asm) {
    asm.raw(&[0x0f, 0x31]); // rdtsc
    asm.raw(&[0x48, 0xc1, 0xe2, 32]); // shl $32,%rdx
    asm.raw(&[0x48, 0x09, 0xd0]); // or %rdx,%rax
}
