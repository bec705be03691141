//! What happens to the machine and is told to whoever listens.

/// Who asked for the guest to end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownCause {
    /// The guest powered itself off.
    GuestShutdown,
    /// The guest reset and `--no-reboot` was given.
    GuestReset,
    /// The guest kernel panicked.
    GuestPanic,
    /// The `quit` command.
    HostQmpQuit,
    /// A signal to the process.
    HostSignal,
    /// KVM reported an error.
    HostError,
}

/// Who asked for a reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResetCause {
    /// The guest itself.
    GuestReset,
    /// The `system_reset` command.
    HostQmpSystemReset,
}

/// An event of the machine. The first six are QEMU's own and go to every client.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// The guest was stopped for a client.
    Stop,
    /// The guest goes on.
    Resume,
    /// The guest ended.
    Shutdown(ShutdownCause),
    /// The guest starts again.
    Reset(ResetCause),
    /// The power button was pressed.
    Powerdown,
    /// The guest kernel panicked; the text is what it said last.
    GuestPanicked(String),
    /// One of our own, told only to connections that asked for it.
    Own {
        /// Name in capitals, as QMP writes event names.
        name: &'static str,
        /// Its `data` object.
        data: serde_json::Value,
    },
}

/// Receives events.
pub type EventSink = Box<dyn Fn(&Event) + Send + Sync>;
