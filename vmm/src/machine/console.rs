//! Opening the serial port's other end and reading what comes from it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

use super::serial::{Outbox, SerialTarget};
use super::start::StartError;
use super::terminal::{Escape, Escapes, LineEndings, RawTerminal, make_raw};

/// What input does to the machine.
pub(super) trait Keyboard: Send + Sync + 'static {
    /// Hands bytes to the guest; waits while the guest is stopped.
    fn input(&self, bytes: &[u8]);
    /// The user asked to leave (Ctrl-A x).
    fn leave(&self);
}

/// The open other end. Dropping it restores the terminal and removes a socket.
pub(super) struct Console {
    input: Input,
    _terminal: Option<RawTerminal>,
    socket: Option<PathBuf>,
}

enum Input {
    None,
    Terminal(bool),
    Pty(File),
    Unix(UnixListener),
}

/// Stack of the threads that move serial bytes.
const STACK: usize = 64 * 1024;

impl Console {
    /// Opens `target` and connects `outbox` to it.
    pub(super) fn open(target: &SerialTarget, outbox: &Outbox) -> Result<Self, StartError> {
        let opened = Self::try_open(target, outbox);
        opened.map_err(|source| StartError::Serial {
            target: target.to_string(),
            source,
        })
    }

    fn try_open(target: &SerialTarget, outbox: &Outbox) -> io::Result<Self> {
        let mut console = Self {
            input: Input::None,
            _terminal: None,
            socket: None,
        };
        match target {
            SerialTarget::None => return Ok(console),
            SerialTarget::Stdio => {
                outbox.connect(Some(Box::new(io::stdout())));
                console._terminal = RawTerminal::enter()?;
                console.input = Input::Terminal(console._terminal.is_some());
            }
            SerialTarget::File(path) => {
                let file = File::options()
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .mode(0o600)
                    .open(path)?;
                outbox.connect(Some(Box::new(file)));
            }
            SerialTarget::Pty => {
                let (master, path) = open_pty()?;
                eprintln!("stillpoint: the guest's serial port is {}", path.display());
                outbox.connect(Some(Box::new(master.try_clone()?)));
                console.input = Input::Pty(master);
            }
            SerialTarget::Unix(path) => {
                console.input = Input::Unix(listen(path)?);
                console.socket = Some(path.clone());
            }
        }
        let pump = outbox.clone();
        thread::Builder::new()
            .name("serial-out".into())
            .stack_size(STACK)
            .spawn(move || {
                pump.pump();
            })?;
        Ok(console)
    }

    /// Starts reading input for the guest.
    pub(super) fn start_input(
        &mut self,
        outbox: &Outbox,
        keyboard: impl Keyboard,
    ) -> Result<(), StartError> {
        let outbox = outbox.clone();
        let input = std::mem::replace(&mut self.input, Input::None);
        let body: Box<dyn FnOnce() + Send> = match input {
            Input::None => return Ok(()),
            Input::Terminal(raw) => Box::new(move || read_terminal(raw, &keyboard)),
            Input::Pty(master) => Box::new(move || read_all(master, &keyboard)),
            Input::Unix(listener) => Box::new(move || serve(&listener, &outbox, &keyboard)),
        };
        thread::Builder::new()
            .name("serial-in".into())
            .stack_size(STACK)
            .spawn(body)
            .map(drop)
            .map_err(|source| StartError::Host {
                what: "starting the serial thread",
                source,
            })
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some(path) = &self.socket {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn read_all(mut from: impl Read, keyboard: &impl Keyboard) {
    let mut buffer = [0; 512];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(len) => keyboard.input(buffer.get(..len).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

fn read_terminal(raw: bool, keyboard: &impl Keyboard) {
    if !raw {
        return read_all(io::stdin(), keyboard);
    }
    let mut escapes = Escapes::default();
    let mut buffer = [0; 512];
    loop {
        let len = match io::stdin().read(&mut buffer) {
            Ok(0) => return,
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let mut plain = Vec::with_capacity(len);
        for &byte in buffer.get(..len).unwrap_or_default() {
            match escapes.feed(byte) {
                Escape::Nothing => {}
                Escape::Byte(byte) => plain.push(byte),
                Escape::Leave => {
                    keyboard.leave();
                    return;
                }
                Escape::Help => {
                    let _ = io::stderr().write_all(
                        b"\r\nCtrl-A x: quit    Ctrl-A Ctrl-A: send Ctrl-A    Ctrl-A h: this\r\n",
                    );
                }
            }
        }
        keyboard.input(&plain);
    }
}

/// One client at a time; when it goes, the next may come.
fn serve(listener: &UnixListener, outbox: &Outbox, keyboard: &impl Keyboard) {
    for client in listener.incoming() {
        let Ok(client) = client else { continue };
        let Ok(output) = client.try_clone() else {
            continue;
        };
        outbox.connect(Some(Box::new(output)));
        read_all(&client, keyboard);
        outbox.connect(None);
    }
}

/// Listens on `path`, replacing a socket that nobody listens on any more.
fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "exists and is not a socket: give another path",
            ));
        }
        if UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another process listens on it: give another path",
            ));
        }
        std::fs::remove_file(path)?;
    }
    // SAFETY: umask has no preconditions; no other thread creates files while the machine starts.
    let old = unsafe { libc::umask(0o177) };
    let listener = UnixListener::bind(path);
    // SAFETY: as above.
    unsafe { libc::umask(old) };
    listener
}

/// A new pseudo-terminal in raw mode: its master and the path of its slave.
fn open_pty() -> io::Result<(File, PathBuf)> {
    let check = |result: libc::c_int| {
        if result == -1 {
            Err(io::Error::last_os_error())
        } else {
            Ok(result)
        }
    };
    // SAFETY: posix_openpt has no preconditions.
    let fd = check(unsafe { libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) })?;
    // SAFETY: the descriptor was just opened and belongs to nobody else.
    let master = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: the descriptor is a pty master.
    check(unsafe { libc::grantpt(master.as_raw_fd()) })?;
    // SAFETY: as above.
    check(unsafe { libc::unlockpt(master.as_raw_fd()) })?;
    let mut name = [0_u8; 128];
    // SAFETY: the buffer is as long as is said, and ptsname_r terminates what it writes.
    let named =
        unsafe { libc::ptsname_r(master.as_raw_fd(), name.as_mut_ptr().cast(), name.len()) };
    if named != 0 {
        return Err(io::Error::from_raw_os_error(named));
    }
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(0);
    let path = String::from_utf8_lossy(name.get(..end).unwrap_or_default()).into_owned();
    let path = PathBuf::from(path);
    // Kept open for good: without a slave the master would report errors between clients.
    let slave = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(&path)?;
    make_raw(slave.as_raw_fd(), LineEndings::AsTheyAre)?;
    std::mem::forget(slave);
    Ok((File::from(master), path))
}
