//! Gives one command its own root and becomes it.
//!
//! The root is an overlay: the host's file system below (the agent's own root, with `/usr` mounted
//! apart), a fresh tmpfs above. It is in a mount
//! namespace of its own and goes with the last process in it. `/run` and `/dev/shm` are empty, the
//! share is where the host has it, and the modules of level 1's kernel are where modprobe looks.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive,
    mount_change, unmount,
};

use super::{LabError, at};

/// Where the roots are made; every command sees only its own.
const WORK: &str = "/run/lab";

/// Does not return unless something failed.
pub fn enter(share: &Path, modules: &Path, argv: &[String]) -> LabError {
    // The agent runs at the highest priority; its commands do not.
    let _ = rustix::process::setpriority_process(None, 0);
    if let Err(error) = make_root(share, modules) {
        return error;
    }
    let Some((program, arguments)) = argv.split_first() else {
        return LabError::Talk(io::ErrorKind::InvalidInput.into());
    };
    let cwd = std::env::var_os("LAB_CWD").map_or_else(|| PathBuf::from("/"), PathBuf::from);
    if let Err(error) = std::env::set_current_dir(&cwd) {
        return at("cannot enter the working directory", cwd)(error);
    }
    let failed = Command::new(program)
        .args(arguments)
        .env_remove("LAB_CWD")
        .exec();
    if failed.kind() == io::ErrorKind::NotFound {
        return LabError::NoCommand(program.clone());
    }
    LabError::Program {
        program: program.clone(),
        why: failed.to_string(),
    }
}

fn make_root(share: &Path, modules: &Path) -> Result<(), LabError> {
    // SAFETY: only the mount namespace is unshared, which no memory of this process depends on.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
        .map_err(|e| at("cannot make a mount namespace", "/")(e.into()))?;
    mount_change(
        "/",
        MountPropagationFlags::REC | MountPropagationFlags::PRIVATE,
    )
    .map_err(|e| at("cannot make mounts private", "/")(e.into()))?;

    let work = Path::new(WORK);
    tmpfs(work, c"mode=755")?;
    let root = work.join("root");
    fs::create_dir(&root).map_err(at("cannot create", &root))?;
    overlay("/", "root", &root)?;
    overlay("/usr", "usr", &root.join("usr"))?;

    for dir in ["proc", "sys", "dev"] {
        let from = Path::new("/").join(dir);
        mount_bind_recursive(&from, root.join(dir))
            .map_err(|e| at("cannot mount", &from)(e.into()))?;
    }
    tmpfs(&root.join("dev/shm"), c"mode=1777")?;
    tmpfs(&root.join("run"), c"mode=755")?;
    let inside = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    bind(Path::new("/run/share"), &inside(share))?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_err(at("cannot read", "/proc/sys/kernel/osrelease"))?;
    bind(
        modules,
        &inside(&Path::new("/usr/lib/modules").join(release.trim())),
    )?;

    // The new root over the old one, and the old one away: see pivot_root(2), "pivot_root(".", ".")".
    let pivot = || -> io::Result<()> {
        std::env::set_current_dir(&root)?;
        rustix::process::pivot_root(".", ".")?;
        unmount(".", UnmountFlags::DETACH)?;
        std::env::set_current_dir("/")
    };
    pivot().map_err(at("cannot change the root", &root))
}

/// Mounts an overlay of `lower`, whose upper layer is called `name`.
fn overlay(lower: &str, name: &str, on: &Path) -> Result<(), LabError> {
    let layer = |kind: &str| Path::new(WORK).join(format!("{name}-{kind}"));
    let (upper, work) = (layer("upper"), layer("work"));
    for dir in [&upper, &work] {
        fs::create_dir(dir).map_err(at("cannot create", dir))?;
    }
    let (upper, work) = (upper.display(), work.display());
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    let options = CString::new(options).map_err(|e| LabError::Talk(e.into()))?;
    mount(
        "overlay",
        on,
        "overlay",
        MountFlags::empty(),
        Some(options.as_c_str()),
    )
    .map_err(|e| at("cannot mount the overlay", on)(e.into()))
}

fn tmpfs(on: &Path, options: &'static std::ffi::CStr) -> Result<(), LabError> {
    let options = CString::from(options);
    mount(
        "tmpfs",
        on,
        "tmpfs",
        MountFlags::empty(),
        Some(options.as_c_str()),
    )
    .map_err(|e| at("cannot mount a tmpfs", on)(e.into()))
}

fn bind(from: &Path, on: &Path) -> Result<(), LabError> {
    fs::create_dir_all(on).map_err(at("cannot create", on))?;
    mount_bind(from, on).map_err(|e| at("cannot mount", on)(e.into()))
}
