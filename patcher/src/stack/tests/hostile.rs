//! Guests that lie: whatever they say, a trace is told, and is not endless.

use super::guest::*;
use crate::guest::{Gpa, Gva, StoppedGuest};
use crate::stack::*;
use crate::synthetic::Random;

#[test]
fn wild_stack_pointers_are_refused() {
    let mut guest = Guest::new();
    guest.sleeping_user_task();
    for sp in [
        0,
        1,
        STACK.0 - 8,
        TOP - 48,
        TOP,
        guest.task.sp.0 + 1,
        u64::MAX - 7,
    ] {
        guest.task.sp = Gva(sp);
        assert_eq!(guest.why(), Why::WildStackPointer { sp: Gva(sp) });
    }
    for stack in [8, 0x4141_4141_4141_4141, u64::MAX - 0x100] {
        guest.task.stack = Gva(stack);
        guest.task.sp = Gva(stack.wrapping_add(0x100) & !7);
        assert!(!guest.trace().is_reliable(), "{stack:#x}");
    }
    let mapped = STACK.displace(-0x8000);
    guest.task.stack = mapped;
    guest.task.sp = mapped.offset(0x100);
    assert!(matches!(guest.why(), Why::Unreadable(_)));
}

#[test]
fn a_stack_that_goes_in_a_circle_ends() {
    let mut guest = Guest::new();
    guest.skip(0x200);
    guest.push_regs(SYSCALL.at(SLIDE).0, 0x10, guest.sp() - REGS, 0);
    let sp = guest.sp();
    guest.push(SYSCALL.offset(8).at(SLIDE).0);
    guest.skip(0x18);
    guest.switch_away(SLEEP.offset(4), 0);
    assert_eq!(guest.why(), Why::Backwards { sp: Gva(sp) });
}

#[test]
fn a_circle_through_a_base_pointer_ends() {
    // Its stack pointer is always elsewhere; what counts is the base pointer, which stays.
    let mut guest = Guest::new();
    guest.skip(0x200);
    let bp = guest.sp();
    guest.push(MODULE.0 + 0x10);
    guest.push(bp);
    guest.switch_away(SCHEDULE.offset(4), 0);
    guest.fake.put_u64(Gva(bp), bp);
    guest.fake.put_u64(Gva(bp + 8), MODULE.0 + 0x10);
    let trace = guest.trace();
    assert!(!trace.is_reliable());
    assert!(trace.frames.len() < 10, "{}", trace.frames.len());
}

#[test]
fn a_stack_full_of_calls_is_followed_to_its_end() {
    let mut guest = Guest::new();
    while guest.sp() > STACK.0 + 0x100 {
        guest.push(SLEEP.offset(8).at(SLIDE).0);
        guest.skip(0x18);
    }
    guest.switch_away(SLEEP.offset(4), 0);
    let trace = guest.trace();
    assert!(matches!(guest.why(), Why::OutsideStack { .. }));
    assert!(trace.frames.len() > 400);
}

#[test]
fn lists_that_do_not_end_are_left() {
    let mut guest = Guest::new();
    guest.push(MODULE.0 + 0x20);
    guest.push(0);
    guest.switch_away(SCHEDULE.offset(4), 0);
    guest.fake.put_u64(TRAMPOLINES.at(SLIDE), HEAP.0);
    guest.fake.put_u64(HEAP, HEAP.0);
    guest.fake.put_u64(PROGRAMS.at(SLIDE), HEAP.0);
    assert!(matches!(guest.why(), Why::UnknownCode { .. }));
    for wild in [1, 0x4141_4141_4141_4141, u64::MAX] {
        guest.fake.put_u64(TRAMPOLINES.at(SLIDE), wild);
        guest.fake.put_u64(PROGRAMS.at(SLIDE), wild);
        assert!(matches!(guest.why(), Why::UnknownCode { .. }));
    }
}

#[test]
fn a_damaged_guest_is_told_of_all_the_same() {
    let mut random = Random::new(3);
    let mut guest = Guest::new();
    guest.sleeping_user_task();
    let pages: Vec<Gpa> = [STACK.offset(0x3000), TASK, HEAP]
        .map(|at| {
            let space = guest.located.space(&guest.fake.image);
            space.mapping(at).unwrap().gpa
        })
        .into();
    let interesting = [
        0,
        TOP,
        TOP - 0x100,
        TASK.0,
        HEAP.0,
        MODULE.0 + 0x20,
        HANDLER.at(SLIDE).0,
        RETHOOK.at(SLIDE).0,
        SYSCALL.at(SLIDE).0 + 4,
        SWITCHED_STACK.at(SLIDE).0 + 4,
        INTERRUPT.at(SLIDE).0 + 4,
        SLEEP.at(SLIDE).0 + 4,
        u64::MAX,
    ];
    let before = guest.fake.image.clone();
    for _ in 0..3000 {
        guest.fake.image = before.clone();
        for _ in 0..=random.below(12) {
            let page = pages[random.below(pages.len())];
            // What is used is at the end of the stack.
            let at = page.offset(0xe00 + 8 * random.below(64) as u64);
            let value = interesting[random.below(interesting.len())];
            guest.fake.image.write(at, &value.to_le_bytes()).unwrap();
        }
        let trace = guest.trace();
        assert!(trace.frames.len() <= 4097);
        trace
            .frames
            .iter()
            .for_each(|frame| drop(guest.name(frame)));
    }
}
