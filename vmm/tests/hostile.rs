//! The control socket as hostile and broken clients see it: each gets a clear error or is dropped,
//! the others notice nothing, and memory stays bounded.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::{Client, Server, eventually, reason, start};
use serde_json::{Value, json};
use vmm::machine::Event;

/// Memory and descriptors are counted for the whole process: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// What `work` adds to the process's memory, and to that of the server in it.
fn growth_kib(work: impl FnOnce()) -> u64 {
    let before = resident_kib();
    work();
    resident_kib().saturating_sub(before)
}

fn is_alive(server: &Server) {
    let start = Instant::now();
    server.client().ask("query-status");
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn broken_json_gets_an_error_and_the_connection_lives() {
    let _alone = alone();
    let server = start();
    let mut client = server.client();
    for broken in [
        "garbage\n",
        "{\"execute\": nonsense}\n",
        "{\"execute\": \"query-status\"\n",
        "]]]]\n",
        "'single'\n",
        "{\"execute\": \"query-status\", }\n",
    ] {
        client.send(broken);
        client.send("{\"execute\":\"query-name\",\"id\":\"next\"}\n");
        let error = client.reply();
        assert_eq!(error["error"]["class"], "GenericError", "{broken}");
        assert!(
            error["error"]["desc"]
                .as_str()
                .unwrap()
                .starts_with("Syntax: "),
            "{error}"
        );
        assert_eq!(client.reply()["id"], "next", "{broken}");
    }
    for invalid in [
        &b"\xff\xfe\xfd"[..],
        b"{\"execute\":\"\xc3\x28\"}",
        b"\x00\x01\x02",
    ] {
        client.send(invalid);
        client.send("\n{\"execute\":\"query-name\",\"id\":\"next\"}");
        assert!(
            client.reply()["error"].is_object(),
            "{}",
            invalid.escape_ascii()
        );
        assert_eq!(client.reply()["id"], "next", "{}", invalid.escape_ascii());
    }
}

#[test]
fn a_line_of_100_megabytes_costs_no_memory() {
    let _alone = alone();
    let server = start();
    let mut client = server.client();
    let grown = growth_kib(|| {
        let piece = vec![b'x'; 1 << 20];
        client.send("{\"execute\":\"");
        for _ in 0..100 {
            client.send(&piece);
        }
        client.send("\"}\n{\"execute\":\"query-name\",\"id\":1}");
        let error = client.reply();
        assert_eq!(
            reason::<()>(Err(error["error"]["desc"].as_str().unwrap().into())),
            "TooLarge"
        );
        assert_eq!(client.reply()["id"], 1);
    });
    assert!(grown < 8 << 10, "{grown} KiB more");
    is_alive(&server);
}

#[test]
fn ten_thousand_levels_of_nesting_are_refused() {
    let _alone = alone();
    let server = start();
    let mut client = server.client();
    for open in ["[", "{\"a\":", "[[{\"execute\":"] {
        client.send(open.repeat(10_000));
        client.send("\n{\"execute\":\"query-name\",\"id\":1}");
        let error = client.reply();
        assert!(
            error["error"]["desc"]
                .as_str()
                .unwrap()
                .starts_with("TooLarge: "),
            "{error}"
        );
        assert_eq!(client.reply()["id"], 1);
    }
}

#[test]
fn unfinished_requests_of_many_clients_are_bounded() {
    let _alone = alone();
    let server = start();
    let piece = vec![b'x'; 1000 << 10];
    let mut refused = 0;
    let grown = growth_kib(|| {
        let mut clients: Vec<Client> = (0..60).map(|_| server.client()).collect();
        for client in &mut clients {
            client.send("{\"execute\":\"");
            client.send(&piece);
        }
        is_alive(&server);
        for client in &mut clients {
            client.send("\"}\n");
            let answer = client.reply();
            let text = answer["error"]["desc"].as_str().unwrap();
            if text.starts_with("TooLarge: clients") {
                refused += 1;
            } else {
                assert!(text.starts_with("CommandNotFound: "), "{text}");
            }
        }
    });
    assert!(refused > 40, "only {refused} of 60 MB were refused");
    assert!(grown < 24 << 10, "{grown} KiB more");
}

#[test]
fn silent_clients_disturb_nobody() {
    let _alone = alone();
    let server = start();
    let silent: Vec<UnixStream> = (0..50)
        .map(|_| UnixStream::connect(&server.path).unwrap())
        .collect();
    let mut half = Client::connect(&server.path);
    half.send("{\"exec");
    is_alive(&server);
    drop(silent);
}

#[test]
fn a_client_that_never_reads_is_dropped_and_its_memory_bounded() {
    let _alone = alone();
    let server = start();
    let mut witness = server.client();
    let mut deaf = server.client();
    deaf.stream.set_nonblocking(true).unwrap();
    let grown = growth_kib(|| {
        // Replies: no further request is taken once enough of them wait.
        let request = "{\"execute\":\"query-commands\"}".repeat(1000);
        let mut sent = 0;
        while sent < 64 << 20 {
            match deaf.stream.write(request.as_bytes()) {
                Ok(count) => sent += count,
                Err(_) => break,
            }
        }
        assert!(
            sent < 4 << 20,
            "{sent} bytes of requests were taken without an answer read"
        );
        is_alive(&server);
        // Events: whoever lets too many pile up goes.
        for _ in 0..20_000 {
            server.host.announce(&Event::Powerdown);
            std::thread::yield_now();
        }
        is_alive(&server);
    });
    assert!(grown < 8 << 10, "{grown} KiB more");
    // The one that reads has all that it was there for.
    let told = std::iter::from_fn(|| match witness.receive() {
        Value::Null => None,
        message => Some(message),
    });
    assert!(told.take(500).all(|m| m["event"] == "POWERDOWN"));
    // The other is gone: reading ends.
    deaf.stream.set_nonblocking(false).unwrap();
    let mut rest = vec![0; 1 << 16];
    let mut total = 0;
    while let Ok(count @ 1..) = deaf.stream.read(&mut rest) {
        total += count;
        assert!(total < 4 << 20);
    }
}

#[test]
fn two_hundred_clients_are_served_at_once() {
    let _alone = alone();
    let server = start();
    let mut clients = Vec::new();
    let grown = growth_kib(|| {
        clients.extend((0..200).map(|_| server.client()));
        for client in &mut clients {
            client.send(r#"{"execute":"query-status","id":1}{"execute":"stop","id":2}"#);
        }
        for client in &mut clients {
            assert_eq!(client.reply()["id"], 1);
            assert_eq!(client.reply()["id"], 2);
        }
    });
    assert!(
        grown < 24 << 10,
        "{grown} KiB more for 200 clients and as many threads"
    );
}

#[test]
fn too_many_clients_are_told_so() {
    let _alone = alone();
    let server = start();
    let mut clients: Vec<Client> = (0..300).map(|_| Client::connect(&server.path)).collect();
    let mut refused = 0;
    for client in &mut clients {
        let first = client.receive();
        if first["QMP"].is_object() {
            continue;
        }
        assert!(
            first["error"]["desc"]
                .as_str()
                .unwrap()
                .starts_with("TooMany: "),
            "{first}"
        );
        assert_eq!(client.receive(), Value::Null);
        refused += 1;
    }
    assert_eq!(refused, 300 - 256);
    drop(clients);
    eventually("room again", || {
        let mut client = Client::connect(&server.path);
        client.receive()["QMP"].is_object()
    });
}

#[test]
fn nothing_is_left_of_clients_that_were() {
    let _alone = alone();
    let server = start();
    is_alive(&server);
    let before = descriptors();
    let grown = growth_kib(|| {
        for round in 0..500 {
            let mut client = server.client();
            client.send(match round % 4 {
                0 => &b"{\"execute\":\"qu"[..],
                1 => b"{\"execute\":\"stop\"}",
                2 => b"\xff\xff\xff",
                _ => b"{\"execute\":\"query-commands\"}",
            });
        }
    });
    eventually("descriptors closed", || descriptors() <= before + 1);
    assert!(grown < 4 << 10, "{grown} KiB more");
    is_alive(&server);
}

#[test]
fn a_client_killed_in_the_middle_of_a_dump_frees_the_guest() {
    let _alone = alone();
    let server = start();
    let mut client = server.client();
    // A pipe that nobody reads: the dump cannot end.
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    pass(&mut client, &writer);
    client.send(
        json!({
            "execute": "dump-guest-memory",
            "arguments": {"paging": false, "protocol": "fd:pipe"},
        })
        .to_string(),
    );
    eventually("stopped", || !server.host.runs_within(Duration::ZERO));
    let mut other = server.client();
    assert_eq!(other.ask("query-dump")["status"], "active");
    drop(client);
    assert!(
        server.host.runs_within(Duration::from_secs(5)),
        "the guest is still stopped"
    );
    let failed = other.event("DUMP_COMPLETED");
    assert_eq!(failed["data"]["result"]["status"], "failed");
    drop((reader, writer));
}

fn pass(client: &mut Client, fd: &impl std::os::fd::AsFd) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    let text = br#"{"execute":"getfd","arguments":{"fdname":"pipe"}}"#;
    let fds = [fd.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let parts = [std::io::IoSlice::new(text)];
    rustix::net::sendmsg(&client.stream, &parts, &mut control, SendFlags::empty()).unwrap();
    assert_eq!(client.reply(), json!({"return": {}}));
}

#[test]
fn descriptors_that_are_passed_and_not_used_are_bounded() {
    let _alone = alone();
    let server = start();
    let before = descriptors();
    let null = std::fs::File::open("/dev/null").unwrap();
    let mut clients: Vec<Client> = (0..20).map(|_| server.client()).collect();
    for client in &mut clients {
        for n in 0..20 {
            use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
            use std::os::fd::AsFd;
            let fds = [null.as_fd(); 3];
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
            let text = format!(r#"{{"execute":"getfd","arguments":{{"fdname":"n{n}"}}}}"#);
            let parts = [std::io::IoSlice::new(text.as_bytes())];
            let flags = SendFlags::empty();
            rustix::net::sendmsg(&client.stream, &parts, &mut control, flags).unwrap();
            client.reply();
        }
    }
    // Two for each client are the connection's ends, two its reader here.
    let held = descriptors() - before - 3 * clients.len();
    assert!(held <= 64 + 2, "{held} are held");
    drop(clients);
    eventually("all closed", || descriptors() <= before + 2);
}

#[test]
fn the_guest_does_not_stand_still_for_a_descriptor_that_blocks() {
    let _alone = alone();
    let server = start();
    let mut client = server.client();
    let counter = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::empty()).unwrap();
    let terminal = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/ptmx")
        .unwrap();
    for fd in [&counter, &epoll, &terminal.into()] {
        pass(&mut client, fd);
        let begun = Instant::now();
        let arguments = json!({"paging": false, "protocol": "fd:pipe"});
        let refused = reason(client.execute("dump-guest-memory", &arguments));
        assert_eq!(refused, "InvalidArgument");
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
    assert!(server.host.runs_within(Duration::from_secs(5)));
}

#[test]
fn a_request_that_can_be_read_in_two_ways_is_not_carried_out() {
    let _alone = alone();
    let server = start();
    let mut client = server.client();
    client.send(r#"{"execute":"query-status","execute":"quit"}"#);
    let answer = client.reply();
    let desc = answer["error"]["desc"].as_str();
    assert!(
        desc.is_some_and(|desc| desc.contains("given twice")),
        "{answer}"
    );
    is_alive(&server);
    let quits = server.host.quits.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(quits, 0);
}

#[test]
fn a_client_of_another_user_does_not_get_in() {
    use std::os::unix::fs::PermissionsExt;
    let _alone = alone();
    let server = start();
    if !rustix::process::geteuid().is_root() {
        // Only root can become somebody else; here the test of the door itself tries it.
        is_alive(&server);
        return;
    }
    let as_nobody = || {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // Of this thread only, and the thread ends with it.
                let nobody = rustix::fs::Uid::from_raw(65_534);
                rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
                let mut stream = UnixStream::connect(&server.path)?;
                let mut line = String::new();
                stream.read_to_string(&mut line)?;
                Ok::<_, std::io::Error>(line)
            });
            thread.join().unwrap()
        })
    };
    let directory = server.path.parent().unwrap();
    let open_to_all = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    open_to_all(directory, 0o755);
    let closed = as_nobody().map_err(|error| error.kind());
    assert_eq!(
        closed,
        Err(std::io::ErrorKind::PermissionDenied),
        "by the socket's mode"
    );
    open_to_all(&server.path, 0o666);
    let line = as_nobody().unwrap();
    let message: Value = serde_json::from_str(&line).unwrap();
    let text = message["error"]["desc"].as_str().unwrap();
    assert!(text.starts_with("Refused: user 65534 "), "{text}");
    is_alive(&server);
}
