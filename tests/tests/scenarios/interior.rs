//! A probe over several instructions in the middle of a function: nobody may be between them.

use stillpoint_tests::{armed, begin, done, instructions, kept_apart, release};

use super::*;

const FUNCTION: &str = "version_proc_show";
/// What the jump of a probe takes.
const JUMP: u64 = 5;

/// A place for a probe whose jump is longer than its first instruction, and the offset of the second.
fn two_in_one(qmp: &mut Qmp, kernel: &str) -> Result<(String, String), Failure> {
    let all = instructions(qmp, kernel, FUNCTION)?;
    for pair in all.windows(2) {
        let [first, second] = pair else { continue };
        if first.offset < JUMP || second.offset - first.offset >= JUMP {
            continue;
        }
        let site = format!("{FUNCTION}+{:#x}", first.offset);
        if let Ok(id) = attach(qmp, json!({"site": site})) {
            qmp.execute("probe-detach", json!({"id": id}))?;
            return Ok((site, format!("{FUNCTION}+{:#x}", second.offset)));
        }
    }
    Err(Failure::new(format!("no place for a probe in {FUNCTION}")))
}

/// A task that is between two instructions, and preempted there.
fn between(kernel: &str, without: Option<&str>) -> Result<(Guest, Qmp, String), Failure> {
    let boot = mortal(Guest::boot(kernel).cpus(2).cmdline("preempt=full"), without);
    let (guest, mut qmp) = kept_apart(boot)?;
    let (site, interior) = two_in_one(&mut qmp, kernel)?;
    all_freed(&mut qmp)?;
    armed(&mut qmp, 1, &interior, true)?;
    begin(&guest, 1, "cat /proc/version", "/tmp/version")?;
    qmp.event("VCPU_HELD", stillpoint_tests::SOON)?;
    // Somebody else has its CPU from now on.
    guest.sh("taskset -c 1 guest spin 600 & echo $! >/tmp/other; \
         renice -n -20 -p $!; renice -n 19 -p $(pidof cat); sleep 0.3")?;
    Ok((guest, qmp, site))
}

fn held_up(kernel: &str, rounds: u32) -> TestResult {
    let (guest, mut qmp, site) = between(kernel, None)?;
    let pid = guest.sh("pidof cat")?;
    for _ in 0..rounds {
        let request = json!({"site": site, "deadline": "100ms"});
        match qmp.execute("probe-attach", request) {
            Err(QmpError::Refused { desc, .. }) => {
                assert!(
                    desc.contains(&format!("cat (pid {})", pid.trim())),
                    "{desc}"
                );
            }
            other => return Err(Failure::new(format!("not refused: {other:?}"))),
        }
    }
    let version = guest.sh("kill $(cat /tmp/other); cat /proc/sys/kernel/ostype")?;
    release(&mut qmp, 1)?;
    let said = done(&guest, "/tmp/version")?;
    assert!(said.contains(version.trim()), "{said:?} {version:?}");
    let id = attach(&mut qmp, json!({"site": site}))?;
    guest.sh("for i in 1 2 3; do cat /proc/version; done")?;
    assert_eq!(hits(&mut qmp, id)?, 3);
    qmp.execute("probe-detach", json!({"id": id}))?;
    all_freed(&mut qmp)?;
    assert_eq!(guest.complaints()?, "");
    println!("optimised-probe: {rounds} times a preempted task between the instructions was named");
    Ok(())
}

/// It goes on in the middle of the jump, whose bytes there depend on where the kernel is. Tells whether
/// they did harm.
fn goes_wrong(kernel: &str) -> Result<bool, Failure> {
    let (guest, mut qmp, site) = between(kernel, Some("interior"))?;
    attach(&mut qmp, json!({"site": site}))?;
    guest.start_sh("kill $(cat /tmp/other)")?;
    release(&mut qmp, 1)?;
    if guest.wait(Duration::from_secs(5)).is_ok() {
        return dies(&guest).map(|()| true);
    }
    let compared = guest.sh_status("cmp /proc/version /tmp/version")?;
    Ok(compared.0 != 0 || !guest.complaints()?.is_empty())
}

fn written_over(kernel: &str) -> TestResult {
    for boots in 1..=10 {
        if goes_wrong(kernel)? {
            println!(
                "optimised-probe: without the rule \"interior\" wrong bytes ran ({boots} boots)"
            );
            return Ok(());
        }
    }
    Err(Failure::new("no harm came of a jump under a task's feet"))
}

#[test]
fn optimised_probe_on_6_12() -> TestResult {
    on_kvm_breaking(|| {
        held_up("6.12", 20)?;
        written_over("6.12")
    })
}
