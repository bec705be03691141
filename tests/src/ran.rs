//! Programs that run to their end.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::console::Text;
use crate::{Failure, SOON, needs};

/// What a program said, and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// Exit status; -1 for a program that was killed.
    pub status: i32,
    /// Its output.
    pub stdout: String,
    /// Its errors.
    pub stderr: String,
}

impl Ran {
    /// Runs a program without input.
    ///
    /// # Errors
    ///
    /// When it cannot be started, or has not ended soon; it is killed then.
    pub fn of(command: &mut Command) -> Result<Self, Failure> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| Failure::new(format!("{command:?}: {error}")))?;
        let stdout = child.stdout.take().map(Text::of).unwrap_or_default();
        let stderr = child.stderr.take().map(Text::of).unwrap_or_default();
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if begun.elapsed() > SOON {
                child.kill()?;
                child.wait()?;
                return Err(Failure::new(format!(
                    "{command:?} runs on after {SOON:?}\n{}{}",
                    stdout.so_far(),
                    stderr.so_far()
                )));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        Ok(Self {
            status: status.code().unwrap_or(-1),
            stdout: stdout.whole(SOON),
            stderr: stderr.whole(SOON),
        })
    }

    /// Runs `stillpoint` with these arguments.
    ///
    /// # Errors
    ///
    /// As [`Ran::of`].
    pub fn stillpoint(args: &[&str]) -> Result<Self, Failure> {
        Self::of(Command::new(needs::stillpoint()?).args(args))
    }

    /// Its output, if it succeeded.
    ///
    /// # Errors
    ///
    /// Its errors, if not.
    pub fn ok(self) -> Result<String, Failure> {
        if self.status == 0 {
            return Ok(self.stdout);
        }
        Err(Failure::new(format!(
            "status {}: {}{}",
            self.status, self.stdout, self.stderr
        )))
    }
}
