//! Questions that are answered at once.

use serde_json::{Value, json};

use super::{Context, NoArguments, Registry, StopRecord};
use crate::control::protocol::{QmpError, STANDARD_EVENTS, Version};
use crate::machine::RunState;

pub(super) fn register(registry: &mut Registry) {
    registry.quick("query-version", |_, _: NoArguments| Ok(Version.to_value()));
    registry.quick("query-status", status);
    registry.quick("query-cpus-fast", cpus);
    registry.quick("query-target", |_, _: NoArguments| {
        Ok(json!({ "arch": "x86_64" }))
    });
    registry.quick("query-name", |_, _: NoArguments| Ok(json!({})));
    registry.quick("query-kvm", |_, _: NoArguments| {
        Ok(json!({ "enabled": true, "present": true }))
    });
    registry.quick("query-events", events);
    registry.quick("query-stops", stops);
}

fn status(context: &Context, _: NoArguments) -> Result<Value, QmpError> {
    let state = context.services.host().run_state();
    Ok(json!({
        "status": state,
        // Gone from QEMU 9; typed clients of earlier releases insist on it.
        "singlestep": false,
        "running": state == RunState::Running,
    }))
}

fn cpus(context: &Context, _: NoArguments) -> Result<Vec<Value>, QmpError> {
    let cpus = context.services.host().cpus();
    let one = |cpu: &crate::machine::CpuInfo| {
        json!({
            "cpu-index": cpu.index,
            "thread-id": cpu.thread_id,
            "qom-path": format!("/machine/cpu[{}]", cpu.index),
            "target": "x86_64",
            "props": { "socket-id": 0, "core-id": cpu.index, "thread-id": 0 },
        })
    };
    Ok(cpus.iter().map(one).collect())
}

fn events(_: &Context, _: NoArguments) -> Result<Vec<Value>, QmpError> {
    let named = STANDARD_EVENTS.map(|name| json!({ "name": name }));
    Ok(named.to_vec())
}

fn stops(context: &Context, _: NoArguments) -> Result<Vec<StopRecord>, QmpError> {
    Ok(context.services.stops())
}
