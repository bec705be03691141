//! Who may connect.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use super::peer::Identity;
use crate::control::protocol::{QmpError, Reason};

/// Accepts connections, also when the process has no descriptor left: one is kept in reserve, so
/// that a client is told so instead of being left in the queue.
#[derive(Debug)]
pub(super) struct Door {
    reserve: Option<File>,
    uid: u32,
}

/// What came of an attempt to accept.
pub(super) enum Arrival {
    /// A connection that may stay.
    Client(UnixStream, Identity),
    /// One that was sent away.
    Refused,
    /// Nobody waits.
    None,
}

impl Door {
    pub(super) fn new() -> Self {
        Self {
            reserve: reserve(),
            uid: rustix::process::geteuid().as_raw(),
        }
    }

    /// Takes the next connection; never waits.
    pub(super) fn next(&mut self, listener: &UnixListener, room: bool) -> Arrival {
        match listener.accept() {
            Ok((stream, _)) => self.check(stream, room),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Arrival::None,
            Err(error) if is_exhausted(&error) => {
                self.reserve = None;
                if let Ok((stream, _)) = listener.accept() {
                    send_away(
                        &stream,
                        Reason::TooMany,
                        "the VMM has no file descriptor left",
                    );
                } else {
                    // The whole host is out of descriptors: do not spin while it recovers.
                    std::thread::sleep(Duration::from_millis(10));
                }
                self.reserve = reserve();
                tracing::warn!(%error, "a client could not be let in");
                Arrival::Refused
            }
            // The client went away before it was let in.
            Err(_) => Arrival::Refused,
        }
    }

    fn check(&self, stream: UnixStream, room: bool) -> Arrival {
        let identity = match identity(&stream) {
            Ok(identity) if identity.uid == self.uid || identity.uid == 0 => identity,
            Ok(Identity { uid, .. }) => {
                let text = format!(
                    "user {uid} may not use this socket, only {} and root",
                    self.uid
                );
                send_away(&stream, Reason::Refused, &text);
                tracing::warn!(uid, "a client of another user was refused");
                return Arrival::Refused;
            }
            Err(error) => {
                tracing::warn!(%error, "a client that cannot be identified was refused");
                return Arrival::Refused;
            }
        };
        if !room {
            let text = format!(
                "{} clients are connected; try again later",
                super::MAX_CLIENTS
            );
            send_away(&stream, Reason::TooMany, &text);
            return Arrival::Refused;
        }
        match stream.set_nonblocking(true) {
            Ok(()) => Arrival::Client(stream, identity),
            Err(_) => Arrival::Refused,
        }
    }
}

fn reserve() -> Option<File> {
    File::open("/dev/null").ok()
}

fn is_exhausted(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
    )
}

/// One line instead of a greeting. It fits into the empty buffer of a new connection.
fn send_away(mut stream: &UnixStream, reason: Reason, text: &str) {
    let error = QmpError::new(reason, text).to_value();
    let line = format!("{}\r\n", serde_json::json!({ "error": error }));
    if stream.set_nonblocking(true).is_ok() {
        let _ = stream.write(line.as_bytes());
    }
}

/// The process and user that opened the other end (SO_PEERCRED, see unix(7)).
fn identity(stream: &UnixStream) -> io::Result<Identity> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    let mut len = libc::socklen_t::try_from(size_of_val(&peer)).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `len` bytes to `peer`, which is that long, lives through
    // the call and is plain data; `stream` keeps the descriptor open.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    if result == 0 {
        Ok(Identity {
            pid: peer.pid,
            uid: peer.uid,
        })
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn pair(uid: u32, room: bool) -> (Arrival, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap_or_else(|e| panic!("{e}"));
        let door = Door { reserve: None, uid };
        (door.check(ours, room), theirs)
    }

    fn line(mut stream: UnixStream) -> String {
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text
    }

    #[test]
    fn the_own_user_may_come_in_if_there_is_room() {
        let me = rustix::process::geteuid().as_raw();
        assert!(matches!(pair(me, true).0, Arrival::Client(..)));
        let (arrival, theirs) = pair(me, false);
        assert!(matches!(arrival, Arrival::Refused));
        assert!(line(theirs).contains("TooMany: 256 clients"));
    }

    #[test]
    fn another_user_is_told_so_and_sent_away() {
        let (ours, _theirs) = UnixStream::pair().unwrap_or_else(|e| panic!("{e}"));
        let Identity { pid, uid: me } = identity(&ours).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(u32::try_from(pid).ok(), Some(std::process::id()));
        assert_eq!(me, rustix::process::geteuid().as_raw());
        let (arrival, theirs) = pair(me.wrapping_add(1000), true);
        if me == 0 {
            assert!(matches!(arrival, Arrival::Client(..)), "root may always");
        } else {
            assert!(matches!(arrival, Arrival::Refused));
            assert!(line(theirs).contains("Refused: user"));
        }
    }
}
