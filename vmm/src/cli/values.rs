//! The syntax of values on the command line and in requests: numbers, times, bytes, sites.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Why a value could not be understood; the text says what would be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ValueError(String);

fn bad<T>(text: impl Into<String>) -> Result<T, ValueError> {
    Err(ValueError(text.into()))
}

/// A number in decimal, or in hexadecimal with `0x`.
///
/// # Errors
/// [`ValueError`] when it is not a number of 64 bits.
pub fn number(text: &str) -> Result<u64, ValueError> {
    const NUMBER: &str = "expected a number such as 4096 or 0x1000";
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16),
        _ if text.starts_with('+') => return bad(NUMBER),
        _ => text.parse(),
    };
    parsed.or_else(|_| bad(NUMBER))
}

/// How long something may take: `500ms`, `5s`, `2m`; a bare number is seconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Deadline(pub Duration);

/// The longest deadline that is taken: longer ones are a mistake in the unit.
const LONGEST_DEADLINE: Duration = Duration::from_secs(24 * 60 * 60);

impl Deadline {
    /// In whole milliseconds, as requests carry it.
    #[must_use]
    pub fn as_millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }

    /// # Errors
    /// [`ValueError`] when it is longer than a day.
    pub fn from_millis(millis: u64) -> Result<Self, ValueError> {
        let deadline = Duration::from_millis(millis);
        if deadline > LONGEST_DEADLINE {
            return bad("a deadline is at most 24 hours");
        }
        Ok(Self(deadline))
    }
}

impl FromStr for Deadline {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        const HINT: &str = "expected a time such as 500ms, 5s or 2m";
        let digits = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (count, unit) = text.split_at(digits);
        let count: u64 = count.parse().or_else(|_| bad(HINT))?;
        let millis = match unit {
            "ms" => 1,
            "" | "s" => 1000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            _ => return bad(HINT),
        };
        Self::from_millis(count.saturating_mul(millis))
    }
}

/// Bytes in hexadecimal: `0f1f440000`, `0x0f1f440000`, `0f 1f 44 00 00`, `0f:1f:44:00:00`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HexBytes(pub Vec<u8>);

impl FromStr for HexBytes {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        const HINT: &str = "expected bytes in hexadecimal, two digits each, such as 0f1f440000";
        let text = text.strip_prefix("0x").unwrap_or(text);
        let mut bytes = Vec::with_capacity(text.len() / 2);
        for group in text.split([' ', ':']) {
            if group.len() % 2 != 0 || !group.is_ascii() {
                return bad(HINT);
            }
            for at in (0..group.len()).step_by(2) {
                let pair = group.get(at..at + 2).unwrap_or_default();
                if !pair.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return bad(HINT);
                }
                bytes.push(u8::from_str_radix(pair, 16).or_else(|_| bad(HINT))?);
            }
        }
        if bytes.is_empty() {
            return bad(HINT);
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for HexBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in &self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// A place in the guest's code, resolved by the VMM: `symbol`, `symbol+0x12`, `symbol@2+0x12`,
/// `module:symbol`, or an address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Site(pub String);

impl FromStr for Site {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text.is_empty() || text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return bad("expected a symbol, symbol+0x12, symbol@2, module:symbol or an address");
        }
        Ok(Self(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(number("4096"), Ok(4096));
        assert_eq!(number("0xffffffff81000000"), Ok(0xffff_ffff_8100_0000));
        for wrong in ["", "0x", "-1", "+1", "0x+1", "1k", "0x10000000000000000"] {
            assert!(number(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn deadlines() {
        let ms = |t: &str| t.parse::<Deadline>().map(Deadline::as_millis);
        assert_eq!(ms("500ms"), Ok(500));
        assert_eq!(ms("5s"), Ok(5000));
        assert_eq!(ms("5"), Ok(5000));
        assert_eq!(ms("2m"), Ok(120_000));
        for wrong in ["", "s", "-5s", "5 s", "1e3", "99h", "99999999999999999999s"] {
            assert!(ms(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn hex_bytes() {
        let bytes = |t: &str| t.parse::<HexBytes>().map(|b| b.0);
        assert_eq!(bytes("0f1f"), Ok(vec![0x0f, 0x1f]));
        assert_eq!(bytes("0x0F1f"), Ok(vec![0x0f, 0x1f]));
        assert_eq!(bytes("0f 1f:c3"), Ok(vec![0x0f, 0x1f, 0xc3]));
        for wrong in ["", "0x", "f", "0f1", "zz", "+f", "ü0", "0f-1f"] {
            assert!(bytes(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(HexBytes(vec![0, 0xab]).to_string(), "00ab");
    }
}
