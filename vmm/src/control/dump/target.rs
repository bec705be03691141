//! Where a dump goes: a file, or a descriptor that a client passed.
//!
//! The guest stands still while a dump is written, so nothing here waits for ever: a pipe or socket
//! whose reader does not read for [`PATIENCE`] is given up, and so is one whose client went away.
//! A regular file on a file system that hangs is beyond our power. Writing to a closed pipe is an
//! error and not a signal, because Rust's runtime ignores SIGPIPE.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::SendFlags;

/// How long a reader may stand still.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often to look whether the client is still there.
const GLANCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// A pipe that is ready takes this much without blocking (PIPE_BUF, pipe(7)).
const PIPE_PIECE: usize = 4096;

/// Why a dump cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The file cannot be made.
    #[error("cannot open {path}: {source}")]
    Open {
        /// The path asked for.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A terminal, or a descriptor that takes no bytes of a file.
    #[error("a dump goes to a file, a pipe, a socket or a device that is no terminal")]
    NoPlace,
    /// The descriptor is not open for writing.
    #[error("the file descriptor is not open for writing")]
    ReadOnly,
    /// The host refused.
    #[error("writing the dump: {0}")]
    Write(#[from] io::Error),
    /// The reader does not read.
    #[error("nobody read the dump for {} s", PATIENCE.as_secs())]
    Stalled,
    /// The client went away, or the VMM ends.
    #[error("the dump was given up: who asked for it went away, or the VMM ends")]
    Cancelled,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// Zeroes are left out as holes.
    Sparse,
    /// Zeroes are written.
    File,
    Pipe,
    Socket,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Target {
    file: File,
    kind: Kind,
    /// A file that we made and take away again when the dump fails.
    made: Option<PathBuf>,
}

impl Target {
    /// Makes a file, or empties one that is there. Guest memory holds secrets: only its owner may
    /// read it.
    ///
    /// # Errors
    /// [`TargetError::Open`].
    pub fn create(path: &Path) -> Result<Self, TargetError> {
        let mut options = OpenOptions::new();
        // A FIFO without a reader would keep us here.
        options
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let failed = |source| TargetError::Open {
            path: path.to_owned(),
            source,
        };
        let (file, made) = match options.clone().create_new(true).open(path) {
            Ok(file) => (file, true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let file = options.truncate(true).open(path).map_err(failed)?;
                (file, false)
            }
            Err(error) => return Err(failed(error)),
        };
        let mut target = Self::descriptor(file)?;
        target.made = made.then(|| path.to_owned());
        Ok(target)
    }

    /// Uses an open descriptor, from its current position on.
    ///
    /// # Errors
    /// [`TargetError::ReadOnly`], [`TargetError::NoPlace`], or [`TargetError::Write`] when it is of no
    /// use.
    pub fn descriptor(file: impl Into<File>) -> Result<Self, TargetError> {
        let mut file = file.into();
        let flags = rustix::fs::fcntl_getfl(&file).map_err(io::Error::from)?;
        if flags & OFlags::RWMODE == OFlags::RDONLY {
            return Err(TargetError::ReadOnly);
        }
        let metadata = file.metadata()?;
        let of = metadata.file_type();
        let kind = if metadata.is_file() {
            // What is there behind the position would shine through the holes.
            let fresh = file.stream_position()? >= metadata.len();
            if fresh && !flags.contains(OFlags::APPEND) {
                Kind::Sparse
            } else {
                Kind::File
            }
        } else if of.is_socket() {
            Kind::Socket
        } else if of.is_block_device() {
            Kind::File
        } else if of.is_fifo() || of.is_char_device() && !rustix::termios::isatty(&file) {
            Kind::Pipe
        } else {
            // An eventfd, a terminal: it may be ready and still block, and the guest stands still.
            return Err(TargetError::NoPlace);
        };
        Ok(Self {
            file,
            kind,
            made: None,
        })
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// [`TargetError`].
    pub fn write(
        &mut self,
        mut bytes: &[u8],
        cancelled: &dyn Fn() -> bool,
    ) -> Result<(), TargetError> {
        if cancelled() {
            return Err(TargetError::Cancelled);
        }
        if matches!(self.kind, Kind::Sparse | Kind::File) {
            return Ok(self.file.write_all(bytes)?);
        }
        let mut progress = Instant::now();
        while !bytes.is_empty() {
            match self.write_some(bytes) {
                Ok(0) => {
                    if cancelled() {
                        return Err(TargetError::Cancelled);
                    }
                    if progress.elapsed() > PATIENCE {
                        return Err(TargetError::Stalled);
                    }
                }
                Ok(count) => {
                    bytes = bytes.get(count..).unwrap_or_default();
                    progress = Instant::now();
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Waits a moment until something can be written, and writes what can be: 0 when nothing.
    fn write_some(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut ready = [PollFd::new(&self.file, PollFlags::OUT)];
        match poll(&mut ready, Some(&GLANCE)) {
            Ok(0) | Err(Errno::INTR) => return Ok(0),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let written = if self.kind == Kind::Socket {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            rustix::net::send(self.file.as_fd(), bytes, flags)
        } else {
            let piece = bytes.get(..PIPE_PIECE).unwrap_or(bytes);
            rustix::io::write(&self.file, piece)
        };
        match written {
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Ok(count) => Ok(count),
            Err(error) => Err(error.into()),
        }
    }

    /// Leaves a hole as long as `zeroes`, or writes them where there can be no holes.
    ///
    /// # Errors
    /// [`TargetError`].
    pub fn skip(&mut self, zeroes: &[u8], cancelled: &dyn Fn() -> bool) -> Result<(), TargetError> {
        if self.kind != Kind::Sparse {
            return self.write(zeroes, cancelled);
        }
        if cancelled() {
            return Err(TargetError::Cancelled);
        }
        let len = i64::try_from(zeroes.len()).map_err(io::Error::other)?;
        self.file.seek(SeekFrom::Current(len))?;
        Ok(())
    }

    /// Gives the file its full length, which a hole at the end did not.
    ///
    /// # Errors
    /// [`TargetError::Write`].
    pub fn finish(&mut self) -> Result<(), TargetError> {
        if self.kind == Kind::Sparse {
            let end = self.file.stream_position()?;
            if end > self.file.metadata()?.len() {
                self.file.set_len(end)?;
            }
        }
        Ok(())
    }

    /// Takes away what a failed dump has left in a file of ours.
    pub fn discard(self) {
        if let Some(path) = &self.made {
            // The reason of the failure is what the client is told.
            let _ = std::fs::remove_file(path);
        }
    }
}
