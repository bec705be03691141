//! Having the guest's kernel call functions of its own, where they may sleep.
//!
//! A work item of ours is put on the kernel's work queue, once, by whoever comes to the code that
//! [`Errand::trigger`] makes, in whatever context that is; a worker of the kernel then runs the code
//! of [`Errand::work`], which calls one function after the other and keeps what they return.

use super::asm::{Asm, PerCpu, Reg};
use super::displace::Displaced;
use crate::guest::Gva;
use crate::patch::code::{Code, Resolved};

/// Offsets in the data of an errand.
pub(crate) mod errand_data {
    /// `struct work_struct`.
    pub(crate) const WORK: u64 = 0;
    /// Bytes that it may have.
    pub(crate) const WORK_BYTES: u64 = 128;
    /// 1 until the work item was queued: 32 bits.
    pub(crate) const ARMED: u64 = 128;
    /// 1 when all functions have returned.
    pub(crate) const DONE: u64 = 136;
    /// What they returned.
    pub(crate) const RESULTS: u64 = 144;
    /// How many can be called.
    pub(crate) const CALLS: usize = 6;
    pub(crate) const BYTES: u64 = RESULTS + 8 * CALLS as u64;
}

/// A call with up to four arguments.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Call {
    pub(crate) function: Resolved,
    pub(crate) arguments: Vec<u64>,
}

/// What the kernel is to do, and what that takes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Errand {
    /// `queue_work_on()`
    pub(crate) queue: Resolved,
    /// The pointer to the work queue.
    pub(crate) queue_pointer: Resolved,
    /// Number of the CPU.
    pub(crate) cpu: PerCpu,
    pub(crate) return_thunk: Option<Resolved>,
    pub(crate) data: Gva,
}

impl Errand {
    /// A callback that queues the work item the first time that it is called.
    pub(crate) fn trigger(&self) -> Code {
        const ZERO: u8 = 0x84;
        let mut asm = Asm::default();
        asm.raw(&[0x31, 0xc0]); // xor %eax,%eax
        // xchg %eax,armed
        asm.at_absolute(&[0x87, 0x04, 0x25], self.data.offset(errand_data::ARMED));
        asm.raw(&[0x85, 0xc0]); // test %eax,%eax
        let not = asm.jump_if(ZERO);
        asm.at_per_cpu(&[0x65, 0x8b, 0x3c, 0x25], self.cpu, 0); // mov %gs:cpu,%edi
        asm.at_symbol(&[0x48, 0x8b, 0x34, 0x25], self.queue_pointer); // mov queue,%rsi
        // mov $work,%rdx
        asm.at_absolute(&[0x48, 0xc7, 0xc2], self.data.offset(errand_data::WORK));
        asm.call(self.queue);
        asm.here(not);
        asm.ret(self.return_thunk);
        asm.into_code()
    }

    /// The function of the work item.
    pub(crate) fn work(&self, calls: &[Call]) -> Code {
        let mut asm = Asm::default();
        asm.push(Reg::Rbp);
        asm.raw(&[0x48, 0x89, 0xe5]); // mov %rsp,%rbp
        let results = (errand_data::RESULTS..).step_by(8);
        for (call, result) in calls.iter().take(errand_data::CALLS).zip(results) {
            let registers = [Reg::Rdi, Reg::Rsi, Reg::Rdx, Reg::Rcx];
            for (register, value) in registers.into_iter().zip(&call.arguments) {
                asm.load(register, *value);
            }
            asm.call(call.function);
            // mov %rax,result
            asm.at_absolute(&[0x48, 0x89, 0x04, 0x25], self.data.offset(result));
        }
        asm.raw(&[0xb8, 1, 0, 0, 0]); // mov $1,%eax
        let done = self.data.offset(errand_data::DONE);
        asm.at_absolute(&[0x48, 0x89, 0x04, 0x25], done);
        asm.pop(Reg::Rbp);
        asm.ret(self.return_thunk);
        asm.into_code()
    }
}

/// What a function does that only returns.
pub(crate) fn return_now(thunk: Option<Resolved>) -> Displaced {
    let mut asm = Asm::default();
    asm.ret(thunk);
    Displaced {
        text: asm.text,
        fixups: asm.fixups,
        ..Displaced::default()
    }
}
