//! `inspect-text`: is the text of the guest's kernel what the kernel itself makes of it?
//!
//! The guest is stopped for as long as it takes to copy what is looked at. What that is shows
//! while it runs, and what it means is worked out when it runs again.

use std::time::Instant;

use patcher::compare::Comparison;
use patcher::patch::{Compared, TextCopy};
use serde::Deserialize;

use super::session::{Patching, WithStop};
use crate::control::command::{Context, DeadlineArgument, Registry};
use crate::control::protocol::QmpError;

/// Stops in which is copied, before what is looked at is looked at in a stop.
const COPIES: usize = 4;
const NAME: &str = "inspect-text";

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct InspectText {
    #[serde(default)]
    deadline: DeadlineArgument,
}

/// Adds the command.
pub(super) fn register(registry: &mut Registry, patching: &Patching) {
    let p = patching.clone();
    registry.slow(NAME, move |context, arguments: InspectText| {
        inspect(&p, context, &arguments)
    });
}

fn inspect(
    patching: &Patching,
    context: &Context,
    arguments: &InspectText,
) -> Result<WithStop<Comparison>, QmpError> {
    let deadline = Instant::now() + arguments.deadline.or_usual();
    let left = || deadline.saturating_duration_since(Instant::now());
    // Where the kernel is has to be known before anything else.
    let mut stops = patching.stopped(context, NAME, left(), |patcher, guest| {
        patcher.locate(guest).map(drop)
    })?;
    let ram = patching.ram();
    let mut text = TextCopy::default();
    for _ in 0..COPIES {
        patching.with(|patcher| {
            patcher.follow_text(&ram, &mut text);
            Ok(())
        })?;
        let copied = patching.stopped(context, NAME, left(), |patcher, guest| {
            patcher.copy_text(guest, &mut text)
        })?;
        stops = stops.then(copied);
        match patching.with(|patcher| patcher.compare_copy(&text))? {
            Compared::Done(comparison) => return Ok(stops.map(|()| comparison)),
            Compared::CopyAgain => {}
            Compared::TooMuch => break,
        }
    }
    let compared = patching.stopped(context, NAME, left(), |patcher, guest| {
        patcher.compare_text(guest)
    })?;
    Ok(stops.then(compared))
}
