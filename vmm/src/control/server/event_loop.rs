//! The loop: connections, packets, results and events, one turn at a time.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::accept::{Arrival, Door};
use super::client::{Client, PACKET, Received};
use super::listen::ControlSocket;
use super::mailbox::{ClientId, Finished, Mailbox};
use super::peer::Peer;
use super::{MAX_CLIENTS, ServerError};
use crate::control::command::{Context, Registry, Services, Speed};
use crate::control::protocol::{Notice, QmpError, Reason, Request, Timestamp};

/// Connections taken in one turn, so that a flood of them does not keep clients waiting.
const ARRIVALS_A_TURN: usize = 16;

/// Unfinished requests up to this size are free; what is longer counts towards
/// [`MAX_UNFINISHED`].
const FREE_UNFINISHED: usize = 4 << 10;

/// Bytes of longer unfinished requests that all clients together may have.
const MAX_UNFINISHED: usize = 8 << 20;

/// How long the last replies and events may take to get out, and a dump to be given up.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// See the module's documentation.
pub(super) struct EventLoop {
    socket: ControlSocket,
    door: Door,
    mailbox: Arc<Mailbox>,
    services: Arc<Services>,
    registry: Arc<Registry>,
    clients: BTreeMap<RawFd, Client>,
    next_serial: u64,
    descriptors: Arc<AtomicUsize>,
    packet: Box<[u8]>,
    closing: Option<Instant>,
}

impl EventLoop {
    pub(super) fn new(
        socket: ControlSocket,
        mailbox: Arc<Mailbox>,
        services: Arc<Services>,
        registry: Registry,
    ) -> Result<Self, ServerError> {
        Ok(Self {
            socket,
            door: Door::new(),
            mailbox,
            services,
            registry: Arc::new(registry.complete()),
            clients: BTreeMap::new(),
            next_serial: 0,
            descriptors: Arc::default(),
            packet: vec![0; PACKET].into_boxed_slice(),
            closing: None,
        })
    }

    /// How many milliseconds to wait for something to happen, -1 for ever; `None` to end.
    pub(super) fn patience_ms(&self) -> Option<i32> {
        let Some(since) = self.closing else {
            return Some(-1);
        };
        let told = self.clients.values().all(|c| c.output.waiting() == 0);
        let done = told && !self.services.dump().is_active();
        (!done && since.elapsed() < LAST_WORDS).then_some(20)
    }

    fn arrivals(&mut self, ops: &mut EventOps<'_>) {
        for _ in 0..ARRIVALS_A_TURN {
            let room = self.clients.len() < MAX_CLIENTS;
            match self.door.next(self.socket.listener(), room) {
                Arrival::None => return,
                Arrival::Refused => {}
                Arrival::Client(stream, identity) => {
                    self.next_serial += 1;
                    let peer = Peer::new(identity, Arc::clone(&self.descriptors));
                    let client = Client::new(stream, self.next_serial, peer);
                    let fd = client.as_raw_fd();
                    self.clients.insert(fd, client);
                    self.settle(fd, ops);
                }
            }
        }
    }

    fn mail(&mut self, ops: &mut EventOps<'_>) {
        let mail = self.mailbox.take();
        self.tell(mail.events, ops);
        for finished in mail.finished {
            let Finished {
                client: id,
                result,
                kept,
            } = finished;
            let Some(client) = self.clients.get_mut(&id.fd).filter(|c| c.id() == id) else {
                continue;
            };
            client.answer(result);
            client.flush();
            drop(kept);
            self.turn(id.fd, ops);
            self.settle(id.fd, ops);
        }
        if mail.closing && self.closing.is_none() {
            self.closing = Some(Instant::now());
            // What there is of it is taken away again.
            self.services.dump().give_up();
            let _ = ops.remove(Events::empty(self.socket.listener()));
        }
    }

    /// Passes events on to everybody who wants them.
    fn tell(
        &mut self,
        events: impl IntoIterator<Item = (Notice, Timestamp)>,
        ops: &mut EventOps<'_>,
    ) {
        let mut told = Vec::new();
        for (notice, at) in events {
            let line = notice.encode(at);
            for (fd, client) in &mut self.clients {
                if client.session().wants(&notice) {
                    if !client.output.push_event(&line) {
                        tracing::warn!("a client that does not read its events was dropped");
                        client.doomed = true;
                    }
                    told.push(*fd);
                }
            }
        }
        told.sort_unstable();
        told.dedup();
        for fd in told {
            self.settle(fd, ops);
        }
    }

    /// Something happened on a connection.
    fn connection(&mut self, fd: RawFd, happened: EventSet, ops: &mut EventOps<'_>) {
        let Some(client) = self.clients.get_mut(&fd) else {
            return;
        };
        let hung_up = happened.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if hung_up {
            client.peer.went();
        }
        if happened.contains(EventSet::OUT) || hung_up {
            client.flush();
        }
        self.turn(fd, ops);
        if let Some(client) = self.clients.get_mut(&fd).filter(|_| hung_up) {
            if !client.hungry() && client.watched.is_some() {
                // A hang-up is reported for ever: look away until the command that runs has ended.
                let _ = ops.remove(Events::empty(client));
                client.watched = None;
            }
        }
        self.settle(fd, ops);
    }

    /// Takes in and runs what one connection has for us: its backlog, then one packet.
    fn turn(&mut self, fd: RawFd, ops: &mut EventOps<'_>) {
        let mut packet = std::mem::take(&mut self.packet);
        if let Some(client) = self.clients.get_mut(&fd) {
            let mut count = 0;
            if client.hungry() {
                if let Received::Bytes(received) = client.receive(&mut packet) {
                    count = received;
                }
            }
            if count > 0 || client.has_backlog() {
                self.execute(fd, packet.get(..count).unwrap_or_default(), ops);
            }
        }
        self.packet = packet;
        self.bound_unfinished(fd);
    }

    fn execute(&mut self, fd: RawFd, mut packet: &[u8], ops: &mut EventOps<'_>) {
        while let Some(client) = self.clients.get_mut(&fd) {
            let Some(request) = client.next_request(&mut packet) else {
                client.keep(packet);
                return;
            };
            let context = Context::new(Arc::clone(&self.services), Arc::clone(&client.peer));
            let id = client.id();
            let result = match self.registry.speed(&request.command) {
                None => Err(QmpError::no_such_command(&request.command)),
                Some(Speed::Quick) => self.registry.run(&context, request),
                Some(Speed::Slow) => match self.start(id, context, request) {
                    Ok(()) => {
                        if let Some(client) = self.clients.get_mut(&fd) {
                            client.keep(packet);
                        }
                        return;
                    }
                    Err(error) => Err(error),
                },
            };
            // What the command caused is told before it is answered.
            let events = self.mailbox.take_events();
            self.tell(events, ops);
            if let Some(client) = self.clients.get_mut(&fd) {
                client.answer(result);
            }
        }
    }

    fn start(&self, client: ClientId, context: Context, request: Request) -> Result<(), QmpError> {
        let (registry, mailbox) = (Arc::clone(&self.registry), Arc::clone(&self.mailbox));
        let job = Box::new(move || {
            let result = registry.run(&context, request);
            let kept = context.into_kept();
            mailbox.finished(Finished {
                client,
                result,
                kept,
            });
        });
        self.services.workers().run(job).map_err(|error| {
            QmpError::new(
                Reason::Internal,
                format!("no thread for the command: {error}"),
            )
        })
    }

    /// All clients' unfinished long requests together have a bound.
    fn bound_unfinished(&mut self, fd: RawFd) {
        let over = |client: &Client| client.kept().saturating_sub(FREE_UNFINISHED);
        if self.clients.get(&fd).map_or(0, over) == 0 {
            return;
        }
        let sum: usize = self.clients.values().map(over).sum();
        if sum > MAX_UNFINISHED {
            if let Some(client) = self.clients.get_mut(&fd) {
                let line = client.session().refuse_unfinished();
                client.output.push(&line);
            }
        }
    }

    /// Sends what can be sent now, and sets what to watch for next.
    fn settle(&mut self, fd: RawFd, ops: &mut EventOps<'_>) {
        let Some(client) = self.clients.get_mut(&fd) else {
            return;
        };
        client.flush();
        if client.finished() {
            client.peer.went();
            if client.watched.is_some() {
                let _ = ops.remove(Events::empty(client));
            }
            self.clients.remove(&fd);
            return;
        }
        let wanted = client.interest();
        let changed = match client.watched {
            None if client.peer.is_gone() && wanted.is_empty() => return,
            None => ops.add(Events::new(client, wanted)),
            Some(watched) if watched != wanted => ops.modify(Events::new(client, wanted)),
            Some(_) => return,
        };
        match changed {
            Ok(()) => client.watched = Some(wanted),
            Err(error) => {
                tracing::warn!(%error, "a client cannot be watched and is dropped");
                client.peer.went();
                self.clients.remove(&fd);
            }
        }
    }
}

impl MutEventSubscriber for EventLoop {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for source in [self.mailbox.as_raw_fd(), self.socket.listener().as_raw_fd()] {
            if let Err(error) = ops.add(Events::new_raw(source, EventSet::IN)) {
                tracing::error!(%error, "the control socket does not work");
                self.closing = Some(Instant::now());
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let fd = events.fd();
        if fd == self.mailbox.as_raw_fd() {
            self.mail(ops);
        } else if fd == self.socket.listener().as_raw_fd() {
            self.arrivals(ops);
        } else {
            self.connection(fd, events.event_set(), ops);
        }
    }
}
