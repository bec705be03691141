//! Passes input and signals from the caller to a command.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::frame::Frame;

/// How often a feeder looks whether its conversation is over.
const LOOK: Duration = Duration::from_millis(100);

/// What comes from outside while a command runs. The default is no input and no signals.
#[derive(Debug, Default)]
pub struct Inputs {
    /// Input for it; ends when the channel is closed.
    pub stdin: Option<Receiver<Vec<u8>>>,
    /// Signals for its process group.
    pub signals: Option<Receiver<i32>>,
}

type Shared<T> = Option<Arc<Mutex<Receiver<T>>>>;

/// Starts the threads that do it. When a machine is lost, those of its conversation may still be
/// there as the next one begins: they hold the lock of their channel until they see that it is over.
pub(crate) struct Feeders {
    stdin: Shared<Vec<u8>>,
    signals: Shared<i32>,
    used: Arc<AtomicBool>,
}

/// One conversation's feeding; over when dropped.
pub(crate) struct Feeding {
    delivered: Sender<()>,
    over: Arc<AtomicBool>,
}

impl Feeding {
    /// The command has got the last piece of input.
    pub(crate) fn delivered(&self) {
        // Nobody waits for it any more when the input has ended.
        let _ = self.delivered.send(());
    }
}

impl Drop for Feeding {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

impl Feeders {
    pub(crate) fn new(inputs: Inputs) -> Self {
        Self {
            stdin: inputs.stdin.map(|stdin| Arc::new(Mutex::new(stdin))),
            signals: inputs.signals.map(|signals| Arc::new(Mutex::new(signals))),
            used: Arc::default(),
        }
    }

    /// Some of the input is gone: the command cannot be given it again.
    pub(crate) fn used(&self) -> bool {
        self.used.load(Ordering::Relaxed)
    }

    /// Feeds the command at the other end of `stream`.
    pub(crate) fn start(&self, stream: &UnixStream) -> io::Result<Feeding> {
        let over = Arc::new(AtomicBool::new(false));
        let (delivered, deliveries) = channel();
        let feeding = Feeding {
            delivered,
            over: Arc::clone(&over),
        };
        match &self.stdin {
            None => (&*stream).write_all(&Frame::StdinEnd.encode())?,
            Some(stdin) => {
                let (stream, stdin) = (stream.try_clone()?, Arc::clone(stdin));
                let (used, over) = (Arc::clone(&self.used), Arc::clone(&over));
                thread::spawn(move || {
                    pass_on(
                        &stream,
                        &stdin,
                        &over,
                        |bytes| {
                            used.store(true, Ordering::Relaxed);
                            Frame::Stdin(bytes)
                        },
                        Some(&deliveries),
                    );
                    let _ = (&stream).write_all(&Frame::StdinEnd.encode());
                });
            }
        }
        if let Some(signals) = &self.signals {
            let (stream, signals) = (stream.try_clone()?, Arc::clone(signals));
            thread::spawn(move || pass_on(&stream, &signals, &over, Frame::Signal, None));
        }
        Ok(feeding)
    }
}

/// Until the channel is closed or the conversation over. With `deliveries`, each piece waits for
/// the delivery of the one before.
fn pass_on<T>(
    mut stream: &UnixStream,
    from: &Mutex<Receiver<T>>,
    over: &AtomicBool,
    frame: impl Fn(T) -> Frame,
    deliveries: Option<&Receiver<()>>,
) {
    let from = from.lock().unwrap_or_else(PoisonError::into_inner);
    while !over.load(Ordering::Relaxed) {
        match from.recv_timeout(LOOK) {
            Ok(piece) => {
                if stream.write_all(&frame(piece).encode()).is_err()
                    || deliveries.is_some_and(|deliveries| deliveries.recv().is_err())
                {
                    return;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
