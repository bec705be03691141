//! A guest with one CPU, one task and code of every kind.

use std::sync::Arc;

use super::super::layout::{
    BpfLayout, CpuLayout, GraphLayout, RegsLayout, SwitchedLayout, TrampolineLayout,
};
use super::super::names::Names;
use super::super::*;
use crate::Kernel;
use crate::guest::fake::FakeGuest;
use crate::guest::{Gpa, Gva, LinkAddr, Slide, StoppedGuest, Vcpu, VcpuRegisters};
use crate::space::{Located, PerCpu, PerCpuVariable};
use crate::symbols::{Layout, Module, OffsetForm};
use crate::synthetic::{ElfSection, Kallsyms, Orc, TEXT, TYPES, vmlinux_with};
use crate::tasks::{Place, ReturnProbes, Task, TaskAddr};
use crate::types::Field;

pub(super) const SLIDE: Slide = Slide(0x20_0000);
/// Link addresses of functions, by what their frames are.
pub(super) const SCHEDULE: LinkAddr = LinkAddr(TEXT.0 + 0x1000);
/// 0x20 bytes.
pub(super) const SLEEP: LinkAddr = LinkAddr(TEXT.0 + 0x2000);
/// All registers.
pub(super) const SYSCALL: LinkAddr = LinkAddr(TEXT.0 + 0x3000);
pub(super) const THREAD: LinkAddr = LinkAddr(TEXT.0 + 0x4000);
/// The word at the stack pointer leads to another stack.
pub(super) const SWITCHED_STACK: LinkAddr = LinkAddr(TEXT.0 + 0x5000);
pub(super) const UNKNOWN: LinkAddr = LinkAddr(TEXT.0 + 0x6000);
/// What an interrupt pushes.
pub(super) const INTERRUPT: LinkAddr = LinkAddr(TEXT.0 + 0x7000);
pub(super) const FTRACE: LinkAddr = LinkAddr(TEXT.0 + 0x8000);
pub(super) const HANDLER: LinkAddr = LinkAddr(TEXT.0 + 0xa000);
pub(super) const RETHOOK: LinkAddr = LinkAddr(TEXT.0 + 0xb000);
/// Where lists begin.
const LISTS: LinkAddr = LinkAddr(TEXT.0 + 0xd000);
pub(super) const TRAMPOLINES: LinkAddr = LISTS;
pub(super) const PROGRAMS: LinkAddr = LinkAddr(LISTS.0 + 0x10);

/// Room for a table of lists.
pub(super) const TABLE: LinkAddr = LinkAddr(LISTS.0 + 0x20);

pub(super) const STACK: Gva = Gva(0xffff_c900_0001_0000);
pub(super) const STACK_SIZE: u64 = 0x4000;
pub(super) const TOP: u64 = STACK.0 + STACK_SIZE;
pub(super) const TASK: Gva = Gva(0xffff_8880_0200_0000);
pub(super) const HEAP: Gva = Gva(0xffff_8880_0200_1000);
/// Per-CPU area of the only CPU.
const CPU: Gva = Gva(0xffff_8880_0100_0000);
pub(super) const CPU_STACKS: Gva = Gva(0xffff_fe00_0000_4000);
pub(super) const MODULE: Gva = Gva(0xffff_ffff_c000_0000);

pub(super) const REGS: u64 = 168;
pub(super) const ENTRY: u64 = 24;

pub(super) struct Guest {
    pub(super) fake: FakeGuest,
    pub(super) kernel: Arc<Kernel>,
    pub(super) layout: StackLayout,
    pub(super) located: Located,
    pub(super) task: Task,
    pub(super) modules: Vec<Module>,
    pub(super) ours: Vec<GeneratedCode>,
    /// Where the next word is pushed.
    sp: u64,
}

const fn field(offset: u64, size: u64) -> Field {
    Field {
        offset,
        size,
        bits: None,
        pointer: false,
    }
}

fn layout() -> StackLayout {
    let end = |start: LinkAddr| start..start.offset(0x1000);
    StackLayout {
        regs: RegsLayout {
            size: REGS,
            ip: 0x80,
            cs: 0x88,
            sp: 0x98,
            bp: 0x20,
            ax: 0x50,
            dx: 0x60,
            di: 0x70,
            r10: 0x38,
            r13: 0x10,
        },
        switched: SwitchedLayout {
            size: 56,
            bp: 0x28,
            address: 0x30,
        },
        fork: Some(THREAD),
        text: TEXT..TEXT.offset(0xc000),
        init_text: None,
        sched_text: Some(end(SCHEDULE)),
        graph: Some(GraphLayout {
            handler: HANDLER,
            stack: 0x10,
            current: field(0x18, 4),
            entry_size: ENTRY,
            address: 0,
            slot: 0x10,
            in_words: true,
        }),
        probes: Some(ReturnProbes {
            trampoline: RETHOOK,
            place: Place::Tasks { first: 0x20 },
            link: 8,
            address: 0x18,
            slot: 0x20,
        }),
        trampolines: Some(TrampolineLayout {
            first: TRAMPOLINES,
            end: None,
            next: 0,
            flags: field(8, 8),
            with_regs: 4,
            start: 0x10,
            size: 0x18,
            plain: FTRACE,
            regs: FTRACE.offset(0x1000),
        }),
        bpf: Some(BpfLayout {
            list: PROGRAMS,
            node: 0x10,
            start: 0,
            end: 8,
            name: field(0x20, 16),
            frame_pointer: Some((field(0x30, 4), field(0x34, 4))),
        }),
        cpu: CpuLayout {
            current: (PerCpuVariable::Absolute(0), 0),
            interrupt: (PerCpuVariable::Absolute(8), 0),
            interrupt_size: 0x1000,
            exceptions: PerCpuVariable::Absolute(16),
            areas: vec![
                (StackKind::Nmi, 0x2000, 0x1000),
                (StackKind::Entry, -0x1000, 0x1000),
            ],
        },
    }
}

/// A kernel whose unwind tables are of a format.
fn kernel(format: OrcFormat) -> Arc<Kernel> {
    let slots = TYPES.offset(0x20_0000);
    let mut orc = Orc::new(slots.0);
    orc.call_with_bp(SCHEDULE.0, 0x10, -0x10);
    orc.call(SLEEP.0, 0x20);
    orc.regs(SYSCALL.0, 0);
    orc.end(THREAD.0);
    orc.indirect(SWITCHED_STACK.0, 8);
    orc.undefined(UNKNOWN.0);
    orc.partial(INTERRUPT.0, 0);
    orc.call(FTRACE.0, 0x18);
    orc.call(FTRACE.0 + 0x1000, 0x30);
    orc.undefined(HANDLER.0);
    let (addresses, entries) = orc.write(format);
    let section = |name, address, bytes| ElfSection {
        name,
        address,
        bytes,
        executable: false,
    };
    let mut sections = vec![
        section(".orc_unwind_ip", slots, addresses),
        section(".orc_unwind", slots.offset(0x1000), entries),
    ];
    let hash = |text: &str| {
        let digits = |at| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
        (0..text.len()).step_by(2).map(digits).collect::<Vec<_>>()
    };
    match format {
        OrcFormat::Plain => {}
        OrcFormat::Signal => sections.push(section(
            ".orc_header",
            slots.offset(0x2000),
            hash("fe5d32bf581bd63b2ca9a5c65ba5a625eab3fe24"),
        )),
        OrcFormat::Renumbered => sections.push(section(
            ".orc_header",
            slots.offset(0x2000),
            hash("137c36ad7627c4dd55932176bb0ecdbd5041fc82"),
        )),
    }
    let symbols = Kallsyms::example(Layout::B, OffsetForm::Base, 700);
    let kernel = Kernel::open(vmlinux_with(&symbols, &sections)).unwrap();
    assert_eq!(kernel.orc().unwrap().format(), format);
    Arc::new(kernel)
}

impl Guest {
    pub(super) fn new() -> Self {
        Self::with_format(OrcFormat::Signal)
    }

    pub(super) fn with_format(format: OrcFormat) -> Self {
        let mut fake = FakeGuest::new(0x40_0000);
        fake.map(LISTS.at(SLIDE), 0x1000, 0);
        fake.map(STACK, STACK_SIZE, 0);
        fake.map(TASK, 0x1_0000, 0);
        fake.map(CPU, 0x2000, 0);
        fake.map(CPU_STACKS.displace(-0x1000), 0x4000, 0);
        fake.map(MODULE, 0x4000, 0);
        fake.put_u64(CPU, TASK.0);
        // The interrupt stack is the page behind the per-CPU area.
        fake.put_u64(CPU.offset(8), CPU.0 + 0x1ff8);
        fake.put_u64(CPU.offset(16), CPU_STACKS.0);
        fake.put_u64(PROGRAMS.at(SLIDE), PROGRAMS.at(SLIDE).0);
        let located = Located {
            slide: SLIDE,
            root: fake.root(),
            phys_base: Gpa(0),
            page_offset_base: None,
            per_cpu: PerCpu::single(0, CPU.0),
            bounds: crate::space::Bounds::USUAL,
        };
        Self {
            fake,
            kernel: kernel(format),
            layout: layout(),
            located,
            task: Task {
                address: TaskAddr(TASK),
                pid: 7,
                tgid: 7,
                comm: "test".into(),
                state: 1,
                exit_state: 0,
                flags: 0,
                on_cpu: false,
                on_rq: false,
                stack: STACK,
                sp: Gva(0),
            },
            modules: Vec::new(),
            ours: Vec::new(),
            sp: TOP,
        }
    }

    /// Top of the interrupt stack's usable part; the word there leads to the stack before.
    pub(super) const INTERRUPT_TOP: u64 = CPU.0 + 0x1ff8;

    pub(super) fn push(&mut self, word: u64) -> u64 {
        self.sp -= 8;
        self.fake.put_u64(Gva(self.sp), word);
        self.sp
    }

    /// Goes on pushing elsewhere.
    pub(super) fn go_to(&mut self, sp: u64) {
        self.sp = sp;
    }

    pub(super) fn sp(&self) -> u64 {
        self.sp
    }

    /// Leaves `bytes` free.
    pub(super) fn skip(&mut self, bytes: u64) {
        self.sp -= bytes;
    }

    /// All registers, as a system call or an exception saves them.
    pub(super) fn push_regs(&mut self, ip: u64, cs: u64, sp: u64, bp: u64) {
        self.skip(REGS);
        for (offset, value) in [(0x80, ip), (0x88, cs), (0x98, sp), (0x20, bp)] {
            self.fake.put_u64(Gva(self.sp + offset), value);
        }
    }

    /// What an interrupt pushes.
    pub(super) fn push_partial(&mut self, ip: u64, cs: u64, sp: u64) {
        for word in [0x18, sp, 0x246, cs, ip] {
            self.push(word);
        }
    }

    /// What a task is switched away with, having been called from `ip`.
    pub(super) fn switch_away(&mut self, ip: LinkAddr, bp: u64) {
        self.push(ip.at(SLIDE).0);
        self.push(bp);
        self.skip(40);
        self.task.sp = Gva(self.sp);
    }

    /// A user task asleep in a system call: returns the addresses that its trace has.
    pub(super) fn sleeping_user_task(&mut self) -> Vec<Gva> {
        self.push_regs(0x40_1000, 0x33, 0x7fff_0000, 0x1234);
        self.push(SYSCALL.offset(0x10).at(SLIDE).0);
        self.skip(0x18);
        self.push(SLEEP.offset(8).at(SLIDE).0);
        self.push(0xb0b0);
        self.switch_away(SCHEDULE.offset(0x20), 0);
        [SCHEDULE.offset(0x20), SLEEP.offset(8), SYSCALL.offset(0x10)]
            .map(|link| link.at(SLIDE))
            .into()
    }

    /// The task is on the vCPU, with these registers.
    pub(super) fn run_at(&mut self, ip: u64, adjust: impl FnOnce(&mut VcpuRegisters)) {
        self.task.on_cpu = true;
        let sp = self.sp;
        self.fake.add_vcpu(|vcpu| {
            vcpu.registers.rip = ip;
            vcpu.registers.rsp = sp;
            vcpu.registers.gs_base = CPU.0;
            adjust(&mut vcpu.registers);
        });
    }

    pub(super) fn vcpu(&mut self) -> &mut Vcpu {
        &mut self.fake.image.vcpus_mut()[0]
    }

    pub(super) fn look<R>(&self, look: impl FnOnce(&Unwinder<'_, '_>) -> R) -> R {
        let space = self.located.space(&self.fake.image);
        let unwinder = Unwinder::with_stacks_of(
            STACK_SIZE,
            &self.kernel,
            &self.layout,
            &space,
            &self.located,
            self.fake.image.vcpus(),
        )
        .with_modules(None, self.modules.clone())
        .with_generated(self.ours.clone());
        look(&unwinder)
    }

    pub(super) fn trace(&self) -> Trace {
        self.look(|unwinder| unwinder.task(&self.task))
    }

    pub(super) fn name(&self, frame: &Frame) -> String {
        let names = Names {
            kernel: &self.kernel,
            layout: &self.layout,
            slide: SLIDE,
        };
        let foreign = self.look(|unwinder| unwinder.foreign_name(frame));
        foreign.unwrap_or_else(|| names.name(frame))
    }

    /// Why the trace cannot be relied on.
    pub(super) fn why(&self) -> Why {
        self.trace().doubt().unwrap().why.clone()
    }
}

pub(super) fn addresses(trace: &Trace) -> Vec<Gva> {
    trace.frames.iter().map(|frame| frame.address).collect()
}
