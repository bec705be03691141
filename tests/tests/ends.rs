//! How guests end: the exit status, and a line that says what happened.

use stillpoint_tests::{Boot, Guest, SOON, TestResult, on_kvm};

fn kill(guest: &Guest, signal: &str) -> TestResult {
    let kill = std::process::Command::new("kill")
        .args([format!("-{signal}"), guest.pid().to_string()])
        .status()?;
    assert!(kill.success());
    Ok(())
}

#[test]
fn power_off_is_0() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.1").mode("poweroff").launch()?;
        assert_eq!(guest.exit_status()?, 0);
        assert!(guest.log().contains("powered off"), "{}", guest.log());
        Ok(())
    })
}

#[test]
fn a_reboot_starts_the_machine_again() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").cpus(2).start()?;
        guest.start_sh("reboot -f")?;
        let ups = || guest.console().matches("stillpoint guest: ready").count();
        let begun = std::time::Instant::now();
        while ups() < 2 {
            assert!(begun.elapsed() < SOON, "not up again");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        assert_eq!(guest.sh("nproc")?.trim(), "2");
        guest.start_sh("poweroff -f")?;
        assert_eq!(guest.exit_status()?, 0);
        Ok(())
    })
}

#[test]
fn a_reboot_ends_with_0_if_told_so() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12")
            .mode("reboot")
            .args(&["--no-reboot"])
            .launch()?;
        assert_eq!(guest.exit_status()?, 0);
        assert!(guest.log().contains("reboot"), "{}", guest.log());
        Ok(())
    })
}

fn ends_as_panicked(boot: Boot) -> TestResult {
    let guest = boot.cpus(2).mode("panic").launch()?;
    assert_eq!(guest.exit_status()?, 4);
    assert!(
        guest.log().contains("sysrq triggered crash"),
        "{}",
        guest.log()
    );
    Ok(())
}

#[test]
fn a_panic_that_resets_is_4() -> TestResult {
    on_kvm(|| ends_as_panicked(Guest::boot("6.12")))
}

#[test]
fn a_panic_that_spins_for_ever_is_4() -> TestResult {
    on_kvm(|| ends_as_panicked(Guest::boot("6.1").cmdline("panic=0")))
}

#[test]
fn a_triple_fault_is_5() -> TestResult {
    on_kvm(|| {
        // The kernel's own last resort: an empty interrupt table and a breakpoint.
        let guest = Guest::boot("6.12")
            .cmdline("reboot=t")
            .mode("reboot")
            .launch()?;
        assert_eq!(guest.exit_status()?, 5);
        assert!(guest.log().contains("triple fault"), "{}", guest.log());
        Ok(())
    })
}

#[test]
fn sigterm_is_0_for_a_guest_that_hears_the_power_button() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").start()?;
        kill(&guest, "TERM")?;
        assert_eq!(guest.exit_status()?, 0);
        let console = guest.console();
        assert!(
            console.contains("stillpoint guest: power button"),
            "{console}"
        );
        Ok(())
    })
}

#[test]
fn sigterm_is_0_for_a_guest_that_does_not() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").start()?;
        guest.sh("killall acpid; rmmod button")?;
        kill(&guest, "TERM")?;
        assert_eq!(guest.exit_status()?, 0);
        Ok(())
    })
}
