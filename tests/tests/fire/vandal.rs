//! A guest that means harm: root in it loads a module (guest-images/modules/vandal.c) that rewrites the
//! bytes at our sites, the page tables, and what probes write down.

use std::time::Duration;

use serde_json::{Value, json};
use stillpoint_tests::{
    Failure, Guest, Qmp, QmpError, SOON, TestResult, all_or, number, refusal, replacement,
};

const ASK: &str = "/sys/module/vandal/parameters/do";
const SITE: &str = "version_proc_show";
/// Bits of a page table entry that are no address, for memory that may be written and not run.
const DATA: u64 = 0x8000_0000_0000_01e3;

pub(crate) struct Vandal<'a> {
    pub(crate) guest: &'a Guest,
    pub(crate) qmp: Qmp,
    /// A client that has nothing to do with it.
    pub(crate) other: Qmp,
    /// How often everything was asked for.
    pub(crate) asked: usize,
}

impl Vandal<'_> {
    /// Has the guest do something to itself; tells what it found.
    fn does(&self, what: &str) -> Result<u64, Failure> {
        let said = self
            .guest
            .sh(&format!("echo '{what}' >{ASK} && cat {ASK}"))?;
        // What was begun before may end before this does, and say so first.
        let last = said.trim().lines().last().unwrap_or_default();
        let parsed = u64::from_str_radix(last, 16);
        parsed.map_err(|_| Failure::new(format!("{what}: {said}")))
    }

    fn attach(&mut self, site: &str, mut more: Value) -> Result<Value, QmpError> {
        more["site"] = json!(site);
        more["deadline"] = json!("5s");
        self.qmp.execute("probe-attach", more)
    }

    fn detach(&mut self, probe: &Value) -> Result<Value, QmpError> {
        let request = json!({"id": probe["id"], "deadline": "5s"});
        self.qmp.execute("probe-detach", request)
    }

    fn arena(&mut self, block: &str) -> Result<u64, Failure> {
        let told = self.qmp.execute("query-text", json!({}))?;
        let at = number(&told["arena"][block]);
        at.ok_or_else(|| Failure::new(format!("no arena: {told}")))
    }

    fn read_version(&self) -> TestResult {
        self.guest.sh("cat /proc/version >/dev/null")?;
        Ok(())
    }

    /// The guest lives, and so does whoever looks after it.
    fn all_is_well(&mut self) -> TestResult {
        assert_eq!(self.guest.sh("echo alive")?.trim(), "alive");
        for qmp in [&mut self.qmp, &mut self.other] {
            let status = qmp.execute("query-status", json!({}))?;
            assert_eq!(status["running"], json!(true), "{status}");
        }
        Ok(())
    }

    /// Everything that can be asked is answered, or refused with a reason.
    fn is_answered(&mut self) -> TestResult {
        let all = self.qmp.execute("query-probes", json!({}))?;
        let mut asked: Vec<_> = [
            "query-trampolines",
            "query-tracepoints",
            "query-holdouts",
            "query-text",
            "query-kernel",
        ]
        .map(|command| (command, json!({})))
        .into();
        // What takes long is not asked for each time.
        if self.asked % all_or(1, 5) == 0 {
            asked.extend(["query-stacks", "inspect-text"].map(|command| (command, json!({}))));
        }
        self.asked += 1;
        for probe in all["probes"].as_array().into_iter().flatten() {
            asked.push(("query-histogram", json!({"id": probe["id"]})));
            asked.push(("query-records", json!({"id": probe["id"]})));
            let last = json!({"id": probe["id"], "since": "0xffffffffffffffff"});
            asked.push(("query-records", last));
        }
        for (command, arguments) in asked {
            typed(command, self.qmp.execute(command, arguments))?;
        }
        Ok(())
    }

    /// Bytes at our sites: what the guest has put there stays, and is told.
    pub(crate) fn rewrites_sites(&mut self) -> TestResult {
        let object = replacement("version").display().to_string();
        let probe = self.attach(SITE, json!({}))?;
        let at = number(&probe["address"]).unwrap_or(0);
        let redirect = json!({"site": "uptime_proc_show", "object": object});
        let redirect = self.qmp.execute("text-redirect", redirect)?;
        let redirected = number(&redirect["address"]).unwrap_or(0);
        let ours = |change: &Value| change["after"].as_str().unwrap_or("").to_owned();
        for (at, bytes) in [
            (at, "9090909090"),
            (at, "0f1f440000"),
            (at, "e8ffffffff"),
            (redirected, "6666906690"),
        ] {
            self.does(&format!("write {at:x} {bytes}"))?;
            let inspected = self.qmp.execute("inspect-text", json!({}))?.to_string();
            let desc = match at == redirected {
                false => {
                    let more = self.attach(SITE, json!({}));
                    assert!(refusal(more)?.starts_with("NotOurs"), "attached");
                    refusal(self.detach(&probe))?
                }
                true => {
                    let revert = json!({"id": redirect["id"]});
                    refusal(self.qmp.execute("text-revert", revert))?
                }
            };
            assert!(desc.starts_with("NotOurs"), "{desc}");
            let found = self.does(&format!("read {at:x}"))?.to_le_bytes();
            let found: String = found.iter().take(5).map(|b| format!("{b:02x}")).collect();
            assert_eq!(found, bytes, "written over");
            // A nop is what the kernel itself has there.
            let told = inspected.contains(bytes) || bytes == "0f1f440000";
            assert!(told, "{bytes} is not told: {inspected}");
            self.is_answered()?;
            let back = match at == redirected {
                false => ours(&probe["change"]),
                true => ours(&redirect),
            };
            self.does(&format!("write {at:x} {back}"))?;
        }
        self.read_version()?;
        let gone = self.detach(&probe)?;
        assert!(gone["probe"]["hits"].as_u64() > Some(0), "{gone}");
        self.qmp
            .execute("text-revert", json!({"id": redirect["id"]}))?;
        self.all_is_well()
    }

    /// Our code: every write is dropped.
    pub(crate) fn writes_to_our_code(&mut self) -> TestResult {
        const WRITES: u64 = 2000;
        let probe = self.attach(SITE, json!({}))?;
        let code = self.arena("code")?;
        let before = self.does(&format!("read {code:x}"))?;
        self.guest
            .start_sh(&format!("echo 'scribble {code:x} {WRITES:x}' >{ASK}"))?;
        for _ in 0..20 {
            let status = self.other.execute("query-status", json!({}))?;
            assert_eq!(status["running"], json!(true), "{status}");
        }
        self.qmp.event("ARENA_WRITE_REFUSED", SOON)?;
        assert_eq!(self.does(&format!("read {code:x}"))?, before);
        // Written by another entry that the guest makes for it.
        let old = self.does(&format!("entry {code:x}"))?;
        self.does(&format!("map {code:x} {:x}", old | 2))?;
        self.does(&format!("write {code:x} cccccccc"))?;
        assert_eq!(self.does(&format!("read {code:x}"))?, before);
        let more = typed("probe-attach", self.attach("uptime_proc_show", json!({})))?;
        assert!(more.is_none(), "attached: {more:?}");
        self.does(&format!("map {code:x} {old:x}"))?;
        self.read_version()?;
        let gone = self.detach(&probe)?;
        assert!(gone["probe"]["hits"].as_u64() > Some(0), "{gone}");
        self.all_is_well()
    }

    /// What probes write down: it is nonsense then, and nothing else is.
    pub(crate) fn falsifies_data(&mut self) -> TestResult {
        let object = replacement("belongs_one").display().to_string();
        let mut probes = Vec::new();
        for (site, more) in [
            (SITE, json!({})),
            (SITE, json!({"callback": "histogram", "registers": ["di"]})),
            (
                SITE,
                json!({"callback": "record", "registers": ["di"], "records": 16}),
            ),
            (SITE, json!({"object": object, "data": 7})),
            ("meminfo_proc_show", json!({"callback": "latency"})),
        ] {
            probes.push(self.attach(site, more)?);
        }
        let traced =
            json!({"name": "sched_process_exec", "callback": "record", "registers": ["si"]});
        let traced = self.qmp.execute("tracepoint-attach", traced)?;
        let data = self.arena("data")?;
        for word in [u64::MAX, 0, 1 << 63, 1] {
            self.does(&format!("fill {data:x} 200000 {word:x}"))?;
            self.guest
                .sh("cat /proc/version /proc/meminfo >/dev/null; /bin/true")?;
            let records = json!({"id": traced["id"]});
            typed("query-records", self.qmp.execute("query-records", records))?;
            self.is_answered()?;
        }
        self.qmp
            .execute("tracepoint-detach", json!({"id": traced["id"]}))?;
        for probe in &probes {
            self.detach(probe)?;
        }
        self.all_is_well()
    }

    /// The mapping of our memory: nothing is put where the guest does not have it any more.
    pub(crate) fn remaps_our_memory(&mut self) -> TestResult {
        let probe = self.attach(SITE, json!({}))?;
        for block in ["code", "data"] {
            let at = self.arena(block)?;
            let old = self.does(&format!("double {at:x}"))?;
            let copy = self.does(&format!("entry {at:x}"))?;
            assert_ne!(old, copy);
            self.read_version()?;
            let desc = refusal(self.attach("uptime_proc_show", json!({})))?;
            assert!(desc.starts_with("Arena"), "{desc}");
            self.is_answered()?;
            self.does(&format!("map {at:x} {old:x}"))?;
        }
        self.detach(&probe)?;
        // With nothing of ours in use: not mapped at all, far away, a table that is none, all ones. A
        // kernel without any trace of us is taken for a new one, once.
        for block in ["code", "data"] {
            for entry in [0, 0x7f_f000_0000 | DATA, 0x0010_0067, u64::MAX] {
                let probe = self.attach(SITE, json!({}))?;
                self.detach(&probe)?;
                let at = self.arena(block)?;
                self.does(&format!("map {at:x} {entry:x}"))?;
                let desc = refusal(self.attach(SITE, json!({})))?;
                let told = desc.starts_with("Arena") || desc.starts_with("KernelGone");
                assert!(told, "{entry:#x}: {desc}");
                self.is_answered()?;
                self.does("back")?;
            }
        }
        let probe = self.attach(SITE, json!({}))?;
        self.detach(&probe)?;
        self.all_is_well()
    }

    /// The mapping of its own text: we write where it runs, and what it runs elsewhere is not ours.
    pub(crate) fn remaps_its_text(&mut self) -> TestResult {
        let probe = self.attach(SITE, json!({}))?;
        let at = number(&probe["address"]).unwrap_or(0);
        self.detach(&probe)?;
        let old = self.does(&format!("double {at:x}"))?;
        let copy = self.does(&format!("entry {at:x}"))?;
        let probe = self.attach(SITE, json!({}))?;
        self.read_version()?;
        let told = self.qmp.execute("query-probes", json!({}))?;
        assert!(told["probes"][0]["hits"].as_u64() > Some(0), "{told}");
        // Back to the text without it.
        self.does(&format!("map {at:x} {old:x}"))?;
        let desc = refusal(self.detach(&probe))?;
        assert!(desc.starts_with("NotOurs"), "{desc}");
        self.is_answered()?;
        self.does(&format!("map {at:x} {copy:x}"))?;
        self.detach(&probe)?;
        self.does(&format!("map {at:x} {old:x}"))?;
        self.read_version()?;
        self.all_is_well()
    }

    /// All of it while clients work: whatever the guest makes of that, they are answered until it dies.
    pub(crate) fn falsifies_data_all_the_time(&mut self) -> TestResult {
        let data = self.arena("data")?;
        self.guest.sh(&format!(
            ": >/tmp/v; (while [ -e /tmp/v ]; do echo 'fill {data:x} 20000 0' >{ASK}; done) >/dev/null 2>&1 &"
        ))?;
        for round in 0..8 {
            let more = match round % 4 {
                0 => json!({"callback": "record", "registers": ["di"], "records": 16}),
                1 => json!({"callback": "latency"}),
                2 => json!({"callback": "histogram", "registers": ["si"]}),
                _ => json!({}),
            };
            let probe = typed("probe-attach", self.attach("vfs_read", more))?;
            self.is_answered()?;
            if let Some(probe) = probe {
                typed("probe-detach", self.detach(&probe))?;
            }
        }
        self.guest.sh("rm /tmp/v; sleep 0.5")?;
        self.all_is_well()
    }

    /// The end: its own text is nowhere.
    pub(crate) fn unmaps_its_text(&mut self) -> TestResult {
        let probe = self.attach(SITE, json!({}))?;
        let at = number(&probe["address"]).unwrap_or(0);
        self.guest
            .start_sh(&format!("echo 'map {at:x} 0' >{ASK}"))?;
        // It dies of it, sooner or later, or goes on without what stood there.
        let answered = match self.guest.wait(Duration::from_secs(5)) {
            Ok(_) => Ok(()),
            Err(_) => self.answers_to_the_end(&probe),
        };
        match self.guest.exit_status()? {
            0 => answered,
            4 | 5 => Ok(()),
            status => Err(Failure::new(format!("the VMM ended with {status}"))),
        }
    }

    fn answers_to_the_end(&mut self, probe: &Value) -> TestResult {
        self.other.execute("query-status", json!({}))?;
        let inspected = self.qmp.execute("inspect-text", json!({}));
        typed("inspect-text", inspected)?;
        typed("probe-detach", self.detach(probe))?;
        self.other.execute("quit", json!({}))?;
        Ok(())
    }
}

/// What was answered; nothing for a refusal, which has to be one with a reason.
fn typed(command: &str, answer: Result<Value, QmpError>) -> Result<Option<Value>, Failure> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(QmpError::Refused { desc, .. }) => {
            let word = desc.split(':').next().unwrap_or_default();
            let untyped = word.is_empty() || word == "Internal" || word.contains(' ');
            match untyped {
                false => Ok(None),
                true => Err(Failure::new(format!("{command}: {desc}"))),
            }
        }
        Err(error) => Err(Failure::new(format!("{command}: {error}"))),
    }
}
