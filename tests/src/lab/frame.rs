//! The protocol between client, keeper and agent: frames over a byte stream, without I/O.
//!
//! A frame is one byte of type, four bytes of length (little endian) and that many bytes. Both ends
//! are always of the same build (the keeper's [`Frame::Ready`] carries it), so there are no versions.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Longest payload in bytes; a longer one is a broken stream.
const LONGEST: usize = 1 << 20;

/// What to run in the lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Program (looked up in PATH) and arguments.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: BTreeMap<String, String>,
    /// Working directory.
    pub cwd: PathBuf,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// By itself, with this status.
    Status(i32),
    /// By this signal.
    Signal(i32),
}

impl Exit {
    /// The status that a shell would report: 128 plus the number of a signal.
    #[must_use]
    pub fn shell_status(self) -> i32 {
        match self {
            Self::Status(status) => status,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// To the agent: run this. Only when nothing runs.
    Run(Command),
    /// To the agent: input for the command. The next one only after [`Frame::StdinTaken`].
    Stdin(Vec<u8>),
    /// To the agent: no more input.
    StdinEnd,
    /// To the agent: send this signal to the command's process group; 9 kills all that it started.
    Signal(i32),
    /// From the agent: the last input has been written to the command.
    StdinTaken,
    /// The machine takes commands. From the keeper with the build and set-up that it runs.
    Ready(String),
    /// From the agent, every second. To the agent: nothing, but an interrupt.
    Beat,
    /// From the agent: output of the command.
    Stdout(Vec<u8>),
    /// From the agent: error output of the command.
    Stderr(Vec<u8>),
    /// From the agent: the command has ended and nothing of it is left.
    Exit(Exit),
    /// From the keeper: the machine is gone, for this reason.
    Lost(String),
}

/// A stream that does not hold frames.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("broken frame: type {kind:#x}, length {len:#x}")]
pub struct BrokenFrame {
    kind: u8,
    len: usize,
}

impl From<BrokenFrame> for std::io::Error {
    fn from(broken: BrokenFrame) -> Self {
        Self::new(std::io::ErrorKind::InvalidData, broken)
    }
}

impl Frame {
    /// The frame as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (kind, payload) = match self {
            Self::Run(command) => (b'R', serde_json::to_vec(command).unwrap_or_default()),
            Self::Stdin(bytes) => (b'i', bytes.clone()),
            Self::StdinEnd => (b'z', Vec::new()),
            Self::Signal(signal) => (b's', signal.to_le_bytes().to_vec()),
            Self::StdinTaken => (b't', Vec::new()),
            Self::Ready(build) => (b'r', build.clone().into_bytes()),
            Self::Beat => (b'b', Vec::new()),
            Self::Stdout(bytes) => (b'o', bytes.clone()),
            Self::Stderr(bytes) => (b'e', bytes.clone()),
            Self::Exit(exit) => (b'x', serde_json::to_vec(exit).unwrap_or_default()),
            Self::Lost(why) => (b'l', why.clone().into_bytes()),
        };
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(5 + payload.len());
        bytes.push(kind);
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&payload);
        bytes
    }

    fn decode(kind: u8, payload: &[u8]) -> Option<Self> {
        Some(match kind {
            b'R' => Self::Run(serde_json::from_slice(payload).ok()?),
            b'i' => Self::Stdin(payload.to_vec()),
            b'z' => Self::StdinEnd,
            b's' => Self::Signal(i32::from_le_bytes(payload.try_into().ok()?)),
            b't' => Self::StdinTaken,
            b'r' => Self::Ready(String::from_utf8(payload.to_vec()).ok()?),
            b'b' => Self::Beat,
            b'o' => Self::Stdout(payload.to_vec()),
            b'e' => Self::Stderr(payload.to_vec()),
            b'x' => Self::Exit(serde_json::from_slice(payload).ok()?),
            b'l' => Self::Lost(String::from_utf8_lossy(payload).into_owned()),
            _ => return None,
        })
    }
}

/// Takes bytes as they come and gives frames.
#[derive(Default, Debug)]
pub struct Decoder {
    bytes: Vec<u8>,
}

impl Decoder {
    /// Takes what was read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame, if there is one.
    ///
    /// # Errors
    ///
    /// When the stream does not hold frames; it is of no use from there on.
    pub fn take(&mut self) -> Result<Option<Frame>, BrokenFrame> {
        let Some((&[kind, a, b, c, d], rest)) = self.bytes.split_first_chunk() else {
            return Ok(None);
        };
        let len = u32::from_le_bytes([a, b, c, d]) as usize;
        if len > LONGEST {
            return Err(BrokenFrame { kind, len });
        }
        let Some(payload) = rest.get(..len) else {
            return Ok(None);
        };
        let frame = Frame::decode(kind, payload).ok_or(BrokenFrame { kind, len })?;
        self.bytes.drain(..5 + len);
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_kind() -> Vec<Frame> {
        vec![
            Frame::Run(Command {
                argv: vec!["sh".into(), "-c".into(), "echo 'a b'".into()],
                env: [("PATH".into(), "/bin".into())].into(),
                cwd: "/".into(),
            }),
            Frame::Stdin(vec![0, 255]),
            Frame::StdinEnd,
            Frame::Signal(15),
            Frame::StdinTaken,
            Frame::Ready("build".into()),
            Frame::Beat,
            Frame::Stdout(b"out".to_vec()),
            Frame::Stderr(b"err".to_vec()),
            Frame::Exit(Exit::Signal(9)),
            Frame::Lost("why".into()),
        ]
    }

    #[test]
    fn frames_survive_any_fragmentation() {
        let stream: Vec<u8> = every_kind().iter().flat_map(Frame::encode).collect();
        for step in 1..20 {
            let mut decoder = Decoder::default();
            let mut frames = Vec::new();
            for part in stream.chunks(step) {
                decoder.push(part);
                while let Some(frame) = decoder.take().unwrap() {
                    frames.push(frame);
                }
            }
            assert_eq!(frames, every_kind());
        }
    }

    #[test]
    fn a_broken_stream_is_an_error() {
        for bytes in [&b"?\0\0\0\0"[..], b"o\xff\xff\xff\xff", b"s\x01\0\0\0x"] {
            let mut decoder = Decoder::default();
            decoder.push(bytes);
            assert!(decoder.take().is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn a_signal_counts_as_a_shell_counts_it() {
        assert_eq!(Exit::Signal(9).shell_status(), 137);
        assert_eq!(Exit::Status(3).shell_status(), 3);
    }
}
