//! The conservative scan: can any context come back to a range of addresses?
//!
//! It looks at every word where an instruction pointer or a return address can be: the registers
//! of every vCPU in the kernel, the stack of every task (from its saved stack pointer up; all of it
//! while it is on a CPU), every CPU's interrupt, exception and entry stacks, and the places where
//! tracers keep return addresses off the stack. It cannot miss a frame. A word that it finds may be
//! stale, or a number that only looks like an address: it never says that a context *is* there.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use super::layout::TaskLayout;
use super::list::{Task, TaskAddr, TaskError, Walker};
use super::probes::{Kept, Place};
use crate::guest::{Activity, Gva, Vcpu, VcpuRegisters};
use crate::space::{Located, Space};

/// Hits that are told; more say nothing new.
const MAX_HITS: usize = 1024;

/// End of the user's half of the address space, with five levels of page tables.
const LOWER_HALF: u64 = 1 << 56;

/// Who may come back to a range.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Context {
    /// A vCPU.
    Vcpu {
        /// Its index.
        index: u32,
    },
    /// A task.
    Task {
        /// Its `task_struct`.
        task: TaskAddr,
        /// Thread id; 0 for idle tasks.
        pid: u32,
        /// Name.
        comm: String,
    },
    /// An interrupt or exception on a CPU.
    Cpu {
        /// CPU number as the kernel counts.
        cpu: u32,
        /// Which of its stacks.
        stack: &'static str,
    },
    /// There are more than could be told.
    Unknown,
}

impl Context {
    fn of(task: &Task) -> Self {
        Self::Task {
            task: task.address,
            pid: task.pid,
            comm: task.comm.clone(),
        }
    }
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcpu { index } => write!(f, "vCPU {index}"),
            Self::Task { pid, comm, .. } => write!(f, "{comm} (pid {pid})"),
            Self::Cpu { cpu, stack } => write!(f, "{stack} of CPU {cpu}"),
            Self::Unknown => f.write_str("others"),
        }
    }
}

/// Where the address was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Found {
    /// In a register.
    Register(&'static str),
    /// On a stack, at this address.
    Stack(Gva),
    /// Where a tracer keeps a return address, at this address.
    ShadowReturn(Gva),
    /// The vCPU runs a guest of the guest: what it would come back to is not known.
    NestedGuest,
    /// The vCPU's stack pointer is on no stack that is known; it might return to anywhere.
    UnknownStack(Gva),
}

/// A context that may come back to a range.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Hit {
    /// Whose.
    pub context: Context,
    /// Where.
    pub found: Found,
    /// The address in the range; 0 where the context is not known.
    pub address: Gva,
}

impl fmt::Display for Hit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            context,
            found,
            address,
        } = self;
        match found {
            Found::Register(name) => write!(f, "{context} has {address} in {name}"),
            Found::Stack(at) => write!(f, "{context} has {address} on its stack at {at}"),
            Found::ShadowReturn(at) => {
                write!(f, "{context} returns to {address} by a tracer at {at}")
            }
            Found::NestedGuest => write!(f, "{context} runs a nested guest"),
            Found::UnknownStack(sp) => write!(f, "{context} is on an unknown stack at {sp}"),
        }
    }
}

/// What a scan found.
#[derive(Clone, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct Scanned {
    /// Contexts that may come back to one of the ranges.
    pub hits: Vec<Hit>,
    /// There were more hits than these.
    pub more: bool,
    /// Tasks that were looked at.
    pub tasks: usize,
    /// vCPUs that were looked at.
    pub vcpus: usize,
}

impl Scanned {
    /// Nothing can come back to any of the ranges.
    #[must_use]
    pub fn is_clear(&self) -> bool {
        self.hits.is_empty() && !self.more
    }

    /// What was found about `range`, or about a context that may be anywhere.
    pub fn about(&self, range: &Range<Gva>) -> impl Iterator<Item = &Hit> {
        self.hits.iter().filter(|hit| match hit.found {
            Found::NestedGuest | Found::UnknownStack(_) => true,
            Found::Register(_) | Found::Stack(_) | Found::ShadowReturn(_) => {
                range.contains(&hit.address)
            }
        })
    }
}

/// Ranges of addresses to look for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Windows(Vec<Range<u64>>);

impl Windows {
    /// Looks for any address in any of `ranges`.
    #[must_use]
    pub fn new(ranges: impl IntoIterator<Item = Range<Gva>>) -> Self {
        let mut all: Vec<_> = ranges
            .into_iter()
            .map(|range| range.start.0..range.end.0)
            .filter(|range| !range.is_empty())
            .collect();
        all.sort_by_key(|range| (range.start, range.end));
        let mut merged: Vec<Range<u64>> = Vec::with_capacity(all.len());
        for range in all {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        Self(merged)
    }

    /// Whether there is nothing to look for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `address` is in one of the ranges.
    #[must_use]
    pub fn contains(&self, address: Gva) -> bool {
        // Nearly every word of a stack is outside of all.
        let (Some(first), Some(last)) = (self.0.first(), self.0.last()) else {
            return false;
        };
        if address.0 < first.start || address.0 >= last.end {
            return false;
        }
        let after = self.0.partition_point(|range| range.start <= address.0);
        after
            .checked_sub(1)
            .and_then(|index| self.0.get(index))
            .is_some_and(|range| address.0 < range.end)
    }
}

/// One pass over everything.
pub(super) struct Scan<'a, 'm> {
    walker: Walker<'a, 'm>,
    windows: &'a Windows,
    hits: Vec<Hit>,
    more: bool,
    /// Guest-physical pages of stacks that a vCPU may be on.
    pages: HashSet<u64>,
    /// What was read last.
    buffer: Vec<u8>,
}

impl<'a, 'm> Scan<'a, 'm> {
    pub(super) fn new(
        space: &'a Space<'m>,
        located: &'a Located,
        layout: &'a TaskLayout,
        windows: &'a Windows,
    ) -> Self {
        Self {
            walker: Walker::new(space, located, layout),
            windows,
            hits: Vec::new(),
            more: false,
            pages: HashSet::new(),
            buffer: Vec::new(),
        }
    }

    pub(super) fn run(mut self, vcpus: &[Vcpu], tasks: &[Task]) -> Result<Scanned, TaskError> {
        self.walker.none_unlisted()?;
        for task in tasks {
            self.task(task)?;
        }
        self.probed(tasks)?;
        self.cpu_stacks()?;
        for vcpu in vcpus {
            self.vcpu(vcpu);
        }
        Ok(Scanned {
            hits: self.hits,
            more: self.more,
            tasks: tasks.len(),
            vcpus: vcpus.len(),
        })
    }

    fn hit(&mut self, context: impl FnOnce() -> Context, found: Found, address: Gva) {
        if self.hits.len() < MAX_HITS {
            self.hits.push(Hit {
                context: context(),
                found,
                address,
            });
        } else {
            self.more = true;
        }
    }

    fn task(&mut self, task: &Task) -> Result<(), TaskError> {
        let context = || Context::of(task);
        let size = self.walker.layout.stack_size;
        // A task that ended has given its stack back.
        if task.stack.0 != 0 {
            let used = task.sp.distance_from(task.stack);
            let skip = if task.on_cpu || used >= size {
                0
            } else {
                used & !7
            };
            self.words(task.stack.offset(skip), size - skip, &context, false)?;
            if task.on_cpu {
                self.remember(task.stack, size);
            }
        }
        self.shadow_returns(task, &context)
    }

    fn shadow_returns(
        &mut self,
        task: &Task,
        context: &dyn Fn() -> Context,
    ) -> Result<(), TaskError> {
        let returns = self.walker.layout.returns;
        if let Some((member, longest)) = returns.graph {
            let stack = self.walker.pointer("task", task.address.0.offset(member))?;
            // Allocated in one piece and not longer than a page; what lies beyond it in a page
            // that is not mapped was never part of it.
            if stack.0 != 0 {
                let here = (0x1000 - (stack.0 & 0xfff)).min(longest);
                self.words(stack, here & !7, context, true)?;
                let beyond = longest - here;
                if beyond > 0 && self.walker.space.mapping(stack.offset(here)).is_ok() {
                    self.words(stack.offset(here), beyond & !7, context, true)?;
                }
            }
        }
        // A table for all tasks is looked at once.
        if let Some(probes) = returns.probes
            && let Place::Tasks { .. } = probes.place
        {
            let slide = self.walker.located.slide;
            for kept in probes.of_task(self.walker.space, slide, task.address.0)? {
                self.kept(&kept, context);
            }
        }
        Ok(())
    }

    fn kept(&mut self, kept: &Kept, context: &dyn Fn() -> Context) {
        let value = Gva(kept.address);
        if self.windows.contains(value) {
            self.hit(context, Found::ShadowReturn(kept.at), value);
        }
    }

    /// What return probes keep in one table for all tasks.
    fn probed(&mut self, tasks: &[Task]) -> Result<(), TaskError> {
        let Some(probes) = self.walker.layout.returns.probes else {
            return Ok(());
        };
        let slide = self.walker.located.slide;
        for kept in probes.of_table(self.walker.space, slide)? {
            let owner = tasks.iter().find(|task| kept.task == Some(task.address.0));
            let context = || match owner {
                Some(task) => Context::of(task),
                // One that has ended, and whose entry is still there.
                None => Context::Unknown,
            };
            self.kept(&kept, &context);
        }
        Ok(())
    }

    fn cpu_stacks(&mut self) -> Result<(), TaskError> {
        let located = self.walker.located;
        let layout = self.walker.layout;
        for cpu in located.per_cpu.cpus() {
            for stack in &layout.cpu_stacks {
                let Some(base) = located.per_cpu.address(stack.variable, cpu) else {
                    continue;
                };
                let context = || Context::Cpu {
                    cpu,
                    stack: stack.name,
                };
                self.words(base, stack.size & !7, &context, false)?;
                self.remember(base, stack.size);
            }
        }
        Ok(())
    }

    fn vcpu(&mut self, vcpu: &Vcpu) {
        let context = || Context::Vcpu { index: vcpu.index };
        if vcpu.activity == Activity::NotStarted {
            return;
        }
        if vcpu.nested {
            self.hit(context, Found::NestedGuest, Gva(0));
            return;
        }
        // User mode has no kernel frames: its registers are the user's own.
        if vcpu.cpl() == 3 {
            return;
        }
        for (name, value) in registers(&vcpu.registers) {
            if self.windows.contains(Gva(value)) {
                self.hit(context, Found::Register(name), Gva(value));
            }
        }
        // An empty stack has its pointer one word beyond.
        let sp = Gva(vcpu.registers.rsp);
        let known = [sp, Gva(sp.0.wrapping_sub(8))].into_iter().any(|at| {
            let page = self.walker.space.mapping(at).map(|found| found.gpa.0 >> 12);
            page.is_ok_and(|page| self.pages.contains(&page))
        });
        if !known && !self.on_user_stack(&vcpu.registers) {
            self.hit(context, Found::UnknownStack(sp), Gva(0));
        }
    }

    /// Whether a CPU in the kernel has just come from user mode, or is about to go there: in entry
    /// text, still or again with the user's stack pointer. Nothing of the kernel is on that stack.
    fn on_user_stack(&self, registers: &VcpuRegisters) -> bool {
        let slide = self.walker.located.slide;
        let entry = self.walker.layout.entry_text.as_ref();
        let in_entry = entry.is_some_and(|text| {
            (text.start.at(slide)..text.end.at(slide)).contains(&Gva(registers.rip))
        });
        in_entry && registers.rsp < LOWER_HALF
    }

    /// Looks at every word of a range.
    fn words(
        &mut self,
        start: Gva,
        len: u64,
        context: &dyn Fn() -> Context,
        shadow: bool,
    ) -> Result<(), TaskError> {
        let mut bytes = std::mem::take(&mut self.buffer);
        bytes.resize(usize::try_from(len).unwrap_or(0), 0);
        let read = self.walker.space.read(start, &mut bytes);
        read.map_err(|source| TaskError::Unreadable {
            what: "stacks",
            source,
        })?;
        for (index, word) in bytes.chunks_exact(8).enumerate() {
            let value = Gva(word.try_into().map_or(0, u64::from_le_bytes));
            if self.windows.contains(value) {
                let at = start.offset(index as u64 * 8);
                let found = if shadow {
                    Found::ShadowReturn(at)
                } else {
                    Found::Stack(at)
                };
                self.hit(context, found, value);
            }
        }
        self.buffer = bytes;
        Ok(())
    }

    /// Notes which physical pages a stack is in: the same stack is mapped at several addresses.
    fn remember(&mut self, start: Gva, len: u64) {
        let mut done = 0;
        while done < len {
            if let Ok(mapping) = self.walker.space.mapping(start.offset(done)) {
                self.pages.insert(mapping.gpa.0 >> 12);
            }
            done += 0x1000;
        }
    }
}

/// The registers that can hold an instruction address.
fn registers(registers: &VcpuRegisters) -> [(&'static str, u64); 17] {
    let r = registers;
    [
        ("rip", r.rip),
        ("rax", r.rax),
        ("rbx", r.rbx),
        ("rcx", r.rcx),
        ("rdx", r.rdx),
        ("rsi", r.rsi),
        ("rdi", r.rdi),
        ("rbp", r.rbp),
        ("rsp", r.rsp),
        ("r8", r.r8),
        ("r9", r.r9),
        ("r10", r.r10),
        ("r11", r.r11),
        ("r12", r.r12),
        ("r13", r.r13),
        ("r14", r.r14),
        ("r15", r.r15),
    ]
}
