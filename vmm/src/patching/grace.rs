//! `gp-snapshot`, `gp-poll`, `gp-wait` and `query-holdouts`.

use patcher::grace::Holdout;
use patcher::patch::{Collected, Cookie, EntryId};
use serde::{Deserialize, Serialize};

use super::commands::invalid;
use super::session::Patching;
use crate::control::command::{DeadlineArgument, NoArguments, Registry};
use crate::control::protocol::QmpError;

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct GpPoll {
    cookie: String,
}

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct GpWait {
    cookie: String,
    #[serde(default)]
    deadline: DeadlineArgument,
}

/// A cookie is opaque: a string, so that it may become something else.
#[derive(Serialize)]
struct Snapshot {
    cookie: String,
}

#[derive(Serialize)]
struct Polled {
    cookie: String,
    passed: bool,
}

#[derive(Serialize)]
struct Waited {
    cookie: String,
    passed: bool,
    /// What was freed meanwhile.
    collected: Collected,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Held {
    /// The change whose code it is.
    id: EntryId,
    since_ms: u64,
    #[serde(flatten)]
    holdout: Holdout,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Holdouts {
    holdouts: Vec<Held>,
    /// Changes whose code nobody has looked for yet.
    unjudged: Vec<EntryId>,
}

fn cookie(text: &str) -> Result<Cookie, QmpError> {
    let number = text.parse().map_err(|_| {
        invalid(
            "cookie",
            format_args!("'{text}' is not what gp-snapshot returns"),
        )
    })?;
    Ok(Cookie(number))
}

/// Adds the commands.
pub(super) fn register(registry: &mut Registry, patching: &Patching) {
    let p = patching.clone();
    registry.slow("gp-snapshot", move |_, _: NoArguments| {
        let cookie = p.with(|patcher| Ok(patcher.gp_snapshot()))?;
        Ok(Snapshot {
            cookie: cookie.0.to_string(),
        })
    });
    let p = patching.clone();
    registry.slow("gp-poll", move |_, arguments: GpPoll| {
        let at = cookie(&arguments.cookie)?;
        let passed = p.with(|patcher| patcher.gp_poll(at))?;
        Ok(Polled {
            cookie: arguments.cookie,
            passed,
        })
    });
    let p = patching.clone();
    registry.slow("gp-wait", move |context, arguments: GpWait| {
        let at = cookie(&arguments.cookie)?;
        let within = arguments.deadline.or_usual();
        // Nothing to wait for costs the guest nothing.
        if p.with(|patcher| patcher.gp_poll(at))? {
            return Ok(serde_json::json!({ "cookie": arguments.cookie, "passed": true }));
        }
        let waited = p.stopped(context, "gp-wait", within, |patcher, guest| {
            patcher.gp_wait(guest, at)
        })?;
        p.retired(waited.answer());
        let waited = waited.map(|collected| Waited {
            cookie: arguments.cookie,
            passed: true,
            collected,
        });
        serde_json::to_value(waited).map_err(|error| invalid("answer", error))
    });
    let p = patching.clone();
    registry.slow("query-holdouts", move |_, _: NoArguments| {
        let waiting = p.with(|patcher| Ok(patcher.waiting()))?;
        let unjudged = waiting.iter().filter(|retired| retired.held_by.is_empty());
        let held = waiting.iter().flat_map(|retired| {
            retired.holdouts.iter().map(|holdout| Held {
                id: retired.id,
                since_ms: retired.since_ms,
                holdout: holdout.clone(),
            })
        });
        Ok(Holdouts {
            unjudged: unjudged.map(|retired| retired.id).collect(),
            holdouts: held.collect(),
        })
    });
}
