//! vCPUs, and the stacks that interrupts bring.

use super::guest::*;
use crate::guest::{Activity, Gva};
use crate::stack::*;

#[test]
fn user_mode_has_no_frames() {
    let mut guest = Guest::new();
    guest.run_at(0x40_1000, |registers| {
        registers.cs = 0x33;
        registers.kernel_gs_base = registers.gs_base;
        registers.gs_base = 0;
    });
    assert_eq!(guest.trace(), Trace::empty(End::UserMode));
    guest.look(|unwinder| {
        let on = unwinder.vcpus()[0];
        assert_eq!(on.cpu, Some(0));
        assert_eq!(on.current, Some(guest.task.address));
    });
}

#[test]
fn a_running_task_is_where_its_vcpu_is() {
    let mut guest = Guest::new();
    guest.push_regs(0x40_1000, 0x33, 0x7fff_0000, 0);
    guest.push(SYSCALL.offset(0x10).at(SLIDE).0);
    guest.skip(0x18);
    let rip = SLEEP.at(SLIDE);
    guest.run_at(rip.0, |_| {});
    let trace = guest.trace();
    assert_eq!(trace.reliability, Reliability::Reliable(End::UserMode));
    assert_eq!(trace.frames[0].kind, FrameKind::Running);
    assert_eq!(addresses(&trace), [rip, SYSCALL.offset(0x10).at(SLIDE)]);
}

/// A system call that an interrupt came into, which took a stack of its own, in which an NMI came.
fn nested(guest: &mut Guest) -> Vec<StackKind> {
    guest.push_regs(0x40_1000, 0x33, 0x7fff_0000, 0);
    guest.push(SYSCALL.offset(0x10).at(SLIDE).0);
    guest.skip(0x18);
    let sp = guest.sp();
    guest.push_regs(SLEEP.at(SLIDE).0, 0x10, sp, 0);
    guest.push(SYSCALL.offset(0x20).at(SLIDE).0);
    let task_sp = guest.sp();
    guest.go_to(Guest::INTERRUPT_TOP + 8);
    // Behind it, on the task's stack, is the return address.
    guest.push(task_sp);
    guest.push(SWITCHED_STACK.offset(0x10).at(SLIDE).0);
    guest.skip(0x18);
    let sp = guest.sp();
    guest.go_to(CPU_STACKS.0 + 0x3000);
    guest.push_partial(SLEEP.at(SLIDE).0, 0x10, sp);
    guest.run_at(INTERRUPT.at(SLIDE).0, |_| {});
    use StackKind::{Interrupt, Nmi, Register, Task};
    vec![Register, Nmi, Interrupt, Task, Task, Task]
}

#[test]
fn a_trace_goes_through_the_stacks_of_interrupts() {
    let mut guest = Guest::new();
    let expected = nested(&mut guest);
    let trace = guest.trace();
    let stacks: Vec<_> = trace.frames.iter().map(|frame| frame.stack).collect();
    assert_eq!(stacks, expected, "{trace:?}");
    assert_eq!(trace.reliability, Reliability::Reliable(End::UserMode));
}

#[test]
fn stacks_of_a_cpu_are_not_a_sleeping_tasks() {
    let mut guest = Guest::new();
    nested(&mut guest);
    guest.task.on_cpu = false;
    guest.go_to(TOP);
    guest.push(0);
    guest.push(Guest::INTERRUPT_TOP);
    guest.switch_away(SWITCHED_STACK.offset(4), 0);
    assert!(matches!(guest.why(), Why::OutsideStack { .. }));
}

#[test]
fn no_stack_is_come_back_to() {
    let mut guest = Guest::new();
    // The task's stack leads to the interrupt stack, and that one back.
    guest.push(0);
    let sp = guest.push(Guest::INTERRUPT_TOP - 0x100);
    guest.go_to(Guest::INTERRUPT_TOP - 0x100 + 8);
    guest.push(sp);
    guest.fake.put_u64(
        Gva(Guest::INTERRUPT_TOP - 0x100),
        SWITCHED_STACK.offset(4).at(SLIDE).0,
    );
    guest.fake.put_u64(Gva(Guest::INTERRUPT_TOP - 0xf8), sp);
    guest.go_to(sp);
    guest.run_at(SWITCHED_STACK.at(SLIDE).0, |_| {});
    assert!(matches!(guest.why(), Why::OutsideStack { .. }));
}

#[test]
fn entry_code_may_have_the_users_stack() {
    let mut guest = Guest::new();
    guest.run_at(THREAD.at(SLIDE).0, |registers| registers.rsp = 0x7fff_0000);
    let trace = guest.trace();
    assert_eq!(trace.reliability, Reliability::Reliable(End::Bottom));
    guest.vcpu().registers.rip = SLEEP.at(SLIDE).0;
    assert!(matches!(guest.why(), Why::OutsideStack { .. }));
}

#[test]
fn code_that_ends_a_stack_is_not_believed_in_the_middle_of_one() {
    let mut guest = Guest::new();
    let top = guest.push(SLEEP.offset(8).at(SLIDE).0);
    guest.run_at(THREAD.at(SLIDE).0, |registers| registers.rsp = top - 0x400);
    assert!(matches!(guest.why(), Why::Undefined { .. }));
}

#[test]
fn a_task_in_the_middle_of_a_switch_is_not_known() {
    let mut guest = Guest::new();
    guest.sleeping_user_task();
    guest.task.on_cpu = true;
    assert_eq!(guest.why(), Why::Switching);
    guest.run_at(SLEEP.at(SLIDE).0, |_| {});
    guest.vcpu().activity = Activity::NotStarted;
    assert_eq!(guest.why(), Why::Switching);
    guest.vcpu().activity = Activity::Running;
    guest.vcpu().nested = true;
    assert_eq!(guest.why(), Why::Switching);
}

#[test]
fn registers_of_the_vcpu_are_known_in_the_first_frame_only() {
    let mut guest = Guest::new();
    guest.push(THREAD.offset(0x10).at(SLIDE).0);
    let bp = guest.push(0);
    guest.ours.push(GeneratedCode {
        range: MODULE..MODULE.offset(0x100),
        name: "fix".into(),
    });
    guest.run_at(MODULE.0 + 0x10, |registers| registers.rbp = bp);
    // Interrupted, its frame may not be set up.
    assert!(matches!(guest.why(), Why::GeneratedCode { .. }));
    assert_eq!(guest.trace().frames.len(), 2);
}
