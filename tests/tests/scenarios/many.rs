//! Many trampolines at once.

use std::time::Instant;

use stillpoint_tests::{functions, take_sum};

use super::*;

/// A thousand functions, each with a callback of its own and data of its own.
fn thousand_trampolines(kernel: &str) -> TestResult {
    const WANTED: usize = 1000;
    let guest = Guest::boot(kernel).cpus(2).start()?;
    let mut qmp = guest.control()?;
    take_sum(&guest)?;
    let object = replacement("add").display().to_string();
    let mut attached: Vec<u64> = Vec::new();
    let mut refused = 0;
    for name in functions(&mut qmp, WANTED + 300)? {
        let data = attached.len() + 1;
        let request = json!({"site": name, "object": object, "data": data});
        match qmp.execute("probe-attach", request) {
            Ok(reply) => attached.push(reply["id"].as_u64().unwrap_or(0)),
            Err(QmpError::Refused { .. }) => refused += 1,
            Err(error) => return Err(error.into()),
        }
        if attached.len() == WANTED {
            break;
        }
    }
    assert_eq!(attached.len(), WANTED, "{refused} were refused");
    guest.sh("ls -lR /proc/self /sys/kernel >/dev/null; cat /proc/version; ip link; true")?;
    // All at one moment; nothing is added after that.
    let request = json!({"ids": attached, "deadline": "60s"});
    let detached = qmp.execute("probe-detach", request)?;
    let (mut hits, mut expected, mut called) = (0_u64, 0_i32, 0);
    for probe in detached["probes"].as_array().into_iter().flatten() {
        let count = probe["hits"].as_u64().unwrap_or(0);
        let data = probe["data"]
            .as_str()
            .unwrap_or("")
            .trim_start_matches("0x");
        let data = i32::from_str_radix(data, 16)?;
        hits += count;
        called += usize::from(count > 0);
        let count = i32::try_from(count % (1 << 31))?;
        expected = expected.wrapping_add(data.wrapping_mul(count));
    }
    assert!(
        called > 20 && hits > 1000,
        "{called} functions were called {hits} times"
    );
    assert_eq!(
        take_sum(&guest)?,
        i64::from(expected),
        "each call with its own data"
    );
    all_freed(&mut qmp)?;
    assert_eq!(guest.complaints()?, "");
    println!(
        "thousand-trampolines: {WANTED} callbacks, {called} called, {hits} hits, detached in {} stop(s)",
        detached["stop"]["stops"]
    );
    Ok(())
}

#[test]
fn thousand_trampolines_on_6_12() -> TestResult {
    on_kvm(|| thousand_trampolines("6.12"))
}

/// A hundred transitions as one change.
fn coalesced(kernel: &str) -> TestResult {
    const WANTED: usize = 100;
    let guest = Guest::boot(kernel).cpus(2).start()?;
    let mut qmp = guest.control()?;
    guest.sh("(while :; do cat /proc/version; done) >/dev/null 2>&1 & echo $! >/tmp/busy")?;
    let mut sites = Vec::new();
    for name in functions(&mut qmp, WANTED * 2)? {
        if let Ok(reply) = qmp.execute("probe-attach", json!({"site": name})) {
            qmp.execute("probe-detach", json!({"id": reply["id"]}))?;
            sites.push(name);
        }
        if sites.len() == WANTED {
            break;
        }
    }
    assert_eq!(sites.len(), WANTED);
    // One that cannot be: none is.
    let with = |last: &str| {
        let mut all = sites.clone();
        all.push(last.to_owned());
        json!({"sites": all})
    };
    assert!(qmp.execute("probe-attach", with("start_kernel")).is_err());
    assert!(
        qmp.execute("probe-attach", with(&format!("{}+1", sites[0])))
            .is_err()
    );
    let probes = qmp.execute("query-probes", json!({}))?;
    assert_eq!(probes["probes"], json!([]));
    all_freed(&mut qmp)?;
    let attached = qmp.execute("probe-attach", json!({"sites": sites, "deadline": "30s"}))?;
    let ids: Vec<_> = attached["probes"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|p| p["id"].clone())
        .collect();
    assert_eq!(ids.len(), WANTED);
    guest.sh("cat /proc/version; ls /sys >/dev/null")?;
    let mut wrong = ids.clone();
    wrong.push(json!(999_999));
    assert!(qmp.execute("probe-detach", json!({"ids": wrong})).is_err());
    let begun = Instant::now();
    let detached = qmp.execute("probe-detach", json!({"ids": ids, "deadline": "30s"}))?;
    all_freed(&mut qmp)?;
    let took = begun.elapsed();
    let stops = detached["stop"]["stops"].as_u64().unwrap_or(u64::MAX);
    assert!(stops <= 3, "{}", detached["stop"]);
    guest.sh("kill $(cat /tmp/busy)")?;
    assert_eq!(guest.complaints()?, "");
    println!("coalesced: {WANTED} transitions, {stops} stop(s), {took:?} until all were freed");
    Ok(())
}

#[test]
fn coalesced_on_6_12() -> TestResult {
    on_kvm(|| coalesced("6.12"))
}

#[test]
fn coalesced_on_6_1() -> TestResult {
    on_kvm(|| coalesced("6.1"))
}
