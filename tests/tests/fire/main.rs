//! Everything at once, for as long as it takes, and a guest that means harm.
//!
//! `STILLPOINT_TEST_SEED` repeats what was chosen, though not who came when; each run prints its seed.

mod client;
mod figures;
mod load;
mod sites;
mod text;
mod vandal;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stillpoint_tests::{
    Failure, Guest, Qmp, Random, TestResult, all_freed, all_or, module, on_kvm, on_kvm_with_module,
    seed,
};

use client::{Client, Duty};
use figures::Figures;
use sites::Sites;
use text::Text;
use vandal::Vandal;

/// vCPUs of the guest.
const CPUS: u32 = 4;
const KERNEL: &str = "6.12";

/// Several clients at once, each on a thread of its own, until `length` is over.
fn fire(
    guest: &Guest,
    sites: &Arc<Sites>,
    seed: u64,
    length: Duration,
) -> Result<Figures, Failure> {
    let failed = Arc::new(AtomicBool::new(false));
    let until = Instant::now() + length;
    let duties = [Duty::Probes, Duty::Probes, Duty::Everything];
    let mut threads = Vec::new();
    for (number, duty) in (1..).zip(duties) {
        let random = Random::new(seed).fork(number);
        let client = Client::new(&guest.socket(), random, Arc::clone(sites), duty)?;
        let failed = Arc::clone(&failed);
        threads.push(std::thread::spawn(move || {
            let run = client.run(until, &failed);
            failed.fetch_or(run.is_err(), Ordering::Relaxed);
            run.map_err(|error| error.to_string())
        }));
    }
    let mut all = Figures::default();
    let mut errors = Vec::new();
    for thread in threads {
        match thread.join() {
            Ok(Ok(figures)) => all.add(&figures),
            Ok(Err(error)) => errors.push(error),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    match errors.is_empty() {
        true => Ok(all),
        false => Err(Failure::new(errors.join("\n"))),
    }
}

/// A number of the guest's that callbacks count in; it is 0 from now on.
fn counted(guest: &Guest, name: &str) -> Result<u64, Failure> {
    let file = format!("/proc/sys/kernel/{name}");
    let said = guest.sh(&format!("cat {file}; echo 0 >{file}"))?;
    let parsed = said.trim().parse::<i32>();
    let number = parsed.map_err(|_| Failure::new(format!("{name}: {said}")))?;
    Ok(u64::from(u32::from_le_bytes(number.to_le_bytes())))
}

/// Nothing of ours is in the guest, and no room in the arena is taken.
fn accounted_for(qmp: &mut Qmp) -> TestResult {
    all_freed(qmp)?;
    for (command, name) in [
        ("query-probes", "probes"),
        ("query-tracepoints", "tracepoints"),
        ("query-steps", "steps"),
        ("query-holdouts", "holdouts"),
        ("query-text", "applied"),
        ("query-text", "held"),
        ("query-text", "retired"),
    ] {
        let told = qmp.execute(command, json!({}))?;
        assert_eq!(told[name], json!([]), "{command}");
    }
    let told = qmp.execute("query-text", json!({}))?;
    for name in ["code-used", "code-slots", "data-used"] {
        assert_eq!(told["arena"][name], json!(0), "{}", told["arena"]);
    }
    Ok(())
}

/// The same, and what the guest's kernel has said when it went wrong.
fn with_log(guest: &Guest, test: impl FnOnce() -> TestResult) -> TestResult {
    let result = catch_unwind(AssertUnwindSafe(test));
    if !matches!(result, Ok(Ok(()))) {
        match guest.sh("dmesg | tail -n 80") {
            Ok(log) => eprintln!("----- the guest's kernel -----\n{log}\n-----"),
            Err(error) => eprintln!("the guest does not answer: {error}"),
        }
    }
    result.unwrap_or_else(|panic| resume_unwind(panic))
}

fn survives(guest: &Guest, seed: u64, length: Duration) -> TestResult {
    let mut qmp = guest.control()?;
    let mut random = Random::new(seed);
    let others = all_or(50_000, 5_000);
    let sites = Arc::new(Sites::of(guest, &mut qmp, &mut random, others)?);
    for name in ["panic", "perf_event_mlock_kb"] {
        counted(guest, name)?;
    }
    let before = Text::copy(guest, &mut qmp)?;

    load::begin(guest, 2 * length.as_secs() + 600, CPUS)?;
    let begun = Instant::now();
    let figures = fire(guest, &sites, seed, length)?;
    let took = begun.elapsed();
    let rounds = load::end(guest)?;
    assert_eq!(guest.complaints()?, "");
    accounted_for(&mut qmp)?;
    text::explained(&mut qmp)?;
    let after = Text::copy(guest, &mut qmp)?;
    let differences = before.differences(&after, &mut qmp)?;
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    assert_eq!(before.checksum(), after.checksum());
    assert_eq!(guest.complaints()?, "");
    let status = qmp.execute("query-status", json!({}))?;
    assert_eq!(status["running"], Value::Bool(true), "{status}");
    assert_eq!(counted(guest, "panic")?, 0, "with another's data");
    // Whoever was on his way to a callback when it was taken out has called it since.
    let right = counted(guest, "perf_event_mlock_kb")?;
    let most = figures.called + 2 * u64::from(CPUS) * figures.checked;
    assert!(
        (figures.called..=most).contains(&right) && right > 0,
        "{right} right calls; {figures}"
    );
    assert!(figures.hits > 0 && figures.transitions > 50, "{figures}");
    println!(
        "under fire: {} transitions in {:.0} s, {:.1} a second; {figures}; the guest made {rounds}; text \
         {:#x} as before",
        figures.transitions,
        took.as_secs_f64(),
        f64::from(u32::try_from(figures.transitions)?) / took.as_secs_f64(),
        after.checksum()
    );
    Ok(())
}

#[test]
fn under_fire() -> TestResult {
    on_kvm(|| {
        let seed = seed()?;
        println!("under fire: STILLPOINT_TEST_SEED={seed}");
        let folder = tempfile::tempdir()?;
        let boot = Guest::boot(KERNEL).cpus(CPUS).memory("512M");
        let guest = load::equipped(boot, folder.path())?.start()?;
        let length = Duration::from_secs(all_or(600, 30));
        with_log(&guest, || survives(&guest, seed, length))
    })
}

#[test]
fn a_malicious_guest_costs_itself_only() -> TestResult {
    on_kvm_with_module(KERNEL, "vandal", || {
        let guest = Guest::boot(KERNEL)
            .cpus(2)
            .file("/modules/vandal.ko", &module(KERNEL, "vandal"))
            .args(&["--no-reboot"])
            .start()?;
        let mut vandal = Vandal {
            qmp: guest.control()?,
            other: guest.control()?,
            guest: &guest,
            asked: 0,
        };
        vandal.qmp.execute("events-enable", json!({}))?;
        with_log(&guest, || {
            // What the VMM has to know of the kernel it knows then.
            vandal.rewrites_sites()?;
            let before = guest.resident()?;
            vandal.writes_to_our_code()?;
            vandal.falsifies_data()?;
            vandal.remaps_our_memory()?;
            vandal.remaps_its_text()?;
            vandal.falsifies_data_all_the_time()?;
            let grown = guest.resident()?.saturating_sub(before);
            println!("malicious guest: the VMM has grown by {grown} KiB");
            assert!(grown < 96 << 10, "grown by {grown} KiB");
            vandal.unmaps_its_text()
        })
    })
}
