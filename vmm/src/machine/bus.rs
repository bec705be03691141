//! The port I/O bus: which device answers at which port, and what its answers do to the machine.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::{AcpiPm, I8042Reset, PciReset, PmAction, PortDevice, Uart};
use kvm_ioctls::VmFd;

use super::layout::{COM1, I8042, PM1A, RESET, SCI_IRQ};
use super::serial::Outbox;

/// What a port access asks of the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Request {
    PowerOff,
    Reset,
}

/// The UART of this machine.
pub(super) type Com1 = Arc<Mutex<Uart<Outbox>>>;

/// All devices behind ports.
pub(super) struct PortBus {
    com1: Com1,
    pm: Mutex<AcpiPm>,
    i8042: Mutex<I8042Reset>,
    reset: Mutex<PciReset>,
}

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn offset(port: u16, base: u16, len: u16) -> Option<u16> {
    port.checked_sub(base).filter(|offset| *offset < len)
}

impl PortBus {
    pub(super) fn new(com1: Com1) -> Self {
        Self {
            com1,
            pm: Mutex::default(),
            i8042: Mutex::default(),
            reset: Mutex::default(),
        }
    }

    /// A read: ports where nobody answers read as ones.
    pub(super) fn read(&self, port: u16, data: &mut [u8]) {
        if let Some(at) = offset(port, COM1, Uart::<Outbox>::LEN) {
            lock(&self.com1).read(at, data);
        } else if let Some(at) = offset(port, PM1A, AcpiPm::LEN) {
            lock(&self.pm).read(at, data);
        } else if port == I8042 {
            lock(&self.i8042).read(0, data);
        } else if port == RESET {
            lock(&self.reset).read(0, data);
        } else {
            data.fill(0xff);
        }
    }

    /// A write: ports where nobody listens swallow it.
    pub(super) fn write(&self, vm: &VmFd, port: u16, data: &[u8]) -> Option<Request> {
        if let Some(at) = offset(port, COM1, Uart::<Outbox>::LEN) {
            lock(&self.com1).write(at, data);
            return None;
        }
        if let Some(at) = offset(port, PM1A, AcpiPm::LEN) {
            let mut pm = lock(&self.pm);
            return match pm.write(at, data)? {
                PmAction::PowerOff => Some(Request::PowerOff),
                PmAction::Sci(level) => {
                    sci(vm, level);
                    None
                }
            };
        }
        let reset = match port {
            I8042 => lock(&self.i8042).write(0, data),
            RESET => lock(&self.reset).write(0, data),
            _ => None,
        };
        reset.map(|_| Request::Reset)
    }

    /// Presses the power button. Says whether the guest listens to it.
    pub(super) fn press_power_button(&self, vm: &VmFd) -> bool {
        let mut pm = lock(&self.pm);
        if let PmAction::Sci(level) = pm.press_power_button() {
            sci(vm, level);
        }
        pm.power_button_enabled()
    }
}

fn sci(vm: &VmFd, level: bool) {
    if let Err(error) = vm.set_irq_line(SCI_IRQ.into(), level) {
        tracing::error!(%error, "cannot change the ACPI interrupt line");
    }
}
