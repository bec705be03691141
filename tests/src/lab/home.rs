//! Where the lab keeps its files: below the target directory that this program was built into.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::{LabError, at};

/// The folder of the lab, mode 0700, and the names in it.
#[derive(Debug)]
pub struct Home {
    dir: PathBuf,
    /// Sockets are reached through this: their full path may be longer than a socket address.
    handle: File,
}

impl Home {
    /// Opens the folder, `lab` in the target directory, and makes it when it is not there.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn open() -> Result<Self, LabError> {
        let dir = target_dir()?.join("lab");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir.join("share"))
            .map_err(at("cannot create the lab's folder", &dir))?;
        let handle = File::open(&dir).map_err(at("cannot open the lab's folder", &dir))?;
        Ok(Self { dir, handle })
    }

    /// The one folder of the host that commands in the lab can write to, at the same path.
    #[must_use]
    pub fn share(&self) -> PathBuf {
        self.dir.join("share")
    }

    /// Whoever holds a lock on this file may use the machine.
    #[must_use]
    pub fn lock(&self, machine: usize) -> PathBuf {
        self.file(machine, "lock")
    }

    /// The machine's serial console of its last run.
    #[must_use]
    pub fn console(&self, machine: usize) -> PathBuf {
        self.file(machine, "console")
    }

    /// What its keeper and QEMU said.
    #[must_use]
    pub fn log(&self, machine: usize) -> PathBuf {
        self.file(machine, "log")
    }

    /// Where its initramfs is put together.
    #[must_use]
    pub fn initramfs(&self, machine: usize) -> PathBuf {
        self.file(machine, "initramfs")
    }

    fn file(&self, machine: usize, suffix: &str) -> PathBuf {
        self.dir.join(format!("machine-{machine}.{suffix}"))
    }

    fn socket(&self, machine: usize) -> PathBuf {
        PathBuf::from(format!(
            "/proc/self/fd/{}/machine-{machine}.socket",
            self.handle.as_raw_fd()
        ))
    }

    /// The machines that have ever been used.
    #[must_use]
    pub fn machines(&self) -> Vec<usize> {
        fs::read_dir(&self.dir)
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let name = entry.ok()?.file_name().into_string().ok()?;
                let number = name.strip_prefix("machine-")?.strip_suffix(".lock")?;
                number.parse().ok()
            })
            .collect()
    }

    /// Connects to a machine's keeper.
    ///
    /// # Errors
    ///
    /// When no keeper listens.
    pub fn connect(&self, machine: usize) -> std::io::Result<UnixStream> {
        UnixStream::connect(self.socket(machine))
    }

    /// Listens as a machine's keeper, in place of one that is gone.
    ///
    /// # Errors
    ///
    /// Those of the socket.
    pub fn listen(&self, machine: usize) -> std::io::Result<UnixListener> {
        self.forget_socket(machine);
        UnixListener::bind(self.socket(machine))
    }

    /// Removes a machine's socket.
    pub fn forget_socket(&self, machine: usize) {
        // It may well not be there.
        let _ = fs::remove_file(self.socket(machine));
    }
}

/// The target directory: the nearest one above this program that cargo has tagged.
pub(crate) fn target_dir() -> Result<PathBuf, LabError> {
    let exe = this_program()?;
    exe.ancestors()
        .find(|dir| dir.join("CACHEDIR.TAG").exists())
        .or_else(|| exe.parent())
        .map(Path::to_path_buf)
        .ok_or_else(|| {
            at("no target directory above this program", &exe)(std::io::ErrorKind::NotFound.into())
        })
}

/// Path of the running program.
pub(crate) fn this_program() -> Result<PathBuf, LabError> {
    std::env::current_exe().map_err(at("cannot find this program", "/proc/self/exe"))
}

/// The `lab` binary, which stands beside this program or one folder above it (tests are in `deps`).
pub(crate) fn lab_binary() -> Result<PathBuf, LabError> {
    let exe = this_program()?;
    exe.ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("lab"))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            at(
                "no 'lab' beside this program: cargo build -p stillpoint-tests",
                &exe,
            )(std::io::ErrorKind::NotFound.into())
        })
}

/// What tells one build of a file from another.
pub(crate) fn build_of(path: &Path) -> Result<String, LabError> {
    let meta = fs::metadata(path).map_err(at("cannot read", path))?;
    Ok(format!(
        "{}:{}:{}:{}.{}",
        path.display(),
        meta.ino(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec()
    ))
}

/// The checkout that this was built from.
pub(crate) fn checkout() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests)
}

/// Where `guest-images/fetch` keeps its kernels.
#[must_use]
pub fn image_cache() -> PathBuf {
    std::env::var_os("STILLPOINT_CACHE")
        .map_or_else(|| checkout().join("guest-images/cache"), PathBuf::from)
}
