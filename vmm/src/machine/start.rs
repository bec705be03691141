//! Why a machine could not be started. Each message names the remedy.

use std::path::PathBuf;

/// See the module's documentation.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// There is no KVM on this host.
    #[error("/dev/kvm does not exist: load the kvm_intel or kvm_amd module, or use scripts/lab")]
    NoKvm,
    /// This user may not use KVM.
    #[error(
        "no permission to open /dev/kvm: add this user to the group that owns it (usually kvm)"
    )]
    KvmPermission,
    /// KVM cannot run an unmodified kernel.
    #[error(
        "this host's KVM cannot run stock kernels (neither vmx nor svm in /proc/cpuinfo): \
         use scripts/lab"
    )]
    NoHardware,
    /// KVM lacks something.
    #[error("KVM on this host lacks {0}: use a host kernel of 5.10 or later")]
    KvmLacks(&'static str),
    /// A KVM call failed.
    #[error("KVM: {what}: {source}")]
    Kvm {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// A file could not be read.
    #[error("cannot read {what} {}: {source}", path.display())]
    File {
        /// What the file is.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// The kernel image is none that can be booted.
    #[error("{}: {why}", path.display())]
    Kernel {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it, and what would do.
        why: String,
    },
    /// The initramfs does not fit.
    #[error(
        "the initramfs of {initrd} MiB does not fit beside the kernel into {memory} MiB: \
         give at least --memory {needed}M"
    )]
    InitrdTooLarge {
        /// Its size in MiB, rounded up.
        initrd: u64,
        /// Guest memory in MiB.
        memory: u64,
        /// Memory that would do, in MiB.
        needed: u64,
    },
    /// Too little memory for the kernel.
    #[error("{given} MiB is too little memory for this kernel: give at least --memory {needed}M")]
    TooLittleMemory {
        /// What was given, in MiB.
        given: u64,
        /// What would do, in MiB.
        needed: u64,
    },
    /// Guest memory could not be reserved.
    #[error("cannot reserve {bytes:#x} bytes of guest memory: {why}; give less with --memory")]
    Memory {
        /// Bytes asked for.
        bytes: u64,
        /// What the host said.
        why: String,
    },
    /// The number of vCPUs is out of range.
    #[error("--cpus {given}: this host's KVM allows 1 to {max}")]
    Cpus {
        /// What was asked for.
        given: u32,
        /// What KVM allows.
        max: u32,
    },
    /// The command line is too long for the kernel.
    #[error("the kernel command line has {len} bytes; this kernel takes {max}")]
    Cmdline {
        /// Its length.
        len: usize,
        /// What the kernel takes.
        max: usize,
    },
    /// A character that a command line cannot hold.
    #[error("the kernel command line holds a NUL byte: remove it")]
    CmdlineNul,
    /// The serial port's other end could not be opened.
    #[error("--serial {target}: {source}")]
    Serial {
        /// What was asked for.
        target: String,
        /// What the host said.
        source: std::io::Error,
    },
    /// Anything else of the host.
    #[error("{what}: {source}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// Boot structures could not be placed in guest memory.
    #[error("cannot place {0} in guest memory")]
    Placement(&'static str),
}

impl StartError {
    /// An error of a KVM call.
    pub(super) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Kvm {
            what,
            source: error.into(),
        }
    }
}
