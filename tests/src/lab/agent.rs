//! The init of level 1: runs commands for the keeper, one at a time.
//!
//! It is process 1, so everything that loses its parent becomes its child: it reaps all of them,
//! and after each command kills whatever is left. If it fails, the kernel panics, QEMU ends, and
//! the keeper says so.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command as Process, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

use super::frame::{Command, Decoder, Exit, Frame};

/// How much output is put into one frame.
const CHUNK: usize = 32 << 10;

/// A command, and where its input will come from.
type Todo = (Command, mpsc::Receiver<Stdin>);

/// The port, to write whole frames to.
#[derive(Clone)]
struct Port(Arc<Mutex<File>>);

impl Port {
    fn send(&self, frame: &Frame) -> io::Result<()> {
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        port.write_all(&frame.encode())
    }
}

/// Input for a command: None is its end.
type Stdin = Option<Vec<u8>>;

/// What the reading thread knows of the command that runs. Input and signals may come before it
/// has started.
#[derive(Default)]
struct Running {
    pid: Option<Pid>,
    stdin: Option<mpsc::Sender<Stdin>>,
    signals: Vec<Signal>,
}

impl Running {
    fn signal(&mut self, signal: Signal) {
        let Some(pid) = self.pid else {
            self.signals.push(signal);
            return;
        };
        let _ = rustix::process::kill_process_group(pid, signal);
        if signal == Signal::KILL {
            kill_everything();
        }
    }
}

/// Serves the keeper for as long as the machine lives.
///
/// # Errors
///
/// When the port to the keeper is not there or fails.
pub fn serve(share: &Path, modules: &Path) -> io::Result<()> {
    // Signs of life must come through whatever the commands do.
    let _ = rustix::process::setpriority_process(None, -20);
    let mut from_keeper = File::options().read(true).write(true).open(find_port()?)?;
    let port = Port(Arc::new(Mutex::new(from_keeper.try_clone()?)));
    let running = Arc::new(Mutex::new(Running::default()));
    let (commands, todo) = mpsc::channel();

    port.send(&Frame::Ready(String::new()))?;
    let heart = port.clone();
    thread::spawn(move || {
        while heart.send(&Frame::Beat).is_ok() {
            thread::sleep(Duration::from_secs(1));
        }
    });
    let (for_reader, sender) = (Arc::clone(&running), commands);
    thread::spawn(move || {
        let mut decoder = Decoder::default();
        let mut bytes = vec![0; CHUNK];
        loop {
            match from_keeper.read(&mut bytes) {
                // Nobody is connected at this moment.
                Ok(0) => thread::sleep(Duration::from_millis(10)),
                Ok(n) => decoder.push(bytes.get(..n).unwrap_or_default()),
                Err(_) => return,
            }
            while let Ok(Some(frame)) = decoder.take() {
                handle(frame, &for_reader, &sender);
            }
        }
    });
    for (command, stdin) in todo {
        let exit = run(&command, stdin, share, modules, &port, &running);
        port.send(&Frame::Exit(exit))?;
    }
    Ok(())
}

fn handle(frame: Frame, running: &Mutex<Running>, commands: &mpsc::Sender<Todo>) {
    let mut running = running.lock().unwrap_or_else(PoisonError::into_inner);
    match frame {
        Frame::Run(command) => {
            let (sender, stdin) = mpsc::channel();
            *running = Running {
                stdin: Some(sender),
                ..Running::default()
            };
            let _ = commands.send((command, stdin));
        }
        Frame::Stdin(bytes) => {
            if let Some(stdin) = &running.stdin {
                let _ = stdin.send(Some(bytes));
            }
        }
        Frame::StdinEnd => {
            if let Some(stdin) = &running.stdin {
                let _ = stdin.send(None);
            }
        }
        Frame::Signal(signal) => {
            if let Some(signal) = Signal::from_named_raw(signal) {
                running.signal(signal);
            }
        }
        _ => {}
    }
}

/// Runs one command to its end and leaves nothing of it.
fn run(
    command: &Command,
    input: mpsc::Receiver<Stdin>,
    share: &Path,
    modules: &Path,
    port: &Port,
    running: &Mutex<Running>,
) -> Exit {
    let spawned = Process::new("/proc/self/exe")
        .arg("enter")
        .arg("--share")
        .arg(share)
        .arg("--modules")
        .arg(modules)
        .arg("--")
        .args(&command.argv)
        .env_clear()
        .envs(&command.env)
        .env(super::INSIDE, share)
        .env("LAB_CWD", &command.cwd)
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            let _ = port.send(&Frame::Stderr(format!("lab: {error}\n").into_bytes()));
            return Exit::Status(126);
        }
    };
    let pid = Pid::from_child(&child);
    if let Some(stdin) = child.stdin.take() {
        feed(stdin, input, port.clone());
    }
    {
        let mut running = running.lock().unwrap_or_else(PoisonError::into_inner);
        running.pid = Some(pid);
        for signal in std::mem::take(&mut running.signals) {
            running.signal(signal);
        }
    }
    let pumps = [
        child
            .stdout
            .take()
            .map(|out| pump(out, port.clone(), Frame::Stdout)),
        child
            .stderr
            .take()
            .map(|err| pump(err, port.clone(), Frame::Stderr)),
    ];

    let exit = reap_until(pid);
    *running.lock().unwrap_or_else(PoisonError::into_inner) = Running::default();
    // First what it left behind, then the pipes: they end when nobody holds them open any more.
    clear_away();
    for pump in pumps.into_iter().flatten() {
        let _ = pump.join();
    }
    exit
}

/// Waits for `pid`, reaping whatever else ends meanwhile.
fn reap_until(pid: Pid) -> Exit {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((ended, status))) if ended == pid => return exit_of(status),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // There is at least `pid`, or it has been waited for: neither happens.
            Err(_) => return Exit::Status(126),
        }
    }
}

fn exit_of(status: WaitStatus) -> Exit {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(status), _) => Exit::Status(status),
        (_, Some(signal)) => Exit::Signal(signal),
        _ => Exit::Status(126),
    }
}

/// Sends SIGKILL to every process but this one.
fn kill_everything() {
    // kill(2) of "group 1" is kill(-1): every process except the sender and process 1, and this is
    // both. That there is none is no error.
    let _ = rustix::process::kill_process_group(Pid::INIT, Signal::KILL);
}

fn clear_away() {
    // A process in the middle of a system call takes a moment to die.
    for _ in 0..1000 {
        kill_everything();
        match rustix::process::wait(WaitOptions::NOHANG) {
            Err(_) => return,
            Ok(Some(_)) => {}
            Ok(None) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn pump(
    mut from: impl Read + Send + 'static,
    port: Port,
    frame: fn(Vec<u8>) -> Frame,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut bytes = vec![0; CHUNK];
        while let Ok(n @ 1..) = from.read(&mut bytes) {
            let part = bytes.get(..n).unwrap_or_default().to_vec();
            if port.send(&frame(part)).is_err() {
                return;
            }
        }
    })
}

fn feed(mut stdin: ChildStdin, input: mpsc::Receiver<Stdin>, port: Port) {
    thread::spawn(move || {
        while let Ok(Some(bytes)) = input.recv() {
            // A command that does not read its input is no error of the lab.
            let _ = stdin.write_all(&bytes);
            if port.send(&Frame::StdinTaken).is_err() {
                return;
            }
        }
    });
}

fn find_port() -> io::Result<PathBuf> {
    for port in fs::read_dir("/sys/class/virtio-ports")? {
        let port = port?;
        let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if name.trim() == "agent" {
            return Ok(Path::new("/dev").join(port.file_name()));
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        "no virtio-serial port named 'agent'",
    ))
}
