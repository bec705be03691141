//! Where the kernel keeps what unwinding needs, taken from its symbols and its types.

use std::ops::Range;

use super::StackKind;
use crate::Kernel;
use crate::guest::LinkAddr;
use crate::space::{LayoutError, PerCpuVariable, optional, optional_range};
use crate::tasks::ReturnProbes;
use crate::types::{Field, Types};

/// Everything needed to unwind stacks, beside the tables. Offsets and sizes are in bytes.
#[derive(Clone, Debug)]
pub struct StackLayout {
    pub(super) regs: RegsLayout,
    pub(super) switched: SwitchedLayout,
    /// The first instruction of a new task.
    pub(super) fork: Option<LinkAddr>,
    pub(super) text: Range<LinkAddr>,
    pub(super) init_text: Option<Range<LinkAddr>>,
    /// Functions that /proc/PID/stack leaves out.
    pub(super) sched_text: Option<Range<LinkAddr>>,
    pub(super) graph: Option<GraphLayout>,
    pub(super) probes: Option<ReturnProbes>,
    pub(super) trampolines: Option<TrampolineLayout>,
    pub(super) bpf: Option<BpfLayout>,
    pub(super) cpu: CpuLayout,
}

/// `struct pt_regs`.
#[derive(Clone, Copy, Debug)]
pub(super) struct RegsLayout {
    pub(super) size: u64,
    pub(super) ip: u64,
    pub(super) cs: u64,
    pub(super) sp: u64,
    pub(super) bp: u64,
    pub(super) ax: u64,
    pub(super) dx: u64,
    pub(super) di: u64,
    pub(super) r10: u64,
    pub(super) r13: u64,
}

/// `struct inactive_task_frame`: what is at the saved stack pointer of a task that is off the CPU.
#[derive(Clone, Copy, Debug)]
pub(super) struct SwitchedLayout {
    pub(super) size: u64,
    pub(super) bp: u64,
    pub(super) address: u64,
}

/// Where function graph tracing keeps return addresses.
#[derive(Clone, Copy, Debug)]
pub(super) struct GraphLayout {
    /// What it puts in their place.
    pub(super) handler: LinkAddr,
    /// `task_struct.ret_stack`.
    pub(super) stack: u64,
    /// `task_struct.curr_ret_stack`.
    pub(super) current: Field,
    pub(super) entry_size: u64,
    /// `ftrace_ret_stack.ret`.
    pub(super) address: u64,
    /// `ftrace_ret_stack.retp`: where on the stack it was.
    pub(super) slot: u64,
    /// The stack is counted in words, and a word above each entry says how far down it begins
    /// (6.11 and later). Before, it is an array of entries.
    pub(super) in_words: bool,
}

/// Trampolines that ftrace makes by copying its own.
#[derive(Clone, Copy, Debug)]
pub(super) struct TrampolineLayout {
    /// `ftrace_ops_list`.
    pub(super) first: LinkAddr,
    /// `ftrace_list_end`.
    pub(super) end: Option<LinkAddr>,
    pub(super) next: u64,
    pub(super) flags: Field,
    /// FTRACE_OPS_FL_SAVE_REGS.
    pub(super) with_regs: u64,
    pub(super) start: u64,
    pub(super) size: u64,
    /// `ftrace_caller`.
    pub(super) plain: LinkAddr,
    /// `ftrace_regs_caller`.
    pub(super) regs: LinkAddr,
}

/// Programs that BPF made.
#[derive(Clone, Copy, Debug)]
pub(super) struct BpfLayout {
    /// `bpf_kallsyms`.
    pub(super) list: LinkAddr,
    pub(super) node: u64,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) name: Field,
    /// `bpf_ksym.fp_start` and `fp_end`: the part in which the frame pointer is set up.
    pub(super) frame_pointer: Option<(Field, Field)>,
}

/// What each CPU has.
#[derive(Clone, Debug)]
pub(super) struct CpuLayout {
    /// Its current task: a variable, and an offset in it.
    pub(super) current: (PerCpuVariable, u64),
    /// The top of its interrupt stack.
    pub(super) interrupt: (PerCpuVariable, u64),
    pub(super) interrupt_size: u64,
    /// Its exception stacks.
    pub(super) exceptions: PerCpuVariable,
    /// Which they are, and where from there. The entry stack is in the same area, below them.
    pub(super) areas: Vec<(StackKind, i64, u64)>,
}

impl StackLayout {
    /// Looks everything up in the kernel's file.
    ///
    /// # Errors
    /// [`LayoutError`] names what the file lacks.
    pub fn of(kernel: &Kernel) -> Result<Self, LayoutError> {
        let symbols = kernel.symbols();
        let types = kernel.types();
        let regs = |name| offset(types, "pt_regs", name);
        let switched = |name| offset(types, "inactive_task_frame", name);
        Ok(Self {
            regs: RegsLayout {
                size: types.size_of("pt_regs")?,
                ip: regs("ip")?,
                cs: regs("cs")?,
                sp: regs("sp")?,
                bp: regs("bp")?,
                ax: regs("ax")?,
                dx: regs("dx")?,
                di: regs("di")?,
                r10: regs("r10")?,
                r13: regs("r13")?,
            },
            switched: SwitchedLayout {
                size: types.size_of("inactive_task_frame")?,
                bp: switched("bp")?,
                address: switched("ret_addr")?,
            },
            // From 6.6 on there is also a function in C that has the old name.
            fork: optional(symbols, "ret_from_fork_asm")
                .or_else(|| optional(symbols, "ret_from_fork")),
            text: kernel.between("_stext", "_etext")?,
            init_text: optional_range(kernel, "_sinittext", "_einittext"),
            sched_text: optional_range(kernel, "__sched_text_start", "__sched_text_end"),
            graph: graph(kernel),
            probes: ReturnProbes::of(kernel),
            trampolines: trampolines(kernel),
            bpf: bpf(kernel),
            cpu: cpu(kernel)?,
        })
    }
}

fn offset(types: &Types, holder: &str, path: &str) -> Result<u64, LayoutError> {
    Ok(types.field(holder, path).map(|field| field.offset)?)
}

fn graph(kernel: &Kernel) -> Option<GraphLayout> {
    let types = kernel.types();
    Some(GraphLayout {
        handler: optional(kernel.symbols(), "return_to_handler")?,
        stack: offset(types, "task_struct", "ret_stack").ok()?,
        current: types.field("task_struct", "curr_ret_stack").ok()?,
        entry_size: types.size_of("ftrace_ret_stack").ok()?,
        address: offset(types, "ftrace_ret_stack", "ret").ok()?,
        slot: offset(types, "ftrace_ret_stack", "retp").ok()?,
        // Came together with room for several tracers on one stack.
        in_words: types.field("fgraph_ops", "idx").is_ok(),
    })
}

fn trampolines(kernel: &Kernel) -> Option<TrampolineLayout> {
    let symbols = kernel.symbols();
    let ops = |name| kernel.types().field("ftrace_ops", name).ok();
    let flag = kernel.types().enumerator("FTRACE_OPS_FL_SAVE_REGS").ok()?;
    Some(TrampolineLayout {
        first: optional(symbols, "ftrace_ops_list")?,
        end: optional(symbols, "ftrace_list_end"),
        next: ops("next")?.offset,
        flags: ops("flags")?,
        with_regs: u64::try_from(flag).ok()?,
        start: ops("trampoline")?.offset,
        size: ops("trampoline_size")?.offset,
        plain: optional(symbols, "ftrace_caller")?,
        regs: optional(symbols, "ftrace_regs_caller")?,
    })
}

fn bpf(kernel: &Kernel) -> Option<BpfLayout> {
    let ksym = |name| kernel.types().field("bpf_ksym", name).ok();
    Some(BpfLayout {
        list: optional(kernel.symbols(), "bpf_kallsyms")?,
        node: ksym("lnode")?.offset,
        start: ksym("start")?.offset,
        end: ksym("end")?.offset,
        name: ksym("name")?,
        frame_pointer: ksym("fp_start").zip(ksym("fp_end")),
    })
}

/// arch/x86/kernel/irq_64.c, arch/x86/include/asm/cpu_entry_area.h, current.h.
fn cpu(kernel: &Kernel) -> Result<CpuLayout, LayoutError> {
    const STACKS: [(&str, StackKind); 6] = [
        ("DF_stack", StackKind::DoubleFault),
        ("NMI_stack", StackKind::Nmi),
        ("DB_stack", StackKind::Debug),
        ("MCE_stack", StackKind::MachineCheck),
        ("VC_stack", StackKind::VmmCommunication),
        ("VC2_stack", StackKind::VmmCommunication2),
    ];
    let types = kernel.types();
    let area = |name| types.field("cpu_entry_area", name);
    let mut areas = Vec::new();
    for (name, kind) in STACKS {
        // Not every kernel has every one.
        if let Ok(stack) = types.field("cea_exception_stacks", name) {
            areas.push((kind, signed(stack.offset), stack.size));
        }
    }
    let entry = area("entry_stack_page")?;
    let below = signed(entry.offset) - signed(area("estacks")?.offset);
    areas.push((StackKind::Entry, below, entry.size));
    let named = |name| PerCpuVariable::named(kernel.symbols(), name);
    // One structure held both from 6.2 to 6.14.
    let hot = |member| {
        let variable = named("pcpu_hot").ok()?;
        Some((variable, offset(types, "pcpu_hot", member).ok()?))
    };
    let either = |member, name| match hot(member) {
        Some(found) => Ok(found),
        None => Ok::<_, LayoutError>((named(name)?, 0)),
    };
    Ok(CpuLayout {
        current: either("current_task", "current_task")?,
        interrupt: either("hardirq_stack_ptr", "hardirq_stack_ptr")?,
        interrupt_size: types.size_of("irq_stack")?,
        exceptions: named("cea_exception_stacks")?,
        areas,
    })
}

/// Offsets in a structure are far below 2^63.
fn signed(offset: u64) -> i64 {
    i64::try_from(offset).unwrap_or(i64::MAX)
}
