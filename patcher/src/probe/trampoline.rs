//! What a site jumps to.
//!
//! A trampoline does what every probe of its site asks for, in order, then what was displaced, and
//! goes back. Each probe's data are immediates in it, so that a callback and its data cannot be torn
//! apart: another set of probes is another trampoline. Everything that it needs is saved before and
//! restored after, flags included; how much that is depends on what the probes need ([`section`]).
//!
//! Where a probe acts when the function returns, the trampoline calls the rest of the function instead
//! of jumping back to it, does what is to be done then, and returns to the function's caller
//! ([`returning`]). So no return address is ever changed, and nothing is kept anywhere else: whoever
//! is in the function has an address of the trampoline on the stack, as often as it was called.
//!
//! [`section`]: super::section
//! [`returning`]: super::returning

use super::asm::{Asm, PerCpu};
use super::callback::{Needs, Predicate, Register};
use super::displace::Displaced;
use super::returning::{ReturnFrame, Returning};
use super::section::{Aside, Section, put_asides};
use crate::guest::Gva;
use crate::patch::code::{Code, Resolved};

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
    /// 1 when it was taken out: who is still in the function returns without it.
    pub(crate) const OUT: u64 = 48;
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
    /// How long the function took.
    Latency,
    Record {
        registers: Vec<Register>,
        /// A power of two.
        records: u64,
    },
}

/// When a probe acts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// When its site is reached.
    #[default]
    Reached,
    /// When the function returns whose entry its site is.
    Returned,
}

/// One probe of a site.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Act {
    pub(crate) action: Action,
    pub(crate) when: When,
    /// Of the registers when it acts.
    pub(crate) only_if: Option<Predicate>,
    /// Of the registers when the function was called that it acts at the return of.
    pub(crate) only_if_called: Option<Predicate>,
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
    /// For acts at the return of the function; without it there are none.
    pub(crate) returning: Option<Returning>,
}

impl Plan<'_> {
    fn acts(&self, when: When) -> Vec<&Act> {
        self.acts.iter().filter(|act| act.when == when).collect()
    }
}

/// The trampoline of a site.
pub(crate) fn trampoline(plan: &Plan<'_>) -> Code {
    let mut asm = Asm::default();
    let mut asides = Vec::new();
    Section::reached(plan, plan.acts(When::Reached)).put(&mut asm, &mut asides);
    let returned = plan.acts(When::Returned);
    if let (Some(returning), false) = (plan.returning, returned.is_empty()) {
        call_the_rest(plan, returned, returning, &mut asm, &mut asides);
    }
    let displaced = plan.displaced;
    asm.append(&displaced.text, &displaced.fixups);
    if displaced.falls_through {
        asm.jump(plan.site.offset(displaced.len as u64));
    }
    put_asides(&mut asm, asides);
    Code {
        keeps_frames: true,
        ..asm.into_code()
    }
}

/// Everything until the function has returned to its caller. What comes next is called from here.
fn call_the_rest(
    plan: &Plan<'_>,
    acts: Vec<&Act>,
    returning: Returning,
    asm: &mut Asm,
    asides: &mut Vec<Aside>,
) {
    let frame = ReturnFrame::of(&acts, returning);
    frame.make(asm);
    let rest = asm.call_ahead();
    Section::returned(plan, acts, &frame).put(asm, asides);
    asm.raw(&[0xc9]); // leave
    asm.ret(returning.thunk);
    asm.here(rest);
}

#[cfg(test)]
#[path = "trampoline_tests.rs"]
mod tests;
