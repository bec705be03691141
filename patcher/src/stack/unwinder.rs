//! Where to begin: tasks that sleep, and vCPUs that run.

use super::areas::{Area, Areas};
use super::code::{Code, GeneratedCode};
use super::layout::StackLayout;
use super::repair::Repairs;
use super::walk::{Position, Saved, Walk};
use super::{End, Frame, FrameKind, StackKind, Trace, Why};
use crate::Kernel;
use crate::guest::{Activity, Gva, Vcpu};
use crate::space::{Located, Space};
use crate::symbols::{Module, ModulesLayout};
use crate::tasks::{Task, TaskAddr, TaskLayout};

const PAGE: u64 = 0x1000;

/// Unwinds the stacks of one stopped guest.
pub struct Unwinder<'a, 'm> {
    kernel: &'a Kernel,
    space: &'a Space<'m>,
    located: &'a Located,
    layout: &'a StackLayout,
    stack_size: u64,
    code: Code<'a, 'm>,
    vcpus: Vec<OnVcpu>,
}

/// A vCPU, and what the kernel calls it and runs on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OnVcpu {
    /// The vCPU.
    pub vcpu: Vcpu,
    /// Which CPU it is to the kernel, where that can be told.
    pub cpu: Option<u32>,
    /// Its current task, where that can be told.
    pub current: Option<TaskAddr>,
}

impl OnVcpu {
    /// It is in this kernel: not waiting to be started, not in a nested guest, not in user mode.
    fn in_kernel(&self) -> bool {
        self.vcpu.activity != Activity::NotStarted && !self.vcpu.nested && self.vcpu.cpl() == 0
    }
}

impl<'a, 'm> Unwinder<'a, 'm> {
    /// An unwinder for a guest that is stopped with these vCPUs. Without [`Unwinder::with_modules`]
    /// the code of modules is unknown.
    #[must_use]
    pub fn new(
        kernel: &'a Kernel,
        layout: &'a StackLayout,
        tasks: &TaskLayout,
        space: &'a Space<'m>,
        located: &'a Located,
        vcpus: &[Vcpu],
    ) -> Self {
        Self::with_stacks_of(tasks.stack_size, kernel, layout, space, located, vcpus)
    }

    pub(super) fn with_stacks_of(
        stack_size: u64,
        kernel: &'a Kernel,
        layout: &'a StackLayout,
        space: &'a Space<'m>,
        located: &'a Located,
        vcpus: &[Vcpu],
    ) -> Self {
        let on = |vcpu: &Vcpu| {
            let cpu = match vcpu.activity {
                Activity::NotStarted => None,
                _ if vcpu.nested => None,
                _ => located.per_cpu.cpu_of(&vcpu.registers),
            };
            let (variable, member) = layout.cpu.current;
            let current = cpu
                .and_then(|cpu| located.per_cpu.address(variable, cpu))
                .and_then(|at| space.read_pointer(at.offset(member)).ok())
                .filter(|task| task.0 != 0)
                .map(TaskAddr);
            OnVcpu {
                vcpu: *vcpu,
                cpu,
                current,
            }
        };
        Self {
            kernel,
            space,
            located,
            layout,
            stack_size,
            code: Code::new(space, located, layout, kernel.orc().ok()),
            vcpus: vcpus.iter().map(on).collect(),
        }
    }

    /// Knows the code of these modules as well; with their layout, also the names of functions.
    #[must_use]
    pub fn with_modules(
        mut self,
        layout: Option<&'a ModulesLayout>,
        modules: impl IntoIterator<Item = Module>,
    ) -> Self {
        self.code.add_modules(layout, modules);
        self
    }

    /// Knows code as well that the guest's kernel does not know of.
    #[must_use]
    pub fn with_generated(mut self, code: impl IntoIterator<Item = GeneratedCode>) -> Self {
        self.code.add_ours(code);
        self
    }

    /// The vCPUs, in the order in which they were given.
    #[must_use]
    pub fn vcpus(&self) -> &[OnVcpu] {
        &self.vcpus
    }

    /// The vCPU that a task is on.
    #[must_use]
    pub fn vcpu_of(&self, task: &Task) -> Option<&OnVcpu> {
        if !task.on_cpu {
            return None;
        }
        let stack = task.stack.0..=task.stack.0.saturating_add(self.stack_size);
        // In the middle of a switch the current task is still, or already, the other one: whose
        // stack it is counts.
        let on_stack = |on: &&OnVcpu| on.in_kernel() && stack.contains(&on.vcpu.registers.rsp);
        let current = |on: &&OnVcpu| on.current == Some(task.address);
        let mut all = self.vcpus.iter();
        all.clone().find(on_stack).or_else(|| all.find(current))
    }

    /// The stack of a task: of one that is on a vCPU by its registers, of any other by what was
    /// saved when it was switched away from.
    #[must_use]
    pub fn task(&self, task: &Task) -> Trace {
        if let Some(on) = self.vcpu_of(task) {
            return self.running(on, task);
        }
        if task.stack.0 == 0 {
            return Trace::empty(End::NoStack);
        }
        if task.on_cpu {
            return Trace::unknown(Why::Switching);
        }
        self.switched(task)
    }

    fn switched(&self, task: &Task) -> Trace {
        if self.kernel.orc().is_err() {
            return Trace::unknown(Why::NoTables);
        }
        let wild = || Trace::unknown(Why::WildStackPointer { sp: task.sp });
        let layout = &self.layout.switched;
        let Some(area) = Area::whole(StackKind::Task, task.stack, self.stack_size) else {
            return wild();
        };
        let sp = task.sp.0;
        let above = sp.checked_add(layout.size);
        let fits = sp >= area.start && above.is_some_and(|above| above <= area.end);
        if !fits || sp % 8 != 0 {
            return wild();
        }
        let area = Area {
            used_from: sp,
            ..area
        };
        let mut areas = Areas::new(self.space, [area]);
        let mut word = |offset: u64| areas.word(sp.wrapping_add(offset));
        let (bp, ip) = match (word(layout.bp), word(layout.address)) {
            (Ok(bp), Ok(ip)) => (bp, ip),
            (Err(why), _) | (_, Err(why)) => return Trace::unknown(why),
        };
        let fork = self.layout.fork.map(|fork| fork.at(self.located.slide));
        let position = Position {
            ip,
            sp: sp.wrapping_add(layout.size),
            bp,
            // A new task has not been anywhere yet: it begins there.
            interrupted: fork == Some(Gva(ip)),
            saved: None,
        };
        self.walk(task.address.0, areas).run(
            position,
            Frame {
                address: Gva(ip),
                kind: FrameKind::Switched,
                stack: StackKind::Task,
                repaired_from: None,
            },
        )
    }

    fn running(&self, on: &OnVcpu, task: &Task) -> Trace {
        if on.vcpu.nested {
            return Trace::unknown(Why::Nested);
        }
        if !on.in_kernel() {
            return Trace::empty(End::UserMode);
        }
        if self.kernel.orc().is_err() {
            return Trace::unknown(Why::NoTables);
        }
        let registers = &on.vcpu.registers;
        let stack = Area::whole(StackKind::Task, task.stack, self.stack_size);
        let stacks = stack.filter(|area| area.start != 0).into_iter();
        let areas = Areas::new(self.space, stacks.chain(self.cpu_areas(on)));
        let walk = self.walk(task.address.0, areas);
        // Just behind a return into a tracer's code.
        let slot = registers.rsp.wrapping_sub(8);
        let ip = walk
            .repairs
            .real(registers.rip, slot)
            .unwrap_or(registers.rip);
        let position = Position {
            ip,
            sp: registers.rsp,
            bp: registers.rbp,
            interrupted: true,
            saved: Some(Saved::of(registers)),
        };
        walk.run(
            position,
            Frame {
                address: Gva(ip),
                kind: FrameKind::Running,
                stack: StackKind::Register,
                repaired_from: (ip != registers.rip).then_some(Gva(registers.rip)),
            },
        )
    }

    fn walk(&self, task: Gva, areas: Areas<'a, 'm>) -> Walk<'_, 'a, 'm> {
        Walk {
            code: &self.code,
            regs: &self.layout.regs,
            areas,
            repairs: Repairs::new(self.space, self.layout, self.located.slide, task),
        }
    }

    /// The stacks of a vCPU's own. One that cannot be found is not known to be a stack.
    fn cpu_areas(&self, on: &OnVcpu) -> Vec<Area> {
        let per_cpu = &self.located.per_cpu;
        let layout = &self.layout.cpu;
        let pointer = |variable, member| {
            let at = per_cpu.address(variable, on.cpu?)?;
            let value = self.space.read_pointer(at.offset(member)).ok()?;
            (value.0 != 0).then_some(value)
        };
        let mut areas = Vec::new();
        let (variable, member) = layout.interrupt;
        if let Some(top) = pointer(variable, member) {
            // It points to the last word, or (before 5.12) behind it; the stack ends with a page.
            let end = top.0.checked_next_multiple_of(PAGE);
            let start = end.and_then(|end| end.checked_sub(layout.interrupt_size));
            areas.extend(start.and_then(|start| {
                Area::whole(StackKind::Interrupt, Gva(start), layout.interrupt_size)
            }));
        }
        if let Some(base) = pointer(layout.exceptions, 0) {
            areas.extend(layout.areas.iter().filter_map(|&(kind, offset, size)| {
                Area::whole(kind, base.displace(offset), size)
            }));
        }
        areas
    }

    /// What a frame is in that is not in the kernel's own text, where that is known.
    #[must_use]
    pub fn foreign_name(&self, frame: &Frame) -> Option<String> {
        let (at, back) = frame.instruction();
        let link = at.linked(self.located.slide);
        if self.layout.text.contains(&link) {
            return None;
        }
        self.code.name(at, back)
    }
}
