//! The front of the lab: what `scripts/lab` runs, and the other processes of the lab.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

use clap::{Parser, Subcommand};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use stillpoint_tests::lab::{self, Command, Exit, Home, Inputs, LabError, Output};

#[derive(Parser)]
#[command(about = "Runs commands where /dev/kvm is real")]
struct Options {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run a command in the lab; its output, exit status and signals are passed through
    Run {
        /// Seconds after which the command is ended (exit status 124); else STILLPOINT_LAB_LIMIT, else 1800
        #[arg(long)]
        limit: Option<u64>,
        /// On a new machine whose clock counts instructions, one to the nanosecond; without input
        #[arg(long)]
        icount: bool,
        /// The command and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
    /// End all machines
    Stop,
    /// Keep a machine (started by `run`)
    #[command(hide = true)]
    Keep {
        #[arg(long)]
        machine: usize,
    },
    /// Be the init of level 1
    #[command(hide = true)]
    Agent {
        #[arg(long)]
        share: PathBuf,
        #[arg(long)]
        modules: PathBuf,
    },
    /// Become a command in a root of its own
    #[command(hide = true)]
    Enter {
        #[arg(long)]
        share: PathBuf,
        #[arg(long)]
        modules: PathBuf,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
}

fn main() -> ExitCode {
    let done = match Options::parse().verb {
        Verb::Run {
            limit,
            icount,
            command,
        } => run(command, limit.unwrap_or_else(default_limit), icount),
        Verb::Stop => stop(),
        Verb::Keep { machine } => lab::keeper::keep(machine).map(|()| ExitCode::SUCCESS),
        Verb::Agent { share, modules } => lab::agent::serve(&share, &modules)
            .map(|()| ExitCode::SUCCESS)
            .map_err(LabError::Talk),
        Verb::Enter {
            share,
            modules,
            command,
        } => Err(lab::enter::enter(&share, &modules, &command)),
    };
    done.unwrap_or_else(|error| {
        let mut text = format!("lab: {error}");
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            text.push_str(&format!(": {error}"));
            cause = error.source();
        }
        eprintln!("{text}");
        // What a shell says of a command that is not there, or could not be run.
        ExitCode::from(match error {
            LabError::NoCommand(_) => 127,
            _ => 126,
        })
    })
}

fn default_limit() -> u64 {
    std::env::var("STILLPOINT_LAB_LIMIT")
        .ok()
        .and_then(|seconds| seconds.parse().ok())
        .unwrap_or(1800)
}

struct Standard;

impl Output for Standard {
    fn stdout(&mut self, bytes: &[u8]) {
        write(&mut std::io::stdout().lock(), bytes);
    }

    fn stderr(&mut self, bytes: &[u8]) {
        write(&mut std::io::stderr().lock(), bytes);
    }
}

fn write(to: &mut impl Write, bytes: &[u8]) {
    // Whoever reads may have had enough: the same as for any program in a pipe.
    if to.write_all(bytes).and_then(|()| to.flush()).is_err() {
        std::process::exit(141);
    }
}

fn run(argv: Vec<String>, limit: u64, icount: bool) -> Result<ExitCode, LabError> {
    let cwd = std::env::current_dir().map_err(LabError::Talk)?;
    let command = Command {
        argv,
        env: lab::client::environment(),
        cwd,
    };
    let limit = Duration::from_secs(limit);
    let outcome = if icount {
        lab::run_fresh(&command, limit, &lab::ICOUNT, &mut Standard)?
    } else {
        let inputs = Inputs {
            stdin: Some(read_stdin()),
            signals: Some(catch_signals()?),
        };
        lab::run(&command, limit, inputs, &mut Standard)?
    };
    if outcome.timed_out {
        return Ok(ExitCode::from(124));
    }
    if let Exit::Signal(signal) = outcome.exit {
        // End the same way, where that is possible; else by the status below.
        let _ = signal_hook::low_level::emulate_default_handler(signal);
    }
    let status = outcome.exit.shell_status();
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(1)))
}

fn read_stdin() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let mut bytes = vec![0; 32 << 10];
        while let Ok(n @ 1..) = std::io::stdin().read(&mut bytes) {
            let piece = bytes.get(..n).unwrap_or_default().to_vec();
            if sender.send(piece).is_err() {
                return;
            }
        }
    });
    receiver
}

fn catch_signals() -> Result<mpsc::Receiver<i32>, LabError> {
    let (sender, receiver) = mpsc::channel();
    let all = [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2];
    let mut signals = signal_hook::iterator::Signals::new(all).map_err(LabError::Talk)?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if sender.send(signal).is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

fn stop() -> Result<ExitCode, LabError> {
    let ended = lab::client::stop_all(&Home::open()?);
    eprintln!("lab: {ended} machines ended");
    Ok(ExitCode::SUCCESS)
}
