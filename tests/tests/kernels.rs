//! Other stock kernels than the two that every test boots: they boot, and are changed while they run.

use serde_json::json;
use stillpoint_tests::{Guest, REPLACED, TestResult, on_kvm_with, replacement};

fn is_changed_while_it_runs(kernel: &'static str, says: &'static str) -> TestResult {
    on_kvm_with(&[kernel], || {
        let guest = Guest::boot(kernel).cpus(2).memory("512M").start()?;
        let before = guest.sh("cat /proc/version")?;
        assert!(before.contains(says), "{before}");
        let mut qmp = guest.control()?;
        let object = replacement("version").display().to_string();
        let request = json!({"site": "version_proc_show", "object": object});
        let entry = qmp.execute("text-redirect", request)?;
        assert!(guest.sh("cat /proc/version")?.contains(REPLACED));
        qmp.execute("text-revert", json!({"id": entry.get("id")}))?;
        assert_eq!(guest.sh("cat /proc/version")?, before);
        assert_eq!(guest.complaints()?, "");
        guest.start_sh("poweroff -f")?;
        assert_eq!(guest.exit_status()?, 0);
        Ok(())
    })
}

#[test]
fn generic_6_12() -> TestResult {
    is_changed_while_it_runs("6.12-generic", "Linux version 6.12")
}

#[test]
fn generic_6_1() -> TestResult {
    is_changed_while_it_runs("6.1-generic", "Linux version 6.1.")
}

#[test]
fn real_time_6_12() -> TestResult {
    is_changed_while_it_runs("6.12-rt", "PREEMPT_RT")
}

#[test]
fn real_time_6_1() -> TestResult {
    is_changed_while_it_runs("6.1-rt", "PREEMPT_RT")
}
