//! Unwinding.

use patcher::Kernel;
use patcher::guest::{LinkAddr, MemoryImage, StoppedGuest};
use patcher::stack::{OrcFormat, StacksRequest, Unwinder, unwind, vcpus};
use patcher::synthetic::{ElfSection, STACK_SIZE, TEXT, TYPES};
use patcher::tasks::tasks as list;

use super::files::FORMATS;
use crate::guests::Base;
use crate::{Edits, Input};

/// Words on a stack that are changed at the most.
const MOST_WORDS: usize = 256;

/// The sections that unwind tables are in, with the header by which their format is told.
pub(crate) fn orc_sections(
    format: OrcFormat,
    slots: u64,
    addresses: Vec<u8>,
    entries: Vec<u8>,
) -> Vec<ElfSection> {
    let section = |name, address, bytes| ElfSection {
        name,
        address: LinkAddr(address),
        bytes,
        executable: false,
    };
    let behind = slots
        .wrapping_add(addresses.len() as u64)
        .next_multiple_of(8);
    let last = behind
        .wrapping_add(entries.len() as u64)
        .next_multiple_of(8);
    let mut sections = vec![
        section(".orc_unwind_ip", slots, addresses),
        section(".orc_unwind", behind, entries),
    ];
    let header: Option<u128> = match format {
        OrcFormat::Plain => None,
        OrcFormat::Signal => Some(0xfe5d_32bf_581b_d63b_2ca9_a5c6_5ba5_a625),
        OrcFormat::Renumbered => Some(0x137c_36ad_7627_c4dd_5593_2176_bb0e_cdbd),
    };
    // The last four bytes of the hash.
    let tail: u32 = match format {
        OrcFormat::Signal => 0xeab3_fe24,
        _ => 0x5041_fc82,
    };
    if let Some(header) = header {
        let hash = [&header.to_be_bytes()[..], &tail.to_be_bytes()].concat();
        sections.push(section(".orc_header", last, hash));
    }
    sections
}

/// A kernel with unwind tables to order, and a task and a vCPU with stacks to order.
pub fn stacks(data: &[u8]) {
    let base = Base::get();
    let mut input = Input::new(data);
    let own = input.byte() & 1 != 0;
    let kernel = own.then(|| tables(base, &mut input)).flatten();
    let kernel = kernel.as_ref().unwrap_or(&base.guest.kernel);
    base.edited(&mut input, |edits, input| {
        fill(base, edits, input);
        for vcpu in edits.image.vcpus_mut() {
            let registers = &mut vcpu.registers;
            registers.rip = word(base, input);
            registers.rsp = word(base, input);
            registers.rbp = word(base, input);
            registers.r10 = registers.rsp;
        }
        look(base, kernel, edits.image);
    });
}

fn look(base: &Base, kernel: &Kernel, image: &MemoryImage) {
    let space = base.located.space(image);
    let modules = base
        .modules
        .modules(&space, &base.located)
        .unwrap_or_default();
    let unwinder = Unwinder::new(
        kernel,
        &base.stacks,
        &base.tasks,
        &space,
        &base.located,
        image.vcpus(),
    )
    .with_modules(Some(&base.modules), modules);
    let Ok(tasks) = list(&space, &base.located, &base.tasks) else {
        return;
    };
    for task in &tasks {
        let trace = unwinder.task(task);
        if let Some(doubt) = trace.doubt() {
            assert!(doubt.frame <= trace.frames.len());
        }
    }
    let slide = base.located.slide;
    let unwound = unwind(&unwinder, slide, tasks, &StacksRequest::default());
    let _ = unwound.named(kernel, &base.stacks);
    let _ = vcpus(&unwinder, &space, &base.tasks, slide, kernel, &base.stacks);
}

/// A kernel with as many entries as a byte says: for each the distance of its code from the one
/// before, and its six bytes.
fn tables(base: &Base, input: &mut Input<'_>) -> Option<std::sync::Arc<Kernel>> {
    let format = *input.pick(&FORMATS)?;
    let slots = TYPES.0 + 0x20_0000;
    let (mut addresses, mut entries) = (Vec::new(), Vec::new());
    let mut at = TEXT.0;
    for number in 0..u64::from(input.byte()) {
        at = at.wrapping_add(u64::from(input.short()));
        let distance = at.wrapping_sub(slots.wrapping_add(4 * number));
        addresses.extend_from_slice(distance.to_le_bytes().get(..4)?);
        let entry = input.bytes(6);
        entries.extend_from_slice(entry);
        entries.resize(entries.len().next_multiple_of(6), 0);
    }
    entries.resize(addresses.len() / 4 * 6, 0);
    let file = base
        .guest
        .plan
        .file(&orc_sections(format, slots, addresses, entries));
    Kernel::open(file).ok().map(std::sync::Arc::new)
}

/// A word as it may be on a stack: code, a place on a stack, a selector, a small or any number.
fn word(base: &Base, input: &mut Input<'_>) -> u64 {
    match input.byte() & 7 {
        0 => 0,
        1..=3 => {
            let at = LinkAddr(TEXT.0 + u64::from(input.short()));
            at.at(base.located.slide).0
        }
        4 | 5 => {
            let area = input.pick(&base.areas).copied().unwrap_or_default();
            area.0 + u64::from(input.short()) % STACK_SIZE
        }
        6 => u64::from(input.byte()),
        _ => input.long(),
    }
}

/// Writes words below the top of the second task's stack. The first one's is a vCPU's.
fn fill(base: &Base, edits: &mut Edits<'_>, input: &mut Input<'_>) {
    let Some(stack) = base.areas.get(1) else {
        return;
    };
    let count = usize::from(input.byte()).min(MOST_WORDS);
    for number in 0..count {
        let value = word(base, input);
        let at = stack.offset(STACK_SIZE - 8 * (number as u64 + 1));
        edits.write(base.guest.fake.gpa(at), value);
    }
}
