//! Bytes on their way to a client.

use std::io::{self, Write};

/// Above this no further request of the client is taken until it has read some of its replies.
const FULL: usize = 64 << 10;

/// A client that lets events pile up beyond this is dropped.
const OVERRUN: usize = 256 << 10;

/// Memory that an idle client may keep.
const KEEP: usize = 4 << 10;

/// A queue of bytes; never blocks.
#[derive(Debug, Default)]
pub(super) struct Output {
    bytes: Vec<u8>,
    sent: usize,
    /// Nobody reads any more; everything is swallowed.
    dead: bool,
}

impl Output {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if !self.dead {
            self.bytes.extend_from_slice(bytes);
        }
    }

    /// Queues an event; false when the client does not keep up.
    #[must_use]
    pub(super) fn push_event(&mut self, bytes: &[u8]) -> bool {
        if self.waiting() + bytes.len() > OVERRUN {
            return false;
        }
        self.push(bytes);
        true
    }

    pub(super) fn waiting(&self) -> usize {
        self.bytes.len() - self.sent
    }

    pub(super) fn is_full(&self) -> bool {
        self.waiting() > FULL
    }

    /// Writes what the client takes now.
    pub(super) fn flush(&mut self, mut to: impl Write) {
        while let Some(rest) = self.bytes.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match to.write(rest) {
                Ok(count) if count > 0 => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                _ => {
                    self.dead = true;
                    self.sent = self.bytes.len();
                }
            }
        }
        if self.waiting() == 0 {
            self.sent = 0;
            self.bytes.clear();
            if self.bytes.capacity() > KEEP {
                self.bytes = Vec::new();
            }
        } else if self.sent > FULL {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes so many bytes, then refuses.
    struct Reader {
        room: usize,
        got: Vec<u8>,
        then: io::ErrorKind,
    }

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = bytes.len().min(self.room).min(7);
            if count == 0 {
                return Err(self.then.into());
            }
            self.room -= count;
            self.got
                .extend_from_slice(bytes.get(..count).unwrap_or_default());
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_is_not_taken_is_kept_in_order() {
        let mut reader = Reader {
            room: 100,
            got: Vec::new(),
            then: io::ErrorKind::WouldBlock,
        };
        let (mut output, text) = (Output::default(), b"0123456789".repeat(30));
        output.push(&text);
        while reader.got.len() < text.len() {
            output.flush(&mut reader);
            reader.room = 50;
        }
        assert_eq!(reader.got, text);
        assert_eq!(output.waiting(), 0);
    }

    #[test]
    fn a_dead_reader_costs_nothing() {
        let reader = Reader {
            room: 3,
            got: Vec::new(),
            then: io::ErrorKind::BrokenPipe,
        };
        let mut output = Output::default();
        output.push(b"abcdef");
        output.flush(reader);
        assert_eq!(output.waiting(), 0);
        output.push(&vec![0; 1 << 20]);
        assert_eq!(output.waiting(), 0);
    }

    #[test]
    fn a_reader_that_does_not_read_is_noticed() {
        let mut output = Output::default();
        let event = [b'x'; 1000];
        let taken = std::iter::repeat_with(|| output.push_event(&event))
            .take_while(|kept| *kept)
            .count();
        assert!((200..300).contains(&taken), "{taken}");
        assert!(output.is_full());
    }
}
