//! What trampolines are made of, and what a hit costs.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};

use super::*;
use crate::guest::Slide;
use crate::patch::code::{Placed, ReturnSites, link};
use crate::probe::displace;

const AT: Gva = Gva(0xffff_ffff_8123_4560);
const CODE: Gva = Gva(0xffff_ffff_ff80_0000);
const DATA: Gva = Gva(0xffff_ffff_ffa0_0040);
const CALLBACK: Gva = Gva(0xffff_ffff_ff80_1000);
const NOP: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];

fn variables() -> Variables {
    let hot = |offset| PerCpu {
        base: Resolved::Absolute(0x35000),
        offset,
    };
    Variables {
        task: hot(0),
        preempt: hot(8),
        cpu: hot(12),
        recursion: 0xb00,
        rcu_is_watching: Resolved::Absolute(AT.0 - 0x1000),
        counted: true,
    }
}

fn act(action: Action) -> Act {
    Act {
        action,
        only_if: None,
        value: 7,
        data: DATA,
    }
}

fn call(nests: bool, needs: Needs) -> Act {
    act(Action::Call {
        function: CALLBACK,
        nests,
        needs,
    })
}

fn linked(code: &[u8], acts: &[Act], entry: bool) -> Vec<u8> {
    let displaced = displace(AT, code, 5).unwrap();
    let code = trampoline(&Plan {
        site: AT,
        displaced: &displaced,
        acts,
        entry,
        called: false,
        variables: Some(&variables()),
    });
    let placed = Placed {
        code: CODE,
        data: Gva(0),
    };
    link(&code, placed, Slide(0), ReturnSites::Ret).unwrap().0
}

/// The instructions that run from the start until the jump back, asides left out.
fn run(text: &[u8]) -> Vec<Instruction> {
    let mut decoder = Decoder::with_ip(64, text, CODE.0, DecoderOptions::NONE);
    let mut all = Vec::new();
    while decoder.can_decode() {
        let instruction = decoder.decode();
        assert!(!instruction.is_invalid(), "at {:#x}", instruction.ip());
        all.push(instruction);
        if instruction.flow_control() == FlowControl::UnconditionalBranch {
            break;
        }
    }
    all
}

/// What a hit adds where a nop was: the jump there too, and the callback's return.
fn cost(acts: &[Act], entry: bool) -> usize {
    let text = linked(&NOP, acts, entry);
    let all = run(&text);
    let calls = all
        .iter()
        .filter(|i| i.mnemonic() == Mnemonic::Call)
        .count();
    1 + all.len() + calls
}

#[test]
fn a_count_costs_five_instructions_where_a_nop_was() {
    let text = linked(&NOP, &[act(Action::Count)], true);
    assert_eq!(text.len(), 16);
    assert_eq!(cost(&[act(Action::Count)], false), 5);
    let back = i32::from_le_bytes(text[12..].try_into().unwrap());
    assert_eq!(CODE.offset(16).displace(back.into()), AT.offset(5));
}

#[test]
fn code_that_does_not_come_back_needs_no_way_back() {
    // jmp +0
    let text = linked(&[0xe9, 0, 0, 0, 0], &[act(Action::Count)], true);
    assert_eq!(text.len(), 16);
    assert_eq!(text[11], 0xe9);
}

#[test]
fn what_callbacks_cost() {
    let bare = Needs::default();
    let scratch = Needs {
        no_registers: true,
        ..bare
    };
    assert!(cost(&[call(false, scratch)], true) <= 30);
    assert!(cost(&[call(false, bare)], true) <= 50);
    assert!(cost(&[call(true, bare)], true) <= 60);
    assert!(cost(&[call(true, bare)], false) <= 80);
    // One more callback costs little.
    let eight = vec![call(true, bare); 8];
    assert!(cost(&eight, true) <= 60 + 7 * 11, "{}", cost(&eight, true));
}

#[test]
fn what_is_pushed_is_popped_and_no_flag_is_changed_outside() {
    let all = Needs {
        may_sleep: true,
        needs_rcu: true,
        ..Needs::default()
    };
    let predicate = "di!=5".parse().ok();
    for (entry, acts) in [
        (true, vec![act(Action::Count)]),
        (false, vec![call(true, all), act(Action::Count)]),
        (true, vec![act(Action::Histogram(Register::Di))]),
        (
            true,
            vec![act(Action::Record {
                registers: vec![Register::Di, Register::Sp],
                records: 1024,
            })],
        ),
        (
            true,
            vec![Act {
                only_if: predicate,
                ..act(Action::Count)
            }],
        ),
    ] {
        let mut depth = 0;
        let (mut pushed, mut popped) = (Vec::new(), Vec::new());
        for instruction in run(&linked(&NOP, &acts, entry)) {
            depth += instruction.stack_pointer_increment();
            match instruction.mnemonic() {
                Mnemonic::Push => pushed.push(instruction.op0_register()),
                Mnemonic::Pop => popped.push(instruction.op0_register()),
                // Calls return.
                Mnemonic::Call => depth += 8,
                Mnemonic::Lea if instruction.op0_register() == iced_x86::Register::RSP => {
                    depth += i32::try_from(instruction.memory_displacement64()).unwrap();
                }
                _ => {}
            }
        }
        assert_eq!(depth, 0, "{acts:?}");
        popped.reverse();
        pushed.retain(|register| popped.contains(register));
        pushed.truncate(popped.len());
        assert_eq!(pushed, popped, "{acts:?}");
    }
}

#[test]
fn registers_are_where_the_header_says() {
    let header = include_str!("../../include/stillpoint.h");
    let body = header.split_once("struct stillpoint_args {").unwrap().1;
    let body = body.split_once("};").unwrap().0;
    let mut at = 0;
    for line in body.lines() {
        let Some(names) = line.trim().strip_prefix("unsigned long ") else {
            continue;
        };
        for name in names.split_once(';').unwrap().0.split(',') {
            if let Ok(register) = name.trim().parse::<Register>() {
                assert_eq!(register.saved_at(), at, "{name}");
            }
            at += 8;
        }
    }
    assert_eq!(at, 152);
}
