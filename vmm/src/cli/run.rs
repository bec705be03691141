//! `stillpoint run`: boots a guest and stays until it has ended.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use patcher::space::Bounds;

use super::bounds::BoundsArgs;
use super::signals::EndSignals;
use crate::control::{BindError, ControlServer, ControlSocket, ServerError, command};
use crate::holding;
use crate::machine::{
    BootSource, End, Machine, MachineConfig, NamedFile, SerialTarget, StartError, restore_terminal,
};
use crate::patching::{self, Patching};

/// What `stillpoint run` takes.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// Kernel to boot: a bzImage (vmlinuz) or a vmlinux
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initramfs
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0")]
    pub cmdline: String,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// Guest memory: a number with K, M, G or T; without a letter, MiB
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = memory_size)]
    pub memory: u64,
    /// Listen for clients on this Unix socket; the option is everybody's (`--control`).
    #[arg(skip)]
    pub control: Option<PathBuf>,
    /// Where the serial port leads to: stdio, file:PATH, unix:PATH, pty or none
    #[arg(long, value_name = "TARGET", default_value = "stdio")]
    pub serial: SerialTarget,
    /// End instead of starting again when the guest reboots
    #[arg(long)]
    pub no_reboot: bool,
    /// Let the guest see VMX or SVM
    #[arg(long)]
    pub nested: bool,
    /// How far the guest's memory is followed.
    #[command(flatten)]
    pub bounds: BoundsArgs,
}

/// Reads a size in bytes.
///
/// # Errors
/// Says what a size looks like.
pub fn memory_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text}: give a size such as 512M or 2G");
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (text.get(..at), 10),
        Some((at, 'm' | 'M')) => (text.get(..at), 20),
        Some((at, 'g' | 'G')) => (text.get(..at), 30),
        Some((at, 't' | 'T')) => (text.get(..at), 40),
        _ => (Some(text), 20),
    };
    let number: u64 = digits
        .and_then(|digits| digits.parse().ok())
        .ok_or_else(wrong)?;
    let bytes = number
        .checked_mul(1 << shift)
        .filter(|bytes| *bytes < 1 << 52);
    // Guest memory comes in pages; the boot protocol's memory map is kept to whole MiB.
    bytes.map(|bytes| bytes & !0xf_ffff).ok_or_else(wrong)
}

/// Runs a guest. The exit status is 0 when it powered off or was told to quit, 1 when it could
/// not start or ran into an error, 4 when its kernel panicked, 5 when it died of a triple fault.
pub fn main(args: RunArgs) -> ExitCode {
    let booted = boot(args);
    // Threads that still know the machine keep its console open.
    restore_terminal();
    match booted {
        Ok(end) => conclude(&end),
        Err(error) => {
            eprintln!("stillpoint: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Why a guest could not be run.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("--control {0}")]
    Bind(#[from] BindError),
    #[error(transparent)]
    Serve(#[from] ServerError),
}

fn boot(args: RunArgs) -> Result<End, RunError> {
    super::log::start();
    give_back_large_pieces();
    let signals = EndSignals::block();
    let bounds = args.bounds.bounds();
    let control = args
        .control
        .as_deref()
        .map(ControlSocket::bind)
        .transpose()?;
    let initrd = args
        .initrd
        .map(|path| NamedFile::open("initramfs", path))
        .transpose()?;
    let boot = BootSource {
        kernel: NamedFile::open("kernel", args.kernel)?,
        initrd,
        cmdline: args.cmdline,
    };
    let machine = Machine::new(MachineConfig {
        cpus: args.cpus,
        memory: args.memory,
        boot,
        serial: args.serial,
        no_reboot: args.no_reboot,
        nested: args.nested,
    })?;
    let handle = machine.clone();
    signals
        .take(move || handle.signal())
        .map_err(|source| StartError::Host {
            what: "starting the signal thread",
            source,
        })?;
    let server = control
        .map(|socket| serve(socket, &machine, bounds))
        .transpose()?;
    give_back_heap();
    let end = machine.run();
    if let Some(server) = server {
        server.finish();
    }
    Ok(end?)
}

/// Pieces of memory from this size on go back to the host as soon as they are freed.
const LARGE: i32 = 1 << 20;

/// Without it, glibc keeps what was large once for later, in each of the threads that a client's command
/// may run on.
fn give_back_large_pieces() {
    // SAFETY: it sets a number of the allocator's, under the allocator's own lock.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) };
}

/// Gives the host back what reading the command line took: a guest lives for months beside others.
fn give_back_heap() {
    // SAFETY: malloc_trim has no preconditions; it touches free memory only.
    unsafe { libc::malloc_trim(0) };
}

/// Serves clients with all commands on this machine.
fn serve(
    socket: ControlSocket,
    machine: &Machine,
    bounds: Bounds,
) -> Result<ControlServer, RunError> {
    let patching = Patching::new(machine.clone(), bounds);
    let mut registry = command::standard(patching::vmcoreinfo_source(machine));
    patching::register(&mut registry, &patching);
    holding::register(&mut registry, machine, &patching);
    patching
        .start_looking()
        .map_err(|source| StartError::Host {
            what: "starting the patching thread",
            source,
        })?;
    Ok(socket.serve(Arc::new(machine.clone()), registry)?)
}

fn conclude(end: &End) -> ExitCode {
    let (what, status) = match end {
        End::PowerOff => ("the guest powered off".to_owned(), 0),
        End::Reset => (
            "the guest rebooted, and --no-reboot was given".to_owned(),
            0,
        ),
        End::Quit => return ExitCode::SUCCESS,
        End::Panicked(text) => (format!("the guest kernel panicked: {text}"), 4),
        End::TripleFault => ("the guest died of a triple fault".to_owned(), 5),
        End::Error(what) => (what.clone(), 1),
    };
    eprintln!("stillpoint: {what}");
    ExitCode::from(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(memory_size("512M"), Ok(512 << 20));
        assert_eq!(memory_size("512"), Ok(512 << 20));
        assert_eq!(memory_size("2g"), Ok(2 << 30));
        assert_eq!(memory_size("1048576K"), Ok(1 << 30));
        for wrong in ["", "M", "-1M", "1.5G", "99999999T", "1MM", "ä"] {
            assert!(memory_size(wrong).is_err(), "{wrong}");
        }
    }
}
