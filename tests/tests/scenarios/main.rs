//! What trampolines are known to go wrong with, each on a stock kernel.
//!
//! Most have another side: with the rule left out that the scenario is about, the guest dies.

mod delayed;
mod interior;
mod many;
mod running;
mod steps;
mod waiting;

use std::time::Duration;

use serde_json::{Value, json};
use stillpoint_tests::{
    Boot, Failure, Guest, Qmp, QmpError, TestResult, all_freed, breakable, on_host, on_kvm,
    on_kvm_breaking, replacement, stillpoint,
};

fn attach(qmp: &mut Qmp, request: Value) -> Result<u64, Failure> {
    let reply = qmp.execute("probe-attach", request)?;
    let id = reply["id"].as_u64();
    id.ok_or_else(|| Failure::new(format!("no number in {reply}")))
}

fn object(name: &str) -> String {
    replacement(name).display().to_string()
}

/// How often a probe was hit.
fn hits(qmp: &mut Qmp, id: u64) -> Result<u64, Failure> {
    let reply = qmp.execute("query-probes", json!({}))?;
    let mut all = reply["probes"].as_array().into_iter().flatten();
    let found = all.find(|one| one["id"] == json!(id));
    let hits = found.and_then(|one| one["hits"].as_u64());
    hits.ok_or_else(|| Failure::new(format!("no {id} in {reply}")))
}

/// A guest whose VMM ends when its kernel goes wrong, with a rule left out or with all.
fn mortal(boot: Boot, without: Option<&str>) -> Boot {
    let boot = boot.cmdline("oops=panic").args(&["--no-reboot"]);
    match without {
        Some(rules) => boot.without_rules(rules),
        None => boot,
    }
}

/// The guest's kernel dies of what was done to it.
fn dies(guest: &Guest) -> TestResult {
    match guest.exit_status()? {
        4 | 5 => Ok(()),
        status => Err(Failure::new(format!("it ended with {status}"))),
    }
}

#[test]
fn no_rule_can_be_left_out_of_the_shipped_binary() -> TestResult {
    on_host(|| {
        let switch = b"STILLPOINT_WITHOUT_RULES";
        let has = |path: std::path::PathBuf| -> Result<bool, Failure> {
            let bytes = std::fs::read(path)?;
            Ok(bytes.windows(switch.len()).any(|here| here == switch))
        };
        assert!(has(breakable()?)? && !has(stillpoint()?)?);
        Ok(())
    })
}
