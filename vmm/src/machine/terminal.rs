//! The user's terminal: raw mode that is always undone, and the keys that are for us.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::sync::{Mutex, Once, OnceLock, PoisonError};

use vmm_sys_util::signal::block_signal;

/// The terminal's settings from before raw mode, while it is in raw mode.
static SAVED: OnceLock<Mutex<Option<libc::termios>>> = OnceLock::new();

fn saved() -> &'static Mutex<Option<libc::termios>> {
    SAVED.get_or_init(Mutex::default)
}

/// Standard input in raw mode; dropping it restores the terminal. A panic restores it as well.
pub(super) struct RawTerminal(());

/// Whether standard input is a terminal.
pub(super) fn is_terminal() -> bool {
    // SAFETY: isatty only looks at the descriptor.
    unsafe { libc::isatty(libc::STDIN_FILENO) == 1 }
}

/// Makes reading the terminal from the background an error for the calling thread, instead of a
/// stop of the whole process with its guest.
pub(super) fn refuse_background_reads() {
    // One that is blocked already is as it should be.
    let _ = block_signal(libc::SIGTTIN);
}

impl RawTerminal {
    /// Puts standard input into raw mode if it is a terminal that this process may change.
    pub(super) fn enter() -> io::Result<Option<Self>> {
        // SAFETY: tcgetpgrp only looks at the descriptor.
        let foreground = unsafe { libc::tcgetpgrp(libc::STDIN_FILENO) };
        // SAFETY: getpgrp has no preconditions.
        if !is_terminal() || foreground != unsafe { libc::getpgrp() } {
            return Ok(None);
        }
        *saved().lock().unwrap_or_else(PoisonError::into_inner) =
            Some(make_raw(libc::STDIN_FILENO, LineEndings::ForPeople)?);
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let next = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore();
                next(info);
            }));
        });
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Undoes raw mode; does nothing when there is nothing to undo.
pub fn restore() {
    let settings = saved()
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    if let Some(settings) = settings {
        // SAFETY: the settings came from tcgetattr on the same descriptor.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const settings) };
    }
}

/// What a terminal in raw mode does with `\n` on its way out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum LineEndings {
    /// Nothing: what a serial port does. On a pty this is the way of a client's input to the guest.
    AsTheyAre,
    /// Makes it `\r\n`, so that our own messages look right.
    ForPeople,
}

/// Puts a terminal into raw mode. Returns the settings it had.
pub(super) fn make_raw(fd: RawFd, output: LineEndings) -> io::Result<libc::termios> {
    let mut before = MaybeUninit::<libc::termios>::uninit();
    // SAFETY: the pointer is to memory for one termios.
    if unsafe { libc::tcgetattr(fd, before.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: tcgetattr succeeded and filled it in.
    let before = unsafe { before.assume_init() };
    let mut raw = before;
    // SAFETY: `raw` is a valid termios.
    unsafe { libc::cfmakeraw(&raw mut raw) };
    if output == LineEndings::ForPeople {
        raw.c_oflag |= libc::OPOST;
    }
    // SAFETY: `raw` is a valid termios.
    if unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw const raw) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(before)
}

const CTRL_A: u8 = 1;

/// Recognises Ctrl-A sequences, as QEMU's serial multiplexer has them.
#[derive(Default)]
pub(super) struct Escapes {
    armed: bool,
}

/// What a key turned out to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Escape {
    Nothing,
    Byte(u8),
    Leave,
    Help,
}

impl Escapes {
    pub(super) fn feed(&mut self, byte: u8) -> Escape {
        if !std::mem::take(&mut self.armed) {
            if byte == CTRL_A {
                self.armed = true;
                return Escape::Nothing;
            }
            return Escape::Byte(byte);
        }
        match byte {
            b'x' | b'X' => Escape::Leave,
            b'h' | b'?' => Escape::Help,
            CTRL_A | b'a' => Escape::Byte(CTRL_A),
            _ => Escape::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_leaves_and_ctrl_a_twice_is_a_ctrl_a() {
        let feed = |keys: &[u8]| {
            let mut escapes = Escapes::default();
            keys.iter()
                .map(|key| escapes.feed(*key))
                .filter(|e| *e != Escape::Nothing)
                .collect()
        };
        let got: Vec<Escape> = feed(b"a\x01x");
        assert_eq!(got, [Escape::Byte(b'a'), Escape::Leave]);
        let got: Vec<Escape> = feed(b"\x01\x01x");
        assert_eq!(got, [Escape::Byte(CTRL_A), Escape::Byte(b'x')]);
    }
}
