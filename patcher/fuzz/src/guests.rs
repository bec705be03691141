//! The guest that targets change, with everything that is looked up once.

use std::cell::RefCell;
use std::sync::{Arc, OnceLock};

use patcher::Kernel;
use patcher::guest::{Gva, MemoryImage};
use patcher::space::{Landmarks, Located};
use patcher::stack::{OrcFormat, StackLayout};
use patcher::symbols::ModulesLayout;
use patcher::synthetic::{Btf, ElfSection, Guest, Orc, Plan, STACK_SIZE, TEXT, TYPES};
use patcher::tasks::{SurveyLayout, TaskLayout, tasks};

use crate::{Edits, Input};

/// RAM of the guest in bytes.
const RAM: usize = 0x8_0000;

/// A guest that is well.
pub(crate) struct Base {
    pub(crate) guest: Guest,
    pub(crate) located: Located,
    pub(crate) marks: Landmarks,
    pub(crate) tasks: TaskLayout,
    pub(crate) survey: SurveyLayout,
    pub(crate) stacks: StackLayout,
    pub(crate) modules: ModulesLayout,
    /// Where stacks are: of tasks, and of the first CPU.
    pub(crate) areas: Vec<Gva>,
}

impl Base {
    fn build() -> Option<Self> {
        let plan = Arc::new(Plan::new());
        let kernel = Kernel::open(plan.file(&orc_sections(&plan))).ok()?;
        let mut guest = Guest::with_kernel(plan, Arc::new(kernel), RAM);
        populate(&mut guest);
        let kernel = guest.kernel.clone();
        let marks = Landmarks::of(&kernel).ok()?;
        let located = Located::find(&guest.fake.image, &marks).ok()?;
        let layout = TaskLayout::of(&kernel).ok()?;
        let space = located.space(&guest.fake.image);
        let all = tasks(&space, &located, &layout).ok()?;
        let cpu = (1..4).map(|number| guest.area(0).offset(number * STACK_SIZE));
        Some(Self {
            areas: all.iter().map(|task| task.stack).chain(cpu).collect(),
            located,
            marks,
            tasks: layout,
            survey: SurveyLayout::of(&kernel).ok()?,
            stacks: StackLayout::of(&kernel).ok()?,
            modules: ModulesLayout::of(&kernel).ok()??,
            guest,
        })
    }

    /// The guest, made when it is first asked for.
    pub(crate) fn get() -> &'static Self {
        static BASE: OnceLock<Base> = OnceLock::new();
        BASE.get_or_init(|| match Self::build() {
            Some(base) => base,
            None => unreachable!("the synthetic guest is understood: its own tests say so"),
        })
    }

    /// Works with the guest as `input` changes it.
    pub(crate) fn edited<R>(
        &self,
        input: &mut Input<'_>,
        work: impl FnOnce(&mut Edits<'_>, &mut Input<'_>) -> R,
    ) -> R {
        thread_local! {
            static IMAGE: RefCell<Option<MemoryImage>> = const { RefCell::new(None) };
        }
        IMAGE.with_borrow_mut(|image| {
            let image = image.get_or_insert_with(|| self.guest.fake.image.clone());
            let mut edits = Edits::apply(image, &self.guest.fake.places, input);
            work(&mut edits, input)
        })
    }
}

/// Tasks of every kind, modules, a log.
fn populate(guest: &mut Guest) {
    let init = guest.process(1, "init");
    guest.process(2, "kthreadd");
    guest.thread(init, 70);
    let far = guest.process(5000, "far");
    guest.add_cpu();
    let late = guest.loose(9, "late");
    guest.exiting(late);
    guest.queue(far);
    let [schedule, wait, syscall] = ["schedule", "wait_for_something", "do_syscall_64"]
        .map(|name| guest.code(name).offset(0x10).0);
    let mut stack = vec![0; 5];
    // What switching away saves, the frames, and the registers of user mode.
    stack.extend([0, schedule, 0, wait, 0, 0, 0, syscall]);
    stack.extend([0; 17]);
    stack.extend([0x33, 0x246, 0x7fff_0000, 0x2b]);
    guest.stack(init, &stack);
    let module = guest.module("one", &Btf::example().write());
    guest.module_orc(module, |slots, text| {
        let mut orc = Orc::new(slots);
        orc.call(text, 8);
        orc.end(text + 0x80);
        orc.write(OrcFormat::Signal)
    });
    guest.module("two", &[]);
    guest.log("hello");
    guest.log("world");
}

/// What the frames of the synthetic kernel's functions are.
fn orc_sections(plan: &Plan) -> Vec<ElfSection> {
    const SLOTS: u64 = TYPES.0 + 0x20_0000;
    let mut orc = Orc::new(SLOTS);
    orc.undefined(TEXT.0);
    orc.call_with_bp(plan.symbol("schedule"), 0x10, -0x10);
    orc.call(plan.symbol("wait_for_something"), 0x20);
    orc.regs(plan.symbol("do_syscall_64"), 0);
    orc.end(plan.symbol("ret_from_fork_asm"));
    orc.indirect(plan.symbol("call_on_irqstack"), 8);
    orc.undefined(plan.symbol("has_no_frame"));
    orc.partial(plan.symbol("asm_common_interrupt"), 0);
    orc.call(plan.symbol("ftrace_caller"), 0x18);
    orc.call(plan.symbol("ftrace_regs_caller"), 0x30);
    orc.undefined(plan.symbol("return_to_handler"));
    let (addresses, entries) = orc.write(OrcFormat::Signal);
    crate::targets::orc_sections(OrcFormat::Signal, SLOTS, addresses, entries)
}
