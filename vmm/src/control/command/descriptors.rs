//! `getfd` and `closefd`: descriptors that clients pass for other commands to use.

use super::{Done, Registry};

#[derive(serde::Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct Named {
    fdname: String,
}

pub(super) fn register(registry: &mut Registry) {
    registry.quick("getfd", |context, arguments: Named| {
        context.peer.name_descriptor(&arguments.fdname)?;
        Ok(Done {})
    });
    registry.slow("closefd", |context, arguments: Named| {
        drop(context.peer.take_descriptor(&arguments.fdname)?);
        Ok(Done {})
    });
}
