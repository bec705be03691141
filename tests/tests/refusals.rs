//! What cannot work is said before anything starts, in one line that names the remedy.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;

use stillpoint_tests::{Failure, Guest, Ran, TestResult, kernel, on_host, on_kvm, stillpoint};
use tempfile::TempDir;

/// Runs `stillpoint run` and expects one line with all these words, and status 1.
fn refused(args: &[&str], words: &[&str]) -> TestResult {
    let mut all = vec!["run", "--serial", "none"];
    all.extend(args);
    check(&Ran::stillpoint(&all)?, 1, words)
}

fn check(ran: &Ran, status: i32, words: &[&str]) -> TestResult {
    let said = format!("{ran:?}");
    assert_eq!(ran.status, status, "{said}");
    assert_eq!(ran.stderr.trim_end().lines().count(), 1, "{said}");
    for word in words {
        assert!(ran.stderr.contains(word), "no {word:?} in {said}");
    }
    Ok(())
}

fn text(path: &Path) -> Result<&str, Failure> {
    path.to_str().ok_or_else(|| Failure::new("odd path"))
}

#[test]
fn files_that_are_no_kernels() -> TestResult {
    on_kvm(|| {
        let dir = TempDir::new()?;
        let image = kernel("6.12").join("vmlinux");
        let elf = fs::read(&image)?;

        refused(
            &["--kernel", "/nonexistent/vmlinuz"],
            &["/nonexistent/vmlinuz"],
        )?;
        refused(
            &["--kernel", "/etc/passwd"],
            &["/etc/passwd", "not a Linux kernel"],
        )?;
        refused(&["--kernel", "/tmp"], &["/tmp"])?;
        refused(&["--kernel", "/dev/null"], &["/dev/null"])?;
        // An ELF file, but of a program.
        refused(&["--kernel", "/bin/ls"], &["/bin/ls", "kernel"])?;
        refused(
            &["--kernel", "/bin/busybox"],
            &["/bin/busybox", "not a kernel"],
        )?;

        // A kernel of another machine: i386 and aarch64 by their ELF headers.
        for (class, machine, word) in [(1_u8, 3_u8, "64-bit"), (2, 183, "x86-64")] {
            let path = dir.path().join("foreign");
            let mut file = fs::File::create(&path)?;
            file.write_all(elf.get(..4096).unwrap_or_default())?;
            file.seek(SeekFrom::Start(4))?;
            file.write_all(&[class])?;
            file.seek(SeekFrom::Start(18))?;
            file.write_all(&[machine])?;
            refused(&["--kernel", text(&path)?], &["foreign", word])?;
        }
        // A bzImage without a 64-bit entry point (bit 0 of xloadflags, offset 0x236).
        let path = dir.path().join("bzimage32");
        let mut bytes = fs::read(kernel("6.12").join("vmlinuz"))?;
        if let Some(flags) = bytes.get_mut(0x236) {
            *flags &= !1;
        }
        fs::write(&path, &bytes)?;
        refused(&["--kernel", text(&path)?], &["64-bit"])?;
        // Cut off in the middle.
        bytes.truncate(1 << 20);
        fs::write(&path, &bytes)?;
        refused(&["--kernel", text(&path)?], &["bzimage32"])?;
        let path = dir.path().join("vmlinux-cut");
        fs::write(&path, elf.get(..1 << 20).unwrap_or_default())?;
        refused(&["--kernel", text(&path)?], &["vmlinux-cut"])
    })
}

#[test]
fn machines_that_cannot_be() -> TestResult {
    on_kvm(|| {
        let image = kernel("6.12").join("vmlinuz");
        let image = text(&image)?;
        let dir = TempDir::new()?;
        let run = |args: &[&str], words: &[&str]| {
            let mut all = vec!["--kernel", image];
            all.extend(args);
            refused(&all, words)
        };
        run(&["--cpus", "0"], &["--cpus 0"])?;
        run(&["--cpus", "100000"], &["100000"])?;
        run(&["--memory", "1M"], &["memory"])?;
        run(&["--memory", "0"], &["memory"])?;
        run(
            &["--initrd", "/nonexistent/initrd"],
            &["/nonexistent/initrd"],
        )?;
        run(&["--initrd", "/tmp"], &["/tmp"])?;
        let big = dir.path().join("big");
        fs::File::create(&big)?.set_len(200 << 20)?;
        run(
            &["--memory", "128M", "--initrd", text(&big)?],
            &["initramfs", "--memory"],
        )?;
        run(&["--cmdline", &"x".repeat(100_000)], &["command line"])
    })
}

#[test]
fn wrong_usage_is_2() -> TestResult {
    on_host(|| {
        for args in [
            &["run"][..],
            &["run", "--kernel", "a", "--cpus", "many"],
            &["run", "--kernel", "a", "--memory", "lots"],
            &["run", "--kernel", "a", "--memory", "99999999999999T"],
            &["run", "--kernel", "a", "--no-such-option"],
            &["no-such-command"],
        ] {
            let ran = Ran::stillpoint(args)?;
            assert_eq!(ran.status, 2, "{args:?}: {ran:?}");
            assert!(!ran.stderr.is_empty(), "{args:?}");
        }
        Ok(())
    })
}

#[test]
fn a_host_without_kvm_or_without_the_right_to_use_it() -> TestResult {
    on_kvm(|| {
        let image = kernel("6.12").join("vmlinuz");
        let image = text(&image)?;
        let ours = stillpoint()?;
        let ours = text(&ours)?;
        // In a mount namespace and with a /dev of its own, so that nobody else notices.
        let with = |prepare: &str| {
            let script = format!(
                "mount --make-rprivate / && {prepare} \"$0\" run --serial none --kernel \"$1\""
            );
            let mut command = Command::new("unshare");
            Ran::of(command.args(["-m", "sh", "-c", &script, ours, image]))
        };
        let none = with("mount -t tmpfs none /dev &&")?;
        check(&none, 1, &["/dev/kvm", "kvm_"])?;
        let forbidden = with(
            "mount -t tmpfs none /dev && mknod -m 600 /dev/kvm c 10 232 && \
             setpriv --reuid 65534 --clear-groups",
        )?;
        check(&forbidden, 1, &["/dev/kvm", "kvm"])?;
        // A processor without virtualisation, by what /proc/cpuinfo says.
        let bare = with(
            "sed 's/ svm / /; s/ vmx / /' /proc/cpuinfo >/tmp/cpuinfo && \
             mount --bind /tmp/cpuinfo /proc/cpuinfo &&",
        )?;
        check(&bare, 1, &["vmx", "svm", "scripts/lab"])
    })
}

#[test]
fn a_control_socket_that_somebody_listens_on() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").mode("idle").start()?;
        let socket = guest.socket();
        let image = kernel("6.12").join("vmlinuz");
        let args = ["--kernel", text(&image)?, "--control", text(&socket)?];
        refused(&args, &[text(&socket)?])?;
        // The one that was first is as it was.
        guest.control()?;

        // A socket whose owner has died is replaced.
        let dir = TempDir::new()?;
        let stale = dir.path().join("vm.sock");
        drop(std::os::unix::net::UnixListener::bind(&stale)?);
        assert!(stale.exists());
        let second = Guest::boot("6.12").mode("idle").socket(&stale).start()?;
        second.control()?;
        Ok(())
    })
}
