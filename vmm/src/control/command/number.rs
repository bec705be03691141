//! Numbers of 64 bits in requests.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, Visitor};

use crate::cli::values::number;

/// `"data": 5` or `"data": "0xffffffff81000000"`: programs that know only floating point lose the last
/// digits of large numbers, and write them as strings.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NumberArgument(pub u64);

impl<'de> Deserialize<'de> for NumberArgument {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Either)
    }
}

struct Either;

impl Visitor<'_> for Either {
    type Value = NumberArgument;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, or a string with one such as \"0x1000\"")
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<NumberArgument, E> {
        Ok(NumberArgument(value))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<NumberArgument, E> {
        number(text).map(NumberArgument).map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn numbers_and_strings() {
        let parse = |value: Value| serde_json::from_value::<NumberArgument>(value).ok();
        let top = json!("0xffffffffffffffff");
        assert_eq!(parse(json!(5)), Some(NumberArgument(5)));
        assert_eq!(parse(top), Some(NumberArgument(u64::MAX)));
        for bad in [json!(-1), json!(1.5), json!("five"), json!(null), json!([])] {
            assert_eq!(parse(bad), None);
        }
    }
}
