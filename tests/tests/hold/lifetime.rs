//! How holds end, and what may not be asked for.

use super::*;

#[test]
fn a_hold_stops_with_its_deadline_and_stands_a_stop() -> TestResult {
    on_kvm(|| {
        let (guest, mut qmp) = start(Guest::boot("6.12").cpus(2))?;
        // Where it is; it ends by itself.
        hold(&mut qmp, json!({"vcpu": 1, "deadline": 700}))?;
        begin(&guest, 1, "cat /proc/version", "/tmp/version")?;
        others_run(&guest)?;
        let event = qmp.event("VCPU_RELEASED", SOON)?;
        assert_eq!(text(&event, "/data/reason"), "deadline", "{event}");
        let held = event.pointer("/data/held-us").and_then(Value::as_u64);
        assert!(held.is_some_and(|us| us >= 700_000), "{event}");
        done(&guest, "/tmp/version")?;

        // A stop finds it parked, and leaves it held; so does what looks into the stopped guest.
        hold(&mut qmp, json!({"vcpu": 1}))?;
        begin(&guest, 1, "cat /proc/version", "/tmp/version")?;
        for _ in 0..all_or(20, 5) {
            qmp.execute("stop", json!({}))?;
            qmp.execute("query-tasks", json!({"pid": 1}))?;
            qmp.execute("cont", json!({}))?;
        }
        others_run(&guest)?;
        assert_eq!(text(&vcpu(&mut qmp, 1)?, "/hold/state"), "held");
        // Asked for and released in a stop.
        qmp.execute("stop", json!({}))?;
        let desc = refusal(hold(&mut qmp, json!({"vcpu": 1})))?;
        assert!(
            desc.starts_with("Busy") && desc.contains("release"),
            "{desc}"
        );
        release(&mut qmp, 1)?;
        hold(&mut qmp, json!({"vcpu": 1, "at": FUNCTION, "wait": false}))?;
        qmp.execute("cont", json!({}))?;
        qmp.event("VCPU_HELD", SOON)?;
        let (core, name) = (guest.dir().join("core"), "/rip");
        guest
            .stillpoint(&["dump", &core.display().to_string()])?
            .ok()?;
        assert_ne!(text(&vcpu(&mut qmp, 1)?, name), "");
        release(&mut qmp, 1)?;
        done(&guest, "/tmp/version")?;

        for (arguments, word) in [
            (json!({"vcpu": 2}), "NotFound"),
            (json!({"vcpu": 4_000_000_000_u32}), "NotFound"),
            (json!({"vcpu": -1}), "InvalidArgument"),
            (json!({}), "MissingArgument"),
            (json!({"vcpu": 1, "hard": true}), "UnknownArgument"),
            (json!({"vcpu": 1, "deadline": "2h"}), "InvalidArgument"),
            (json!({"vcpu": 1, "at": ""}), "InvalidArgument"),
            (json!({"vcpu": 1, "at": "no_such_function"}), "NoSuchSite"),
            (json!({"vcpu": 1, "at": "linux_banner"}), "NotText"),
            (json!({"vcpu": 1, "at": "start_kernel"}), "InitText"),
            (json!({"vcpu": 1, "at": "0x1000"}), "NotText"),
            (
                json!({"vcpu": 1, "at": "entry_SYSCALL_64"}),
                "ForbiddenText",
            ),
        ] {
            let desc = refusal(hold(&mut qmp, arguments.clone()))?;
            assert!(desc.starts_with(word), "{arguments}: {desc}");
        }
        for vcpu in [0, 1, 2] {
            let desc = refusal(release(&mut qmp, vcpu))?;
            assert!(desc.starts_with("NotFound"), "{desc}");
        }

        // The client says the same, with its status.
        let ask = |args: &[&str]| guest.stillpoint(&[&["vcpu"], args].concat());
        let never = ask(&["hold", "1", "--at", FUNCTION, "--deadline", "500ms"])?;
        assert_eq!(never.status, 3, "{never:?}");
        assert!(never.stderr.contains(FUNCTION), "{never:?}");
        assert_eq!(ask(&["release", "1"])?.status, 1);
        assert_eq!(ask(&["hold", "7"])?.status, 1);
        assert_eq!(ask(&["hold"])?.status, 2);
        let said = ask(&["hold", "1", "--deadline", "1m"])?.ok()?;
        assert!(said.contains("vCPU 1 is held"), "{said}");
        let said = guest.stillpoint(&["cpus"])?.ok()?;
        assert!(said.contains("more"), "{said}");
        let said = ask(&["release", "1"])?.ok()?;
        assert!(said.contains("vCPU 1 goes on"), "{said}");
        assert_eq!(guest.complaints()?, "");
        Ok(())
    })
}

#[test]
fn resets_and_ends_do_not_wait_for_a_held_vcpu() -> TestResult {
    on_kvm(|| {
        let (guest, mut qmp) = start(Guest::boot("6.12").cpus(2))?;
        let long = |vcpu: u32| json!({"vcpu": vcpu, "deadline": "10m"});
        hold(&mut qmp, long(1))?;
        hold(
            &mut qmp,
            json!({"vcpu": 0, "at": "panic", "wait": false, "deadline": "10m"}),
        )?;
        qmp.execute("system_reset", json!({}))?;
        let event = qmp.event("RESET", SOON)?;
        assert_eq!(text(&event, "/data/reason"), "host-qmp-system-reset");
        let begun = Instant::now();
        while guest.console().matches("stillpoint guest: ready").count() < 2 {
            assert!(begun.elapsed() < SOON, "not up again");
            std::thread::sleep(Duration::from_millis(50));
        }
        // Nothing is left of the holds, and every vCPU was started.
        assert_eq!(guest.sh("grep -c ^processor /proc/cpuinfo")?.trim(), "2");
        for index in 0..2 {
            assert_eq!(vcpu(&mut qmp, index)?.get("hold"), Some(&Value::Null));
        }
        assert_eq!(guest.complaints()?, "");
        hold(&mut qmp, long(1))?;
        hold(&mut qmp, long(0))?;
        let begun = Instant::now();
        qmp.execute("quit", json!({}))?;
        assert_eq!(guest.exit_status()?, 0);
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "{:?}",
            begun.elapsed()
        );
        Ok(())
    })
}
