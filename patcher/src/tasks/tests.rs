use super::layout::{CpuStack, Exiting, RunQueues, ShadowReturns, TaskFields};
use super::parts::Parts;
use super::probes::{Place, ReturnProbes};
use super::*;
use crate::guest::fake::FakeGuest;
use crate::guest::{Activity, Gpa, Gva, LinkAddr, Slide};
use crate::space::{PerCpu, PerCpuVariable};
use crate::types::Field;

const TASK_SIZE: u64 = 0x200;
const STACK: u64 = 0x4000;
const SLIDE: Slide = Slide(0x20_0000);
const INIT: LinkAddr = LinkAddr(0xffff_ffff_8100_0000);
const ENTRY_TEXT: LinkAddr = LinkAddr(0xffff_ffff_8180_0000);
const TABLE: LinkAddr = LinkAddr(0xffff_ffff_8100_0e00);
const NR_THREADS: LinkAddr = LinkAddr(0xffff_ffff_8100_0f00);
/// Per-CPU area of the only CPU, for variables at 0.
const AREA: Gva = Gva(0xffff_8880_0100_0000);
const RUNQUEUE: u64 = 0x100;
const EXITING: u64 = 0x400;
const IRQ_STACK: u64 = 0x1000;
const HEAP: Gva = Gva(0xffff_8880_0200_0000);

const W: Gva = Gva(0xffff_ffff_ff80_0000);

const fn field(offset: u64, size: u64) -> Field {
    Field {
        offset,
        size,
        bits: None,
        pointer: false,
    }
}

fn layout() -> TaskLayout {
    TaskLayout {
        init_task: INIT,
        nr_threads: Some(NR_THREADS),
        task: TaskFields {
            all: Parts::default(),
            few: Parts::default(),
            size: TASK_SIZE,
            tasks: 0x10,
            thread_node: 0x20,
            next_thread: 0x20,
            signal: 0x30,
            pid: field(0x38, 4),
            tgid: field(0x3c, 4),
            comm: field(0x40, 16),
            state: field(0x50, 4),
            exit_state: field(0xa8, 4),
            flags: field(0x54, 4),
            stack: 0x58,
            sp: 0x60,
            on_cpu: field(0x68, 1),
            on_rq: field(0x69, 1),
        }
        .complete(),
        list_next: 0,
        thread_head: 0x10,
        stack_size: STACK,
        runqueues: RunQueues {
            variable: PerCpuVariable::Absolute(RUNQUEUE),
            curr: 0,
            idle: 8,
            fair: 0x10,
            fair_node: 0x70,
        },
        exiting: Exiting::Listed {
            variable: PerCpuVariable::Absolute(EXITING),
            head: 0,
            node: 0x80,
        },
        cpu_stacks: vec![CpuStack {
            name: "interrupt stack",
            variable: PerCpuVariable::Absolute(IRQ_STACK),
            size: STACK,
        }],
        returns: ShadowReturns {
            graph: Some((0x90, 0x1000)),
            probes: Some(ReturnProbes {
                trampoline: LinkAddr(0),
                place: Place::Tasks { first: 0x98 },
                link: 0x10,
                address: 0x20,
                slot: 0x28,
            }),
        },
        entry_text: Some(ENTRY_TEXT..ENTRY_TEXT.offset(0x1000)),
    }
}

/// A guest with tasks on lists as the kernel has them.
struct Guest {
    fake: FakeGuest,
    located: Located,
    layout: TaskLayout,
    /// Tasks on the task list, the first task first.
    leaders: Vec<Gva>,
    next: u64,
    threads: u64,
}

impl Guest {
    fn new() -> Self {
        let mut fake = FakeGuest::new(0x200_0000);
        fake.map(INIT.at(SLIDE), 0x1000, 0);
        fake.map(AREA, 0x1000 + STACK, 0);
        fake.map(HEAP, 0x4_0000, 0);
        let located = Located {
            slide: SLIDE,
            root: fake.root(),
            phys_base: Gpa(0),
            page_offset_base: None,
            per_cpu: PerCpu::single(0, AREA.0),
            bounds: crate::space::Bounds::USUAL,
        };
        let mut guest = Self {
            fake,
            located,
            layout: layout(),
            leaders: Vec::new(),
            next: 0,
            threads: 0,
        };
        guest.empty_list(AREA.offset(RUNQUEUE + 0x10));
        guest.empty_list(AREA.offset(EXITING));
        let init = INIT.at(SLIDE);
        guest.fill(init, 0, "swapper/0");
        guest.lead(init);
        guest.fake.put_u64(AREA.offset(RUNQUEUE), init.0);
        guest.fake.put_u64(AREA.offset(RUNQUEUE + 8), init.0);
        guest
    }

    fn empty_list(&mut self, head: Gva) {
        self.fake.put_u64(head, head.0);
    }

    fn alloc(&mut self, len: u64) -> Gva {
        let at = HEAP.offset(self.next);
        self.next += len.next_multiple_of(0x100);
        assert!(self.next <= 0x4_0000);
        at
    }

    fn fill(&mut self, task: Gva, pid: u32, comm: &str) {
        self.fake.put(task.offset(0x38), &pid.to_le_bytes());
        self.fake.put(task.offset(0x40), comm.as_bytes());
        let stack = self.alloc(STACK);
        self.fake.put_u64(task.offset(0x58), stack.0);
        self.fake
            .put_u64(task.offset(0x60), stack.0 + STACK - 0x100);
    }

    /// Puts a task on the task list, as the only thread of its process.
    fn lead(&mut self, task: Gva) {
        let signal = self.alloc(0x40);
        self.fake.put_u64(task.offset(0x30), signal.0);
        self.fake.put_u64(signal.offset(0x10), task.offset(0x20).0);
        self.fake.put_u64(task.offset(0x20), signal.offset(0x10).0);
        let first = self.leaders.first().copied().unwrap_or(task);
        if let Some(last) = self.leaders.last() {
            self.fake.put_u64(last.offset(0x10), task.offset(0x10).0);
        }
        self.fake.put_u64(task.offset(0x10), first.offset(0x10).0);
        self.leaders.push(task);
    }

    fn count(&mut self, threads: u64) {
        self.threads = self.threads.wrapping_add(threads);
        let raw = self.threads.to_le_bytes();
        self.fake.put(NR_THREADS.at(SLIDE), &raw[..4]);
    }

    fn process(&mut self, pid: u32, comm: &str) -> Gva {
        let task = self.loose(pid, comm);
        self.lead(task);
        self.count(1);
        task
    }

    /// A task that is on no list.
    fn loose(&mut self, pid: u32, comm: &str) -> Gva {
        let task = self.alloc(TASK_SIZE);
        self.fill(task, pid, comm);
        task
    }

    fn thread(&mut self, leader: Gva, pid: u32) -> Gva {
        let task = self.loose(pid, "thread");
        let signal = self.read(leader.offset(0x30));
        self.fake.put_u64(task.offset(0x30), signal);
        self.fake.put_u64(task.offset(0x20), signal + 0x10);
        self.fake.put_u64(leader.offset(0x20), task.offset(0x20).0);
        self.count(1);
        task
    }

    /// Puts a node on an empty list.
    fn link(&mut self, head: Gva, node: Gva) {
        self.fake.put_u64(head, node.0);
        self.fake.put_u64(node, head.0);
    }

    fn read(&self, at: Gva) -> u64 {
        self.located.space(&self.fake.image).read_u64(at).unwrap()
    }

    fn stack(&self, task: Gva) -> Gva {
        Gva(self.read(task.offset(0x58)))
    }

    fn tasks(&self) -> Result<Vec<Task>, TaskError> {
        let space = self.located.space(&self.fake.image);
        tasks(&space, &self.located, &self.layout)
    }

    fn awake(&self) -> Result<Vec<Task>, TaskError> {
        let space = self.located.space(&self.fake.image);
        awake(&space, &self.located, &self.layout)
    }

    fn pids(&self) -> Vec<u32> {
        self.tasks().unwrap().iter().map(|task| task.pid).collect()
    }

    fn scan(&self) -> Result<Scanned, TaskError> {
        use crate::guest::StoppedGuest;
        let space = self.located.space(&self.fake.image);
        let windows = Windows::new([W..W.offset(0x100)]);
        let vcpus = self.fake.image.vcpus();
        scan(&space, &self.located, &self.layout, vcpus, &windows)
    }

    fn holdouts(&self) -> Vec<String> {
        let scanned = self.scan().unwrap();
        scanned.hits.iter().map(Hit::to_string).collect()
    }
}

#[test]
fn processes_threads_and_idle_tasks_are_found_once() {
    let mut guest = Guest::new();
    let one = guest.process(1, "init");
    guest.process(2, "kthreadd");
    guest.thread(one, 10);
    let idle = guest.loose(0, "swapper/1");
    guest.fake.put_u64(AREA.offset(RUNQUEUE + 8), idle.0);
    guest.fake.put_u64(AREA.offset(RUNQUEUE), one.0);
    assert_eq!(guest.pids(), [0, 1, 10, 2, 0]);
    assert_eq!(guest.tasks().unwrap()[1].comm, "init");
}

#[test]
fn tasks_that_left_the_list_are_found_on_queues_and_exit_lists() {
    let mut guest = Guest::new();
    let queued = guest.loose(7, "dying");
    guest.link(AREA.offset(RUNQUEUE + 0x10), queued.offset(0x70));
    let asleep = guest.loose(8, "late");
    guest.link(AREA.offset(EXITING), asleep.offset(0x80));
    assert_eq!(guest.pids(), [0, 7, 8]);
    // A CPU that has never come up has zeroes there.
    guest.fake.put_u64(AREA.offset(RUNQUEUE + 0x10), 0);
    guest.fake.put_u64(AREA.offset(EXITING), 0);
    assert_eq!(guest.pids(), [0]);
}

#[test]
fn who_is_awake_is_found_wherever_it_is() {
    let mut guest = Guest::new();
    let one = guest.process(1, "init");
    guest.process(2, "asleep");
    let thread = guest.thread(one, 10);
    let queued = guest.loose(7, "dying");
    guest.link(AREA.offset(RUNQUEUE + 0x10), queued.offset(0x70));
    let ending = guest.loose(8, "late");
    guest.link(AREA.offset(EXITING), ending.offset(0x80));
    assert_eq!(guest.awake().unwrap(), []);
    guest.fake.put(INIT.at(SLIDE).offset(0x68), &[1]);
    for task in [thread, queued, ending] {
        guest.fake.put(task.offset(0x69), &[1]);
    }
    let awake = |task: &Task| task.on_cpu || task.on_rq;
    let mut expected = guest.tasks().unwrap();
    expected.retain(awake);
    expected.sort_by_key(|task| task.address);
    assert_eq!(expected.len(), 4);
    assert_eq!(guest.awake().unwrap(), expected);
    // It is counted once and told once, wherever else it is.
    guest.link(AREA.offset(RUNQUEUE + 0x10), thread.offset(0x70));
    expected.retain(|task| task.address.0 != queued);
    assert_eq!(guest.awake().unwrap(), expected);
    guest.count(1);
    assert_eq!(guest.awake(), Err(guest.tasks().unwrap_err()));
}

#[test]
fn a_count_that_does_not_fit_is_an_error_that_passes() {
    let mut guest = Guest::new();
    guest.process(1, "init");
    guest.count(1);
    let error = guest.tasks().unwrap_err();
    assert_eq!(
        error,
        TaskError::Miscount {
            listed: 1,
            counted: 2
        }
    );
    assert!(error.passes());
}

#[test]
fn a_list_in_a_circle_is_an_error() {
    let mut guest = Guest::new();
    let one = guest.process(1, "init");
    let two = guest.process(2, "kthreadd");
    guest.fake.put_u64(two.offset(0x10), one.offset(0x10).0);
    assert!(matches!(guest.tasks(), Err(TaskError::Circle { .. })));

    let mut guest = Guest::new();
    let one = guest.process(1, "init");
    guest.fake.put_u64(one.offset(0x20), one.offset(0x20).0);
    assert!(matches!(guest.tasks(), Err(TaskError::Circle { .. })));
}

#[test]
fn an_endless_list_is_an_error() {
    let mut guest = Guest::new();
    guest.layout.task.size = 0x100_0000;
    for pid in 1..9 {
        guest.process(pid, "many");
    }
    assert!(matches!(guest.tasks(), Err(TaskError::Endless { .. })));
}

#[test]
fn wild_pointers_are_errors() {
    for offset in [0x10, 0x20, 0x30] {
        for wild in [0, 1, 0x4141_4141_4141_4141, u64::MAX] {
            let mut guest = Guest::new();
            let one = guest.process(1, "init");
            guest.fake.put_u64(one.offset(offset), wild);
            let error = guest.tasks().unwrap_err();
            assert!(!error.passes(), "{offset:#x} {wild:#x}: {error}");
        }
    }
}

#[test]
fn exits_that_are_only_counted_are_waited_for() {
    let mut guest = Guest::new();
    let domain = LinkAddr(INIT.0 + 0x800);
    let (locks, unlocks) = (field(0, 16), field(16, 16));
    guest.layout.exiting = Exiting::Counted {
        domain,
        data: 0,
        locks,
        unlocks,
    };
    guest.fake.put_u64(domain.at(SLIDE), 0x800);
    for (at, count) in [(0x800, 5), (0x808, 2), (0x810, 3), (0x818, 4)] {
        guest.fake.put_u64(AREA.offset(at), count);
    }
    assert!(guest.scan().unwrap().is_clear());
    guest.fake.put_u64(AREA.offset(0x800), 7);
    let error = guest.scan().unwrap_err();
    assert_eq!(error, TaskError::Ending { tasks: 2 });
    assert!(error.passes());
    guest.layout.exiting = Exiting::Unknown;
    assert_eq!(guest.scan(), Err(TaskError::EndingUnknown));
    // They can still be shown.
    assert_eq!(guest.pids(), [0]);
}

#[test]
fn a_return_address_on_a_stack_is_found_and_below_it_is_not() {
    let mut guest = Guest::new();
    let one = guest.process(1, "init");
    let stack = guest.stack(one);
    let sp = STACK - 0x100;
    guest.fake.put_u64(stack.offset(sp - 8), W.0);
    assert!(guest.holdouts().is_empty());
    guest.fake.put_u64(stack.offset(sp), W.0 + 0xff);
    guest.fake.put_u64(stack.offset(STACK - 8), W.0 + 0x100);
    let at = stack.offset(sp);
    assert_eq!(
        guest.holdouts(),
        [format!(
            "init (pid 1) has {} on its stack at {at}",
            W.offset(0xff)
        )]
    );
    // On a CPU its saved stack pointer says nothing.
    guest.fake.put(one.offset(0x68), &[1]);
    assert_eq!(guest.holdouts().len(), 2);
    // Neither does one that is not on its stack.
    guest.fake.put(one.offset(0x68), &[0]);
    guest.fake.put_u64(one.offset(0x60), 0x1234);
    assert_eq!(guest.holdouts().len(), 2);
    // It has given its stack back.
    guest.fake.put_u64(one.offset(0x58), 0);
    assert!(guest.scan().unwrap().is_clear());
}

#[test]
fn a_stack_that_is_not_mapped_is_an_error() {
    let mut guest = Guest::new();
    let one = guest.process(1, "init");
    guest.fake.put_u64(one.offset(0x58), 0xffff_c900_0000_0000);
    assert!(matches!(guest.scan(), Err(TaskError::Unreadable { .. })));
}

#[test]
fn cpu_stacks_and_registers_are_looked_at() {
    let mut guest = Guest::new();
    let sp = guest.stack(INIT.at(SLIDE)).0 + STACK - 8;
    guest.fake.put(INIT.at(SLIDE).offset(0x68), &[1]);
    guest.fake.put_u64(AREA.offset(IRQ_STACK + 0x10), W.0);
    guest.fake.add_vcpu(|vcpu| {
        vcpu.registers.rsp = sp;
        vcpu.registers.rip = W.0 + 4;
        vcpu.registers.r15 = W.0 + 5;
    });
    guest.fake.add_vcpu(|vcpu| {
        vcpu.registers.rip = W.0;
        vcpu.registers.cs = 0x33;
    });
    guest.fake.add_vcpu(|vcpu| {
        vcpu.registers.rip = W.0;
        vcpu.activity = Activity::NotStarted;
    });
    assert_eq!(
        guest.holdouts(),
        [
            format!(
                "interrupt stack of CPU 0 has {W} on its stack at {}",
                AREA.offset(IRQ_STACK + 0x10)
            ),
            format!("vCPU 0 has {} in rip", W.offset(4)),
            format!("vCPU 0 has {} in r15", W.offset(5)),
        ]
    );
}

#[test]
fn a_vcpu_that_is_not_understood_holds_everything_up() {
    let mut guest = Guest::new();
    guest.fake.add_vcpu(|vcpu| vcpu.nested = true);
    guest
        .fake
        .add_vcpu(|vcpu| vcpu.registers.rsp = 0x7fff_1234_5678);
    // In the first instructions of a system call that is just the user's stack.
    guest.fake.add_vcpu(|vcpu| {
        vcpu.registers.rsp = 0x7fff_1234_5678;
        vcpu.registers.rip = ENTRY_TEXT.at(SLIDE).0 + 3;
    });
    let scanned = guest.scan().unwrap();
    assert!(!scanned.is_clear());
    // Whatever range is asked about.
    assert_eq!(scanned.about(&(Gva(1)..Gva(2))).count(), 2);
}

#[test]
fn the_top_of_an_empty_stack_is_still_that_stack() {
    let mut guest = Guest::new();
    guest.fake.put(INIT.at(SLIDE).offset(0x68), &[1]);
    let top = guest.stack(INIT.at(SLIDE)).0 + STACK;
    guest.fake.add_vcpu(|vcpu| vcpu.registers.rsp = top);
    assert!(guest.scan().unwrap().is_clear());
}

#[test]
fn return_addresses_that_tracers_took_are_found() {
    let mut guest = Guest::new();
    let one = guest.process(1, "init");
    let graph = guest.alloc(0x1000);
    guest.fake.put_u64(one.offset(0x90), graph.0);
    guest.fake.put_u64(graph.offset(0x20), W.0);
    let node = guest.alloc(0x40);
    guest.fake.put_u64(one.offset(0x98), node.0 + 0x10);
    guest.fake.put_u64(node.offset(0x20), W.0 + 8);
    assert_eq!(
        guest.holdouts(),
        [
            format!(
                "init (pid 1) returns to {W} by a tracer at {}",
                graph.offset(0x20)
            ),
            format!(
                "init (pid 1) returns to {} by a tracer at {}",
                W.offset(8),
                node.offset(0x20)
            ),
        ]
    );
    guest.fake.put_u64(node.offset(0x10), node.0 + 0x10);
    assert!(matches!(guest.scan(), Err(TaskError::Circle { .. })));
}

#[test]
fn one_table_of_return_probes_for_all_tasks_counts() {
    let mut guest = Guest::new();
    let one = guest.process(1, "init");
    let probes = guest.layout.returns.probes.as_mut().unwrap();
    probes.place = Place::Table {
        start: TABLE,
        buckets: 4,
        task: 0x30,
    };
    guest.fake.put_u64(TABLE.offset(0x18).at(SLIDE), 0);
    assert!(guest.holdouts().is_empty());
    let nodes = [guest.alloc(0x40), guest.alloc(0x40)];
    for (node, (task, next)) in nodes.iter().zip([(one, nodes[1].0 + 0x10), (HEAP, 0)]) {
        guest.fake.put_u64(node.offset(0x10), next);
        guest.fake.put_u64(node.offset(0x20), W.0);
        guest.fake.put_u64(node.offset(0x30), task.0);
    }
    let bucket = TABLE.offset(0x18).at(SLIDE);
    guest.fake.put_u64(bucket, nodes[0].0 + 0x10);
    let told = |who: &str, node: Gva| {
        let at = node.offset(0x20);
        format!("{who} returns to {W} by a tracer at {at}")
    };
    let expected = [told("init (pid 1)", nodes[0]), told("others", nodes[1])];
    assert_eq!(guest.holdouts(), expected);
    guest.fake.put_u64(nodes[1].offset(0x10), nodes[0].0 + 0x10);
    assert!(matches!(guest.scan(), Err(TaskError::Circle { .. })));
}

#[test]
fn hits_beyond_what_is_told_still_count() {
    let mut guest = Guest::new();
    let one = guest.process(1, "init");
    let stack = guest.stack(one);
    guest.fake.put_u64(one.offset(0x60), stack.0);
    for word in 0..STACK / 8 {
        guest.fake.put_u64(stack.offset(word * 8), W.0);
    }
    let scanned = guest.scan().unwrap();
    assert!(scanned.more);
    assert!(!scanned.is_clear());
}

#[test]
fn windows_are_merged_and_exact() {
    let at = |n: u64| Gva(n);
    let windows = Windows::new([
        at(10)..at(20),
        at(15)..at(30),
        at(40)..at(41),
        at(50)..at(50),
    ]);
    for (address, inside) in [
        (9, false),
        (10, true),
        (29, true),
        (30, false),
        (40, true),
        (41, false),
        (50, false),
    ] {
        assert_eq!(windows.contains(at(address)), inside, "{address}");
    }
    assert!(Windows::new([at(7)..at(7)]).is_empty());
    assert!(Windows::new([at(u64::MAX - 1)..at(u64::MAX)]).contains(at(u64::MAX - 1)));
}

mod surveys {
    use super::*;
    use crate::tasks::pids::PidTable;

    const NAMESPACE: LinkAddr = LinkAddr(INIT.0 + 0xe00);

    fn more() -> SurveyLayout {
        SurveyLayout {
            parent: 0xb0,
            thread_pid: 0xb8,
            tgid: field(0x3c, 4),
            cpu: field(0xc0, 4),
            mm: 0xc8,
            voluntary: field(0xd0, 8),
            involuntary: field(0xd8, 8),
            started: field(0xe0, 8),
            delayed: Some(field(0x6a, 1)),
            current: (PerCpuVariable::Absolute(RUNQUEUE), 0),
            pids: Some(PidTable {
                namespace: NAMESPACE,
                head: 8,
                shift: field(0, 1),
                slots: field(8, 16 * 8),
                first: 0x10,
                link: 0xf0,
            }),
            all: Parts::default(),
        }
        .complete()
    }

    impl Guest {
        fn survey(&self) -> Result<Survey, TaskError> {
            use crate::guest::StoppedGuest;
            let space = self.located.space(&self.fake.image);
            let vcpus = self.fake.image.vcpus();
            survey(&space, &self.located, &self.layout, &more(), vcpus)
        }

        /// A node of the table of process ids.
        fn node(&mut self, shift: u8, slots: &[u64]) -> u64 {
            let node = self.alloc(0x100);
            self.fake.put(node, &[shift]);
            for (index, slot) in slots.iter().enumerate() {
                self.fake.put_u64(node.offset(8 + 8 * index as u64), *slot);
            }
            node.0 + 2
        }

        fn root(&mut self, entry: u64) {
            self.fake.put_u64(NAMESPACE.at(SLIDE).offset(8), entry);
        }

        fn pid_of(&mut self, task: Gva) -> u64 {
            let pid = self.alloc(0x40);
            self.fake.put_u64(pid.offset(0x10), task.0 + 0xf0);
            pid.0
        }
    }

    fn two_tasks() -> (Guest, Gva, Gva) {
        let mut guest = Guest::new();
        let one = guest.process(1, "init");
        let two = guest.process(2, "worker");
        (guest, one, two)
    }

    #[test]
    fn tasks_are_described() {
        let (mut guest, one, two) = two_tasks();
        let pids = [0, guest.pid_of(one), guest.pid_of(two), 0x406];
        let leaf = guest.node(0, &pids);
        let root = guest.node(6, &[leaf, 0]);
        guest.root(root);
        guest.fake.put(one.offset(0x3c), &[1]);
        guest.fake.put_u64(two.offset(0xb0), one.0);
        guest.fake.put_u64(two.offset(0xb8), 0x1234);
        // Queued although it sleeps: its dequeue is delayed.
        guest.fake.put(two.offset(0x50), &[1]);
        guest.fake.put(two.offset(0x69), &[1, 1]);
        guest.fake.put_u64(two.offset(0xd0), 77);
        guest.fake.put(two.offset(0x54), &[0, 0, 0x20, 0]);
        guest.fake.put_u64(AREA.offset(RUNQUEUE), one.0);
        guest.fake.put(one.offset(0x68), &[1]);
        guest.fake.add_vcpu(|vcpu| vcpu.registers.gs_base = AREA.0);
        let survey = guest.survey().unwrap();
        assert_eq!(survey.disagreements, [""; 0]);
        assert_eq!(
            survey.counts,
            Counts {
                listed: 2,
                counted: Some(2),
                by_pid: Some(2)
            }
        );
        let [idle, one, two] = &survey.tasks[..] else {
            panic!("{:?}", survey.tasks);
        };
        assert_eq!((idle.kind, idle.pid, idle.vcpu), (TaskKind::Idle, 0, None));
        assert_eq!((one.kind, one.vcpu), (TaskKind::User, Some(0)));
        assert_eq!(one.scheduling, Scheduling::OnCpu);
        assert_eq!((two.kind, two.ppid), (TaskKind::Kernel, 1));
        assert_eq!(two.state, TaskState::Sleeping);
        assert_eq!((two.scheduling, two.nvcsw), (Scheduling::Delayed, 77));
    }

    #[test]
    fn a_disagreement_is_told() {
        let (mut guest, one, _) = two_tasks();
        let stray = guest.loose(9, "stray");
        let pids = [guest.pid_of(one), guest.pid_of(stray)];
        let leaf = guest.node(0, &pids);
        guest.root(leaf);
        guest.count(1);
        let survey = guest.survey().unwrap();
        assert_eq!(
            survey.disagreements,
            [
                "the kernel counts 3 threads, and 2 are on its lists".to_owned(),
                "worker (pid 2) is on the task list and has no process id".to_owned(),
                format!("the task at {stray} has a process id and is on no list"),
            ]
        );
        assert_eq!(survey.tasks.len(), 3);
        // What decides about freeing memory does not work with such a list.
        assert!(guest.tasks().is_err());
    }

    #[test]
    fn tables_that_cannot_be_are_errors() {
        let (mut guest, _, _) = two_tasks();
        // A node below itself.
        let node = guest.node(6, &[0]);
        guest.fake.put_u64(Gva(node - 2).offset(8), node);
        guest.root(node);
        assert!(matches!(guest.survey(), Err(TaskError::Circle { .. })));
        // One that grows downwards.
        let inner = guest.node(12, &[0]);
        let outer = guest.node(6, &[inner]);
        guest.root(outer);
        assert!(matches!(guest.survey(), Err(TaskError::Circle { .. })));
        for wild in [0x4141_4141_4141_4142, u64::MAX - 1] {
            guest.root(wild);
            assert!(matches!(guest.survey(), Err(TaskError::Unreadable { .. })));
        }
        let leaf = guest.node(0, &[0x4141_4141_4141_4140]);
        guest.root(leaf);
        assert!(matches!(guest.survey(), Err(TaskError::Unreadable { .. })));
    }
}
