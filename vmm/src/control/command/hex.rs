//! Arguments that hold bytes in hexadecimal.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, Visitor};

use crate::cli::values::HexBytes;

/// `"0f1f440000"`, `"0x0f1f440000"`, `"0f 1f 44 00 00"`. qmp-shell sends bare digits as a number; with
/// `0x` in front it sends a string.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HexArgument(pub Vec<u8>);

impl<'de> Deserialize<'de> for HexArgument {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Text)
    }
}

struct Text;

impl Visitor<'_> for Text {
    type Value = HexArgument;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string of bytes in hexadecimal such as \"0x0f1f440000\"")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<HexArgument, E> {
        let bytes: HexBytes = text.parse().map_err(E::custom)?;
        Ok(HexArgument(bytes.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn strings_only() {
        let parse = |value: Value| serde_json::from_value::<HexArgument>(value);
        assert_eq!(
            parse(json!("0x0f1f")).ok(),
            Some(HexArgument(vec![0x0f, 0x1f]))
        );
        for wrong in [
            json!(9090),
            json!("0f1"),
            json!(""),
            json!(null),
            json!(["0f"]),
        ] {
            assert!(parse(wrong.clone()).is_err(), "{wrong}");
        }
        let text = parse(json!(9090)).map_err(|e| e.to_string());
        assert!(text.is_err_and(|e| e.contains("0x0f1f440000")));
    }
}
