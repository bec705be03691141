//! ACPI tables: how the guest finds its CPUs, its interrupt controllers, and its way to power off.
//!
//! RSDP, XSDT, FADT, FACS, DSDT and MADT, in the BIOS range where a kernel also looks by itself.
//! The machine is ACPI from the start (no SMI command port); it has no PM timer, no VGA, no CMOS
//! clock and no keyboard controller that is worth probing.

use acpi_tables::aml::{self, Name, Package, Path};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use devices::{AcpiPm, PciReset};
use vm_memory::{Bytes, GuestAddress};

use super::layout::{ACPI_TABLES, ACPI_TABLES_END, IOAPIC, LAPIC, PM1A, RESET, SCI_IRQ};
use super::memory::GuestRam;
use super::start::StartError;

const OEM: [u8; 6] = *b"STILLP";
const OEM_TABLE: [u8; 8] = *b"STILLPNT";
const OEM_REVISION: u32 = 1;

/// The RSDP, with its ACPI 2.0 fields.
const RSDP_LEN: u64 = 36;

#[derive(Default)]
struct Bytes8(Vec<u8>);

impl AmlSink for Bytes8 {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut sink = Bytes8::default();
    table.to_aml_bytes(&mut sink);
    sink.0
}

/// Writes tables one behind the other.
struct Writer<'a> {
    ram: &'a GuestRam,
    next: u64,
}

impl Writer<'_> {
    fn put(&mut self, table: &[u8]) -> Result<u64, StartError> {
        let at = self.next.next_multiple_of(64);
        let end = at + table.len() as u64;
        if end > ACPI_TABLES_END {
            return Err(StartError::Placement("the ACPI tables (too many vCPUs)"));
        }
        self.ram
            .map()
            .write_slice(table, GuestAddress(at))
            .map_err(|_| StartError::Placement("the ACPI tables"))?;
        self.next = end;
        Ok(at)
    }
}

/// Writes all tables for `cpus` vCPUs and returns the address of the RSDP.
pub(super) fn build(ram: &GuestRam, cpus: u32) -> Result<u64, StartError> {
    let mut writer = Writer {
        ram,
        next: ACPI_TABLES + RSDP_LEN,
    };
    let facs = writer.put(&bytes_of(&FACS::new()))?;
    let dsdt = writer.put(&dsdt())?;
    let fadt = writer.put(&fadt(facs, dsdt)?)?;
    let madt = writer.put(&madt(cpus))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = writer.put(&bytes_of(&xsdt))?;
    writer.next = ACPI_TABLES;
    writer.put(&bytes_of(&Rsdp::new(OEM, xsdt)))
}

/// Only the package that says how to enter S5.
fn dsdt() -> Vec<u8> {
    let zero = &aml::ZERO;
    let s5 = Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&AcpiPm::S5, zero, zero, zero]),
    );
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&bytes_of(&s5));
    table.as_slice().to_vec()
}

const BOOT_NO_VGA: u16 = 1 << 2;
const BOOT_NO_ASPM: u16 = 1 << 4;
const BOOT_NO_CMOS_RTC: u16 = 1 << 5;

fn fadt(facs: u64, dsdt: u64) -> Result<Vec<u8>, StartError> {
    let low =
        |address: u64| u32::try_from(address).map_err(|_| StartError::Placement("the ACPI tables"));
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_32(low(dsdt)?)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(low(facs)?)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup);
    table.sci_int = SCI_IRQ.into();
    table.pm1a_evt_blk = u32::from(PM1A).into();
    table.pm1_evt_len = 4;
    table.pm1a_cnt_blk = u32::from(PM1A + AcpiPm::CONTROL).into();
    table.pm1_cnt_len = 2;
    table.iapc_boot_arch = (BOOT_NO_VGA | BOOT_NO_ASPM | BOOT_NO_CMOS_RTC).into();
    table.reset_reg = GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        RESET.into(),
    );
    table.reset_value = PciReset::RESET;
    // No C2 or C3: latencies above these limits say so.
    table.p_lvl2_lat = 101.into();
    table.p_lvl3_lat = 1001.into();
    Ok(bytes_of(&table.finalize()))
}

/// Interrupt source override flags: active high, level triggered, as SCI is wired here.
const ACTIVE_HIGH_LEVEL: u16 = 0x000d;
const ENABLED: u32 = 1;
/// APIC ids from here on need an x2APIC entry.
const FIRST_X2APIC: u32 = 255;

fn madt(cpus: u32) -> Vec<u8> {
    let mut table = Sdt::new(*b"APIC", 36, 5, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&LAPIC.to_le_bytes());
    table.append_slice(&0_u32.to_le_bytes());
    for cpu in 0..cpus {
        let [id, ..] = cpu.to_le_bytes();
        if cpu < FIRST_X2APIC {
            table.append_slice(&[0, 8, id, id]);
            table.append_slice(&ENABLED.to_le_bytes());
        } else {
            table.append_slice(&[9, 16, 0, 0]);
            table.append_slice(&cpu.to_le_bytes());
            table.append_slice(&ENABLED.to_le_bytes());
            table.append_slice(&cpu.to_le_bytes());
        }
    }
    table.append_slice(&[1, 12, 0, 0]);
    table.append_slice(&IOAPIC.to_le_bytes());
    table.append_slice(&0_u32.to_le_bytes());
    let [irq, _] = SCI_IRQ.to_le_bytes();
    table.append_slice(&[2, 10, 0, irq]);
    table.append_slice(&u32::from(SCI_IRQ).to_le_bytes());
    table.append_slice(&ACTIVE_HIGH_LEVEL.to_le_bytes());
    table.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checksum(table: &[u8]) -> u8 {
        table
            .iter()
            .fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn tables_add_up_to_zero_and_fit_for_many_cpus() {
        for cpus in [1, 2, 32, 255, 256, 1024] {
            let table = madt(cpus);
            assert_eq!(checksum(&table), 0);
            let len = u32::from_le_bytes(table[4..8].try_into().unwrap());
            assert_eq!(len as usize, table.len());
        }
        assert_eq!(checksum(&dsdt()), 0);
        assert_eq!(checksum(&fadt(0x1000, 0x2000).unwrap()), 0);
        let ram = GuestRam::reserve(2 << 20).unwrap();
        assert_eq!(build(&ram, 1024).unwrap(), ACPI_TABLES);
    }
}
