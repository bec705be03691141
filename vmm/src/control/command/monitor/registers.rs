//! `info registers`: registers of vCPUs, which takes a short stop.

use std::fmt::Write;

use kvm_bindings::kvm_segment;

use crate::control::command::{Context, DeadlineArgument};
use crate::machine::CpuState;

/// One vCPU, or all of them.
pub(super) fn show(context: &Context, index: Option<u32>) -> String {
    let deadline = DeadlineArgument::default().or_usual();
    let read = context
        .services
        .while_stopped("info registers", deadline, |guest| {
            let all: Vec<u32> = guest.vcpus().iter().map(|vcpu| vcpu.index).collect();
            let wanted = all
                .into_iter()
                .filter(|i| index.is_none_or(|one| one == *i));
            wanted
                .map(|index| guest.cpu_state(index).map(|state| (index, state)))
                .collect::<Result<Vec<_>, _>>()
        });
    match read {
        Err(error) => format!("Error: {error}\n"),
        Ok((Err(error), _)) => format!("Error: {error}\n"),
        Ok((Ok(cpus), _)) if cpus.is_empty() => "CPU#: there is no such CPU\n".to_owned(),
        Ok((Ok(cpus), _)) => cpus.iter().map(|(index, cpu)| one(*index, cpu)).collect(),
    }
}

fn one(index: u32, cpu: &CpuState) -> String {
    let (r, s) = (&cpu.regs, &cpu.sregs);
    let mut text = format!("\nCPU#{index}\n");
    let rows = [
        [
            ("RAX", r.rax),
            ("RBX", r.rbx),
            ("RCX", r.rcx),
            ("RDX", r.rdx),
        ],
        [
            ("RSI", r.rsi),
            ("RDI", r.rdi),
            ("RBP", r.rbp),
            ("RSP", r.rsp),
        ],
        [("R8 ", r.r8), ("R9 ", r.r9), ("R10", r.r10), ("R11", r.r11)],
        [
            ("R12", r.r12),
            ("R13", r.r13),
            ("R14", r.r14),
            ("R15", r.r15),
        ],
    ];
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .map(|(name, value)| format!("{name}={value:016x}"))
            .collect();
        let _ = writeln!(text, "{}", cells.join(" "));
    }
    let _ = writeln!(
        text,
        "RIP={:016x} RFL={:08x} CPL={}",
        r.rip,
        r.rflags,
        s.cs.selector & 3
    );
    for (name, segment) in [
        ("ES ", &s.es),
        ("CS ", &s.cs),
        ("SS ", &s.ss),
        ("DS ", &s.ds),
        ("FS ", &s.fs),
        ("GS ", &s.gs),
        ("LDT", &s.ldt),
        ("TR ", &s.tr),
    ] {
        let kvm_segment {
            selector,
            base,
            limit,
            ..
        } = segment;
        let _ = writeln!(text, "{name}={selector:04x} {base:016x} {limit:08x}");
    }
    for (name, table) in [("GDT", &s.gdt), ("IDT", &s.idt)] {
        let _ = writeln!(text, "{name}=     {:016x} {:08x}", table.base, table.limit);
    }
    let _ = writeln!(
        text,
        "CR0={:08x} CR2={:016x} CR3={:016x} CR4={:08x}\nEFER={:016x} KERNEL_GS_BASE={:016x}",
        s.cr0, s.cr2, s.cr3, s.cr4, s.efer, cpu.kernel_gs_base
    );
    text
}
