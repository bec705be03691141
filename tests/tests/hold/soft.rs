//! A vCPU that waits in a loop, and what its guest does meanwhile.

use super::*;

/// Timer interrupts of a CPU so far.
fn ticks(guest: &Guest, cpu: usize) -> Result<u64, Failure> {
    let said = guest.sh("grep LOC: /proc/interrupts")?;
    let number = said.split_whitespace().nth(cpu + 1);
    number
        .and_then(|number| number.parse().ok())
        .ok_or_else(|| Failure::new(format!("no timer interrupts: {said}")))
}

#[test]
fn held_softly_it_serves_interrupts_and_goes_on_where_it_was() -> TestResult {
    on_kvm(|| {
        // Fully preemptible: the guest may take the CPU away from a task in the loop, and move it.
        let (guest, mut qmp) = start(Guest::boot("6.12").cpus(4).cmdline("preempt=full"))?;
        let version = guest.sh("cat /proc/version")?;
        let before = changed_text(&mut qmp)?;
        for round in 0..all_or(4, 2) {
            armed(&mut qmp, 1, FUNCTION, true)?;
            assert_eq!(guest.sh("cat /proc/version")?, version);
            begin(&guest, 1, "cat /proc/version", "/tmp/version")?;
            let event = qmp.event("VCPU_HELD", SOON)?;
            assert_eq!(event.pointer("/data/soft"), Some(&json!(true)), "{event}");
            assert_eq!(event.pointer("/data/interrupts"), Some(&json!(true)));
            let listed = qmp.execute("query-text", json!({}))?;
            assert_eq!(listed.get("applied"), Some(&json!([])), "{listed}");
            assert_eq!(vcpu(&mut qmp, 1)?.pointer("/hold/soft"), Some(&json!(true)));

            // It is in no read-side critical section: grace periods of the guest's own end.
            let (begun, ticked) = (Instant::now(), ticks(&guest, 1)?);
            guest.sh("guest membarrier")?;
            let waited = begun.elapsed();
            let begun = Instant::now();
            while ticks(&guest, 1)? < ticked + 20 {
                assert!(begun.elapsed() < SOON, "no interrupts");
            }
            // Another task runs on the same vCPU, and the first may move to another one.
            begin(&guest, 1, "cat /proc/uptime", "/tmp/uptime")?;
            done(&guest, "/tmp/uptime")?;
            if round % 2 == 1 {
                guest.sh("taskset -p 8 $(pidof cat) >/dev/null; sleep 0.2")?;
            }
            assert_ne!(guest.sh_status("cat /tmp/version.done")?.0, 0, "it ran on");
            // A change under its feet waits, or is refused; one elsewhere is freed meanwhile.
            let probe = qmp.execute("probe-attach", json!({"site": "vfs_read"}))?;
            qmp.execute("probe-detach", json!({"id": probe.get("id")}))?;
            let cookie = qmp.execute("gp-snapshot", json!({}))?;
            let cookie = cookie.get("cookie").cloned();
            qmp.execute("gp-wait", json!({"cookie": cookie, "deadline": 20_000}))?;

            release(&mut qmp, 1)?;
            qmp.event("VCPU_RELEASED", SOON)?;
            assert_eq!(done(&guest, "/tmp/version")?, version, "round {round}");
            all_freed(&mut qmp)?;
            println!("soft hold: a grace period of the guest took {waited:?} meanwhile");
        }
        // Wherever it is, when it may.
        let reads = all_or(100_000, 20_000);
        begin(
            &guest,
            1,
            &format!("guest reads /proc/version {reads}"),
            "/tmp/reads",
        )?;
        let held = hold(&mut qmp, json!({"vcpu": 1, "soft": true}))?;
        assert_eq!(text(&held, "/state"), "held", "{held}");
        let ticked = ticks(&guest, 1)?;
        // It may be where RCU waits for it, but the clock does not.
        guest.sh("sleep 0.3")?;
        assert!(ticks(&guest, 1)? > ticked, "no interrupts");
        release(&mut qmp, 1)?;
        let (status, said) = guest.sh_within(
            Duration::from_secs(300),
            "while ! [ -e /tmp/reads.done ]; do sleep 0.2; done; cat /tmp/reads",
        )?;
        assert_eq!(
            (status, said.trim()),
            (0, format!("{reads} the same").as_str())
        );
        // One that ends by itself.
        armed(&mut qmp, 1, FUNCTION, true)?;
        release(&mut qmp, 1)?;
        hold(
            &mut qmp,
            json!({"vcpu": 1, "at": FUNCTION, "soft": true, "wait": false, "deadline": "700ms"}),
        )?;
        let event = qmp.event("VCPU_NOT_REACHED", SOON)?;
        assert_eq!(text(&event, "/data/reason"), "released", "{event}");
        let event = qmp.event("VCPU_NOT_REACHED", SOON)?;
        assert_eq!(text(&event, "/data/reason"), "deadline", "{event}");
        all_freed(&mut qmp)?;
        assert_eq!(changed_text(&mut qmp)?, before);
        assert_eq!(guest.complaints()?, "");
        Ok(())
    })
}
