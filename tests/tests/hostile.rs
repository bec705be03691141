//! Bad input at the control socket: the guest and the other clients notice nothing.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stillpoint_tests::{Failure, Guest, Qmp, Ran, SOON, TestResult, on_kvm, stillpoint};

fn connect(guest: &Guest) -> Result<UnixStream, Failure> {
    let stream = UnixStream::connect(guest.socket())?;
    stream.set_read_timeout(Some(SOON))?;
    stream.set_write_timeout(Some(SOON))?;
    Ok(stream)
}

/// Reads until a line with an `error` member, or the end of the connection.
fn error_or_end(mut stream: &UnixStream) -> Result<Option<Value>, Failure> {
    let mut text = Vec::new();
    let mut bytes = [0; 4096];
    loop {
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            let value: Value = serde_json::from_slice(&line)?;
            if value.get("error").is_some() {
                return Ok(Some(value));
            }
        }
        match stream.read(&mut bytes) {
            Ok(0) => return Ok(None),
            Ok(n) => text.extend_from_slice(bytes.get(..n).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The guest answers, and so does the socket, to a new client and to this old one.
fn all_is_well(guest: &Guest, old: &mut Qmp) -> TestResult {
    assert_eq!(guest.sh("echo alive")?.trim(), "alive");
    for qmp in [old, &mut guest.control()?] {
        let status = qmp.execute("query-status", json!({}))?;
        assert_eq!(status.get("running"), Some(&json!(true)), "{status}");
    }
    Ok(())
}

#[test]
fn bad_input_gets_an_error_or_the_door() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").start()?;
        let mut old = guest.control()?;
        let before = guest.resident()?;
        let negotiate = br#"{"execute":"qmp_capabilities"}"#;
        let nested = [vec![b'['; 10_000], vec![b']'; 10_000]].concat();
        let inputs: [&[u8]; 10] = [
            b"{\"execute\": broken}\n",
            b"\xff\xfe\x80{}\n",
            b"]\n",
            b"7\n",
            br#"{"execute":7}"#,
            br#"{"execute":"no-such-command"}"#,
            br#"{"execute":"query-status","arguments":[1]}"#,
            br#"{"execute":"query-status","arguments":{"what":1}}"#,
            br#"{"execute":"query-status","extra":1}"#,
            &nested,
        ];
        for input in inputs {
            let mut stream = connect(&guest)?;
            stream.write_all(negotiate)?;
            // The server may hang up in the middle.
            let _ = stream.write_all(input);
            let start =
                String::from_utf8_lossy(input.get(..40.min(input.len())).unwrap_or_default());
            let error = error_or_end(&stream)?;
            if let Some(error) = &error {
                let class = error.pointer("/error/class").and_then(Value::as_str);
                let desc = error.pointer("/error/desc").and_then(Value::as_str);
                assert!(
                    class.is_some() && desc.is_some_and(|d| !d.is_empty()),
                    "{start}: {error}"
                );
            }
        }
        all_is_well(&guest, &mut old)?;

        // A line of 100 MB: refused long before it is whole.
        let mut stream = connect(&guest)?;
        stream.write_all(negotiate)?;
        stream.write_all(b"{\"execute\":\"")?;
        let part = vec![b'x'; 1 << 20];
        let mut sent = 0;
        while sent < 100 && stream.write_all(&part).is_ok() {
            sent += 1;
        }
        let _ = error_or_end(&stream)?;
        all_is_well(&guest, &mut old)?;
        let grown = guest.resident()?.saturating_sub(before);
        assert!(grown < 48 << 10, "grown by {grown} KiB");
        Ok(())
    })
}

#[test]
fn clients_that_are_silent_deaf_or_many() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").cpus(2).start()?;
        let mut old = guest.control()?;
        let before = guest.resident()?;

        let silent: Vec<UnixStream> = (0..200).filter_map(|_| connect(&guest).ok()).collect();
        assert_eq!(silent.len(), 200);
        // How many of them are served is up to the server; others are turned away with a word.
        let begun = Instant::now();
        let status = old.execute("query-status", json!({}))?;
        assert!(begun.elapsed() < SOON, "{status}");
        drop(silent);
        all_is_well(&guest, &mut old)?;

        // Asks and asks and never reads.
        let mut deaf = connect(&guest)?;
        deaf.set_write_timeout(Some(Duration::from_secs(2)))?;
        deaf.write_all(br#"{"execute":"qmp_capabilities"}"#)?;
        let question = br#"{"execute":"query-commands"}"#.repeat(1000);
        for _ in 0..20 {
            if deaf.write_all(&question).is_err() {
                break;
            }
        }
        all_is_well(&guest, &mut old)?;
        let grown = guest.resident()?.saturating_sub(before);
        assert!(grown < 48 << 10, "grown by {grown} KiB");
        Ok(())
    })
}

#[test]
fn a_client_that_is_killed_in_the_middle_of_a_dump() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").cpus(2).memory("512M").start()?;
        let mut old = guest.control()?;
        let path = guest.dir().join("core");
        let mut client = Command::new(stillpoint()?)
            .arg("-c")
            .arg(guest.socket())
            .arg("dump")
            .arg(&path)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let begun = Instant::now();
        while std::fs::metadata(&path).map_or(0, |meta| meta.len()) < 1 << 20 {
            assert!(begun.elapsed() < SOON, "no dump");
            std::thread::sleep(Duration::from_millis(1));
        }
        client.kill()?;
        client.wait()?;
        all_is_well(&guest, &mut old)?;
        a_stop_that_is_waited_for(&guest, &mut old)
    })
}

/// While one client's dump stands still and another waits for it, a third has its answer.
fn a_stop_that_is_waited_for(guest: &Guest, old: &mut Qmp) -> TestResult {
    old.execute("query-text", json!({}))?;
    let path = guest.dir().join("fifo");
    let made = Command::new("mkfifo").arg(&path).status()?;
    assert!(made.success());
    // Both ends, so that the dump can begin, and stands still when the pipe is full.
    let reader = File::options().read(true).write(true).open(&path)?;
    let dump = json!({"paging": false, "protocol": format!("file:{}", path.display())});
    let mut dumping = connect(guest)?;
    let mut waiting = connect(guest)?;
    for (stream, command, arguments) in [
        (&mut dumping, "dump-guest-memory", dump),
        (&mut waiting, "query-tasks", json!({"deadline": "5m"})),
    ] {
        let request = json!({"execute": command, "arguments": arguments});
        stream.write_all(br#"{"execute":"qmp_capabilities"}"#)?;
        stream.write_all(request.to_string().as_bytes())?;
        std::thread::sleep(Duration::from_millis(300));
    }
    assert_eq!(
        old.execute("query-dump", json!({}))?["status"],
        json!("active")
    );
    old.execute("query-text", json!({}))?;
    assert_eq!(
        old.execute("query-dump", json!({}))?["status"],
        json!("active"),
        "the answer came when the dump was over"
    );
    drop((dumping, waiting, reader));
    all_is_well(guest, old)
}

#[test]
fn only_its_owner_may_use_the_socket() -> TestResult {
    on_kvm(|| {
        let guest = Guest::boot("6.12").start()?;
        let mut old = guest.control()?;
        let mode = std::fs::metadata(guest.socket())?.permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // Even where the file would let another user in, the server does not.
        std::fs::set_permissions(guest.socket(), PermissionsExt::from_mode(0o666))?;
        std::fs::set_permissions(guest.dir(), PermissionsExt::from_mode(0o755))?;
        let ours = stillpoint()?;
        let copy = guest.dir().join("client");
        std::fs::copy(&ours, &copy)?;
        let mut other = Command::new("setpriv");
        other
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
            .arg(&copy)
            .arg("-c")
            .arg(guest.socket())
            .arg("status");
        let ran = Ran::of(&mut other)?;
        assert_eq!(ran.status, 1, "{ran:?}");
        assert!(ran.stdout.is_empty(), "{ran:?}");
        all_is_well(&guest, &mut old)
    })
}
