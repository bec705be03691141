//! Input on its way to the guest's serial port.
//!
//! What reads it must not wait for the guest where keys may be for us (Ctrl-A x has to work while
//! the guest is stopped), and must wait where nothing may be lost: so it goes into a queue, and a
//! thread of its own hands it to the guest as the guest takes it.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Input that waits for the guest.
const QUEUE: usize = 64 * 1024;
/// Handed over at once.
const CHUNK: usize = 512;
/// A serial port whose own queue is full is tried again after this.
const FULL: Duration = Duration::from_millis(10);

#[derive(Default)]
struct Shared {
    queue: Mutex<VecDeque<u8>>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, VecDeque<u8>>) -> MutexGuard<'a, VecDeque<u8>> {
        self.changed
            .wait(queue)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end into which input is put; clones share the queue.
#[derive(Clone, Default)]
pub(super) struct Inbox {
    shared: Arc<Shared>,
}

impl Inbox {
    /// Queues all of `bytes`, waiting for room.
    pub(super) fn put(&self, mut bytes: &[u8]) {
        let mut queue = self.shared.lock();
        while !bytes.is_empty() {
            let room = QUEUE.saturating_sub(queue.len()).min(bytes.len());
            let (now, later) = bytes.split_at(room);
            queue.extend(now);
            bytes = later;
            self.shared.changed.notify_all();
            if !bytes.is_empty() {
                queue = self.shared.wait(queue);
            }
        }
    }

    /// Queues what there is room for, and returns how much that was.
    pub(super) fn offer(&self, bytes: &[u8]) -> usize {
        let mut queue = self.shared.lock();
        let taken = QUEUE.saturating_sub(queue.len()).min(bytes.len());
        queue.extend(bytes.iter().take(taken));
        self.shared.changed.notify_all();
        taken
    }

    /// Body of the thread that hands the input over. `deliver` returns how much was taken.
    pub(super) fn deliver(&self, deliver: impl Fn(&[u8]) -> usize) {
        loop {
            let mut queue = self.shared.lock();
            while queue.is_empty() {
                queue = self.shared.wait(queue);
            }
            let len = queue.len().min(CHUNK);
            let chunk: Vec<u8> = queue.drain(..len).collect();
            drop(queue);
            self.shared.changed.notify_all();
            let mut rest = chunk.as_slice();
            while !rest.is_empty() {
                match deliver(rest) {
                    0 => thread::sleep(FULL),
                    taken => rest = rest.get(taken..).unwrap_or_default(),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn nothing_is_lost_on_the_way_to_a_slow_guest() {
        let inbox = Inbox::default();
        let (to, from) = channel();
        let taker = inbox.clone();
        thread::spawn(move || {
            taker.deliver(|bytes| {
                let taken = bytes.len().min(100);
                to.send(bytes[..taken].to_vec()).map_or(taken, |()| taken)
            });
        });
        let sent: Vec<u8> = (0..3 * QUEUE).map(|n| n.to_le_bytes()[0]).collect();
        inbox.put(&sent);
        let mut got = Vec::new();
        while got.len() < sent.len() {
            got.extend(from.recv().unwrap());
        }
        assert_eq!(got, sent);
    }

    #[test]
    fn an_offer_never_waits() {
        let inbox = Inbox::default();
        assert_eq!(inbox.offer(&vec![1; QUEUE - 1]), QUEUE - 1);
        assert_eq!(inbox.offer(b"abc"), 1);
        assert_eq!(inbox.offer(b"abc"), 0);
    }
}
