//! What tests of probes and callbacks ask a guest and its VMM again and again.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{Failure, Guest, Qmp, TestResult};

/// Attaches a probe, with `more` members of the request. Tells its number.
///
/// # Errors
///
/// When it is refused.
pub fn attach_probe(qmp: &mut Qmp, site: &str, more: Value) -> Result<u64, Failure> {
    let mut request = json!({ "site": site });
    if let (Some(request), Value::Object(more)) = (request.as_object_mut(), more) {
        request.extend(more);
    }
    let reply = qmp.execute("probe-attach", request)?;
    let id = reply["id"].as_u64();
    id.ok_or_else(|| Failure::new(format!("no number in {reply}")))
}

/// Detaches probes in one stop. Tells their last counts.
///
/// # Errors
///
/// When it is refused.
pub fn detach_probes(qmp: &mut Qmp, ids: &[u64]) -> Result<Vec<u64>, Failure> {
    let reply = qmp.execute("probe-detach", json!({ "ids": ids }))?;
    let all = reply["probes"].as_array().into_iter().flatten();
    Ok(all.filter_map(|probe| probe["hits"].as_u64()).collect())
}

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

/// Functions of the guest, as many as are wanted. Most of them can be probed.
///
/// # Errors
///
/// When there are not so many.
pub fn functions(qmp: &mut Qmp, wanted: usize) -> Result<Vec<String>, Failure> {
    let mut found = Vec::new();
    for pattern in [
        "__x64_sys_*",
        "vfs_*",
        "ext4_*",
        "tcp_*",
        "ip_*",
        "proc_*",
        "sock_*",
        "pci_*",
    ] {
        let reply = qmp.execute("query-symbols", json!({"pattern": pattern, "limit": 2000}))?;
        let mut count = HashMap::new();
        let names = reply["symbols"].as_array().into_iter().flatten();
        let text = names.filter(|symbol| symbol["type"] == "T" || symbol["type"] == "t");
        for name in text.filter_map(|symbol| symbol["name"].as_str()) {
            *count.entry(name.to_owned()).or_insert(0) += 1;
        }
        let mut once: Vec<_> = count.into_iter().filter(|(_, n)| *n == 1).collect();
        once.sort();
        let left = wanted.saturating_sub(found.len());
        let plain = once.into_iter().map(|(name, _)| name);
        found.extend(plain.filter(|name| !name.contains('.')).take(left));
    }
    match found.len() >= wanted {
        true => Ok(found),
        false => Err(Failure::new(format!("{} functions only", found.len()))),
    }
}
