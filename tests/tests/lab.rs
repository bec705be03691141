//! The lab passes through what a command says and how it ends, and survives its own machine.
//!
//! These run in the lab also where KVM is real: it is the lab that is tested.

use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use stillpoint_tests::lab::{self, Command, Exit, Home, Inputs, Outcome, Output};
use stillpoint_tests::{TestResult, tally};

#[derive(Default)]
struct Said {
    stdout: Vec<u8>,
    stderr: String,
}

impl Output for Said {
    fn stdout(&mut self, bytes: &[u8]) {
        self.stdout.extend_from_slice(bytes);
    }

    fn stderr(&mut self, bytes: &[u8]) {
        self.stderr.push_str(&String::from_utf8_lossy(bytes));
    }
}

const LIMIT: Duration = Duration::from_secs(300);

fn run(argv: &[&str], limit: Duration, inputs: Inputs) -> Result<(Outcome, Said), lab::LabError> {
    if let Some(name) = std::thread::current().name() {
        tally::note(&format!("lab {name}"));
    }
    let command = Command {
        argv: argv.iter().map(|arg| (*arg).to_owned()).collect(),
        env: lab::client::environment(),
        cwd: PathBuf::from("/tmp"),
    };
    let mut said = Said::default();
    let outcome = lab::run(&command, limit, inputs, &mut said)?;
    Ok((outcome, said))
}

fn sh(script: &str) -> Result<(Outcome, Said), lab::LabError> {
    run(&["sh", "-c", script], LIMIT, Inputs::default())
}

#[test]
fn output_and_status_come_through_and_dev_kvm_is_real() -> TestResult {
    let (outcome, said) = sh(
        "echo out; echo err >&2; pwd; test -c /dev/kvm && grep -o -m1 svm /proc/cpuinfo; exit 7",
    )?;
    assert_eq!(outcome.exit, Exit::Status(7));
    assert_eq!(String::from_utf8_lossy(&said.stdout), "out\n/tmp\nsvm\n");
    assert_eq!(said.stderr, "err\n");

    let (outcome, _) = sh("kill -SEGV $$")?;
    assert_eq!(outcome.exit, Exit::Signal(11));

    let (outcome, said) = run(&["no-such-command"], LIMIT, Inputs::default())?;
    assert_eq!(outcome.exit, Exit::Status(127), "{}", said.stderr);
    Ok(())
}

#[test]
fn input_and_signals_reach_the_command() -> TestResult {
    let (sender, stdin) = mpsc::channel();
    let pieces: Vec<Vec<u8>> = (0..64_u8).map(|n| vec![n; 30_000]).collect();
    for piece in &pieces {
        sender.send(piece.clone())?;
    }
    drop(sender);
    let inputs = Inputs {
        stdin: Some(stdin),
        signals: None,
    };
    let (outcome, said) = run(&["cat"], LIMIT, inputs)?;
    assert_eq!(outcome.exit, Exit::Status(0));
    assert!(
        said.stdout == pieces.concat(),
        "input was changed on the way"
    );

    let (sender, signals) = mpsc::channel();
    sender.send(15)?;
    let inputs = Inputs {
        stdin: None,
        signals: Some(signals),
    };
    let (outcome, _) = run(&["sleep", "1000"], LIMIT, inputs)?;
    assert_eq!(outcome.exit, Exit::Signal(15));
    Ok(())
}

#[test]
fn a_command_ends_at_its_limit_and_leaves_nothing() -> TestResult {
    let begun = std::time::Instant::now();
    let script = "trap '' TERM; sleep 1000 & while :; do sleep 1; done";
    let (outcome, said) = run(
        &["sh", "-c", script],
        Duration::from_secs(2),
        Inputs::default(),
    )?;
    assert!(outcome.timed_out, "{}", said.stderr);
    assert_eq!(outcome.lost, 0, "{}", said.stderr);
    assert!(begun.elapsed() < LIMIT);

    // What it leaves in files goes too.
    let (_, _) = sh("sleep 1000 & echo left >/tmp/left-behind")?;
    let (_, said) = sh("ls /tmp/left-behind; ps ax | grep -c '[s]leep 1000'")?;
    assert_eq!(String::from_utf8_lossy(&said.stdout), "0\n");
    Ok(())
}

#[test]
fn a_lost_machine_is_replaced_and_the_command_runs_once_more() -> TestResult {
    let share = Home::open()?.share();
    let once = share.join(format!("crashed-once-{}", std::process::id()));
    let script = format!(
        "if [ -e {once} ]; then echo alive; else : >{once}; echo c >/proc/sysrq-trigger; sleep 100; fi",
        once = once.display()
    );
    let result = sh(&script);
    std::fs::remove_file(&once)?;
    let (outcome, said) = result?;
    assert_eq!(outcome.exit, Exit::Status(0), "{}", said.stderr);
    assert_eq!(outcome.lost, 1);
    assert!(said.stderr.contains("was lost"), "{}", said.stderr);
    assert_eq!(String::from_utf8_lossy(&said.stdout), "alive\n");
    Ok(())
}

#[test]
fn a_machine_that_crashes_every_time_is_an_error() -> TestResult {
    let error = sh("echo c >/proc/sysrq-trigger; sleep 100").err();
    assert!(
        matches!(error, Some(lab::LabError::Lost { .. })),
        "{error:?}"
    );
    Ok(())
}

#[test]
fn a_failing_command_is_never_repeated() -> TestResult {
    let share = Home::open()?.share();
    let runs = share.join(format!("runs-{}", std::process::id()));
    let (outcome, _) = sh(&format!("echo run >>{}; exit 1", runs.display()))?;
    let text = std::fs::read_to_string(&runs)?;
    std::fs::remove_file(&runs)?;
    assert_eq!(outcome.exit, Exit::Status(1));
    assert_eq!(text, "run\n");
    Ok(())
}
