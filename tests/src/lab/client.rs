//! Runs one command in the lab for whoever asks.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::feed::{Feeders, Inputs};
use super::frame::{Command, Decoder, Exit, Frame};
use super::home::lab_binary;
use super::level1::Level1;
use super::{Home, LabError, at};

/// Time that a command which has passed its limit has to end after SIGTERM, and again to be gone
/// after SIGKILL.
const GRACE: Duration = Duration::from_secs(5);

/// Where the output of a command goes.
pub trait Output {
    /// Some of its standard output.
    fn stdout(&mut self, bytes: &[u8]);
    /// Some of its error output.
    fn stderr(&mut self, bytes: &[u8]);
}

/// How a command ended, and what it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// How it ended. A command that passed its limit ends as the signal that ended it.
    pub exit: Exit,
    /// It was ended because its time was over.
    pub timed_out: bool,
    /// Machines that were lost on the way.
    pub lost: u32,
}

/// The variables that commands in the lab inherit.
#[must_use]
pub fn environment() -> BTreeMap<String, String> {
    const NAMES: [&str; 9] = [
        "PATH",
        "HOME",
        "USER",
        "LANG",
        "TERM",
        "TZ",
        "LD_LIBRARY_PATH",
        "VIRTUAL_ENV",
        "COLUMNS",
    ];
    const PREFIXES: [&str; 7] = [
        "STILLPOINT_",
        "RUST_",
        "CARGO_",
        "NEXTEST",
        "PYTHON",
        "PYENV_",
        "LC_",
    ];
    let mut env: BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| {
            NAMES.contains(&name.as_str()) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        })
        .collect();
    // There is no lab inside the lab.
    env.insert("STILLPOINT_TEST_ON".into(), "native".into());
    env
}

/// Runs `command` on a free machine, waiting for one when all are taken.
///
/// A machine that is lost is replaced and the command run once more, with a line about it to
/// `output`; unless some of its input was used up already.
///
/// # Errors
///
/// When no machine can be had, or two in a row are lost.
pub fn run(
    command: &Command,
    limit: Duration,
    inputs: Inputs,
    output: &mut dyn Output,
) -> Result<Outcome, LabError> {
    let home = Home::open()?;
    let level1 = Level1::prepare()?;
    let (machine, _lock) = take_machine(&home)?;
    let inputs = Feeders::new(inputs);
    let mut lost = 0;
    loop {
        let attempt = connect(&home, machine, &level1)
            .and_then(|stream| converse(&stream, command, limit, &inputs, output));
        let why = match attempt {
            Ok((exit, timed_out)) => {
                return Ok(Outcome {
                    exit,
                    timed_out,
                    lost,
                });
            }
            Err(Trouble::Lost(why)) => why,
            Err(Trouble::Other(error)) => return Err(error),
        };
        lost += 1;
        if lost > 1 || inputs.used() {
            return Err(LabError::Lost {
                machine,
                why,
                console: home.console(machine),
            });
        }
        let notice = format!("lab: machine {machine} was lost ({why}); once more on a new one\n");
        output.stderr(notice.as_bytes());
    }
}

/// How many machines run side by side: one for each core, if memory allows (a level 1 machine and
/// its guests touch less than 3 GiB).
fn machines() -> usize {
    if let Some(n) = std::env::var("STILLPOINT_LAB_MACHINES")
        .ok()
        .and_then(|n| n.parse().ok())
    {
        return n;
    }
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let gib = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text
                .lines()
                .find(|line| line.starts_with("MemAvailable:"))?;
            line.split_whitespace().nth(1)?.parse::<usize>().ok()
        })
        .map_or(4, |kib| kib >> 20);
    cores.min(gib / 3).max(1)
}

fn take_machine(home: &Home) -> Result<(usize, File), LabError> {
    let mut pause = Duration::from_millis(5);
    loop {
        for machine in 0..machines().max(1) {
            let path = home.lock(machine);
            let file = File::options()
                .create(true)
                .append(true)
                .open(&path)
                .map_err(at("cannot open the lock of a machine", &path))?;
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                return Ok((machine, file));
            }
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

pub(super) enum Trouble {
    Lost(String),
    Other(LabError),
}

impl From<LabError> for Trouble {
    fn from(error: LabError) -> Self {
        Self::Other(error)
    }
}

/// Connects to a machine that takes commands; the caller holds its lock.
fn connect(home: &Home, machine: usize, level1: &Level1) -> Result<UnixStream, Trouble> {
    let build = level1.build()?;
    loop {
        let (stream, fresh) = match home.connect(machine) {
            Ok(stream) => (stream, false),
            Err(_) => (start_keeper(home, machine)?, true),
        };
        let mut reader = Frames::new(&stream);
        match reader.next(None) {
            Ok(Some(Frame::Ready(theirs))) if theirs == build => return Ok(stream),
            // A machine of another build, or one that was dying: not ours.
            Ok(_) | Err(_) if !fresh => {
                end_keeper(&stream);
                home.forget_socket(machine);
            }
            Ok(Some(Frame::Lost(why))) => return Err(Trouble::Lost(why)),
            _ => return Err(Trouble::Lost("its keeper ended while it booted".into())),
        }
    }
}

/// Ends all machines, whoever uses them, and says how many there were.
#[must_use]
pub fn stop_all(home: &Home) -> usize {
    let mut ended = 0;
    for machine in home.machines() {
        if let Ok(stream) = home.connect(machine) {
            end_keeper(&stream);
            ended += 1;
        }
        home.forget_socket(machine);
    }
    ended
}

/// Ends the keeper at the other end, and with it its machine.
pub(crate) fn end_keeper(stream: &UnixStream) {
    let Ok(peer) = rustix::net::sockopt::socket_peercred(stream) else {
        return;
    };
    let _ = rustix::process::kill_process(peer.pid, rustix::process::Signal::TERM);
    // Its end of the connection goes with it.
    let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
    let mut rest = [0; 4096];
    while matches!((&*stream).read(&mut rest), Ok(1..)) {}
}

fn start_keeper(home: &Home, machine: usize) -> Result<UnixStream, LabError> {
    let path = home.log(machine);
    let log = File::create(&path).map_err(at("cannot write the lab's log", &path))?;
    let mut keeper = std::process::Command::new(lab_binary()?)
        .args(["keep", "--machine", &machine.to_string()])
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(LabError::Talk)?)
        .stderr(log)
        .spawn()
        .map_err(at("cannot start the lab's keeper", &path))?;
    loop {
        if let Ok(stream) = home.connect(machine) {
            return Ok(stream);
        }
        if let Some(error) = ended(&mut keeper, &path) {
            return Err(error);
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn ended(keeper: &mut Child, log: &PathBuf) -> Option<LabError> {
    let status = keeper.try_wait().ok()??;
    let said = std::fs::read_to_string(log).unwrap_or_default();
    Some(LabError::Program {
        program: "lab keep".into(),
        why: format!("{status}: {}", said.trim()),
    })
}

/// Runs the command over an open conversation.
pub(super) fn converse(
    stream: &UnixStream,
    command: &Command,
    limit: Duration,
    inputs: &Feeders,
    output: &mut dyn Output,
) -> Result<(Exit, bool), Trouble> {
    let talk = |error: io::Error| Trouble::Other(LabError::Talk(error));
    let send = |frame: &Frame| (&*stream).write_all(&frame.encode());
    send(&Frame::Run(command.clone())).map_err(talk)?;

    let mut deadline = Some(Instant::now() + limit);
    let mut timed_out = false;
    let mut reader = Frames::new(stream);
    let feeding = inputs.start(stream).map_err(talk)?;
    let mut next_signal = 15;
    loop {
        match reader.next(deadline) {
            Ok(Some(Frame::Stdout(bytes))) => output.stdout(&bytes),
            Ok(Some(Frame::Stderr(bytes))) => output.stderr(&bytes),
            Ok(Some(Frame::StdinTaken)) => feeding.delivered(),
            Ok(Some(Frame::Exit(exit))) => return Ok((exit, timed_out)),
            Ok(Some(Frame::Lost(why))) => return Err(Trouble::Lost(why)),
            Ok(Some(_)) => {}
            Ok(None) if next_signal == 0 => {
                return Err(Trouble::Lost("a killed command did not end".into()));
            }
            Ok(None) => {
                if !timed_out {
                    let notice = format!("lab: the limit of {limit:?} has passed\n");
                    output.stderr(notice.as_bytes());
                }
                timed_out = true;
                let _ = send(&Frame::Signal(next_signal));
                next_signal = if next_signal == 15 { 9 } else { 0 };
                deadline = Some(Instant::now() + GRACE);
            }
            Err(error) => return Err(Trouble::Lost(format!("its keeper is gone: {error}"))),
        }
    }
}

/// Reads frames from a socket.
pub(super) struct Frames<'a> {
    stream: &'a UnixStream,
    decoder: Decoder,
}

impl<'a> Frames<'a> {
    pub(super) fn new(stream: &'a UnixStream) -> Self {
        Self {
            stream,
            decoder: Decoder::default(),
        }
    }

    /// The next frame, or None at the deadline.
    pub(super) fn next(&mut self, deadline: Option<Instant>) -> io::Result<Option<Frame>> {
        let mut bytes = vec![0; 64 << 10];
        loop {
            if let Some(frame) = self.decoder.take()? {
                return Ok(Some(frame));
            }
            let left = match deadline {
                None => None,
                Some(deadline) => match deadline.checked_duration_since(Instant::now()) {
                    Some(left) if !left.is_zero() => Some(left),
                    _ => return Ok(None),
                },
            };
            self.stream.set_read_timeout(left)?;
            match (&*self.stream).read(&mut bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.decoder.push(bytes.get(..n).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}
