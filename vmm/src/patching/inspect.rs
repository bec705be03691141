//! `inspect-text`: is the text of the guest's kernel what the kernel itself makes of it?

use serde::Deserialize;

use super::session::Patching;
use crate::control::command::{DeadlineArgument, Registry};

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct InspectText {
    #[serde(default)]
    deadline: DeadlineArgument,
}

/// Adds the command.
pub(super) fn register(registry: &mut Registry, patching: &Patching) {
    let p = patching.clone();
    registry.slow("inspect-text", move |context, arguments: InspectText| {
        p.stopped(
            context,
            "inspect-text",
            arguments.deadline.or_usual(),
            |patcher, guest| patcher.compare_text(guest),
        )
    });
}
