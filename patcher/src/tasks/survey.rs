//! Every task with what people and programs want to know of it, and whether two ways of counting
//! tasks agree.
//!
//! [`survey`] is for showing: where the counts disagree it says so and still shows what it found.
//! Decisions about freeing memory are made on [`super::scan`], which fails instead.

use std::collections::HashSet;

use super::layout::TaskLayout;
use super::list::{Task, TaskAddr, TaskError, Walker};
use super::parts::{Parts, pointer_at};
use super::pids::PidTable;
use super::state::{Scheduling, TaskState};
use crate::Kernel;
use crate::guest::{Activity, Gva, Vcpu};
use crate::space::{LayoutError, Located, PerCpuVariable, Space};
use crate::types::Field;

/// PF_KTHREAD (include/linux/sched.h), a macro.
const KERNEL_THREAD: u64 = 0x0020_0000;
/// Disagreements that are told by name.
const MAX_TOLD: usize = 16;

/// Where the kernel keeps what is told of a task beside [`Task`].
#[derive(Clone, Debug)]
pub struct SurveyLayout {
    pub(super) parent: u64,
    /// `task_struct.thread_pid`: a task without one has left its parent.
    pub(super) thread_pid: u64,
    pub(super) tgid: Field,
    pub(super) cpu: Field,
    pub(super) mm: u64,
    pub(super) voluntary: Field,
    pub(super) involuntary: Field,
    pub(super) started: Field,
    pub(super) delayed: Option<Field>,
    /// What a CPU runs: the variable, and where in it the pointer is.
    pub(super) current: (PerCpuVariable, u64),
    pub(super) pids: Option<PidTable>,
    /// All members of a task that are told.
    pub(super) all: Parts,
}

impl SurveyLayout {
    /// Looks everything up in the kernel's file.
    ///
    /// # Errors
    /// [`LayoutError`] names what the file lacks.
    pub fn of(kernel: &Kernel) -> Result<Self, LayoutError> {
        let types = kernel.types();
        let task = |path| types.field("task_struct", path);
        let variable = |name| PerCpuVariable::named(kernel.symbols(), name);
        // 6.2 to 6.14 have it in `pcpu_hot`.
        let current = match types.field("pcpu_hot", "current_task") {
            Ok(field) => (variable("pcpu_hot")?, field.offset),
            Err(_) => (variable("current_task")?, 0),
        };
        Ok(Self {
            parent: task("real_parent")?.offset,
            thread_pid: task("thread_pid")?.offset,
            tgid: task("tgid")?,
            // Outside of thread_info up to 5.15.
            cpu: task("thread_info.cpu").or_else(|error| task("cpu").map_err(|_| error))?,
            mm: task("mm")?.offset,
            voluntary: task("nvcsw")?,
            involuntary: task("nivcsw")?,
            started: task("start_boottime")?,
            delayed: task("se.sched_delayed").ok(),
            current,
            pids: PidTable::of(kernel),
            all: Parts::default(),
        }
        .complete())
    }

    /// With what is read of every task.
    pub(super) fn complete(mut self) -> Self {
        let numbers = [
            self.tgid,
            self.cpu,
            self.voluntary,
            self.involuntary,
            self.started,
        ];
        let pointers = [self.parent, self.thread_pid, self.mm].map(pointer_at);
        self.all = Parts::of(numbers.into_iter().chain(self.delayed).chain(pointers));
        self
    }
}

/// What kind of task it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskKind {
    /// A thread of a process.
    User,
    /// A thread of the kernel.
    Kernel,
    /// What a CPU runs when there is nothing to do. Not in the guest's own /proc.
    Idle,
}

/// A task as it is shown.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TaskInfo {
    /// Thread id; 0 for idle tasks.
    pub pid: u32,
    /// Id of the process that the thread belongs to.
    pub tgid: u32,
    /// Id of the process's parent; 0 when it has none.
    pub ppid: u32,
    /// Name, at most 15 characters.
    pub comm: String,
    /// State as `ps` shows it.
    pub state: TaskState,
    /// What the scheduler has it for.
    pub scheduling: Scheduling,
    /// Thread of a process, of the kernel, or idle task.
    pub kind: TaskKind,
    /// The CPU that it is on or was on last, as the kernel counts.
    pub cpu: u32,
    /// The vCPU that has it as its current task, when one has.
    pub vcpu: Option<u32>,
    /// `task_struct.on_cpu`.
    pub on_cpu: bool,
    /// `task_struct.on_rq`.
    pub on_rq: bool,
    /// Switches away that it asked for, by sleeping.
    pub nvcsw: u64,
    /// Switches away that it did not ask for.
    pub nivcsw: u64,
    /// When it began, in nanoseconds since boot.
    pub start_time_ns: u64,
    /// It has user memory of its own.
    pub has_mm: bool,
    /// It is on the task list. Otherwise a CPU runs it or has it queued, or it is on its way out.
    pub listed: bool,
    /// Its `task_struct`.
    pub address: TaskAddr,
}

/// How many tasks there are, by each way of counting. Idle tasks are not counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Counts {
    /// Threads on the task list.
    pub listed: u64,
    /// What the kernel says (`nr_threads`).
    pub counted: Option<u64>,
    /// Tasks that the table of process ids leads to.
    pub by_pid: Option<u64>,
}

/// All tasks of a guest.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Survey {
    /// The tasks; those on the task list first.
    pub tasks: Vec<TaskInfo>,
    /// How many they are, in several ways.
    pub counts: Counts,
    /// In what the ways differ; empty when they agree. A thread that is just coming or going
    /// makes a passing one.
    pub disagreements: Vec<String>,
}

/// Every task of a stopped guest as it is shown.
///
/// # Errors
/// [`TaskError`] when a walk cannot be finished; not when the counts disagree.
pub fn survey(
    space: &Space<'_>,
    located: &Located,
    layout: &TaskLayout,
    more: &SurveyLayout,
    vcpus: &[Vcpu],
) -> Result<Survey, TaskError> {
    let walker = Walker::new(space, located, layout);
    let mut found = walker.listed()?;
    let listed = found.tasks.len();
    walker.unlisted(&mut found)?;
    let count = |tasks: &[Task]| tasks.iter().filter(|task| task.pid != 0).count() as u64;
    let on_lists = found.tasks.get(..listed).unwrap_or_default();
    let by_pid = more.pids.as_ref().map(|table| walker.by_pid(table));
    let by_pid = by_pid.transpose()?;
    let counts = Counts {
        listed: count(on_lists),
        counted: walker.counted()?,
        by_pid: by_pid.as_ref().map(|tasks| tasks.len() as u64),
    };
    let disagreements = disagreements(counts, on_lists, by_pid.as_ref());
    let reader = Reader {
        walker: &walker,
        more,
        current: currents(&walker, more, vcpus)?,
        idle: walker.idle()?,
    };
    let describe = |(index, task): (usize, &Task)| reader.describe(task, index < listed);
    let tasks = found.tasks.iter().enumerate().map(describe);
    Ok(Survey {
        tasks: tasks.collect::<Result<_, _>>()?,
        counts,
        disagreements,
    })
}

fn disagreements(counts: Counts, listed: &[Task], by_pid: Option<&HashSet<Gva>>) -> Vec<String> {
    let mut told = Vec::new();
    if let Some(counted) = counts.counted.filter(|&counted| counted != counts.listed) {
        told.push(format!(
            "the kernel counts {counted} threads, and {} are on its lists",
            counts.listed
        ));
    }
    let Some(by_pid) = by_pid else {
        return told;
    };
    let known: HashSet<Gva> = listed.iter().map(|task| task.address.0).collect();
    let missing = listed
        .iter()
        .filter(|task| task.pid != 0 && !by_pid.contains(&task.address.0));
    told.extend(missing.map(|task| format!("{task} is on the task list and has no process id")));
    let mut extra: Vec<&Gva> = by_pid.difference(&known).collect();
    extra.sort();
    let extra = extra.into_iter();
    told.extend(extra.map(|at| format!("the task at {at} has a process id and is on no list")));
    if told.len() > MAX_TOLD {
        let more = told.len() - MAX_TOLD;
        told.truncate(MAX_TOLD);
        told.push(format!("and {more} more"));
    }
    told
}

/// What each vCPU in the kernel's hands runs: task and vCPU.
fn currents(
    walker: &Walker<'_, '_>,
    more: &SurveyLayout,
    vcpus: &[Vcpu],
) -> Result<Vec<(Gva, u32)>, TaskError> {
    let per_cpu = &walker.located.per_cpu;
    let mut currents = Vec::new();
    for vcpu in vcpus {
        if vcpu.activity == Activity::NotStarted || vcpu.nested {
            continue;
        }
        let cpu = per_cpu.cpu_of(&vcpu.registers);
        let (variable, offset) = more.current;
        let at = cpu.and_then(|cpu| per_cpu.address(variable, cpu));
        if let Some(at) = at {
            let task = walker.pointer("current task", at.offset(offset))?;
            currents.push((task, vcpu.index));
        }
    }
    Ok(currents)
}

struct Reader<'a> {
    walker: &'a Walker<'a, 'a>,
    more: &'a SurveyLayout,
    current: Vec<(Gva, u32)>,
    idle: Vec<Gva>,
}

impl Reader<'_> {
    fn describe(&self, task: &Task, listed: bool) -> Result<TaskInfo, TaskError> {
        let more = self.more;
        let at = task.address.0;
        let record = self.walker.record(at, &more.all)?;
        let read = |field| record.number(field);
        let delayed = more.delayed.is_some_and(|field| read(field) != 0);
        let has_mm = record.pointer(more.mm).0 != 0;
        let kind = match task.flags & KERNEL_THREAD {
            _ if self.idle.contains(&at) => TaskKind::Idle,
            0 => TaskKind::User,
            _ => TaskKind::Kernel,
        };
        let ppid = match record.pointer(more.parent) {
            // As /proc has it: a task that was waited for has no parent any more.
            parent if parent.0 != 0 && record.pointer(more.thread_pid).0 != 0 => {
                let tgid = parent.offset(more.tgid.offset);
                narrow(self.walker.number("task", tgid, more.tgid.size)?)
            }
            _ => 0,
        };
        let vcpu = self.current.iter().find(|&&(current, _)| current == at);
        Ok(TaskInfo {
            pid: task.pid,
            tgid: task.tgid,
            ppid,
            comm: task.comm.clone(),
            state: task.shown(),
            scheduling: Scheduling::of(task.on_cpu, task.on_rq, task.state, delayed),
            kind,
            cpu: narrow(read(more.cpu)),
            vcpu: vcpu.map(|&(_, index)| index),
            on_cpu: task.on_cpu,
            on_rq: task.on_rq,
            nvcsw: read(more.voluntary),
            nivcsw: read(more.involuntary),
            start_time_ns: read(more.started),
            has_mm,
            listed,
            address: task.address,
        })
    }
}

fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
