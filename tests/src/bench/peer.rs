//! The VMMs that are measured, and how each is started.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::MEMORY;

/// Where Debian puts QEMU.
pub(super) const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// A VMM with a kind of machine.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Peer {
    /// `stillpoint run` with a vmlinux.
    Ours,
    /// QEMU's smallest machine, with a vmlinux.
    Microvm,
    /// QEMU's usual machine, with a bzImage.
    Pc,
}

/// Where everything is.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(super) struct Files {
    pub(super) stillpoint: PathBuf,
    pub(super) vmlinux: PathBuf,
    pub(super) vmlinuz: PathBuf,
    /// With an init that says one line.
    pub(super) first_line: PathBuf,
    /// With a shell on the serial port.
    pub(super) shell: PathBuf,
    /// A callback that waits for the guest's own grace periods.
    pub(super) synchronize: PathBuf,
    /// A callback that returns at once.
    pub(super) bare: PathBuf,
    /// One that can call something of the guest, and does not.
    pub(super) seldom: PathBuf,
}

impl Files {
    /// The same with each path replaced.
    pub(super) fn each<E>(
        &self,
        mut replace: impl FnMut(&Path) -> Result<PathBuf, E>,
    ) -> Result<Self, E> {
        Ok(Self {
            stillpoint: replace(&self.stillpoint)?,
            vmlinux: replace(&self.vmlinux)?,
            vmlinuz: replace(&self.vmlinuz)?,
            first_line: replace(&self.first_line)?,
            shell: replace(&self.shell)?,
            synchronize: replace(&self.synchronize)?,
            bare: replace(&self.bare)?,
            seldom: replace(&self.seldom)?,
        })
    }
}

/// A guest to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guest<'a> {
    pub(super) initrd: &'a Path,
    pub(super) cpus: u32,
    /// What init does.
    pub(super) mode: &'a str,
    /// What else its kernel is told.
    pub(super) options: &'a str,
    /// Its control socket.
    pub(super) control: Option<&'a Path>,
}

impl Peer {
    /// What it is called in tables.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ours => "stillpoint, vmlinux",
            Self::Microvm => "QEMU microvm, vmlinux",
            Self::Pc => "QEMU pc, bzImage",
        }
    }

    /// The command that runs `guest`, its serial port on stdin and stdout.
    pub(super) fn command(self, files: &Files, guest: Guest<'_>) -> Command {
        let cmdline = format!(
            "console=ttyS0 reboot=k panic=-1 quiet pci=off mode={} {}",
            guest.mode, guest.options
        );
        let cpus = guest.cpus.to_string();
        let machine = match self {
            Self::Ours => {
                let mut command = Command::new(&files.stillpoint);
                command
                    .args(["run", "--memory", &format!("{MEMORY}M"), "--cpus", &cpus])
                    .args(["--cmdline", &cmdline])
                    .arg("--kernel")
                    .arg(&files.vmlinux)
                    .arg("--initrd")
                    .arg(guest.initrd);
                if let Some(socket) = guest.control {
                    command.arg("--control").arg(socket);
                }
                return command;
            }
            Self::Microvm => "microvm",
            Self::Pc => "pc",
        };
        let mut command = Command::new(QEMU);
        command
            .args(["-enable-kvm", "-cpu", "host", "-M", machine])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-serial", "stdio", "-m", &MEMORY.to_string()])
            .args(["-smp", &cpus, "-append", &cmdline])
            .arg("-kernel")
            .arg(match self {
                Self::Pc => &files.vmlinuz,
                Self::Ours | Self::Microvm => &files.vmlinux,
            })
            .arg("-initrd")
            .arg(guest.initrd);
        if let Some(socket) = guest.control {
            command
                .arg("-qmp")
                .arg(format!("unix:{},server=on,wait=off", socket.display()));
        }
        command
    }
}
