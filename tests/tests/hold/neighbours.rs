//! What else is in the guest while a vCPU is held: its own breakpoints, and code that waits to be freed.

use super::*;

#[test]
fn breakpoints_of_the_guests_own_work_while_ours_are_there() -> TestResult {
    on_kvm(|| {
        let (guest, mut qmp) = start(Guest::boot("6.12").cpus(2))?;
        let tracing = |what: &str| guest.sh(&format!("cd /sys/kernel/tracing; {what}"));
        let count = |what: &str| -> Result<String, Failure> {
            guest.sh(&format!(
                "grep '^ *{what} ' /sys/kernel/tracing/kprobe_profile | awk '{{print $2}}'"
            ))
        };
        // Behind the entry it is a breakpoint of its own, and one that is not optimised.
        tracing("echo 0 >/proc/sys/debug/kprobes-optimization || true")?;
        tracing(
            "echo 'p:before uptime_proc_show+9' >kprobe_events; echo 1 >events/kprobes/before/enable",
        )?;
        let uptimes = "i=0; while [ $i -lt 50 ]; do read x </proc/uptime; i=$((i+1)); done";
        guest.sh(uptimes)?;
        assert_eq!(count("before")?.trim(), "50");
        for soft in [false, true] {
            armed(&mut qmp, 1, BEHIND, soft)?;
            // The one that was there, one that comes meanwhile, and a program's, on both vCPUs.
            tracing(
                "echo 'p:while meminfo_proc_show+9' >>kprobe_events; echo 1 >events/kprobes/while/enable",
            )?;
            for cpu in 0..2 {
                begin(&guest, cpu, "guest int3 200", &format!("/tmp/int3-{cpu}"))?;
            }
            guest.sh(uptimes)?;
            guest.sh(
                "i=0; while [ $i -lt 20 ]; do cat /proc/meminfo >/dev/null; i=$((i+1)); done",
            )?;
            for cpu in 0..2 {
                let said = done(&guest, &format!("/tmp/int3-{cpu}"))?;
                assert_eq!(said.trim(), "200 breakpoints");
            }
            assert_eq!(
                guest.sh("taskset -c 1 guest traps 200")?.trim(),
                "200 traps"
            );
            // On the instruction of ours the guest can have none.
            let refused = format!(
                "echo 'p:ours {BEHIND}' >>/sys/kernel/tracing/kprobe_events && echo 1 >/sys/kernel/tracing/events/kprobes/ours/enable"
            );
            assert_ne!(guest.sh_status(&format!("({refused}) 2>/dev/null"))?.0, 0);
            assert_eq!(count("while")?.trim(), "20");
            begin(&guest, 1, "cat /proc/version", "/tmp/version")?;
            qmp.event("VCPU_HELD", SOON)?;
            release(&mut qmp, 1)?;
            done(&guest, "/tmp/version")?;
            // It waits for every CPU.
            tracing(
                "echo 0 >events/kprobes/while/enable; echo -:while >>kprobe_events; echo -:ours >>kprobe_events 2>/dev/null || true",
            )?;
        }
        guest.sh(uptimes)?;
        assert_eq!(count("before")?.trim(), "200");
        tracing("echo 0 >events/kprobes/before/enable; echo >kprobe_events")?;
        assert_eq!(guest.sh("guest int3 5")?.trim(), "5 breakpoints");
        // What ours is refused where the guest has one.
        tracing(
            "echo 'p:theirs version_proc_show+9' >kprobe_events; echo 1 >events/kprobes/theirs/enable",
        )?;
        let request = json!({"vcpu": 1, "at": BEHIND, "wait": false});
        let desc = refusal(hold(&mut qmp, request))?;
        assert!(
            desc.starts_with("Owned") && desc.contains("kprobe"),
            "{desc}"
        );
        tracing("echo 0 >events/kprobes/theirs/enable; echo >kprobe_events")?;
        assert_eq!(guest.complaints()?, "");
        Ok(())
    })
}

#[test]
fn what_a_held_vcpu_is_in_waits_for_it_by_name() -> TestResult {
    on_kvm(|| {
        let (guest, mut qmp) = start(Guest::boot("6.12").cpus(2))?;
        let before = guest.sh("cat /proc/version")?;
        let object = stillpoint_tests::replacement("sleeper")
            .display()
            .to_string();
        let request = json!({"site": FUNCTION, "object": object});
        let change = qmp.execute("text-redirect", request)?;
        // It has been called by the new function, and will return there.
        armed(&mut qmp, 1, "msleep", false)?;
        begin(&guest, 1, "cat /proc/version", "/tmp/version")?;
        qmp.event("VCPU_HELD", SOON)?;
        let pid = guest.sh("pidof cat")?;
        let reverted = qmp.execute("text-revert", json!({"id": change.get("id")}))?;
        let freed = reverted
            .pointer("/collected/freed")
            .and_then(Value::as_array);
        assert!(
            !freed.is_some_and(|freed| freed.contains(&change["id"])),
            "{reverted}"
        );
        assert_eq!(guest.sh("cat /proc/version")?, before);
        let cookie = qmp.execute("gp-snapshot", json!({}))?;
        let cookie = cookie.get("cookie").cloned();

        let told = qmp.execute("query-holdouts", json!({}))?;
        let of = |holdout: &&Value| holdout.get("id") == change.get("id");
        let all = told.get("holdouts").and_then(Value::as_array);
        let holdout = all
            .into_iter()
            .flatten()
            .find(of)
            .cloned()
            .unwrap_or_default();
        assert_eq!(holdout.get("held-vcpu"), Some(&json!(1)), "{told}");
        let missing = text(&holdout, "/missing");
        assert!(missing.contains("vCPU 1 is held by vcpu-hold"), "{told}");
        let found = text(&holdout, "/found");
        assert!(found.contains(&format!("pid {}", pid.trim())), "{told}");
        let wait = json!({"cookie": cookie, "deadline": 300});
        let desc = refusal(qmp.execute("gp-wait", wait))?;
        assert!(desc.contains("vCPU 1 is held by vcpu-hold"), "{desc}");
        // What it does not hold up goes on.
        let probe = qmp.execute("probe-attach", json!({"site": "vfs_read"}))?;
        qmp.execute("probe-detach", json!({"id": probe.get("id")}))?;
        let begun = Instant::now();
        loop {
            let told = qmp.execute("query-trampolines", json!({}))?;
            let all = told.get("trampolines").and_then(Value::as_array);
            let ids: Vec<_> = all.into_iter().flatten().map(|t| t.get("id")).collect();
            if ids == [change.get("id")] {
                break;
            }
            assert!(begun.elapsed() < SOON, "{told}");
        }
        release(&mut qmp, 1)?;
        qmp.execute("gp-wait", json!({"cookie": cookie, "deadline": 30_000}))?;
        assert_eq!(done(&guest, "/tmp/version")?.trim(), "z");
        all_freed(&mut qmp)?;
        assert_eq!(guest.complaints()?, "");
        Ok(())
    })
}
