//! The commands on the guest's kernel: `query-kernel`, `text-patch`, `text-redirect`,
//! `text-revert` and `query-text`.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use patcher::patch::{EntryId, NewCode, Origin, RedirectRequest, TextRequest};
use patcher::symbols::Site;
use serde::Deserialize;

use super::session::Patching;
use crate::control::command::{Context, DeadlineArgument, HexArgument, NoArguments, Registry};
use crate::control::protocol::{QmpError, Reason};

/// An object file larger than this is not read.
const MAX_OBJECT: u64 = 16 << 20;

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct Query {
    #[serde(default)]
    deadline: DeadlineArgument,
}

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub(super) struct TextPatch {
    site: String,
    expect: HexArgument,
    write: HexArgument,
    #[serde(default)]
    force: bool,
    #[serde(default)]
    deadline: DeadlineArgument,
}

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub(super) struct TextRedirect {
    site: String,
    /// Path of a relocatable object, as this process sees it.
    object: Option<PathBuf>,
    /// Machine code in hexadecimal.
    code: Option<HexArgument>,
    entry: Option<String>,
    #[serde(default)]
    deadline: DeadlineArgument,
}

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct TextRevert {
    id: u64,
    #[serde(default)]
    deadline: DeadlineArgument,
}

/// Adds the commands.
pub fn register(registry: &mut Registry, patching: &Patching) {
    super::grace::register(registry, patching);
    super::insight::register(registry, patching);
    super::inspect::register(registry, patching);
    super::probes::register(registry, patching);
    super::stacks::register(registry, patching);
    super::steps::register(registry, patching);
    super::tracepoints::register(registry, patching);
    let p = patching.clone();
    registry.slow("query-kernel", move |context, query: Query| {
        p.stopped(
            context,
            "query-kernel",
            query.deadline.or_usual(),
            |patcher, guest| patcher.locate(guest),
        )
    });
    let p = patching.clone();
    registry.slow("query-text", move |_, _: NoArguments| {
        p.with(|patcher| Ok(patcher.list()))
    });
    let p = patching.clone();
    registry.slow("text-patch", move |context, arguments: TextPatch| {
        let within = arguments.deadline.or_usual();
        let request = text_request(arguments)?;
        let prepared = p.with(|patcher| patcher.prepare_text(request))?;
        let origin = origin(context);
        p.stopped(context, "text-patch", within, |patcher, guest| {
            patcher.commit_text(guest, &prepared, &origin)
        })
    });
    let p = patching.clone();
    registry.slow("text-redirect", move |context, arguments: TextRedirect| {
        let within = arguments.deadline.or_usual();
        let request = redirect_request(arguments)?;
        let prepared = p.with(|patcher| patcher.prepare_redirect(request))?;
        p.get_arena_ready();
        let origin = origin(context);
        p.stopped(context, "text-redirect", within, |patcher, guest| {
            patcher.commit_redirect(guest, &prepared, &origin)
        })
    });
    let p = patching.clone();
    registry.slow("text-revert", move |context, arguments: TextRevert| {
        let within = arguments.deadline.or_usual();
        let origin = origin(context);
        let reverted = p.stopped(context, "text-revert", within, |patcher, guest| {
            patcher.revert(guest, EntryId(arguments.id), &origin)
        })?;
        p.retired(&reverted.answer().collected);
        Ok(reverted)
    });
}

pub(super) fn invalid(argument: &str, why: impl std::fmt::Display) -> QmpError {
    QmpError::new(Reason::InvalidArgument, format!("{argument}: {why}"))
}

pub(super) fn site(text: &str) -> Result<Site, QmpError> {
    text.parse().map_err(|error| invalid("site", error))
}

pub(super) fn text_request(arguments: TextPatch) -> Result<TextRequest, QmpError> {
    Ok(TextRequest {
        site: site(&arguments.site)?,
        expect: arguments.expect.0,
        write: arguments.write.0,
        force: arguments.force,
    })
}

pub(super) fn redirect_request(arguments: TextRedirect) -> Result<RedirectRequest, QmpError> {
    let code = match (arguments.object, arguments.code, arguments.entry) {
        (Some(path), None, function) => NewCode::Object {
            file: object(&path)?,
            function,
        },
        (None, Some(code), None) => NewCode::Raw(code.0),
        (None, Some(_), Some(_)) => return Err(invalid("entry", "machine code has no symbols")),
        _ => return Err(invalid("object", "give either an object or machine code")),
    };
    Ok(RedirectRequest {
        site: site(&arguments.site)?,
        code,
    })
}

pub(super) fn object(path: &std::path::Path) -> Result<Vec<u8>, QmpError> {
    let io = |error: std::io::Error| {
        QmpError::new(Reason::Io, format!("object: {}: {error}", path.display()))
    };
    let not_one = || {
        let why = format_args!("{}: not an object file", path.display());
        invalid("object", why)
    };
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(not_one());
    }
    // A file's length says nothing below /proc: some of those have no end, and some wait for more.
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(io)?;
    let mut bytes = Vec::new();
    let len = file.take(MAX_OBJECT + 1).read_to_end(&mut bytes);
    match len.map_err(io)? as u64 > MAX_OBJECT {
        true => Err(not_one()),
        false => Ok(bytes),
    }
}

pub(super) fn origin(context: &Context) -> Origin {
    origin_of(context.peer.to_string())
}

/// Somebody, now.
pub(crate) fn origin_of(who: String) -> Origin {
    Origin {
        who,
        at_ms: now_ms(),
    }
}

/// Milliseconds since 1970.
pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_file_without_an_end_is_not_read_to_its_end() {
        for path in ["/proc/self/pagemap", "/dev/zero", "/proc", "/nonexistent"] {
            let refused = object(Path::new(path)).map(|bytes| bytes.len());
            assert!(refused.is_err(), "{path}: {refused:?}");
        }
        assert!(object(Path::new("/proc/self/status")).is_ok_and(|bytes| !bytes.is_empty()));
    }
}
