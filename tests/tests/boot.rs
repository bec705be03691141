//! Stock kernels boot, in every way in which they can be given.

use stillpoint_tests::{Boot, Guest, SOON, TestResult, on_kvm};

/// Boots it, looks at what the guest sees, and powers it off.
fn boots(boot: Boot, version: &str, cpus: u32) -> TestResult {
    let guest = boot.cpus(cpus).cmdline("seen=42").start()?;
    let banner = guest.sh("cat /proc/version")?;
    assert!(banner.contains(version), "{banner}");
    assert_eq!(guest.sh("nproc")?.trim(), cpus.to_string());
    let cmdline = guest.sh("cat /proc/cmdline")?;
    assert!(cmdline.contains("seen=42"), "{cmdline}");
    assert_eq!(guest.complaints()?, "");
    guest.start_sh("poweroff -f")?;
    assert_eq!(guest.exit_status()?, 0);
    Ok(())
}

#[test]
fn bzimage_6_12_with_2_cpus() -> TestResult {
    on_kvm(|| boots(Guest::boot("6.12"), "Linux version 6.12", 2))
}

#[test]
fn bzimage_6_1_with_1_cpu() -> TestResult {
    on_kvm(|| boots(Guest::boot("6.1"), "Linux version 6.1.", 1))
}

#[test]
fn vmlinux_6_12_with_1_cpu() -> TestResult {
    on_kvm(|| boots(Guest::boot("6.12").vmlinux(), "Linux version 6.12", 1))
}

#[test]
fn vmlinux_6_1_with_4_cpus() -> TestResult {
    on_kvm(|| boots(Guest::boot("6.1").vmlinux(), "Linux version 6.1.", 4))
}

#[test]
fn a_kernel_is_randomised_when_it_comes_as_a_bzimage() -> TestResult {
    on_kvm(|| {
        let text = |guest: &Guest| guest.sh("grep -m1 ' _text$' /proc/kallsyms");
        let slides = [
            text(&Guest::boot("6.12").start()?)?,
            text(&Guest::boot("6.12").start()?)?,
        ];
        assert_ne!(slides[0], slides[1]);
        Ok(())
    })
}

#[test]
fn thirty_two_cpus() -> TestResult {
    on_kvm(|| {
        // Level 1 of the lab has one CPU for them all.
        let guest = Guest::boot("6.12").cpus(32).mode("idle").launch()?;
        guest.wait_for(", 32 CPUs", 5 * SOON)?;
        Ok(())
    })
}

#[test]
fn memory_on_both_sides_of_the_32_bit_hole_is_there_and_not_reserved() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").memory("6G").start()?;
        let total = guest.sh("awk '/MemTotal/ { print $2 }' /proc/meminfo")?;
        let mib = total.trim().parse::<u64>()? >> 10;
        assert!((5600..=6144).contains(&mib), "{mib} MiB");
        // All of it can be used: what is written far up is read back.
        let sum = guest.sh(
            "mount -o remount,size=100% /tmp && head -c 67108864 /dev/urandom >/tmp/a && \
             cp /tmp/a /tmp/b && cmp /tmp/a /tmp/b && echo same",
        )?;
        assert_eq!(sum.trim(), "same");
        let status = std::fs::read_to_string(format!("/proc/{}/status", guest.pid()))?;
        let resident = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok())
            .unwrap_or(u64::MAX);
        assert!(resident >> 10 < 1024, "{} MiB resident", resident >> 10);
        Ok(())
    })
}

#[test]
fn virtualization_is_hidden_unless_asked_for() -> TestResult {
    on_kvm(|| {
        let flags = "grep -owE -m1 'vmx|svm' /proc/cpuinfo || echo none";
        assert_eq!(Guest::boot("6.12").start()?.sh(flags)?.trim(), "none");
        Ok(())
    })
}
