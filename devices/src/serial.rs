//! The 16550 UART on the first COM port. The registers are vm-superio's; this is the glue to our
//! port trait, and the queue for input that does not fit into its FIFO yet.

use std::collections::VecDeque;
use std::io::{self, Write};

use vm_superio::{Serial, Trigger, serial::NoEvents};

use crate::PortDevice;

/// An edge-triggered interrupt line.
pub trait InterruptLine: Send {
    /// Raises an edge.
    ///
    /// # Errors
    /// What the host said.
    fn raise(&self) -> io::Result<()>;
}

struct Line(Box<dyn InterruptLine>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.raise()
    }
}

/// A 16550 UART with an output and an input queue.
pub struct Uart<W: Write + Send> {
    serial: Serial<Line, NoEvents, W>,
    pending: VecDeque<u8>,
}

/// Input beyond this many bytes that the guest has not read is refused.
const INPUT_LIMIT: usize = 64 * 1024;

impl<W: Write + Send> Uart<W> {
    /// Ports the device takes.
    pub const LEN: u16 = 8;

    /// A UART that raises `line` and writes what the guest sends to `out`.
    pub fn new(line: Box<dyn InterruptLine>, out: W) -> Self {
        Self {
            serial: Serial::new(Line(line), out),
            pending: VecDeque::new(),
        }
    }

    /// Queues input for the guest; returns how many bytes were taken.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes
            .len()
            .min(INPUT_LIMIT.saturating_sub(self.pending.len()));
        self.pending.extend(bytes.iter().take(taken));
        self.fill();
        taken
    }

    fn fill(&mut self) {
        while !self.pending.is_empty() && self.serial.fifo_capacity() > 0 {
            let room = self.serial.fifo_capacity();
            let next: Vec<u8> = self.pending.iter().copied().take(room).collect();
            // In loopback mode the UART takes no input: it is kept until the guest leaves it.
            match self.serial.enqueue_raw_bytes(&next) {
                Ok(0) | Err(_) => return,
                Ok(n) => drop(self.pending.drain(..n)),
            }
        }
    }
}

impl<W: Write + Send> PortDevice for Uart<W> {
    type Action = ();

    fn read(&mut self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        if let ([byte], Ok(register)) = (data, u8::try_from(offset)) {
            *byte = self.serial.read(register);
            self.fill();
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> Option<()> {
        if let ([byte], Ok(register)) = (data, u8::try_from(offset)) {
            // An output that fails must not stop the guest: the byte is lost, as on an open line.
            let _ = self.serial.write(register, *byte);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct NoLine;
    impl InterruptLine for NoLine {
        fn raise(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole_and_in_order() {
        let mut uart = Uart::new(Box::new(NoLine), Vec::new());
        let sent: Vec<u8> = (0..200).collect();
        assert_eq!(uart.input(&sent), sent.len());
        let mut got = Vec::new();
        for _ in 0..sent.len() {
            let mut byte = [0];
            uart.read(0, &mut byte);
            got.push(byte[0]);
        }
        assert_eq!(got, sent);
    }

    #[test]
    fn input_is_bounded() {
        let mut uart = Uart::new(Box::new(NoLine), Vec::new());
        let taken = uart.input(&vec![0; 2 * INPUT_LIMIT]);
        assert!(taken <= INPUT_LIMIT);
    }
}
