//! `gp-snapshot`, `gp-poll`, `gp-wait` and `query-holdouts`.

use std::time::Duration;

use patcher::grace::Holdout;
use patcher::guest::StoppedGuest;
use patcher::patch::{Collected, Cookie, EntryId, Patcher};
use patcher::tasks::Context as Whose;
use serde::{Deserialize, Serialize};

use super::commands::invalid;
use super::session::Patching;
use crate::control::command::{Context, DeadlineArgument, NoArguments, Registry};
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

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct QueryHoldouts {
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
    /// The vCPU that it is on, when that stands still because of a client.
    #[serde(skip_serializing_if = "Option::is_none")]
    held_vcpu: Option<u32>,
}

/// A vCPU that stands still because of a client, and the task on it.
struct Still {
    vcpu: u32,
    pid: Option<u32>,
}

impl Still {
    fn is(&self, whose: &Whose) -> bool {
        match whose {
            Whose::Vcpu { index } => *index == self.vcpu,
            Whose::Task { pid, .. } => *pid != 0 && Some(*pid) == self.pid,
            Whose::Cpu { .. } | Whose::Unknown => false,
        }
    }
}

/// The vCPUs that are held hard. Costs the guest nothing when there are none.
fn still(patching: &Patching, context: &Context, within: Duration) -> Result<Vec<Still>, QmpError> {
    let holds = context.services.host().holds();
    let held: Vec<_> = holds.iter().filter(|hold| hold.is_still()).collect();
    if held.is_empty() {
        return Ok(Vec::new());
    }
    let look = |patcher: &mut Patcher, guest: &mut dyn StoppedGuest| patcher.vcpus(guest);
    let told = patching.stopped(context, "query-holdouts", within, look)?;
    let vcpus = told.into_answer();
    let pid_on = |vcpu: u32| vcpus.iter().find(|told| told.index == vcpu)?.pid;
    Ok(held
        .iter()
        .map(|hold| Still {
            vcpu: hold.vcpu,
            pid: pid_on(hold.vcpu),
        })
        .collect())
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Holdouts {
    holdouts: Vec<Held>,
    /// Changes whose code nobody has looked for yet.
    unjudged: Vec<EntryId>,
}

/// The holdout, with what holds it.
fn held_by(holdout: &Holdout, still: &[Still]) -> Holdout {
    let mut holdout = holdout.clone();
    if let Some(still) = still.iter().find(|still| still.is(&holdout.context)) {
        holdout.missing = format!(
            "vCPU {} is held by vcpu-hold; {}",
            still.vcpu, holdout.missing
        );
    }
    holdout
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
        let waited = p
            .stopped(context, "gp-wait", within, |patcher, guest| {
                patcher.gp_wait(guest, at)
            })
            .map_err(|error| {
                let holds = context.services.host().holds();
                let still = holds.iter().filter(|hold| hold.is_still());
                still.fold(error, |error, hold| {
                    error.and(&format!("; vCPU {} is held by vcpu-hold", hold.vcpu))
                })
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
    registry.slow("query-holdouts", move |context, query: QueryHoldouts| {
        let still = still(&p, context, query.deadline.or_usual())?;
        let waiting = p.with(|patcher| Ok(patcher.waiting()))?;
        let unjudged = waiting.iter().filter(|retired| retired.held_by.is_empty());
        let held = waiting.iter().flat_map(|retired| {
            retired.holdouts.iter().map(|holdout| Held {
                id: retired.id,
                since_ms: retired.since_ms,
                holdout: held_by(holdout, &still),
                held_vcpu: still
                    .iter()
                    .find(|still| still.is(&holdout.context))
                    .map(|still| still.vcpu),
            })
        });
        Ok(Holdouts {
            unjudged: unjudged.map(|retired| retired.id).collect(),
            holdouts: held.collect(),
        })
    });
}
