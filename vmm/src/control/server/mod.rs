//! The control socket's server: one thread that never waits for a client or for the guest.
//!
//! Guarantees, whatever clients do: at most [`MAX_CLIENTS`] connections; per client at most one
//! unfinished request, one packet that waits behind a running command, and a bounded amount of
//! output (a client that lets more pile up is dropped); replies in the order of the requests; a
//! command that can wait runs on a thread of its own and delays nobody but the client that sent
//! it. What a client sent before it went away is still executed, but nothing waits for it any more.
//!
//! Not guaranteed: fairness between the commands of different clients that need the guest stopped;
//! the machine decides their order.

mod accept;
mod client;
mod event_loop;
mod listen;
mod mailbox;
mod output;
mod peer;
mod workers;

use std::sync::Arc;
use std::thread::JoinHandle;

use event_manager::{EventManager, SubscriberOps};

pub use listen::{BindError, ControlSocket};
pub use peer::{Identity, Passed, Peer};

use super::command::{Registry, Services};
use super::host::Host;
use event_loop::EventLoop;
pub(super) use mailbox::Mailbox;
pub(super) use workers::Workers;

/// More connections than this are refused with an error line.
pub const MAX_CLIENTS: usize = 256;

/// Enough for the deepest request; what is not touched costs nothing.
const LOOP_STACK: usize = 256 << 10;

/// Why the server could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The host refused to watch descriptors.
    #[error("the control socket's event loop: {0}")]
    Events(event_manager::Error),
    /// The host refused a descriptor or a thread.
    #[error("the control socket's thread: {0}")]
    Host(#[from] std::io::Error),
}

/// The running server. Dropping it is the same as [`ControlServer::finish`].
#[derive(Debug)]
pub struct ControlServer {
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
}

impl ControlSocket {
    /// Starts to serve clients.
    ///
    /// # Errors
    /// [`ServerError`] when the host has no descriptors or threads left.
    pub fn serve(
        self,
        host: Arc<dyn Host>,
        registry: Registry,
    ) -> Result<ControlServer, ServerError> {
        let mailbox = Arc::new(Mailbox::new()?);
        let services = Services::new(host, Arc::clone(&mailbox));
        services.forward_events();
        let event_loop = EventLoop::new(self, Arc::clone(&mailbox), services, registry)?;
        let mut manager = EventManager::new_with_capacity(32).map_err(ServerError::Events)?;
        let thread = std::thread::Builder::new()
            .name("control".to_owned())
            .stack_size(LOOP_STACK)
            .spawn(move || {
                let id = manager.add_subscriber(event_loop);
                while let Ok(event_loop) = manager.subscriber_mut(id) {
                    let Some(timeout) = event_loop.patience_ms() else {
                        return;
                    };
                    if let Err(error) = manager.run_with_timeout(timeout) {
                        tracing::error!(%error, "the control socket is closed");
                        return;
                    }
                }
            })?;
        Ok(ControlServer {
            mailbox,
            thread: Some(thread),
        })
    }
}

impl ControlServer {
    /// Sends what is still to be sent, for a moment, closes every connection, and removes the
    /// socket. Commands that still run are not waited for.
    pub fn finish(mut self) {
        self.close();
    }

    fn close(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.mailbox.close();
            if thread.join().is_err() {
                tracing::error!("the control socket's thread panicked");
            }
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.close();
    }
}
