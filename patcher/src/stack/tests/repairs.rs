//! Return addresses that tracers took.

use super::guest::*;
use crate::guest::{Gva, LinkAddr};
use crate::stack::*;
use crate::tasks::Place;

const GRAPH: Gva = Gva(HEAP.0 + 0x1000);
const NODES: Gva = Gva(HEAP.0 + 0x2000);

/// A kernel thread whose only caller was taken: returns where it was.
fn thread(guest: &mut Guest, found: LinkAddr) -> u64 {
    let slot = guest.push(found.at(SLIDE).0);
    guest.push(0);
    guest.switch_away(SCHEDULE.offset(4), 0);
    slot
}

/// Entries of function graph, the first taken first.
fn graph(guest: &mut Guest, in_words: bool, entries: &[(u64, u64)]) {
    guest.layout.graph.as_mut().unwrap().in_words = in_words;
    guest.fake.put_u64(TASK.offset(0x10), GRAPH.0);
    let mut at = GRAPH;
    for &(address, slot) in entries {
        guest.fake.put_u64(at, address);
        guest.fake.put_u64(at.offset(0x10), slot);
        at = at.offset(ENTRY);
        if in_words {
            // Higher bits say other things.
            guest.fake.put_u64(at, 0x1400 | (ENTRY / 8));
            at = at.offset(8);
        }
    }
    let index = match in_words {
        true => u32::try_from(at.distance_from(GRAPH) / 8).unwrap(),
        false => u32::try_from(entries.len()).unwrap().wrapping_sub(1),
    };
    guest.fake.put(TASK.offset(0x18), &index.to_le_bytes());
}

/// Nodes of return probes, the first taken first.
fn rethooks(guest: &mut Guest, entries: &[(u64, u64)]) {
    let mut next = 0;
    for (number, &(address, slot)) in (0..).zip(entries) {
        let node = NODES.offset(0x40 * number);
        guest.fake.put_u64(node.offset(8), next);
        guest.fake.put_u64(node.offset(0x18), address);
        guest.fake.put_u64(node.offset(0x20), slot);
        next = node.0 + 8;
    }
    guest.fake.put_u64(TASK.offset(0x20), next);
}

fn real() -> u64 {
    THREAD.offset(0x10).at(SLIDE).0
}

fn assert_repaired(guest: &Guest, from: LinkAddr) {
    let trace = guest.trace();
    assert_eq!(trace.reliability, Reliability::Reliable(End::Bottom));
    assert_eq!(trace.frames[1].address, Gva(real()));
    assert_eq!(trace.frames[1].repaired_from, Some(from.at(SLIDE)));
}

#[test]
fn function_graph_gives_back_what_it_took() {
    for in_words in [false, true] {
        let mut guest = Guest::new();
        let slot = thread(&mut guest, HANDLER);
        graph(
            &mut guest,
            in_words,
            &[(1, slot + 64), (real(), slot), (2, slot - 64)],
        );
        assert_repaired(&guest, HANDLER);
    }
}

#[test]
fn of_several_tail_calls_the_first_one_knows() {
    for in_words in [false, true] {
        let mut guest = Guest::new();
        let slot = thread(&mut guest, HANDLER);
        let handler = HANDLER.at(SLIDE).0;
        graph(
            &mut guest,
            in_words,
            &[(real(), slot), (handler, slot), (handler, slot)],
        );
        assert_repaired(&guest, HANDLER);
    }
}

#[test]
fn return_probes_give_back_what_they_took() {
    let mut guest = Guest::new();
    let slot = thread(&mut guest, RETHOOK);
    let trampoline = RETHOOK.at(SLIDE).0;
    rethooks(
        &mut guest,
        &[(3, slot + 8), (real(), slot), (trampoline, slot), (4, 0)],
    );
    assert_repaired(&guest, RETHOOK);
}

/// Before 5.11 there is one table for all tasks.
#[test]
fn a_table_of_return_probes_gives_back_what_was_taken_from_this_task() {
    let mut guest = Guest::new();
    let slot = thread(&mut guest, RETHOOK);
    guest.layout.probes.as_mut().unwrap().place = Place::Table {
        start: TABLE,
        buckets: 2,
        task: 0x28,
    };
    rethooks(&mut guest, &[(real(), slot), (3, slot)]);
    // The newest node.
    let bucket = TABLE.offset(8).at(SLIDE);
    guest.fake.put_u64(bucket, NODES.0 + 0x48);
    assert_eq!(guest.why(), Why::LostReturn { slot: Gva(slot) });
    guest.fake.put_u64(NODES.offset(0x28), TASK.0);
    guest.fake.put_u64(NODES.offset(0x68), TASK.0 + 1);
    assert_repaired(&guest, RETHOOK);
}

#[test]
fn tracers_that_took_from_each_other_are_all_asked() {
    let (handler, trampoline) = (HANDLER.at(SLIDE).0, RETHOOK.at(SLIDE).0);
    for in_words in [false, true] {
        // A return probe, then function graph, then another return probe.
        let mut guest = Guest::new();
        let slot = thread(&mut guest, RETHOOK);
        graph(&mut guest, in_words, &[(trampoline, slot)]);
        rethooks(&mut guest, &[(real(), slot), (handler, slot)]);
        assert_repaired(&guest, RETHOOK);
        // Function graph, then a return probe: the kernel's own unwinder fails here.
        let mut guest = Guest::new();
        let slot = thread(&mut guest, RETHOOK);
        graph(&mut guest, in_words, &[(real(), slot)]);
        rethooks(&mut guest, &[(handler, slot)]);
        assert_repaired(&guest, RETHOOK);
    }
}

#[test]
fn what_nobody_took_is_lost() {
    let (handler, trampoline) = (HANDLER.at(SLIDE).0, RETHOOK.at(SLIDE).0);
    let mut guest = Guest::new();
    let slot = thread(&mut guest, HANDLER);
    let lost = Why::LostReturn { slot: Gva(slot) };
    for in_words in [false, true] {
        graph(&mut guest, in_words, &[]);
        assert_eq!(guest.why(), lost);
        graph(&mut guest, in_words, &[(real(), slot + 8)]);
        assert_eq!(guest.why(), lost);
        // They lead to each other.
        graph(&mut guest, in_words, &[(trampoline, slot), (handler, slot)]);
        rethooks(&mut guest, &[(handler, slot); 3]);
        assert_eq!(guest.why(), lost);
    }
    // Words that say that an entry has no length, or begins below all.
    for word in [0, 0x3ff] {
        graph(&mut guest, true, &[(real(), slot)]);
        guest.fake.put_u64(GRAPH.offset(ENTRY), word);
        assert_eq!(guest.why(), lost);
    }
    // An index of two thousand million, and a stack that is not there.
    guest
        .fake
        .put(TASK.offset(0x18), &0x7fff_ffff_u32.to_le_bytes());
    assert_eq!(guest.why(), lost);
    graph(&mut guest, true, &[(real(), slot)]);
    guest.fake.put_u64(TASK.offset(0x10), 0x10);
    assert_eq!(guest.why(), lost);
    // A list that runs in a circle.
    let mut guest = Guest::new();
    let slot = thread(&mut guest, RETHOOK);
    rethooks(&mut guest, &[(real(), slot + 8)]);
    guest.fake.put_u64(NODES.offset(8), NODES.0 + 8);
    assert_eq!(guest.why(), Why::LostReturn { slot: Gva(slot) });
}

#[test]
fn an_interrupt_just_behind_the_return_is_repaired() {
    let mut guest = Guest::new();
    let slot = guest.push(0);
    guest.go_to(slot + 8);
    graph(&mut guest, true, &[(real(), slot)]);
    guest.run_at(HANDLER.at(SLIDE).0, |_| {});
    let trace = guest.trace();
    assert_eq!(addresses(&trace), [Gva(real())]);
    assert!(trace.is_reliable());
}
