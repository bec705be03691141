//! One boot, timed.

use std::io::Read;
use std::os::fd::AsFd;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::peer::{Files, Guest, Peer};
use super::resident::{self, Resident};
use crate::Failure;

/// What init says first (guest-images/first-line.c).
const LINE: &[u8] = b"stillpoint guest: first line";

/// How long a boot may take: seconds, but the lab may have only a part of a busy host's core.
const LIMIT: Duration = Duration::from_secs(120);

/// A child that ends with this.
pub(super) struct Running(pub(super) Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots a guest and returns the milliseconds from exec to init's first line on stdout, and the
/// memory that was resident then.
pub(super) fn boot(peer: Peer, files: &Files, cpus: u32) -> Result<(f64, Resident), Failure> {
    let guest = Guest {
        initrd: &files.first_line,
        cpus,
        mode: "boot",
        options: "",
        control: None,
    };
    let mut command = peer.command(files, guest);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    let begun = Instant::now();
    let mut vmm = Running(command.spawn()?);
    let mut console = vmm
        .0
        .stdout
        .take()
        .ok_or_else(|| Failure::new("no stdout"))?;
    let mut said = Vec::new();
    while !said.windows(LINE.len()).any(|window| window == LINE) {
        let left = LIMIT.saturating_sub(begun.elapsed());
        let timeout = Timespec::try_from(left)?;
        if poll(
            &mut [PollFd::from_borrowed_fd(console.as_fd(), PollFlags::IN)],
            Some(&timeout),
        )? == 0
        {
            return Err(Failure::new(format!("no line within {LIMIT:?}")));
        }
        let mut bytes = [0; 4096];
        let n = console.read(&mut bytes)?;
        if n == 0 {
            let status = vmm.0.wait()?;
            return Err(Failure::new(format!("the VMM ended: {status}")));
        }
        said.extend_from_slice(bytes.get(..n).unwrap_or_default());
    }
    let ms = begun.elapsed().as_secs_f64() * 1e3;
    Ok((ms, resident::of(vmm.0.id())?))
}
