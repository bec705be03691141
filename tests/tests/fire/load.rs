//! What the guest does meanwhile.

use std::path::Path;

use stillpoint_tests::{Boot, Failure, Guest, TestResult};

/// The guest traces itself, until the file `/tmp/fire` is gone.
const TRACES_ITSELF: &str = include_str!("traces_itself.sh");
const SCRIPT: &str = "traces_itself.sh";

/// A guest that can do it.
pub(crate) fn equipped(boot: Boot, folder: &Path) -> Result<Boot, Failure> {
    let script = folder.join(SCRIPT);
    std::fs::write(&script, TRACES_ITSELF)?;
    Ok(boot.file(SCRIPT, &script))
}

/// Begins it.
pub(crate) fn begin(guest: &Guest, seconds: u64, workers: u32) -> TestResult {
    guest.sh(": >/tmp/fire")?;
    guest.sh(&format!(
        "storm {seconds} {workers} >/tmp/storm 2>&1 & echo $! >/tmp/storm.pid"
    ))?;
    guest.sh(&format!(
        "(sh /{SCRIPT} 2>/tmp/traced; : >/tmp/traced.done) >/dev/null 2>&1 &"
    ))?;
    Ok(())
}

/// Ends it, and tells what was done.
pub(crate) fn end(guest: &Guest) -> Result<String, Failure> {
    guest.sh("rm /tmp/fire; kill $(cat /tmp/storm.pid)")?;
    guest.sh("until [ -e /tmp/traced.done ] && grep -q rounds /tmp/storm; do sleep 0.1; done")?;
    let traced = guest.sh("sort /tmp/traced | uniq -c")?;
    let said = guest.sh("rm /tmp/traced.done; cat /tmp/storm")?;
    if !said.contains(" 0 wrong") {
        return Err(Failure::new(format!("the guest went wrong: {said}")));
    }
    if !traced.trim().is_empty() {
        println!(
            "under fire: the guest's own tracing was refused: {}",
            traced.trim()
        );
    }
    Ok(said.trim().trim_start_matches("storm: ").to_owned())
}
