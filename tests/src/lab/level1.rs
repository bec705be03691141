//! The level 1 machine: its kernel and initramfs, and the QEMU that runs it.
//!
//! One CPU and one TCG thread: with several, QEMU 7.2 loses updates of self-modifying code and the
//! kernel dies of stray int3. Guests with several vCPUs run on the one CPU all the same.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::home::{build_of, checkout, image_cache, lab_binary};
use super::{Home, LabError, at};

/// The kernel of level 1: the cloud flavours have no 9p.
const KERNEL: &str = "6.12-generic";

/// Its modules that are needed, in an order in which they can be loaded.
const MODULES: [&str; 8] = [
    "fs/netfs/netfs",
    "net/9p/9pnet",
    "net/9p/9pnet_virtio",
    "fs/9p/9p",
    "fs/overlayfs/overlay",
    "virt/lib/irqbypass",
    "drivers/crypto/ccp/ccp",
    "arch/x86/kvm/kvm",
];

/// Memory of level 1. Linux backs it when it is touched.
const MEMORY: &str = "4G";

/// A CPU with nested SVM. Without XSAVE: TCG lets a guest of level 1 execute XSETBV unseen, so that
/// KVM never tells it the size of its state and every stock kernel warns about that at boot.
const CPU: &str = "EPYC,+svm,+npt,-xsave,-avx,-avx2,-fma,-f16c";

/// What a machine is made of.
#[derive(Debug)]
pub(crate) struct Level1 {
    kernel: PathBuf,
    lab: PathBuf,
}

impl Level1 {
    /// Finds the parts; fetches the kernel when it is not there.
    pub(crate) fn prepare() -> Result<Self, LabError> {
        let lab = lab_binary()?;
        let kernel = image_cache().join(KERNEL);
        if !kernel.join("release").is_file() {
            let fetch = checkout().join("guest-images/fetch");
            output(Command::new(&fetch).arg(KERNEL).stderr(Stdio::inherit()))?;
        }
        Ok(Self { kernel, lab })
    }

    /// Differs when a machine that runs already is not the one that this would start.
    pub(crate) fn build(&self) -> Result<String, LabError> {
        Ok(format!(
            "{} {} {}",
            build_of(&self.lab)?,
            build_of(&self.kernel.join("release"))?,
            // What is below /usr is cached in there.
            build_of(Path::new("/var/lib/dpkg/status")).unwrap_or_default(),
        ))
    }

    /// Starts it, with the agent's port connected to `port` and more options for QEMU. It dies with
    /// the calling thread.
    pub(crate) fn start(
        &self,
        home: &Home,
        machine: usize,
        port: OwnedFd,
        more: &[&str],
    ) -> Result<Child, LabError> {
        let initramfs = self.initramfs(home, machine)?;
        let console = home.console(machine);
        let log = home.log(machine);
        let log = File::options()
            .append(true)
            .create(true)
            .open(&log)
            .map_err(at("cannot write the lab's log", &log))?;
        rustix::io::fcntl_setfd(&port, rustix::io::FdFlags::empty())
            .map_err(|e| LabError::Talk(e.into()))?;

        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg,thread=single", "-cpu", CPU])
            .args(["-smp", "1", "-m", MEMORY, "-M", "pc", "-no-user-config"])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(self.kernel.join("vmlinuz"))
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", "console=ttyS0 panic=-1 quiet mitigations=off"])
            .arg("-chardev")
            .arg(format!("file,id=console,path={}", option(&console)))
            .args(["-serial", "chardev:console"])
            .args(["-device", "virtio-serial-pci"])
            .arg("-chardev")
            .arg(format!("socket,id=agent,fd={}", port.as_raw_fd()))
            .args(["-device", "virtserialport,chardev=agent,name=agent"])
            .args(export("root", Path::new("/"), ",readonly=on"))
            .args(export("usr", Path::new("/usr"), ",readonly=on"))
            .args(export("share", &home.share(), ""))
            .args(more)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(LabError::Talk)?)
            .stderr(log);
        // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
        unsafe {
            qemu.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(
                    rustix::process::Signal::KILL,
                ))
                .map_err(Into::into)
            });
        }
        qemu.spawn().map_err(|e| LabError::Program {
            program: "qemu-system-x86_64".into(),
            why: e.to_string(),
        })
        // `port` is closed here; QEMU has its copy.
    }

    /// Puts together an initramfs that mounts the host's root and hands over to the agent.
    fn initramfs(&self, home: &Home, machine: usize) -> Result<PathBuf, LabError> {
        let tree = home.initramfs(machine);
        let image = tree.with_extension("cpio");
        // It may be there from a keeper that was killed.
        let _ = fs::remove_dir_all(&tree);
        for dir in ["bin", "modules", "proc", "sys", "dev", "host"] {
            fs::create_dir_all(tree.join(dir)).map_err(at("cannot create", &tree))?;
        }
        let busybox = find_busybox()?;
        fs::copy(&busybox, tree.join("bin/busybox")).map_err(at("cannot copy", &busybox))?;
        for module in MODULES.iter().chain(&["arch/x86/kvm/kvm-amd"]) {
            let name = module.rsplit('/').next().unwrap_or(module);
            let into = tree.join(format!("modules/{name}.ko"));
            self.unpack_module(module, &into)?;
        }
        let init = tree.join("init");
        fs::write(&init, self.init_script(home)).map_err(at("cannot write", &init))?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755))
            .map_err(at("cannot write", &init))?;

        let out = File::create(&image).map_err(at("cannot write", &image))?;
        let mut cpio = Command::new("cpio")
            .args(["--quiet", "-o", "-H", "newc", "-R", "0:0"])
            .current_dir(&tree)
            .stdin(Stdio::piped())
            .stdout(out)
            .spawn()
            .map_err(|e| LabError::Program {
                program: "cpio".into(),
                why: e.to_string(),
            })?;
        let mut names = String::from("init\nbin\nbin/busybox\nproc\nsys\ndev\nhost\nmodules\n");
        for module in MODULES.iter().chain(&["arch/x86/kvm/kvm-amd"]) {
            let name = module.rsplit('/').next().unwrap_or(module);
            names.push_str(&format!("modules/{name}.ko\n"));
        }
        if let Some(mut stdin) = cpio.stdin.take() {
            stdin
                .write_all(names.as_bytes())
                .map_err(at("cannot write", &image))?;
        }
        let status = cpio.wait().map_err(at("cannot write", &image))?;
        if !status.success() {
            return Err(LabError::Program {
                program: "cpio".into(),
                why: status.to_string(),
            });
        }
        Ok(image)
    }

    fn unpack_module(&self, module: &str, into: &Path) -> Result<(), LabError> {
        let plain = self.kernel.join(format!("modules/kernel/{module}.ko"));
        for (suffix, tool) in [
            ("", "cat"),
            (".xz", "xz"),
            (".zst", "zstd"),
            (".gz", "gzip"),
        ] {
            let mut packed = plain.clone().into_os_string();
            packed.push(suffix);
            let packed = PathBuf::from(packed);
            if !packed.is_file() {
                continue;
            }
            let bytes = if tool == "cat" {
                fs::read(&packed).map_err(at("cannot read", &packed))?
            } else {
                output(Command::new(tool).arg("-dc").arg(&packed))?
            };
            return fs::write(into, bytes).map_err(at("cannot write", into));
        }
        Err(at("the lab's kernel lacks a module", plain)(
            std::io::ErrorKind::NotFound.into(),
        ))
    }

    fn init_script(&self, home: &Home) -> String {
        let mut load = String::new();
        for module in MODULES {
            let name = module.rsplit('/').next().unwrap_or(module);
            load.push_str(&format!("insmod /modules/{name}.ko\n"));
        }
        let lab = quote(&self.lab);
        let share = quote(&home.share());
        let modules = quote(&self.kernel.join("modules"));
        // cache=mmap asks the host about every name again: a file that was built anew is seen at
        // once. Programs and libraries below /usr are cached, which makes QEMU start four times
        // as fast. /run/lab of level 1 is where `enter` puts the roots of commands.
        format!(
            r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
{load}insmod /modules/kvm-amd.ko nested=0
ip link set lo up
hostname lab
nine=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o $nine,cache=mmap,ro root /host || exec poweroff -f
mount -t 9p -o $nine,cache=loose,ro usr /host/usr || exec poweroff -f
mount -o move /proc /host/proc
mount -o move /sys /host/sys
mount -o move /dev /host/dev
mkdir -p /host/dev/pts /host/dev/shm
mount -t devpts -o ptmxmode=0666 devpts /host/dev/pts
mount -t tmpfs -o mode=755 run /host/run
mkdir /host/run/lab /host/run/share
mount -t 9p -o $nine,cache=mmap share /host/run/share || exec poweroff -f
exec switch_root /host {lab} agent --share {share} --modules {modules}
"#
        )
    }
}

/// A static busybox: the one that Debian's busybox-static installs.
fn find_busybox() -> Result<PathBuf, LabError> {
    ["/usr/bin/busybox", "/bin/busybox"]
        .iter()
        .map(PathBuf::from)
        .find(|path| path.is_file())
        .ok_or_else(|| LabError::Program {
            program: "busybox".into(),
            why: "not installed".into(),
        })
}

/// Runs a program to its end and returns what it printed.
fn output(command: &mut Command) -> Result<Vec<u8>, LabError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |why: String| LabError::Program {
        program: program.clone(),
        why,
    };
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(format!("{}: {}", output.status, said.trim())));
    }
    Ok(output.stdout)
}

/// The options that make a folder of the host mountable as `tag`.
fn export(tag: &str, path: &Path, more: &str) -> [String; 4] {
    let path = option(path);
    [
        "-fsdev".into(),
        format!("local,id={tag},path={path},security_model=none,multidevs=remap{more}"),
        "-device".into(),
        format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
    ]
}

/// A path as a value among QEMU's options, where a comma is written twice.
fn option(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// A path as one word of a shell script.
fn quote(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_with_odd_characters_survive() {
        assert_eq!(option(Path::new("/a,b")), "/a,,b");
        assert_eq!(quote(Path::new("/a b'c")), r"'/a b'\''c'");
    }
}
