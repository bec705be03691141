//! The serial port on everything that it can lead to.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use stillpoint_tests::{Failure, Ran, SOON, TestResult, initramfs, kernel, on_kvm, stillpoint};
use tempfile::TempDir;

const UP: &str = "stillpoint guest: Linux 6.12";

fn run(serial: &str, mode: &str) -> Result<Command, Failure> {
    let mut command = Command::new(stillpoint()?);
    command
        .args(["run", "--serial", serial, "--kernel"])
        .arg(kernel("6.12").join("vmlinux"))
        .arg("--initrd")
        .arg(initramfs("6.12"))
        .args([
            "--cmdline",
            &format!("console=ttyS0 quiet panic=-1 mode={mode}"),
        ])
        .args(["--memory", "256M"]);
    Ok(command)
}

/// Ends a VMM that a failed test leaves behind.
struct Vmm(Child);

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spawn(command: &mut Command) -> Result<Vmm, Failure> {
    Ok(Vmm(command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?))
}

/// Reads until `wanted` has come.
fn read_until(from: &mut impl Read, wanted: &str) -> TestResult {
    let begun = Instant::now();
    let mut seen = String::new();
    let mut bytes = [0; 4096];
    while !seen.contains(wanted) {
        if begun.elapsed() > SOON {
            return Err(Failure::new(format!("no {wanted:?} in {seen}")));
        }
        let n = from.read(&mut bytes)?;
        if n == 0 {
            return Err(Failure::new(format!("ended without {wanted:?}: {seen}")));
        }
        seen.push_str(&String::from_utf8_lossy(bytes.get(..n).unwrap_or_default()));
    }
    Ok(())
}

fn ends_well(vmm: &mut Vmm) -> TestResult {
    let begun = Instant::now();
    while begun.elapsed() < SOON {
        if let Some(status) = vmm.0.try_wait()? {
            assert!(status.success(), "{status}");
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(Failure::new("the VMM runs on"))
}

#[test]
fn to_a_file() -> TestResult {
    on_kvm(|| {
        let dir = TempDir::new()?;
        let path = dir.path().join("console");
        let ran = Ran::of(&mut run(&format!("file:{}", path.display()), "poweroff")?)?;
        assert_eq!(ran.status, 0, "{ran:?}");
        let console = fs::read_to_string(&path)?;
        assert!(console.contains(UP), "{console}");
        Ok(())
    })
}

#[test]
fn to_nothing() -> TestResult {
    on_kvm(|| {
        let ran = Ran::of(&mut run("none", "poweroff")?)?;
        assert_eq!((ran.status, ran.stdout.as_str()), (0, ""), "{ran:?}");
        Ok(())
    })
}

/// Types a command and reads its output; then ends the guest.
fn talk(mut port: impl Read + Write, vmm: &mut Vmm) -> TestResult {
    read_until(&mut port, "stillpoint guest: ready")?;
    port.write_all(b"echo $((6 * 7))-answers\n")?;
    read_until(&mut port, "42-answers")?;
    port.write_all(b"poweroff -f\n")?;
    ends_well(vmm)
}

#[test]
fn to_a_unix_socket() -> TestResult {
    on_kvm(|| {
        let dir = TempDir::new()?;
        let path = dir.path().join("serial.sock");
        let mut vmm = spawn(&mut run(&format!("unix:{}", path.display()), "script")?)?;
        let begun = Instant::now();
        let stream = loop {
            match UnixStream::connect(&path) {
                Ok(stream) => break stream,
                Err(error) if begun.elapsed() > SOON => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_read_timeout(Some(SOON))?;
        talk(&stream, &mut vmm)
    })
}

#[test]
fn a_unix_socket_that_is_somebody_elses_is_not_taken() -> TestResult {
    on_kvm(|| {
        let dir = TempDir::new()?;
        let path = dir.path().join("serial.sock");
        let _owner = UnixListener::bind(&path)?;
        let ran = Ran::of(&mut run(&format!("unix:{}", path.display()), "poweroff")?)?;
        assert_eq!(ran.status, 1, "{ran:?}");
        assert!(ran.stderr.contains("serial.sock"), "{ran:?}");
        Ok(())
    })
}

#[test]
fn to_a_pty() -> TestResult {
    on_kvm(|| {
        let mut vmm = spawn(&mut run("pty", "script")?)?;
        let mut log = vmm.0.stderr.take().ok_or_else(|| Failure::new("no log"))?;
        let mut said = String::new();
        let mut bytes = [0; 512];
        let begun = Instant::now();
        let pts = loop {
            if let Some(at) = said.find("/dev/pts/") {
                let rest = said.get(at..).unwrap_or_default();
                if let Some(end) = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '/')) {
                    break rest.get(..end).unwrap_or_default().to_owned();
                }
            }
            assert!(begun.elapsed() < SOON, "no pty named: {said}");
            let n = log.read(&mut bytes)?;
            assert!(n > 0, "no pty named: {said}");
            said.push_str(&String::from_utf8_lossy(bytes.get(..n).unwrap_or_default()));
        };
        let port = fs::File::options()
            .read(true)
            .write(true)
            .open(Path::new(&pts))?;
        talk(&port, &mut vmm)
    })
}

/// Runs the VMM on a terminal of its own, by way of `script`, which util-linux brings. For the
/// shell's commands in `input`, `$OURS` is our binary and `$SOCKET` the control socket.
fn on_a_terminal(input: &str, mode: &str) -> Result<Ran, Failure> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("vm.sock");
    let mut run = run("stdio", mode)?;
    run.arg("--control").arg(&socket);
    let words: Vec<String> = std::iter::once(run.get_program())
        .chain(run.get_args())
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    // The terminal's settings before and after, as one line each.
    let inside = format!("stty -g; {}; echo status $?; stty -g", words.join(" "));
    let outside = format!("{{ {input} }} | script -qec \"$INSIDE\" /dev/null",);
    Ran::of(
        Command::new("sh")
            .args(["-c", &outside])
            .env("INSIDE", inside)
            .env("OURS", run.get_program())
            .env("SOCKET", &socket),
    )
}

#[test]
fn a_terminal_is_restored_and_ctrl_a_x_ends() -> TestResult {
    on_kvm(|| {
        let ran = on_a_terminal("sleep 20; printf '\\001x'; sleep 5;", "idle")?;
        let lines: Vec<&str> = ran.stdout.lines().map(str::trim_end).collect();
        assert!(ran.stdout.contains("status 0"), "{ran:?}");
        let settings: Vec<&&str> = lines
            .iter()
            .filter(|line| line.contains(':') && line.split(':').count() > 20)
            .collect();
        assert_eq!(settings.len(), 2, "{ran:?}");
        assert_eq!(settings.first(), settings.last(), "{ran:?}");
        Ok(())
    })
}

#[test]
fn ctrl_a_x_ends_a_guest_that_is_stopped() -> TestResult {
    on_kvm(|| {
        let input = "sleep 15; \"$OURS\" -c \"$SOCKET\" pause >&2; printf 'typed'; sleep 1; \
                     printf '\\001'; sleep 1; printf x; sleep 5;";
        let ran = on_a_terminal(input, "idle")?;
        assert!(ran.stdout.contains("status 0"), "{ran:?}");
        Ok(())
    })
}

#[test]
fn ctrl_c_goes_to_the_guest() -> TestResult {
    on_kvm(|| {
        // The shell on the guest's terminal is interrupted, the VMM is not.
        let input = "sleep 25; printf 'sleep 1000\\n'; sleep 3; printf '\\003'; sleep 2; \
                     printf 'echo $((6 * 7))-answers\\n'; sleep 3; printf 'poweroff -f\\n'; sleep 10;";
        let ran = on_a_terminal(input, "shell")?;
        assert!(ran.stdout.contains("42-answers"), "{ran:?}");
        assert!(ran.stdout.contains("status 0"), "{ran:?}");
        Ok(())
    })
}
