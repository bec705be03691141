//! A small QMP client, written apart from the one in `stillpoint` so that both cannot be wrong together.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{Failure, SOON};

/// What goes wrong on a QMP connection.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket.
    #[error("the control socket")]
    Io(#[from] std::io::Error),
    /// Something that is not JSON, or not a QMP message.
    #[error("not a QMP message: {0}")]
    Nonsense(String),
    /// The server refused a command.
    #[error("{class}: {desc}")]
    Refused {
        /// Class of the error.
        class: String,
        /// Its description.
        desc: String,
    },
    /// An event did not come.
    #[error("no event {0} in time")]
    NoEvent(String),
}

/// A connection.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    line: String,
    greeting: Value,
    events: Vec<Value>,
}

impl Qmp {
    /// Connects and negotiates.
    ///
    /// # Errors
    ///
    /// When nobody listens or it is not QMP.
    pub fn connect(path: &Path) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(SOON))?;
        let reader = BufReader::new(stream.try_clone()?);
        let mut qmp = Self {
            stream,
            reader,
            line: String::new(),
            greeting: Value::Null,
            events: Vec::new(),
        };
        qmp.greeting = qmp.read()?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// What the server said first.
    #[must_use]
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Runs a command and returns what it returns.
    ///
    /// # Errors
    ///
    /// [`QmpError::Refused`] when the server answers with an error.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let request = json!({"execute": command, "arguments": arguments, "id": "test"});
        self.stream.write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut message = self.read()?;
            if message.get("event").is_some() {
                self.events.push(message);
            } else if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            } else if let Some(error) = message.get("error") {
                let text = |name: &str| {
                    let value = error.get(name).and_then(Value::as_str);
                    value.unwrap_or_default().to_owned()
                };
                return Err(QmpError::Refused {
                    class: text("class"),
                    desc: text("desc"),
                });
            } else {
                return Err(QmpError::Nonsense(message.to_string()));
            }
        }
    }

    /// The next event of this name, waiting for it if need be. Those of other names are skipped.
    ///
    /// # Errors
    ///
    /// When it does not come in time.
    pub fn event(&mut self, name: &str, limit: Duration) -> Result<Value, QmpError> {
        let deadline = Instant::now() + limit;
        loop {
            let found = self
                .events
                .iter()
                .position(|event| event.get("event").and_then(Value::as_str) == Some(name));
            if let Some(at) = found {
                return Ok(self.events.drain(..=at).next_back().unwrap_or_default());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(QmpError::NoEvent(name.to_owned()));
            }
            self.stream.set_read_timeout(Some(left))?;
            let message = self.read();
            self.stream.set_read_timeout(Some(SOON))?;
            match message {
                Ok(message) => self.events.push(message),
                Err(QmpError::Io(e)) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads one message. What has come of a line when the time is over stays for the next call.
    fn read(&mut self) -> Result<Value, QmpError> {
        while !self.line.ends_with('\n') {
            if self.reader.read_line(&mut self.line)? == 0 {
                return Err(QmpError::Io(std::io::ErrorKind::UnexpectedEof.into()));
            }
        }
        let message = serde_json::from_str(&self.line);
        let line = std::mem::take(&mut self.line);
        message.map_err(|_| QmpError::Nonsense(line))
    }
}

/// What a command is refused with.
///
/// # Errors
///
/// When it is not refused, or fails in another way.
pub fn refusal(result: Result<Value, QmpError>) -> Result<String, Failure> {
    match result {
        Err(QmpError::Refused { desc, .. }) => Ok(desc),
        Err(error) => Err(error.into()),
        Ok(answer) => Err(Failure::new(format!("not refused: {answer}"))),
    }
}
