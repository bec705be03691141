//! What a stopped vCPU shows.

/// Whether a vCPU has a context that may be in guest code.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activity {
    /// It executes guest code when it is let go.
    Running,
    /// It waits for an interrupt in a HLT.
    Halted,
    /// It has not been started: it waits for INIT or SIPI and has no context.
    NotStarted,
}

/// The registers that say where a vCPU is and how it translates addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(missing_docs, reason = "the architecture's own register names")]
pub struct VcpuRegisters {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub cs: u16,
    pub ss: u16,
    pub gs_base: u64,
    pub fs_base: u64,
    /// MSR_KERNEL_GS_BASE: the kernel's per-CPU base while in user mode.
    pub kernel_gs_base: u64,
    /// MSR_LSTAR: the run-time address of the 64-bit system call entry.
    pub lstar: u64,
    /// Linear address of the interrupt descriptor table.
    pub idt_base: u64,
}

/// One vCPU of a stopped guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Vcpu {
    /// Index, which is also its APIC id.
    pub index: u32,
    /// Whether it has a context.
    pub activity: Activity,
    /// Its registers at the stop. Meaningless when [`Activity::NotStarted`].
    pub registers: VcpuRegisters,
    /// It is in the guest's nested guest: its registers are not those of this kernel.
    pub nested: bool,
    /// An exception or a software interrupt is to be injected again when it goes on: the
    /// instruction at its RIP has begun already.
    pub reinjects: bool,
}

impl Vcpu {
    /// Current privilege level: 0 in the kernel, 3 in user mode.
    #[must_use]
    pub const fn cpl(&self) -> u8 {
        (self.registers.cs & 3) as u8
    }
}
