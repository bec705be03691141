//! The control socket as well-behaved clients see it.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod common;

use std::io::{IoSlice, Read, Seek};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::{Client, HIGH, HIGH_START, LOW, VMCOREINFO, eventually, reason, start};
use patcher::guest::Gpa;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};
use vmm::machine::{Event, ShutdownCause};

#[test]
fn standard_queries_have_their_shapes() {
    let server = start();
    let mut client = server.client();
    let commands = client.ask("query-commands");
    let names: Vec<&str> = commands
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["name"].as_str().unwrap())
        .collect();
    for name in [
        "qmp_capabilities",
        "query-commands",
        "query-version",
        "query-status",
        "query-cpus-fast",
        "query-target",
        "stop",
        "cont",
        "quit",
        "system_powerdown",
        "system_reset",
        "human-monitor-command",
        "getfd",
        "closefd",
        "dump-guest-memory",
        "query-dump",
        "events-enable",
    ] {
        assert!(names.contains(&name), "{name}");
    }
    // None of those without arguments is listed and then unknown.
    for name in names.iter().filter(|n| n.starts_with("query-")) {
        client.ask(name);
    }
    let version = client.ask("query-version");
    assert!(version["qemu"]["major"].is_u64());
    assert!(
        version["package"]
            .as_str()
            .unwrap()
            .starts_with("Stillpoint")
    );
    assert_eq!(client.ask("query-target"), json!({"arch": "x86_64"}));
    assert_eq!(
        client.ask("query-status"),
        json!({"status": "running", "singlestep": false, "running": true})
    );
    let cpus = client.ask("query-cpus-fast");
    assert_eq!(cpus.as_array().unwrap().len(), 2);
    assert_eq!(cpus[1]["cpu-index"], 1);
    assert_eq!(cpus[1]["thread-id"], 4242);
    assert_eq!(cpus[1]["target"], "x86_64");
    assert!(cpus[1]["props"]["core-id"].is_u64());
    assert_eq!(
        client.ask("query-dump"),
        json!({"status": "none", "completed": 0, "total": 0})
    );
}

#[test]
fn stopping_tells_everybody_before_it_answers_and_says_how_long_it_took() {
    let server = start();
    let (mut client, mut other) = (server.client(), server.client());
    client.send(r#"{"execute":"stop","id":1}"#);
    assert_eq!(client.receive()["event"], "STOP");
    assert_eq!(client.receive(), json!({"return": {}, "id": 1}));
    assert_eq!(other.receive()["event"], "STOP");
    assert_eq!(client.ask("query-status")["status"], "paused");
    assert_eq!(client.ask("stop"), json!({}), "twice is fine");
    client.send(r#"{"execute":"cont"}"#);
    assert_eq!(client.receive()["event"], "RESUME");
    assert_eq!(client.receive(), json!({"return": {}}));

    assert_eq!(client.ask("pause"), json!({"to-stopped-us": 77}));
    assert_eq!(client.ask("pause"), json!({"to-stopped-us": 0}));
    assert_eq!(client.ask("resume"), json!({"stalled-us": 4321}));
    assert_eq!(client.ask("resume"), json!({"stalled-us": 0}));
    assert_eq!(
        client.ask("query-stops"),
        json!([
            {"command": "pause", "to-stopped-us": 77, "stalled-us": 4321},
            {"command": "stop", "to-stopped-us": 77, "stalled-us": 4321}
        ])
    );
}

#[test]
fn what_a_command_causes_is_told_before_its_answer() {
    let server = start();
    let mut client = server.client();
    for (command, event) in [("system_powerdown", "POWERDOWN"), ("system_reset", "RESET")] {
        client.send(json!({ "execute": command }).to_string());
        assert_eq!(client.receive()["event"], event);
        assert_eq!(client.receive(), json!({"return": {}}));
    }
    assert_eq!(client.ask("quit"), json!({}));
    assert_eq!(server.host.quits.load(Ordering::Relaxed), 1);
}

#[test]
fn a_deadline_that_passes_is_said_so() {
    let server = start();
    let mut client = server.client();
    *server.host.slowness.lock().unwrap() = Duration::from_secs(60);
    let missed = client.execute("stop", &json!({"deadline": "20ms"}));
    assert!(
        missed.as_ref().is_err_and(|e| e.contains("vCPU 1")),
        "{missed:?}"
    );
    assert_eq!(reason(missed), "Deadline");
    assert_eq!(client.ask("query-status")["running"], true);
}

#[test]
fn a_command_that_waits_delays_nobody_else() {
    let server = start();
    let (mut slow, mut quick) = (server.client(), server.client());
    *server.host.slowness.lock().unwrap() = Duration::from_secs(2);
    let start = Instant::now();
    slow.send(r#"{"execute":"stop","id":"a"}{"execute":"query-status","id":"b"}"#);
    std::thread::sleep(Duration::from_millis(50));
    quick.ask("query-status");
    assert!(start.elapsed() < Duration::from_secs(1), "the other waited");
    assert_eq!(slow.reply()["id"], "a", "replies keep the order");
    assert_eq!(slow.reply(), {
        let status = json!({"status": "paused", "singlestep": false, "running": false});
        json!({"return": status, "id": "b"})
    });
}

#[test]
fn many_requests_in_one_packet_are_answered_in_order() {
    let server = start();
    let mut client = server.client();
    let mut stream = String::new();
    for id in 0..5000 {
        let command = ["query-status", "cont", "query-name", "nonsense"][id % 4];
        stream.push_str(&json!({"execute": command, "id": id}).to_string());
    }
    let mut writer = client.stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        use std::io::Write;
        writer.write_all(stream.as_bytes()).unwrap();
    });
    for id in 0..5000 {
        assert_eq!(client.reply()["id"], id);
    }
    sender.join().unwrap();
}

#[test]
fn mistakes_are_named() {
    let server = start();
    let mut client = server.client();
    for (command, arguments, expected) in [
        ("frobnicate", json!({}), "CommandNotFound"),
        ("query-status", json!({"x": 1}), "UnknownArgument"),
        (
            "dump-guest-memory",
            json!({"paging": false}),
            "MissingArgument",
        ),
        (
            "dump-guest-memory",
            json!({"paging": 0, "protocol": "fd:x"}),
            "WrongType",
        ),
        (
            "dump-guest-memory",
            json!({"paging": true, "protocol": "fd:x"}),
            "InvalidArgument",
        ),
        (
            "dump-guest-memory",
            json!({"paging": false, "protocol": "x"}),
            "InvalidArgument",
        ),
        (
            "dump-guest-memory",
            json!({"paging": false, "protocol": "fd:x"}),
            "NotFound",
        ),
        (
            "dump-guest-memory",
            json!({"paging": false, "protocol": "fd:x", "begin": 0}),
            "MissingArgument",
        ),
        (
            "dump-guest-memory",
            json!({"paging": false, "protocol": "fd:x", "begin": LOW, "length": 4096}),
            "InvalidArgument",
        ),
        (
            "dump-guest-memory",
            json!({"paging": false, "protocol": "fd:x", "begin": u64::MAX, "length": 2}),
            "InvalidArgument",
        ),
        (
            "dump-guest-memory",
            json!({"paging": false, "protocol": "file:/no/such/directory/dump"}),
            "Io",
        ),
        (
            "dump-guest-memory",
            json!({"paging": false, "protocol": "fd:x", "format": "zip"}),
            "InvalidArgument",
        ),
        ("getfd", json!({"fdname": "x"}), "NotFound"),
        ("closefd", json!({"fdname": "x"}), "NotFound"),
        ("stop", json!({"deadline": "soon"}), "InvalidArgument"),
        ("stop", json!({"deadline": true}), "WrongType"),
        (
            "human-monitor-command",
            json!({"command-line": ["x"]}),
            "WrongType",
        ),
        ("qmp_capabilities", json!({}), "Negotiation"),
    ] {
        let result = client.execute(command, &arguments);
        assert_eq!(reason(result), expected, "{command} {arguments}");
    }
    assert_eq!(client.ask("query-dump")["status"], "none", "none was begun");
}

#[test]
fn a_handler_that_panics_is_an_error_and_nothing_more() {
    let server = start();
    let mut client = server.client();
    server.host.panics.store(true, Ordering::Relaxed);
    for _ in 0..3 {
        assert_eq!(
            reason(client.execute("query-status", &json!({}))),
            "Internal"
        );
        let line = json!({"command-line": "info status"});
        assert_eq!(
            reason(client.execute("human-monitor-command", &line)),
            "Internal"
        );
    }
    server.host.panics.store(false, Ordering::Relaxed);
    client.ask("query-status");
}

#[test]
fn the_human_monitor_prints_what_tools_read() {
    let server = start();
    let mut client = server.client();
    assert_eq!(client.monitor("info status"), "VM status: running\r\n");
    assert!(client.monitor("info version").contains("Stillpoint"));
    let tree = client.monitor("info mtree -f");
    assert!(
        tree.starts_with("FlatView #0\r\n AS \"memory\", root: system\r\n"),
        "{tree}"
    );
    assert!(tree.contains("\r\n  0000000000000000-00000000003fffff (prio 0, ram): guest.ram\r\n"));
    assert!(tree.contains("\r\n  0000000100000000-00000001000fffff (prio 0, ram): guest.ram @"));

    let answer = client.monitor("gpa2hva 0x100000010");
    let host = answer
        .strip_prefix("Host virtual address for 0x100000010 (guest.ram) is 0x")
        .and_then(|rest| u64::from_str_radix(rest.trim_end(), 16).ok());
    let expected = {
        use vmm::control::Host;
        server.host.regions()[1].host + 0x10
    };
    assert_eq!(host, Some(expected), "{answer}");
    assert_eq!(
        client.monitor("gpa2hva 0x400000"),
        "No memory is mapped at address 0x400000\r\n"
    );

    let text = client.monitor("xp /20xb 0x3000");
    let lines: Vec<&str> = text.split("\r\n").collect();
    assert_eq!(
        lines[0],
        "0000000000003000: 0xf1 0xf2 0xf3 0xf4 0xf5 0xf6 0xf7 0xf8"
    );
    assert_eq!(lines[2].len(), "0000000000003010:".len() + 4 * 5);
    assert_eq!(lines[3], "");
    assert_eq!(
        client.monitor("xp /2xg 0x3000").lines().next(),
        Some("0000000000003000: 0xf8f7f6f5f4f3f2f1 0x0504030201fbfaf9")
    );
    assert_eq!(
        client.monitor("xp /8xb 0x400000"),
        "0000000000400000: Cannot access memory\r\n"
    );
    assert!(client.monitor("xp /9999999xb 0").contains("at most"));
    assert!(
        client
            .monitor("xp /2zz 0")
            .contains("invalid char in format: 'z'")
    );
    assert!(
        client
            .monitor("info registers")
            .contains("RIP=ffffffff81000000")
    );
    assert!(client.monitor("info cpus").contains("thread_id=4242"));
    assert_eq!(
        client.monitor("bogus thing"),
        "unknown command: 'bogus'\r\n"
    );

    // What qmp-shell -H takes apart for its completion.
    for line in client
        .monitor("help")
        .split("\r\n")
        .filter(|l| !l.is_empty())
    {
        assert!(
            line.split(' ').next().is_some_and(|w| !w.is_empty()),
            "{line}"
        );
    }
    for line in client
        .monitor("info")
        .split("\r\n")
        .filter(|l| !l.is_empty())
    {
        assert!(line.split_whitespace().count() > 1, "{line}");
    }
}

fn pass(client: &mut Client, name: &str, fd: impl AsFd) -> Value {
    let text = json!({"execute": "getfd", "arguments": {"fdname": name}}).to_string();
    let fds = [fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let parts = [IoSlice::new(text.as_bytes())];
    let flags = SendFlags::empty();
    let sent = rustix::net::sendmsg(&client.stream, &parts, &mut control, flags).unwrap();
    assert_eq!(sent, text.len());
    client.reply()
}

struct Core {
    loads: Vec<(u64, u64, u64)>,
    notes: Vec<(String, u32, Vec<u8>)>,
    bytes: Vec<u8>,
}

/// Reads a core file with a reader that is not ours.
fn read_core(bytes: Vec<u8>) -> Core {
    use object::read::elf::{FileHeader, ProgramHeader};
    let little = object::LittleEndian;
    let header = object::elf::FileHeader64::<object::LittleEndian>::parse(&*bytes).unwrap();
    assert_eq!(header.e_type(little), object::elf::ET_CORE);
    assert_eq!(header.e_machine(little), object::elf::EM_X86_64);
    let (mut loads, mut notes) = (Vec::new(), Vec::new());
    for segment in header.program_headers(little, &*bytes).unwrap() {
        if segment.p_type(little) == object::elf::PT_LOAD {
            loads.push((
                segment.p_paddr(little),
                segment.p_memsz(little),
                segment.p_offset(little),
            ));
            assert_eq!(segment.p_filesz(little), segment.p_memsz(little));
        }
        let mut found = segment.notes(little, &*bytes).unwrap();
        while let Some(note) = found.as_mut().and_then(|n| n.next().unwrap()) {
            notes.push((
                String::from_utf8_lossy(note.name()).into_owned(),
                note.n_type(little).0,
                note.desc().to_vec(),
            ));
        }
    }
    Core {
        loads,
        notes,
        bytes,
    }
}

impl Core {
    fn memory(&self, segment: usize) -> &[u8] {
        let (_, len, offset) = self.loads[segment];
        let (start, len) = (
            usize::try_from(offset).unwrap(),
            usize::try_from(len).unwrap(),
        );
        &self.bytes[start..start + len]
    }
}

#[test]
fn a_dump_to_a_passed_descriptor_holds_everything() {
    let server = start();
    let mut client = server.client();
    let mut file = tempfile::tempfile().unwrap();
    assert_eq!(pass(&mut client, "core", &file), json!({"return": {}}));
    let arguments = json!({"paging": false, "protocol": "fd:core"});
    assert_eq!(
        client.execute("dump-guest-memory", &arguments),
        Ok(json!({}))
    );
    let done = client.event("DUMP_COMPLETED");
    let total = LOW + HIGH;
    assert_eq!(
        done["data"]["result"],
        json!({"status": "completed", "completed": total, "total": total})
    );
    assert_eq!(client.ask("query-stops")[0]["command"], "dump-guest-memory");
    assert!(server.host.runs_within(Duration::ZERO));

    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    let core = read_core(bytes);
    let where_to = |n: usize| (core.loads[n].0, core.loads[n].1);
    assert_eq!((where_to(0), where_to(1)), ((0, LOW), (HIGH_START, HIGH)));
    assert_eq!(
        core.memory(0),
        server.host.bytes(Gpa(0), LOW.try_into().unwrap())
    );
    assert_eq!(
        core.memory(1),
        server.host.bytes(Gpa(HIGH_START), HIGH.try_into().unwrap())
    );
    let kinds: Vec<_> = core
        .notes
        .iter()
        .map(|(n, t, d)| (n.as_str(), *t, d.len()))
        .collect();
    assert_eq!(
        kinds,
        [
            ("CORE", 1, 336),
            ("CORE", 1, 336),
            ("QEMU", 0, 440),
            ("QEMU", 0, 440),
            ("VMCOREINFO", 0, VMCOREINFO.len())
        ]
    );
    assert_eq!(core.notes[4].2, VMCOREINFO.as_bytes());

    let blocks = rustix::fs::fstat(&file).unwrap().st_blocks;
    assert!(
        u64::try_from(blocks).unwrap() * 512 < total / 2,
        "most of memory is zero, but {blocks} blocks are used"
    );
    // It is used up, as in QEMU.
    assert_eq!(
        reason(client.execute("closefd", &json!({"fdname": "core"}))),
        "NotFound"
    );
}

#[test]
fn a_part_can_be_dumped_and_holes_do_not_let_old_contents_shine_through() {
    use std::io::Write;
    let server = start();
    let mut client = server.client();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![0xee; 3 << 20]).unwrap();
    file.rewind().unwrap();
    pass(&mut client, "core", &file);
    let (begin, length) = (0x2ffe_u64, 0x2004_u64);
    let arguments =
        json!({"paging": false, "protocol": "fd:core", "begin": begin, "length": length});
    assert_eq!(
        client.execute("dump-guest-memory", &arguments),
        Ok(json!({}))
    );
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    let core = read_core(bytes);
    assert_eq!(core.loads.len(), 1);
    assert_eq!((core.loads[0].0, core.loads[0].1), (begin, length));
    let expected = server.host.bytes(Gpa(begin), length.try_into().unwrap());
    assert_eq!(core.memory(0), expected);
}

#[test]
fn a_detached_dump_goes_on_by_itself() {
    let server = start();
    let mut client = server.client();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("core");
    *server.host.slowness.lock().unwrap() = Duration::from_millis(700);
    let arguments = json!({
        "paging": false, "detach": true, "format": "elf",
        "protocol": format!("file:{}", path.display()),
    });
    assert_eq!(
        client.execute("dump-guest-memory", &arguments),
        Ok(json!({}))
    );
    assert_eq!(client.ask("query-dump")["status"], "active");
    let second = client.execute("dump-guest-memory", &arguments);
    assert_eq!(reason(second), "Busy");
    drop(client);
    let mut other = server.client();
    eventually("completed", || path.metadata().is_ok_and(|m| m.len() > LOW));
    other.event("DUMP_COMPLETED");
    assert_eq!(other.ask("query-dump")["status"], "completed");
    use std::os::unix::fs::PermissionsExt;
    let mode = path.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "memory holds secrets");
    read_core(std::fs::read(&path).unwrap());
}

#[test]
fn a_dump_that_fails_says_so_and_the_guest_goes_on() {
    let server = start();
    let mut client = server.client();
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .unwrap();
    pass(&mut client, "full", &full);
    let arguments = json!({"paging": false, "protocol": "fd:full"});
    let result = client.execute("dump-guest-memory", &arguments);
    assert!(
        result.as_ref().is_err_and(|e| e.contains("No space left")),
        "{result:?}"
    );
    assert!(client.event("DUMP_COMPLETED")["data"]["error"].is_string());
    assert_eq!(client.ask("query-dump")["status"], "failed");

    let (reader, writer) = rustix::pipe::pipe().unwrap();
    drop(reader);
    pass(&mut client, "pipe", &writer);
    let arguments = json!({"paging": false, "protocol": "fd:pipe"});
    assert_eq!(
        reason(client.execute("dump-guest-memory", &arguments)),
        "Io"
    );

    let read_only = std::fs::File::open("/dev/null").unwrap();
    pass(&mut client, "null", &read_only);
    let arguments = json!({"paging": false, "protocol": "fd:null"});
    let result = client.execute("dump-guest-memory", &arguments);
    assert!(result.is_err_and(|e| e.contains("not open for writing")));
    assert!(server.host.runs_within(Duration::from_secs(5)));
}

#[test]
fn a_dump_through_a_pipe_arrives_whole() {
    let server = start();
    let mut client = server.client();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    pass(&mut client, "pipe", &writer);
    drop(writer);
    let received = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let mut reader = std::fs::File::from(reader);
        reader.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let arguments = json!({"paging": false, "protocol": "fd:pipe"});
    assert_eq!(
        client.execute("dump-guest-memory", &arguments),
        Ok(json!({}))
    );
    let core = read_core(received.join().unwrap());
    assert_eq!(
        core.memory(0),
        server.host.bytes(Gpa(0), LOW.try_into().unwrap())
    );
}

#[test]
fn events_of_our_own_go_to_those_who_asked() {
    let server = start();
    let (mut standard, mut ours) = (server.client(), server.client());
    ours.ask("events-enable");
    server.host.announce(&Event::Own {
        name: "TRAMPOLINE_FREED",
        data: json!({"id": 7}),
    });
    server
        .host
        .announce(&Event::GuestPanicked("Attempted to kill init!".into()));
    let freed = ours.event("TRAMPOLINE_FREED");
    assert_eq!(freed["data"], json!({"id": 7}));
    assert!(freed["timestamp"]["seconds"].is_u64() && freed["timestamp"]["microseconds"].is_u64());
    let panic = ours.event("KERNEL_PANIC");
    assert_eq!(panic["data"]["message"], "Attempted to kill init!");
    ours.event("GUEST_PANICKED");
    assert_eq!(
        standard.receive()["event"],
        "GUEST_PANICKED",
        "the first that it is told"
    );
}

#[test]
fn the_end_is_told_and_the_socket_goes_away() {
    let server = start();
    let mut client = server.client();
    assert_eq!(client.ask("quit"), json!({}));
    assert_eq!(server.host.quits.load(Ordering::Relaxed), 1);
    server
        .host
        .announce(&Event::Shutdown(ShutdownCause::HostQmpQuit));
    let path = server.path.clone();
    server.server.finish();
    let last = client.receive();
    assert_eq!(last["event"], "SHUTDOWN");
    assert_eq!(
        last["data"],
        json!({"guest": false, "reason": "host-qmp-quit"})
    );
    assert_eq!(client.receive(), Value::Null, "closed");
    assert!(!path.exists());
}

#[test]
fn no_part_of_a_dump_is_left_when_the_vmm_ends() {
    let server = start();
    let mut client = server.client();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("core");
    *server.host.slowness.lock().unwrap() = Duration::from_millis(200);
    let arguments = json!({
        "paging": false, "detach": true, "protocol": format!("file:{}", path.display()),
    });
    client.execute("dump-guest-memory", &arguments).unwrap();
    eventually("begun", || path.exists());
    server.server.finish();
    assert!(!path.exists());
}

#[test]
fn what_was_sent_before_hanging_up_is_still_done() {
    let server = start();
    let mut client = Client::connect(&server.path);
    client.send(r#"{"execute":"qmp_capabilities"}{"execute":"stop"}{"execute":"quit"}"#);
    drop(client);
    eventually("quit", || server.host.quits.load(Ordering::Relaxed) == 1);
    assert!(
        !server.host.runs_within(Duration::ZERO),
        "and the stop before it"
    );

    // Half-closed, as `socat` and `nc -N` do: the answers still come.
    let mut client = Client::connect(&server.path);
    client.send(r#"{"execute":"qmp_capabilities"}{"execute":"cont"}"#);
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(client.receive()["QMP"].is_object());
    assert_eq!(client.reply(), json!({"return": {}}));
    assert_eq!(client.reply(), json!({"return": {}}));
    assert_eq!(client.receive(), Value::Null);
}
