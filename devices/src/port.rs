//! What an x86 port I/O device is.

/// A device behind I/O ports.
pub trait PortDevice: Send {
    /// What a write can ask of the machine.
    type Action;

    /// Reads `data.len()` bytes (1, 2 or 4) at `offset` from the device's first port.
    fn read(&mut self, offset: u16, data: &mut [u8]);

    /// Writes `data` (1, 2 or 4 bytes) at `offset` from the device's first port.
    fn write(&mut self, offset: u16, data: &[u8]) -> Option<Self::Action>;
}
