//! What tests need from the host: our binary, kernels, the initramfs. Made when first asked for.
//!
//! In the lab nothing can be built: whoever sends a test there has made everything before, and names
//! the binaries in `STILLPOINT_BIN` and `STILLPOINT_BREAKABLE_BIN`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::Failure;
use crate::lab::image_cache;

/// The folder of a kernel, as `guest-images/fetch` makes it.
#[must_use]
pub fn kernel(name: &str) -> PathBuf {
    image_cache().join(name)
}

/// Where the file of a kernel's module is, such as "kernel/fs/binfmt_misc", and what it may be called in
/// a guest. Not every kernel has each of them.
#[must_use]
pub fn module_file(kernel_name: &str, module: &str) -> Option<(PathBuf, String)> {
    ["ko", "ko.xz", "ko.zst"].iter().find_map(|suffix| {
        let file = kernel(kernel_name).join(format!("modules/{module}.{suffix}"));
        let name = module.rsplit('/').next()?;
        file.exists().then(|| (file, format!("/{name}.{suffix}")))
    })
}

/// The test initramfs with the modules of a kernel.
#[must_use]
pub fn initramfs(kernel_name: &str) -> PathBuf {
    kernel(kernel_name).join("initramfs.cpio")
}

/// An object file with code that stands in for a function of the guest kernel: `version`, for
/// `version_proc_show`, makes `/proc/version` say [`REPLACED`].
#[must_use]
pub fn replacement(name: &str) -> PathBuf {
    image_cache().join(name).with_extension("o")
}

/// What `/proc/version` says when it is replaced.
pub const REPLACED: &str = "Stillpoint was here";

/// What `scripts/setup` installs for tests: `qmp-shell`, `drgn`, and a Python with their libraries.
///
/// # Errors
///
/// When it is not there.
pub fn python_client(name: &str) -> Result<PathBuf, Failure> {
    let path = image_cache().join("python/bin").join(name);
    if path.exists() {
        return Ok(path);
    }
    let text = format!("{} is not there: run scripts/setup", path.display());
    Err(Failure::new(text))
}

/// The script for drgn that is called `name`.
#[must_use]
pub fn drgn_script(name: &str) -> PathBuf {
    checkout().join(format!("tests/clients/drgn_{name}.py"))
}

/// A kernel's file with its debugging symbols, fetched when it is not there yet.
///
/// # Errors
///
/// When it cannot be had.
pub fn debug_kernel(name: &str) -> Result<PathBuf, Failure> {
    let script = checkout().join("guest-images/debug-kernel");
    run(Command::new(script).arg(name)).map_err(Failure::new)?;
    Ok(kernel(name).join("vmlinux-debug"))
}

/// The module for a guest kernel that is built from guest-images/modules.
#[must_use]
pub fn module(kernel_name: &str, name: &str) -> PathBuf {
    kernel(kernel_name).join(name).with_extension("ko")
}

/// Builds a module for the guest kernel `kernel_name` when it is not there yet; with it what modules
/// are built with is fetched.
///
/// # Errors
///
/// When it cannot be built.
pub(crate) fn build_module(kernel_name: &str, name: &str) -> Result<PathBuf, Failure> {
    let script = checkout().join("guest-images/module");
    run(Command::new(script).args([kernel_name, name])).map_err(Failure::new)?;
    Ok(module(kernel_name, name))
}

/// Our binary, of the same profile as this test.
///
/// # Errors
///
/// When it cannot be built.
pub fn stillpoint() -> Result<PathBuf, Failure> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    if let Some(path) = std::env::var_os("STILLPOINT_BIN") {
        return Ok(PathBuf::from(path));
    }
    let built = BUILT.get_or_init(|| build(Variant::Shipped));
    built.clone().map_err(Failure::new)
}

/// The same with the feature `broken-rules`, in a target directory of its own: rules of safety can be
/// left out of it.
///
/// # Errors
///
/// When it cannot be built.
pub fn breakable() -> Result<PathBuf, Failure> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    if let Some(path) = std::env::var_os("STILLPOINT_BREAKABLE_BIN") {
        return Ok(PathBuf::from(path));
    }
    let built = BUILT.get_or_init(|| build(Variant::Breakable));
    built.clone().map_err(Failure::new)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Variant {
    Shipped,
    Breakable,
}

/// Makes all of it, once per process.
pub(crate) fn prepare(kernels: &[&str]) -> Result<(), Failure> {
    stillpoint()?;
    let scripts = checkout().join("guest-images");
    run(Command::new(scripts.join("fetch")).args(kernels)).map_err(Failure::new)?;
    for source in std::fs::read_dir(scripts.join("replacements"))? {
        let name = source?.path().with_extension("");
        if let Some(name) = name.file_name() {
            run(Command::new(scripts.join("replacement")).arg(name)).map_err(Failure::new)?;
        }
    }
    for kernel in kernels {
        run(Command::new(scripts.join("initramfs")).arg(kernel)).map_err(Failure::new)?;
    }
    Ok(())
}

pub(crate) fn checkout() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests)
}

/// This test is at TARGET/[TRIPLE/]PROFILE/deps/NAME: builds the binary beside it. Cargo does not
/// build binaries of other packages for a test by itself.
fn build(variant: Variant) -> Result<PathBuf, String> {
    let exe = std::env::current_exe().map_err(|e| e.to_string())?;
    let profile_dir = exe
        .ancestors()
        .find(|dir| {
            dir.parent()
                .is_some_and(|above| above.ancestors().take(2).any(is_target_dir))
        })
        .and_then(|_| exe.parent())
        .map(|dir| {
            if dir.ends_with("deps") {
                dir.parent().unwrap_or(dir)
            } else {
                dir
            }
        })
        .ok_or_else(|| format!("{} is not in a target directory", exe.display()))?;
    let target = profile_dir
        .ancestors()
        .find(|dir| is_target_dir(dir))
        .ok_or_else(|| format!("{} is not in a target directory", exe.display()))?;
    let profile = match profile_dir.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(name) => name,
    };
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args([
            "build",
            "--quiet",
            "--package",
            "stillpoint",
            "--bin",
            "stillpoint",
        ])
        .args(["--profile", profile, "--manifest-path"])
        .arg(checkout().join("Cargo.toml"))
        .arg("--target-dir");
    let into = match variant {
        Variant::Shipped => target.to_path_buf(),
        Variant::Breakable => target.join("breakable"),
    };
    cargo.arg(&into);
    if variant == Variant::Breakable {
        // Dependencies are the same, and need not be built twice where cargo can share them.
        cargo.args(["--features", "broken-rules"]);
        cargo.env("CARGO_BUILD_BUILD_DIR", target);
    }
    if let Some(triple) = profile_dir
        .parent()
        .filter(|above| *above != target)
        .and_then(|dir| dir.file_name())
    {
        cargo.arg("--target").arg(triple);
    }
    run(&mut cargo)?;
    let below = profile_dir.strip_prefix(target).unwrap_or(profile_dir);
    Ok(into.join(below).join("stillpoint"))
}

fn is_target_dir(dir: &Path) -> bool {
    dir.join("CACHEDIR.TAG").exists()
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?}: {}\n{said}", output.status))
}
