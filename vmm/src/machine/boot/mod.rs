//! Loading a kernel and handing over to it by the 64-bit boot protocol
//! (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
//!
//! A bzImage unpacks and, with KASLR, moves itself. A vmlinux starts where it was linked.

mod cpu;
mod image;
mod params;

use std::fs::File;
use std::path::PathBuf;

use patcher::guest::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

pub(super) use cpu::{enter_long_mode, limit_machine_checks, set_firmware_msrs, write_tables};
pub use image::{KernelKind, check_kernel};

use super::acpi;
use super::layout::{ACPI_TABLES, CMDLINE};
use super::memory::GuestRam;
use super::start::StartError;

/// An open file and what it is called.
#[derive(Debug)]
pub struct NamedFile {
    /// Its path as the user gave it.
    pub path: PathBuf,
    /// The file itself, kept open so that a replaced file does not matter.
    pub file: File,
}

impl NamedFile {
    /// Opens `path` for reading.
    ///
    /// # Errors
    /// [`StartError::File`] with what the host said.
    pub fn open(what: &'static str, path: PathBuf) -> Result<Self, StartError> {
        let opened = File::open(&path).and_then(|file| {
            if file.metadata()?.is_dir() {
                return Err(std::io::ErrorKind::IsADirectory.into());
            }
            Ok(file)
        });
        match opened {
            Ok(file) => Ok(Self { path, file }),
            Err(source) => Err(StartError::File { what, path, source }),
        }
    }
}

/// What to boot.
#[derive(Debug)]
pub struct BootSource {
    /// A bzImage or a vmlinux.
    pub kernel: NamedFile,
    /// An initramfs.
    pub initrd: Option<NamedFile>,
    /// The kernel command line.
    pub cmdline: String,
}

/// Where a vCPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Guest-physical address of the first instruction.
    pub(super) rip: u64,
}

/// Puts the kernel, initramfs, command line, boot parameters and ACPI tables into `ram`.
pub(super) fn load(ram: &GuestRam, source: &BootSource, cpus: u32) -> Result<Entry, StartError> {
    let kernel = image::load(ram, &source.kernel)?;
    let initrd = match &source.initrd {
        Some(initrd) => Some(image::load_initrd(ram, initrd, &kernel)?),
        None => None,
    };

    let max = kernel.cmdline_max;
    if source.cmdline.contains('\0') {
        return Err(StartError::CmdlineNul);
    }
    if source.cmdline.len() > max {
        return Err(StartError::Cmdline {
            len: source.cmdline.len(),
            max,
        });
    }
    let mut cmdline = source.cmdline.clone().into_bytes();
    cmdline.push(0);
    ram.map()
        .write_slice(&cmdline, GuestAddress(CMDLINE))
        .map_err(|_| StartError::Placement("the command line"))?;

    let rsdp = acpi::build(ram, cpus)?;
    debug_assert_eq!(rsdp, ACPI_TABLES);
    params::write(ram, &kernel, initrd, source.cmdline.len(), rsdp)?;
    Ok(Entry { rip: kernel.entry })
}

/// Total RAM in MiB, for messages.
fn ram_mib(ram: &GuestRam) -> u64 {
    ram.ram().iter().map(|range| range.len).sum::<u64>() >> 20
}
