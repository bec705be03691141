//! The client: commands to a running VMM, over its control socket.
//!
//! Answers go to standard output, as text for people or, with `--json`, as the value that the VMM
//! returned, on one line. Errors go to standard error. The exit status is 0 when it was done, 1
//! when it was refused or failed, 2 for wrong usage, 3 when a deadline passed.

mod connection;
mod dump;
mod inspect;
mod offline;
mod render;
mod request;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::Value;

use super::args::{ClientCommand, InspectArgs};
use crate::printable::printable;
use connection::{ClientError, Connection};
use request::Task;

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const DEADLINE: u8 = 3;

/// Runs one command against the VMM that listens at `control`.
#[must_use]
pub fn main(control: Option<PathBuf>, json: bool, command: ClientCommand) -> ExitCode {
    let result = match (command, control) {
        (ClientCommand::Inspect(inspect @ InspectArgs { file: Some(_), .. }), _) => {
            inspect::run(json, &inspect)
        }
        (command, Some(path)) => run(&path, json, command),
        (command, None) => {
            let or = match command {
                ClientCommand::Inspect(_) => "Name a file, or give",
                _ => "Give",
            };
            eprintln!(
                "stillpoint: which VMM? {or} its control socket with --control SOCKET (or -c)"
            );
            return ExitCode::from(USAGE);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has seen enough, as `head` does.
        Err(ClientError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            if json {
                eprintln!("{}", error.to_value());
            } else {
                eprintln!("stillpoint: {}", printable(&error.to_string()));
            }
            ExitCode::from(match error {
                ClientError::Usage { .. } => USAGE,
                error if error.is_deadline() => DEADLINE,
                _ => FAILED,
            })
        }
    }
}

fn run(path: &Path, json: bool, command: ClientCommand) -> Result<(), ClientError> {
    let request = match Task::of(command)? {
        Task::Events => return events(path, json),
        Task::Quit => return quit(path, json),
        Task::Dump { file, part } => return dump::run(path, json, &file, part),
        Task::Ask(request) => request,
    };
    let mut connection = Connection::open(path)?;
    let answer = connection.execute(request.command, request.arguments)?;
    if json {
        say(&answer.to_string())
    } else {
        say((request.show)(&answer).trim_end())
    }
}

fn say(text: &str) -> Result<(), ClientError> {
    if text.is_empty() {
        return Ok(());
    }
    writeln!(io::stdout(), "{text}").map_err(ClientError::Output)
}

fn events(path: &Path, json: bool) -> Result<(), ClientError> {
    let mut connection = Connection::open(path)?;
    connection.execute("events-enable", Value::Null)?;
    while let Some(event) = connection.next_event()? {
        if json {
            say(&event.to_string())?;
        } else {
            say(&render::event(&event))?;
        }
    }
    Ok(())
}

/// Ends the VMM, and is done when it has ended.
fn quit(path: &Path, json: bool) -> Result<(), ClientError> {
    let mut connection = Connection::open(path)?;
    match connection.execute("quit", Value::Null) {
        // It may be gone before it has answered.
        Ok(_) | Err(ClientError::Closed) => {}
        Err(error) => return Err(error),
    }
    connection.wait_for_end()?;
    say(if json { "{}" } else { "ended" })
}
