//! The harness of the integration tests: guests that boot the real binary, natively or in the lab.
//!
//! ```no_run
//! use stillpoint_tests::{Guest, TestResult, on_kvm};
//!
//! #[test]
//! fn says_which_kernel_it_runs() -> TestResult {
//!     on_kvm(|| {
//!         let guest = Guest::boot("6.12").cpus(2).start()?;
//!         assert!(guest.sh("cat /proc/version")?.contains("Linux version 6.12"));
//!         Ok(())
//!     })
//! }
//! ```
//!
//! Where KVM can run stock guests a test runs as any other. Elsewhere [`on_kvm`] runs the same test
//! of the same binary once more in the [`lab`], and fails when it fails there. What is needed (the
//! `stillpoint` binary, kernels, the initramfs) is built or fetched on the way.

pub mod bench;
mod boot;
mod console;
mod cpio;
mod disassembly;
mod extent;
mod failure;
mod guest;
mod holding;
pub mod lab;
mod needs;
mod place;
mod qmp;
mod ran;
mod random;
mod series;
pub mod tally;
mod trampolines;

pub use boot::Boot;
pub use disassembly::{Instruction, KernelText, instructions, number, symbol};
pub use extent::all_or;
pub use failure::{Failure, TestResult};
pub use guest::Guest;
pub use holding::{armed, begin, done, hold, kept_apart, release};
pub use needs::{
    REPLACED, breakable, debug_kernel, drgn_script, initramfs, kernel, module, module_file,
    python_client, replacement, stillpoint,
};
pub use place::{
    on_host, on_kvm, on_kvm_breaking, on_kvm_then_here, on_kvm_with, on_kvm_with_module,
};
pub use qmp::{Qmp, QmpError, refusal};
pub use ran::Ran;
pub use random::{Random, seed};
pub use trampolines::{all_freed, attach_probe, detach_probes, functions, take_sum};

/// How long anything in a test may take that ought to happen soon. Generous: level 1 of the lab
/// shares its one CPU among all vCPUs, and the host may be busy.
pub const SOON: std::time::Duration = std::time::Duration::from_secs(120);
