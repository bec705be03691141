//! The notes of a core file: what debuggers learn of the vCPUs and of the kernel.

use kvm_bindings::{kvm_dtable, kvm_segment};

use crate::machine::CpuState;

/// NT_PRSTATUS of include/uapi/linux/elf.h.
const NT_PRSTATUS: u32 = 1;

/// All notes, in QEMU's order: every vCPU's NT_PRSTATUS, every vCPU's QEMU note, VMCOREINFO.
pub(super) fn all(cpus: &[CpuState], vmcoreinfo: Option<&[u8]>) -> Vec<u8> {
    let mut out = Vec::new();
    for (pid, cpu) in (1..).zip(cpus) {
        note(&mut out, b"CORE\0", NT_PRSTATUS, &prstatus(pid, cpu));
    }
    for cpu in cpus {
        note(&mut out, b"QEMU\0", 0, &qemu_state(cpu));
    }
    if let Some(text) = vmcoreinfo {
        note(&mut out, b"VMCOREINFO\0", 0, text);
    }
    out
}

/// Name and descriptor are padded to four bytes.
fn note(out: &mut Vec<u8>, name: &[u8], kind: u32, desc: &[u8]) {
    for len in [name.len(), desc.len()] {
        // Both are bounded far below 4 GiB.
        let len = u32::try_from(len).unwrap_or(0);
        out.extend_from_slice(&len.to_le_bytes());
    }
    out.extend_from_slice(&kind.to_le_bytes());
    for part in [name, desc] {
        out.extend_from_slice(part);
        out.resize(out.len().next_multiple_of(4), 0);
    }
}

/// `struct elf_prstatus` of x86-64 (include/linux/elfcore.h): 32 bytes that say nothing here, the
/// pid, 76 more bytes, `user_regs_struct`, and a flag for valid FPU registers. As in QEMU, the pid
/// is the vCPU's index plus one.
fn prstatus(pid: u32, cpu: &CpuState) -> Vec<u8> {
    let mut out = vec![0; 32];
    out.extend_from_slice(&pid.to_le_bytes());
    out.resize(112, 0);
    let (r, s) = (&cpu.regs, &cpu.sregs);
    let selector = |segment: &kvm_segment| u64::from(segment.selector);
    for value in [
        r.r15,
        r.r14,
        r.r13,
        r.r12,
        r.rbp,
        r.rbx,
        r.r11,
        r.r10,
        r.r9,
        r.r8,
        r.rax,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        0, // orig_rax
        r.rip,
        selector(&s.cs),
        r.rflags,
        r.rsp,
        selector(&s.ss),
        s.fs.base,
        s.gs.base,
        selector(&s.ds),
        selector(&s.es),
        selector(&s.fs),
        selector(&s.gs),
        0, // pr_fpvalid and padding
    ] {
        out.extend_from_slice(&value.to_le_bytes());
    }
    out
}

/// QEMU's CPU state, version 1 with the optional kernel GS base (documented in the comments of its
/// own dump code, and read by crash and libkdumpfile): version, size, general registers, ten
/// segments, cr0 to cr4, kernel GS base.
fn qemu_state(cpu: &CpuState) -> Vec<u8> {
    const SIZE: u32 = 440;
    let (r, s) = (&cpu.regs, &cpu.sregs);
    let mut out = Vec::with_capacity(440);
    out.extend_from_slice(&1_u32.to_le_bytes());
    out.extend_from_slice(&SIZE.to_le_bytes());
    let long = |out: &mut Vec<u8>, value: u64| out.extend_from_slice(&value.to_le_bytes());
    for value in [
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15, r.rip, r.rflags,
    ] {
        long(&mut out, value);
    }
    for segment in [&s.cs, &s.ds, &s.es, &s.fs, &s.gs, &s.ss, &s.ldt, &s.tr] {
        let parts = [
            u32::from(segment.selector),
            segment.limit,
            flags(segment),
            0,
        ];
        parts
            .iter()
            .for_each(|part| out.extend_from_slice(&part.to_le_bytes()));
        long(&mut out, segment.base);
    }
    for table in [&s.gdt, &s.idt] {
        let kvm_dtable { base, limit, .. } = *table;
        let parts = [0, u32::from(limit), 0, 0];
        parts
            .iter()
            .for_each(|part| out.extend_from_slice(&part.to_le_bytes()));
        long(&mut out, base);
    }
    for value in [s.cr0, 0, s.cr2, s.cr3, s.cr4, cpu.kernel_gs_base] {
        long(&mut out, value);
    }
    out
}

/// The attribute bits of a segment where the second word of its descriptor has them (SDM volume 3,
/// figure 3-8).
fn flags(segment: &kvm_segment) -> u32 {
    u32::from(segment.type_) << 8
        | u32::from(segment.s) << 12
        | u32::from(segment.dpl) << 13
        | u32::from(segment.present) << 15
        | u32::from(segment.avl) << 20
        | u32::from(segment.l) << 21
        | u32::from(segment.db) << 22
        | u32::from(segment.g) << 23
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        let raw = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
        u32::from_le_bytes(raw.unwrap_or_default())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
    }

    #[test]
    fn layouts_have_the_sizes_that_readers_expect() {
        let mut cpu = CpuState::default();
        cpu.regs.rip = 0xffff_ffff_8100_1234;
        cpu.regs.rsp = 0xffff_c900_0000_1000;
        cpu.regs.r15 = 15;
        cpu.sregs.cs = kvm_segment {
            selector: 0x10,
            limit: 0xffff_ffff,
            type_: 0xb,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        cpu.sregs.cr3 = 0x1000;
        cpu.kernel_gs_base = 0xffff_8880_0000_0000;

        let status = prstatus(1, &cpu);
        assert_eq!(status.len(), 336);
        assert_eq!(u32_at(&status, 32), 1);
        assert_eq!(u64_at(&status, 112), 15);
        assert_eq!(u64_at(&status, 112 + 16 * 8), cpu.regs.rip);
        assert_eq!(u64_at(&status, 112 + 17 * 8), 0x10);
        assert_eq!(u64_at(&status, 112 + 19 * 8), cpu.regs.rsp);

        let state = qemu_state(&cpu);
        assert_eq!(state.len(), 440);
        assert_eq!((u32_at(&state, 0), u32_at(&state, 4)), (1, 440));
        assert_eq!(u64_at(&state, 8 + 16 * 8), cpu.regs.rip);
        let cs = 8 + 18 * 8;
        assert_eq!(u32_at(&state, cs), 0x10);
        assert_eq!(u32_at(&state, cs + 8), 0x00a0_9b00, "64-bit code, accessed");
        let cr = cs + 10 * 24;
        assert_eq!(u64_at(&state, cr + 3 * 8), 0x1000);
        assert_eq!(u64_at(&state, cr + 5 * 8), cpu.kernel_gs_base);
    }

    #[test]
    fn notes_are_padded() {
        let mut out = Vec::new();
        note(&mut out, b"VMCOREINFO\0", 7, b"abcde");
        assert_eq!(out.len(), 12 + 12 + 8);
        assert_eq!(
            (u32_at(&out, 0), u32_at(&out, 4), u32_at(&out, 8)),
            (11, 5, 7)
        );
        assert_eq!(out.get(24..29), Some(&b"abcde"[..]));
    }
}
