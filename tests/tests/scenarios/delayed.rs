//! A vCPU that the host delays between loading a callback's data and calling the callback, while the
//! tracepoint goes from one callback to none and to another one.

use stillpoint_tests::{
    Instruction, SOON, armed, begin, done, instructions, kept_apart, release, symbol,
};

use super::*;

/// Calls the callbacks of [`TRACEPOINT`].
const CALLER: &str = "bprm_execve";
const TRACEPOINT: &str = "sched_process_exec";
const TRACING: &str = "/sys/kernel/tracing";

/// The instruction before a call, of the function `caller`.
fn before_call(caller: &str, all: &[Instruction], call: Option<usize>) -> Result<String, Failure> {
    let before = call.and_then(|at| all.get(at.checked_sub(1)?));
    let before = before.ok_or_else(|| Failure::new(format!("{caller} does not make that call")))?;
    Ok(format!("{caller}+{:#x}", before.offset))
}

/// Between the load of the datum and the call, where there is one callback.
fn window(qmp: &mut Qmp, kernel: &str) -> Result<String, Failure> {
    let (target, _) = symbol(qmp, &format!("__SCT__tp_func_{TRACEPOINT}"))?;
    let all = instructions(qmp, kernel, CALLER)?;
    let call = all.iter().position(|one| one.calls == Some(target));
    before_call(CALLER, &all, call)
}

/// The same where there are several: between the loads of function and datum, and the call.
fn window_of_several(qmp: &mut Qmp, kernel: &str) -> Result<String, Failure> {
    let caller = format!("__traceiter_{TRACEPOINT}");
    let all = instructions(qmp, kernel, &caller)?;
    let call = all.iter().rposition(|one| one.calls.is_some());
    before_call(&caller, &all, call)
}

/// What the guest's kernel waits for when a callback is the first again, by the calls that do it.
fn wait_of_the_guest(qmp: &mut Qmp, kernel: &str) -> Result<(String, String), Failure> {
    const ADDS: &str = "tracepoint_add_func";
    let (target, _) = symbol(qmp, "cond_synchronize_rcu")?;
    let all = instructions(qmp, kernel, ADDS)?;
    let call = all.iter().find(|one| one.calls == Some(target));
    let call = call.ok_or_else(|| Failure::new(format!("{ADDS} does not wait")))?;
    let bytes = call
        .bytes
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok((format!("{ADDS}+{:#x}", call.offset), bytes))
}

struct Round {
    /// The second callback was added while the vCPU was held.
    added: bool,
    /// What came to the first user of the tracepoint, who had taken his callback away.
    strayed: String,
}

/// 1→0→1 while vCPU 1 is in the window. Both callbacks are the tracer's own, for two of its instances:
/// their datum says into which of them an event goes.
fn transition(guest: &Guest, qmp: &mut Qmp, window: &str) -> Result<Round, Failure> {
    let enable = |instance: &str, on: u8| {
        format!("echo {on} >{TRACING}/instances/{instance}/events/sched/{TRACEPOINT}/enable")
    };
    guest.sh(&format!(
        "echo >{TRACING}/instances/first/trace; {}",
        enable("first", 1)
    ))?;
    armed(qmp, 1, window, true)?;
    begin(guest, 1, "cat /proc/version", "/tmp/version")?;
    qmp.event("VCPU_HELD", SOON)?;
    guest.sh(&enable("first", 0))?;
    guest.sh(&format!(
        "rm -f /tmp/added; ({}; : >/tmp/added) & sleep 1",
        enable("second", 1)
    ))?;
    let added = guest.sh_status("test -e /tmp/added")?.0 == 0;
    release(qmp, 1)?;
    qmp.event("VCPU_RELEASED", SOON)?;
    done(guest, "/tmp/version")?;
    guest.sh("until [ -e /tmp/added ]; do sleep 0.1; done")?;
    guest.sh(&enable("second", 0))?;
    // On CPU 1 nothing but that runs. The trace cannot be cleared meanwhile: that waits for readers too.
    let strayed = guest.sh(&format!(
        "grep '\\[001\\].* {TRACEPOINT}: ' {TRACING}/instances/first/trace || true"
    ))?;
    Ok(Round { added, strayed })
}

fn delayed_vcpu(kernel: &str, rounds: u32) -> TestResult {
    let (guest, mut qmp) = kept_apart(Guest::boot(kernel).cpus(2))?;
    let window = window(&mut qmp, kernel)?;
    guest.sh(&format!(
        "mkdir {TRACING}/instances/first {TRACING}/instances/second"
    ))?;
    // The guest's own wait counts the delayed vCPU.
    for _ in 0..rounds {
        let round = transition(&guest, &mut qmp, &window)?;
        assert!(!round.added, "added while a vCPU was between load and call");
        assert_eq!(round.strayed, "");
    }
    // Without the wait, an old datum reaches the new callback.
    let (site, bytes) = wait_of_the_guest(&mut qmp, kernel)?;
    let nop = json!({"site": site, "expect": bytes, "write": "0f1f440000"});
    let change = qmp.execute("text-patch", nop)?;
    let broken = transition(&guest, &mut qmp, &window)?;
    assert!(
        broken.added && !broken.strayed.is_empty(),
        "{}",
        broken.strayed
    );
    qmp.execute("text-revert", json!({"id": change["id"]}))?;
    // And with it again, live, it does not.
    let fixed = transition(&guest, &mut qmp, &window)?;
    assert!(
        !fixed.added && fixed.strayed.is_empty(),
        "{}",
        fixed.strayed
    );
    assert_eq!(guest.complaints()?, "");
    println!(
        "delayed-vcpu: {rounds} rounds right; with the guest's wait patched out an old datum reached the \
         new callback: {}; fixed again live",
        broken.strayed.trim()
    );
    Ok(())
}

/// The same for a callback of ours on the tracepoint, the first of two: it is freed when the vCPU that
/// is about to call it has gone on.
fn ours(kernel: &str, without: Option<&str>) -> TestResult {
    let boot = mortal(Guest::boot(kernel).cpus(2), without);
    let (guest, mut qmp) = kept_apart(boot)?;
    let window = window_of_several(&mut qmp, kernel)?;
    let with = |priority: i32| json!({"name": TRACEPOINT, "priority": priority});
    let attached = qmp.execute("tracepoint-attach", with(20))?;
    let other = qmp.execute("tracepoint-attach", with(10))?;
    armed(&mut qmp, 1, &window, true)?;
    begin(&guest, 1, "cat /proc/version", "/tmp/version")?;
    qmp.event("VCPU_HELD", SOON)?;
    let detach = json!({"id": attached["id"], "deadline": "2s"});
    let detached = qmp.execute("tracepoint-detach", detach);
    match (without, detached) {
        (None, Err(QmpError::Refused { desc, .. })) => {
            assert!(desc.starts_with("Underway"), "{desc}")
        }
        (Some(_), Ok(_)) => {}
        (_, other) => return Err(Failure::new(format!("{other:?}"))),
    }
    release(&mut qmp, 1)?;
    match without {
        Some(rule) => {
            dies(&guest)?;
            println!("delayed-vcpu: without the rules {rule:?} the guest died");
        }
        None => {
            done(&guest, "/tmp/version")?;
            let second = json!({"id": other["id"], "deadline": "20s"});
            qmp.execute("tracepoint-detach", second)?;
            all_freed(&mut qmp)?;
            assert_eq!(guest.complaints()?, "");
            println!("delayed-vcpu: a callback of ours was kept until the vCPU had gone on");
        }
    }
    Ok(())
}

#[test]
fn delayed_vcpu_on_6_12() -> TestResult {
    on_kvm_breaking(|| {
        delayed_vcpu("6.12", stillpoint_tests::all_or(20, 3))?;
        ours("6.12", None)?;
        // Each of the two would do: its registers have the address.
        ours("6.12", Some("readers,grace-period"))
    })
}

#[test]
fn delayed_vcpu_on_6_1() -> TestResult {
    on_kvm(|| delayed_vcpu("6.1", stillpoint_tests::all_or(20, 1)))
}
