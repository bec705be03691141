//! Writes memory dumps as `dump-guest-memory` does.

use crate::guest::{GuestMemory, MemoryImage, StoppedGuest, VcpuRegisters};

const HEADER: u64 = 64;
const PROGRAM: u64 = 56;

/// An ELF core of `image`: a note with the registers of each vCPU, and all RAM.
#[must_use]
pub fn core(image: &MemoryImage) -> Vec<u8> {
    let notes: Vec<u8> = image
        .vcpus()
        .iter()
        .flat_map(|vcpu| note(&vcpu.registers))
        .collect();
    let ram = image.ram();
    let count = 1 + ram.len() as u64;
    let mut at = HEADER + PROGRAM * count;
    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    out.extend([4, 0, 62, 0, 1, 0, 0, 0]);
    for word in [0, HEADER, 0] {
        out.extend(word.to_le_bytes());
    }
    out.extend([0; 4]);
    for half in [HEADER, PROGRAM, count, 0, 0, 0] {
        out.extend((half as u16).to_le_bytes());
    }
    let mut program = |kind: u32, physical: u64, len: u64| {
        out.extend(kind.to_le_bytes());
        out.extend(0_u32.to_le_bytes());
        for word in [at, 0, physical, len, len, 0] {
            out.extend(word.to_le_bytes());
        }
        at += len;
    };
    program(4, 0, notes.len() as u64);
    for range in &ram {
        program(1, range.start.0, range.len);
    }
    out.extend(notes);
    for range in ram {
        let mut bytes = vec![0; range.len as usize];
        image.read(range.start, &mut bytes).unwrap();
        out.extend(bytes);
    }
    out
}

/// QEMU's note of a vCPU's registers (`QEMUCPUState` in its target/i386/arch_dump.c).
fn note(registers: &VcpuRegisters) -> Vec<u8> {
    let r = registers;
    let mut state = 1_u32.to_le_bytes().to_vec();
    state.extend(440_u32.to_le_bytes());
    for word in [
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15, r.rip, r.rflags,
    ] {
        state.extend(word.to_le_bytes());
    }
    let segments = [
        (r.cs, 0),
        (0, 0),
        (0, 0),
        (0, r.fs_base),
        (0, r.gs_base),
        (r.ss, 0),
        (0, 0),
        (0, 0),
        (0, 0),
        (0, r.idt_base),
    ];
    for (selector, base) in segments {
        for word in [u32::from(selector), u32::MAX, 0, 0] {
            state.extend(word.to_le_bytes());
        }
        state.extend(u64::to_le_bytes(base));
    }
    for word in [r.cr0, 0, 0, r.cr3, r.cr4, r.kernel_gs_base] {
        state.extend(word.to_le_bytes());
    }
    let mut note = Vec::new();
    for word in [5, state.len() as u32, 0] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"QEMU\0\0\0\0");
    note.extend(state);
    note
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{Gpa, Vcpu};
    use crate::synthetic::FakeGuest;

    #[test]
    fn what_is_written_is_read() {
        let mut guest = FakeGuest::new(0x4000);
        guest.set(Gpa(0x3000), 0x1122_3344);
        guest.add_vcpu(|vcpu: &mut Vcpu| {
            vcpu.registers.rip = 7;
            vcpu.registers.gs_base = 8;
            vcpu.registers.kernel_gs_base = 9;
        });
        let read = MemoryImage::from_core(core(&guest.image)).unwrap();
        assert_eq!(read.vcpus(), guest.image.vcpus());
        assert_eq!(read.read_u64(Gpa(0x3000)), Ok(0x1122_3344));
        assert_eq!(read.ram(), guest.image.ram());
    }
}
