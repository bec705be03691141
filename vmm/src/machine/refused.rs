//! Guest writes to read-only blocks.
//!
//! KVM emulates the writing instruction and reports an MMIO write, which we drop. What KVM cannot
//! emulate (vector stores, for instance) it gives back as an internal error, provided that the
//! machine asked for it with [`tell_what_cannot_be_emulated`]; the instruction is then decoded here
//! and skipped if it does store into a read-only block. Any other such instruction gets what KVM
//! would do unasked (handle_emulation_failure in arch/x86/kvm/x86.c): in user mode an invalid opcode
//! exception, in the kernel the end of the guest.

use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory, OpAccess, Register};
use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_INTERNAL_ERROR_EMULATION, kvm_enable_cap, kvm_regs,
    kvm_sregs,
};
use kvm_ioctls::{VcpuFd, VmFd};
use patcher::guest::{Gpa, GuestMemory, Gva, VcpuRegisters};
use patcher::space::{Root, walk};

use super::board::Board;

/// A guest write that was dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct RefusedWrite {
    /// Guest-physical address of its first byte.
    pub address: Gpa,
    /// Bytes it would have written.
    pub length: usize,
    /// The vCPU that tried.
    pub vcpu: usize,
    /// How many such writes there have been since the machine started.
    pub count: u64,
}

impl RefusedWrite {
    pub(super) const fn new(address: u64, length: usize, vcpu: usize, count: u64) -> Self {
        Self {
            address: Gpa(address),
            length,
            vcpu,
            count,
        }
    }
}

/// The longest x86 instruction.
const MAX_INSTRUCTION: usize = 15;

/// Has KVM report what it cannot emulate, in user mode as well. Without it (Linux before 5.14) a
/// user program that does such a store gets SIGILL.
pub(super) fn tell_what_cannot_be_emulated(vm: &VmFd) {
    let capability = kvm_enable_cap {
        cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE,
        args: [1, 0, 0, 0],
        ..kvm_enable_cap::default()
    };
    if let Err(error) = vm.enable_cap(&capability) {
        tracing::debug!("KVM_CAP_EXIT_ON_EMULATION_FAILURE: {error}");
    }
}

/// Gets the vCPU past an instruction that KVM could not emulate: skips a store into a read-only
/// block and tells of it, raises an exception for anything else in user mode.
pub(super) fn handle(
    fd: &mut VcpuFd,
    board: &Board,
    index: usize,
) -> Result<Option<RefusedWrite>, String> {
    match skip(fd, board, index) {
        Ok(write) => Ok(Some(write)),
        Err(what) if in_user_mode(fd) => {
            tracing::debug!(vcpu = index, "{what}: an exception in user mode");
            raise_invalid_opcode(fd)
                .map(|()| None)
                .map_err(|error| format!("{what}; raising an exception: {error}"))
        }
        Err(what) => Err(what),
    }
}

fn in_user_mode(fd: &VcpuFd) -> bool {
    fd.get_sregs().is_ok_and(|sregs| sregs.ss.dpl == 3)
}

/// SDM volume 3, 6.3.1: vector 6, without an error code.
fn raise_invalid_opcode(fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut events = fd.get_vcpu_events()?;
    events.exception.injected = 1;
    events.exception.nr = 6;
    events.exception.has_error_code = 0;
    fd.set_vcpu_events(&events)
}

/// Skips the instruction that KVM could not emulate, if all it does is store into a read-only
/// block.
fn skip(fd: &mut VcpuFd, board: &Board, index: usize) -> Result<RefusedWrite, String> {
    let suberror = internal_suberror(fd);
    if suberror != KVM_INTERNAL_ERROR_EMULATION {
        return Err(format!("KVM internal error, suberror {suberror}"));
    }
    let read = |error: kvm_ioctls::Error| format!("reading registers: {error}");
    let mut regs = fd.get_regs().map_err(read)?;
    let sregs = fd.get_sregs().map_err(read)?;
    let failed = || format!("KVM cannot emulate the instruction at {:#x}", regs.rip);

    let translate = |address| translate(fd, board, &sregs, address);
    let code = fetch(board, regs.rip, &translate);
    let bits = match (sregs.cs.l, sregs.cs.db) {
        (1, _) => 64,
        (_, 1) => 32,
        _ => 16,
    };
    let mut decoder = Decoder::with_ip(bits, &code, regs.rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    if instruction.is_invalid() {
        return Err(failed());
    }
    let mut factory = InstructionInfoFactory::new();
    for used in factory.info(&instruction).used_memory() {
        if !matches!(
            used.access(),
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        ) {
            continue;
        }
        let value = |register, _, _| Some(register_value(register, &regs, &sregs));
        let Some(address) = used.virtual_address(0, value) else {
            continue;
        };
        let Some(at) = translate(address).filter(|at| board.blocks().is_read_only(*at)) else {
            continue;
        };
        let count = board.blocks().refuse_write(at).unwrap_or(0);
        regs.rip = instruction.next_ip();
        fd.set_regs(&regs)
            .map_err(|error| format!("skipping an instruction: {error}"))?;
        return Ok(RefusedWrite::new(
            at,
            used.memory_size().size(),
            index,
            count,
        ));
    }
    Err(failed())
}

fn internal_suberror(fd: &mut VcpuFd) -> u32 {
    let run = fd.get_kvm_run();
    // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, for which KVM filled in this member.
    unsafe { run.__bindgen_anon_1.internal.suberror }
}

/// Where an address of the guest's leads to now. KVM_TRANSLATE is an access of the kernel's, which
/// fails on user pages under SMAP, so the page tables are walked here.
fn translate(fd: &VcpuFd, board: &Board, sregs: &kvm_sregs, address: u64) -> Option<u64> {
    let registers = VcpuRegisters {
        cr0: sregs.cr0,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        efer: sregs.efer,
        ..VcpuRegisters::default()
    };
    match Root::current(&registers) {
        Ok(root) => walk(board.ram(), root, Gva(address))
            .ok()
            .map(|mapping| mapping.gpa.0),
        // Not in long mode: no SMAP that matters either.
        Err(_) => fd
            .translate_gva(address)
            .ok()
            .filter(|translation| translation.valid != 0)
            .map(|translation| translation.physical_address),
    }
}

/// Reads the instruction at `rip`, which may cross into another page.
fn fetch(board: &Board, rip: u64, translate: &dyn Fn(u64) -> Option<u64>) -> Vec<u8> {
    let mut code = Vec::with_capacity(MAX_INSTRUCTION);
    while code.len() < MAX_INSTRUCTION {
        let at = rip.wrapping_add(code.len() as u64);
        let in_page = usize::try_from(0x1000 - (at & 0xfff)).unwrap_or(0);
        let mut part = vec![0; in_page.min(MAX_INSTRUCTION - code.len())];
        let read = translate(at).and_then(|at| {
            let ram = board.ram().read(Gpa(at), &mut part);
            ram.or_else(|_| board.blocks().read(Gpa(at), &mut part))
                .ok()
        });
        if read.is_none() {
            break;
        }
        code.extend(part);
    }
    code
}

fn register_value(register: Register, regs: &kvm_regs, sregs: &kvm_sregs) -> u64 {
    let full = match register.full_register() {
        Register::RAX => regs.rax,
        Register::RBX => regs.rbx,
        Register::RCX => regs.rcx,
        Register::RDX => regs.rdx,
        Register::RSI => regs.rsi,
        Register::RDI => regs.rdi,
        Register::RSP => regs.rsp,
        Register::RBP => regs.rbp,
        Register::R8 => regs.r8,
        Register::R9 => regs.r9,
        Register::R10 => regs.r10,
        Register::R11 => regs.r11,
        Register::R12 => regs.r12,
        Register::R13 => regs.r13,
        Register::R14 => regs.r14,
        Register::R15 => regs.r15,
        Register::RIP => regs.rip,
        Register::FS => sregs.fs.base,
        Register::GS => sregs.gs.base,
        // The other segments have base 0 in 64-bit mode.
        _ => 0,
    };
    match register.size() {
        4 if !register.is_segment_register() => full & 0xffff_ffff,
        2 if !register.is_segment_register() => full & 0xffff,
        _ => full,
    }
}
