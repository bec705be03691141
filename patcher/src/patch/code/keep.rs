//! Whether code could still be used when no CPU and no task is in it.
//!
//! Code can leave its addresses, or those of its data, in timers, work items and tables, where no
//! stack shows them. So it may be freed only if it never forms one of its own addresses except to
//! call, to jump, or to read or write the memory there.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};

use super::{Code, Fixup, Part, Target};

/// Why `code` must be kept for good after it was unhooked; `None` when it may be freed.
pub(super) fn reason(code: &Code) -> Option<String> {
    let mut relocations: Vec<_> = code
        .fixups
        .iter()
        .filter(|fixup| fixup.part == Part::Code)
        .collect();
    relocations.sort_by_key(|fixup| fixup.offset);
    for range in &code.instructions {
        let bytes = code.text.get(range.clone()).unwrap_or_default();
        let mut decoder = Decoder::with_ip(64, bytes, range.start as u64, DecoderOptions::NONE);
        while decoder.can_decode() {
            let instruction = decoder.decode();
            let at = usize::try_from(instruction.ip()).unwrap_or(usize::MAX);
            if instruction.is_invalid() {
                return Some(format!("its byte {at:#x} is no instruction"));
            }
            let first = relocations.partition_point(|fixup| fixup.offset < at);
            let own = relocations
                .get(first..)
                .unwrap_or_default()
                .iter()
                .take_while(|fixup| fixup.offset < at + instruction.len())
                .collect::<Vec<_>>();
            if forms_own_address(&instruction, &own) {
                return Some(format!(
                    "its instruction at byte {at:#x} takes an address of its own"
                ));
            }
        }
    }
    let is_instruction = |fixup: &Fixup| {
        fixup.part == Part::Code
            && code
                .instructions
                .iter()
                .any(|range| range.contains(&fixup.offset))
    };
    code.fixups
        .iter()
        .find(|fixup| matches!(fixup.target, Target::Own(..)) && !is_instruction(fixup))
        .map(|fixup| {
            let what = match fixup.part {
                Part::Code => "constants",
                Part::Data => "data",
            };
            format!(
                "its {what} at byte {:#x} hold an address of its own",
                fixup.offset
            )
        })
}

/// Whether control leaves `code` other than by returning from it.
pub(super) fn leaves(code: &Code) -> bool {
    let own = |offset: usize| {
        let here = |fixup: &&Fixup| fixup.part == Part::Code && fixup.offset == offset;
        let target = code.fixups.iter().find(here).map(|fixup| fixup.target);
        !matches!(target, Some(Target::Kernel(_)))
    };
    code.instructions.iter().any(|range| {
        let bytes = code.text.get(range.clone()).unwrap_or_default();
        let mut decoder = Decoder::with_ip(64, bytes, range.start as u64, DecoderOptions::NONE);
        std::iter::from_fn(|| decoder.can_decode().then(|| decoder.decode())).any(|instruction| {
            match instruction.flow_control() {
                FlowControl::Next | FlowControl::Return => instruction.is_invalid(),
                FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
                    // The displacement comes last, and is relocated when it leads elsewhere.
                    let end = usize::try_from(instruction.next_ip()).unwrap_or(0);
                    !own(end.saturating_sub(4))
                }
                // The filler between functions.
                FlowControl::Interrupt => instruction.mnemonic() != Mnemonic::Int3,
                _ => true,
            }
        })
    })
}

fn forms_own_address(instruction: &Instruction, fixups: &[&&Fixup]) -> bool {
    let branches = matches!(
        instruction.flow_control(),
        FlowControl::Call | FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch
    );
    let relative = instruction.is_ip_rel_memory_operand();
    if fixups.is_empty() {
        // The assembler resolves references within a section by itself.
        return relative && instruction.mnemonic() == Mnemonic::Lea;
    }
    fixups.iter().any(|fixup| {
        matches!(fixup.target, Target::Own(..))
            && !branches
            && (!relative || instruction.mnemonic() == Mnemonic::Lea)
    })
}
