//! From a JSON value to a request.

use serde_json::{Map, Value};

use super::error::{QmpError, Reason};

/// Bytes of an `id`, which is kept while the command runs.
const MAX_ID: usize = 4096;

/// One command of a client.
#[derive(Clone, PartialEq, Debug)]
pub struct Request {
    /// Name of the command.
    pub command: String,
    /// Its arguments; empty when none were given.
    pub arguments: Map<String, Value>,
}

/// A request or what is wrong with it, and the `id` to answer to.
pub(super) struct Parsed {
    pub(super) id: Option<Value>,
    pub(super) request: Result<Request, QmpError>,
}

pub(super) fn parse(value: Value) -> Parsed {
    let Value::Object(mut members) = value else {
        return Parsed {
            id: None,
            request: Err(bad("a request is a JSON object with the member 'execute'")),
        };
    };
    let id = members.remove("id");
    let len = id.as_ref().map_or(0, |id| id.to_string().len());
    if len > MAX_ID {
        let text = format!("the id has {len} bytes, and at most {MAX_ID} are kept");
        return Parsed {
            id: None,
            request: Err(QmpError::new(Reason::TooLarge, text)),
        };
    }
    Parsed {
        id,
        request: members_to_request(members),
    }
}

fn bad(text: impl Into<String>) -> QmpError {
    QmpError::new(Reason::BadRequest, text)
}

fn members_to_request(members: Map<String, Value>) -> Result<Request, QmpError> {
    let (mut command, mut arguments) = (None, None);
    for (name, value) in members {
        match (name.as_str(), value) {
            ("execute", Value::String(name)) => command = Some(name),
            ("execute", _) => return Err(bad("the member 'execute' must be a string")),
            ("arguments", Value::Object(map)) => arguments = Some(map),
            ("arguments", _) => return Err(bad("the member 'arguments' must be an object")),
            ("exec-oob", _) => {
                return Err(bad("out-of-band execution is not offered; use 'execute'"));
            }
            _ => {
                let shown: String = name.chars().take(64).collect();
                return Err(bad(format!("a request has no member {shown:?}")));
            }
        }
    }
    Ok(Request {
        command: command.ok_or_else(|| bad("the member 'execute' is missing"))?,
        arguments: arguments.unwrap_or_default(),
    })
}
