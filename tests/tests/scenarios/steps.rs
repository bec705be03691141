//! Ordered steps: what one changes is in force for everybody before the next begins.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Instant;

use stillpoint_tests::{
    Instruction, SOON, begin, done, hold, instructions, kept_apart, refusal, release,
};

use super::*;

/// It prints the kernel's release and its version, the address of each of which it takes by an LEA.
const FUNCTION: &str = "version_proc_show";

/// `lea disp32(%reg),%reg`, whose displacement ends it.
fn takes_address(one: &&Instruction) -> bool {
    matches!(one.bytes.as_slice(), [0x48 | 0x4c, 0x8d, mode, _, _, _, _] if mode >> 6 == 2)
}

/// The two instructions, as steps that make each leave out the first character; and the site of the
/// second.
fn two_steps(qmp: &mut Qmp, kernel: &str) -> Result<(Value, String), Failure> {
    let all = instructions(qmp, kernel, FUNCTION)?;
    let mut steps = Vec::new();
    let mut last = String::new();
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!("{byte:02x}")).collect() };
    for (one, name) in all.iter().filter(takes_address).zip(["release", "version"]) {
        let mut changed = one.bytes.clone();
        if let Some(low) = changed.get_mut(3) {
            *low += 1;
        }
        last = format!("{FUNCTION}+{:#x}", one.offset);
        let text = json!([{"site": last, "expect": hex(&one.bytes), "write": hex(&changed)}]);
        steps.push(json!({"name": name, "text": text}));
    }
    match steps.len() {
        2 => Ok((Value::Array(steps), last)),
        _ => Err(Failure::new(format!(
            "{FUNCTION} takes other addresses: {all:?}"
        ))),
    }
}

/// A task on vCPU 1 has run the first and not the second.
fn between(guest: &Guest, qmp: &mut Qmp, second: &str) -> TestResult {
    hold(qmp, json!({"vcpu": 1, "at": second, "wait": false}))?;
    begin(guest, 1, "cat /proc/version", "/tmp/version")?;
    qmp.event("VCPU_HELD", SOON)?;
    Ok(())
}

/// Asks for the steps on a connection of its own.
fn apply(guest: &Guest, steps: &Value) -> JoinHandle<Result<Value, QmpError>> {
    let (socket, steps) = (guest.socket(), steps.clone());
    std::thread::spawn(move || {
        let request = json!({"steps": steps, "deadline": "2m"});
        Qmp::connect(&socket)?.execute("steps-apply", request)
    })
}

fn joined(apply: JoinHandle<Result<Value, QmpError>>) -> Result<Value, QmpError> {
    match apply.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// The same as a person does it.
fn by_command(guest: &Guest, steps: &Value) -> TestResult {
    let file = guest.dir().join("two.json");
    std::fs::copy(replacement("version"), guest.dir().join("new.o"))?;
    let elsewhere = json!([{"site": "cmdline_proc_show", "object": "new.o"}]);
    let mut all = steps.as_array().cloned().unwrap_or_default();
    all.push(json!({"name": "elsewhere", "redirect": elsewhere}));
    std::fs::write(&file, json!({ "steps": all }).to_string())?;
    guest
        .stillpoint(&["steps", "apply", &file.display().to_string()])?
        .ok()?;
    let listed = guest.stillpoint(&["steps", "list"])?.ok()?;
    assert!(
        listed.contains("release") && listed.contains("passed"),
        "{listed}"
    );
    let listed: Value =
        serde_json::from_str(&guest.stillpoint(&["steps", "list", "--json"])?.ok()?)?;
    let said = guest.sh("cat /proc/cmdline")?;
    assert!(said.contains("Stillpoint"), "{said}");
    for step in ["0", "2"] {
        let change = listed.pointer(&format!("/steps/0/steps/{step}/changes/0"));
        let id = change.map(ToString::to_string).unwrap_or_default();
        let refused = guest.stillpoint(&["text", "revert", &id])?;
        assert!(refused.stderr.contains("steps-revert"), "{refused:?}");
    }
    let id = listed
        .pointer("/steps/0/id")
        .and_then(Value::as_u64)
        .unwrap_or(0);
    guest
        .stillpoint(&["steps", "revert", &id.to_string()])?
        .ok()?;
    let said = guest.sh("cat /proc/cmdline")?;
    assert!(said.contains("console"), "{said}");
    let missing = guest.stillpoint(&["steps", "apply", "/nowhere"])?;
    assert_eq!(missing.status, 1, "{missing:?}");
    Ok(())
}

/// Waits until `query-steps` says so.
fn until(qmp: &mut Qmp, so: impl Fn(&Value) -> bool) -> TestResult {
    let begun = Instant::now();
    loop {
        let listed = qmp.execute("query-steps", json!({}))?;
        if so(&listed) {
            return Ok(());
        }
        assert!(begun.elapsed() < SOON, "{listed}");
    }
}

/// Their client goes away while a vCPU stands between them: they are taken back all the same, the
/// first of them when the vCPU has left.
fn abandoned(
    guest: &Guest,
    qmp: &mut Qmp,
    kernel: &str,
    steps: &Value,
    second: &str,
) -> TestResult {
    const OTHER: &str = "cmdline_proc_show";
    // The first of five bytes is the tracer's: a call in the files of some kernels, no more in any guest.
    let entry = instructions(qmp, kernel, OTHER)?
        .into_iter()
        .find(|one| one.bytes.len() == 5)
        .ok_or_else(|| Failure::new(format!("{OTHER} has no place for the tracer")))?;
    let site = format!("{OTHER}+{:#x}", entry.offset);
    let text = json!([{"site": site, "expect": "0f1f440000", "write": "6690666690"}]);
    let mut all = vec![json!({"name": "other", "text": text})];
    all.extend(steps.as_array().into_iter().flatten().cloned());
    between(guest, qmp, second)?;
    let mut client = UnixStream::connect(guest.socket())?;
    client.write_all(br#"{"execute":"qmp_capabilities"}"#)?;
    let arguments = json!({"steps": all, "deadline": "2m"});
    let request = json!({"execute": "steps-apply", "arguments": arguments});
    client.write_all(request.to_string().as_bytes())?;
    let state = |listed: &Value, of: &str| {
        let state = listed.pointer(&format!("/steps/0/steps/{of}/state"));
        state.and_then(Value::as_str).map(str::to_owned)
    };
    until(qmp, |listed| {
        state(listed, "1").as_deref() == Some("applied")
    })?;
    drop(client);
    until(qmp, |listed| {
        state(listed, "1").as_deref() == Some("taken-back")
    })?;
    release(qmp, 1)?;
    until(qmp, |listed| listed["steps"] == json!([]))?;
    done(guest, "/tmp/version")?;
    Ok(())
}

fn two_step(kernel: &str) -> TestResult {
    let (guest, mut qmp) = kept_apart(Guest::boot(kernel).cpus(2))?;
    let (steps, second) = two_steps(&mut qmp, kernel)?;
    let read = || guest.sh("cat /proc/version");
    let before = read()?;
    between(&guest, &mut qmp, &second)?;
    let pid = guest.sh("pidof cat")?;
    // It stands between them: the second step has to wait, and then none is made.
    let request = json!({"steps": steps, "deadline": "500ms"});
    let desc = refusal(qmp.execute("steps-apply", request))?;
    assert!(
        desc.starts_with("Deadline") && desc.contains("no step is in force"),
        "{desc}"
    );
    assert_eq!(read()?, before);
    // Cancelled in between.
    let asked = apply(&guest, &steps);
    let begun = Instant::now();
    let plan = loop {
        let listed = qmp.execute("query-steps", json!({}))?;
        let holdouts = listed.pointer("/steps/0/steps/0/holdouts");
        if holdouts
            .and_then(Value::as_array)
            .is_some_and(|all| !all.is_empty())
        {
            break listed;
        }
        assert!(begun.elapsed() < SOON, "{listed}");
    };
    let said = plan.to_string();
    assert!(
        said.contains("vCPU 1") || said.contains(&format!("pid {}", pid.trim())),
        "{plan}"
    );
    let half = read()?;
    assert!(half != before && half.contains(" #1 "), "{half}");
    qmp.execute("steps-cancel", json!({"id": plan.pointer("/steps/0/id")}))?;
    let desc = refusal(joined(asked))?;
    assert!(
        desc.contains("cancelled") && desc.contains("no step is in force"),
        "{desc}"
    );
    assert_eq!(read()?, before);
    assert_eq!(qmp.execute("query-steps", json!({}))?["steps"], json!([]));
    // Released, it goes on in what it began with, and then both are made.
    let asked = apply(&guest, &steps);
    release(&mut qmp, 1)?;
    let made = joined(asked)?;
    assert_eq!(done(&guest, "/tmp/version")?, before, "{made}");
    let after = read()?;
    assert!(
        after != before && after != half && !after.contains('#'),
        "{after}"
    );
    qmp.execute("steps-revert", json!({"id": made["id"]}))?;
    assert_eq!(read()?, before);
    by_command(&guest, &steps)?;
    assert_eq!(read()?, before);
    abandoned(&guest, &mut qmp, kernel, &steps, &second)?;
    assert_eq!(read()?, before);
    for (command, arguments, word) in [
        ("steps-apply", json!({"steps": []}), "InvalidArgument"),
        (
            "steps-apply",
            json!({"steps": [{"name": "", "text": []}]}),
            "InvalidArgument",
        ),
        (
            "steps-apply",
            json!({"steps": [{"text": []}]}),
            "MissingArgument",
        ),
        ("steps-revert", json!({"id": 1_000}), "NotFound"),
        ("steps-cancel", json!({"id": 1_000}), "NotFound"),
    ] {
        let desc = refusal(qmp.execute(command, arguments.clone()))?;
        assert!(desc.starts_with(word), "{arguments}: {desc}");
    }
    assert_eq!(guest.complaints()?, "");
    println!(
        "two-step: waited for a vCPU between, cancelled, made and taken back: {}",
        made["stop"]
    );
    Ok(())
}

/// Without the grace period one call runs the first as it was and the second as it will be.
fn mixed(kernel: &str) -> TestResult {
    let (guest, mut qmp) = kept_apart(Guest::boot(kernel).cpus(2).without_rules("steps"))?;
    let (steps, second) = two_steps(&mut qmp, kernel)?;
    let before = guest.sh("cat /proc/version")?;
    between(&guest, &mut qmp, &second)?;
    qmp.execute("steps-apply", json!({ "steps": steps }))?;
    let after = guest.sh("cat /proc/version")?;
    release(&mut qmp, 1)?;
    let seen = done(&guest, "/tmp/version")?;
    assert!(seen != before && seen != after, "{seen}");
    println!(
        "two-step: without the rule \"steps\" a call ran half of the one and half of the other"
    );
    Ok(())
}

#[test]
fn two_step_on_6_12() -> TestResult {
    on_kvm_breaking(|| {
        two_step("6.12")?;
        mixed("6.12")
    })
}

#[test]
fn two_step_on_6_1() -> TestResult {
    on_kvm(|| two_step("6.1"))
}
