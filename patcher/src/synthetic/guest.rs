//! A guest that has booted a synthetic kernel: tasks, modules and a log in a few pages of RAM.

use std::sync::Arc;

use super::plan::{MAX_CPUS, PER_CPU_SIZE, Plan, STACK_SIZE, VARIABLES};
use super::{BANNER, FakeGuest, RODATA};
use crate::Kernel;
use crate::guest::{GuestMemory, Gva, LinkAddr, Slide, StoppedGuest, Vcpu};

/// Where KASLR moved the kernel.
pub const SLIDE: Slide = Slide(0x20_0000);
/// The direct map, of which only what is used is mapped.
const DIRECT_MAP: Gva = Gva(0xffff_8880_0000_0000);
const HEAP: Gva = Gva(0xffff_8880_0100_0000);
/// Areas of the CPUs, one behind the other.
const AREAS: Gva = Gva(0xffff_8880_4000_0000);
const ENTRY_AREAS: Gva = Gva(0xffff_fe00_0000_1000);
const MODULES: Gva = Gva(0xffff_ffff_c000_0000);
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// `xa_node.shift` counts in this many bits.
const NODE_BITS: u64 = 6;
/// Descriptors and bytes of the log, as powers of two.
const LOG_BITS: (u32, u32) = (3, 9);

/// A running guest to order.
#[derive(Clone)]
pub struct Guest {
    /// Its memory and vCPUs.
    pub fake: FakeGuest,
    /// Its kernel.
    pub kernel: Arc<Kernel>,
    /// How its kernel was made.
    pub plan: Arc<Plan>,
    heap: u64,
    /// Heap that is mapped.
    mapped: u64,
    modules: u64,
    /// The last task and the last module on their lists.
    last_task: Gva,
    last_module: Gva,
    threads: u32,
    records: u64,
}

impl Guest {
    /// A guest of the kernel that `plan` makes, with `ram` bytes and one CPU, which is idle.
    #[must_use]
    pub fn new(plan: Plan, ram: usize) -> Self {
        let kernel = Kernel::open(plan.file(&[])).unwrap();
        Self::with_kernel(Arc::new(plan), Arc::new(kernel), ram)
    }

    /// As [`Guest::new`], with `kernel` opened from a file of `plan`.
    #[must_use]
    pub fn with_kernel(plan: Arc<Plan>, kernel: Arc<Kernel>, ram: usize) -> Self {
        let mut guest = Self {
            fake: FakeGuest::new(ram),
            kernel,
            plan,
            heap: HEAP.0,
            mapped: HEAP.0,
            modules: MODULES.0,
            last_task: Gva(0),
            last_module: Gva(0),
            threads: 0,
            records: 0,
        };
        guest.boot();
        guest.add_cpu();
        guest
    }

    fn boot(&mut self) {
        self.fake.map(RODATA.at(SLIDE), 0x100, 0);
        self.fake.map(VARIABLES.at(SLIDE), 0x1000, 0);
        self.fake.put(RODATA.at(SLIDE), BANNER.as_bytes());
        let top = self.fake.entry(self.variable("init_top_pgt"), 1);
        self.fake.set(top, self.fake.root.0 | super::ram::PRESENT);
        let banner = RODATA.at(SLIDE);
        let physical = self.fake.gpa(banner).0;
        let base = physical.wrapping_sub(banner.0 - KERNEL_MAP);
        self.number("phys_base", base);
        self.number("page_offset_base", DIRECT_MAP.0);
        self.number("system_state", 3);
        for list in ["modules", "btf_modules", "bpf_kallsyms"] {
            self.empty_list(self.variable(list));
        }
        self.last_module = self.variable("modules");
        let init = self.variable("init_task");
        self.fill(init, 0, "swapper/0");
        self.last_task = init;
        self.empty_list(self.field(init, "task_struct.tasks"));
        self.lead(init);
        self.log_ring();
    }

    /// One more CPU, with a vCPU that is idle in the kernel. The first runs the first task.
    pub fn add_cpu(&mut self) -> Gva {
        let cpu = self.fake.image.vcpus().len() as u64;
        assert!(cpu < u64::from(MAX_CPUS));
        let area = AREAS.offset(cpu * PER_CPU_SIZE);
        self.fake.map(area, PER_CPU_SIZE, 0);
        let entry = self.plan.shape.size("cpu_entry_area");
        let entry_area = ENTRY_AREAS.offset(cpu * entry.next_multiple_of(0x1000));
        let stacks = self.field(entry_area, "cpu_entry_area.entry_stack_page");
        self.fake.map(stacks, entry - 0x1000, 0);
        let offsets = self.variable("__per_cpu_offset");
        self.fake.put_u64(offsets.offset(cpu * 8), area.0);
        self.number("__cpu_possible_mask", (2 << cpu) - 1);
        let idle = match cpu {
            0 => self.variable("init_task"),
            _ => self.loose(0, &format!("swapper/{cpu}")),
        };
        let on = |guest: &Self, name: &str| area.offset(guest.plan.symbol(name));
        let rq = on(self, "runqueues");
        self.set(rq, "rq.curr", idle.0);
        self.set(rq, "rq.idle", idle.0);
        self.empty_list(self.field(rq, "rq.cfs_tasks"));
        let exiting = on(self, "rcu_tasks__percpu");
        self.empty_list(self.field(exiting, "rcu_tasks_percpu.rtp_exit_list"));
        self.fake.put_u64(on(self, "current_task"), idle.0);
        let interrupts = on(self, "irq_stack_backing_store").offset(STACK_SIZE - 8);
        self.fake
            .put_u64(on(self, "hardirq_stack_ptr"), interrupts.0);
        let exceptions = self.field(entry_area, "cpu_entry_area.estacks");
        self.fake
            .put_u64(on(self, "cea_exception_stacks"), exceptions.0);
        self.set(idle, "task_struct.on_cpu", 1);
        let entry = LinkAddr(self.plan.symbol("entry_SYSCALL_64")).at(SLIDE);
        let rip = LinkAddr(self.plan.symbol("ret_from_fork_asm")).at(SLIDE);
        let stack = self.get(self.field(idle, "task_struct.stack"));
        self.fake.add_vcpu(|vcpu| {
            vcpu.registers.lstar = entry.0;
            vcpu.registers.gs_base = area.0;
            vcpu.registers.rip = rip.0;
            vcpu.registers.rsp = stack + STACK_SIZE - 0x20;
        });
        area
    }

    /// The run-time address of a variable of the kernel's.
    #[must_use]
    pub fn variable(&self, name: &str) -> Gva {
        LinkAddr(self.plan.symbol(name)).at(SLIDE)
    }

    /// The run-time address of a function.
    #[must_use]
    pub fn code(&self, name: &str) -> Gva {
        self.variable(name)
    }

    /// Writes a variable.
    pub fn number(&mut self, name: &str, value: u64) {
        let at = self.variable(name);
        let small = ["system_state", "nr_threads", "panic_cpu"].contains(&name);
        let size = if small { 4 } else { 8 };
        self.fake.put(at, &value.to_le_bytes()[..size]);
    }

    /// Where a member of a structure is: `task_struct.thread.sp`.
    #[must_use]
    pub fn field(&self, base: Gva, path: &str) -> Gva {
        base.offset(self.plan.shape.span(path).offset)
    }

    /// Writes a member.
    pub fn set(&mut self, base: Gva, path: &str, value: u64) {
        let span = self.plan.shape.span(path);
        let bytes = &value.to_le_bytes()[..span.size as usize];
        self.fake.put(base.offset(span.offset), bytes);
    }

    /// Reads a word.
    #[must_use]
    pub fn get(&self, at: Gva) -> u64 {
        self.fake.image.read_u64(self.fake.gpa(at)).unwrap()
    }

    /// Memory of the kernel's heap, all zero.
    pub fn alloc(&mut self, len: u64) -> Gva {
        let at = Gva(self.heap);
        self.heap += len.next_multiple_of(0x10);
        let end = self.heap.next_multiple_of(0x1000);
        if end > self.mapped {
            self.fake.map(Gva(self.mapped), end - self.mapped, 0);
            self.mapped = end;
        }
        at
    }

    /// An empty list.
    pub fn empty_list(&mut self, head: Gva) {
        self.fake.put_u64(head, head.0);
        self.fake.put_u64(head.offset(8), head.0);
    }

    /// Puts `node` behind `last`, at the end of the list that begins at `head`.
    pub fn link(&mut self, head: Gva, last: Gva, node: Gva) {
        self.fake.put_u64(last, node.0);
        self.fake.put_u64(node, head.0);
        self.fake.put_u64(node.offset(8), last.0);
        self.fake.put_u64(head.offset(8), node.0);
    }

    fn fill(&mut self, task: Gva, pid: u32, comm: &str) {
        self.set(task, "task_struct.pid", pid.into());
        self.set(task, "task_struct.tgid", pid.into());
        self.fake
            .put(self.field(task, "task_struct.comm"), comm.as_bytes());
        // As the kernel has them, on a boundary of their own size.
        self.heap = self.heap.next_multiple_of(STACK_SIZE);
        let stack = self.alloc(STACK_SIZE);
        self.set(task, "task_struct.stack", stack.0);
        self.set(task, "task_struct.thread.sp", stack.0 + STACK_SIZE - 0x40);
        let parent = self.variable("init_task");
        self.set(task, "task_struct.real_parent", parent.0);
    }

    /// Gives a task threads of which it is the only one.
    fn lead(&mut self, task: Gva) {
        let signal = self.alloc(self.plan.shape.size("signal_struct"));
        self.set(task, "task_struct.signal", signal.0);
        let head = self.field(signal, "signal_struct.thread_head");
        let node = self.field(task, "task_struct.thread_node");
        self.link(head, head, node);
    }

    /// A task that is on no list.
    pub fn loose(&mut self, pid: u32, comm: &str) -> Gva {
        let task = self.alloc(self.plan.shape.size("task_struct"));
        self.fill(task, pid, comm);
        task
    }

    /// A process of one thread, asleep.
    pub fn process(&mut self, pid: u32, comm: &str) -> Gva {
        let task = self.loose(pid, comm);
        self.set(task, "task_struct.__state", 1);
        self.lead(task);
        let tasks = "task_struct.tasks";
        let head = self.field(self.variable("init_task"), tasks);
        let last = self.field(self.last_task, tasks);
        self.link(head, last, self.field(task, tasks));
        self.last_task = task;
        self.count(task, pid);
        task
    }

    /// One more thread of a process.
    pub fn thread(&mut self, leader: Gva, pid: u32) -> Gva {
        let task = self.loose(pid, "thread");
        let signal = Gva(self.get(self.field(leader, "task_struct.signal")));
        self.set(task, "task_struct.signal", signal.0);
        let tgid = self.get(self.field(leader, "task_struct.tgid")) & 0xffff_ffff;
        self.set(task, "task_struct.tgid", tgid);
        let head = self.field(signal, "signal_struct.thread_head");
        let last = Gva(self.get(head.offset(8)));
        self.link(head, last, self.field(task, "task_struct.thread_node"));
        self.count(task, pid);
        task
    }

    fn count(&mut self, task: Gva, pid: u32) {
        self.threads += 1;
        self.number("nr_threads", self.threads.into());
        let id = self.alloc(self.plan.shape.size("pid"));
        self.set(task, "task_struct.thread_pid", id.0);
        let link = self.field(task, "task_struct.pid_links[0]");
        self.set(id, "pid.tasks[0].first", link.0);
        self.store(pid.into(), id);
    }

    /// Puts an entry into the table of process ids.
    fn store(&mut self, index: u64, entry: Gva) {
        let head = self.variable("init_pid_ns");
        let head = self.field(head, "pid_namespace.idr.idr_rt.xa_head");
        let shift_of =
            |guest: &Self, node: u64| guest.get(guest.field(Gva(node - 2), "xa_node.shift")) & 0xff;
        // Higher and higher trees, until the index is in one.
        loop {
            let root = self.get(head);
            let next = match root {
                0 => 0,
                _ => shift_of(self, root) + NODE_BITS,
            };
            if root != 0 && index >> next == 0 {
                break;
            }
            let node = self.node(next);
            self.set(node, "xa_node.slots[0]", root);
            self.fake.put_u64(head, node.0 + 2);
        }
        let mut node = self.get(head);
        loop {
            let shift = shift_of(self, node);
            let slot = self.field(Gva(node - 2), "xa_node.slots[0]");
            let slot = slot.offset((index >> shift & 0x3f) * 8);
            if shift == 0 {
                self.fake.put_u64(slot, entry.0);
                return;
            }
            if self.get(slot) == 0 {
                let child = self.node(shift - NODE_BITS);
                self.fake.put_u64(slot, child.0 + 2);
            }
            node = self.get(slot);
        }
    }

    fn node(&mut self, shift: u64) -> Gva {
        let node = self.alloc(self.plan.shape.size("xa_node"));
        self.set(node, "xa_node.shift", shift);
        node
    }

    /// The kernel of a CPU, by its number.
    #[must_use]
    pub fn area(&self, cpu: u64) -> Gva {
        AREAS.offset(cpu * PER_CPU_SIZE)
    }

    /// Puts a task on the run queue of the first CPU, which had none.
    pub fn queue(&mut self, task: Gva) {
        let rq = self.area(0).offset(self.plan.symbol("runqueues"));
        let head = self.field(rq, "rq.cfs_tasks");
        self.link(head, head, self.field(task, "task_struct.se.group_node"));
        self.set(task, "task_struct.on_rq", 1);
    }

    /// Puts a task on the list of those that are ending on the first CPU, which had none.
    pub fn exiting(&mut self, task: Gva) {
        let area = self.area(0).offset(self.plan.symbol("rcu_tasks__percpu"));
        let head = self.field(area, "rcu_tasks_percpu.rtp_exit_list");
        let node = self.field(task, "task_struct.rcu_tasks_exit_list");
        self.link(head, head, node);
    }

    /// The stack of a task: bytes up to its top, at which its stack pointer then is.
    pub fn stack(&mut self, task: Gva, words: &[u64]) {
        let base = Gva(self.get(self.field(task, "task_struct.stack")));
        let sp = base.offset(STACK_SIZE - 8 * words.len() as u64);
        for (index, &word) in words.iter().enumerate() {
            self.fake.put_u64(sp.offset(8 * index as u64), word);
        }
        self.set(task, "task_struct.thread.sp", sp.0);
    }

    /// A live module with a function, its symbol, an export and types of its own.
    pub fn module(&mut self, name: &str, types: &[u8]) -> Gva {
        let module = self.alloc(self.plan.shape.size("module"));
        self.fake
            .put(self.field(module, "module.name"), name.as_bytes());
        let text = Gva(self.modules);
        self.modules += 0x2000;
        // Its constants: what is exported is told by 32-bit distances.
        self.fake.map(text.offset(0x1000), 0x1000, 0);
        self.set(module, "module.mem[0].base", text.0);
        self.set(module, "module.mem[0].size", 0x800);
        self.set(module, "module.refcnt.counter", 2);
        let source = self.alloc(0x10);
        self.fake.put(source, b"0123456789ABCDE");
        self.set(module, "module.srcversion", source.0);
        let (head, last) = (self.variable("modules"), self.last_module);
        let node = self.field(module, "module.list");
        self.link(head, last, node);
        self.last_module = node;
        self.module_symbols(module, text);
        self.module_types(module, types);
        module
    }

    fn module_symbols(&mut self, module: Gva, text: Gva) {
        let table = self.alloc(self.plan.shape.size("mod_kallsyms"));
        let len = self.plan.shape.size("elf64_sym");
        let symbols = self.alloc(3 * len);
        let strings = text.offset(0x1000);
        let kinds = self.alloc(3);
        self.fake.put(strings, b"\0first\0second\0");
        self.fake.put(kinds, b"Utd");
        for (number, name) in [(1, 1), (2, 7)] {
            let symbol = symbols.offset(number * len);
            self.set(symbol, "elf64_sym.st_name", name);
            self.set(symbol, "elf64_sym.st_shndx", number);
            self.set(symbol, "elf64_sym.st_value", text.0 + 0x100 * number);
            self.set(symbol, "elf64_sym.st_size", 0x40);
        }
        self.set(table, "mod_kallsyms.symtab", symbols.0);
        self.set(table, "mod_kallsyms.num_symtab", 3);
        self.set(table, "mod_kallsyms.strtab", strings.0);
        self.set(table, "mod_kallsyms.typetab", kinds.0);
        self.set(module, "module.kallsyms", table.0);
        let export = text.offset(0x1100);
        let distance = |to: u64, path: &str, guest: &Self| {
            to.wrapping_sub(guest.field(export, path).0) & 0xffff_ffff
        };
        for (path, to) in [
            ("kernel_symbol.value_offset", text.0 + 0x100),
            ("kernel_symbol.name_offset", strings.0 + 1),
        ] {
            let value = distance(to, path, self);
            self.set(export, path, value);
        }
        self.set(module, "module.syms", export.0);
        self.set(module, "module.num_syms", 1);
    }

    fn module_types(&mut self, module: Gva, types: &[u8]) {
        if types.is_empty() {
            return;
        }
        let entry = self.alloc(self.plan.shape.size("btf_module"));
        let btf = self.alloc(self.plan.shape.size("btf"));
        let data = self.alloc(types.len() as u64);
        self.fake.put(data, types);
        self.set(btf, "btf.data", data.0);
        self.set(btf, "btf.data_size", types.len() as u64);
        self.set(entry, "btf_module.module", module.0);
        self.set(entry, "btf_module.btf", btf.0);
        let head = self.variable("btf_modules");
        let last = Gva(self.get(head.offset(8)));
        self.link(head, last, self.field(entry, "btf_module.list"));
    }

    /// Gives a module unwind tables.
    pub fn module_orc(&mut self, module: Gva, write: impl FnOnce(u64, u64) -> (Vec<u8>, Vec<u8>)) {
        let text = self.get(self.field(module, "module.mem[0].base"));
        let place = self.alloc(0x200);
        let (addresses, entries) = write(place.0, text);
        assert!(addresses.len() <= 0x80 && entries.len() <= 0x100);
        self.fake.put(place, &addresses);
        self.fake.put(place.offset(0x100), &entries);
        let count = addresses.len() as u64 / 4;
        self.set(module, "module.arch.num_orcs", count);
        self.set(module, "module.arch.orc_unwind_ip", place.0);
        self.set(module, "module.arch.orc_unwind", place.0 + 0x100);
    }

    fn log_ring(&mut self) {
        let (count, size) = LOG_BITS;
        let ring = self.alloc(self.plan.shape.size("printk_ringbuffer"));
        let descriptors = self.alloc(self.plan.shape.size("prb_desc") << count);
        let infos = self.alloc(self.plan.shape.size("printk_info") << count);
        let data = self.alloc(1 << size);
        for (path, value) in [
            ("desc_ring.count_bits", count.into()),
            ("desc_ring.descs", descriptors.0),
            ("desc_ring.infos", infos.0),
            ("text_data_ring.size_bits", size.into()),
            ("text_data_ring.data", data.0),
        ] {
            self.set(ring, &format!("printk_ringbuffer.{path}"), value);
        }
        self.number("prb", ring.0);
    }

    /// Writes a record to the log. All of them together are shorter than it.
    pub fn log(&mut self, text: &str) {
        const FINALIZED: u64 = 2 << 62;
        let ring = Gva(self.get(self.variable("prb")));
        let at = |guest: &Self, path: &str| {
            Gva(guest.get(guest.field(ring, &format!("printk_ringbuffer.{path}"))))
        };
        let number = self.records;
        let descriptor = at(self, "desc_ring.descs");
        let descriptor = descriptor.offset(number * self.plan.shape.size("prb_desc"));
        let info = at(self, "desc_ring.infos");
        let info = info.offset(number * self.plan.shape.size("printk_info"));
        let begin = 0x40 * number;
        let data = at(self, "text_data_ring.data").offset(begin);
        assert!(number < 1 << LOG_BITS.0 && text.len() <= 0x38);
        self.fake.put_u64(data, number);
        self.fake.put(data.offset(8), text.as_bytes());
        self.set(descriptor, "prb_desc.state_var", FINALIZED | number);
        self.set(descriptor, "prb_desc.text_blk_lpos.begin", begin);
        self.set(descriptor, "prb_desc.text_blk_lpos.next", begin + 0x40);
        self.set(info, "printk_info.seq", number);
        self.set(info, "printk_info.text_len", text.len() as u64);
        self.set(ring, "printk_ringbuffer.desc_ring.head_id", number);
        self.records += 1;
    }

    /// Its only vCPU, or the first of them.
    pub fn vcpu(&mut self) -> &mut Vcpu {
        &mut self.fake.image.vcpus_mut()[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::klog::last_records;
    use crate::space::{Landmarks, Located};
    use crate::symbols::ModulesLayout;
    use crate::synthetic::Btf;
    use crate::tasks::{SurveyLayout, TaskKind, TaskLayout, Windows, scan, survey};

    fn located(guest: &Guest) -> Located {
        let marks = Landmarks::of(&guest.kernel).unwrap();
        Located::find(&guest.fake.image, &marks).unwrap()
    }

    #[test]
    fn all_of_it_is_understood() {
        let mut guest = Guest::new(Plan::new(), 0x10_0000);
        let init = guest.process(1, "init");
        guest.process(2, "kthreadd");
        guest.thread(init, 70);
        guest.process(5000, "far");
        guest.add_cpu();
        let late = guest.loose(9, "late");
        guest.exiting(late);
        let located = located(&guest);
        let space = located.space(&guest.fake.image);
        let layout = TaskLayout::of(&guest.kernel).unwrap();
        let more = SurveyLayout::of(&guest.kernel).unwrap();
        let vcpus = guest.fake.image.vcpus();
        let told = survey(&space, &located, &layout, &more, vcpus).unwrap();
        assert_eq!(told.disagreements, Vec::<String>::new());
        let pids: Vec<_> = told.tasks.iter().map(|task| task.pid).collect();
        assert_eq!(pids, [0, 1, 70, 2, 5000, 0, 9]);
        assert_eq!(told.counts.by_pid, Some(4));
        assert_eq!(told.tasks[0].kind, TaskKind::Idle);
        assert_eq!((told.tasks[2].tgid, told.tasks[5].vcpu), (1, Some(1)));
        let windows = Windows::new([Gva(1)..Gva(2)]);
        let scanned = scan(&space, &located, &layout, vcpus, &windows).unwrap();
        assert!(scanned.is_clear(), "{scanned:?}");
    }

    #[test]
    fn modules_and_the_log_are_understood() {
        let mut guest = Guest::new(Plan::new(), 0x10_0000);
        guest.module("one", &Btf::example().write());
        guest.module("two", &[]);
        guest.log("hello");
        guest.log("world");
        let located = located(&guest);
        let space = located.space(&guest.fake.image);
        let layout = ModulesLayout::of(&guest.kernel).unwrap().unwrap();
        let modules = layout.modules(&space, &located).unwrap();
        assert_eq!(modules[1].name, "two");
        let types = layout.type_data(&space, &modules[0]).unwrap();
        assert_eq!(types, Some(Btf::example().write()));
        let symbols = layout.symbols(&space, &modules[0]).unwrap();
        let rows: Vec<_> = symbols.iter().map(|s| (s.kind(), s.name())).collect();
        assert_eq!(
            rows,
            [('T', "first".to_owned()), ('d', "second".to_owned())]
        );
        let log = guest.kernel.log_layout().unwrap();
        let records = last_records(&space, &log, SLIDE, 10).unwrap();
        let texts: Vec<_> = records.iter().map(|record| &record.text).collect();
        assert_eq!(texts, ["hello", "world"]);
    }
}
