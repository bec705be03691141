//! A client that attaches, changes and takes away as fast as it is answered.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stillpoint_tests::{Failure, Qmp, QmpError, TestResult, number, replacement};

use super::figures::Figures;
use super::sites::{Place, Sites};
use stillpoint_tests::Random;

/// So many probes at a time, at the most.
const MOST: usize = 60;
/// How long one thing may take.
const DEADLINE: &str = "3s";
/// Functions whose callers do not mind if they do nothing.
const HARMLESS: &[&str] = &[
    "version_proc_show",
    "uptime_proc_show",
    "loadavg_proc_show",
    "cmdline_proc_show",
];
/// `xor %eax,%eax; ret`
const RETURN_0: &str = "31c0c3";
const NOP: &str = "0f1f440000";
const OTHER_NOP: &str = "6690666690";
/// What a client does beside probes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Duty {
    Probes,
    /// Tracepoints, ordered steps, replaced functions and held vCPUs too.
    Everything,
}

/// Something that is in the guest.
#[derive(Clone, Debug)]
enum Shot {
    Probe { id: u64, place: Place, does: Does },
    Tracepoint { id: u64, checks: bool },
    Change(u64),
    Steps(u64),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Does {
    Counts,
    Histogram,
    Records,
    Checks,
}

/// One client.
pub(crate) struct Client {
    qmp: Qmp,
    random: Random,
    sites: Arc<Sites>,
    duty: Duty,
    shots: Vec<Shot>,
    /// Where a probe could be attached before.
    good: Vec<String>,
    /// What was refused since the client began to end, and why.
    refused: Vec<String>,
    pub(crate) figures: Figures,
}

impl Client {
    pub(crate) fn new(
        socket: &Path,
        random: Random,
        sites: Arc<Sites>,
        duty: Duty,
    ) -> Result<Self, Failure> {
        Ok(Self {
            qmp: Qmp::connect(socket)?,
            random,
            sites,
            duty,
            shots: Vec::new(),
            good: Vec::new(),
            refused: Vec::new(),
            figures: Figures::default(),
        })
    }

    /// Goes on until the time is over or somebody else has failed, and takes everything away.
    pub(crate) fn run(mut self, until: Instant, failed: &AtomicBool) -> Result<Figures, Failure> {
        while Instant::now() < until && !failed.load(Ordering::Relaxed) {
            self.something()?;
        }
        self.refused.clear();
        let begun = Instant::now();
        while let Some(shot) = self.shots.last().cloned() {
            if begun.elapsed() > stillpoint_tests::SOON {
                let why = self.refused.join("\n");
                let text = format!("{shot:?} cannot be taken away:\n{why}");
                return Err(Failure::new(text));
            }
            self.take(self.shots.len() - 1)?;
        }
        Ok(self.figures)
    }

    fn something(&mut self) -> TestResult {
        let full = self.shots.len() as u64 * 100 / MOST as u64;
        match (self.random.below(100), self.duty) {
            (0..=1, Duty::Everything) => self.redirect(),
            (2..=3, Duty::Everything) => self.steps(),
            (4..=6, Duty::Everything) => self.hold(),
            (7..=12, Duty::Everything) => self.trace(),
            (13..=15, _) => self.batch(),
            (16..=18, _) => self.take_several(),
            (19..=27, _) => self.look(),
            (_, _) if self.random.percent(full.max(10)) => match self.shots.len() {
                0 => self.attach(),
                len => {
                    let index = self.random.index(len);
                    self.take(index)
                }
            },
            _ => self.attach(),
        }
    }

    /// Asks, and takes note of what it cost the guest; `None` when it was refused for a good reason.
    fn ask(&mut self, command: &str, arguments: Value) -> Result<Option<Value>, Failure> {
        match self.qmp.execute(command, arguments.clone()) {
            Ok(answer) => {
                self.figures.stopped(&answer);
                Ok(Some(answer))
            }
            Err(QmpError::Refused { desc, .. }) => match self.figures.refused(&desc) {
                Ok(()) => {
                    self.refused.push(format!("{command} {arguments}: {desc}"));
                    Ok(None)
                }
                Err(desc) => Err(Failure::new(format!("{command} {arguments}: {desc}"))),
            },
            Err(error) => Err(Failure::new(format!("{command} {arguments}: {error}"))),
        }
    }

    fn attach(&mut self) -> TestResult {
        let sites = Arc::clone(&self.sites);
        let Some(place) = sites.place(&mut self.random) else {
            return Ok(());
        };
        let returned = place.entry && place.returns && self.random.percent(25);
        let (does, mut request) = self.kind(place.address);
        request["site"] = json!(place.site);
        request["deadline"] = json!(DEADLINE);
        request["priority"] = json!(self.random.below(5));
        if returned {
            request["return"] = json!(true);
            if does == Does::Histogram && self.random.percent(60) {
                request["callback"] = json!("latency");
                if let Some(request) = request.as_object_mut() {
                    request.remove("registers");
                }
            }
        }
        if self.random.percent(10) {
            request["if"] = json!("di!=0");
        }
        let Some(answer) = self.ask("probe-attach", request)? else {
            return Ok(());
        };
        let at = number(&answer["address"]);
        if at != Some(place.address) {
            return Err(Failure::new(format!("not at {place:?}: {answer}")));
        }
        self.figures.transitions += 1;
        self.figures.checked += u64::from(does == Does::Checks);
        if self.good.len() < 500 {
            self.good.push(place.site.clone());
        }
        let id = id(&answer)?;
        self.shots.push(Shot::Probe { id, place, does });
        Ok(())
    }

    /// What a probe does, at random.
    fn kind(&mut self, address: u64) -> (Does, Value) {
        const REGISTERS: [&str; 6] = ["di", "si", "dx", "ax", "sp", "bp"];
        let register = self.random.one_of(&REGISTERS).copied().unwrap_or("di");
        match self.random.below(10) {
            0..=2 => (Does::Counts, json!({})),
            3 => (
                Does::Histogram,
                json!({"callback": "histogram", "registers": [register]}),
            ),
            4..=5 => {
                let records = 1 << self.random.below(9);
                let request = json!({"callback": "record", "registers": ["sp", register], "records": records});
                (Does::Records, request)
            }
            _ => (Does::Checks, self.checking(address)),
        }
    }

    /// A callback that knows whether its data are its own.
    fn checking(&mut self, site: u64) -> Value {
        let (name, mark) = match self.random.percent(50) {
            true => ("belongs_one", 1_u64),
            false => ("belongs_two", 2),
        };
        let object = replacement(name).display().to_string();
        json!({"object": object, "data": format!("{:#x}", site ^ mark << 48)})
    }

    /// Several at sites that were good before, in one stop.
    fn batch(&mut self) -> TestResult {
        let mut sites: Vec<String> = Vec::new();
        for _ in 0..=self.random.below(16) {
            sites.extend(self.random.one_of(&self.good).cloned());
        }
        if sites.is_empty() || self.shots.len() > MOST {
            return Ok(());
        }
        let request = json!({"sites": sites, "deadline": DEADLINE});
        let Some(answer) = self.ask("probe-attach", request)? else {
            return Ok(());
        };
        for (probe, site) in answer["probes"].as_array().into_iter().flatten().zip(sites) {
            let place = Place {
                site,
                address: number(&probe["address"]).unwrap_or(0),
                entry: false,
                returns: false,
            };
            let (id, does) = (id(probe)?, Does::Counts);
            self.shots.push(Shot::Probe { id, place, does });
            self.figures.transitions += 1;
        }
        Ok(())
    }

    fn take_several(&mut self) -> TestResult {
        let probe = |shot: &Shot| match shot {
            Shot::Probe { id, .. } => Some(*id),
            _ => None,
        };
        let mut ids: Vec<_> = self.shots.iter().filter_map(probe).collect();
        while ids.len() > 16 {
            let index = self.random.index(ids.len());
            ids.swap_remove(index);
        }
        if ids.is_empty() {
            return Ok(());
        }
        let request = json!({"ids": ids, "deadline": DEADLINE});
        let Some(answer) = self.ask("probe-detach", request)? else {
            return Ok(());
        };
        for probe in answer["probes"].as_array().into_iter().flatten() {
            let gone = id(probe)?;
            let index = self.shots.iter().position(|shot| shot.is_probe(gone));
            if let Some(index) = index {
                let shot = self.shots.swap_remove(index);
                self.gone(&shot, probe);
            }
        }
        Ok(())
    }

    /// Takes note of the last counts of what was taken away.
    fn gone(&mut self, shot: &Shot, told: &Value) {
        let hits = told["hits"].as_u64().unwrap_or(0);
        self.figures.transitions += 1;
        self.figures.hits += hits;
        let checks = match shot {
            Shot::Probe { does, .. } => *does == Does::Checks,
            Shot::Tracepoint { checks, .. } => *checks,
            _ => false,
        };
        if checks {
            self.figures.called += hits;
        }
    }

    /// Takes one thing away; what cannot go now stays.
    fn take(&mut self, index: usize) -> TestResult {
        let Some(shot) = self.shots.get(index).cloned() else {
            return Ok(());
        };
        let (command, id) = match shot {
            Shot::Probe { id, .. } => ("probe-detach", id),
            Shot::Tracepoint { id, .. } => ("tracepoint-detach", id),
            Shot::Change(id) => ("text-revert", id),
            Shot::Steps(id) => ("steps-revert", id),
        };
        let deadline = match shot {
            Shot::Tracepoint { .. } => "60s",
            _ => DEADLINE,
        };
        let Some(answer) = self.ask(command, json!({"id": id, "deadline": deadline}))? else {
            return Ok(());
        };
        self.shots.swap_remove(index);
        let told = match shot {
            Shot::Probe { .. } => &answer["probe"],
            Shot::Tracepoint { .. } => &answer["tracepoint"],
            Shot::Change(_) | Shot::Steps(_) => &answer["entry"],
        };
        self.gone(&shot, told);
        Ok(())
    }

    /// Reads what probes have seen while the guest runs.
    fn look(&mut self) -> TestResult {
        let index = self.random.index(self.shots.len());
        match self.shots.get(index).cloned() {
            Some(Shot::Probe {
                id,
                does: Does::Records,
                place,
            }) => {
                let told = self.ask("query-records", json!({"id": id}))?;
                let told = told.unwrap_or_default();
                for record in told["records"].as_array().into_iter().flatten() {
                    let stack = number(&record["values"][0]);
                    let right = record["cpu"].as_u64() < Some(super::CPUS.into())
                        && stack > Some(0xffff_8000_0000_0000);
                    if !right {
                        return Err(Failure::new(format!("a record of {place:?}: {record}")));
                    }
                    self.figures.records += 1;
                }
            }
            Some(Shot::Probe {
                id,
                does: Does::Histogram,
                ..
            }) => {
                self.ask("query-histogram", json!({"id": id}))?;
            }
            _ => {
                let what = ["query-probes", "query-trampolines", "query-holdouts"];
                let what = self.random.one_of(&what).copied().unwrap_or("query-probes");
                self.ask(what, json!({}))?;
            }
        }
        Ok(())
    }

    fn trace(&mut self) -> TestResult {
        let of = |shot: &Shot| matches!(shot, Shot::Tracepoint { .. });
        if self.random.percent(60) {
            if let Some(index) = self.shots.iter().position(of) {
                return self.take(index);
            }
        }
        let Some((name, address)) = self.sites.tracepoint(&mut self.random) else {
            return Ok(());
        };
        let checks = self.random.percent(60);
        let mut request = match checks {
            true => self.checking(address),
            false => json!({}),
        };
        request["name"] = json!(name);
        request["deadline"] = json!("60s");
        if let Some(answer) = self.ask("tracepoint-attach", request)? {
            let id = id(&answer)?;
            self.shots.push(Shot::Tracepoint { id, checks });
            self.figures.transitions += 1;
            self.figures.checked += u64::from(checks);
        }
        Ok(())
    }

    fn redirect(&mut self) -> TestResult {
        let site = self.random.one_of(HARMLESS);
        let request = json!({"site": site, "code": RETURN_0, "deadline": DEADLINE});
        if let Some(answer) = self.ask("text-redirect", request)? {
            self.shots.push(Shot::Change(id(&answer)?));
            self.figures.transitions += 1;
        }
        Ok(())
    }

    /// Another nop in the place of a function's first, and then in that of another one.
    fn steps(&mut self) -> TestResult {
        let sites = Arc::clone(&self.sites);
        let mut steps = Vec::new();
        for name in ["first", "second"] {
            let site = sites.nop(&mut self.random);
            let text = json!([{"site": site, "expect": NOP, "write": OTHER_NOP}]);
            steps.push(json!({"name": name, "text": text}));
        }
        let request = json!({"steps": steps, "deadline": DEADLINE});
        if let Some(answer) = self.ask("steps-apply", request)? {
            self.shots.push(Shot::Steps(id(&answer)?));
            self.figures.transitions += 1;
        }
        Ok(())
    }

    /// Holds a vCPU for a moment.
    fn hold(&mut self) -> TestResult {
        let vcpu = self.random.below(super::CPUS.into());
        let soft = self.random.percent(50);
        let mut request = json!({"vcpu": vcpu, "soft": soft, "wait": false, "deadline": "200ms"});
        if self.random.percent(60) {
            let sites = Arc::clone(&self.sites);
            request["at"] = json!(sites.place(&mut self.random).map(|place| place.site));
        }
        if self.ask("vcpu-hold", request)?.is_none() {
            return Ok(());
        }
        self.figures.holds += 1;
        std::thread::sleep(Duration::from_millis(self.random.below(60)));
        match self.qmp.execute("vcpu-release", json!({"vcpu": vcpu})) {
            Ok(answer) => self.figures.stopped(&answer),
            // It has ended by itself.
            Err(QmpError::Refused { desc, .. }) if desc.contains("is not held") => {}
            Err(error) => return Err(Failure::new(format!("vcpu-release: {error}"))),
        }
        Ok(())
    }
}

impl Shot {
    fn is_probe(&self, number: u64) -> bool {
        matches!(self, Self::Probe { id, .. } if *id == number)
    }
}

fn id(answer: &Value) -> Result<u64, Failure> {
    let id = answer["id"].as_u64();
    id.ok_or_else(|| Failure::new(format!("no number in {answer}")))
}
