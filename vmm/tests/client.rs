//! The binary as a client of the server: what it prints and how it exits.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod common;

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{eventually, start};
use serde_json::{Value, json};
use vmm::machine::{Event, ShutdownCause};

fn stillpoint(control: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_stillpoint"))
        .arg("--control")
        .arg(control)
        .args(words)
        .output()
        .unwrap()
}

fn printed(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn refused(output: &Output) -> String {
    assert!(output.stdout.is_empty(), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn people_read_words_and_programs_read_json() {
    let server = start();
    let run = |words: &[&str]| printed(&stillpoint(&server.path, words));
    assert_eq!(run(&["status"]), "running\n");
    assert_eq!(run(&["pause"]), "paused within 77 µs\n");
    assert_eq!(run(&["pause"]), "was paused already\n");
    assert_eq!(run(&["status"]), "paused\n");
    assert_eq!(run(&["resume"]), "running again after 4.321 ms\n");
    assert_eq!(
        run(&["cpus"]),
        "VCPU  THREAD  STATE    MODE    AT             TASK\n\
         0     4242    running  kernel  func+0x1/0x20  sh (pid 7)\n"
    );
    assert_eq!(run(&["powerdown"]), "power button pressed\n");
    let json = |words: &[&str]| -> Value { serde_json::from_str(&run(words)).unwrap() };
    assert_eq!(json(&["status", "--json"])["status"], "running");
    assert_eq!(json(&["--json", "pause"]), json!({"to-stopped-us": 77}));
    assert_eq!(json(&["resume", "--json"]), json!({"stalled-us": 4321}));
    assert_eq!(json(&["cpus", "--json"])[0]["cpu-index"], 0);
}

#[test]
fn a_dump_is_written_once_and_not_half() {
    let server = start();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("guest.core");
    let file = path.to_str().unwrap();
    let text = printed(&stillpoint(&server.path, &["dump", file]));
    assert!(
        text.ends_with("5 MiB of guest memory; the guest stood still for 1.234 ms\n"),
        "{text}"
    );
    assert!(path.metadata().unwrap().len() > 5 << 20);

    let again = stillpoint(&server.path, &["dump", file]);
    assert_eq!(again.status.code(), Some(1));
    assert!(refused(&again).contains("File exists"));

    let part = directory.path().join("part");
    let words = [
        "dump",
        part.to_str().unwrap(),
        "--begin",
        "0x500000",
        "--length",
        "4096",
    ];
    let nowhere = stillpoint(&server.path, &words);
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(
        refused(&nowhere).contains("no guest RAM there"),
        "{nowhere:?}"
    );
    assert!(!part.exists());
}

#[test]
fn errors_say_what_to_do_and_how_bad_it_was() {
    let server = start();
    let directory = tempfile::tempdir().unwrap();
    let nothing = stillpoint(&directory.path().join("vm.sock"), &["status"]);
    assert_eq!(nothing.status.code(), Some(1));
    assert!(refused(&nothing).contains("there is no such socket"));

    let stale = directory.path().join("stale");
    drop(UnixListener::bind(&stale));
    let output = stillpoint(&stale, &["status"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(refused(&output).contains("nobody listens there"));

    let output = Command::new(env!("CARGO_BIN_EXE_stillpoint"))
        .arg("status")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(refused(&output).contains("--control"));
    let output = stillpoint(&server.path, &["frobnicate"]);
    assert_eq!(output.status.code(), Some(2));

    let output = stillpoint(
        &server.path,
        &["text", "patch", "f", "--expect", "90", "--write", "cc"],
    );
    assert_eq!(output.status.code(), Some(1));
    assert!(refused(&output).contains("CommandNotFound"));
    let output = stillpoint(&server.path, &["text", "list", "--json"]);
    let error: Value = serde_json::from_str(&refused(&output)).unwrap();
    assert_eq!(error["error"]["class"], "CommandNotFound");

    *server.host.slowness.lock().unwrap() = Duration::from_secs(60);
    let output = stillpoint(&server.path, &["pause", "--deadline", "20ms"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(refused(&output).contains("vCPU 1 did not stop"));
}

#[test]
fn events_are_printed_until_the_end() {
    let server = start();
    let mut child = Command::new(env!("CARGO_BIN_EXE_stillpoint"))
        .args(["--json", "events", "-c"])
        .arg(&server.path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    // Whether it has subscribed cannot be seen from here: keep telling until it prints something.
    let seen = AtomicBool::new(false);
    let first = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !seen.load(Ordering::Relaxed) {
                server.host.announce(&Event::Own {
                    name: "TICK",
                    data: json!({}),
                });
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let first = next();
        seen.store(true, Ordering::Relaxed);
        first
    });
    assert_eq!(first["event"], "TICK");
    server
        .host
        .announce(&Event::Shutdown(ShutdownCause::GuestShutdown));
    server.server.finish();
    let last = std::iter::from_fn(|| Some(next())).find(|e| e["event"] != "TICK");
    assert_eq!(last.unwrap()["data"]["reason"], "guest-shutdown");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn quitting_waits_for_the_end() {
    let server = start();
    let child = Command::new(env!("CARGO_BIN_EXE_stillpoint"))
        .args(["quit", "-c"])
        .arg(&server.path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut child = child;
    eventually("asked", || server.host.quits.load(Ordering::Relaxed) == 1);
    std::thread::sleep(Duration::from_millis(100));
    assert!(child.try_wait().unwrap().is_none(), "it has not ended yet");
    server.server.finish();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(output.stdout, b"ended\n");
}
