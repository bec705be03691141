//! Tasks that sleep, and the code that they sleep in.

use super::guest::*;
use crate::guest::Gva;
use crate::stack::*;
use crate::symbols::{MemoryKind, Module, ModuleMemory, ModuleState, OrcTables};
use crate::synthetic::Orc;
use crate::tasks::Task;

const FORMATS: [OrcFormat; 3] = [OrcFormat::Plain, OrcFormat::Signal, OrcFormat::Renumbered];

#[test]
fn a_stack_ends_with_the_registers_of_user_mode() {
    for format in FORMATS {
        let mut guest = Guest::with_format(format);
        let expected = guest.sleeping_user_task();
        let trace = guest.trace();
        assert_eq!(addresses(&trace), expected, "{format:?}");
        assert_eq!(trace.reliability, Reliability::Reliable(End::UserMode));
        let kinds: Vec<_> = trace.frames.iter().map(|frame| frame.kind).collect();
        use FrameKind::{Called, Switched};
        assert_eq!(kinds, [Switched, Called, Called]);
    }
}

#[test]
fn a_stack_ends_where_a_kernel_thread_began() {
    for format in FORMATS {
        let mut guest = Guest::with_format(format);
        guest.push(THREAD.offset(0x10).at(SLIDE).0);
        guest.push(0);
        guest.switch_away(SCHEDULE.offset(4), 0);
        let trace = guest.trace();
        assert_eq!(trace.frames.len(), 2, "{format:?}");
        assert_eq!(trace.reliability, Reliability::Reliable(End::Bottom));
    }
}

#[test]
fn a_new_task_begins_where_it_will() {
    let mut guest = Guest::new();
    // One byte before it is another function, whose frame would be followed.
    guest.switch_away(THREAD, 0);
    let trace = guest.trace();
    assert_eq!(addresses(&trace), [THREAD.at(SLIDE)]);
    assert_eq!(trace.reliability, Reliability::Reliable(End::Bottom));
}

#[test]
fn the_dead_have_no_stack() {
    let mut guest = Guest::new();
    guest.task.stack = Gva(0);
    assert_eq!(guest.trace(), Trace::empty(End::NoStack));
}

#[test]
fn a_preempted_task_is_followed_through_its_interrupt() {
    for format in FORMATS {
        let mut guest = Guest::with_format(format);
        guest.push(THREAD.offset(0x10).at(SLIDE).0);
        guest.push(0);
        let interrupted = SCHEDULE.at(SLIDE).offset(0x33);
        guest.push_regs(interrupted.0, 0x10, guest.sp(), 0xb1b1);
        guest.push(SYSCALL.offset(0x10).at(SLIDE).0);
        guest.skip(0x18);
        guest.switch_away(SLEEP.offset(8), 0);
        let trace = guest.trace();
        assert!(trace.is_reliable(), "{format:?} {trace:?}");
        let frame = trace.frames[2];
        assert_eq!(frame.address, interrupted);
        assert_eq!(frame.kind, FrameKind::Interrupted);
    }
}

#[test]
fn code_that_nothing_is_known_about_ends_a_trace() {
    let mut guest = Guest::new();
    guest.push(UNKNOWN.offset(0x10).at(SLIDE).0);
    guest.push(0);
    guest.switch_away(SCHEDULE.offset(4), 0);
    let trace = guest.trace();
    assert_eq!(trace.frames.len(), 2);
    let doubt = trace.doubt().unwrap();
    assert_eq!(doubt.frame, 1);
    assert!(matches!(doubt.why, Why::Undefined { .. }));
    assert!(doubt.to_string().contains("frame 1"), "{doubt}");
}

/// Puts a call from `caller` on the stack, which a kernel thread made that keeps frame pointers.
fn called_from(guest: &mut Guest, caller: u64) {
    guest.push(THREAD.offset(0x10).at(SLIDE).0);
    let bp = guest.push(0);
    guest.skip(0x10);
    guest.push(caller);
    guest.push(bp);
    guest.switch_away(SCHEDULE.offset(4), 0);
}

#[test]
fn unknown_code_is_guessed_at_and_not_relied_on() {
    let mut guest = Guest::new();
    called_from(&mut guest, MODULE.0 + 0x20);
    let trace = guest.trace();
    assert_eq!(trace.frames.len(), 3);
    let doubt = trace.doubt().unwrap();
    let at = MODULE.offset(0x20);
    assert_eq!((doubt.frame, &doubt.why), (1, &Why::UnknownCode { at }));
    // A call of nothing.
    let mut guest = Guest::new();
    called_from(&mut guest, 1);
    assert!(matches!(guest.why(), Why::UnknownCode { .. }));
}

#[test]
fn modules_bring_tables_of_their_own() {
    let mut guest = Guest::new();
    called_from(&mut guest, MODULE.0 + 0x20);
    let tables = MODULE.offset(0x2000);
    guest.modules.push(Module {
        address: HEAP,
        name: "lunatic".into(),
        state: ModuleState::Live,
        memory: vec![ModuleMemory {
            kind: MemoryKind::Text,
            base: MODULE,
            size: 0x1000,
        }],
        users: 0,
        taints: 0,
        source_version: None,
        symbols: None,
        exports: None,
        types: None,
        orc: Some(OrcTables {
            instructions: tables,
            entries: tables.offset(0x100),
            count: 1,
        }),
    });
    let mut orc = Orc::new(tables.0);
    orc.call(MODULE.0, 0x20);
    let (addresses, entries) = orc.write(OrcFormat::Signal);
    guest.fake.put(tables, &addresses);
    guest.fake.put(tables.offset(0x100), &entries);
    let trace = guest.trace();
    assert!(trace.is_reliable(), "{trace:?}");
    let name = guest.name(&trace.frames[1]);
    assert_eq!(name, "[lunatic]+0x20");

    for (instructions, count) in [(Gva(0x10), 1), (tables, u64::MAX), (tables, 0)] {
        guest.modules[0].orc = Some(OrcTables {
            instructions,
            entries: tables.offset(0x100),
            count,
        });
        assert!(matches!(guest.why(), Why::NoModuleTables { .. }), "{count}");
    }
}

#[test]
fn code_of_ours_keeps_frame_pointers() {
    let mut guest = Guest::new();
    called_from(&mut guest, MODULE.0 + 0x20);
    guest.ours.push(GeneratedCode {
        range: MODULE..MODULE.offset(0x100),
        name: "fix".into(),
    });
    let trace = guest.trace();
    assert!(trace.is_reliable(), "{trace:?}");
    let name = guest.name(&trace.frames[1]);
    assert_eq!(name, "[stillpoint fix]+0x20");
}

#[test]
fn trampolines_of_ftrace_are_what_they_were_copied_from() {
    for (flags, frame) in [(0, 0x18), (4, 0x30)] {
        let mut guest = Guest::new();
        guest.push(THREAD.offset(0x10).at(SLIDE).0);
        guest.skip(frame - 8);
        guest.push(MODULE.0 + 0x20);
        guest.push(0);
        guest.switch_away(SCHEDULE.offset(4), 0);
        let ops = HEAP;
        guest.fake.put_u64(TRAMPOLINES.at(SLIDE), ops.0);
        for (offset, value) in [(0, 0), (8, flags), (0x10, MODULE.0), (0x18, 0x100)] {
            guest.fake.put_u64(ops.offset(offset), value);
        }
        let trace = guest.trace();
        assert!(trace.is_reliable(), "{trace:?}");
        assert_eq!(trace.frames.len(), 3);
    }
}

#[test]
fn programs_of_bpf_are_relied_on_where_the_kernel_does() {
    let mut guest = Guest::new();
    called_from(&mut guest, MODULE.0 + 0x20);
    let ksym = HEAP;
    let list = PROGRAMS.at(SLIDE);
    guest.fake.put_u64(list, ksym.0 + 0x10);
    for (offset, value) in [(0, MODULE.0), (8, MODULE.0 + 0x100), (0x10, list.0)] {
        guest.fake.put_u64(ksym.offset(offset), value);
    }
    guest.fake.put(ksym.offset(0x20), b"bpf_prog_1\0");
    let trace = guest.trace();
    assert!(matches!(guest.why(), Why::GeneratedCode { .. }));
    let name = guest.name(&trace.frames[1]);
    assert_eq!(name, "[bpf bpf_prog_1]+0x20");
    guest.fake.put(ksym.offset(0x34), &0x80_u32.to_le_bytes());
    assert!(guest.trace().is_reliable());
    guest.layout.bpf.as_mut().unwrap().frame_pointer = None;
    assert!(matches!(guest.why(), Why::GeneratedCode { .. }));
}

#[test]
fn names_are_as_the_kernel_prints_them() {
    let mut guest = Guest::new();
    guest.sleeping_user_task();
    let trace = guest.trace();
    let name = guest.name(&trace.frames[0]);
    assert!(name.ends_with("/0x40") && name.contains("+0x"), "{name}");
    guest.look(|unwinder| {
        let request = StacksRequest::default();
        let unwound = unwind(unwinder, SLIDE, vec![guest.task.clone()], &request);
        let report = unwound.named(&guest.kernel, &guest.layout);
        assert_eq!(report.counts.asleep_reliable, 1);
        let frames = &report.tasks[0].frames;
        assert_eq!(frames[0].symbol, name);
        let scheduler: Vec<_> = frames.iter().map(|frame| frame.scheduler).collect();
        assert_eq!(scheduler, [true, false, false]);
    });
}

#[test]
fn what_does_not_fit_is_counted() {
    let mut guest = Guest::new();
    guest.sleeping_user_task();
    let tasks: Vec<_> = (0..5000)
        .map(|pid| Task {
            pid,
            tgid: pid & !1,
            ..guest.task.clone()
        })
        .collect();
    let report = |request: StacksRequest| {
        guest.look(|unwinder| {
            let unwound = unwind(unwinder, SLIDE, tasks.clone(), &request);
            unwound.named(&guest.kernel, &guest.layout)
        })
    };
    let all = report(StacksRequest::default());
    assert_eq!(
        (all.tasks.len(), all.more, all.counts.tasks),
        (2000, 3000, 5000)
    );
    let next = report(StacksRequest {
        after: Some(1999),
        limit: Some(7),
        ..StacksRequest::default()
    });
    assert_eq!((next.tasks.len(), next.more), (7, 2993));
    assert_eq!(next.tasks[0].task.pid, 2000);
    let process = report(StacksRequest {
        pid: Some(8),
        ..StacksRequest::default()
    });
    assert_eq!(process.tasks.len(), 2);
}
