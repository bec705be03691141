//! The devices that a Stillpoint guest sees. Each file is one device as a state machine over
//! port reads and writes; who wires it to a bus, an interrupt line or a host file is `vmm`'s business.

mod acpi_pm;
mod port;
mod reset;
mod serial;

pub use acpi_pm::{AcpiPm, PmAction};
pub use port::PortDevice;
pub use reset::{I8042Reset, PciReset, ResetRequested};
pub use serial::{InterruptLine, Uart};
