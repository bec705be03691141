//! The listening socket: made private from its first moment, and taken away at the end.
//!
//! The file gets mode 0600 when it is made, not afterwards: on Linux a socket's file takes its mode
//! from the socket's own inode (`unix_bind_bsd` in net/unix/af_unix.c), which is changed before
//! the bind. Two processes that find the same stale socket are kept apart by a lock on the
//! directory, which leaves nothing behind.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Connections that wait to be accepted; the loop accepts at once.
const BACKLOG: i32 = 128;

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody listens there.
    #[error("{path}: another process listens on this control socket; choose another path")]
    InUse {
        /// The path asked for.
        path: PathBuf,
    },
    /// There is something that is not a socket.
    #[error("{path}: is there already and is not a socket; choose another path or remove it")]
    NotASocket {
        /// The path asked for.
        path: PathBuf,
    },
    /// A socket's path has a fixed room in the kernel's address structure.
    #[error(
        "{path}: longer than the 107 bytes that a socket's path may have; choose a shorter one"
    )]
    TooLong {
        /// The path asked for.
        path: PathBuf,
    },
    /// The host refused.
    #[error("{path}: cannot {what}: {source}")]
    Host {
        /// The path asked for.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// A listening control socket; dropping it removes its file, if it is still this one.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file that we made.
    identity: Option<(u64, u64)>,
}

impl ControlSocket {
    /// Makes the socket. A socket that a dead process left behind is replaced.
    ///
    /// # Errors
    /// [`BindError`] names the remedy; nothing was changed.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let failed = |what: &'static str| {
            move |source: io::Error| BindError::Host {
                path: path.to_owned(),
                what,
                source,
            }
        };
        let address = SocketAddrUnix::new(path).map_err(|_| BindError::TooLong {
            path: path.to_owned(),
        })?;
        let _lock = lock_directory(path);
        remove_stale(path)?;

        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(|error| failed("make a socket")(error.into()))?;
        fchmod(&socket, Mode::RUSR | Mode::WUSR)
            .map_err(|error| failed("make the socket private")(error.into()))?;
        rustix::net::bind(&socket, &address)
            .map_err(|error| failed("make the socket's file")(error.into()))?;
        let listening = Self {
            listener: UnixListener::from(socket),
            path: path.to_owned(),
            identity: identity(path),
        };
        rustix::net::listen(&listening.listener, BACKLOG)
            .map_err(|error| failed("listen on the socket")(error.into()))?;
        Ok(listening)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _lock = lock_directory(&self.path);
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // Gone already is as good.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let file = std::fs::symlink_metadata(path).ok()?;
    Some((file.dev(), file.ino()))
}

/// Held while a socket's file is looked at and made. A directory that may be used but not read
/// cannot be locked, and then is not.
fn lock_directory(path: &Path) -> Option<File> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = File::open(parent).ok()?;
    flock(directory.as_fd(), FlockOperation::LockExclusive).ok()?;
    Some(directory)
}

fn remove_stale(path: &Path) -> Result<(), BindError> {
    let failed = |what, source| BindError::Host {
        path: path.to_owned(),
        what,
        source,
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at the path", error)),
        Ok(file) if !file.file_type().is_socket() => {
            return Err(BindError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        // Nobody listens: its owner is dead.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|source| failed("replace a stale socket", source))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(failed("use the socket that is there", error))
        }
        // Connected, or a full queue, or a socket of another type: somebody has it.
        _ => Err(BindError::InUse {
            path: path.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"))
    }

    fn bind(path: &Path) -> ControlSocket {
        ControlSocket::bind(path).unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn it_is_private_and_goes_away() {
        let directory = directory();
        let path = directory.path().join("vm.sock");
        let socket = bind(&path);
        let file = std::fs::symlink_metadata(&path).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(file.mode() & 0o7777, 0o600);
        assert!(UnixStream::connect(&path).is_ok());
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_live_one_is_left_alone_and_a_stale_one_replaced() {
        let directory = directory();
        let path = directory.path().join("vm.sock");
        let live = bind(&path);
        assert!(matches!(
            ControlSocket::bind(&path),
            Err(BindError::InUse { .. })
        ));
        assert!(UnixStream::connect(&path).is_ok(), "still there");
        drop(live);

        drop(UnixListener::bind(&path)); // leaves its file, as a killed process does
        assert!(path.exists());
        let again = bind(&path);
        assert!(UnixStream::connect(&path).is_ok());
        drop(again);
    }

    #[test]
    fn what_is_not_a_socket_is_left_alone() {
        let directory = directory();
        let path = directory.path().join("notes");
        std::fs::write(&path, "mine").unwrap_or_else(|e| panic!("{e}"));
        assert!(matches!(
            ControlSocket::bind(&path),
            Err(BindError::NotASocket { .. })
        ));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap_or_else(|e| panic!("{e}"));
        assert!(matches!(
            ControlSocket::bind(&link),
            Err(BindError::NotASocket { .. })
        ));
        assert_eq!(std::fs::read_to_string(&path).ok().as_deref(), Some("mine"));
    }

    #[test]
    fn what_replaced_it_is_not_removed_with_it() {
        let directory = directory();
        let path = directory.path().join("vm.sock");
        let first = bind(&path);
        std::fs::remove_file(&path).unwrap_or_else(|e| panic!("{e}"));
        let second = bind(&path);
        drop(first);
        assert!(
            UnixStream::connect(&path).is_ok(),
            "the second's file is gone"
        );
        drop(second);
    }

    #[test]
    fn a_path_that_cannot_be_is_said_so() {
        let directory = directory();
        let long = directory.path().join("x".repeat(120));
        assert!(matches!(
            ControlSocket::bind(&long),
            Err(BindError::TooLong { .. })
        ));
        let nowhere = directory.path().join("no/such/directory/vm.sock");
        assert!(matches!(
            ControlSocket::bind(&nowhere),
            Err(BindError::Host { .. })
        ));
    }

    #[test]
    fn of_many_that_start_at_once_one_gets_a_stale_path() {
        let directory = directory();
        let path = directory.path().join("vm.sock");
        drop(UnixListener::bind(&path));
        let results: Vec<_> = std::thread::scope(|scope| {
            let starting: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| ControlSocket::bind(&path)))
                .collect();
            starting.into_iter().map(|t| t.join()).collect()
        });
        let bound = results.iter().filter(|r| matches!(r, Ok(Ok(_)))).count();
        assert_eq!(bound, 1, "{results:?}");
        assert!(UnixStream::connect(&path).is_ok());
    }
}
