//! One command on a machine of its own: booted for it, with other options for QEMU, ended after it.
//!
//! For measurements that a warm machine would disturb, or that need another clock.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::client::{Frames, Outcome, Output, Trouble, converse};
use super::feed::{Feeders, Inputs};
use super::frame::{Command, Frame};
use super::level1::Level1;
use super::{Home, LabError, at};

/// Its number; those that are kept warm count from 0.
const MACHINE: usize = 1000;

/// QEMU's options for a machine whose clock counts instructions, one to the nanosecond: an idle machine
/// goes straight to its next timer.
pub const ICOUNT: [&str; 2] = ["-icount", "shift=0,sleep=off"];

/// Time that it may take to boot: longer than others, since other options can make it slow.
const BOOT: Duration = Duration::from_secs(300);

struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs `command` on a new machine whose QEMU gets `options` too. Callers wait for one another.
///
/// There is no watch over the machine: one that hangs is ended when `limit` has passed, and is not
/// started again.
///
/// # Errors
///
/// When the machine does not come up, ends before the command, or hangs.
pub fn run_fresh(
    command: &Command,
    limit: Duration,
    options: &[&str],
    output: &mut dyn Output,
) -> Result<Outcome, LabError> {
    let home = Home::open()?;
    let level1 = Level1::prepare()?;
    let path = home.lock(MACHINE);
    let lock = File::options()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(at("cannot open the lock of a machine", &path))?;
    flock(&lock, FlockOperation::LockExclusive)
        .map_err(|error| at("cannot lock", &path)(error.into()))?;
    let lost = |why: String| LabError::Lost {
        machine: MACHINE,
        why,
        console: home.console(MACHINE),
    };

    let (stream, agent) = UnixStream::pair().map_err(LabError::Talk)?;
    let _machine = Machine(level1.start(&home, MACHINE, OwnedFd::from(agent), options)?);
    let deadline = Instant::now() + BOOT;
    let mut frames = Frames::new(&stream);
    loop {
        match frames.next(Some(deadline)) {
            Ok(Some(Frame::Ready(_))) => break,
            Ok(Some(_)) => {}
            Ok(None) => return Err(lost(format!("not up after {BOOT:?}"))),
            Err(error) => return Err(lost(format!("QEMU ended while it booted: {error}"))),
        }
    }
    let feeders = Feeders::new(Inputs::default());
    match converse(&stream, command, limit, &feeders, output) {
        Ok((exit, timed_out)) => Ok(Outcome {
            exit,
            timed_out,
            lost: 0,
        }),
        Err(Trouble::Lost(why)) => Err(lost(why)),
        Err(Trouble::Other(error)) => Err(error),
    }
}
