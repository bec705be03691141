//! What tests of probes and callbacks ask a guest and its VMM again and again.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::{Failure, Guest, Qmp, TestResult};

/// Waits until nothing of ours is in the guest any more, retired code neither.
///
/// # Errors
///
/// When something is still there long after.
pub fn all_freed(qmp: &mut Qmp) -> TestResult {
    let begun = Instant::now();
    loop {
        let reply = qmp.execute("query-trampolines", json!({}))?;
        if reply["trampolines"] == json!([]) {
            return Ok(());
        }
        if begun.elapsed() > crate::SOON {
            return Err(Failure::new(format!("not freed: {reply}")));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// What callbacks (guest-images/replacements/add.c) have added up in the guest since this was asked
/// for last, as a number of 32 bits with a sign.
///
/// # Errors
///
/// When the guest does not say.
pub fn take_sum(guest: &Guest) -> Result<i64, Failure> {
    let sum = guest.sh("cat /proc/sys/kernel/panic; echo 0 >/proc/sys/kernel/panic")?;
    let parsed = sum.trim().parse();
    parsed.map_err(|_| Failure::new(format!("no number: {sum}")))
}
