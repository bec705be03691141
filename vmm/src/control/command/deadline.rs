//! The argument `deadline` of commands that can wait.

use std::fmt;
use std::time::Duration;

use serde::de::{self, Deserialize, Deserializer, Visitor};

use crate::cli::values::Deadline;

/// How long a command waits for the guest when it is not told.
const USUAL: Duration = Duration::from_secs(5);

/// `"deadline": 500` (milliseconds) or `"deadline": "5s"`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DeadlineArgument(Option<Duration>);

impl DeadlineArgument {
    /// The time given, or five seconds.
    #[must_use]
    pub fn or_usual(self) -> Duration {
        self.or(USUAL)
    }

    /// The time given, or another.
    #[must_use]
    pub fn or(self, usual: Duration) -> Duration {
        self.0.unwrap_or(usual)
    }
}

impl<'de> Deserialize<'de> for DeadlineArgument {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Either)
    }
}

struct Either;

impl Visitor<'_> for Either {
    type Value = DeadlineArgument;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("milliseconds, or a time such as \"5s\"")
    }

    fn visit_u64<E: de::Error>(self, millis: u64) -> Result<DeadlineArgument, E> {
        let deadline = Deadline::from_millis(millis).map_err(E::custom)?;
        Ok(DeadlineArgument(Some(deadline.0)))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<DeadlineArgument, E> {
        let deadline: Deadline = text.parse().map_err(E::custom)?;
        Ok(DeadlineArgument(Some(deadline.0)))
    }

    fn visit_unit<E: de::Error>(self) -> Result<DeadlineArgument, E> {
        Ok(DeadlineArgument(None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn both_spellings() {
        let parse = |value: Value| serde_json::from_value::<DeadlineArgument>(value).ok();
        let usual = |value| parse(value).map(DeadlineArgument::or_usual);
        assert_eq!(usual(json!(500)), Some(Duration::from_millis(500)));
        assert_eq!(usual(json!("5s")), Some(Duration::from_secs(5)));
        assert_eq!(usual(json!(null)), Some(USUAL));
        for wrong in [
            json!(-1),
            json!(1.5),
            json!("soon"),
            json!(true),
            json!(u64::MAX),
        ] {
            assert_eq!(parse(wrong.clone()), None, "{wrong}");
        }
    }
}
