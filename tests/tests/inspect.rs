//! Guest text is explained byte by byte, and what is foreign in it has an owner.

use std::path::Path;

use serde_json::{Value, json};
use stillpoint_tests::{Failure, Guest, Ran, TestResult, kernel, on_kvm};

const NOP: &str = "0f1f440000";
const RETURN_0: &str = "31c0c39090";
const TRACING: &str = "/sys/kernel/tracing";

fn parsed(text: &str) -> Result<Value, Failure> {
    serde_json::from_str(text).map_err(|error| Failure::new(format!("{error}: {text}")))
}

fn live(guest: &Guest) -> Result<Value, Failure> {
    let answer = parsed(&guest.stillpoint(&["inspect", "--json"])?.ok()?)?;
    // What takes the time is done while the guest runs; to do it in a stop takes a second there.
    let stalled = answer["stop"]["stalled-in-all-us"].as_u64();
    assert!(stalled < Some(500_000), "{}", answer["stop"]);
    Ok(answer)
}

/// The text of a dump that is made now.
fn dumped(guest: &Guest, kernel_file: &Path) -> Result<Value, Failure> {
    let core = guest.dir().join("core");
    let (core, file) = (
        core.display().to_string(),
        kernel_file.display().to_string(),
    );
    guest.stillpoint(&["dump", &core])?.ok()?;
    let said = Ran::stillpoint(&["inspect", &core, "--kernel", &file, "--json"])?.ok()?;
    std::fs::remove_file(&core)?;
    let answer = parsed(&said)?;
    assert_eq!(answer["what"], "dump", "{said}");
    Ok(answer["text"].clone())
}

/// A dump says of its tasks what the guest says of them when it is asked.
fn offline(guest: &Guest, kernel_file: &Path) -> TestResult {
    let core = guest.dir().join("core");
    let (core, file) = (
        core.display().to_string(),
        kernel_file.display().to_string(),
    );
    let mut qmp = guest.control()?;
    qmp.execute("stop", json!({}))?;
    guest.stillpoint(&["dump", &core])?.ok()?;
    let parts = "cpus,tasks,modules,stacks";
    let inspect = [
        "inspect", &core, "--kernel", &file, "--show", parts, "--json",
    ];
    let said = Ran::stillpoint(&inspect)?.ok()?;
    let told = parsed(&said)?;
    let live = |command: &str, name: &str| {
        let answer = parsed(&guest.stillpoint(&[command, "--json"])?.ok()?)?;
        Ok::<_, Failure>(answer[name].clone())
    };
    for (command, name) in [
        ("tasks", "tasks"),
        ("stacks", "tasks"),
        ("stacks", "counts"),
    ] {
        assert_eq!(told[command][name], live(command, name)?, "{command}");
    }
    assert_eq!(told["modules"], live("modules", "modules")?);
    assert_eq!(told["cpus"].as_array().map(Vec::len), Some(2), "{said}");
    assert!(told.get("text").is_none(), "{said}");
    let states = told["stacks"]["tasks"].as_array().into_iter().flatten();
    assert!(
        states.clone().all(|task| task["state"].is_string()),
        "{said}"
    );
    assert!(states.clone().any(|task| task["state"] == "I"), "{said}");

    // A bound that is hit is told, and not taken for an end.
    let bounded = Ran::stillpoint(&["inspect", &core, "--kernel", &file, "--walk-steps", "500"])?;
    assert_eq!(bounded.status, 1, "{bounded:?}");
    assert!(bounded.stderr.contains("500 steps"), "{bounded:?}");
    qmp.execute("cont", json!({}))?;
    std::fs::remove_file(&core)?;
    Ok(())
}

/// Every foreign place: its function, and who owns it.
fn owners(text: &Value) -> Vec<(String, String, String)> {
    let foreign = text["foreign"].as_array().map(Vec::as_slice);
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut all: Vec<_> = foreign
        .unwrap_or_default()
        .iter()
        .map(|foreign| {
            let place = word(&foreign["place"]);
            let function = place.split('+').next().unwrap_or_default().to_owned();
            let owner = &foreign["owner"];
            (function, word(&owner["kind"]), word(&owner["what"]))
        })
        .collect();
    all.sort();
    all
}

fn clean(text: &Value) {
    assert_eq!(text["foreign"], json!([]), "{text}");
    // 7.3 has a constant that stands in one place only.
    let doubts = text["doubts"].as_array().into_iter().flatten();
    let mut doubts = doubts.filter_map(Value::as_str);
    let alone = |doubt: &str| doubt.starts_with("the runtime constant __futex_queues ");
    assert!(doubts.all(alone), "{text}");
    assert!(text["explained"].as_u64() > Some(300_000), "{text}");
    for class in ["relocation", "fentry", "return", "static-call"] {
        let count = &text["sites"][class];
        assert!(count["sites"].as_u64() > Some(1000), "{class}: {text}");
        assert_eq!(count["sites"], count["changed"], "{class}: {text}");
    }
}

fn explains(version: &str, entry: u64) -> TestResult {
    let guest = Guest::boot(version).cpus(2).memory("160M").start()?;
    let file = kernel(version).join("vmlinuz");
    clean(&live(&guest)?);
    if entry == 0 {
        clean(&dumped(&guest, &file)?);
        offline(&guest, &file)?;
    }

    // A probe at an entry, one behind it, a tracer, and a change of our own.
    let behind = entry + 5;
    guest.sh(&format!(
        "cd {TRACING} && echo 'p:first meminfo_proc_show' > kprobe_events && \
         echo 'p:second cmdline_proc_show+{behind}' >> kprobe_events && \
         echo 1 > events/kprobes/enable && echo uptime_proc_show > set_ftrace_filter && \
         echo function > current_tracer && cat /proc/uptime /proc/cmdline /proc/meminfo"
    ))?;
    let site = format!("version_proc_show+{entry:#x}");
    let patch = [
        "text", "patch", &site, "--expect", NOP, "--write", RETURN_0, "--json",
    ];
    let change = parsed(&guest.stillpoint(&patch)?.ok()?)?;
    let found = live(&guest)?;
    let own = |what: &str, kind: &str| (what.to_owned(), kind.to_owned());
    let expected = vec![
        own("cmdline_proc_show", "kprobe"),
        own("meminfo_proc_show", "kprobe"),
        own("uptime_proc_show", "ftrace"),
        own("version_proc_show", "ours"),
    ];
    let who = |text: &Value| -> Vec<_> {
        let all = owners(text).into_iter();
        all.map(|(function, kind, _)| (function, kind)).collect()
    };
    assert_eq!(who(&found), expected, "{found}");
    let tracer = owners(&found)
        .into_iter()
        .find(|(_, kind, _)| kind == "ftrace");
    assert_eq!(
        tracer.map(|(_, _, what)| what).as_deref(),
        Some("function_trace_call"),
        "{found}"
    );
    if entry != 0 {
        // A dump does not say what was ours.
        let mut expected = expected;
        expected[3].1 = "unknown".to_owned();
        assert_eq!(who(&dumped(&guest, &file)?), expected);
    }

    let id = change["id"].to_string();
    guest.stillpoint(&["text", "revert", &id])?.ok()?;
    guest.sh(&format!(
        "cd {TRACING} && echo nop > current_tracer && echo > set_ftrace_filter && \
         echo 0 > events/kprobes/enable && echo > kprobe_events"
    ))?;
    clean(&live(&guest)?);
    assert_eq!(guest.complaints()?, "");
    Ok(())
}

#[test]
fn text_of_6_12_is_explained() -> TestResult {
    on_kvm(|| explains("6.12", 4))
}

#[test]
fn text_of_6_1_is_explained() -> TestResult {
    on_kvm(|| explains("6.1", 0))
}

/// One CPU, and other choices of the boot: no lock prefixes, plain returns and calls.
#[test]
fn text_without_mitigations_is_explained() -> TestResult {
    on_kvm(|| {
        let boot = Guest::boot("6.12").memory("160M");
        let guest = boot.cmdline("mitigations=off preempt=full").start()?;
        let text = live(&guest)?;
        clean(&text);
        for class in ["smp-lock", "retpoline"] {
            assert_ne!(text["sites"][class]["changed"], 0, "{class}: {text}");
        }
        Ok(())
    })
}

#[test]
fn a_kernel_says_what_can_be_patched() -> TestResult {
    stillpoint_tests::on_host(|| {
        let file = kernel("6.12").join("vmlinuz").display().to_string();
        let answer = parsed(&Ran::stillpoint(&["inspect", &file, "--json"])?.ok()?)?;
        assert_eq!(
            (&answer["what"], &answer["kind"]),
            (&json!("kernel"), &json!("bzImage"))
        );
        assert!(
            answer["patching"]["patchable"].as_u64() > Some(30_000),
            "{answer}"
        );
        let function = |name| {
            let said = Ran::stillpoint(&["inspect", &file, "--function", name, "--json"])?.ok()?;
            Ok::<_, Failure>(parsed(&said)?["functions"][0]["refused"].clone())
        };
        assert_eq!(function("version_proc_show")?, Value::Null);
        let refused = function("exc_page_fault")?;
        assert!(
            refused.as_str().is_some_and(|why| why.contains("noinstr")),
            "{refused}"
        );

        let ran = Ran::stillpoint(&["inspect", "/etc/hostname"])?;
        assert_eq!(ran.status, 1, "{ran:?}");
        Ok(())
    })
}

/// The same on the other series.
#[cfg(feature = "full")]
mod series {
    use stillpoint_tests::{Guest, TestResult};

    fn text(kernel: &str) -> TestResult {
        // Nops were then chosen by CPU model: refused, not guessed.
        if kernel.starts_with("5.10") {
            let guest = Guest::boot(kernel).start()?;
            let answer = guest.stillpoint(&["inspect", "--json"])?;
            assert_eq!(answer.status, 1, "{answer:?}");
            assert!(answer.stdout.contains("UnknownKernelLayout"), "{answer:?}");
            return Ok(());
        }
        // Without padding before functions there is nothing before the call to the tracer.
        let padded = !kernel.starts_with("5.10") && !kernel.starts_with("6.1-");
        crate::explains(kernel, if padded { 4 } else { 0 })
    }
    mod explained {
        stillpoint_tests::on_every_series!(super::text);
    }
}
