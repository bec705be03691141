//! Says what a guest is to be, and starts it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::console::{Text, print_on_failure};
use crate::{Failure, Guest, SOON, cpio, needs};

/// A guest to be: `Guest::boot("6.12").cpus(2).start()?`.
#[derive(Debug)]
#[must_use = "a guest does not start by itself"]
pub struct Boot {
    kernel: String,
    image: &'static str,
    cpus: u32,
    memory: String,
    mode: &'static str,
    cmdline: String,
    files: cpio::Files,
    args: Vec<String>,
    socket: Option<PathBuf>,
    without_rules: Option<String>,
}

impl Boot {
    pub(crate) fn new(kernel: &str) -> Self {
        Self {
            kernel: kernel.to_owned(),
            image: "vmlinuz",
            cpus: 1,
            memory: "256M".to_owned(),
            mode: "script",
            cmdline: String::new(),
            files: Vec::new(),
            args: Vec::new(),
            socket: None,
            without_rules: None,
        }
    }

    /// Boots the ELF kernel instead of the bzImage.
    pub fn vmlinux(mut self) -> Self {
        self.image = "vmlinux";
        self
    }

    /// Number of vCPUs; 1 unless said otherwise.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Memory as `--memory` takes it; 256M unless said otherwise.
    pub fn memory(mut self, memory: &str) -> Self {
        memory.clone_into(&mut self.memory);
        self
    }

    /// More for the kernel command line.
    pub fn cmdline(mut self, more: &str) -> Self {
        self.cmdline.push(' ');
        self.cmdline.push_str(more);
        self
    }

    /// What init does (see guest-images/init); `script`, unless said otherwise, makes [`Guest::sh`] work.
    pub fn mode(mut self, mode: &'static str) -> Self {
        self.mode = mode;
        self
    }

    /// A file of the host at a path in the guest's root.
    pub fn file(mut self, in_guest: &str, on_host: &Path) -> Self {
        self.files
            .push((in_guest.to_owned(), on_host.to_path_buf()));
        self
    }

    /// Puts the control socket there, and not into the guest's own folder.
    pub fn socket(mut self, path: &Path) -> Self {
        self.socket = Some(path.to_path_buf());
        self
    }

    /// Leaves rules of safety out, by their names, separated by commas: see `patcher/src/rules.rs`.
    /// For a test [`crate::on_kvm_breaking`].
    pub fn without_rules(mut self, names: &str) -> Self {
        self.without_rules = Some(names.to_owned());
        self
    }

    /// More arguments for `stillpoint run`.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    /// Starts the guest and waits until it is up.
    ///
    /// # Errors
    ///
    /// When it cannot be started, or is not up in time.
    pub fn start(self) -> Result<Guest, Failure> {
        let up = match self.mode {
            "script" => "stillpoint guest: ready\n",
            _ => "stillpoint guest: Linux",
        };
        let guest = self.launch()?;
        guest.wait_for(up, SOON)?;
        Ok(guest)
    }

    /// Starts the VMM and waits for nothing.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn launch(self) -> Result<Guest, Failure> {
        let dir = TempDir::with_prefix("stillpoint-")?;
        let folder = needs::kernel(&self.kernel);
        let cmdline = format!(
            "console=ttyS0 quiet panic=-1 mode={}{}",
            self.mode, self.cmdline
        );
        let socket = self
            .socket
            .clone()
            .unwrap_or_else(|| dir.path().join("vm.sock"));
        let mut vmm = match &self.without_rules {
            None => Command::new(needs::stillpoint()?),
            Some(names) => {
                let mut vmm = Command::new(needs::breakable()?);
                vmm.env("STILLPOINT_WITHOUT_RULES", names);
                vmm
            }
        };
        vmm.arg("run")
            .arg("--kernel")
            .arg(folder.join(self.image))
            .arg("--initrd")
            .arg(self.initrd(dir.path())?)
            .args(["--cmdline", &cmdline])
            .args(["--cpus", &self.cpus.to_string()])
            .args(["--memory", &self.memory])
            .arg("--control")
            .arg(&socket)
            .args(&self.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = vmm.spawn()?;
        let console = child.stdout.take().map(Text::of).unwrap_or_default();
        let log = child.stderr.take().map(Text::of).unwrap_or_default();
        print_on_failure(format!("console of {}", self.kernel), console.clone());
        print_on_failure(format!("VMM of {}", self.kernel), log.clone());
        Ok(Guest::new(child, dir, socket, console, log))
    }

    fn initrd(&self, dir: &Path) -> Result<PathBuf, Failure> {
        let base = needs::initramfs(&self.kernel);
        if self.files.is_empty() {
            return Ok(base);
        }
        let path = dir.join("initramfs.cpio");
        File::create(&path)?.write_all(&cpio::with_files(&base, &self.files)?)?;
        Ok(path)
    }
}
