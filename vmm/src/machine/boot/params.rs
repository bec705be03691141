//! The zero page: what the kernel is told about memory, its command line and its initramfs.

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator};
use vm_memory::GuestAddress;

use super::super::layout::{ACPI_TABLES, CMDLINE, EBDA, HIMEM, ZERO_PAGE};
use super::super::memory::GuestRam;
use super::super::start::StartError;
use super::image::{LoadedInitrd, LoadedKernel};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const LOADER_UNDEFINED: u8 = 0xff;

pub(super) fn write(
    ram: &GuestRam,
    kernel: &LoadedKernel,
    initrd: Option<LoadedInitrd>,
    cmdline_len: usize,
    rsdp: u64,
) -> Result<(), StartError> {
    let placement = || StartError::Placement("the boot parameters");
    let low = |value: u64| u32::try_from(value).map_err(|_| placement());

    let mut params = boot_params {
        hdr: header(kernel),
        ..boot_params::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low(CMDLINE)?;
    params.hdr.cmdline_size = low(cmdline_len as u64)?;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = low(initrd.start)?;
        params.hdr.ramdisk_size = low(initrd.len)?;
    }
    params.acpi_rsdp_addr = rsdp;

    let mut entries = 0_u8;
    let mut table = params.e820_table;
    let mut add = |addr: u64, end: u64, r#type: u32| {
        if let Some(place) = table.get_mut(usize::from(entries)) {
            *place = boot_e820_entry {
                addr,
                size: end - addr,
                r#type,
            };
            entries += 1;
        }
    };
    add(0, EBDA, E820_RAM);
    add(EBDA, ACPI_TABLES, E820_RESERVED);
    add(ACPI_TABLES, HIMEM, E820_RESERVED);
    for region in ram.regions() {
        let start = region.start.0.max(HIMEM);
        add(start, region.start.0 + region.len, E820_RAM);
    }
    params.e820_table = table;
    params.e820_entries = entries;

    let boot = BootParams::new(&params, GuestAddress(ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&boot, ram.map()).map_err(|_| placement())
}

/// A bzImage brings its header; for a vmlinux the loader makes up what the kernel looks at.
fn header(kernel: &LoadedKernel) -> setup_header {
    kernel.header.unwrap_or_else(|| setup_header {
        boot_flag: 0xaa55,
        header: 0x5372_6448,
        version: 0x020f,
        kernel_alignment: 0x20_0000,
        loadflags: 1,
        ..setup_header::default()
    })
}
