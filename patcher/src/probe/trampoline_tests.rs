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
        when: When::Reached,
        only_if: None,
        only_if_called: None,
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
    linked_with(code, acts, entry, 0)
}

fn linked_with(code: &[u8], acts: &[Act], entry: bool, stack_words: u32) -> Vec<u8> {
    let displaced = displace(AT, code, 5).unwrap();
    let code = trampoline(&Plan {
        site: AT,
        displaced: &displaced,
        acts,
        entry,
        called: false,
        variables: Some(&variables()),
        returning: Some(Returning {
            stack_words,
            thunk: None,
        }),
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

/// The same when the function returns.
fn returned(act: Act) -> Act {
    Act {
        when: When::Returned,
        ..act
    }
}

/// The instructions until the function's caller is returned to, asides and the rest left out.
fn through(text: &[u8]) -> Vec<Instruction> {
    let decoder = Decoder::with_ip(64, text, CODE.0, DecoderOptions::NONE);
    let mut all = Vec::new();
    for instruction in decoder {
        assert!(!instruction.is_invalid(), "at {:#x}", instruction.ip());
        all.push(instruction);
        if instruction.flow_control() == FlowControl::Return {
            break;
        }
    }
    all
}

/// Follows the stack through a whole trampoline. Tells where the rest of the function is called, and
/// how many bytes below the entry's the stack pointer is there.
fn follow(text: &[u8]) -> (u64, i32) {
    let mut rest = None;
    let (mut depth, mut frame) = (0, 0);
    for instruction in through(text) {
        let first = instruction.op0_register();
        match instruction.mnemonic() {
            Mnemonic::Call => {
                let target = instruction.near_branch_target();
                if (CODE.0..CODE.0 + text.len() as u64).contains(&target) {
                    assert_eq!(rest.replace((target, depth)), None);
                }
            }
            Mnemonic::Lea if first == iced_x86::Register::RSP => {
                let by = instruction.memory_displacement64().to_le_bytes();
                depth -= i32::try_from(i64::from_le_bytes(by)).unwrap();
            }
            Mnemonic::Mov if first == iced_x86::Register::RBP => frame = depth,
            Mnemonic::Leave => depth = frame - 8,
            Mnemonic::Ret => assert_eq!(depth, 0, "the caller's address is next"),
            _ => depth -= instruction.stack_pointer_increment(),
        }
    }
    rest.unwrap()
}

#[test]
fn the_rest_of_the_function_is_called_and_its_caller_returned_to() {
    let all = Needs {
        may_sleep: true,
        needs_rcu: true,
        ..Needs::default()
    };
    let latency = returned(act(Action::Latency));
    let record = returned(act(Action::Record {
        registers: vec![Register::Ax, Register::Sp],
        records: 8,
    }));
    let conditional = Act {
        only_if_called: "sp>=5".parse().ok(),
        ..returned(act(Action::Count))
    };
    for (acts, words) in [
        (vec![returned(act(Action::Count))], 0),
        (vec![latency.clone()], 0),
        (vec![latency.clone()], 1),
        (
            vec![latency, returned(call(true, all)), act(Action::Count)],
            2,
        ),
        (vec![call(true, all), record, conditional], 3),
    ] {
        let text = linked_with(&NOP, &acts, true, words);
        let (rest, depth) = follow(&text);
        // What an argument is aligned to holds for the copy as well.
        assert_eq!(depth % 16, 8, "{acts:?}");
        // Copied last first, from above the return address.
        let pushed: Vec<_> = through(&text)
            .iter()
            .filter(|i| i.mnemonic() == Mnemonic::Push)
            .filter(|i| i.memory_base() == iced_x86::Register::RBP)
            .map(|i| i.memory_displacement64())
            .filter(|at| *at != 0)
            .collect();
        let expected: Vec<_> = (0..u64::from(words)).rev().map(|n| 16 + 8 * n).collect();
        assert_eq!(pushed, expected, "{acts:?}");
        // The rest is what a nop leaves of the function.
        let at = usize::try_from(rest - CODE.0).unwrap();
        assert_eq!(text[at], 0xe9);
        let back = i32::from_le_bytes(text[at + 1..at + 5].try_into().unwrap());
        assert_eq!(Gva(rest + 5).displace(back.into()), AT.offset(5));
    }
}

#[test]
fn conditions_of_the_call_are_tested_by_the_bits_that_were_set() {
    let count = |condition: &str| Act {
        only_if_called: condition.parse().ok(),
        ..returned(act(Action::Count))
    };
    // More than a word of them, and one twice.
    let mut acts: Vec<_> = (0..70).map(|n| count(&format!("r9=={n}"))).collect();
    acts.push(count("r9==3"));
    acts.push(count("ax!=1"));
    acts.push(returned(act(Action::Latency)));
    let text = linked_with(&NOP, &acts, true, 1);
    let all = through(&text);
    let bits = |mnemonic| {
        let of = all.iter().filter(move |i| i.mnemonic() == mnemonic);
        let of = of.filter(|i| i.memory_base() == iced_x86::Register::RBP);
        of.map(|i| (i.memory_displacement64(), i.immediate8()))
            .collect::<Vec<_>>()
    };
    let (set, tested) = (bits(Mnemonic::Or), bits(Mnemonic::Test));
    assert_eq!((set.len(), tested.len()), (71, 72));
    let mut once = set.clone();
    once.sort_unstable();
    once.dedup();
    assert_eq!(once.len(), set.len(), "each its own");
    assert_eq!(tested[..70], set[..70]);
    assert_eq!((tested[70], tested[71]), (set[3], set[70]));
    let (_, depth) = follow(&text);
    // The frame pointer, two words of bits, a time stamp and an argument.
    assert_eq!(depth, 8 + 2 * 8 + 8 + 8);
    let below = |at: u64| 0_u64.wrapping_sub(at);
    assert!(set.iter().all(|(at, _)| (9..=24).contains(&below(*at))));
}

#[test]
fn what_waiting_for_a_return_costs() {
    let cost = |acts: &[Act]| {
        let all = through(&linked(&NOP, acts, true));
        let calls = all.iter().filter(|i| i.mnemonic() == Mnemonic::Call);
        // The jump there and back, and the return of what is called.
        2 + all.len() + calls.count()
    };
    let plain = Needs {
        no_registers: true,
        ..Needs::default()
    };
    assert!(cost(&[returned(act(Action::Count))]) <= 13);
    assert!(cost(&[returned(call(false, plain))]) <= 32);
    assert!(cost(&[returned(act(Action::Latency))]) <= 52);
}
