//! A connection to a VMM: QMP from the client's side.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};

/// How long a VMM may take to greet: it does nothing else for it.
const GREETING: Duration = Duration::from_secs(10);

/// How long a VMM may take to end after it has said that it will.
const ENDING: Duration = Duration::from_secs(30);

/// The longest line that is taken from a VMM.
const MAX_LINE: u64 = 64 << 20;

/// What can go wrong for a client.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("{}: there is no such socket; is the VMM running, and with this --control?", .0.display())]
    NoSocket(PathBuf),
    #[error("{}: nobody listens there; the VMM that made this socket has ended", .0.display())]
    NobodyListens(PathBuf),
    #[error("{}: permission denied; the socket belongs to the user that runs the VMM", .0.display())]
    Permission(PathBuf),
    #[error("{}: {source}", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("{}: whoever listens there does not greet; it is no VMM, or it hangs", .0.display())]
    NoGreeting(PathBuf),
    #[error("{desc}")]
    Refused { class: String, desc: String },
    #[error("the VMM closed the connection before it answered")]
    Closed,
    #[error("the VMM has not ended after {} s", ENDING.as_secs())]
    StillThere,
    #[error("the VMM's answer cannot be understood: {0}")]
    Garbled(String),
    #[error("the connection to the VMM: {0}")]
    Io(io::Error),
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("standard output: {0}")]
    Output(io::Error),
    #[error("{}: {why}", path.display())]
    Usage { path: PathBuf, why: &'static str },
}

impl ClientError {
    pub(super) fn is_deadline(&self) -> bool {
        match self {
            Self::Refused { desc, .. } => desc.starts_with("Deadline:"),
            Self::StillThere => true,
            _ => false,
        }
    }

    /// As QMP would say it.
    pub(super) fn to_value(&self) -> Value {
        let class = match self {
            Self::Refused { class, .. } => class,
            _ => "GenericError",
        };
        json!({ "error": { "class": class, "desc": self.to_string() } })
    }
}

#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    /// Came in while an answer was waited for.
    events: VecDeque<Value>,
}

impl Connection {
    /// Connects and negotiates.
    pub(super) fn open(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ClientError::NoSocket(path.to_owned()),
            io::ErrorKind::ConnectionRefused => ClientError::NobodyListens(path.to_owned()),
            io::ErrorKind::PermissionDenied => ClientError::Permission(path.to_owned()),
            _ => ClientError::Connect {
                path: path.to_owned(),
                source,
            },
        })?;
        let lines = BufReader::new(stream.try_clone().map_err(ClientError::Io)?);
        let mut connection = Self {
            stream,
            lines,
            events: VecDeque::new(),
        };
        connection.patience(Some(GREETING))?;
        let greeting = match connection.receive() {
            Ok(Some(message)) => message,
            Ok(None) => return Err(ClientError::Closed),
            Err(ClientError::Io(_) | ClientError::Garbled(_)) => {
                return Err(ClientError::NoGreeting(path.to_owned()));
            }
            Err(error) => return Err(error),
        };
        if greeting.get("QMP").is_none() {
            return Err(refusal(&greeting));
        }
        connection.execute("qmp_capabilities", Value::Null)?;
        connection.patience(None)?;
        Ok(connection)
    }

    fn patience(&self, limit: Option<Duration>) -> Result<(), ClientError> {
        self.stream.set_read_timeout(limit).map_err(ClientError::Io)
    }

    /// Sends a command and waits for the answer. `Null` stands for no arguments.
    pub(super) fn execute(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<Value, ClientError> {
        self.send(&encode(command, arguments))?;
        self.answer()
    }

    /// As [`Connection::execute`], passing a descriptor along.
    pub(super) fn execute_with(
        &mut self,
        command: &str,
        arguments: Value,
        fd: &impl AsFd,
    ) -> Result<Value, ClientError> {
        let line = encode(command, arguments);
        let fds = [fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let parts = [IoSlice::new(line.as_bytes())];
        let sent = rustix::net::sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL)
            .map_err(|error| ClientError::Io(error.into()))?;
        self.send(line.get(sent..).unwrap_or_default())?;
        self.answer()
    }

    fn send(&mut self, line: &str) -> Result<(), ClientError> {
        match self.stream.write_all(line.as_bytes()) {
            // It may have said why before it closed.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result.map_err(ClientError::Io),
        }
    }

    fn answer(&mut self) -> Result<Value, ClientError> {
        loop {
            let mut message = self.receive()?.ok_or(ClientError::Closed)?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            } else {
                return Err(refusal(&message));
            }
        }
    }

    /// The next event; `None` when the VMM has ended.
    pub(super) fn next_event(&mut self) -> Result<Option<Value>, ClientError> {
        match self.events.pop_front() {
            Some(event) => Ok(Some(event)),
            None => self.receive(),
        }
    }

    /// Returns when the VMM has closed the connection.
    pub(super) fn wait_for_end(&mut self) -> Result<(), ClientError> {
        self.patience(Some(ENDING))?;
        loop {
            match self.receive() {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(()),
                Err(ClientError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(ClientError::StillThere);
                }
                // Closed with something of ours unread.
                Err(ClientError::Io(_)) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn receive(&mut self) -> Result<Option<Value>, ClientError> {
        let mut line = String::new();
        let count = (&mut self.lines)
            .take(MAX_LINE)
            .read_line(&mut line)
            .map_err(|error| match error.kind() {
                io::ErrorKind::InvalidData => ClientError::Garbled(error.to_string()),
                _ => ClientError::Io(error),
            })?;
        if count == 0 {
            return Ok(None);
        }
        serde_json::from_str(&line)
            .map(Some)
            .map_err(|error| ClientError::Garbled(error.to_string()))
    }
}

fn encode(command: &str, arguments: Value) -> String {
    let mut request = json!({ "execute": command });
    if let (false, Some(members)) = (arguments.is_null(), request.as_object_mut()) {
        members.insert("arguments".to_owned(), arguments);
    }
    format!("{request}\r\n")
}

fn refusal(message: &Value) -> ClientError {
    let error = message.get("error");
    let member = |name: &str| {
        let text = error.and_then(|error| error.get(name)?.as_str());
        text.map(str::to_owned)
    };
    match (member("class"), member("desc")) {
        (Some(class), Some(desc)) => ClientError::Refused { class, desc },
        _ => ClientError::Garbled(message.to_string().chars().take(200).collect()),
    }
}
