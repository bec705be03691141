//! `query-stacks` and `query-vcpus`: what the guest's tasks and vCPUs are doing.

use patcher::guest::StoppedGuest;
use patcher::patch::{PatchError, Patcher};
use patcher::stack::{StacksRequest, VcpuReport};
use serde::{Deserialize, Serialize};

use super::session::Patching;
use crate::control::command::{DeadlineArgument, Registry};
use crate::machine::HoldInfo;

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct QueryStacks {
    /// Only of this task, or of all threads of this process.
    pid: Option<u32>,
    /// Only of tasks with a higher thread id: to go on where an answer ended.
    after: Option<u32>,
    limit: Option<usize>,
    #[serde(default)]
    deadline: DeadlineArgument,
}

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct QueryVcpus {
    #[serde(default)]
    deadline: DeadlineArgument,
}

/// A row begins as those of `query-cpus-fast` do.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct VcpuRow {
    cpu_index: u32,
    /// The thread of the host that runs it.
    thread_id: Option<i32>,
    #[serde(flatten)]
    vcpu: VcpuReport,
    /// How it is held by itself, when it is or is to be.
    hold: Option<serde_json::Value>,
    /// Why nothing is told about the guest's kernel, when nothing is.
    no_kernel: Option<String>,
}

/// Adds the commands.
pub(super) fn register(registry: &mut Registry, patching: &Patching) {
    let p = patching.clone();
    registry.slow("query-stacks", move |context, query: QueryStacks| {
        let request = StacksRequest {
            pid: query.pid,
            after: query.after,
            limit: query.limit,
        };
        let within = query.deadline.or_usual();
        let work =
            |patcher: &mut Patcher, guest: &mut dyn StoppedGuest| patcher.stacks(guest, &request);
        let unwound = p.stopped(context, "query-stacks", within, work)?;
        unwound.try_map(|stacks| p.with(|patcher| patcher.name_stacks(stacks)))
    });
    let p = patching.clone();
    registry.slow("query-vcpus", move |context, query: QueryVcpus| {
        let within = query.deadline.or_usual();
        let told = p.stopped(context, "query-vcpus", within, look)?;
        let (vcpus, no_kernel) = told.into_answer();
        let host = context.services.host();
        let (cpus, holds) = (host.cpus(), host.holds());
        let row = |vcpu: VcpuReport| VcpuRow {
            cpu_index: vcpu.index,
            thread_id: cpus
                .iter()
                .find(|cpu| cpu.index == vcpu.index)
                .map(|cpu| cpu.thread_id),
            hold: holds
                .iter()
                .find(|hold| hold.vcpu == vcpu.index)
                .map(HoldInfo::to_value),
            vcpu,
            no_kernel: no_kernel.clone(),
        };
        Ok(vcpus.into_iter().map(row).collect::<Vec<_>>())
    });
}

/// Where the kernel cannot be found, registers are told all the same.
fn look(
    patcher: &mut Patcher,
    guest: &mut dyn StoppedGuest,
) -> Result<(Vec<VcpuReport>, Option<String>), PatchError> {
    match patcher.vcpus(guest) {
        Ok(vcpus) => Ok((vcpus, None)),
        Err(PatchError::Locate(error)) => {
            let plain = guest.vcpus().iter().map(VcpuReport::of).collect();
            Ok((plain, Some(error.to_string())))
        }
        Err(error) => Err(error),
    }
}
