//! `stop`: stop and cont over the control socket, and what the guest sees of it.

use std::io::Write;
use std::path::Path;
use std::process::{ChildStdin, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use super::errand::{self, Clock};
use super::inside::report;
use super::peer::{Files, Guest, Peer};
use super::stats::{cell, median, percentile};
use super::timed::Running;
use super::{Finding, Work};
use crate::console::Text;
use crate::{Failure, Qmp, SOON, TestResult};

const PEERS: [Peer; 2] = [Peer::Ours, Peer::Microvm];

/// Stops and continues in each turn of a VMM; a round is one turn of each.
const CYCLES: u32 = 20;

/// A command that does nothing.
const FLOOR: &str = "query-version";

/// Time between them.
const PAUSE: Duration = Duration::from_millis(100);

/// Windows in which the guest looks for its longest stall, for each VMM: half of them undisturbed.
const WINDOWS: u32 = 8;

pub(super) fn run(rounds: u32) -> TestResult {
    let files = errand::files()?;
    let mut found = Vec::new();
    for cpus in [1, 2] {
        eprintln!("bench: {cpus} vCPU");
        let work = Work::Stop {
            peers: PEERS.to_vec(),
            cpus,
            // As many cycles as can be told apart from noise.
            rounds: rounds.div_ceil(2),
            cycles: CYCLES,
        };
        let findings = errand::send(&files, work, Clock::Real)?;
        for busy in [false, true] {
            let load = if busy { "busy" } else { "idle" };
            println!("stop, {cpus} vCPU, {load}: median / p90 / max, ms");
            found.push((format!("{cpus} vCPU {load}"), table(&findings, busy)));
        }
        if cpus == 1 {
            stalls(&findings);
        }
    }
    println!("{}", last_line(&found)?);
    Ok(())
}

/// Medians of stop and cont together: ours, and QEMU's.
type Pair = Option<(f64, f64)>;

fn table(findings: &[Finding], busy: bool) -> Pair {
    println!(
        "  {:<24} {:>4} {:>22} {:>22} {:>22} {:>22}",
        "", "n", "stop+cont", "stop", "cont", "floor (query-version)"
    );
    let mut medians = Vec::new();
    for peer in PEERS {
        let of_peer: Vec<_> = findings
            .iter()
            .filter_map(|finding| match *finding {
                Finding::Stop {
                    peer: p,
                    busy: b,
                    stop,
                    cont,
                    both,
                    floor,
                } if p == peer && b == busy => Some([both, stop, cont, floor]),
                _ => None,
            })
            .collect();
        let column = |index: usize| -> Vec<f64> {
            let cells = of_peer.iter().filter_map(|row| row.get(index).copied());
            cells.collect()
        };
        let cells = [0, 1, 2, 3].map(|index| {
            let column = column(index);
            [
                median(&column),
                percentile(&column, 90),
                percentile(&column, 100),
            ]
            .map(|value| cell(value, 2))
            .join(" / ")
        });
        let [both, stop, cont, floor] = cells;
        println!(
            "  {:<24} {:>4} {both:>22} {stop:>22} {cont:>22} {floor:>22}",
            peer.name(),
            of_peer.len()
        );
        medians.push(median(&column(0)));
    }
    match medians.as_slice() {
        [Some(ours), Some(theirs)] => {
            println!("  ratio of medians {:.2}", theirs / ours);
            Some((*ours, *theirs))
        }
        _ => None,
    }
}

fn stalls(findings: &[Finding]) {
    println!("stop, 1 vCPU, longest stall the guest saw by rdtsc: median / max of windows, ms");
    for peer in PEERS {
        let cells = [false, true].map(|wanted| {
            let stalls: Vec<f64> = findings
                .iter()
                .filter_map(|finding| match *finding {
                    Finding::Stall {
                        peer: p,
                        disturbed,
                        us,
                    } if p == peer && disturbed == wanted => Some(us / 1e3),
                    _ => None,
                })
                .collect();
            [median(&stalls), percentile(&stalls, 100)]
                .map(|value| cell(value, 2))
                .join(" / ")
        });
        let [quiet, disturbed] = cells;
        println!(
            "  {:<24} undisturbed {quiet:>16}    with stop and cont {disturbed:>16}",
            peer.name()
        );
    }
}

/// The smallest ratio of all, so that no case is worse than what it says.
fn last_line(found: &[(String, Pair)]) -> Result<String, Failure> {
    let mut worst: Option<(f64, String)> = None;
    for (case, pair) in found {
        let Some((ours, theirs)) = pair else {
            return Err(Failure::new(format!("{case} could not be measured")));
        };
        let ratio = theirs / ours;
        if worst.as_ref().is_none_or(|(least, _)| ratio < *least) {
            let text = format!(
                "stop: ratio {ratio:.2} (ours {ours:.2} ms, theirs {theirs:.2} ms: stop+cont, \
                 {case}, the least of {} cases)",
                found.len()
            );
            worst = Some((ratio, text));
        }
    }
    worst
        .map(|(_, text)| text)
        .ok_or_else(|| Failure::new("nothing was measured"))
}

/// A guest with a shell on its serial port and an open control socket.
pub(super) struct Subject {
    peer: Peer,
    pub(super) qmp: Qmp,
    console: Text,
    shell: ChildStdin,
    _vmm: Running,
}

impl Subject {
    /// Boots it; its kernel is told `options` too.
    pub(super) fn start(
        peer: Peer,
        files: &Files,
        dir: &Path,
        options: &str,
        cpus: u32,
    ) -> Result<Self, Failure> {
        let socket = dir.join(format!("{peer:?}.sock"));
        let _ = std::fs::remove_file(&socket);
        let guest = Guest {
            initrd: &files.shell,
            cpus,
            mode: "script",
            options,
            control: Some(&socket),
        };
        let mut vmm = peer
            .command(files, guest)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .map(Running)?;
        let console = vmm.0.stdout.take().map(Text::of).unwrap_or_default();
        let shell = vmm.0.stdin.take().ok_or_else(|| Failure::new("no stdin"))?;
        console.wait_for(0, "stillpoint guest: ready\n", SOON)?;
        Ok(Self {
            peer,
            qmp: Qmp::connect(&socket)?,
            console,
            shell,
            _vmm: vmm,
        })
    }

    fn sh(&mut self, line: &str) -> TestResult {
        Ok(writeln!(self.shell, "{line}")?)
    }

    /// Has a command of the guest's shell done, and returns what it says.
    pub(super) fn ask(&mut self, line: &str) -> Result<String, Failure> {
        let from = self.console.len();
        // The line itself comes back as well.
        self.sh(&format!("({line}); printf '\\n<%s>\\n' done"))?;
        Ok(self.console.wait_for(from, "\n<done>", SOON)?)
    }

    /// Milliseconds that a command of the guest's shell takes, seen from outside.
    pub(super) fn timed_sh(&mut self, line: &str) -> Result<f64, Failure> {
        let begun = Instant::now();
        self.ask(line)?;
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    }

    /// Milliseconds until the reply to a command.
    fn timed(&mut self, command: &str) -> Result<f64, Failure> {
        let begun = Instant::now();
        self.qmp.execute(command, json!({}))?;
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    }

    fn cycles(&mut self, busy: bool, cycles: u32) -> TestResult {
        for _ in 0..cycles {
            std::thread::sleep(PAUSE);
            let floor = self.timed(FLOOR)?;
            std::thread::sleep(PAUSE / 10);
            let begun = Instant::now();
            let stop = self.timed("stop")?;
            let cont = self.timed("cont")?;
            let both = begun.elapsed().as_secs_f64() * 1e3;
            report(&Finding::Stop {
                peer: self.peer,
                busy,
                stop,
                cont,
                both,
                floor,
            })?;
        }
        Ok(())
    }

    /// One window in which the guest looks at its time stamp counter all the time.
    fn stall(&mut self, disturbed: bool) -> TestResult {
        let from = self.console.len();
        self.sh("guest stall 1.5")?;
        // The program has to start first.
        std::thread::sleep(Duration::from_millis(300));
        if disturbed {
            for _ in 0..4 {
                self.qmp.execute("stop", json!({}))?;
                self.qmp.execute("cont", json!({}))?;
                std::thread::sleep(Duration::from_millis(250));
            }
        }
        let before = self.console.wait_for(from, " us at", SOON)?;
        let us = before
            .rsplit_once("cycles, ")
            .and_then(|(_, us)| us.trim().parse().ok())
            .ok_or_else(|| Failure::new(format!("the guest said {before:?}")))?;
        self.console.wait_for(from + before.len(), "MHz\n", SOON)?;
        report(&Finding::Stall {
            peer: self.peer,
            disturbed,
            us,
        })
    }
}

/// Measures a guest of each VMM. They take turns: while one is measured the others are stopped.
pub(super) fn measure(
    files: &Files,
    dir: &Path,
    peers: &[Peer],
    cpus: u32,
    rounds: u32,
    cycles: u32,
) -> TestResult {
    let mut subjects = Vec::new();
    for peer in peers {
        let mut subject = Subject::start(*peer, files, dir, "", cpus)?;
        subject.qmp.execute("stop", json!({}))?;
        subjects.push(subject);
    }
    let mut in_turn = |work: &mut dyn FnMut(&mut Subject) -> TestResult| -> TestResult {
        for subject in &mut subjects {
            subject.qmp.execute("cont", json!({}))?;
            // It has missed some of its timers.
            std::thread::sleep(Duration::from_secs(1));
            work(subject)?;
            subject.qmp.execute("stop", json!({}))?;
        }
        Ok(())
    };
    for _ in 0..rounds {
        in_turn(&mut |subject| subject.cycles(false, cycles))?;
    }
    if cpus == 1 {
        for window in 0..WINDOWS {
            in_turn(&mut |subject| subject.stall(window % 2 == 1))?;
        }
    }
    in_turn(&mut |subject| (0..cpus).try_for_each(|_| subject.sh("guest spin 3600 &")))?;
    for _ in 0..rounds {
        in_turn(&mut |subject| subject.cycles(true, cycles))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_tells_the_worst_case() {
        let found = [
            ("a".to_owned(), Some((1.0, 5.0))),
            ("b".to_owned(), Some((2.0, 4.0))),
        ];
        let line = last_line(&found).unwrap();
        assert!(line.starts_with("stop: ratio 2.00 (ours 2.00 ms, theirs 4.00 ms: "));
        assert!(line.contains("b, the least of 2 cases"));
        assert!(last_line(&[("c".to_owned(), None)]).is_err());
        assert!(last_line(&[]).is_err());
    }
}
