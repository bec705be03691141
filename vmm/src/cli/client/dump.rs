//! `dump FILE`: the client makes the file, with its own rights and in its own directory, and passes
//! it to the VMM.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde_json::{Value, json};

use super::connection::{ClientError, Connection};
use super::{render, say};

pub(super) fn run(
    control: &Path,
    as_json: bool,
    file: &Path,
    part: Option<(u64, u64)>,
) -> Result<(), ClientError> {
    let mut connection = Connection::open(control)?;
    let target = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .map_err(|source| ClientError::File {
            path: file.to_owned(),
            source,
        })?;
    let result = dump(&mut connection, &target, part);
    match result {
        Ok(answer) if as_json => say(&answer.to_string()),
        Ok(answer) => say(&format!("{}: {}", file.display(), render::dumped(&answer))),
        Err(error) => {
            // Half a dump helps nobody; why there is none is what is told.
            let _ = std::fs::remove_file(file);
            Err(error)
        }
    }
}

fn dump(
    connection: &mut Connection,
    target: &std::fs::File,
    part: Option<(u64, u64)>,
) -> Result<Value, ClientError> {
    connection.execute_with("getfd", json!({ "fdname": "dump" }), target)?;
    let mut arguments = json!({ "paging": false, "protocol": "fd:dump" });
    if let Some((begin, length)) = part {
        arguments["begin"] = begin.into();
        arguments["length"] = length.into();
    }
    connection.execute("dump-guest-memory", arguments)?;
    let mut answer = connection.execute("query-dump", Value::Null)?;
    // The command's own answer is QEMU's, and has no place for how long the guest stood still.
    let stops = connection.execute("query-stops", Value::Null)?;
    let last = stops.as_array().and_then(|stops| {
        stops
            .iter()
            .find(|stop| stop["command"] == "dump-guest-memory")
    });
    if let Some(stop) = last {
        answer["to-stopped-us"] = stop["to-stopped-us"].clone();
        answer["stalled-us"] = stop["stalled-us"].clone();
    }
    Ok(answer)
}
