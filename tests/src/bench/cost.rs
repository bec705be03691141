//! What is attached to a function while a module calls it in a loop, in the guest.

use std::path::Path;

use serde_json::{Value, json};

use super::Finding;
use super::inside::report;
use super::peer::{Files, Peer};
use super::probes::ELSEWHERE;
use super::stop::Subject;
use crate::trampolines::functions;
use crate::{Failure, Qmp, QmpError, TestResult};

/// What is called: guest-images/modules/probe_cost.c.
const FUNCTION: &str = "jiffies64_to_msecs";
/// Where its body may begin, behind the tracer's nop.
const BODY: [u64; 2] = [9, 5];
/// What the module calls a kprobe that the kernel makes a jump.
const JUMP: &str = "kprobe";
/// Where the module is asked.
const MEASURE: &str = "/sys/module/probe_cost/parameters/measure";

/// What is measured.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) attached: Attached,
    /// Instructions that it may add.
    pub(super) most: Option<u32>,
}

/// What is attached meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Attached {
    /// By the guest's kernel, which the module asks for it by this name.
    Theirs(&'static str),
    /// So many probes of ours.
    Ours {
        entry: bool,
        probe: Probe,
        many: usize,
    },
}

/// A probe of ours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Probe {
    Count,
    /// Calls code that returns at once.
    Callback {
        registers: bool,
    },
    /// Calls code that might come to a probe itself, and returns after two instructions.
    MayNest,
}

const fn theirs(name: &'static str, how: &'static str) -> Row {
    Row {
        name,
        attached: Attached::Theirs(how),
        most: None,
    }
}

const fn entry(name: &'static str, probe: Probe, many: usize, most: Option<u32>) -> Row {
    Row {
        name,
        attached: Attached::Ours {
            entry: true,
            probe,
            many,
        },
        most,
    }
}

const fn body(name: &'static str, probe: Probe, many: usize, most: Option<u32>) -> Row {
    Row {
        name,
        attached: Attached::Ours {
            entry: false,
            probe,
            many,
        },
        most,
    }
}

const SEES_ALL: Probe = Probe::Callback { registers: true };
const SEES_NONE: Probe = Probe::Callback { registers: false };

/// All of them. The first one is the loop by itself.
pub(super) const ROWS: [Row; 17] = [
    theirs("nothing", "none"),
    theirs("ftrace", "ftrace"),
    theirs("ftrace, registers", "ftrace-regs"),
    theirs("kprobe, optimised", JUMP),
    theirs("kprobe, int3", "int3"),
    entry("entry, count", Probe::Count, 1, Some(6)),
    body("body, count", Probe::Count, 1, None),
    entry("entry, callback, no registers", SEES_NONE, 1, Some(30)),
    entry("entry, 2 callbacks, no registers", SEES_NONE, 2, None),
    entry("entry, 8 callbacks, no registers", SEES_NONE, 8, None),
    entry("entry, callback", SEES_ALL, 1, Some(60)),
    entry("entry, 2 callbacks", SEES_ALL, 2, None),
    entry("entry, 8 callbacks", SEES_ALL, 8, None),
    entry("entry, callback that may nest", Probe::MayNest, 1, Some(60)),
    body("body, callback", SEES_ALL, 1, Some(80)),
    body("body, 2 callbacks", SEES_ALL, 2, None),
    body("body, 8 callbacks", SEES_ALL, 8, None),
];

/// Measures all rows twice: alone, and with many probes elsewhere.
pub(super) fn measure(files: &Files, dir: &Path) -> TestResult {
    let mut guest = Subject::start(Peer::Ours, files, dir, "mitigations=off", 1)?;
    guest.ask("insmod /probe_cost.ko")?;
    for elsewhere in [0, ELSEWHERE] {
        attach_elsewhere(&mut guest.qmp, elsewhere)?;
        for (index, row) in ROWS.iter().enumerate() {
            let (sample, counted) = match row.attached {
                Attached::Theirs(how) => (by_kernel(&mut guest, how)?, true),
                Attached::Ours { entry, probe, many } => {
                    let probes = attach(&mut guest.qmp, files, entry, probe, many)?;
                    let sample = Sample::take(&mut guest, "none")?;
                    let exact = detach(&mut guest.qmp, &probes, sample.calls)?;
                    (sample, exact)
                }
            };
            report(&Finding::Hits {
                row: index,
                elsewhere,
                per_call: sample.per_call,
                faithful: sample.faithful,
                counted,
            })?;
        }
    }
    report(&Finding::End)
}

/// # Errors
///
/// When the kernel has not done with a kprobe what it was asked to.
fn by_kernel(guest: &mut Subject, how: &str) -> Result<Sample, Failure> {
    let sample = Sample::take(guest, how)?;
    if sample.jump == (how == JUMP) {
        return Ok(sample);
    }
    Err(Failure::new(format!("{how}: a jump is {}", sample.jump)))
}

/// What the module says.
struct Sample {
    per_call: f64,
    /// Calls in all, those in the loop and others.
    calls: u64,
    /// Flags and registers were as they should be.
    faithful: bool,
    /// A kprobe was made a jump.
    jump: bool,
}

impl Sample {
    fn take(guest: &mut Subject, how: &str) -> Result<Self, Failure> {
        let said = guest.ask(&format!("echo {how} >{MEASURE} && cat {MEASURE}"))?;
        Self::parse(&said).ok_or_else(|| Failure::new(format!("{how}: the guest said {said:?}")))
    }

    fn parse(said: &str) -> Option<Self> {
        let words: Vec<_> = said.split_whitespace().collect();
        let number = |name: &str| -> Option<u64> {
            let at = words.iter().position(|word| *word == name)?;
            words.get(at + 1)?.parse().ok()
        };
        let (ticks, calls) = (number("ticks")?, number("loop")?);
        Some(Self {
            // Millions at the most.
            #[expect(clippy::cast_precision_loss)]
            per_call: ticks as f64 / calls as f64,
            calls: number("calls")?,
            faithful: number("registers")? == 1 && number("flags")? == 1,
            jump: number("jump")? == 1,
        })
    }
}

fn attach(
    qmp: &mut Qmp,
    files: &Files,
    entry: bool,
    probe: Probe,
    many: usize,
) -> Result<Vec<Value>, Failure> {
    let mut all = Vec::new();
    for _ in 0..many {
        let mut sites = if entry {
            vec![FUNCTION.to_owned()]
        } else {
            BODY.map(|at| format!("{FUNCTION}+{at:#x}")).to_vec()
        };
        let attached = loop {
            let Some(site) = sites.first() else {
                return Err(Failure::new(format!("{FUNCTION} has no such site")));
            };
            let request = match probe {
                Probe::Count => json!({"site": site}),
                Probe::Callback { registers } => {
                    json!({"site": site, "object": files.bare, "no-registers": !registers})
                }
                Probe::MayNest => json!({"site": site, "object": files.seldom}),
            };
            match qmp.execute("probe-attach", request) {
                Ok(attached) => break attached,
                Err(QmpError::Refused { .. }) if sites.len() > 1 => {
                    sites.remove(0);
                }
                Err(error) => return Err(error.into()),
            }
        };
        all.push(attached["id"].clone());
    }
    Ok(all)
}

/// Takes probes out, and says whether each has seen all `calls`, and no other.
fn detach(qmp: &mut Qmp, probes: &[Value], calls: u64) -> Result<bool, Failure> {
    let detached = qmp.execute("probe-detach", json!({"ids": probes}))?;
    let Some(gone) = detached["probes"].as_array() else {
        return Err(Failure::new(format!("no probes in {detached}")));
    };
    let exact = |probe: &Value| probe["hits"] == json!(calls) && probe["skipped"] == json!(0);
    Ok(gone.len() == probes.len() && gone.iter().all(exact))
}

/// Counts in so many other functions.
fn attach_elsewhere(qmp: &mut Qmp, wanted: usize) -> TestResult {
    if wanted == 0 {
        return Ok(());
    }
    let mut attached = 0;
    // Some of them can not be probed.
    for site in functions(qmp, wanted + wanted / 3)? {
        match qmp.execute("probe-attach", json!({"site": site})) {
            Ok(_) => attached += 1,
            Err(QmpError::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        if attached == wanted {
            return Ok(());
        }
    }
    Err(Failure::new(format!("{attached} probes elsewhere only")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_module_says_is_understood() {
        let said = "x\nloop 1000 ticks 9000 calls 25008 registers 1 flags 0 jump 0\n";
        let sample = Sample::parse(said).unwrap();
        assert!((sample.per_call - 9.0).abs() < 1e-9);
        assert_eq!((sample.calls, sample.faithful), (25008, false));
        assert!(Sample::parse("loop 1000 ticks").is_none());
    }
}
