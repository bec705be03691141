//! Stopping, resuming, resetting and ending the guest.
//!
//! `stop` and `cont` have QEMU's shapes, so they answer `{}`; `pause` and `resume` do the same and
//! tell how long the guest stood still. `query-stops` has it for both.

use serde::Serialize;

use super::{Context, DeadlineArgument, Done, NoArguments, Registry, StopRecord};
use crate::control::protocol::QmpError;
use crate::machine::StopTimes;

/// `stop`, `pause`.
#[derive(serde::Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct Stop {
    #[serde(default)]
    deadline: DeadlineArgument,
}

/// What `pause` answers.
#[derive(Serialize, Debug)]
struct Paused {
    /// Microseconds from the request until every vCPU was parked; 0 when it was stopped before.
    #[serde(rename = "to-stopped-us")]
    to_stopped_us: u64,
}

/// What `resume` answers.
#[derive(Serialize, Debug)]
struct Resumed {
    /// Microseconds that the guest stood still; 0 when it was running.
    #[serde(rename = "stalled-us")]
    stalled_us: u64,
}

pub(super) fn register(registry: &mut Registry) {
    registry.slow("stop", |context, arguments: Stop| {
        stop(context, "stop", &arguments)?;
        Ok(Done {})
    });
    registry.slow("pause", |context, arguments: Stop| {
        let times = stop(context, "pause", &arguments)?;
        Ok(Paused {
            to_stopped_us: micros(times.to_stopped),
        })
    });
    registry.slow("cont", |context, _: NoArguments| {
        resume(context)?;
        Ok(Done {})
    });
    registry.slow("resume", |context, _: NoArguments| {
        Ok(Resumed {
            stalled_us: micros(resume(context)?),
        })
    });
    registry.quick("quit", |context, _: NoArguments| {
        context.services.host().quit();
        Ok(Done {})
    });
    registry.slow("system_powerdown", |context, _: NoArguments| {
        context.services.host().power_button();
        Ok(Done {})
    });
    registry.slow("system_reset", |context, _: NoArguments| {
        context.services.host().reset();
        Ok(Done {})
    });
}

fn micros(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn stop(context: &Context, command: &'static str, with: &Stop) -> Result<StopTimes, QmpError> {
    let times = context.services.host().stop(with.deadline.or_usual())?;
    // Stopping a stopped guest takes no time and is no stop.
    if times != StopTimes::default() {
        context.services.record_stop(StopRecord {
            command,
            to_stopped: times.to_stopped,
            stalled: None,
        });
    }
    Ok(times)
}

fn resume(context: &Context) -> Result<std::time::Duration, QmpError> {
    let resumed = context.services.host().cont()?;
    let stalled = resumed.stalled;
    context.services.record_resume(stalled);
    context.keep_until_answered(resumed);
    Ok(stalled)
}

/// `stop` of the human monitor.
pub(super) fn monitor_stop(context: &Context) -> Result<(), QmpError> {
    let with = Stop {
        deadline: DeadlineArgument::default(),
    };
    stop(context, "stop", &with).map(|_| ())
}

/// `cont` of the human monitor.
pub(super) fn monitor_cont(context: &Context) -> Result<(), QmpError> {
    resume(context).map(|_| ())
}
