//! A running guest.

use std::cell::RefCell;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::console::Text;
use crate::{Boot, Failure, Qmp, Ran, SOON, needs};

/// A guest and its VMM; both end when it is dropped.
#[derive(Debug)]
pub struct Guest {
    vmm: RefCell<Child>,
    /// For its socket and the test's own files.
    dir: TempDir,
    socket: PathBuf,
    console: Text,
    log: Text,
    shell: RefCell<Shell>,
}

#[derive(Debug)]
struct Shell {
    input: Option<ChildStdin>,
    commands: u32,
}

impl std::fmt::Debug for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

impl Guest {
    /// A guest to be, with a kernel as `guest-images/fetch` names it.
    pub fn boot(kernel: &str) -> Boot {
        Boot::new(kernel)
    }

    pub(crate) fn new(
        mut vmm: Child,
        dir: TempDir,
        socket: PathBuf,
        console: Text,
        log: Text,
    ) -> Self {
        let shell = RefCell::new(Shell {
            input: vmm.stdin.take(),
            commands: 0,
        });
        Self {
            vmm: RefCell::new(vmm),
            dir,
            socket,
            console,
            log,
            shell,
        }
    }

    /// Runs a command in the guest's shell and returns what it prints, errors included.
    ///
    /// # Errors
    ///
    /// When its exit status is not 0, or it takes too long.
    pub fn sh(&self, command: &str) -> Result<String, Failure> {
        let (status, said) = self.sh_status(command)?;
        if status == 0 {
            return Ok(said);
        }
        Err(Failure::new(format!(
            "in the guest: {command}: status {status}\n{said}"
        )))
    }

    /// Runs a command in the guest's shell and returns its exit status and what it prints.
    ///
    /// # Errors
    ///
    /// When it takes too long.
    pub fn sh_status(&self, command: &str) -> Result<(i32, String), Failure> {
        self.sh_within(SOON, command)
    }

    /// The same with a limit of its own.
    ///
    /// # Errors
    ///
    /// When it takes longer.
    pub fn sh_within(&self, limit: Duration, command: &str) -> Result<(i32, String), Failure> {
        let (from, id) = self.send(command)?;
        let said = self.console.wait_for(from, &format!("\n<{id}:"), limit)?;
        let behind = from + said.len();
        let status = self
            .console
            .wait_for(behind, ">\n", limit)?
            .rsplit(':')
            .next()
            .and_then(|status| status.parse().ok())
            .ok_or_else(|| Failure::new("the guest's shell did not say a status"))?;
        Ok((status, said))
    }

    /// What the guest's kernel has complained about so far: warnings, bugs, lockups, stalls. Empty for
    /// a guest that is well.
    ///
    /// # Errors
    ///
    /// When its shell does not answer.
    pub fn complaints(&self) -> Result<String, Failure> {
        self.sh(
            "dmesg | grep -E 'WARNING: CPU|BUG|Oops|Call Trace|lockup|stalls? on|hung_task|blocked for more|W\\+X|ftrace bug' | \
             grep -v 'Checked W+X mappings: passed' || true",
        )
    }

    /// Sends a command to the guest's shell without waiting for its end.
    ///
    /// # Errors
    ///
    /// When the serial port takes no input.
    pub fn start_sh(&self, command: &str) -> Result<(), Failure> {
        self.send(command).map(|_| ())
    }

    fn send(&self, command: &str) -> Result<(usize, u32), Failure> {
        let mut shell = self.shell.borrow_mut();
        shell.commands += 1;
        let id = shell.commands;
        let quoted = command.replace('\'', r"'\''");
        let line = format!("sh -c '{quoted}' </dev/null; printf '\\n<{id}:%s>\\n' $?\n");
        let from = self.console.len();
        shell
            .input
            .as_mut()
            .ok_or_else(|| Failure::new("the guest's serial port takes no input"))?
            .write_all(line.as_bytes())?;
        Ok((from, id))
    }

    /// Writes to the guest's serial port.
    ///
    /// # Errors
    ///
    /// When it takes no input.
    pub fn type_in(&self, text: &str) -> Result<(), Failure> {
        self.shell
            .borrow_mut()
            .input
            .as_mut()
            .ok_or_else(|| Failure::new("the guest's serial port takes no input"))?
            .write_all(text.as_bytes())?;
        Ok(())
    }

    /// All that came from the serial port so far.
    #[must_use]
    pub fn console(&self) -> String {
        self.console.so_far()
    }

    /// All that the VMM said so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.so_far()
    }

    /// Waits for a text on the console, from its beginning.
    ///
    /// # Errors
    ///
    /// When it does not come in time.
    pub fn wait_for(&self, text: &str, limit: Duration) -> Result<(), Failure> {
        self.console.wait_for(0, text, limit)?;
        Ok(())
    }

    /// The control socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    /// A folder for the test's own files; it goes with the guest.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.dir.path().to_path_buf()
    }

    /// A new connection to the control socket.
    ///
    /// # Errors
    ///
    /// When it is not there, or does not speak QMP.
    pub fn control(&self) -> Result<Qmp, Failure> {
        Ok(Qmp::connect(&self.socket())?)
    }

    /// Runs `stillpoint -c SOCKET ...`.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn stillpoint(&self, args: &[&str]) -> Result<Ran, Failure> {
        let socket = self.socket();
        let mut command = Command::new(needs::stillpoint()?);
        Ran::of(command.arg("-c").arg(socket).args(args))
    }

    /// Process id of the VMM.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.vmm.borrow().id()
    }

    /// KiB of memory that the VMM has, with what the guest has touched of its own.
    ///
    /// # Errors
    ///
    /// When it has ended.
    pub fn resident(&self) -> Result<u64, Failure> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok())
            .ok_or_else(|| Failure::new("no VmRSS"))
    }

    /// Waits for the VMM to end.
    ///
    /// # Errors
    ///
    /// When it does not end in time.
    pub fn wait(&self, limit: Duration) -> Result<ExitStatus, Failure> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.vmm.borrow_mut().try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(Failure::new(format!("the VMM runs on after {limit:?}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the VMM to end and returns its exit status.
    ///
    /// # Errors
    ///
    /// When it does not end soon, or ends by a signal.
    pub fn exit_status(&self) -> Result<i32, Failure> {
        let status = self.wait(SOON)?;
        status
            .code()
            .ok_or_else(|| Failure::new(format!("the VMM ended by {status}")))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let vmm = self.vmm.get_mut();
        // It may have ended by itself.
        let _ = vmm.kill();
        let _ = vmm.wait();
    }
}
