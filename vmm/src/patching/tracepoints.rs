//! `tracepoint-attach`, `tracepoint-detach` and `query-tracepoints`.
//!
//! The guest's kernel does the work, in its own time: it is asked in one stop, runs on, and what it
//! did is told in another.

use std::thread;
use std::time::{Duration, Instant};

use patcher::patch::{EntryId, Outcome, PatchError, TracepointInfo};
use serde::{Deserialize, Serialize};

use super::callback::Attach;
use super::commands::origin;
use super::session::{Patching, WithStop};
use crate::control::command::{Context, DeadlineArgument, NoArguments, Registry};
use crate::control::protocol::{QmpError, Reason};

/// How often it is looked whether the guest is done.
const LOOK: Duration = Duration::from_millis(1);
/// What the last stop may take when the time is over already.
const LAST: Duration = Duration::from_millis(500);

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct Detach {
    id: u64,
    #[serde(default)]
    deadline: DeadlineArgument,
}

#[derive(Serialize)]
struct Tracepoints {
    tracepoints: Vec<TracepointInfo>,
}

/// Adds the commands.
pub(super) fn register(registry: &mut Registry, patching: &Patching) {
    let p = patching.clone();
    registry.slow("tracepoint-attach", move |context, arguments: Attach| {
        let until = Instant::now() + arguments.deadline.or_usual();
        let incarnation = p.incarnation();
        let request = arguments.tracepoint()?;
        let prepared = p.with(|patcher| patcher.prepare_tracepoint(request))?;
        p.get_arena_ready();
        let origin = origin(context);
        let begun = p.stopped(
            context,
            "tracepoint-attach",
            left(until),
            |patcher, guest| patcher.begin_tracepoint(guest, &prepared, &origin),
        )?;
        let id = *begun.answer();
        finish(&p, context, "tracepoint-attach", begun, id, until)
            .map_err(|error| unless_reset(&p, incarnation, error))
    });
    let p = patching.clone();
    registry.slow("tracepoint-detach", move |context, arguments: Detach| {
        let until = Instant::now() + arguments.deadline.or_usual();
        let incarnation = p.incarnation();
        let (id, origin) = (EntryId(arguments.id), origin(context));
        let begun = p.stopped(
            context,
            "tracepoint-detach",
            left(until),
            |patcher, guest| patcher.begin_detach_tracepoint(guest, id, &origin),
        )?;
        let finished = finish(&p, context, "tracepoint-detach", begun, id, until)
            .map_err(|error| unless_reset(&p, incarnation, error))?;
        if let Outcome::Detached { collected, .. } = finished.answer() {
            p.retired(collected);
        }
        Ok(finished)
    });
    let p = patching.clone();
    registry.slow("query-tracepoints", move |_, _: NoArguments| {
        let tracepoints = p.peek(|patcher, memory| patcher.tracepoints(memory))?;
        Ok(Tracepoints { tracepoints })
    });
}

/// After a reset nothing is known of what the guest was asked for.
fn unless_reset(patching: &Patching, incarnation: u64, error: QmpError) -> QmpError {
    if patching.incarnation() == incarnation {
        return error;
    }
    let text = "the machine was reset meanwhile, and what was in the guest is gone with it";
    QmpError::new(Reason::Ended, text)
}

fn left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}

/// Waits until the guest has done what it was asked for. When that takes too long, and the guest
/// cannot be kept from it any more, it is seen to later.
fn finish<T>(
    patching: &Patching,
    context: &Context,
    command: &'static str,
    begun: WithStop<T>,
    id: EntryId,
    until: Instant,
) -> Result<WithStop<Outcome>, QmpError> {
    while !patching.peek(|patcher, memory| patcher.tracepoint_ready(memory, id))?
        && Instant::now() < until
        && !context.peer.is_gone()
    {
        thread::sleep(LOOK);
    }
    let origin = origin(context);
    let finished = patching.stopped(context, command, left(until).max(LAST), |patcher, guest| {
        match patcher.finish_tracepoint(guest, id, &origin) {
            // There is nothing to wait for any more.
            Err(PatchError::Underway { .. }) if Instant::now() >= until => {
                Err(PatchError::StillUnderway { id })
            }
            other => other,
        }
    });
    if finished.is_err() {
        patching.see_to_tracepoints();
    }
    Ok(begun.then(finished?))
}
