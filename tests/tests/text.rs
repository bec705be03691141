//! The guest kernel's text is changed while it runs, and put back.

use std::time::Duration;

use serde_json::{Value, json};
use stillpoint_tests::{
    Boot, Failure, Guest, Qmp, QmpError, REPLACED, SOON, TestResult, all_or, on_kvm, refusal,
    replacement,
};

/// The nop at a traceable function's entry, as every stock kernel has it after boot.
const NOP: &str = "0f1f440000";

/// Another of the same length.
const OTHER_NOP: &str = "0f1f440001";

/// `xor %eax, %eax; ret; nop; nop`: the function returns 0 at once.
const RETURN_0: &str = "31c0c39090";

/// The nop is behind the ENDBR where there is one: asks for both places.
fn entry_of(qmp: &mut Qmp, function: &str) -> Result<String, Failure> {
    for site in [format!("{function}+0x4"), function.to_owned()] {
        let request = json!({"site": site, "expect": NOP, "write": OTHER_NOP});
        match qmp.execute("text-patch", request) {
            Ok(entry) => {
                revert(qmp, &entry)?;
                return Ok(site);
            }
            Err(QmpError::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Failure::new(format!(
        "{function} does not begin with a nop"
    )))
}

fn revert(qmp: &mut Qmp, entry: &Value) -> Result<Value, Failure> {
    let id = entry
        .get("id")
        .cloned()
        .ok_or_else(|| Failure::new(format!("no id in {entry}")))?;
    Ok(qmp.execute("text-revert", json!({"id": id}))?)
}

fn redirect(qmp: &mut Qmp) -> Result<Value, Failure> {
    let object = replacement("version").display().to_string();
    let request = json!({"site": "version_proc_show", "object": object});
    Ok(qmp.execute("text-redirect", request)?)
}

/// An address, as every reply has them.
fn address(reply: &Value, name: &str) -> Result<u64, Failure> {
    let digits = reply.get(name).and_then(Value::as_str);
    digits
        .and_then(|text| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok())
        .ok_or_else(|| Failure::new(format!("no {name} in {reply}")))
}

/// How long a command kept the guest stopped, in microseconds: every such reply says so.
fn stalled(reply: &Value) -> Result<u64, Failure> {
    reply
        .pointer("/stop/stalled-us")
        .and_then(Value::as_u64)
        .ok_or_else(|| Failure::new(format!("no stop time in {reply}")))
}

fn patches(kernel: &str) -> TestResult {
    let guest = Guest::boot(kernel).cpus(2).start()?;
    let mut qmp = guest.control()?;
    let before = guest.sh("cat /proc/version")?;
    let site = entry_of(&mut qmp, "version_proc_show")?;
    let request = json!({"site": site, "expect": NOP, "write": RETURN_0});
    let entry = qmp.execute("text-patch", request.clone())?;
    assert!(stalled(&entry)? > 0);
    assert_eq!(
        guest.sh("cat /proc/version")?,
        "",
        "the function did not return at once"
    );

    // Once more is refused: the bytes are not the expected ones any more, or have an owner.
    refusal(qmp.execute("text-patch", request))?;
    let list = qmp.execute("query-text", json!({}))?;
    let applied = list.get("applied").and_then(Value::as_array);
    assert_eq!(applied.map(Vec::len), Some(1), "{list}");

    revert(&mut qmp, &entry)?;
    assert_eq!(guest.sh("cat /proc/version")?, before);
    refusal(qmp.execute("text-revert", json!({"id": entry.get("id")})))?;
    assert_eq!(guest.complaints()?, "");
    Ok(())
}

#[test]
fn a_patch_and_back_on_6_12() -> TestResult {
    on_kvm(|| patches("6.12"))
}

#[test]
fn a_patch_and_back_on_6_1() -> TestResult {
    on_kvm(|| patches("6.1"))
}

#[test]
fn what_may_not_be_patched() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").start()?;
        let mut qmp = guest.control()?;
        let before = guest.sh("cat /proc/version")?;
        let patch = |site: &str, expect: &str, write: &str| json!({"site": site, "expect": expect, "write": write});
        let site = entry_of(&mut qmp, "version_proc_show")?;
        for (request, word) in [
            // Not what is there; not as long as what is there.
            (patch(&site, "9090909090", RETURN_0), "expect"),
            (patch(&site, NOP, "c3"), ""),
            (patch(&site, "", ""), ""),
            (patch(&site, "0g", "90"), ""),
            // In the middle of an instruction, or across one.
            (patch(&site, "0f1f44", "909090"), ""),
            (
                patch("no_such_symbol_anywhere", NOP, RETURN_0),
                "no_such_symbol_anywhere",
            ),
            (patch("version_proc_show+0x100000", NOP, RETURN_0), ""),
            (patch("0x1000", NOP, RETURN_0), ""),
            // Freed after boot; entered where nothing may be changed; data.
            (patch("start_kernel", NOP, RETURN_0), ""),
            (patch("exc_page_fault", "90", "cc"), ""),
            (patch("entry_SYSCALL_64", "90", "cc"), ""),
            (patch("linux_banner", "4c", "4d"), ""),
        ] {
            let desc = refusal(qmp.execute("text-patch", request.clone()))?;
            assert!(desc.contains(word), "{request}: {desc}");
        }
        let list = qmp.execute("query-text", json!({}))?;
        assert_eq!(list.get("applied"), Some(&json!([])), "{list}");
        assert_eq!(guest.sh("cat /proc/version")?, before);

        // The client says the same, with its status.
        let ran = guest.stillpoint(&[
            "text",
            "patch",
            &site,
            "--expect",
            "9090909090",
            "--write",
            RETURN_0,
        ])?;
        assert_eq!(ran.status, 1, "{ran:?}");
        assert!(!ran.stderr.is_empty() && ran.stdout.is_empty(), "{ran:?}");
        Ok(())
    })
}

#[test]
fn a_revert_is_refused_when_the_bytes_are_not_ours_any_more() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").start()?;
        let mut qmp = guest.control()?;
        let entry = redirect(&mut qmp)?;
        // Somebody else writes there: this test, into guest memory from outside.
        let kernel = qmp.execute("query-kernel", json!({}))?;
        let at = address(&entry, "address")?;
        // The kernel's image is mapped at __START_KERNEL_map (arch/x86/include/asm/page_64_types.h).
        let physical = at
            .wrapping_sub(0xffff_ffff_8000_0000)
            .wrapping_add(address(&kernel, "phys-base")?);
        let said = qmp.execute(
            "human-monitor-command",
            json!({"command-line": format!("gpa2hva {physical:#x}")}),
        )?;
        let host = said
            .as_str()
            .and_then(|said| said.trim().rsplit("0x").next())
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .ok_or_else(|| Failure::new(format!("no address in {said}")))?;
        let memory = std::fs::File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{}/mem", guest.pid()))?;
        let mut bytes = [0; 5];
        std::os::unix::fs::FileExt::read_exact_at(&memory, &mut bytes, host)?;
        assert_eq!(bytes[0], 0xe9, "no jump there");
        std::os::unix::fs::FileExt::write_all_at(&memory, &[0x0f, 0x1f, 0x44, 0, 0], host)?;

        let desc = refusal(qmp.execute("text-revert", json!({"id": entry.get("id")})))?;
        assert!(desc.contains("e9") || desc.contains("bytes"), "{desc}");
        std::os::unix::fs::FileExt::write_all_at(&memory, &bytes, host)?;
        revert(&mut qmp, &entry)?;
        assert_eq!(guest.complaints()?, "");
        Ok(())
    })
}

/// Redirects and reverts `rounds` times while every vCPU calls the function.
fn redirects(boot: Boot, cpus: u32, rounds: u32) -> TestResult {
    let guest = boot.cpus(cpus).start()?;
    let mut qmp = guest.control()?;
    // The kernel is recognised and indexed once, before the clock of any command runs.
    qmp.execute("query-kernel", json!({}))?;
    guest.sh(&format!(
        "(guest read /proc/version 100000 'Linux version' '{REPLACED}' >/tmp/seen 2>&1 & \
         echo $! >/tmp/pid)"
    ))?;
    let mut longest = 0;
    for round in 0..rounds {
        let entry = redirect(&mut qmp).map_err(|e| Failure::new(format!("round {round}: {e}")))?;
        longest = longest.max(stalled(&entry)?);
        if round == 0 {
            let said = guest.sh("cat /proc/version")?;
            assert!(said.contains(REPLACED), "{said}");
            // Long enough for every vCPU to come by.
            std::thread::sleep(Duration::from_secs(2));
        }
        revert(&mut qmp, &entry).map_err(|e| Failure::new(format!("round {round}: {e}")))?;
    }
    let said = guest.sh("cat /proc/version")?;
    assert!(said.contains("Linux version"), "{said}");
    guest.sh("kill -TERM $(cat /tmp/pid); sleep 1")?;
    let seen = guest.sh("cat /tmp/seen")?;
    assert!(!seen.contains("unexpected"), "{seen}");
    let lines: Vec<Vec<u64>> = seen
        .lines()
        .filter(|line| line.starts_with("cpu "))
        .map(|line| {
            line.split_whitespace()
                .filter_map(|word| word.parse().ok())
                .collect()
        })
        .collect();
    assert_eq!(lines.len(), cpus as usize, "{seen}");
    for counts in &lines {
        // Of the kernel's own, of ours, of neither.
        let [old, new, neither] = counts.as_slice() else {
            return Err(Failure::new(format!("odd counts: {seen}")));
        };
        assert!(*old > 0 && *new > 0 && *neither == 0, "{seen}");
    }
    assert_eq!(guest.complaints()?, "");
    println!("{rounds} rounds, longest stall {longest} us");
    Ok(())
}

/// A thousand rounds are asked for; the combinations beside the first do fewer unless all is tested.
fn rounds(few: u32) -> u32 {
    all_or(1000, few)
}

#[test]
fn redirects_a_thousand_times_on_6_12_with_4_cpus() -> TestResult {
    on_kvm(|| redirects(Guest::boot("6.12"), 4, 1000))
}

#[test]
fn redirects_on_6_12_with_1_cpu() -> TestResult {
    on_kvm(|| redirects(Guest::boot("6.12"), 1, rounds(100)))
}

#[test]
fn redirects_on_6_1_with_4_cpus() -> TestResult {
    on_kvm(|| redirects(Guest::boot("6.1"), 4, rounds(100)))
}

#[test]
fn redirects_on_6_1_with_1_cpu_and_vmlinux() -> TestResult {
    on_kvm(|| redirects(Guest::boot("6.1").vmlinux(), 1, rounds(20)))
}

#[test]
fn redirects_with_page_table_isolation() -> TestResult {
    on_kvm(|| redirects(Guest::boot("6.12").cmdline("pti=on"), 2, rounds(100)))
}

#[test]
fn redirects_with_page_table_isolation_on_6_1() -> TestResult {
    on_kvm(|| redirects(Guest::boot("6.1").cmdline("pti=on"), 2, rounds(20)))
}

#[test]
fn a_reset_voids_what_was_changed() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").start()?;
        let mut qmp = guest.control()?;
        qmp.execute("events-enable", json!({}))?;
        redirect(&mut qmp)?;
        guest.start_sh("reboot -f")?;
        qmp.event("PATCHES_GONE", SOON)?;
        let begun = std::time::Instant::now();
        while guest.console().matches("stillpoint guest: ready").count() < 2 {
            assert!(begun.elapsed() < SOON, "not up again");
            std::thread::sleep(Duration::from_millis(50));
        }
        let list = qmp.execute("query-text", json!({}))?;
        assert_eq!(list.get("applied"), Some(&json!([])), "{list}");
        assert!(guest.sh("cat /proc/version")?.contains("Linux version"));
        // The new kernel can be changed like the first.
        let entry = redirect(&mut qmp)?;
        assert!(guest.sh("cat /proc/version")?.contains(REPLACED));
        revert(&mut qmp, &entry)?;
        Ok(())
    })
}

#[test]
fn a_kexec_in_the_guest_voids_what_was_changed() -> TestResult {
    on_kvm(|| {
        let other = stillpoint_tests::kernel("6.1").join("vmlinuz");
        let initrd = stillpoint_tests::initramfs("6.1");
        let guest = Guest::boot("6.12")
            .memory("512M")
            .file("/other-vmlinuz", &other)
            .file("/other-initrd", &initrd)
            .start()?;
        let mut qmp = guest.control()?;
        qmp.execute("events-enable", json!({}))?;
        redirect(&mut qmp)?;
        guest.start_sh(
            "guest kexec /other-vmlinuz /other-initrd 'console=ttyS0 quiet panic=-1 mode=script'",
        )?;
        qmp.event("PATCHES_GONE", SOON)?;
        guest.wait_for("Linux 6.1.", SOON)?;
        let list = qmp.execute("query-text", json!({}))?;
        assert_eq!(list.get("applied"), Some(&json!([])), "{list}");
        Ok(())
    })
}

#[test]
fn guest_writes_into_our_code_are_dropped_and_told() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").start()?;
        let mut qmp = guest.control()?;
        qmp.execute("events-enable", json!({}))?;
        redirect(&mut qmp)?;
        let arena = qmp.execute("query-text", json!({}))?;
        let arena = arena.get("arena").unwrap_or(&Value::Null);
        let at = address(arena, "code-gpa")?;
        let before = guest.sh(&format!("guest load {at:#x}"))?;
        // The last ones KVM does not emulate.
        for (count, how) in [
            "mov", "lock", "movs", "sse", "fxsave", "movq", "fist", "cx16",
        ]
        .iter()
        .enumerate()
        {
            let (status, said) = guest.sh_status(&format!("guest store {at:#x} {how} 0xcccc"))?;
            assert_eq!(status, 0, "{how}: {said}");
            let event = qmp.event("ARENA_WRITE_REFUSED", SOON)?;
            assert!(
                event.pointer("/data/count").and_then(Value::as_u64) > Some(count as u64),
                "{event}"
            );
            assert_eq!(guest.sh(&format!("guest load {at:#x}"))?, before, "{how}");
        }
        assert!(guest.sh("cat /proc/version")?.contains(REPLACED));
        assert!(
            guest.log().contains(&format!("{at:x}")),
            "not logged: {}",
            guest.log()
        );
        assert_eq!(guest.complaints()?, "");
        Ok(())
    })
}
