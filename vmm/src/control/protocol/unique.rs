//! JSON values in which every name of an object is given once.
//!
//! `serde_json` takes the last of several members of one name, other readers the first: what a request
//! with two of them asks for depends on who reads it. So it is refused, as QEMU does
//! (qobject/json-parser.c).

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Longest name that is shown in an error.
const SHOWN: usize = 64;

/// A value, read with the rule above.
pub(super) struct Unique(pub(super) Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Any).map(Self)
    }
}

struct Any;

impl<'de> Visitor<'de> for Any {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(Unique(item)) = items.next_element()? {
            all.push(item);
        }
        Ok(Value::Array(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut all = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            if all.contains_key(&name) {
                let shown: String = name.chars().take(SHOWN).collect();
                return Err(A::Error::custom(format_args!(
                    "the member {shown:?} is given twice"
                )));
            }
            let Unique(value) = members.next_value()?;
            all.insert(name, value);
        }
        Ok(Value::Object(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(text: &str) -> Result<Value, String> {
        let read = serde_json::from_str(text).map(|Unique(value)| value);
        read.map_err(|error| error.to_string())
    }

    #[test]
    fn every_value_is_read_as_it_is() {
        let all = json!({
            "null": null, "yes": true, "text": "a\u{1f600}", "low": i64::MIN, "high": u64::MAX,
            "part": 1.5, "list": [[], {}, [0]], "same": {"same": {"same": 1}},
        });
        assert_eq!(read(&all.to_string()), Ok(all));
    }

    #[test]
    fn a_name_given_twice_is_refused_wherever_it_is() {
        for text in [
            r#"{"execute":"stop","execute":"quit"}"#,
            r#"{"a":1,"\u0061":1}"#,
            r#"[{"a":{"b":1,"b":1}}]"#,
        ] {
            let refused = read(text);
            assert!(refused.is_err_and(|e| e.contains("given twice")), "{text}");
        }
    }
}
