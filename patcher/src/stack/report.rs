//! Stacks as they are told to people and programs: plain data.
//!
//! While the guest is stopped stacks are unwound and what needs guest memory is read; the kernel's
//! own names are looked up afterwards.

use super::names::Names;
use super::{End, Frame, FrameKind, Reliability, StackKind, StackLayout, Trace, Unwinder};
use crate::Kernel;
use crate::guest::{Activity, Gva, Slide, Vcpu};
use crate::space::Space;
use crate::tasks::{Task, TaskAddr, TaskLayout, TaskState};

/// Frames of one task that are told. A stack that is well has far fewer.
const MAX_FRAMES: usize = 256;
/// Frames of all tasks together.
const MAX_FRAMES_IN_ALL: usize = 20_000;
/// Tasks that are told at the most.
const MAX_TASKS: usize = 2_000;

/// Whose stacks are wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StacksRequest {
    /// Only of this task, or of all threads of this process.
    pub pid: Option<u32>,
    /// Only of tasks with a higher thread id.
    pub after: Option<u32>,
    /// No more tasks than this.
    pub limit: Option<usize>,
}

/// Stacks of tasks, without names.
#[derive(Clone, Debug)]
pub struct Unwound {
    slide: Slide,
    tasks: Vec<UnwoundTask>,
    more: usize,
    counts: Counts,
}

#[derive(Clone, Debug)]
struct UnwoundTask {
    task: TheTask,
    trace: Trace,
    /// Names of the frames that are not in the kernel's own text.
    foreign: Vec<Option<String>>,
}

/// How many of the tasks that were asked for could be relied on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Counts {
    /// All that were asked for.
    pub tasks: usize,
    /// Those whose stacks are told reliably.
    pub reliable: usize,
    /// Those of them that were not on a CPU.
    pub asleep: usize,
    /// And could be relied on.
    pub asleep_reliable: usize,
}

/// Stacks of tasks.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct StacksReport {
    /// The stacks, by thread id.
    pub tasks: Vec<TaskStack>,
    /// Tasks that were left out; ask again for those after the last one that is here.
    pub more: usize,
    /// How many were looked at, those that were left out included.
    pub counts: Counts,
}

/// A task.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TheTask {
    /// Thread id; 0 for idle tasks.
    pub pid: u32,
    /// Id of the process that the thread belongs to.
    pub tgid: u32,
    /// Name, at most 15 characters.
    pub comm: String,
    /// State as `ps` shows it.
    pub state: TaskState,
    /// The vCPU that it is on.
    pub vcpu: Option<u32>,
    /// Its `task_struct`.
    pub address: TaskAddr,
}

/// The stack of a task.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TaskStack {
    /// Whose.
    #[serde(flatten)]
    pub task: TheTask,
    /// Whether every frame is there.
    pub reliable: bool,
    /// Where the stack ended, when it is reliable.
    pub end: Option<End>,
    /// Why it is not.
    pub unreliable: Option<Unreliable>,
    /// The frames, innermost first.
    pub frames: Vec<FrameReport>,
    /// Frames that were left out, at the outer end.
    pub more_frames: usize,
}

/// Why a stack cannot be relied on.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Unreliable {
    /// Index of the first frame from which on it cannot be.
    pub frame: usize,
    /// Why.
    pub why: String,
}

/// One frame.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FrameReport {
    /// Where execution goes on.
    pub address: Gva,
    /// Function, offset and size, as the kernel prints them.
    pub symbol: String,
    /// How it came to be there.
    pub kind: FrameKind,
    /// The stack that it was found on.
    pub stack: StackKind,
    /// What a tracer had put in its place.
    pub repaired_from: Option<Gva>,
    /// It is in the scheduler; /proc/PID/stack leaves it out.
    pub scheduler: bool,
}

/// What a vCPU is doing.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VcpuReport {
    /// Its index.
    #[serde(skip)]
    pub index: u32,
    /// The number that the kernel has for it, where that can be told.
    pub cpu: Option<u32>,
    /// Whether it executes anything.
    pub activity: Activity,
    /// It runs a guest of the guest.
    pub nested: bool,
    /// Privilege level: 0 in the kernel, 3 in user mode.
    pub cpl: u8,
    /// Its instruction pointer.
    pub rip: Gva,
    /// What that is in, when it is in the kernel.
    pub symbol: Option<String>,
    /// Thread id of its current task; 0 when it is idle.
    pub pid: Option<u32>,
    /// The task's name.
    pub comm: Option<String>,
}

impl VcpuReport {
    /// What is known without a kernel.
    #[must_use]
    pub fn of(vcpu: &Vcpu) -> Self {
        Self {
            index: vcpu.index,
            cpu: None,
            activity: vcpu.activity,
            nested: vcpu.nested,
            cpl: vcpu.cpl(),
            rip: Gva(vcpu.registers.rip),
            symbol: None,
            pid: None,
            comm: None,
        }
    }
}

/// Unwinds what is asked for.
#[must_use]
pub fn unwind(
    unwinder: &Unwinder<'_, '_>,
    slide: Slide,
    mut tasks: Vec<Task>,
    request: &StacksRequest,
) -> Unwound {
    let wanted = |task: &Task| {
        let pid = request.pid.unwrap_or(task.pid);
        let after = request.after.is_none_or(|after| task.pid > after);
        (task.pid == pid || task.tgid == pid) && after
    };
    tasks.retain(wanted);
    tasks.sort_by_key(|task| (task.pid, task.address));
    let limit = request.limit.unwrap_or(MAX_TASKS).min(MAX_TASKS);
    let mut unwound = Unwound {
        slide,
        tasks: Vec::new(),
        more: 0,
        counts: Counts::default(),
    };
    let mut room = MAX_FRAMES_IN_ALL;
    for task in tasks {
        let trace = unwinder.task(&task);
        let counts = &mut unwound.counts;
        let (reliable, asleep) = (trace.is_reliable(), !task.on_cpu);
        counts.tasks += 1;
        counts.reliable += usize::from(reliable);
        counts.asleep += usize::from(asleep);
        counts.asleep_reliable += usize::from(asleep && reliable);
        let told = trace.frames.len().min(MAX_FRAMES);
        if unwound.tasks.len() >= limit || told > room {
            // Whoever asks on does so behind the last one told: none may come after a gap.
            room = 0;
            unwound.more += 1;
            continue;
        }
        room -= told;
        let shown = trace.frames.iter().take(MAX_FRAMES);
        unwound.tasks.push(UnwoundTask {
            foreign: shown.map(|frame| unwinder.foreign_name(frame)).collect(),
            task: TheTask {
                pid: task.pid,
                tgid: task.tgid,
                state: task.shown(),
                vcpu: unwinder.vcpu_of(&task).map(|on| on.vcpu.index),
                comm: task.comm,
                address: task.address,
            },
            trace,
        });
    }
    unwound
}

impl Unwound {
    /// Looks the names up.
    #[must_use]
    pub fn named(self, kernel: &Kernel, layout: &StackLayout) -> StacksReport {
        let names = Names {
            kernel,
            layout,
            slide: self.slide,
        };
        let tasks = self.tasks.into_iter();
        StacksReport {
            tasks: tasks.map(|task| task.named(&names)).collect(),
            more: self.more,
            counts: self.counts,
        }
    }
}

impl UnwoundTask {
    fn named(self, names: &Names<'_>) -> TaskStack {
        let all = self.trace.frames.len();
        let frames = self.trace.frames.iter().zip(self.foreign);
        let frames: Vec<_> = frames
            .map(|(frame, foreign)| told(names, frame, foreign))
            .collect();
        let (end, unreliable) = match &self.trace.reliability {
            Reliability::Reliable(end) => (Some(*end), None),
            Reliability::Unreliable(doubt) => {
                let unreliable = Unreliable {
                    frame: doubt.frame,
                    why: doubt.to_string(),
                };
                (None, Some(unreliable))
            }
        };
        TaskStack {
            task: self.task,
            reliable: end.is_some(),
            end,
            unreliable,
            more_frames: all - frames.len(),
            frames,
        }
    }
}

fn told(names: &Names<'_>, frame: &Frame, foreign: Option<String>) -> FrameReport {
    FrameReport {
        address: frame.address,
        symbol: foreign.unwrap_or_else(|| names.name(frame)),
        kind: frame.kind,
        stack: frame.stack,
        repaired_from: frame.repaired_from,
        scheduler: names.is_scheduler(frame),
    }
}

/// What each vCPU is doing.
#[must_use]
pub fn vcpus(
    unwinder: &Unwinder<'_, '_>,
    space: &Space<'_>,
    tasks: &TaskLayout,
    slide: Slide,
    kernel: &Kernel,
    layout: &StackLayout,
) -> Vec<VcpuReport> {
    let names = Names {
        kernel,
        layout,
        slide,
    };
    let report = |on: &super::OnVcpu| {
        let vcpu = &on.vcpu;
        let running = Frame {
            address: Gva(vcpu.registers.rip),
            kind: FrameKind::Running,
            stack: StackKind::Register,
            repaired_from: None,
        };
        let known = vcpu.activity != Activity::NotStarted && !vcpu.nested && vcpu.cpl() == 0;
        let symbol = known.then(|| {
            let foreign = unwinder.foreign_name(&running);
            foreign.unwrap_or_else(|| names.name(&running))
        });
        let task = on.current.and_then(|task| tasks.identity(space, task));
        let (pid, comm) = task.unzip();
        VcpuReport {
            cpu: on.cpu,
            symbol,
            pid,
            comm,
            ..VcpuReport::of(vcpu)
        }
    };
    unwinder.vcpus().iter().map(report).collect()
}
