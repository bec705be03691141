//! The state in which the boot processor enters the kernel: 64-bit mode, flat segments, the first
//! 4 GiB mapped one to one, interrupts off, RSI at the boot parameters.

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::super::layout::{BOOT_STACK, GDT, IDT, PAGE_TABLES, ZERO_PAGE};
use super::super::memory::GuestRam;
use super::super::start::StartError;
use super::Entry;

const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;
const PAGE: u64 = 0x1000;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs enabled, memory is write-back unless they say otherwise.
const MTRR_WRITE_BACK: u64 = (1 << 11) | 6;

/// MCG_CTL_P beside one bank (SDM vol. 3B, IA32_MCG_CAP).
const ONE_BANK: u64 = (1 << 8) | 1;
vmm_sys_util::ioctl_iow_nr!(KVM_X86_SETUP_MCE, kvm_bindings::KVMIO, 0x9c, u64);

/// A flat segment with the given selector and access byte.
fn segment(selector: u16, type_: u8, long: bool, system: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: if system { 0xffff } else { 0xffff_ffff },
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long && !system),
        s: u8::from(!system),
        l: u8::from(long),
        g: u8::from(!system),
        ..kvm_segment::default()
    }
}

/// Writes the boot-time page tables and descriptor tables.
pub(in super::super) fn write_tables(ram: &GuestRam) -> Result<(), StartError> {
    let put = |value: u64, at: u64| {
        ram.map()
            .write_obj(value.to_le(), GuestAddress(at))
            .map_err(|_| StartError::Placement("the boot page tables"))
    };
    let pdpt = PAGE_TABLES + PAGE;
    put(pdpt | PRESENT_WRITABLE, PAGE_TABLES)?;
    for gib in 0..4 {
        let directory = pdpt + (gib + 1) * PAGE;
        put(directory | PRESENT_WRITABLE, pdpt + gib * 8)?;
        for entry in 0..512 {
            let address = (gib << 30) | (entry << 21);
            put(address | PRESENT_WRITABLE | LARGE, directory + entry * 8)?;
        }
    }
    // Null, unused, 64-bit code, data, task state: the layout that the boot protocol asks for.
    let descriptors = [
        0,
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x008f_8b00_0000_ffff,
    ];
    for (index, descriptor) in (0_u64..).zip(descriptors) {
        put(descriptor, GDT + index * 8)?;
    }
    put(0, IDT)
}

/// Puts the boot processor into the state described above.
pub(in super::super) fn enter_long_mode(vcpu: &VcpuFd, entry: Entry) -> Result<(), StartError> {
    let mut sregs: kvm_sregs = vcpu
        .get_sregs()
        .map_err(StartError::kvm("reading boot registers"))?;
    let data = segment(DATA, 3, false, false);
    sregs.cs = segment(CODE, 11, true, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TASK, 11, false, true);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.idt.base = IDT;
    sregs.idt.limit = 7;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs)
        .map_err(StartError::kvm("setting boot segments"))?;

    let regs = kvm_regs {
        rip: entry.rip,
        rsi: ZERO_PAGE,
        rsp: BOOT_STACK,
        rbp: BOOT_STACK,
        rflags: 2,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&regs)
        .map_err(StartError::kvm("setting boot registers"))?;
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..kvm_fpu::default()
    };
    vcpu.set_fpu(&fpu)
        .map_err(StartError::kvm("setting the boot FPU state"))?;

    Ok(())
}

/// Sets what firmware sets on every processor alike; Linux complains when they differ.
pub(in super::super) fn set_firmware_msrs(vcpu: &VcpuFd) {
    set_msr(vcpu, MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING);
    set_msr(vcpu, MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK);
}

/// Gives the processor one machine check bank: none is ever reported to a guest, and a guest
/// looks at every bank there is, exit by exit. A host that will not leaves what KVM has, 32.
pub(in super::super) fn limit_machine_checks(vcpu: &VcpuFd) {
    // SAFETY: the ioctl reads the 64-bit capability that the reference points to, and nothing else.
    if unsafe { ioctl_with_ref(vcpu, KVM_X86_SETUP_MCE(), &ONE_BANK) } != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!("machine check banks: {error}");
    }
}

/// Sets an MSR that not every host knows; a host that does not leaves it at its reset value.
fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) {
    let entry = kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    };
    let set = Msrs::from_entries(&[entry])
        .ok()
        .and_then(|msrs| vcpu.set_msrs(&msrs).ok());
    if set != Some(1) {
        tracing::debug!(
            msr = format_args!("{index:#x}"),
            "not settable on this host"
        );
    }
}
