//! Probes, redirects and holds in modules, which the guest may remove at any time.

use std::time::Duration;

use serde_json::{Value, json};
use stillpoint_tests::{
    Failure, Guest, Qmp, TestResult, all_freed, attach_probe, detach_probes, module_file, on_kvm,
    refusal,
};

/// A module with a file that any program can read: as often as it is read, so often is [`READ`] called.
const MODULE: &str = "kernel/fs/binfmt_misc";
const READ: &str = "binfmt_misc:bm_status_read";
const STATUS: &str = "/proc/sys/fs/binfmt_misc/status";
/// What is read there is "enabled" and the end of the line, which the shell reads byte by byte.
const CALLS: u32 = 8;
/// `mov $7,%eax; ret`: so many bytes were read.
const SEVEN: &str = "b807000000c3";

const LOOK: Duration = Duration::from_secs(60);

struct Lab {
    guest: Guest,
    qmp: Qmp,
    /// The module's file in the guest.
    file: String,
}

impl Lab {
    fn boot(kernel: &str) -> Result<Self, Failure> {
        let missing = || Failure::new(format!("{kernel} has no {MODULE}"));
        let (on_host, file) = module_file(kernel, MODULE).ok_or_else(missing)?;
        // CPU 1 is held for a while, and goes away: the shell and the console's interrupt stay on CPU 0.
        let boot = Guest::boot(kernel).cpus(2).cmdline("irqaffinity=0");
        let guest = boot.file(&file, &on_host).start()?;
        guest.sh("taskset -p 1 $PPID >/dev/null")?;
        let mut qmp = guest.control()?;
        qmp.execute("events-enable", json!({}))?;
        Ok(Self { guest, qmp, file })
    }

    fn load(&self) -> TestResult {
        let mount = "mount -t binfmt_misc none /proc/sys/fs/binfmt_misc";
        self.guest.sh(&format!("insmod {} && {mount}", self.file))?;
        Ok(())
    }

    fn unload(&self) -> TestResult {
        self.guest
            .sh("umount /proc/sys/fs/binfmt_misc && rmmod binfmt_misc")?;
        Ok(())
    }

    /// Has both CPUs read so often, and tells how many calls that is.
    fn read(&self, times: u32) -> Result<u64, Failure> {
        let half = times / 2;
        self.guest.sh(&format!(
            "for cpu in 0 1; do taskset -c $cpu sh -c \
             'i=0; while [ $i -lt {half} ]; do read line <{STATUS}; i=$((i+1)); done' & done; wait"
        ))?;
        Ok(u64::from(2 * half * CALLS))
    }

    fn attach(&mut self, site: &str, more: Value) -> Result<u64, Failure> {
        attach_probe(&mut self.qmp, site, more)
    }

    fn detach(&mut self, ids: &[u64]) -> Result<Vec<u64>, Failure> {
        detach_probes(&mut self.qmp, ids)
    }

    fn probes(&mut self) -> Result<Value, Failure> {
        Ok(self.qmp.execute("query-probes", json!({}))?["probes"].take())
    }
}

/// At the entry, in the middle and at the return, on both CPUs.
fn counted(lab: &mut Lab) -> TestResult {
    let entry = lab.attach(READ, json!({}))?;
    let returned = lab.attach(READ, json!({"return": true, "if": "ax!=0"}))?;
    let latency = lab.attach(READ, json!({"callback": "latency"}))?;
    // Another function of the module, at any instruction behind its entry that takes a probe.
    let mut inside = None;
    for offset in 5..40 {
        let site = format!("binfmt_misc:load_misc_binary+{offset:#x}");
        if let Ok(id) = lab.attach(&site, json!({})) {
            inside = Some(id);
            break;
        }
    }
    let inside =
        inside.ok_or_else(|| Failure::new("no place in load_misc_binary takes a probe"))?;
    let calls = lab.read(200)?;
    lab.guest
        .sh("for i in 1 2 3 4 5; do /bin/busybox true; done")?;
    let probes = lab.probes()?;
    let of = |id: u64| {
        let mut all = probes.as_array().into_iter().flatten();
        all.find(|probe| probe["id"] == json!(id)).cloned()
    };
    let place = of(entry).map(|probe| probe["place"].clone());
    assert!(
        place
            .as_ref()
            .and_then(Value::as_str)
            .is_some_and(|place| place.starts_with(READ)),
        "{place:?}"
    );
    let counts = lab.detach(&[entry, returned, latency, inside])?;
    assert_eq!(counts[..3], [calls; 3], "{counts:?}");
    assert!(counts[3] >= 5, "{counts:?}");
    all_freed(&mut lab.qmp)
}

/// A function of the module is another one for a while, and a vCPU waits in it.
fn redirected_and_held(lab: &mut Lab) -> TestResult {
    let before = lab.guest.sh(&format!("cat {STATUS}"))?;
    let entry = lab
        .qmp
        .execute("text-redirect", json!({"site": READ, "code": SEVEN}))?;
    assert_eq!(entry["module"], "binfmt_misc", "{entry}");
    let bytes = lab.guest.sh(&format!(
        "dd if={STATUS} bs=100 count=1 2>/dev/null | wc -c"
    ))?;
    assert_eq!(bytes.trim(), "7");
    lab.qmp.execute("text-revert", json!({"id": entry["id"]}))?;
    assert_eq!(lab.guest.sh(&format!("cat {STATUS}"))?, before);
    let hold = json!({"vcpu": 1, "at": READ, "soft": true, "wait": false, "deadline": "2m"});
    lab.qmp.execute("vcpu-hold", hold)?;
    lab.guest
        .sh(&format!("taskset -c 1 cat {STATUS} >/tmp/held & sleep 0.5"))?;
    lab.qmp.execute("vcpu-release", json!({"vcpu": 1}))?;
    let after = lab.guest.sh("wait; cat /tmp/held")?;
    assert_eq!(after, before);
    all_freed(&mut lab.qmp)
}

/// The module goes while things are in it: they are told to be gone, and what comes to that place
/// afterwards is nobody's business.
fn removed(lab: &mut Lab) -> TestResult {
    let probe = lab.attach(READ, json!({}))?;
    let kernels_own = lab.attach("__x64_sys_getppid", json!({}))?;
    lab.unload()?;
    let gone = lab.qmp.event("PATCHES_GONE", LOOK)?;
    assert_eq!(
        gone["data"]["reason"], "module binfmt_misc was removed",
        "{gone}"
    );
    assert_eq!(gone["data"]["changes"], json!([probe]), "{gone}");
    let left = lab.probes()?;
    assert_eq!(left.as_array().map(Vec::len), Some(1), "{left}");
    let refused = refusal(lab.qmp.execute("probe-detach", json!({"ids": [probe]})))?;
    assert!(refused.contains(&probe.to_string()), "{refused}");
    let refused = refusal(lab.qmp.execute("probe-attach", json!({ "site": READ })))?;
    assert!(refused.contains("no module"), "{refused}");

    lab.load()?;
    let probe = lab.attach(READ, json!({}))?;
    lab.read(10)?;
    // Gone and back within one look: the new one is as the guest has loaded it.
    lab.guest.sh(&format!(
        "umount /proc/sys/fs/binfmt_misc && rmmod binfmt_misc && insmod {} && \
         mount -t binfmt_misc none /proc/sys/fs/binfmt_misc",
        lab.file
    ))?;
    let refused = refusal(lab.qmp.execute("probe-detach", json!({"ids": [probe]})))?;
    assert!(refused.contains("no probe"), "{refused}");
    let gone = lab.qmp.event("PATCHES_GONE", LOOK)?;
    assert_eq!(gone["data"]["changes"], json!([probe]), "{gone}");
    let probe = lab.attach(READ, json!({}))?;
    let calls = lab.read(20)?;
    assert_eq!(lab.detach(&[probe])?, [calls]);
    lab.detach(&[kernels_own])?;
    lab.unload()?;
    all_freed(&mut lab.qmp)
}

/// A CPU goes away and comes back: what it has counted stays, and it counts on.
fn cpu_goes_and_comes(lab: &mut Lab) -> TestResult {
    let online = "/sys/devices/system/cpu/cpu1/online";
    let ask = |cpu: u32| format!("taskset -c {cpu} cat /proc/version >/dev/null");
    let entry = lab.attach("version_proc_show", json!({}))?;
    let returned = lab.attach("version_proc_show", json!({"return": true}))?;
    lab.guest.sh(&format!("{}; {}", ask(0), ask(1)))?;
    lab.guest.sh(&format!("echo 0 >{online}"))?;
    lab.guest.sh(&ask(0))?;
    let during = lab.attach("version_proc_show", json!({"callback": "latency"}))?;
    lab.guest.sh(&ask(0))?;
    lab.guest.sh(&format!("echo 1 >{online}"))?;
    lab.guest.sh(&ask(1))?;
    assert_eq!(lab.detach(&[entry, returned, during])?, [5, 5, 2]);
    all_freed(&mut lab.qmp)
}

/// A permanent probe is taken out: its site passes straight through until another one comes, and in the
/// end is as it was.
fn stays_hooked(lab: &mut Lab) -> TestResult {
    let first = lab.attach("version_proc_show", json!({"permanent": true}))?;
    let version = lab.guest.sh("cat /proc/version")?;
    assert_eq!(lab.detach(&[first])?, [1]);
    let hooked = lab.qmp.execute("query-trampolines", json!({}))?;
    let one = &hooked["trampolines"][0];
    assert_eq!(
        (&one["state"], &one["probes"], &one["permanent"]),
        (&json!("hooked"), &json!([]), &json!(true)),
        "{hooked}"
    );
    let change = one["id"].clone();
    assert_eq!(lab.guest.sh("cat /proc/version")?, version);
    let second = lab.attach("version_proc_show", json!({"return": true}))?;
    lab.guest.sh("cat /proc/version")?;
    assert_eq!(lab.detach(&[second])?, [1]);
    lab.qmp.execute("text-revert", json!({"id": change}))?;
    assert_eq!(lab.guest.sh("cat /proc/version")?, version);
    all_freed(&mut lab.qmp)
}

fn in_modules(kernel: &str) -> TestResult {
    let mut lab = Lab::boot(kernel)?;
    lab.load()?;
    counted(&mut lab)?;
    redirected_and_held(&mut lab)?;
    removed(&mut lab)?;
    cpu_goes_and_comes(&mut lab)?;
    stays_hooked(&mut lab)?;
    assert_eq!(lab.guest.complaints()?, "");
    println!("modules: {kernel}: probes counted exactly, and were gone with their module");
    Ok(())
}

#[test]
fn sites_in_modules_on_6_12() -> TestResult {
    on_kvm(|| in_modules("6.12"))
}

#[test]
#[cfg(feature = "full")]
fn sites_in_modules_on_6_1() -> TestResult {
    on_kvm(|| in_modules("6.1"))
}
