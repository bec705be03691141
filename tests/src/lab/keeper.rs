//! The host's process beside one machine: boots it, relays frames between client and agent, and
//! ends with it.
//!
//! Two threads, one for each direction, so that a command whose output nobody reads does not keep
//! its input from being delivered. The thread that reads from the agent also watches over it: a
//! machine that is silent for [`SILENCE`] seconds is lost, and so is one whose QEMU ends.
//!
//! A silent machine is poked every second. QEMU's emulation of VMRUN and #VMEXIT changes the pending
//! interrupts of its CPU without the lock that devices take (7.2: `cs->interrupt_request` in
//! target/i386/tcg/sysemu/svm_helper.c), so now and then an interrupt is lost; when it was the timer
//! of a machine that then idles, nothing wakes it but the next interrupt of a device.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Child;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::net::{SendFlags, send};

use super::frame::{Decoder, Frame};
use super::level1::Level1;
use super::{Home, LabError, at};

/// Seconds without a sign of life after which a machine is lost. It beats every second; a host
/// that is itself overloaded can make it late, but hardly this late.
pub const SILENCE: u32 = 30;

/// Seconds that a machine may take to boot; 4 on an idle host.
const BOOT: u64 = 180;

/// Seconds without a command after which a keeper ends.
const IDLE: i64 = 30;

#[derive(Default)]
struct State {
    /// The agent has said that it is there.
    ready: bool,
    /// A command runs.
    busy: bool,
    /// The machine is gone.
    lost: Option<String>,
    client: Option<Arc<UnixStream>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps `machine` until it is lost or idle for long.
///
/// # Errors
///
/// When it cannot be started.
pub fn keep(machine: usize) -> Result<(), LabError> {
    // The session of the first caller must not take the machine with it.
    let _ = rustix::process::setsid();
    let home = Home::open()?;
    let level1 = Level1::prepare()?;
    let build = level1.build()?;
    let (to_agent, from_agent) = UnixStream::pair().map_err(LabError::Talk)?;
    let qemu = level1.start(&home, machine, OwnedFd::from(from_agent), &[])?;
    let listener = home.listen(machine).map_err(at(
        "cannot listen for the lab's clients",
        home.lock(machine),
    ))?;

    let shared = Arc::new(Shared::default());
    let watched = to_agent.try_clone().map_err(LabError::Talk)?;
    let to_agent = Arc::new(ToAgent(Mutex::new(to_agent)));
    let poked = Arc::clone(&to_agent);
    let (for_watcher, started) = (Arc::clone(&shared), Instant::now());
    thread::spawn(move || {
        let why = watch(&watched, &poked, &for_watcher, started);
        let mut state = for_watcher.lock();
        if let Some(client) = &state.client {
            let _ = (&**client).write_all(&Frame::Lost(why.clone()).encode());
            let _ = client.shutdown(Shutdown::Read);
        }
        state.lost = Some(why);
        for_watcher.changed.notify_all();
    });
    let served = serve(&home, machine, &listener, &to_agent, &shared, &build);
    end(qemu);
    served
}

/// The stream to the agent, to write whole frames to.
struct ToAgent(Mutex<UnixStream>);

impl ToAgent {
    fn send(&self, frame: &Frame) -> io::Result<()> {
        let mut agent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        agent.write_all(&frame.encode())
    }

    /// Lets the machine have an interrupt, without waiting: what waits to be written does as well.
    fn poke(&self) {
        if let Ok(agent) = self.0.try_lock() {
            let _ = send(&*agent, &Frame::Beat.encode(), SendFlags::DONTWAIT);
        }
    }
}

/// Reads frames from the agent and passes them to the client, until the machine is lost.
fn watch(mut agent: &UnixStream, to_agent: &ToAgent, shared: &Shared, started: Instant) -> String {
    let mut decoder = Decoder::default();
    let mut bytes = vec![0; 64 << 10];
    let mut silent = 0;
    if let Err(error) = agent.set_read_timeout(Some(Duration::from_secs(1))) {
        return error.to_string();
    }
    loop {
        match agent.read(&mut bytes) {
            Ok(0) => return "QEMU ended".into(),
            Ok(n) => {
                silent = 0;
                decoder.push(bytes.get(..n).unwrap_or_default());
            }
            // Time-outs are counted, not the time: then a host that was suspended does no harm.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => silent += 1,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error.to_string(),
        }
        let ready = shared.lock().ready;
        if ready && silent > 0 {
            to_agent.poke();
        }
        if ready && silent >= SILENCE {
            return format!("no sign of life for {SILENCE} s");
        }
        if !ready && started.elapsed().as_secs() >= BOOT {
            return format!("not up after {BOOT} s");
        }
        loop {
            match decoder.take() {
                Ok(Some(frame)) => relay(&frame, shared),
                Ok(None) => break,
                Err(broken) => return broken.to_string(),
            }
        }
    }
}

fn relay(frame: &Frame, shared: &Shared) {
    let mut state = shared.lock();
    match frame {
        Frame::Beat => return,
        Frame::Ready(_) => {
            state.ready = true;
            shared.changed.notify_all();
            return;
        }
        Frame::Exit(_) => {
            state.busy = false;
            shared.changed.notify_all();
        }
        _ => {}
    }
    let client = state.client.clone();
    // Writing can take as long as the client likes; the state is not held meanwhile.
    drop(state);
    if let Some(client) = client {
        let _ = (&*client).write_all(&frame.encode());
    }
}

/// Serves one client after another.
fn serve(
    home: &Home,
    machine: usize,
    listener: &UnixListener,
    agent: &ToAgent,
    shared: &Shared,
    build: &str,
) -> Result<(), LabError> {
    let lock = home.lock(machine);
    let lock = File::open(&lock).map_err(at("cannot open", &lock))?;
    loop {
        if !wait_for_client(listener)? {
            // Whoever holds the lock is about to connect.
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
                home.forget_socket(machine);
                return Ok(());
            }
            continue;
        }
        let (client, _) = listener.accept().map_err(LabError::Talk)?;
        let client = Arc::new(client);
        {
            let mut state = shared.lock();
            while !state.ready && state.lost.is_none() {
                state = wait(shared, state);
            }
            let greeting = match &state.lost {
                Some(why) => Frame::Lost(why.clone()),
                None => Frame::Ready(build.to_owned()),
            };
            let _ = (&*client).write_all(&greeting.encode());
            if state.lost.is_some() {
                return Ok(());
            }
            state.client = Some(Arc::clone(&client));
        }
        let talked = converse(&client, agent, shared);
        let mut state = shared.lock();
        state.client = None;
        // The client is gone, so its command has to go.
        if state.busy && state.lost.is_none() {
            let _ = agent.send(&Frame::Signal(9));
        }
        while state.busy && state.lost.is_none() {
            state = wait(shared, state);
        }
        if state.lost.is_some() || talked.is_err() {
            return Ok(());
        }
    }
}

fn wait<'a>(shared: &Shared, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    shared
        .changed
        .wait(state)
        .unwrap_or_else(PoisonError::into_inner)
}

/// Waits for somebody to connect: false when nobody did for [`IDLE`] seconds.
fn wait_for_client(listener: &UnixListener) -> Result<bool, LabError> {
    let idle = std::env::var("STILLPOINT_LAB_IDLE")
        .ok()
        .and_then(|seconds| seconds.parse().ok())
        .unwrap_or(IDLE);
    let timeout = Timespec {
        tv_sec: idle,
        tv_nsec: 0,
    };
    match poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(true),
        Err(error) => Err(LabError::Talk(error.into())),
    }
}

/// Passes a client's frames to the agent until it hangs up.
fn converse(mut client: &UnixStream, agent: &ToAgent, shared: &Shared) -> Result<(), io::Error> {
    let mut decoder = Decoder::default();
    let mut bytes = vec![0; 64 << 10];
    loop {
        let n = match client.read(&mut bytes) {
            Ok(0) | Err(_) => return Ok(()),
            Ok(n) => n,
        };
        decoder.push(bytes.get(..n).unwrap_or_default());
        // A client that talks nonsense is treated as one that has hung up.
        while let Ok(Some(frame)) = decoder.take() {
            if matches!(frame, Frame::Run(_)) {
                shared.lock().busy = true;
            }
            agent.send(&frame)?;
        }
    }
}

fn end(mut qemu: Child) {
    // It may have ended by itself.
    let _ = qemu.kill();
    let _ = qemu.wait();
}
