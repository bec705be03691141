//! A vCPU that is held, and what is done on it while the guest's shell is elsewhere.

use std::time::Instant;

use serde_json::{Value, json};

use crate::{Boot, Failure, Guest, Qmp, QmpError, SOON, TestResult};

/// A guest whose shell stays on CPU 0. CPU 1, which is to be held, has nothing to do but what it is
/// told: no kernel thread or interrupt of the console waits on it.
///
/// # Errors
///
/// When it does not start.
pub fn kept_apart(boot: Boot) -> Result<(Guest, Qmp), Failure> {
    let guest = boot.cmdline("isolcpus=1 irqaffinity=0").start()?;
    guest.sh("taskset -p 1 $PPID >/dev/null")?;
    let mut qmp = guest.control()?;
    qmp.execute("events-enable", json!({}))?;
    Ok((guest, qmp))
}

/// `vcpu-hold`, for longer than a busy host takes for what happens meanwhile, when it is not said.
///
/// # Errors
///
/// When it is refused.
pub fn hold(qmp: &mut Qmp, mut arguments: Value) -> Result<Value, QmpError> {
    if let Some(members) = arguments.as_object_mut() {
        members.entry("deadline").or_insert_with(|| json!("5m"));
    }
    qmp.execute("vcpu-hold", arguments)
}

/// `vcpu-release`.
///
/// # Errors
///
/// When it is refused.
pub fn release(qmp: &mut Qmp, vcpu: u32) -> Result<Value, QmpError> {
    qmp.execute("vcpu-release", json!({"vcpu": vcpu}))
}

/// Has `vcpu` held when it next comes to `site`.
///
/// # Errors
///
/// When it is refused.
pub fn armed(qmp: &mut Qmp, vcpu: u32, site: &str, soft: bool) -> Result<Value, Failure> {
    let request = json!({"vcpu": vcpu, "at": site, "soft": soft, "wait": false});
    let armed = hold(qmp, request)?;
    if armed["state"] != json!("armed") {
        return Err(Failure::new(format!("not armed: {armed}")));
    }
    Ok(armed)
}

/// Has vCPU `on` do something in the background; its output goes to `into`.
///
/// # Errors
///
/// When the guest does not begin it.
pub fn begin(guest: &Guest, on: u32, command: &str, into: &str) -> TestResult {
    guest.sh(&format!("rm -f {into} {into}.done"))?;
    guest.sh(&format!(
        "(taskset -c {on} {command} >{into} 2>&1; : >{into}.done) >/dev/null 2>&1 &"
    ))?;
    Ok(())
}

/// What somebody did in the background is done by now, or soon; returns its output.
///
/// # Errors
///
/// When it is not.
pub fn done(guest: &Guest, what: &str) -> Result<String, Failure> {
    let begun = Instant::now();
    loop {
        let (status, said) = guest.sh_status(&format!("cat {what}.done && cat {what}"))?;
        if status == 0 {
            return Ok(said);
        }
        if begun.elapsed() > SOON {
            return Err(Failure::new(format!("{what}: not done")));
        }
    }
}
