//! Stop and resume, and the control socket as clients that others wrote use it.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stillpoint_tests::{Failure, Guest, Qmp, Ran, SOON, TestResult, on_kvm, python_client};

fn status(qmp: &mut Qmp) -> Result<String, Failure> {
    let status = qmp.execute("query-status", json!({}))?;
    let text = status.get("status").and_then(Value::as_str);
    Ok(text.unwrap_or_default().to_owned())
}

#[test]
fn a_thousand_stops_under_load_do_no_harm() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").cpus(2).start()?;
        let mut qmp = guest.control()?;
        // One busy in user mode, both busy in the kernel.
        guest.sh("(guest spin 1000 >/dev/null 2>&1 &) ; (guest calls 1000 >/tmp/calls 2>&1 &)")?;
        for _ in 0..1000 {
            qmp.execute("stop", json!({}))?;
            qmp.execute("cont", json!({}))?;
        }
        assert_eq!(status(&mut qmp)?, "running");
        guest.sh("killall guest; sleep 1")?;
        assert_eq!(guest.complaints()?, "");
        assert_eq!(guest.sh("nproc")?.trim(), "2");
        guest.start_sh("poweroff -f")?;
        assert_eq!(guest.exit_status()?, 0);
        Ok(())
    })
}

#[test]
fn a_stopped_guest_does_nothing_until_it_is_resumed() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.1").cpus(2).start()?;
        let mut qmp = guest.control()?;
        guest.sh("(while :; do echo tick >/dev/ttyS0; usleep 50000; done) >/dev/null 2>&1 &")?;
        qmp.execute("stop", json!({}))?;
        // Twice is once.
        qmp.execute("stop", json!({}))?;
        assert_eq!(status(&mut qmp)?, "paused");
        std::thread::sleep(Duration::from_millis(500));
        let before = guest.console();
        std::thread::sleep(Duration::from_secs(2));
        assert_eq!(guest.console(), before, "it went on");

        qmp.execute("cont", json!({}))?;
        qmp.execute("cont", json!({}))?;
        assert_eq!(status(&mut qmp)?, "running");
        let begun = Instant::now();
        while guest.console().len() < before.len() + 20 {
            assert!(begun.elapsed() < SOON, "it does not go on");
            std::thread::sleep(Duration::from_millis(50));
        }
        qmp.event("STOP", SOON)?;
        qmp.event("RESUME", SOON)?;
        Ok(())
    })
}

#[test]
fn stops_while_booting() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").cpus(2).launch()?;
        let begun = Instant::now();
        let mut qmp = loop {
            match guest.control() {
                Ok(qmp) => break qmp,
                Err(error) if begun.elapsed() > SOON => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let mut stops = 0;
        while !guest.console().contains("stillpoint guest: ready") {
            assert!(begun.elapsed() < 3 * SOON, "not up after {stops} stops");
            qmp.execute("stop", json!({}))?;
            qmp.execute("cont", json!({}))?;
            stops += 1;
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(stops > 20, "only {stops} stops");
        assert_eq!(guest.sh("nproc")?.trim(), "2");
        assert_eq!(guest.complaints()?, "");
        Ok(())
    })
}

#[test]
fn quit_reset_and_the_power_button() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").start()?;
        let mut qmp = guest.control()?;
        qmp.execute("system_reset", json!({}))?;
        qmp.event("RESET", SOON)?;
        let begun = Instant::now();
        while guest.console().matches("stillpoint guest: ready").count() < 2 {
            assert!(begun.elapsed() < SOON, "not up again");
            std::thread::sleep(Duration::from_millis(50));
        }
        qmp.execute("system_powerdown", json!({}))?;
        qmp.event("POWERDOWN", SOON)?;
        let event = qmp.event("SHUTDOWN", SOON)?;
        assert_eq!(event.pointer("/data/guest"), Some(&json!(true)), "{event}");
        assert_eq!(guest.exit_status()?, 0);

        let guest = Guest::boot("6.12").mode("idle").start()?;
        let mut qmp = guest.control()?;
        qmp.execute("quit", json!({}))?;
        assert_eq!(guest.exit_status()?, 0);
        assert!(!guest.socket().exists(), "the socket is left behind");
        Ok(())
    })
}

#[test]
fn a_panic_is_told_to_clients() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").start()?;
        let mut qmp = guest.control()?;
        guest.start_sh("echo c >/proc/sysrq-trigger")?;
        qmp.event("GUEST_PANICKED", SOON)?;
        assert_eq!(guest.exit_status()?, 4);
        Ok(())
    })
}

#[test]
fn our_own_client_says_the_same_for_people_and_programs() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").cpus(2).start()?;
        let ask = |args: &[&str]| guest.stillpoint(args);
        assert_eq!(ask(&["status"])?.ok()?.trim(), "running");
        ask(&["pause"])?.ok()?;
        assert_eq!(ask(&["status"])?.ok()?.trim(), "paused");
        let json: Value = serde_json::from_str(&ask(&["--json", "status"])?.ok()?)?;
        assert_eq!(json.get("status"), Some(&json!("paused")));
        ask(&["resume"])?.ok()?;
        let cpus: Value = serde_json::from_str(&ask(&["cpus", "--json"])?.ok()?)?;
        assert_eq!(cpus.as_array().map(Vec::len), Some(2), "{cpus}");

        assert_eq!(ask(&["no-such-command"])?.status, 2);
        let refused = ask(&["text", "revert", "77"])?;
        assert_eq!(refused.status, 1, "{refused:?}");
        assert!(
            refused.stderr.contains("77") && refused.stdout.is_empty(),
            "{refused:?}"
        );

        ask(&["quit"])?.ok()?;
        assert_eq!(guest.exit_status()?, 0);
        let gone = ask(&["status"])?;
        assert_eq!(gone.status, 1, "{gone:?}");
        Ok(())
    })
}

fn client(program: &str, args: &[&str], socket: &Path, input: &str) -> Result<Ran, Failure> {
    let mut command = Command::new(python_client(program)?);
    command.args(args).arg(socket);
    if input.is_empty() {
        return Ran::of(&mut command);
    }
    let mut words = vec![command.get_program().to_owned()];
    words.extend(command.get_args().map(ToOwned::to_owned));
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "printf '%s' \"$INPUT\" | \"$@\"", "sh"])
        .args(words);
    Ran::of(shell.env("INPUT", input).stdin(Stdio::null()))
}

#[test]
fn the_qmp_library_and_its_shell() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").cpus(2).start()?;
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/qmp_library.py");
        let said = client("python", &[script], &guest.socket(), "")?.ok()?;
        assert!(said.contains("package: Stillpoint"), "{said}");
        assert!(said.contains("all well"), "{said}");

        let input = "query-status\nstop\nquery-status\ncont\nno-such-command\n";
        let said = client("qmp-shell", &[], &guest.socket(), input)?.ok()?;
        assert!(said.contains(r#""status": "running""#), "{said}");
        assert!(said.contains(r#""status": "paused""#), "{said}");
        assert!(said.contains("CommandNotFound"), "{said}");

        let said = client("qmp-shell", &["-H"], &guest.socket(), "info status\nhelp\n")?.ok()?;
        assert!(said.contains("VM status: running"), "{said}");
        assert!(said.contains("gpa2hva"), "{said}");
        Ok(())
    })
}

#[test]
fn drgn_debugs_the_running_kernel() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").cpus(2).start()?;
        let banner = guest.sh("cat /proc/version")?;
        let address = guest.sh("awk '$3 == \"linux_banner\" { print $1 }' /proc/kallsyms")?;
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/drgn_reads.py");
        let mut drgn = Command::new(python_client("drgn")?);
        drgn.arg("-q")
            .arg("--qemu")
            .arg(guest.socket())
            .args([script, address.trim()]);
        let said = Ran::of(&mut drgn)?.ok()?;
        assert!(said.contains(banner.trim()), "{said}");
        let release = guest.sh("uname -r")?;
        assert!(said.lines().any(|line| line == release.trim()), "{said}");
        assert_eq!(status(&mut guest.control()?)?, "running");
        Ok(())
    })
}

#[test]
fn a_dump_is_an_elf_core_with_every_cpu() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").cpus(2).memory("192M").start()?;
        let path = guest.dir().join("core");
        let name = path.display().to_string();
        guest.stillpoint(&["dump", &name])?.ok()?;
        let mut head = vec![0; 64 << 10];
        let len = {
            use std::io::Read;
            let mut file = std::fs::File::open(&path)?;
            file.read_exact(&mut head)?;
            file.metadata()?.len()
        };
        assert!(len >= 192 << 20, "{len:#x} bytes");
        assert!(head.starts_with(b"\x7fELF"));
        let text = String::from_utf8_lossy(&head);
        assert!(text.contains("VMCOREINFO"), "no such note");
        assert!(text.contains("OSRELEASE=6.12"), "no release");
        assert_eq!(text.matches("CORE\0").count(), 2, "one note for each vCPU");
        // What is there is not overwritten.
        assert_eq!(guest.stillpoint(&["dump", &name])?.status, 1);
        assert_eq!(status(&mut guest.control()?)?, "running");
        Ok(())
    })
}
