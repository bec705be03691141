//! From a request's `arguments` to a command's own structure.
//!
//! `serde_json`'s own conversion does not say which argument has the wrong type, and its errors can
//! only be told apart by their text. This one names the argument and gives every kind of mistake
//! its own first word.

use serde::de::value::{MapDeserializer, SeqDeserializer, StringDeserializer};
use serde::de::{
    self, Deserialize, DeserializeSeed, Deserializer, Expected, IntoDeserializer, MapAccess,
    Unexpected, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::{Map, Value};

use super::error::{QmpError, Reason};

/// Converts arguments into `T`, which should deny unknown fields.
///
/// # Errors
/// [`Reason::UnknownArgument`], [`Reason::MissingArgument`], [`Reason::WrongType`] or
/// [`Reason::InvalidArgument`], naming the argument.
pub fn from_arguments<'de, T: Deserialize<'de>>(
    arguments: Map<String, Value>,
) -> Result<T, QmpError> {
    T::deserialize(Argument(Value::Object(arguments))).map_err(|mistake| {
        let text = match mistake.argument {
            Some(name) => format!("{name}: {}", mistake.text),
            None => mistake.text,
        };
        QmpError::new(mistake.reason, text)
    })
}

#[derive(Debug)]
struct Mistake {
    reason: Reason,
    argument: Option<String>,
    text: String,
}

impl Mistake {
    fn new(reason: Reason, text: String) -> Self {
        Self {
            reason,
            argument: None,
            text,
        }
    }
}

impl std::fmt::Display for Mistake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Mistake {}

impl de::Error for Mistake {
    fn custom<T: std::fmt::Display>(text: T) -> Self {
        Self::new(Reason::InvalidArgument, text.to_string())
    }

    fn invalid_type(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        let text = format!("expected {expected}, got {}", short(unexpected));
        Self::new(Reason::WrongType, text)
    }

    fn invalid_value(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        let text = format!("expected {expected}, got {}", short(unexpected));
        Self::new(Reason::InvalidArgument, text)
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        let shown: String = variant.chars().take(64).collect();
        let text = format!("{shown:?} is not one of {}", expected.join(", "));
        Self::new(Reason::InvalidArgument, text)
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        let shown: String = field.chars().take(64).collect();
        let text = if expected.is_empty() {
            format!("{shown:?}; the command takes no arguments")
        } else {
            format!("{shown:?}; the command takes {}", expected.join(", "))
        };
        Self::new(Reason::UnknownArgument, text)
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(Reason::MissingArgument, field.to_owned())
    }
}

/// A client's own long string is not repeated to it.
fn short(unexpected: Unexpected<'_>) -> String {
    match unexpected {
        Unexpected::Str(text) if text.len() > 64 => "a string".to_owned(),
        Unexpected::Unit => "null".to_owned(),
        other => other.to_string(),
    }
}

struct Argument(Value);

impl<'de> Deserializer<'de> for Argument {
    type Error = Mistake;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mistake> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(value),
            Value::String(value) => visitor.visit_string(value),
            Value::Array(items) => {
                visitor.visit_seq(SeqDeserializer::new(items.into_iter().map(Argument)))
            }
            Value::Object(members) => visitor.visit_map(Named {
                inner: MapDeserializer::new(members.into_iter().map(|(k, v)| (k, Argument(v)))),
                name: String::new(),
            }),
            Value::Number(number) => {
                if let Some(value) = number.as_u64() {
                    visitor.visit_u64(value)
                } else if let Some(value) = number.as_i64() {
                    visitor.visit_i64(value)
                } else {
                    visitor.visit_f64(number.as_f64().unwrap_or(f64::NAN))
                }
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mistake> {
        match self.0 {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Mistake> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Mistake> {
        match self.0 {
            Value::String(variant) => {
                let variant: StringDeserializer<Mistake> = variant.into_deserializer();
                variant.deserialize_enum(name, variants, visitor)
            }
            _ => self.deserialize_any(visitor),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

impl<'de> IntoDeserializer<'de, Mistake> for Argument {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

/// Adds the name of the argument to what is wrong with its value.
struct Named<M> {
    inner: M,
    name: String,
}

/// Remembers a key while it is read.
struct Key<'a, K> {
    seed: K,
    name: &'a mut String,
}

impl<'de, K: DeserializeSeed<'de>> DeserializeSeed<'de> for Key<'_, K> {
    type Value = K::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<K::Value, D::Error> {
        let key = String::deserialize(deserializer)?;
        self.name.clone_from(&key);
        self.seed.deserialize(key.into_deserializer())
    }
}

impl<'de, M: MapAccess<'de, Error = Mistake>> MapAccess<'de> for Named<M> {
    type Error = Mistake;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Mistake> {
        self.inner.next_key_seed(Key {
            seed,
            name: &mut self.name,
        })
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Mistake> {
        self.inner.next_value_seed(seed).map_err(|mut mistake| {
            let name = std::mem::take(&mut self.name);
            mistake.argument = Some(match mistake.argument.take() {
                Some(inner) => format!("{name}.{inner}"),
                None => name,
            });
            mistake
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[derive(serde::Deserialize, PartialEq, Debug)]
    #[serde(rename_all = "lowercase")]
    enum Format {
        Elf,
        Flat,
    }

    #[derive(serde::Deserialize, PartialEq, Debug)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct Sample {
        command_line: String,
        cpu_index: Option<u32>,
        #[serde(default)]
        force: bool,
        format: Option<Format>,
        list: Option<Vec<u8>>,
    }

    #[derive(serde::Deserialize, Debug)]
    #[serde(deny_unknown_fields)]
    struct Nothing {}

    fn sample(value: Value) -> Result<Sample, String> {
        let Value::Object(map) = value else {
            panic!("not an object");
        };
        from_arguments(map).map_err(|e| e.to_string())
    }

    #[test]
    fn good_arguments() {
        assert_eq!(
            sample(json!({"command-line": "help", "cpu-index": 0, "format": "elf", "list": [1]})),
            Ok(Sample {
                command_line: "help".into(),
                cpu_index: Some(0),
                force: false,
                format: Some(Format::Elf),
                list: Some(vec![1]),
            })
        );
        assert!(sample(json!({"command-line": "x", "cpu-index": null})).is_ok());
    }

    #[test]
    fn each_mistake_has_its_word_and_names_the_argument() {
        for (value, expected) in [
            (json!({}), "MissingArgument: command-line"),
            (
                json!({"command-line": 5}),
                "WrongType: command-line: expected a string, got integer `5`",
            ),
            (
                json!({"command-line": "x", "force": 1}),
                "WrongType: force: expected a boolean, got integer `1`",
            ),
            (
                json!({"command-line": "x", "cpu-index": -1}),
                "InvalidArgument: cpu-index: expected u32, got integer `-1`",
            ),
            (
                json!({"command-line": "x", "cpu-index": 1.5}),
                "WrongType: cpu-index: expected u32, got floating point `1.5`",
            ),
            (
                json!({"command-line": "x", "format": "zip"}),
                "InvalidArgument: format: \"zip\" is not one of elf, flat",
            ),
            (
                json!({"command-line": "x", "list": ["a"]}),
                "WrongType: list: expected u8, got string \"a\"",
            ),
            (
                json!({"command-line": null}),
                "WrongType: command-line: expected a string, got null",
            ),
        ] {
            let shown = value.to_string();
            assert_eq!(sample(value), Err(expected.to_owned()), "{shown}");
        }
        let unknown = sample(json!({"command-line": "x", "bogus": 1}));
        assert!(unknown.is_err_and(|e| e.starts_with("UnknownArgument: ") && e.contains("bogus")));
        let none = from_arguments::<Nothing>(Map::from_iter([("x".to_owned(), json!(1))]));
        assert!(none.is_err_and(|e| e.to_string().contains("takes no arguments")));
    }
}
