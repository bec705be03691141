//! Reading a parked vCPU's registers.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use patcher::guest::{Activity, Vcpu, VcpuRegisters};

use super::stop::StopError;

/// Everything about one vCPU that a core dump's notes hold.
#[derive(Clone, Debug, Default)]
pub struct CpuState {
    /// General registers.
    pub regs: kvm_regs,
    /// Segment and control registers.
    pub sregs: kvm_sregs,
    /// x87 and SSE state.
    pub fpu: kvm_fpu,
    /// MSR_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
}

const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;

fn kvm(vcpu: u32, what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StopError {
    move |error| StopError::Kvm {
        vcpu,
        what: format!("{what}: {error}"),
    }
}

/// LSTAR and KERNEL_GS_BASE.
fn msrs(index: u32, fd: &VcpuFd) -> Result<(u64, u64), StopError> {
    let entries = [MSR_LSTAR, MSR_KERNEL_GS_BASE].map(|index| kvm_msr_entry {
        index,
        ..kvm_msr_entry::default()
    });
    let refused = |what: String| StopError::Kvm { vcpu: index, what };
    let mut list = Msrs::from_entries(&entries).map_err(|error| refused(format!("{error:?}")))?;
    fd.get_msrs(&mut list).map_err(kvm(index, "reading MSRs"))?;
    match list.as_slice() {
        [lstar, gs] => Ok((lstar.data, gs.data)),
        _ => Err(refused("KVM gave no MSRs".into())),
    }
}

/// What the patcher needs to know of a vCPU.
pub(super) fn summary(index: u32, fd: &VcpuFd) -> Result<Vcpu, StopError> {
    let regs = fd.get_regs().map_err(kvm(index, "reading registers"))?;
    let sregs = fd.get_sregs().map_err(kvm(index, "reading segments"))?;
    let (lstar, kernel_gs_base) = msrs(index, fd)?;
    let state = fd
        .get_mp_state()
        .map_err(kvm(index, "reading its run state"))?
        .mp_state;
    let events = fd
        .get_vcpu_events()
        .map_err(kvm(index, "reading pending events"))?;
    let activity = match state {
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => {
            Activity::NotStarted
        }
        KVM_MP_STATE_HALTED => Activity::Halted,
        _ => Activity::Running,
    };
    Ok(Vcpu {
        index,
        activity,
        registers: VcpuRegisters {
            rax: regs.rax,
            rbx: regs.rbx,
            rcx: regs.rcx,
            rdx: regs.rdx,
            rsi: regs.rsi,
            rdi: regs.rdi,
            rsp: regs.rsp,
            rbp: regs.rbp,
            r8: regs.r8,
            r9: regs.r9,
            r10: regs.r10,
            r11: regs.r11,
            r12: regs.r12,
            r13: regs.r13,
            r14: regs.r14,
            r15: regs.r15,
            rip: regs.rip,
            rflags: regs.rflags,
            cr0: sregs.cr0,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
            cs: sregs.cs.selector,
            ss: sregs.ss.selector,
            gs_base: sregs.gs.base,
            fs_base: sregs.fs.base,
            kernel_gs_base,
            lstar,
            idt_base: sregs.idt.base,
        },
        nested: false,
        reinjects: events.exception.injected != 0 || events.interrupt.soft != 0,
    })
}

/// All registers of a vCPU.
pub(super) fn full(index: u32, fd: &VcpuFd) -> Result<CpuState, StopError> {
    let (_, kernel_gs_base) = msrs(index, fd)?;
    Ok(CpuState {
        regs: fd.get_regs().map_err(kvm(index, "reading registers"))?,
        sregs: fd.get_sregs().map_err(kvm(index, "reading segments"))?,
        fpu: fd.get_fpu().map_err(kvm(index, "reading the FPU state"))?,
        kernel_gs_base,
    })
}
