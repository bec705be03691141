//! ACPI fixed hardware: the PM1a event and control registers (ACPI 6.5, section 4.8.3).
//!
//! It holds the power button and the sleep control. There is no SMI command port: the machine is
//! always in ACPI mode (SCI_EN reads as one). Only S5 exists.

use crate::PortDevice;

/// What the guest asked for, or what changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PmAction {
    /// The guest entered S5.
    PowerOff,
    /// The level of the system control interrupt changed to this.
    Sci(bool),
}

/// The PM1a register block: status (2 bytes), enable (2), control (2).
#[derive(Debug, Default)]
pub struct AcpiPm {
    status: u16,
    enable: u16,
    control: u16,
}

const PWRBTN: u16 = 1 << 8;
const SCI_EN: u16 = 1;
const SLP_EN: u16 = 1 << 13;
const SLP_TYP_SHIFT: u16 = 10;

impl AcpiPm {
    /// Ports the block takes.
    pub const LEN: u16 = 6;
    /// Offset of the control register in it.
    pub const CONTROL: u16 = 4;
    /// The SLP_TYP value that means S5 here; the DSDT's `_S5` says the same.
    pub const S5: u8 = 5;

    /// Whether the guest listens to the power button.
    #[must_use]
    pub fn power_button_enabled(&self) -> bool {
        self.enable & PWRBTN != 0
    }

    /// Presses the power button. Returns the new SCI level.
    pub fn press_power_button(&mut self) -> PmAction {
        self.status |= PWRBTN;
        PmAction::Sci(self.sci())
    }

    fn sci(&self) -> bool {
        self.status & self.enable != 0
    }

    fn byte(&self, offset: u16) -> u8 {
        let [s0, s1] = self.status.to_le_bytes();
        let [e0, e1] = self.enable.to_le_bytes();
        let [c0, c1] = (self.control | SCI_EN).to_le_bytes();
        [s0, s1, e0, e1, c0, c1]
            .get(usize::from(offset))
            .copied()
            .unwrap_or(0)
    }
}

impl PortDevice for AcpiPm {
    type Action = PmAction;

    fn read(&mut self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.byte(at);
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> Option<PmAction> {
        let before = self.sci();
        let mut slept = false;
        for (at, &byte) in (offset..).zip(data) {
            let shift = (at & 1) * 8;
            let value = u16::from(byte) << shift;
            let mask = 0xff << shift;
            match at & !1 {
                // Writing a one clears the status bit.
                0 => self.status &= !value,
                2 => self.enable = (self.enable & !mask) | value,
                4 => {
                    self.control = (self.control & !mask) | (value & !SLP_EN);
                    slept |= value & SLP_EN != 0;
                }
                _ => {}
            }
        }
        if slept && (self.control >> SLP_TYP_SHIFT) & 7 == u16::from(Self::S5) {
            return Some(PmAction::PowerOff);
        }
        (self.sci() != before).then(|| PmAction::Sci(self.sci()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_power_button_interrupts_when_enabled_and_is_cleared_by_writing_one() {
        let mut pm = AcpiPm::default();
        assert_eq!(pm.press_power_button(), PmAction::Sci(false));
        assert_eq!(
            pm.write(2, &PWRBTN.to_le_bytes()),
            Some(PmAction::Sci(true))
        );
        assert!(pm.power_button_enabled());
        assert_eq!(
            pm.write(0, &PWRBTN.to_le_bytes()),
            Some(PmAction::Sci(false))
        );
    }

    #[test]
    fn s5_powers_off_and_other_sleep_types_do_not() {
        let mut pm = AcpiPm::default();
        let sleep = |typ: u16| ((typ << SLP_TYP_SHIFT) | SLP_EN).to_le_bytes();
        assert_eq!(pm.write(4, &sleep(1)), None);
        assert_eq!(
            pm.write(4, &sleep(u16::from(AcpiPm::S5))),
            Some(PmAction::PowerOff)
        );
    }

    #[test]
    fn the_machine_is_always_in_acpi_mode() {
        let mut pm = AcpiPm::default();
        let mut control = [0; 2];
        pm.read(AcpiPm::CONTROL, &mut control);
        assert_eq!(u16::from_le_bytes(control) & SCI_EN, SCI_EN);
    }
}
