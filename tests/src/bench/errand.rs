//! Sends a plan to where guests can run, and collects what is found there.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{Files, Finding, KERNEL, Plan, Work};
use crate::lab::{self, Exit, Inputs, Output};
use crate::place::{self, Place};
use crate::{Failure, cpio, needs};

/// Which clock a plan is carried out under.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Clock {
    /// That of the machine where guests run.
    Real,
    /// That of a new level 1 machine in which an instruction takes a nanosecond. In the lab only.
    Icount,
}

/// Real time that a plan may take.
const LIMIT: Duration = Duration::from_secs(2400);

/// Real time that a plan may take under icount. Guests are known to hang there now and then.
const ICOUNT_LIMIT: Duration = Duration::from_secs(400);

/// New machines that a measurement gets under icount before it is given up.
pub(super) const ICOUNT_TRIES: u32 = 3;

/// Whether guests run in the lab, on this host.
pub(super) fn in_lab() -> Result<bool, Failure> {
    Ok(place::here()? == Place::Lab)
}

/// Makes or finds what the plans need.
pub(super) fn files() -> Result<Files, Failure> {
    needs::prepare(&[KERNEL])?;
    let kernel = needs::kernel(KERNEL);
    Ok(Files {
        stillpoint: needs::stillpoint()?,
        vmlinux: kernel.join("vmlinux"),
        vmlinuz: kernel.join("vmlinuz"),
        first_line: first_line(&kernel)?,
        shell: needs::initramfs(KERNEL),
        synchronize: needs::replacement("synchronize"),
        bare: needs::replacement("bare"),
        seldom: needs::replacement("seldom"),
    })
}

/// Builds the initramfs whose init says one line.
fn first_line(kernel: &Path) -> Result<std::path::PathBuf, Failure> {
    let dir = tempfile::tempdir_in(kernel)?;
    let init = dir.path().join("init");
    let source = needs::checkout().join("guest-images/first-line.c");
    succeed(
        Command::new("gcc")
            .args(["-static", "-O2", "-s", "-o"])
            .arg(&init)
            .arg(&source),
    )?;
    let plain = dir.path().join("first-line.cpio");
    std::fs::write(&plain, cpio::of_files(&vec![("init".into(), init)])?)?;
    succeed(Command::new("gzip").arg("-9n").arg(&plain))?;
    let image = kernel.join("first-line.cpio.gz");
    std::fs::rename(plain.with_extension("cpio.gz"), &image)?;
    Ok(image)
}

fn succeed(command: &mut Command) -> Result<(), Failure> {
    let status = command.stdin(Stdio::null()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Failure::new(format!("{command:?}: {status}"))),
        Err(error) => Err(Failure::new(format!("{command:?}: {error}"))),
    }
}

/// Has `work` carried out. What was found before something went wrong counts.
pub(super) fn send(files: &Files, work: Work, clock: Clock) -> Result<Vec<Finding>, Failure> {
    let plan = serde_json::to_string(&Plan {
        files: files.clone(),
        work,
    })?;
    let program = std::env::current_exe()?;
    let argv = vec![
        program.display().to_string(),
        "carry-out".to_owned(),
        plan.clone(),
    ];
    if !in_lab()? {
        let output = Command::new(&program)
            .args(["carry-out", &plan])
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()?;
        let mut findings = Findings::default();
        findings.stdout(&output.stdout);
        return Ok(findings.all);
    }
    let command = lab::Command {
        argv,
        env: lab::client::environment(),
        cwd: "/".into(),
    };
    let mut findings = Findings::default();
    let outcome = match clock {
        Clock::Real => lab::run(&command, LIMIT, Inputs::default(), &mut findings),
        Clock::Icount => lab::run_fresh(&command, ICOUNT_LIMIT, &lab::ICOUNT, &mut findings),
    };
    match outcome {
        Ok(outcome) if outcome.exit == Exit::Status(0) => {}
        Ok(outcome) => eprintln!("bench: it ended early: {:?}", outcome.exit),
        Err(error) => eprintln!("bench: it ended early: {}", Failure::from(error)),
    }
    Ok(findings.all)
}

/// Takes lines of JSON.
#[derive(Default)]
struct Findings {
    line: Vec<u8>,
    all: Vec<Finding>,
}

impl Output for Findings {
    fn stdout(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte != b'\n' {
                self.line.push(*byte);
                continue;
            }
            match serde_json::from_slice(&std::mem::take(&mut self.line)) {
                Ok(Finding::Begin) => self.all.clear(),
                Ok(Finding::Failed { peer, why }) => eprintln!("bench: {}: {why}", peer.name()),
                Ok(finding) => {
                    if let Finding::Boot {
                        peer, ms, beside, ..
                    } = finding
                    {
                        eprintln!("bench: {}: {ms:.1} ms, {beside} KiB", peer.name());
                    }
                    self.all.push(finding);
                }
                Err(error) => eprintln!("bench: not a finding: {error}"),
            }
        }
    }

    fn stderr(&mut self, bytes: &[u8]) {
        eprint!("{}", String::from_utf8_lossy(bytes));
    }
}
