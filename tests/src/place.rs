//! Where a test runs: here, or in the lab.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::lab::{self, Command, Exit, Inputs, Output};
use crate::{Failure, TestResult, console, needs, tally};

/// The switch: unset, `native` or `lab`.
const SWITCH: &str = "STILLPOINT_TEST_ON";

/// Seconds that a test may take in the lab, unless `STILLPOINT_LAB_LIMIT` says otherwise.
const LIMIT: u64 = 900;

/// The kernels that are there for every test.
const KERNELS: [&str; 2] = ["6.1", "6.12"];

/// Where guests run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// On this host.
    Native,
    /// In the lab.
    Lab,
}

/// Where guests run on this host, unless the switch forces a place.
pub(crate) fn here() -> Result<Place, Failure> {
    let switch = std::env::var(SWITCH).ok();
    place(switch.as_deref(), kvm_runs_stock_guests())
}

/// Runs a test that needs guests: natively where KVM can run stock ones, else in the lab.
///
/// # Errors
///
/// Those of the test, after the guests' consoles and logs have been printed; or that there is no
/// place for it.
pub fn on_kvm(test: impl FnOnce() -> TestResult) -> TestResult {
    on_kvm_with(&[], test)
}

/// The same with kernels, as `guest-images/fetch` names them, beside 6.1 and 6.12.
///
/// # Errors
///
/// As [`on_kvm`].
pub fn on_kvm_with(kernels: &[&str], test: impl FnOnce() -> TestResult) -> TestResult {
    run(kernels, false, test)
}

/// The same with a module for a guest's kernel ([`crate::module`]).
///
/// # Errors
///
/// As [`on_kvm`], and that the module cannot be built.
pub fn on_kvm_with_module(
    kernel: &str,
    name: &str,
    test: impl FnOnce() -> TestResult,
) -> TestResult {
    if !in_lab() {
        needs::build_module(kernel, name)?;
    }
    on_kvm(test)
}

/// The same with a binary that rules of safety can be left out of ([`crate::Boot::without_rules`]).
///
/// # Errors
///
/// As [`on_kvm`].
pub fn on_kvm_breaking(test: impl FnOnce() -> TestResult) -> TestResult {
    run(&[], true, test)
}

fn run(kernels: &[&str], breaking: bool, test: impl FnOnce() -> TestResult) -> TestResult {
    let prepare = || {
        needs::prepare(&wanted(kernels))?;
        let breakable = breaking.then(needs::breakable);
        breakable.transpose()
    };
    match here()? {
        Place::Native => {
            if !in_lab() {
                prepare()?;
                tally::note(&format!("native {}", own_name()?));
            }
            console::printed_on_failure(test)
        }
        Place::Lab => {
            let breakable = prepare()?;
            in_the_lab(&own_name()?, breakable.as_deref())
        }
    }
}

/// Runs `in_guests` where guests can run and then, when that went well, `here` on this host: what
/// takes the time of a whole machine, or writes much, has no place in the lab. Both get one folder,
/// which is removed at the end.
///
/// # Errors
///
/// As [`on_kvm`], and those of `here`.
pub fn on_kvm_then_here(
    kernels: &[&str],
    in_guests: impl FnOnce(&Path) -> TestResult,
    here: impl FnOnce(&Path) -> TestResult,
) -> TestResult {
    // In the lab only what is in this folder stays.
    if let Some(share) = std::env::var_os(lab::INSIDE) {
        let folder = Path::new(&share).join(own_name()?);
        return on_kvm_with(kernels, || in_guests(&folder));
    }
    let folder = lab::Home::open()?.share().join(own_name()?);
    // One that was killed left it there.
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder)?;
    let result = on_kvm_with(kernels, || in_guests(&folder))
        .and_then(|()| console::printed_on_failure(|| here(&folder)));
    std::fs::remove_dir_all(&folder)?;
    result
}

/// Runs a test that needs our binary and images but no guest: always here.
///
/// # Errors
///
/// Those of the test.
pub fn on_host(test: impl FnOnce() -> TestResult) -> TestResult {
    needs::prepare(&KERNELS)?;
    tally::note(&format!("host {}", own_name()?));
    console::printed_on_failure(test)
}

fn wanted<'a>(kernels: &[&'a str]) -> Vec<&'a str> {
    KERNELS.iter().chain(kernels).copied().collect()
}

fn place(switch: Option<&str>, native_works: bool) -> Result<Place, Failure> {
    match switch {
        None => Ok(if native_works {
            Place::Native
        } else {
            Place::Lab
        }),
        Some("native") => Ok(Place::Native),
        Some("lab") => Ok(Place::Lab),
        Some(other) => Err(Failure::new(format!(
            "{SWITCH} is {other:?}; it can be unset, 'native' or 'lab'"
        ))),
    }
}

/// Without vmx or svm there may still be a /dev/kvm, but of a kind that stock kernels do not run on.
fn kvm_runs_stock_guests() -> bool {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|flags| flags.split(' ').any(|flag| flag == "vmx" || flag == "svm"))
        && File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok()
}

fn in_lab() -> bool {
    std::env::var_os(lab::INSIDE).is_some()
}

/// The test that this thread runs: libtest names its threads so.
fn own_name() -> Result<String, Failure> {
    let thread = std::thread::current();
    match thread.name() {
        Some("main") | None => Err(Failure::new("not in a test's own thread")),
        Some(name) => Ok(name.to_owned()),
    }
}

/// Runs the test `name` of this binary in the lab.
fn in_the_lab(name: &str, breakable: Option<&Path>) -> TestResult {
    let exe = std::env::current_exe()?;
    let mut env: BTreeMap<_, _> = lab::client::environment();
    let stillpoint = needs::stillpoint()?;
    env.insert("STILLPOINT_BIN".into(), stillpoint.display().to_string());
    if let Some(path) = breakable {
        let path = path.display().to_string();
        env.insert("STILLPOINT_BREAKABLE_BIN".into(), path);
    }
    let command = Command {
        argv: vec![
            exe.display().to_string(),
            "--exact".into(),
            name.into(),
            "--nocapture".into(),
        ],
        env,
        cwd: Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf(),
    };
    let limit = std::env::var("STILLPOINT_LAB_LIMIT")
        .ok()
        .and_then(|seconds| seconds.parse().ok())
        .unwrap_or(LIMIT);
    let mut said = Said::default();
    let begun = Instant::now();
    let limit = Duration::from_secs(limit);
    let outcome = lab::run(&command, limit, Inputs::default(), &mut said)
        .inspect_err(|_| tally::note(&format!("lost {name}")))?;
    tally::note(&format!("lab {name} {}", begun.elapsed().as_secs()));
    for _ in 0..outcome.lost {
        tally::note(&format!("lost {name}"));
    }
    if outcome.timed_out {
        return Err(Failure::new(format!("not done after {limit:?} in the lab")));
    }
    if outcome.exit != Exit::Status(0) {
        return Err(Failure::new(format!(
            "failed in the lab ({:?}); what it said is above",
            outcome.exit
        )));
    }
    // A name that matches no test is a success for libtest.
    if !said.text.contains("1 passed") {
        return Err(Failure::new(format!("the lab ran no test named {name}")));
    }
    Ok(())
}

/// Prints output the way libtest captures it, and keeps what went to stdout.
#[derive(Default)]
struct Said {
    text: String,
}

impl Output for Said {
    fn stdout(&mut self, bytes: &[u8]) {
        let text = String::from_utf8_lossy(bytes);
        print!("{text}");
        let _ = std::io::stdout().flush();
        self.text.push_str(&text);
    }

    fn stderr(&mut self, bytes: &[u8]) {
        eprint!("{}", String::from_utf8_lossy(bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_switch_forces_a_place() {
        assert_eq!(place(None, true).unwrap(), Place::Native);
        assert_eq!(place(None, false).unwrap(), Place::Lab);
        assert_eq!(place(Some("native"), false).unwrap(), Place::Native);
        assert_eq!(place(Some("lab"), true).unwrap(), Place::Lab);
        assert!(place(Some("Lab"), true).is_err());
        assert!(place(Some(""), true).is_err());
    }

    #[test]
    fn a_test_knows_its_name() {
        assert_eq!(own_name().unwrap(), "place::tests::a_test_knows_its_name");
    }
}
