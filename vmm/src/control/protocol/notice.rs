//! What clients are told without having asked: events.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::machine::{Event, ResetCause, ShutdownCause};

/// When something happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timestamp(Duration);

impl Timestamp {
    /// Now, by the host's wall clock.
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self(since.unwrap_or_default())
    }

    /// A time since the epoch.
    #[must_use]
    pub fn at(since_epoch: Duration) -> Self {
        Self(since_epoch)
    }
}

/// Who is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Audience {
    /// Every client: QEMU defines an event of this name and shape.
    Everybody,
    /// Clients that asked for our own events. Typed clients fail on names that they do not know.
    Subscribers,
}

/// An event as clients see it.
#[derive(Clone, PartialEq, Debug)]
pub struct Notice {
    name: &'static str,
    data: Option<Value>,
    audience: Audience,
}

/// The events that QEMU defines and that we send to everybody.
pub const STANDARD_EVENTS: [&str; 7] = [
    "STOP",
    "RESUME",
    "SHUTDOWN",
    "RESET",
    "POWERDOWN",
    "GUEST_PANICKED",
    "DUMP_COMPLETED",
];

impl Notice {
    /// An event of QEMU's that the machine does not know of.
    #[must_use]
    pub fn standard(name: &'static str, data: Value) -> Self {
        Self {
            name,
            data: Some(data),
            audience: Audience::Everybody,
        }
    }

    /// An event of our own.
    #[must_use]
    pub fn own(name: &'static str, data: Value) -> Self {
        Self {
            name,
            data: Some(data),
            audience: Audience::Subscribers,
        }
    }

    /// Who is told.
    #[must_use]
    pub fn audience(&self) -> Audience {
        self.audience
    }

    /// One line.
    #[must_use]
    pub fn encode(&self, at: Timestamp) -> Vec<u8> {
        let mut message = json!({
            "timestamp": { "seconds": at.0.as_secs(), "microseconds": at.0.subsec_micros() },
            "event": self.name,
        });
        if let (Some(data), Some(members)) = (&self.data, message.as_object_mut()) {
            members.insert("data".to_owned(), data.clone());
        }
        super::session::line(&message)
    }
}

/// What the machine says, in QEMU's shapes. A panic is two: QEMU's event has no place for what the
/// kernel said (its `info` is for Hyper-V and s390), ours has.
#[must_use]
pub fn notices(event: &Event) -> Vec<Notice> {
    let bare = |name| Notice {
        name,
        data: None,
        audience: Audience::Everybody,
    };
    let one = match event {
        Event::Stop => bare("STOP"),
        Event::Resume => bare("RESUME"),
        Event::Powerdown => bare("POWERDOWN"),
        Event::Shutdown(cause) => {
            use ShutdownCause::{GuestPanic, GuestReset, GuestShutdown};
            let guest = matches!(cause, GuestShutdown | GuestReset | GuestPanic);
            Notice::standard("SHUTDOWN", json!({ "guest": guest, "reason": cause }))
        }
        Event::Reset(cause) => {
            let guest = *cause == ResetCause::GuestReset;
            Notice::standard("RESET", json!({ "guest": guest, "reason": cause }))
        }
        Event::GuestPanicked(said) => {
            let standard = Notice::standard("GUEST_PANICKED", json!({ "action": "poweroff" }));
            return vec![
                Notice::own("KERNEL_PANIC", json!({ "message": said })),
                standard,
            ];
        }
        Event::Own { name, data } => Notice::own(name, data.clone()),
    };
    vec![one]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shapes(event: &Event) -> Vec<Value> {
        let at = Timestamp::at(Duration::new(1_267_020_223, 435_656_123));
        notices(event)
            .iter()
            .map(|notice| {
                let line = notice.encode(at);
                assert!(line.ends_with(b"\r\n"));
                serde_json::from_slice(&line).unwrap_or_else(|e| panic!("{e}"))
            })
            .collect()
    }

    #[test]
    fn events_have_the_shape_that_qemu_gives_them() {
        assert_eq!(
            shapes(&Event::Stop),
            [json!({
                "timestamp": {"seconds": 1_267_020_223, "microseconds": 435_656},
                "event": "STOP"
            })]
        );
        let data = |event: &Event| shapes(event).pop().map(|e| e["data"].clone());
        assert_eq!(
            data(&Event::Shutdown(ShutdownCause::HostQmpQuit)),
            Some(json!({"guest": false, "reason": "host-qmp-quit"}))
        );
        assert_eq!(
            data(&Event::Shutdown(ShutdownCause::GuestShutdown)),
            Some(json!({"guest": true, "reason": "guest-shutdown"}))
        );
        assert_eq!(
            data(&Event::Reset(ResetCause::HostQmpSystemReset)),
            Some(json!({"guest": false, "reason": "host-qmp-system-reset"}))
        );
        assert_eq!(
            data(&Event::GuestPanicked("Kernel panic".into())),
            Some(json!({"action": "poweroff"}))
        );
    }

    #[test]
    fn only_names_that_qemu_defines_go_to_everybody() {
        let own = Event::Own {
            name: "ARENA_WRITE_REFUSED",
            data: json!({}),
        };
        for event in [
            own,
            Event::Stop,
            Event::Resume,
            Event::Powerdown,
            Event::Reset(ResetCause::GuestReset),
            Event::Shutdown(ShutdownCause::HostSignal),
            Event::GuestPanicked(String::new()),
        ] {
            for notice in notices(&event) {
                let standard = STANDARD_EVENTS.contains(&notice.name);
                assert_eq!(
                    standard,
                    notice.audience() == Audience::Everybody,
                    "{notice:?}"
                );
            }
        }
    }
}
