//! One connection.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use event_manager::EventSet;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::Value;

use super::mailbox::ClientId;
use super::output::Output;
use super::peer::Peer;
use crate::control::protocol::{Limits, QmpError, Request, Session, Step};

/// Most that is read at once, and most that waits behind a running command.
pub(super) const PACKET: usize = 16 << 10;

/// Descriptors taken from one packet; the kernel closes what does not fit.
const PASSED: usize = 8;

/// A connection and everything that belongs to it.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) stream: UnixStream,
    pub(super) peer: Arc<Peer>,
    serial: u64,
    session: Session,
    pub(super) output: Output,
    /// Came in while a command ran or the output was full.
    backlog: Vec<u8>,
    /// Nothing more will come in.
    ended: bool,
    /// It overran its output or broke a rule: out with it.
    pub(super) doomed: bool,
    /// What epoll watches; `None` when it watches nothing.
    pub(super) watched: Option<EventSet>,
}

/// What reading brought.
pub(super) enum Received {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// Nothing ever again.
    End,
}

impl Client {
    pub(super) fn new(stream: UnixStream, serial: u64, peer: Peer) -> Self {
        let mut output = Output::default();
        output.push(&Session::greeting());
        Self {
            stream,
            peer: Arc::new(peer),
            serial,
            session: Session::new(Limits::default()),
            output,
            backlog: Vec::new(),
            ended: false,
            doomed: false,
            watched: None,
        }
    }

    pub(super) fn id(&self) -> ClientId {
        ClientId {
            fd: self.stream.as_raw_fd(),
            serial: self.serial,
        }
    }

    pub(super) fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Bytes of an unfinished request.
    pub(super) fn kept(&self) -> usize {
        self.session.kept()
    }

    /// Reads one packet with its descriptors, if more is wanted.
    pub(super) fn receive(&mut self, into: &mut [u8]) -> Received {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PASSED))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let mut parts = [IoSliceMut::new(into)];
        let received = rustix::net::recvmsg(&self.stream, &mut parts, &mut control, flags);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                fds.for_each(|fd| self.peer.received(fd));
            }
        }
        match received {
            Ok(message) if message.bytes > 0 => Received::Bytes(message.bytes),
            Err(Errno::AGAIN | Errno::INTR) => Received::Nothing,
            _ => {
                self.ended = true;
                Received::End
            }
        }
    }

    /// The next command in the backlog and the packet; answers what needs no command by itself.
    /// Whatever is left of `packet` has to be given to [`Client::keep`].
    pub(super) fn next_request(&mut self, packet: &mut &[u8]) -> Option<Request> {
        while !self.output.is_full() {
            let step = if self.backlog.is_empty() {
                self.session.next(packet)
            } else {
                let backlog = std::mem::take(&mut self.backlog);
                let mut rest = backlog.as_slice();
                let step = self.session.next(&mut rest);
                if !rest.is_empty() {
                    self.backlog = rest.to_vec();
                }
                if step.is_none() && self.backlog.is_empty() {
                    continue;
                }
                step
            };
            match step? {
                Step::Execute(request) => return Some(request),
                Step::Send(bytes) => self.output.push(&bytes),
            }
        }
        None
    }

    /// Keeps what could not be taken now.
    pub(super) fn keep(&mut self, packet: &[u8]) {
        self.backlog.extend_from_slice(packet);
    }

    /// Answers the command that ran.
    pub(super) fn answer(&mut self, result: Result<Value, QmpError>) {
        let bytes = self.session.finish(result);
        self.output.push(&bytes);
    }

    /// A command runs on another thread.
    pub(super) fn busy(&self) -> bool {
        self.session.executing()
    }

    /// True when it can be asked for more input.
    pub(super) fn hungry(&self) -> bool {
        !self.ended && !self.busy() && !self.output.is_full() && self.backlog.is_empty()
    }

    /// True when there is something to take from the backlog.
    pub(super) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty() && !self.busy() && !self.output.is_full()
    }

    /// True when the connection is over: nothing comes in, nothing runs, nothing is left to send.
    pub(super) fn finished(&self) -> bool {
        let quiet = self.ended && self.backlog.is_empty() && self.output.waiting() == 0;
        self.doomed || quiet && !self.busy()
    }

    /// What epoll should watch for; a hang-up is always reported, unless nothing is watched. A
    /// backlog that can be taken again, because the output was read meanwhile, is worth a turn too:
    /// that the client can be written to is reported at once.
    pub(super) fn interest(&self) -> EventSet {
        let mut wanted = EventSet::empty();
        wanted.set(EventSet::IN, self.hungry());
        wanted.set(
            EventSet::OUT,
            self.output.waiting() > 0 || self.has_backlog(),
        );
        wanted
    }

    pub(super) fn flush(&mut self) {
        self.output.flush(&self.stream);
    }
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::super::peer::Identity;
    use super::*;

    #[test]
    fn what_waits_behind_output_has_its_turn_when_that_was_read() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let somebody = Identity { pid: 1, uid: 0 };
        let mut client = Client::new(ours, 1, Peer::new(somebody, Arc::default()));
        client.flush();
        assert_eq!(client.interest(), EventSet::IN);
        // An answer larger than any socket's buffer; the line end behind its request is left over.
        client.output.push(&vec![b'x'; 4 << 20]);
        client.keep(b"\n");
        client.flush();
        assert_eq!(client.interest(), EventSet::OUT);
        let mut read = vec![0; 1 << 20];
        while client.output.waiting() > 0 {
            assert!(theirs.read(&mut read).unwrap() > 0);
            client.flush();
        }
        assert!(client.has_backlog() && !client.hungry());
        assert_eq!(client.interest(), EventSet::OUT);
        assert_eq!(client.next_request(&mut &b""[..]), None);
        assert_eq!(client.interest(), EventSet::IN);
    }
}
