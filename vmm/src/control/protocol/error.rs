//! Errors as clients see them.

use crate::machine::StopError;
use crate::printable::printable_within;

/// Characters of a description: what a client sent is not all repeated to it.
const MAX_TEXT: usize = 2000;

/// QMP's error classes: there are few on purpose, and clients treat others as `GenericError`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub enum ErrorClass {
    /// Anything that has no class of its own; [`Reason`] says what.
    GenericError,
    /// There is no such command (now).
    CommandNotFound,
}

/// The first word of an error's description, for programs that want to know more than the class.
/// Words are added, never changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// Not JSON.
    Syntax,
    /// JSON, but not a request.
    BadRequest,
    /// A request or an answer over the size limit.
    TooLarge,
    /// No such command.
    CommandNotFound,
    /// Capabilities were not negotiated yet, or twice.
    Negotiation,
    /// An argument that the command does not have.
    UnknownArgument,
    /// An argument that the command needs.
    MissingArgument,
    /// An argument of the wrong JSON type.
    WrongType,
    /// An argument of the right type whose value makes no sense.
    InvalidArgument,
    /// Something named in the request does not exist.
    NotFound,
    /// Something of which there can be only so many.
    TooMany,
    /// Something else is under way that excludes this.
    Busy,
    /// The time given was not enough; nothing changed, or the text says what is still pending.
    Deadline,
    /// The guest has ended.
    Ended,
    /// The one who asked went away.
    Cancelled,
    /// A file or descriptor could not be read or written.
    Io,
    /// The rules of safety forbid it; the text names the reason.
    Refused,
    /// A fault of the VMM.
    Internal,
}

/// An error reply.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct QmpError {
    class: ErrorClass,
    reason: Reason,
    /// A finer word than the reason's own.
    word: Option<&'static str>,
    text: String,
}

impl std::fmt::Display for QmpError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = printable_within(&self.text, MAX_TEXT);
        match self.word {
            Some(word) => write!(f, "{word}: {text}"),
            None => write!(f, "{:?}: {text}", self.reason),
        }
    }
}

impl QmpError {
    /// An error of class `GenericError`. The text says what to do next and does not repeat the
    /// reason.
    pub fn new(reason: Reason, text: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::GenericError,
            reason,
            word: None,
            text: text.into(),
        }
    }

    /// An error of class `CommandNotFound`.
    pub(super) fn command(reason: Reason, text: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::CommandNotFound,
            ..Self::new(reason, text)
        }
    }

    /// There is no command of this name.
    #[must_use]
    pub fn no_such_command(name: &str) -> Self {
        let shown: String = name.chars().take(64).collect();
        Self::command(
            Reason::CommandNotFound,
            format!("there is no command {shown:?}; query-commands lists them"),
        )
    }

    /// The same with another stable first word, for commands that know more than [`Reason`] says.
    #[must_use]
    pub fn with_word(self, word: &'static str) -> Self {
        Self {
            word: Some(word),
            ..self
        }
    }

    /// The same with more behind its text.
    #[must_use]
    pub fn and(mut self, more: &str) -> Self {
        self.text.push_str(more);
        self
    }

    /// Why.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// QMP's class.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        self.class
    }

    /// The `error` member of a reply.
    #[must_use]
    pub fn to_value(&self) -> serde_json::Value {
        serde_json::json!({ "class": self.class, "desc": self.to_string() })
    }
}

impl std::error::Error for QmpError {}

impl From<StopError> for QmpError {
    fn from(error: StopError) -> Self {
        let reason = match &error {
            StopError::Deadline { .. }
            | StopError::DeviceDeadline { .. }
            | StopError::Busy { .. } => Reason::Deadline,
            StopError::Ended => Reason::Ended,
            StopError::Kvm { .. } => Reason::Internal,
        };
        Self::new(reason, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_sent_is_neither_repeated_at_length_nor_as_it_is() {
        let name = format!("\u{1b}[2J{}", "x".repeat(1 << 20));
        let error = QmpError::new(Reason::NotFound, format!("no symbol {name}; try another"));
        let text = error.to_string();
        assert!(
            text.starts_with("NotFound: no symbol \\u{1b}[2Jxx"),
            "{text}"
        );
        assert!(text.ends_with("xx; try another"), "{text}");
        assert!(text.len() < 2 * MAX_TEXT);
    }
}
