//! What a command may know of the client that sent it: whether it is still there, and the
//! descriptors that it passed.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::control::protocol::{QmpError, Reason};

/// Descriptors of one client that have no name yet.
const MAX_UNNAMED: usize = 8;
/// Descriptors of one client that have a name.
const MAX_NAMED: usize = 16;
/// Descriptors of all clients together; the rest of the process's limit is for clients and devices.
const MAX_IN_ALL: usize = 64;

/// A descriptor that a client passed.
#[derive(Debug)]
pub struct Passed {
    fd: OwnedFd,
    _permit: Permit,
}

impl Passed {
    /// The descriptor.
    #[must_use]
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

#[derive(Debug)]
struct Permit(Arc<AtomicUsize>);

impl Permit {
    fn get(in_all: &Arc<AtomicUsize>) -> Option<Self> {
        let more = |count| (count < MAX_IN_ALL).then_some(count + 1);
        in_all
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .ok()
            .map(|_| Self(Arc::clone(in_all)))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct Descriptors {
    unnamed: VecDeque<Passed>,
    named: BTreeMap<String, Passed>,
}

/// Whose process a client is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Its process; 0 when this process cannot see it.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
}

/// One client.
#[derive(Debug)]
pub struct Peer {
    identity: Identity,
    gone: AtomicBool,
    descriptors: Mutex<Descriptors>,
    in_all: Arc<AtomicUsize>,
}

impl Peer {
    /// A client without descriptors; `in_all` counts those of all clients.
    #[must_use]
    pub fn new(identity: Identity, in_all: Arc<AtomicUsize>) -> Self {
        Self {
            identity,
            gone: AtomicBool::new(false),
            descriptors: Mutex::default(),
            in_all,
        }
    }

    fn descriptors(&self) -> MutexGuard<'_, Descriptors> {
        self.descriptors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// True when nobody waits for the answer any more. Commands that take long look now and then,
    /// and end with [`Reason::Cancelled`].
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    pub(super) fn went(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }

    /// Takes in a descriptor that came with a packet. When the client has too many without a name,
    /// its oldest is closed; when all clients together have too many, this one is.
    pub(super) fn received(&self, fd: OwnedFd) {
        let mut descriptors = self.descriptors();
        if descriptors.unnamed.len() >= MAX_UNNAMED {
            descriptors.unnamed.pop_front();
        }
        if let Some(permit) = Permit::get(&self.in_all) {
            descriptors.unnamed.push_back(Passed {
                fd,
                _permit: permit,
            });
        } else {
            tracing::warn!("a passed file descriptor was closed: clients have {MAX_IN_ALL} open");
        }
    }

    /// Gives the oldest unnamed descriptor a name. A descriptor that had the name is closed.
    ///
    /// # Errors
    /// [`Reason::NotFound`] when none was passed, [`Reason::TooMany`], [`Reason::InvalidArgument`].
    pub fn name_descriptor(&self, name: &str) -> Result<(), QmpError> {
        let mut descriptors = self.descriptors();
        // As in QEMU, taken whether or not the name is good: it was meant for this command.
        let passed = descriptors.unnamed.pop_front().ok_or_else(|| {
            QmpError::new(
                Reason::NotFound,
                "no file descriptor was passed; send it with the command (SCM_RIGHTS)",
            )
        })?;
        if name.is_empty() || name.len() > 64 || name.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(QmpError::new(
                Reason::InvalidArgument,
                "fdname: 1 to 64 characters, not beginning with a digit",
            ));
        }
        if descriptors.named.len() >= MAX_NAMED && !descriptors.named.contains_key(name) {
            return Err(QmpError::new(
                Reason::TooMany,
                format!("{MAX_NAMED} file descriptors are open; close one with closefd"),
            ));
        }
        descriptors.named.insert(name.to_owned(), passed);
        Ok(())
    }

    /// Takes a named descriptor away from the client.
    ///
    /// # Errors
    /// [`Reason::NotFound`].
    pub fn take_descriptor(&self, name: &str) -> Result<Passed, QmpError> {
        self.descriptors().named.remove(name).ok_or_else(|| {
            let shown: String = name.chars().take(64).collect();
            QmpError::new(
                Reason::NotFound,
                format!("no file descriptor is named {shown:?}; pass one with getfd"),
            )
        })
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Identity { pid, uid } = self.identity;
        write!(f, "process {pid} of user {uid}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOMEBODY: Identity = Identity { pid: 1, uid: 0 };

    fn null() -> OwnedFd {
        let file = std::fs::File::open("/dev/null").unwrap_or_else(|e| panic!("{e}"));
        file.into()
    }

    #[test]
    fn descriptors_are_named_in_the_order_they_came() {
        let peer = Peer::new(SOMEBODY, Arc::default());
        assert!(peer.name_descriptor("a").is_err());
        peer.received(null());
        assert!(peer.name_descriptor("1a").is_err(), "a digit");
        assert!(peer.name_descriptor("a").is_err(), "the bad name took it");
        peer.received(null());
        assert!(peer.name_descriptor("a").is_ok());
        assert!(peer.take_descriptor("b").is_err());
        assert!(peer.take_descriptor("a").is_ok());
        assert!(peer.take_descriptor("a").is_err());
    }

    #[test]
    fn their_number_is_bounded_and_they_are_closed_with_the_client() {
        let in_all = Arc::new(AtomicUsize::new(0));
        let peers: Vec<_> = (0..20)
            .map(|_| Peer::new(SOMEBODY, Arc::clone(&in_all)))
            .collect();
        for round in 0..30 {
            for peer in &peers {
                peer.received(null());
                let _ = peer.name_descriptor(&format!("fd{round}"));
                assert!(in_all.load(Ordering::Relaxed) <= MAX_IN_ALL);
            }
        }
        assert_eq!(in_all.load(Ordering::Relaxed), MAX_IN_ALL);
        drop(peers);
        assert_eq!(in_all.load(Ordering::Relaxed), 0);

        let peer = Peer::new(SOMEBODY, Arc::clone(&in_all));
        for _ in 0..100 {
            peer.received(null());
        }
        assert_eq!(in_all.load(Ordering::Relaxed), MAX_UNNAMED);
        for n in 0..MAX_NAMED {
            peer.received(null());
            assert!(peer.name_descriptor(&format!("n{n}")).is_ok());
        }
        peer.received(null());
        assert!(peer.name_descriptor("one-more").is_err());
        assert!(peer.name_descriptor("n0").is_ok(), "replacing is fine");
    }
}
