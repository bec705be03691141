//! Single vCPUs are held while the others run: where they are, and exactly at an instruction.
//!
//! The guest's shell is kept on CPU 0, so that nothing that a test says waits for a held vCPU.

mod lifetime;
mod neighbours;
mod soft;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stillpoint_tests::{
    Boot, Failure, Guest, Qmp, QmpError, SOON, TestResult, all_freed, all_or, armed, begin, done,
    hold, kept_apart, on_kvm, refusal, release,
};

/// Reading /proc/version runs it, and nothing else does.
const FUNCTION: &str = "version_proc_show";
/// Its first instruction behind what ftrace and indirect calls need, on 6.12.
const BEHIND: &str = "version_proc_show+9";

/// A guest whose vCPU 1 has nothing to do but what it is told, and a counter on CPU 0 that moves on.
fn start(boot: Boot) -> Result<(Guest, Qmp), Failure> {
    let (guest, qmp) = kept_apart(boot)?;
    guest.sh("(i=0; while :; do i=$((i+1)); echo $i >/tmp/n; done) >/dev/null 2>&1 &")?;
    Ok((guest, qmp))
}

fn vcpu(qmp: &mut Qmp, index: u32) -> Result<Value, Failure> {
    let all = qmp.execute("query-vcpus", json!({}))?;
    let mut all = all.as_array().into_iter().flatten();
    all.find(|vcpu| vcpu.get("cpu-index") == Some(&json!(index)))
        .cloned()
        .ok_or_else(|| Failure::new(format!("no vCPU {index}")))
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or("")
}

/// The counter moves on: the other vCPUs run.
fn others_run(guest: &Guest) -> TestResult {
    let count = || -> Result<String, Failure> { guest.sh("cat /tmp/n") };
    let (before, begun) = (count()?, Instant::now());
    while count()? == before {
        assert!(begun.elapsed() < SOON, "the others stand still");
    }
    Ok(())
}

fn flags(qmp: &mut Qmp, vcpu: u32) -> Result<u64, Failure> {
    let said = qmp.execute(
        "human-monitor-command",
        json!({"command-line": "info registers", "cpu-index": vcpu}),
    )?;
    let digits = said.as_str().and_then(|said| {
        let behind = said.split_once("RFL=")?.1;
        behind.split_whitespace().next()
    });
    digits
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .ok_or_else(|| Failure::new(format!("no flags in {said}")))
}

/// The instructions of the function, as the VMM finds them.
fn boundaries(qmp: &mut Qmp, vcpu: u32) -> Result<Vec<String>, Failure> {
    let (mut found, mut inside) = (vec![(0, FUNCTION.to_owned())], 0);
    for offset in 5..0x60 {
        let site = format!("{FUNCTION}+{offset:#x}");
        let request = json!({"vcpu": vcpu, "at": site, "wait": false});
        match hold(qmp, request) {
            Ok(_) => {
                release(qmp, vcpu)?;
                found.push((offset, site));
            }
            Err(QmpError::Refused { desc, .. }) if desc.starts_with("NotWholeInstructions") => {
                inside += 1;
            }
            // The guest may rewrite it, or has a use for its address.
            Err(QmpError::Refused { desc, .. }) if desc.starts_with("Owned") => {}
            // Behind its end.
            Err(QmpError::Refused { desc, .. }) if desc.starts_with("NoSuchSite") => break,
            Err(error) => return Err(error.into()),
        }
    }
    // Nobody runs the filler behind its last instruction: nops of one byte each.
    while let [.., (before, _), (last, _)] = found.as_slice()
        && before + 1 == *last
    {
        found.pop();
    }
    found.pop();
    assert!(found.len() > 5 && inside > 5, "{found:?}");
    Ok(found.into_iter().map(|(_, site)| site).collect())
}

/// What of the guest's text is not as the boot made it.
fn changed_text(qmp: &mut Qmp) -> Result<Value, Failure> {
    let told = qmp.execute("inspect-text", json!({"deadline": "1m"}))?;
    Ok(json!([told.get("differences"), told.get("owned")]))
}

/// vCPU 1 is held at `site`, and released.
fn one_round(guest: &Guest, qmp: &mut Qmp, site: &str, version: &str) -> TestResult {
    let armed = armed(qmp, 1, site, false)?;
    assert!(text(&armed, "/place").starts_with(FUNCTION), "{armed}");
    // On another vCPU the same instruction holds nobody.
    assert_eq!(guest.sh("cat /proc/version")?, version);
    begin(guest, 1, "cat /proc/version", "/tmp/version")?;
    let event = qmp.event("VCPU_HELD", SOON)?;
    assert_eq!(event.pointer("/data/vcpu"), Some(&json!(1)), "{event}");
    assert_eq!(event.pointer("/data/passed"), Some(&json!(1)), "{event}");

    let seen = vcpu(qmp, 1)?;
    assert_eq!(text(&seen, "/rip"), text(&armed, "/at"), "{seen}");
    assert_eq!(text(&seen, "/hold/state"), "held", "{seen}");
    assert_eq!(text(&seen, "/hold/rip"), text(&armed, "/at"), "{seen}");
    assert_eq!(text(&seen, "/comm"), "cat", "{seen}");
    assert!(text(&seen, "/symbol").starts_with(FUNCTION), "{seen}");
    assert_eq!(flags(qmp, 1)? & 0x100, 0, "a trap flag");
    // The text is as it was, and nothing of ours is in it.
    let listed = qmp.execute("query-text", json!({}))?;
    assert_eq!(listed.get("applied"), Some(&json!([])), "{listed}");
    others_run(guest)?;
    let (status, _) = guest.sh_status("cat /tmp/version.done")?;
    assert_ne!(status, 0, "it ran on: {}", vcpu(qmp, 1)?);

    let end = release(qmp, 1)?;
    assert!(end.get("held-us").is_some(), "{end}");
    let event = qmp.event("VCPU_RELEASED", SOON)?;
    assert_eq!(text(&event, "/data/reason"), "released", "{event}");
    assert_eq!(done(guest, "/tmp/version")?, version);
    // It is not held there again.
    begin(guest, 1, "cat /proc/version", "/tmp/version")?;
    assert_eq!(done(guest, "/tmp/version")?, version);
    assert_eq!(vcpu(qmp, 1)?.get("hold"), Some(&Value::Null));
    Ok(())
}

#[test]
fn held_at_an_instruction_and_released_without_a_trace() -> TestResult {
    on_kvm(|| {
        let (guest, mut qmp) = start(Guest::boot("6.12").cpus(4))?;
        let version = guest.sh("cat /proc/version")?;
        let before = changed_text(&mut qmp)?;
        let sites = boundaries(&mut qmp, 1)?;
        let every = all_or(1, sites.len().div_ceil(3));
        for site in sites.iter().step_by(every) {
            one_round(&guest, &mut qmp, site, &version)
                .map_err(|error| Failure::new(format!("{site}: {error}")))?;
        }
        // The three others come by again and again, and each time what it does is done.
        let reads_each = all_or(1_000, 200);
        let mut passed = 0;
        for site in sites.iter().skip(1).step_by(all_or(3, sites.len())) {
            armed(&mut qmp, 1, site, false)?;
            let reads = format!("guest reads /proc/version {reads_each}");
            for (cpu, into) in [(0, "/tmp/0"), (2, "/tmp/2"), (3, "/tmp/3")] {
                begin(&guest, cpu, &reads, into)?;
            }
            for into in ["/tmp/0", "/tmp/2", "/tmp/3"] {
                assert_eq!(done(&guest, into)?.trim(), format!("{reads_each} the same"));
            }
            begin(&guest, 1, "cat /proc/version", "/tmp/version")?;
            let event = qmp.event("VCPU_HELD", SOON)?;
            // Each looks at the file once more, to have something to compare with.
            let expected = json!(3 * (reads_each + 1));
            assert_eq!(event.pointer("/data/passed"), Some(&expected), "{event}");
            passed += 3 * (reads_each + 1);
            release(&mut qmp, 1)?;
            qmp.event("VCPU_RELEASED", SOON)?;
            assert_eq!(done(&guest, "/tmp/version")?, version);
        }

        // Two at once, at one place, with the loop in which a third waits at another.
        armed(&mut qmp, 2, "uptime_proc_show", true)?;
        begin(&guest, 2, "cat /proc/uptime", "/tmp/uptime")?;
        qmp.event("VCPU_HELD", SOON)?;
        for vcpu in [1, 3] {
            armed(&mut qmp, vcpu, FUNCTION, false)?;
        }
        begin(&guest, 1, "cat /proc/version", "/tmp/version")?;
        qmp.event("VCPU_HELD", SOON)?;
        assert_eq!(guest.sh("cat /proc/version")?, version);
        // Last, and not for long: the guest's scheduler counts on CPU 3.
        begin(&guest, 3, "cat /proc/version", "/tmp/three")?;
        qmp.event("VCPU_HELD", SOON)?;
        release(&mut qmp, 3)?;
        assert_eq!(done(&guest, "/tmp/three")?, version);
        assert_eq!(text(&vcpu(&mut qmp, 1)?, "/hold/state"), "held");
        release(&mut qmp, 1)?;
        release(&mut qmp, 2)?;
        assert_eq!(done(&guest, "/tmp/version")?, version);
        done(&guest, "/tmp/uptime")?;
        all_freed(&mut qmp)?;
        assert_eq!(changed_text(&mut qmp)?, before);
        assert_eq!(guest.complaints()?, "");
        println!(
            "held vCPU: at {} of {} instructions; {passed} of {passed} passes of other vCPUs counted",
            sites.iter().step_by(every).count(),
            sites.len()
        );
        Ok(())
    })
}

#[cfg(feature = "full")]
#[test]
fn a_vcpu_is_held_hard_and_softly_on_6_1() -> TestResult {
    on_kvm(|| {
        let (guest, mut qmp) = start(Guest::boot("6.1").cpus(2).cmdline("preempt=full"))?;
        let version = guest.sh("cat /proc/version")?;
        for site in [FUNCTION.to_owned(), format!("{FUNCTION}+0x5")] {
            one_round(&guest, &mut qmp, &site, &version)?;
        }
        armed(&mut qmp, 1, FUNCTION, true)?;
        begin(&guest, 1, "cat /proc/version", "/tmp/version")?;
        qmp.event("VCPU_HELD", SOON)?;
        guest.sh("guest membarrier")?;
        release(&mut qmp, 1)?;
        assert_eq!(done(&guest, "/tmp/version")?, version);
        all_freed(&mut qmp)?;
        assert_eq!(guest.complaints()?, "");
        Ok(())
    })
}
