//! A root of its own, all in memory, for the VMMs of the lab.
//!
//! Files there are the host's otherwise: opening one is a message to the host, whose answer takes
//! however long the host is busy with other things. Under icount it is worse: time jumps from timer
//! to timer while level 1 waits.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountFlags, mount, mount_bind_recursive};

use super::peer::{Files, QEMU};
use crate::{Failure, TestResult};

/// Where it is put together. The lab gives each command mounts of its own, which go with it.
const AT: &str = "/mnt";

/// Firmware and option ROMs of QEMU.
const DATA: [&str; 2] = ["/usr/share/qemu", "/usr/share/seabios"];

/// Makes it with everything that the VMMs open, and enters it. Returns where `files` are in it.
pub(super) fn enter(files: &Files) -> Result<Files, Failure> {
    let root = Path::new(AT);
    mount("bench", root, "tmpfs", MountFlags::empty(), None)?;
    for dir in ["dev", "proc", "sys"] {
        fs::create_dir(root.join(dir))?;
        mount_bind_recursive(Path::new("/").join(dir), root.join(dir))?;
    }
    fs::create_dir(root.join("tmp"))?;
    for program in [Path::new(QEMU), &files.stillpoint] {
        for library in libraries(program)? {
            copy(&library, root, &library)?;
        }
    }
    copy(Path::new(QEMU), root, Path::new(QEMU))?;
    for folder in DATA {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            // Through links: firmware is often one.
            if path.is_file() {
                copy(&path, root, &path)?;
            }
        }
    }
    let files = files.each(|from| {
        let into = Path::new("/bench").join(from.file_name().unwrap_or_default());
        copy(from, root, &into)?;
        Ok::<PathBuf, Failure>(into)
    })?;
    std::os::unix::fs::chroot(root)?;
    std::env::set_current_dir("/")?;
    Ok(files)
}

/// Paths of the libraries that `program` is linked with, the dynamic linker among them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>, Failure> {
    let output = Command::new("ldd").arg(program).output()?;
    // One that is linked statically is no error to us.
    let text = String::from_utf8_lossy(&output.stdout);
    let words = text.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(words.map(PathBuf::from).collect())
}

fn copy(from: &Path, root: &Path, into: &Path) -> TestResult {
    let into = root.join(into.strip_prefix("/").unwrap_or(into));
    if into.exists() {
        return Ok(());
    }
    if let Some(folder) = into.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::copy(from, &into)
        .map(|_| ())
        .map_err(|error| Failure::new(format!("cannot copy {}: {error}", from.display())))
}
