//! Cuts a stream of bytes into JSON values, however the bytes are cut into packets.
//!
//! Guarantees: memory is bounded by [`Limits::bytes`] plus one byte, whatever comes in; a value is
//! given out as soon as its last byte is there (a bare number or word at the top level, which no
//! request is, as soon as something follows it); each run of garbage is reported once; and the
//! splitter always finds its way back. After an error it skips to the first of: the end of the
//! value that the error was in, a `{` that is the first character of a line, and, outside of any
//! value, a line end or any `{`.
//!
//! It checks structure only (brackets, commas, strings); what stands between is checked when the
//! whole value is handed to `serde_json`, whose recursion is bounded by [`Limits::depth`].

use serde_json::Value;

use super::unique::Unique;

/// What a client may send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Longest request in bytes.
    pub bytes: usize,
    /// Deepest nesting of objects and arrays; at most 64.
    pub depth: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 1 << 20,
            depth: 64,
        }
    }
}

/// Why input is not JSON that is taken here.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SyntaxError {
    /// A character that cannot stand where it stands.
    #[error("unexpected {} where {expected} should be", show(*byte))]
    Unexpected {
        /// The character.
        byte: u8,
        /// What could stand there.
        expected: &'static str,
    },
    /// The request is too long.
    #[error("a request is at most {limit} bytes long")]
    TooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// The request is nested too deeply.
    #[error("objects and arrays nest at most {limit} deep")]
    TooDeep {
        /// The limit.
        limit: u32,
    },
    /// Bytes that are not UTF-8.
    #[error("invalid UTF-8 after {valid} bytes of the request")]
    NotUtf8 {
        /// How many bytes of the request are valid.
        valid: usize,
    },
    /// Brackets match, but what is between them is not JSON, or names a member twice.
    #[error("{0}")]
    Json(String),
}

fn show(byte: u8) -> String {
    match byte {
        b'\n' => "line end".to_owned(),
        b' '..=b'~' => format!("'{}'", char::from(byte)),
        _ => format!("byte {byte:#04x}"),
    }
}

/// What may come next, outside of strings and words.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Expect {
    Value,
    ValueOrEnd,
    Key,
    KeyOrEnd,
    Colon,
    CommaOrEnd,
}

impl Expect {
    fn describe(self) -> &'static str {
        match self {
            Self::Value => "a value",
            Self::ValueOrEnd => "a value or ']'",
            Self::Key => "a member name",
            Self::KeyOrEnd => "a member name or '}'",
            Self::Colon => "':'",
            Self::CommaOrEnd => "',' or a closing bracket",
        }
    }
}

/// Which kind of token the last byte was in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Token {
    None,
    String,
    Escape,
    Word,
}

/// Where the search for the end of garbage is.
#[derive(Clone, Copy, Debug)]
struct Recovery {
    depth: u32,
    in_string: bool,
    escaped: bool,
    line_start: bool,
}

/// What one byte did.
enum Did {
    Taken,
    /// The value is complete; the byte belongs to it.
    Complete,
    /// The value ended before this byte.
    CompleteBefore,
    Error(SyntaxError),
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Splitter {
    limits: Limits,
    value: Vec<u8>,
    expect: Expect,
    token: Token,
    /// Bit n is set when nesting level n is an object.
    objects: u64,
    depth: u32,
    /// Only white space since the last line end.
    line_start: bool,
    recovery: Option<Recovery>,
}

impl Splitter {
    /// A splitter at the beginning of a stream.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits: Limits {
                depth: limits.depth.min(u64::BITS),
                ..limits
            },
            value: Vec::new(),
            expect: Expect::Value,
            token: Token::None,
            objects: 0,
            depth: 0,
            line_start: true,
            recovery: None,
        }
    }

    /// How many bytes of an unfinished value are kept.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.value.len()
    }

    /// Takes bytes off the front of `input` up to the end of a value or to an error; `None` when
    /// all of them were taken and nothing is complete.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Value, SyntaxError>> {
        while let Some((&byte, rest)) = input.split_first() {
            if self.recovery.is_some() {
                if self.recover(byte) {
                    *input = rest;
                }
                continue;
            }
            let did = self.step(byte);
            if !matches!(did, Did::CompleteBefore | Did::Error(_)) {
                *input = rest;
                self.line_start = match byte {
                    b'\n' => true,
                    b' ' | b'\t' | b'\r' => self.line_start,
                    _ => false,
                };
            }
            match did {
                Did::Taken => {}
                Did::Complete => return Some(self.parse()),
                Did::CompleteBefore => {
                    let word = self.parse();
                    if word.is_err() {
                        // A line of prose is one mistake, not one per word.
                        self.give_up();
                    }
                    return Some(word);
                }
                Did::Error(error) => {
                    self.give_up();
                    return Some(Err(error));
                }
            }
        }
        None
    }

    /// Drops what is kept and skips to where a new request can begin.
    pub fn give_up(&mut self) {
        self.recovery = Some(Recovery {
            depth: self.depth,
            in_string: matches!(self.token, Token::String | Token::Escape),
            escaped: self.token == Token::Escape,
            line_start: self.line_start,
        });
        self.reset();
    }

    fn reset(&mut self) {
        self.value = Vec::new();
        self.expect = Expect::Value;
        self.token = Token::None;
        self.objects = 0;
        self.depth = 0;
    }

    fn parse(&mut self) -> Result<Value, SyntaxError> {
        let value = std::mem::take(&mut self.value);
        self.reset();
        match std::str::from_utf8(&value) {
            Ok(text) => {
                let value = serde_json::from_str(text).map(|Unique(value)| value);
                value.map_err(|error| SyntaxError::Json(error.to_string()))
            }
            Err(error) => Err(SyntaxError::NotUtf8 {
                valid: error.valid_up_to(),
            }),
        }
    }

    fn step(&mut self, byte: u8) -> Did {
        match self.token {
            Token::None => self.between(byte),
            Token::Escape => {
                self.token = Token::String;
                self.keep(byte)
            }
            Token::String => match byte {
                b'"' => {
                    self.token = Token::None;
                    self.value_ended(byte)
                }
                b'\\' => {
                    self.token = Token::Escape;
                    self.keep(byte)
                }
                0..=0x1f => Did::Error(SyntaxError::Unexpected {
                    byte,
                    expected: "the rest of a string",
                }),
                _ => self.keep(byte),
            },
            Token::Word if is_word(byte) => self.keep(byte),
            Token::Word => {
                self.token = Token::None;
                self.expect = Expect::CommaOrEnd;
                if self.depth == 0 {
                    Did::CompleteBefore
                } else {
                    self.between(byte)
                }
            }
        }
    }

    fn between(&mut self, byte: u8) -> Did {
        use Expect::{Colon, CommaOrEnd, Key, KeyOrEnd, Value, ValueOrEnd};
        match (byte, self.expect) {
            (b' ' | b'\t' | b'\r' | b'\n', _) => {
                if self.depth == 0 {
                    Did::Taken
                } else {
                    self.keep(byte)
                }
            }
            (b'{' | b'[', Value | ValueOrEnd) => self.open(byte),
            (b'}', KeyOrEnd) | (b']', ValueOrEnd) => self.close(byte),
            (b'}', CommaOrEnd) if self.in_object() => self.close(byte),
            (b']', CommaOrEnd) if !self.in_object() => self.close(byte),
            (b',', CommaOrEnd) => {
                self.expect = if self.in_object() { Key } else { Value };
                self.keep(byte)
            }
            (b':', Colon) => {
                self.expect = Value;
                self.keep(byte)
            }
            (b'"', Value | ValueOrEnd | Key | KeyOrEnd) => {
                self.token = Token::String;
                self.keep(byte)
            }
            (_, Value | ValueOrEnd) if is_word(byte) => {
                self.token = Token::Word;
                self.keep(byte)
            }
            (_, expect) => Did::Error(SyntaxError::Unexpected {
                byte,
                expected: expect.describe(),
            }),
        }
    }

    fn in_object(&self) -> bool {
        self.objects & 1 != 0
    }

    fn open(&mut self, byte: u8) -> Did {
        if self.depth >= self.limits.depth {
            return Did::Error(SyntaxError::TooDeep {
                limit: self.limits.depth,
            });
        }
        let object = byte == b'{';
        self.depth += 1;
        self.objects = self.objects << 1 | u64::from(object);
        self.expect = if object {
            Expect::KeyOrEnd
        } else {
            Expect::ValueOrEnd
        };
        self.keep(byte)
    }

    fn close(&mut self, byte: u8) -> Did {
        self.depth = self.depth.saturating_sub(1);
        self.objects >>= 1;
        self.value_ended(byte)
    }

    /// A string or a bracketed value ends with `byte`.
    fn value_ended(&mut self, byte: u8) -> Did {
        self.expect = match self.expect {
            Expect::Key | Expect::KeyOrEnd if self.depth > 0 && byte == b'"' => Expect::Colon,
            _ => Expect::CommaOrEnd,
        };
        match self.keep(byte) {
            Did::Taken if self.depth == 0 => Did::Complete,
            did => did,
        }
    }

    fn keep(&mut self, byte: u8) -> Did {
        if self.value.len() >= self.limits.bytes {
            return Did::Error(SyntaxError::TooLarge {
                limit: self.limits.bytes,
            });
        }
        self.value.push(byte);
        Did::Taken
    }

    /// Looks at one byte of garbage; false when a new request may begin with it.
    fn recover(&mut self, byte: u8) -> bool {
        let Some(at) = &mut self.recovery else {
            return false;
        };
        if byte == b'\n' {
            // JSON has no line ends within strings, so this is outside of one.
            (at.in_string, at.escaped, at.line_start) = (false, false, true);
            if at.depth == 0 {
                self.recovery = None;
                self.line_start = true;
            }
            return true;
        }
        if at.in_string {
            match byte {
                _ if at.escaped => at.escaped = false,
                b'\\' => at.escaped = true,
                b'"' => at.in_string = false,
                _ => {}
            }
            return true;
        }
        match byte {
            b'{' if at.depth == 0 || at.line_start => {
                self.line_start = at.line_start;
                self.recovery = None;
                return false;
            }
            b'{' | b'[' => at.depth = at.depth.saturating_add(1),
            b'}' | b']' if at.depth == 1 => {
                self.recovery = None;
                self.line_start = false;
                return true;
            }
            b'}' | b']' => at.depth = at.depth.saturating_sub(1),
            b'"' => at.in_string = true,
            b' ' | b'\t' | b'\r' => return true,
            _ => {}
        }
        at.line_start = false;
        true
    }
}

/// Characters of numbers and of `true`, `false` and `null`; which of them make sense is checked
/// later.
fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.')
}

#[cfg(test)]
mod tests;
