//! Where things are in guest-physical memory.

/// One mebibyte.
pub(super) const MIB: u64 = 1 << 20;
/// One gibibyte.
pub(super) const GIB: u64 = 1 << 30;

/// RAM below 4 GiB ends here at the latest; interrupt controllers and KVM's own pages are above.
pub(super) const LOW_RAM_END: u64 = 3 * GIB;
/// RAM that does not fit below [`LOW_RAM_END`] goes on here.
pub(super) const HIGH_RAM_START: u64 = 4 * GIB;

/// Boot-time global descriptor table.
pub(super) const GDT: u64 = 0x500;
/// Boot-time interrupt descriptor table (empty).
pub(super) const IDT: u64 = 0x520;
/// `struct boot_params` (Documentation/arch/x86/boot.rst).
pub(super) const ZERO_PAGE: u64 = 0x7000;
/// Top-level page table of the boot-time identity mapping; five more pages follow.
pub(super) const PAGE_TABLES: u64 = 0x9000;
/// Stack while the kernel sets up its own.
pub(super) const BOOT_STACK: u64 = 0x8ff0;
/// The kernel command line.
pub(super) const CMDLINE: u64 = 0x20000;
/// Conventional memory ends here; the extended BIOS data area would follow.
pub(super) const EBDA: u64 = 0x9fc00;
/// ACPI tables, the RSDP first, in the range that is searched for it.
pub(super) const ACPI_TABLES: u64 = 0xe0000;
/// End of the range for ACPI tables.
pub(super) const ACPI_TABLES_END: u64 = 0x10_0000;
/// Where extended memory begins.
pub(super) const HIMEM: u64 = 0x10_0000;

/// Local APIC.
pub(super) const LAPIC: u32 = 0xfee0_0000;
/// I/O APIC.
pub(super) const IOAPIC: u32 = 0xfec0_0000;
/// Three pages that KVM needs on Intel hosts for real mode.
pub(super) const KVM_TSS: usize = 0xfffb_d000;
/// One page that KVM needs there for an identity map.
pub(super) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// I/O port of the first UART, and its interrupt.
pub(super) const COM1: u16 = 0x3f8;
/// Interrupt line of the first UART.
pub(super) const COM1_IRQ: u32 = 4;
/// I/O port of the ACPI PM1a block.
pub(super) const PM1A: u16 = 0x600;
/// The ACPI system control interrupt.
pub(super) const SCI_IRQ: u16 = 9;
/// Keyboard controller command and status port.
pub(super) const I8042: u16 = 0x64;
/// Chipset reset control register.
pub(super) const RESET: u16 = 0xcf9;
