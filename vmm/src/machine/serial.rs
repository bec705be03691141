//! Where the guest's serial port leads to: the terminal, a file, a Unix socket or a pty.
//!
//! Output goes through a bounded queue with a thread of its own, so that a reader that is slow or
//! gone never blocks a vCPU for long: a full queue makes the vCPU wait a moment, then bytes are
//! dropped and counted.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::gate::wait_while;

/// The other end of the guest's serial port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SerialTarget {
    /// This process's standard input and output.
    Stdio,
    /// Output to a file, which is created or emptied; no input.
    File(PathBuf),
    /// A Unix socket that one client at a time connects to.
    Unix(PathBuf),
    /// A new pseudo-terminal.
    Pty,
    /// Nowhere.
    None,
}

impl FromStr for SerialTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = |path: &str| {
            if path.is_empty() {
                Err(format!("{text}: give a path"))
            } else {
                Ok(path.into())
            }
        };
        match text.split_once(':') {
            Some(("file", rest)) => Ok(Self::File(path(rest)?)),
            Some(("unix", rest)) => Ok(Self::Unix(path(rest)?)),
            _ => match text {
                "stdio" => Ok(Self::Stdio),
                "pty" => Ok(Self::Pty),
                "none" => Ok(Self::None),
                _ => Err(format!(
                    "{text}: give stdio, file:PATH, unix:PATH, pty or none"
                )),
            },
        }
    }
}

impl std::fmt::Display for SerialTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Pty => f.write_str("pty"),
            Self::None => f.write_str("none"),
        }
    }
}

/// Output that waits for its reader.
const QUEUE: usize = 64 * 1024;
/// How long a vCPU waits for room before it drops what it has.
const PATIENCE: Duration = Duration::from_millis(100);
/// A line that is not complete waits this long for its rest: a guest writes byte by byte, and a
/// thread that wakes for each costs more than the guest's exits do.
const GATHER: Duration = Duration::from_millis(1);
/// As much as this goes out at once, complete or not.
const ENOUGH: usize = 4096;

type Sink = Box<dyn Write + Send>;

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    /// There is a line's end in `bytes`.
    line: bool,
    writing: bool,
    sink_present: bool,
    dropped: u64,
    patience_spent: bool,
}

impl Queue {
    fn should_go(&self) -> bool {
        self.line || self.bytes.len() >= ENOUGH
    }
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    sink: Mutex<Option<Sink>>,
}

impl Shared {
    /// Waits while `condition` holds, at most for `patience`.
    fn wait_while<'a>(
        &self,
        queue: MutexGuard<'a, Queue>,
        patience: Duration,
        condition: impl Fn(&Queue) -> bool,
    ) -> MutexGuard<'a, Queue> {
        wait_while(&self.changed, queue, Instant::now() + patience, condition)
    }
}

/// The sending end of the serial port's output; clones share it.
#[derive(Clone, Default)]
pub(super) struct Outbox {
    shared: Arc<Shared>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Outbox {
    /// Sends output to `sink` from now on, or drops it.
    pub(super) fn connect(&self, sink: Option<Sink>) {
        let present = sink.is_some();
        *lock(&self.shared.sink) = sink;
        let mut queue = lock(&self.shared.queue);
        queue.sink_present = present;
        queue.patience_spent = false;
        if !present {
            queue.bytes.clear();
            queue.line = false;
        }
        drop(queue);
        self.shared.changed.notify_all();
    }

    /// Body of the output thread.
    pub(super) fn pump(&self) {
        let mut chunk = Vec::new();
        loop {
            let mut queue = lock(&self.shared.queue);
            while queue.bytes.is_empty() {
                queue = self
                    .shared
                    .changed
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            let mut queue = self
                .shared
                .wait_while(queue, GATHER, |queue| !queue.should_go());
            chunk.clear();
            chunk.extend(queue.bytes.drain(..));
            queue.line = false;
            queue.writing = true;
            queue.patience_spent = false;
            drop(queue);
            self.shared.changed.notify_all();

            let mut sink = lock(&self.shared.sink);
            let failed = sink
                .as_mut()
                .is_some_and(|sink| sink.write_all(&chunk).and_then(|()| sink.flush()).is_err());
            if failed {
                *sink = None;
            }
            drop(sink);
            let mut queue = lock(&self.shared.queue);
            queue.writing = false;
            if failed {
                queue.sink_present = false;
            }
            drop(queue);
            self.shared.changed.notify_all();
        }
    }

    /// Waits until everything is written, at most `patience`.
    pub(super) fn drain(&self, patience: Duration) {
        let waits = |queue: &Queue| !queue.bytes.is_empty() || queue.writing;
        let queue = self
            .shared
            .wait_while(lock(&self.shared.queue), patience, waits);
        if !waits(&queue) && queue.dropped > 0 {
            tracing::warn!(
                bytes = queue.dropped,
                "serial output that nobody read was dropped"
            );
        }
    }
}

impl Write for Outbox {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut queue = lock(&self.shared.queue);
        if !queue.sink_present {
            return Ok(bytes.len());
        }
        let is_full = |queue: &Queue| queue.bytes.len() + bytes.len() > QUEUE;
        if is_full(&queue) && !queue.patience_spent {
            queue = self.shared.wait_while(queue, PATIENCE, is_full);
            queue.patience_spent |= is_full(&queue);
        }
        if is_full(&queue) {
            queue.dropped += bytes.len() as u64;
            return Ok(bytes.len());
        }
        let was = (queue.bytes.is_empty(), queue.should_go());
        queue.line |= bytes.contains(&b'\n');
        queue.bytes.extend(bytes);
        if was.0 || was.1 != queue.should_go() {
            self.shared.changed.notify_all();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_read_and_print_alike() {
        for text in ["stdio", "pty", "none", "file:/a b", "unix:x.sock"] {
            assert_eq!(text.parse::<SerialTarget>().unwrap().to_string(), text);
        }
        for text in ["", "file", "file:", "tcp:1", "unix:"] {
            assert!(text.parse::<SerialTarget>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_reader_that_does_not_read_costs_a_moment_and_then_bytes() {
        struct Stuck;
        impl Write for Stuck {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                std::thread::sleep(Duration::from_secs(3600));
                Ok(0)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut outbox = Outbox::default();
        outbox.connect(Some(Box::new(Stuck)));
        let pump = outbox.clone();
        std::thread::spawn(move || pump.pump());
        let begun = Instant::now();
        for _ in 0..4 * QUEUE {
            outbox.write_all(b"x").unwrap();
        }
        assert!(begun.elapsed() < Duration::from_secs(5));
        assert!(lock(&outbox.shared.queue).dropped > 0);
    }
}
