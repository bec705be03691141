//! A machine that is none, the real server on a real socket before it, and a client.

#![allow(
    dead_code,
    clippy::panic,
    reason = "each test program uses a part of this, and a failed test panics"
)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use patcher::guest::{
    BlockKind, Gpa, GuestMemory, Gva, MemoryError, RamRange, StoppedGuest, Vcpu, VcpuRegisters,
};
use serde_json::{Value, json};
use vmm::control::{ControlServer, ControlSocket, Host, StoppedHost, StoppedWork, command};
use vmm::machine::{
    CpuInfo, CpuState, Event, EventSink, HoldInfo, RamRegion, Resumed, RunState, StopError,
    StopTimes,
};

/// Below the hole of the 32-bit address space, and above it.
pub(crate) const LOW: u64 = 4 << 20;
pub(crate) const HIGH_START: u64 = 4 << 30;
pub(crate) const HIGH: u64 = 1 << 20;

struct Stopping {
    by_client: bool,
    by_work: usize,
}

pub(crate) struct FakeHost {
    low: Vec<u8>,
    high: Vec<u8>,
    state: Mutex<Stopping>,
    resumed: Condvar,
    sinks: Mutex<Vec<EventSink>>,
    vcpus: Vec<Vcpu>,
    /// How long a stop takes.
    pub(crate) slowness: Mutex<Duration>,
    pub(crate) quits: AtomicUsize,
    pub(crate) panics: AtomicBool,
}

fn pattern(start: u64, len: u64) -> Vec<u8> {
    // Some pages full, most empty.
    (0..len)
        .map(|at| {
            let page = (start + at) >> 12;
            let byte = (at % 251 + 1).try_into().unwrap_or(1);
            if page % 8 == 3 { byte } else { 0 }
        })
        .collect()
}

impl FakeHost {
    pub(crate) fn new(cpus: u32) -> Arc<Self> {
        let vcpus = (0..cpus)
            .map(|index| Vcpu {
                index,
                activity: patcher::guest::Activity::Running,
                registers: VcpuRegisters::default(),
                nested: false,
                reinjects: false,
            })
            .collect();
        Arc::new(Self {
            low: pattern(0, LOW),
            high: pattern(HIGH_START, HIGH),
            state: Mutex::new(Stopping {
                by_client: false,
                by_work: 0,
            }),
            resumed: Condvar::new(),
            sinks: Mutex::default(),
            vcpus,
            slowness: Mutex::new(Duration::ZERO),
            quits: AtomicUsize::new(0),
            panics: AtomicBool::new(false),
        })
    }

    pub(crate) fn announce(&self, event: &Event) {
        for sink in self.sinks.lock().unwrap().iter() {
            sink(event);
        }
    }

    pub(crate) fn bytes(&self, at: Gpa, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read_ram(at, &mut bytes).unwrap();
        bytes
    }

    fn read_ram(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        let len = into.len() as u64;
        let wrong = MemoryError::OutOfRange { at, len };
        let (ram, offset) = match at.0.checked_sub(HIGH_START) {
            Some(offset) => (&self.high, offset),
            None => (&self.low, at.0),
        };
        let from = usize::try_from(offset).map_err(|_| wrong.clone())?;
        let end = from.checked_add(into.len()).ok_or(wrong.clone())?;
        into.copy_from_slice(ram.get(from..end).ok_or(wrong)?);
        Ok(())
    }

    /// Waits until nothing holds the guest, and says whether it came to that.
    pub(crate) fn runs_within(&self, limit: Duration) -> bool {
        let state = self.state.lock().unwrap();
        let stopped = |s: &mut Stopping| s.by_client || s.by_work > 0;
        let (state, waited) = self
            .resumed
            .wait_timeout_while(state, limit, stopped)
            .unwrap();
        drop(state);
        !waited.timed_out()
    }

    fn nap(&self) {
        let time = *self.slowness.lock().unwrap();
        std::thread::sleep(time);
    }
}

impl Host for FakeHost {
    fn run_state(&self) -> RunState {
        assert!(!self.panics.load(Ordering::Relaxed), "on purpose");
        let state = self.state.lock().unwrap();
        if state.by_client {
            RunState::Paused
        } else {
            RunState::Running
        }
    }

    fn stop(&self, deadline: Duration) -> Result<StopTimes, StopError> {
        let slowness = *self.slowness.lock().unwrap();
        if slowness > deadline {
            std::thread::sleep(deadline);
            return Err(StopError::Deadline {
                vcpu: 1,
                waited: deadline,
            });
        }
        self.nap();
        let was = std::mem::replace(&mut self.state.lock().unwrap().by_client, true);
        if was {
            return Ok(StopTimes::default());
        }
        self.announce(&Event::Stop);
        Ok(StopTimes {
            to_stopped: Duration::from_micros(77),
            stalled: Duration::ZERO,
        })
    }

    fn cont(&self) -> Result<Resumed, StopError> {
        let was = std::mem::replace(&mut self.state.lock().unwrap().by_client, false);
        if was {
            self.announce(&Event::Resume);
            self.resumed.notify_all();
            return Ok(Resumed::after(Duration::from_micros(4321)));
        }
        Ok(Resumed::after(Duration::ZERO))
    }

    fn quit(&self) {
        self.quits.fetch_add(1, Ordering::Relaxed);
    }

    fn power_button(&self) {
        self.announce(&Event::Powerdown);
    }

    fn reset(&self) {
        self.announce(&Event::Reset(vmm::machine::ResetCause::HostQmpSystemReset));
    }

    fn cpus(&self) -> Vec<CpuInfo> {
        let one = |vcpu: &Vcpu| CpuInfo {
            index: vcpu.index,
            thread_id: 4242,
        };
        self.vcpus.iter().map(one).collect()
    }

    fn holds(&self) -> Vec<HoldInfo> {
        Vec::new()
    }

    fn regions(&self) -> Vec<RamRegion> {
        let region = |start, ram: &Vec<u8>| RamRegion {
            start: Gpa(start),
            len: ram.len() as u64,
            host: ram.as_ptr() as u64,
        };
        vec![region(0, &self.low), region(HIGH_START, &self.high)]
    }

    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.read_ram(at, into)
    }

    fn with_stopped(
        &self,
        _deadline: Duration,
        work: StoppedWork<'_>,
    ) -> Result<StopTimes, StopError> {
        self.state.lock().unwrap().by_work += 1;
        self.nap();
        work(&mut FakeStopped(self));
        self.state.lock().unwrap().by_work -= 1;
        self.resumed.notify_all();
        Ok(StopTimes {
            to_stopped: Duration::from_micros(55),
            stalled: Duration::from_micros(1234),
        })
    }

    fn subscribe(&self, sink: EventSink) {
        self.sinks.lock().unwrap().push(sink);
    }
}

struct FakeStopped<'a>(&'a FakeHost);

impl GuestMemory for FakeStopped<'_> {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.0.read_ram(at, into)
    }

    fn ram(&self) -> Vec<RamRange> {
        let range = |region: RamRegion| RamRange {
            start: region.start,
            len: region.len,
        };
        self.0.regions().into_iter().map(range).collect()
    }
}

impl StoppedGuest for FakeStopped<'_> {
    fn vcpus(&self) -> &[Vcpu] {
        &self.0.vcpus
    }

    fn write(&mut self, _at: Gpa, _bytes: &[u8]) -> Result<(), MemoryError> {
        Err(MemoryError::ReadOnly)
    }

    fn add_block(&mut self, _len: u64, _kind: BlockKind) -> Result<Gpa, MemoryError> {
        Err(MemoryError::ReadOnly)
    }

    fn remove_block(&mut self, _at: Gpa) -> Result<(), MemoryError> {
        Err(MemoryError::ReadOnly)
    }

    fn set_rip(&mut self, _vcpu: u32, _to: Gva) -> Result<(), MemoryError> {
        Err(MemoryError::ReadOnly)
    }
}

impl StoppedHost for FakeStopped<'_> {
    fn cpu_state(&self, index: u32) -> Result<CpuState, StopError> {
        let mut state = CpuState::default();
        state.regs.rip = 0xffff_ffff_8100_0000 + u64::from(index);
        Ok(state)
    }
}

/// The server with its machine, and the directory that its socket is in.
pub(crate) struct Server {
    pub(crate) host: Arc<FakeHost>,
    pub(crate) server: ControlServer,
    pub(crate) path: PathBuf,
    _directory: tempfile::TempDir,
}

pub(crate) const VMCOREINFO: &str = "OSRELEASE=6.1.0-test\nKERNELOFFSET=1c000000\n";

pub(crate) fn start() -> Server {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.sock");
    let host = FakeHost::new(2);
    let mut registry = command::standard(Arc::new(|| {
        Some(Box::new(|_| Some(VMCOREINFO.as_bytes().to_vec())))
    }));
    // What is told of a guest's kernel, without one.
    registry.slow("query-vcpus", |_, _: command::NoArguments| {
        Ok(json!([{
            "cpu-index": 0, "thread-id": 4242, "activity": "running", "cpl": 0,
            "rip": "0x1", "symbol": "func+0x1/0x20", "pid": 7, "comm": "sh",
        }]))
    });
    let socket = ControlSocket::bind(&path).unwrap();
    let server = socket
        .serve(Arc::clone(&host) as Arc<dyn Host>, registry)
        .unwrap();
    Server {
        host,
        server,
        path,
        _directory: directory,
    }
}

impl Server {
    /// A client that has negotiated.
    pub(crate) fn client(&self) -> Client {
        let mut client = Client::connect(&self.path);
        assert!(client.receive()["QMP"].is_object());
        assert_eq!(client.ask("qmp_capabilities"), json!({}));
        client
    }
}

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    lines: BufReader<UnixStream>,
    /// Events that came while something else was waited for.
    pub(crate) events: Vec<Value>,
}

const PATIENCE: Duration = Duration::from_secs(20);

impl Client {
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self {
            lines: BufReader::new(stream.try_clone().unwrap()),
            stream,
            events: Vec::new(),
        }
    }

    pub(crate) fn send(&mut self, text: impl AsRef<[u8]>) {
        self.stream.write_all(text.as_ref()).unwrap();
    }

    /// The next line; `Null` at the end.
    pub(crate) fn receive(&mut self) -> Value {
        let mut line = String::new();
        if self.lines.read_line(&mut line).unwrap_or(0) == 0 {
            return Value::Null;
        }
        assert!(line.ends_with("\r\n"), "{line:?}");
        serde_json::from_str(&line).unwrap()
    }

    /// The next line that is no event.
    pub(crate) fn reply(&mut self) -> Value {
        loop {
            let message = self.receive();
            if message.get("event").is_none() {
                return message;
            }
            self.events.push(message);
        }
    }

    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        self.send(json!({"execute": command, "arguments": arguments}).to_string());
        let reply = self.reply();
        match reply.get("return") {
            Some(value) => Ok(value.clone()),
            None => Err(reply["error"]["desc"]
                .as_str()
                .unwrap_or("closed")
                .to_owned()),
        }
    }

    pub(crate) fn ask(&mut self, command: &str) -> Value {
        self.execute(command, &json!({}))
            .unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    pub(crate) fn monitor(&mut self, line: &str) -> String {
        let answer = self.execute("human-monitor-command", &json!({ "command-line": line }));
        answer.unwrap().as_str().unwrap().to_owned()
    }

    /// Waits for an event of this name.
    pub(crate) fn event(&mut self, name: &str) -> Value {
        loop {
            if let Some(at) = self.events.iter().position(|e| e["event"] == name) {
                return self.events.remove(at);
            }
            let message = self.receive();
            assert!(
                message.get("event").is_some(),
                "{message} instead of {name}"
            );
            self.events.push(message);
        }
    }
}

/// First word of an error's description.
pub(crate) fn reason<T>(result: Result<T, String>) -> String {
    match result {
        Ok(_) => "no error".to_owned(),
        Err(text) => text.split(':').next().unwrap_or_default().to_owned(),
    }
}

/// Tries again and again for a while.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{what}: it never came to that");
        std::thread::sleep(Duration::from_millis(5));
    }
}
