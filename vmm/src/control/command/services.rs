//! What commands work with.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::control::dump::DumpState;
use crate::control::host::{Host, StoppedHost};
use crate::control::protocol::{Notice, QmpError, Reason, notices};
use crate::control::server::{Mailbox, Peer, Workers};
use crate::machine::StopTimes;

/// How many stops are remembered.
const STOPS: usize = 16;

/// One stop of the guest, as `query-stops` tells it.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct StopRecord {
    /// What stopped it.
    pub command: &'static str,
    /// Microseconds from the request until every vCPU was parked.
    #[serde(rename = "to-stopped-us", serialize_with = "micros")]
    pub to_stopped: Duration,
    /// Microseconds that the guest missed; for a stop by a client, known when it goes on.
    #[serde(rename = "stalled-us", serialize_with = "micros_if_known")]
    pub stalled: Option<Duration>,
}

fn as_micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn micros<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_u64(as_micros(*time))
}

fn micros_if_known<S: Serializer>(time: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => to.serialize_u64(as_micros(*time)),
        None => to.serialize_none(),
    }
}

/// What all commands share.
pub struct Services {
    host: Arc<dyn Host>,
    mailbox: Arc<Mailbox>,
    workers: Workers,
    stops: Mutex<VecDeque<StopRecord>>,
    dump: Arc<DumpState>,
}

impl Services {
    pub(in crate::control) fn new(host: Arc<dyn Host>, mailbox: Arc<Mailbox>) -> Arc<Self> {
        Arc::new(Self {
            host,
            mailbox,
            workers: Workers::default(),
            stops: Mutex::default(),
            dump: Arc::default(),
        })
    }

    /// Passes the machine's events on to clients from now on.
    pub(in crate::control) fn forward_events(&self) {
        let mailbox = Arc::clone(&self.mailbox);
        self.host.subscribe(Box::new(move |event| {
            notices(event).into_iter().for_each(|n| mailbox.notice(n));
        }));
    }

    pub(in crate::control) fn workers(&self) -> &Workers {
        &self.workers
    }

    /// The machine.
    #[must_use]
    pub fn host(&self) -> &dyn Host {
        &*self.host
    }

    /// Tells clients of an event.
    pub fn announce(&self, notice: Notice) {
        self.mailbox.notice(notice);
    }

    pub(in crate::control) fn dump(&self) -> &Arc<DumpState> {
        &self.dump
    }

    /// Remembers a stop for `query-stops`.
    pub fn record_stop(&self, record: StopRecord) {
        let mut stops = self.stops.lock().unwrap_or_else(PoisonError::into_inner);
        stops.truncate(STOPS - 1);
        stops.push_front(record);
    }

    /// The guest goes on: the last stop by a client is over.
    pub(super) fn record_resume(&self, stalled: Duration) {
        let mut stops = self.stops.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = stops.iter_mut().find(|stop| stop.stalled.is_none()) {
            open.stalled = Some(stalled);
        }
    }

    /// The last stops, newest first.
    #[must_use]
    pub fn stops(&self) -> Vec<StopRecord> {
        let stops = self.stops.lock().unwrap_or_else(PoisonError::into_inner);
        stops.iter().cloned().collect()
    }

    /// Stops the guest, does the work, lets go on what it stopped, and remembers how long it took.
    ///
    /// # Errors
    /// When the guest could not be stopped; the work was then not done.
    pub fn while_stopped<R>(
        &self,
        command: &'static str,
        deadline: Duration,
        work: impl FnOnce(&mut dyn StoppedHost) -> R,
    ) -> Result<(R, StopTimes), QmpError> {
        let (mut work, mut result) = (Some(work), None);
        let times = self.host.with_stopped(deadline, &mut |stopped| {
            if let Some(work) = work.take() {
                result = Some(work(stopped));
            }
        })?;
        self.record_stop(StopRecord {
            command,
            to_stopped: times.to_stopped,
            stalled: Some(times.stalled),
        });
        let result = result.ok_or_else(|| {
            let text = "the guest was stopped, but the work was not done";
            QmpError::new(Reason::Internal, text)
        })?;
        Ok((result, times))
    }
}

/// What one command works with.
pub struct Context {
    /// What all commands share.
    pub services: Arc<Services>,
    /// The client that sent it.
    pub peer: Arc<Peer>,
    kept: Mutex<Kept>,
}

/// What a command keeps until it is answered.
pub type Kept = Vec<Box<dyn Send>>;

impl Context {
    pub(in crate::control) fn new(services: Arc<Services>, peer: Arc<Peer>) -> Self {
        Self {
            services,
            peer,
            kept: Mutex::default(),
        }
    }

    /// What is to be kept until the command's answer was sent.
    pub(in crate::control) fn into_kept(self) -> Kept {
        self.kept
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops `what` when the command's answer was sent.
    pub fn keep_until_answered(&self, what: impl Send + 'static) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push(Box::new(what));
    }
}
