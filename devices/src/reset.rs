//! The two ports by which PCs have always been reset.

use crate::PortDevice;

/// The guest asked for a reset of the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ResetRequested;

/// The keyboard controller's command port (0x64), of which only "pulse the reset line" is there.
///
/// Its status reads as zero: the input buffer is empty, so a guest that waits to send a command
/// (`kb_wait` in Linux' `arch/x86/kernel/reboot.c`) does so at once.
#[derive(Debug, Default)]
pub struct I8042Reset;

/// Pulse output line 0, which is wired to the CPU's reset pin.
const PULSE_RESET: u8 = 0xfe;

impl PortDevice for I8042Reset {
    type Action = ResetRequested;

    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u16, data: &[u8]) -> Option<ResetRequested> {
        (data.first() == Some(&PULSE_RESET)).then_some(ResetRequested)
    }
}

/// The chipset's reset control register (0xcf9); also the ACPI reset register of this machine.
///
/// It shares its address with a byte of the PCI configuration address port, which is accessed four
/// bytes at a time: only single bytes count here.
#[derive(Debug, Default)]
pub struct PciReset {
    value: u8,
}

impl PciReset {
    /// The value that resets the machine (SYS_RST and RST_CPU).
    pub const RESET: u8 = 0x06;
    const RST_CPU: u8 = 0x04;
}

impl PortDevice for PciReset {
    type Action = ResetRequested;

    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let [byte] = data {
            *byte = self.value;
        }
    }

    fn write(&mut self, _offset: u16, data: &[u8]) -> Option<ResetRequested> {
        let [byte] = data else { return None };
        self.value = byte & !Self::RST_CPU;
        (byte & Self::RST_CPU != 0).then_some(ResetRequested)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyboard_controller_resets_only_on_its_command() {
        let mut port = I8042Reset;
        assert_eq!(port.write(0, &[0xd1]), None);
        assert_eq!(port.write(0, &[PULSE_RESET]), Some(ResetRequested));
        let mut status = [0xff];
        port.read(0, &mut status);
        assert_eq!(status, [0]);
    }

    #[test]
    fn a_dword_to_the_pci_address_port_is_no_reset() {
        let mut port = PciReset::default();
        assert_eq!(port.write(0, &[0x06, 0, 0, 0x80]), None);
        assert_eq!(port.write(0, &[0x02]), None);
        assert_eq!(port.write(0, &[PciReset::RESET]), Some(ResetRequested));
    }
}
