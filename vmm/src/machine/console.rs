//! Opening the serial port's other end and reading what comes from it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::input::Inbox;
use super::serial::{Outbox, SerialTarget};
use super::start::StartError;
use super::terminal::{
    Escape, Escapes, LineEndings, RawTerminal, is_terminal, make_raw, refuse_background_reads,
    restore,
};

/// What input does to the machine.
pub(super) trait Keyboard: Send + Sync + 'static {
    /// Hands bytes to the guest; waits while the guest is stopped. Returns how many it took.
    fn input(&self, bytes: &[u8]) -> usize;
    /// The user asked to leave (Ctrl-A x).
    fn leave(&self);
}

/// The open other end. Dropping it restores the terminal and removes a socket.
pub(super) struct Console {
    input: Input,
    socket: Option<PathBuf>,
}

enum Input {
    None,
    Stdin,
    /// In raw mode when it is there; else this process is in the background.
    Terminal(Option<RawTerminal>),
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
            socket: None,
        };
        match target {
            SerialTarget::None => return Ok(console),
            SerialTarget::Stdio => {
                outbox.connect(Some(Box::new(io::stdout())));
                console.input = if is_terminal() {
                    Input::Terminal(RawTerminal::enter()?)
                } else {
                    Input::Stdin
                };
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
        keyboard: impl Keyboard + Clone,
    ) -> Result<(), StartError> {
        let outbox = outbox.clone();
        let inbox = Inbox::default();
        let (reader, guest) = (inbox.clone(), keyboard.clone());
        let input = std::mem::replace(&mut self.input, Input::None);
        let body: Box<dyn FnOnce() + Send> = match input {
            Input::None => return Ok(()),
            Input::Stdin => Box::new(move || read_all(io::stdin(), &reader)),
            Input::Terminal(raw) => Box::new(move || read_terminal(raw, &reader, &keyboard)),
            Input::Pty(master) => Box::new(move || read_all(master, &reader)),
            Input::Unix(listener) => Box::new(move || serve(&listener, &outbox, &reader)),
        };
        spawn("serial-in", body)?;
        spawn(
            "serial-deliver",
            Box::new(move || inbox.deliver(|bytes| guest.input(bytes))),
        )
    }
}

fn spawn(name: &str, body: Box<dyn FnOnce() + Send>) -> Result<(), StartError> {
    thread::Builder::new()
        .name(name.into())
        .stack_size(STACK)
        .spawn(body)
        .map(drop)
        .map_err(|source| StartError::Host {
            what: "starting a serial thread",
            source,
        })
}

impl Drop for Console {
    fn drop(&mut self) {
        restore();
        if let Some(path) = &self.socket {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn read_all(mut from: impl Read, inbox: &Inbox) {
    let mut buffer = [0; 512];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(len) => inbox.put(buffer.get(..len).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// How often a process in the background looks whether it has become the terminal's own.
const BACKGROUND: Duration = Duration::from_millis(300);

fn read_terminal(mut raw: Option<RawTerminal>, inbox: &Inbox, keyboard: &impl Keyboard) {
    refuse_background_reads();
    let mut escapes = Escapes::default();
    let mut buffer = [0; 512];
    loop {
        if raw.is_none() {
            raw = RawTerminal::enter().ok().flatten();
            if raw.is_none() {
                thread::sleep(BACKGROUND);
                continue;
            }
        }
        let len = match io::stdin().read(&mut buffer) {
            Ok(0) => return,
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Somebody put this process into the background.
            Err(error) if error.raw_os_error() == Some(libc::EIO) && is_terminal() => {
                thread::sleep(BACKGROUND);
                continue;
            }
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
        let taken = inbox.offer(&plain);
        if taken < plain.len() {
            let lost = plain.len() - taken;
            tracing::warn!(lost, "the guest takes no input: keys were dropped");
        }
    }
}

/// One client at a time; when it has finished sending, the next may come.
fn serve(listener: &UnixListener, outbox: &Outbox, inbox: &Inbox) {
    let mut before: Option<UnixStream> = None;
    for client in listener.incoming() {
        let Ok(client) = client else { continue };
        let Ok(output) = client.try_clone() else {
            continue;
        };
        if let Some(before) = before.take() {
            // It has said all it had to say, and may be one that does not read.
            let _ = before.shutdown(Shutdown::Both);
        }
        outbox.connect(Some(Box::new(output)));
        read_all(&client, inbox);
        // One that has only finished sending goes on reading until the next one comes.
        before = Some(client);
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
