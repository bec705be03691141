//! One incarnation of the machine: a KVM virtual machine with its vCPUs and devices.
//!
//! A reset builds a new board over the same RAM. Nothing of the old one can survive in the new,
//! and there is no second way to initialise a vCPU.

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};

use kvm_bindings::{CpuId, kvm_lapic_state};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::SIGRTMIN;

use super::blocks::{Blocks, ram_slots};
use super::boot::{self, BootSource};
use super::breakpoints::Breakpoints;
use super::bus::{Com1, PortBus};
use super::cpuid;
use super::layout::{COM1_IRQ, KVM_IDENTITY_MAP, KVM_TSS};
use super::memory::GuestRam;
use super::refused;
use super::serial::Outbox;
use super::start::StartError;

/// The byte by which another thread makes KVM_RUN return (`immediate_exit` of `struct kvm_run`).
struct ImmediateExit(*const AtomicU8);

// SAFETY: the pointer leads into the vCPU's shared mapping, which lives as long as the `VcpuFd`
// beside it in `VcpuSlot`, and is only accessed atomically.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

/// A vCPU and what other threads need to reach it.
pub(super) struct VcpuSlot {
    fd: Mutex<VcpuFd>,
    immediate_exit: ImmediateExit,
    thread: OnceLock<libc::pthread_t>,
    tid: AtomicI32,
}

impl VcpuSlot {
    fn new(mut fd: VcpuFd) -> Self {
        let immediate_exit = ImmediateExit((&raw const fd.get_kvm_run().immediate_exit).cast());
        Self {
            fd: Mutex::new(fd),
            immediate_exit,
            thread: OnceLock::new(),
            tid: AtomicI32::new(0),
        }
    }

    /// The right to run the vCPU or to look at it.
    pub(super) fn lock(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same, when the vCPU does not run and nobody looks at it.
    pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, VcpuFd>> {
        match self.fd.try_lock() {
            Ok(fd) => Some(fd),
            Err(TryLockError::Poisoned(fd)) => Some(fd.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn set_immediate_exit(&self, value: u8) {
        // SAFETY: the pointer is valid as long as `self.fd`, and a byte is always aligned.
        let byte = unsafe { &*self.immediate_exit.0 };
        byte.store(value, Ordering::SeqCst);
    }

    /// Makes the vCPU leave guest mode, or not enter it.
    pub(super) fn kick(&self) {
        self.set_immediate_exit(1);
        if let Some(thread) = self.thread.get() {
            // SAFETY: only a vCPU whose seat at the gate is Running is kicked, or all of them before
            // they are joined: the thread exists, and the signal has a handler.
            unsafe { libc::pthread_kill(*thread, SIGRTMIN()) };
        }
    }

    /// Makes the next KVM_RUN finish what the last exit was about, and return. For the vCPU's own
    /// thread, which undoes it at the gate.
    pub(super) fn come_back(&self) {
        self.set_immediate_exit(1);
    }

    /// Undoes a kick.
    pub(super) fn unkick(&self) {
        self.set_immediate_exit(0);
    }

    /// Remembers the thread that runs this vCPU; called by that thread.
    pub(super) fn set_tid(&self) {
        // SAFETY: gettid has no preconditions.
        self.tid.store(unsafe { libc::gettid() }, Ordering::Relaxed);
    }

    /// Linux thread id of its thread.
    pub(super) fn tid(&self) -> i32 {
        self.tid.load(Ordering::Relaxed)
    }

    /// Remembers how to signal the thread.
    pub(super) fn set_thread<T>(&self, thread: &std::thread::JoinHandle<T>) {
        let _ = self.thread.set(thread.as_pthread_t());
    }
}

/// See the module's documentation.
pub(super) struct Board {
    vm: VmFd,
    vcpus: Vec<VcpuSlot>,
    bus: PortBus,
    com1: Com1,
    blocks: Blocks,
    ram: GuestRam,
    breakpoints: Breakpoints,
}

/// What every incarnation is made from.
pub(super) struct Parts<'a> {
    pub(super) kvm: &'a Kvm,
    pub(super) ram: &'a GuestRam,
    pub(super) boot: &'a BootSource,
    pub(super) cpus: u32,
    pub(super) nested: bool,
    pub(super) console: Outbox,
}

struct ComLine(EventFd);

impl devices::InterruptLine for ComLine {
    fn raise(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

impl Board {
    /// Builds the machine and loads the kernel; its vCPUs have not run yet.
    pub(super) fn new(parts: &Parts<'_>) -> Result<Self, StartError> {
        let vm = parts
            .kvm
            .create_vm()
            .map_err(StartError::kvm("creating a virtual machine"))?;
        vm.set_tss_address(KVM_TSS)
            .map_err(StartError::kvm("setting the TSS address"))?;
        vm.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(StartError::kvm("setting the identity map address"))?;
        for region in ram_slots(parts.ram) {
            // SAFETY: the regions are mappings of `parts.ram`, which this board keeps alive
            // longer than the virtual machine; they do not overlap.
            unsafe { vm.set_user_memory_region(region) }
                .map_err(StartError::kvm("giving memory to the guest"))?;
        }
        refused::tell_what_cannot_be_emulated(&vm);
        vm.create_irq_chip()
            .map_err(StartError::kvm("creating the interrupt controllers"))?;

        let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| {
            StartError::Host {
                what: "creating an eventfd",
                source,
            }
        })?;
        vm.register_irqfd(&line, COM1_IRQ)
            .map_err(StartError::kvm("wiring the serial port"))?;
        let uart = devices::Uart::new(Box::new(ComLine(line)), parts.console.clone());
        let com1: Com1 = Arc::new(Mutex::new(uart));

        let (supported, tsc_deadline) = cpuid::supported(parts.kvm)?;
        let entry = boot::load(parts.ram, parts.boot, parts.cpus)?;
        boot::write_tables(parts.ram)?;
        let mut vcpus = Vec::new();
        for index in 0..parts.cpus {
            let fd = vm
                .create_vcpu(index.into())
                .map_err(StartError::kvm("creating a vCPU"))?;
            let table = cpuid::for_vcpu(&supported, index, parts.cpus, tsc_deadline, parts.nested);
            fd.set_cpuid2(&table)
                .map_err(StartError::kvm("setting CPUID"))?;
            wire_local_apic(&fd)?;
            boot::limit_machine_checks(&fd);
            boot::set_firmware_msrs(&fd);
            if index == 0 {
                boot::enter_long_mode(&fd, entry)?;
            }
            vcpus.push(VcpuSlot::new(fd));
        }
        Ok(Self {
            blocks: Blocks::new(parts.ram, physical_bits(&supported)),
            bus: PortBus::new(com1.clone()),
            ram: parts.ram.clone(),
            breakpoints: Breakpoints::default(),
            vm,
            vcpus,
            com1,
        })
    }

    pub(super) fn vm(&self) -> &VmFd {
        &self.vm
    }

    pub(super) fn vcpus(&self) -> &[VcpuSlot] {
        &self.vcpus
    }

    pub(super) fn bus(&self) -> &PortBus {
        &self.bus
    }

    pub(super) fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    pub(super) fn breakpoints(&self) -> &Breakpoints {
        &self.breakpoints
    }

    pub(super) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Input for the guest's serial port. Returns how many bytes it took.
    pub(super) fn serial_input(&self, bytes: &[u8]) -> usize {
        self.com1
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .input(bytes)
    }
}

/// Guest-physical address width that both the guest's CPUID and the host's paging allow.
fn physical_bits(supported: &CpuId) -> u32 {
    let leaf = supported
        .as_slice()
        .iter()
        .find(|entry| entry.function == 0x8000_0008);
    leaf.map_or(36, |entry| entry.eax & 0xff)
}

const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const DELIVER_NMI: u8 = 4;
const DELIVER_EXTINT: u8 = 7;

/// Wires the 8259 to LINT0 and NMI to LINT1, as firmware leaves them (MP specification 3.6.2.2).
fn wire_local_apic(fd: &VcpuFd) -> Result<(), StartError> {
    let mut state: kvm_lapic_state = fd
        .get_lapic()
        .map_err(StartError::kvm("reading the local APIC"))?;
    for (register, mode) in [(APIC_LVT0, DELIVER_EXTINT), (APIC_LVT1, DELIVER_NMI)] {
        // The delivery mode is bits 8 to 10 of the register.
        if let Some(byte) = state.regs.get_mut(register + 1) {
            let [kept] = byte.to_le_bytes();
            *byte = i8::from_le_bytes([(kept & !7) | mode]);
        }
    }
    fd.set_lapic(&state)
        .map_err(StartError::kvm("setting the local APIC"))
}

/// Fails when this host's KVM lacks something that the machine is built on.
pub(super) fn require_capabilities(kvm: &Kvm) -> Result<(), StartError> {
    let needed = [
        (Cap::Irqchip, "an in-kernel interrupt controller"),
        (Cap::Irqfd, "irqfd"),
        (Cap::UserMemory, "user memory regions"),
        (Cap::SetTssAddr, "KVM_SET_TSS_ADDR"),
        (Cap::SetIdentityMapAddr, "KVM_SET_IDENTITY_MAP_ADDR"),
        (Cap::ExtCpuid, "KVM_GET_SUPPORTED_CPUID"),
        (Cap::MpState, "KVM_GET_MP_STATE"),
        (Cap::VcpuEvents, "KVM_GET_VCPU_EVENTS"),
        (Cap::ReadonlyMem, "read-only memory slots"),
        (Cap::ImmediateExit, "immediate_exit"),
    ];
    for (capability, name) in needed {
        if !kvm.check_extension(capability) {
            return Err(StartError::KvmLacks(name));
        }
    }
    Ok(())
}
