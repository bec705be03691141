//! Where the kernel keeps its tasks, taken from its symbols and its types.

use std::ops::Range;

use super::list::TaskAddr;
use super::parts::{Parts, pointer_at};
use super::probes::ReturnProbes;
use crate::Kernel;
use crate::guest::LinkAddr;
use crate::space::{LayoutError, PerCpuVariable, Space, optional, optional_range};
use crate::types::{Field, TypeError};

/// Everything needed to find tasks and their stacks. Offsets and sizes are in bytes.
#[derive(Clone, Debug)]
pub struct TaskLayout {
    pub(crate) init_task: LinkAddr,
    /// Threads the kernel counts, idle tasks not included.
    pub(crate) nr_threads: Option<LinkAddr>,
    pub(crate) task: TaskFields,
    pub(crate) list_next: u64,
    /// `signal_struct.thread_head`.
    pub(crate) thread_head: u64,
    pub(crate) stack_size: u64,
    pub(crate) runqueues: RunQueues,
    pub(crate) exiting: Exiting,
    pub(crate) cpu_stacks: Vec<CpuStack>,
    pub(crate) returns: ShadowReturns,
    /// The first and last instructions in the kernel, some of which run on the user's stack.
    pub(crate) entry_text: Option<Range<LinkAddr>>,
}

/// Members of `task_struct`.
#[derive(Clone, Debug)]
pub(crate) struct TaskFields {
    /// All of them that are told of a task.
    pub(super) all: Parts,
    /// Those that tell whether it is one that is looked for.
    pub(super) few: Parts,
    pub(crate) size: u64,
    pub(crate) tasks: u64,
    pub(crate) thread_node: u64,
    /// `thread_node.next`.
    pub(crate) next_thread: u64,
    pub(crate) signal: u64,
    pub(crate) pid: Field,
    pub(crate) tgid: Field,
    pub(crate) comm: Field,
    pub(crate) state: Field,
    pub(crate) exit_state: Field,
    pub(crate) flags: Field,
    pub(crate) stack: u64,
    pub(crate) sp: u64,
    pub(crate) on_cpu: Field,
    pub(crate) on_rq: Field,
}

/// A kernel's run queues.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RunQueues {
    pub(crate) variable: PerCpuVariable,
    pub(crate) curr: u64,
    pub(crate) idle: u64,
    /// `rq.cfs_tasks`: all tasks of the fair class that can run.
    pub(crate) fair: u64,
    /// `task_struct.se.group_node`, by which they are on it.
    pub(crate) fair_node: u64,
}

/// How tasks are found that have left the task list and have not made their last switch.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Exiting {
    /// From 6.9 on they are on a list of each CPU.
    Listed {
        variable: PerCpuVariable,
        head: u64,
        node: u64,
    },
    /// Before, they are readers of an SRCU domain, which counts them.
    Counted {
        domain: LinkAddr,
        /// `srcu_struct.sda`, a per-CPU pointer.
        data: u64,
        locks: Field,
        unlocks: Field,
    },
    /// The kernel has neither.
    Unknown,
}

/// A stack of a CPU, rather than of a task.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuStack {
    pub(crate) name: &'static str,
    pub(crate) variable: PerCpuVariable,
    pub(crate) size: u64,
}

/// Where return addresses wait that tracers have taken off the stack.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShadowReturns {
    /// `task_struct.ret_stack` of function graph tracing, and its longest extent.
    pub(crate) graph: Option<(u64, u64)>,
    /// Of return probes.
    pub(crate) probes: Option<ReturnProbes>,
}

impl TaskLayout {
    /// Looks everything up in the kernel's file.
    ///
    /// # Errors
    /// [`LayoutError`] names what the file lacks.
    pub fn of(kernel: &Kernel) -> Result<Self, LayoutError> {
        let symbols = kernel.symbols();
        let types = kernel.types();
        let task = |path| types.field("task_struct", path);
        let rq = |path| types.field("rq", path).map(|field| field.offset);
        let fields = TaskFields {
            all: Parts::default(),
            few: Parts::default(),
            size: types.size_of("task_struct")?,
            tasks: task("tasks")?.offset,
            thread_node: task("thread_node")?.offset,
            next_thread: task("thread_node.next")?.offset,
            signal: task("signal")?.offset,
            pid: task("pid")?,
            tgid: task("tgid")?,
            comm: task("comm")?,
            // Renamed and narrowed in 5.14.
            state: either(task("__state"), || task("state"))?,
            exit_state: task("exit_state")?,
            flags: task("flags")?,
            stack: task("stack")?.offset,
            sp: task("thread.sp")?.offset,
            on_cpu: task("on_cpu")?,
            on_rq: task("on_rq")?,
        };
        Ok(Self {
            init_task: symbols.address("init_task")?,
            nr_threads: optional(symbols, "nr_threads"),
            task: fields.complete(),
            list_next: types.field("list_head", "next")?.offset,
            thread_head: types.field("signal_struct", "thread_head")?.offset,
            stack_size: stack_size(kernel)?,
            runqueues: RunQueues {
                variable: PerCpuVariable::named(symbols, "runqueues")?,
                curr: rq("curr")?,
                idle: rq("idle")?,
                fair: rq("cfs_tasks")?,
                fair_node: task("se.group_node")?.offset,
            },
            exiting: exiting(kernel),
            cpu_stacks: cpu_stacks(kernel)?,
            returns: shadow_returns(kernel),
            entry_text: optional_range(kernel, "__entry_text_start", "__entry_text_end"),
        })
    }
}

impl TaskFields {
    /// With what is read of every task.
    pub(super) fn complete(mut self) -> Self {
        let numbers = [
            self.pid,
            self.tgid,
            self.comm,
            self.state,
            self.exit_state,
            self.flags,
            self.on_cpu,
            self.on_rq,
        ];
        let next = pointer_at(self.next_thread);
        let pointers = [self.stack, self.sp].map(pointer_at);
        self.all = Parts::of(numbers.into_iter().chain(pointers).chain([next]));
        self.few = Parts::of([self.pid, self.on_cpu, self.on_rq, next]);
        self
    }
}

impl TaskLayout {
    /// Thread id and name of a task, when they can be read.
    pub(crate) fn identity(&self, space: &Space<'_>, task: TaskAddr) -> Option<(u32, String)> {
        let fields = &self.task;
        let pid = space.read_u32(task.0.offset(fields.pid.offset)).ok()?;
        let mut comm = vec![0; usize::try_from(fields.comm.size.min(64)).ok()?];
        let at = task.0.offset(fields.comm.offset);
        space.read(at, &mut comm).ok()?;
        let end = comm.iter().position(|&byte| byte == 0);
        comm.truncate(end.unwrap_or(comm.len()));
        Some((pid, String::from_utf8_lossy(&comm).into_owned()))
    }
}

fn either(
    first: Result<Field, TypeError>,
    second: impl FnOnce() -> Result<Field, TypeError>,
) -> Result<Field, TypeError> {
    // The first name is what newer kernels have: that is the one to complain about.
    first.or_else(|error| second().map_err(|_| error))
}

/// THREAD_SIZE: the union that the first task's stack is in has just that size.
fn stack_size(kernel: &Kernel) -> Result<u64, LayoutError> {
    let union = kernel.types().size_of("thread_union").ok();
    let symbols = || {
        // The linker script reserves the first task's stack between these.
        [
            ("__start_init_stack", "__end_init_stack"),
            ("__start_init_task", "__end_init_task"),
        ]
        .into_iter()
        .find_map(|(start, end)| {
            let range = optional_range(kernel, start, end)?;
            Some(range.end.distance_from(range.start))
        })
    };
    union
        .or_else(symbols)
        .filter(|size| size.is_power_of_two() && (4096..=1 << 20).contains(size))
        .ok_or(LayoutError::Unknown {
            what: "stack size (THREAD_SIZE)",
        })
}

fn exiting(kernel: &Kernel) -> Exiting {
    let types = kernel.types();
    let listed = || {
        // The member first: looking for a symbol that is not there takes long.
        let head = types.field("rcu_tasks_percpu", "rtp_exit_list").ok()?;
        Some(Exiting::Listed {
            variable: PerCpuVariable::named(kernel.symbols(), "rcu_tasks__percpu").ok()?,
            head: head.offset,
            node: types
                .field("task_struct", "rcu_tasks_exit_list")
                .ok()?
                .offset,
        })
    };
    let counted = || {
        Some(Exiting::Counted {
            domain: optional(kernel.symbols(), "tasks_rcu_exit_srcu")?,
            data: types.field("srcu_struct", "sda").ok()?.offset,
            locks: types.field("srcu_data", "srcu_lock_count").ok()?,
            unlocks: types.field("srcu_data", "srcu_unlock_count").ok()?,
        })
    };
    listed().or_else(counted).unwrap_or(Exiting::Unknown)
}

/// The memory behind every CPU's interrupt, exception and entry stacks
/// (arch/x86/kernel/cpu/common.c and irq_64.c, arch/x86/mm/cpu_entry_area.c).
fn cpu_stacks(kernel: &Kernel) -> Result<Vec<CpuStack>, LayoutError> {
    [
        ("interrupt stack", "irq_stack_backing_store", "irq_stack"),
        ("exception stacks", "exception_stacks", "exception_stacks"),
        ("entry stack", "entry_stack_storage", "entry_stack_page"),
    ]
    .into_iter()
    .map(|(name, symbol, size)| {
        Ok(CpuStack {
            name,
            variable: PerCpuVariable::named(kernel.symbols(), symbol)?,
            size: kernel.types().size_of(size)?,
        })
    })
    .collect()
}

fn shadow_returns(kernel: &Kernel) -> ShadowReturns {
    /// SHADOW_STACK_SIZE from 6.10 on (kernel/trace/fgraph.c); before, it is 50 entries of
    /// `ftrace_ret_stack`, which is less.
    const LONGEST: u64 = 4096;
    let field = |holder, path| {
        kernel
            .types()
            .field(holder, path)
            .ok()
            .map(|field| field.offset)
    };
    ShadowReturns {
        graph: field("task_struct", "ret_stack").map(|at| (at, LONGEST)),
        probes: ReturnProbes::of(kernel),
    }
}
