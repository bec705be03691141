//! A guest made of a stock kernel's own image, as it would look after its boot: relocated, its
//! text patched as the boot patches it, its page tables and lists of tasks in place, nothing
//! running. What is needed of the kernel's data is written by the names of its symbols and types.

#![allow(
    clippy::panic,
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};

use patcher::Kernel;
use patcher::guest::{
    Activity, Gpa, GuestMemory, Gva, LinkAddr, MemoryImage, Slide, StoppedGuest, Vcpu,
    VcpuRegisters,
};
use patcher::image::Image;
use patcher::space::{Root, Space};

const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;
const MIB: u64 = 1 << 20;
/// What is linked at `KERNEL_MAP` is here, before the slide.
const LOADED_AT: u64 = 32 * MIB;
const RAM: u64 = 100 * MIB;
/// Page tables of the direct map.
const DIRECT_TABLES: u64 = 0x1_0000;
/// First byte that nothing else uses.
const HEAP: u64 = 2 * MIB;
const STACK: u64 = 0x4000;
pub(crate) const SLIDE: Slide = Slide(0x1c0_0000);
pub(crate) const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];

/// What does not change between the guests of one kernel.
struct Template {
    kernel: Arc<Kernel>,
    image: MemoryImage,
    heap: u64,
}

pub(crate) struct KernelGuest {
    pub(crate) kernel: Arc<Kernel>,
    pub(crate) image: MemoryImage,
    heap: u64,
}

/// The guest kernels that are tried.
pub(crate) const KERNELS: [&str; 2] = ["6.1", "6.12"];

pub(crate) fn guest(name: &str) -> KernelGuest {
    static TEMPLATES: [OnceLock<Template>; 2] = [const { OnceLock::new() }; 2];
    let index = KERNELS.iter().position(|known| *known == name).unwrap();
    let template = TEMPLATES[index].get_or_init(|| {
        let guest = build(name);
        Template {
            kernel: guest.kernel,
            image: guest.image,
            heap: guest.heap,
        }
    });
    KernelGuest {
        kernel: template.kernel.clone(),
        image: template.image.clone(),
        heap: template.heap,
    }
}

/// The file of a stock kernel, fetched when it is not there yet.
fn kernel_file(name: &str) -> Vec<u8> {
    let fetch = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-images/fetch");
    let output = Command::new(&fetch)
        .arg(name)
        .stderr(Stdio::inherit())
        .output()
        .expect("guest-images/fetch runs");
    assert!(output.status.success(), "{name}: {}", output.status);
    let folder = String::from_utf8(output.stdout).unwrap();
    std::fs::read(Path::new(folder.trim_end()).join("vmlinuz")).unwrap()
}

fn build(name: &str) -> KernelGuest {
    let file = kernel_file(name);
    let image = Image::open(file.clone()).unwrap();
    let kernel = Arc::new(Kernel::open(file).unwrap());
    let ram = vec![(Gpa(0), vec![0; RAM as usize])];
    let mut guest = KernelGuest {
        kernel,
        image: MemoryImage::new(ram, Vec::new()).unwrap(),
        heap: HEAP,
    };
    for section in image.sections().iter().filter(|s| s.allocated) {
        let per_cpu = section.address.0 < KERNEL_MAP;
        if let (false, Some(bytes)) = (per_cpu, image.section_bytes(section)) {
            guest.image.write(gpa(section.address), bytes).unwrap();
        }
    }
    guest.map();
    guest.boot_text(&image);
    guest.boot_data();
    guest
}

fn gpa(link: LinkAddr) -> Gpa {
    Gpa(link.0 - KERNEL_MAP + LOADED_AT)
}

impl KernelGuest {
    pub(crate) fn link(&self, symbol: &str) -> LinkAddr {
        self.kernel.symbols().address(symbol).unwrap()
    }

    /// Run-time address of a symbol.
    pub(crate) fn at(&self, symbol: &str) -> Gva {
        self.link(symbol).at(SLIDE)
    }

    pub(crate) fn field(&self, holder: &str, member: &str) -> u64 {
        self.kernel.types().field(holder, member).unwrap().offset
    }

    pub(crate) fn space(&self) -> Space<'_> {
        let root = Root {
            table: gpa(self.link("init_top_pgt")),
            levels: 4,
        };
        Space::new(&self.image, root)
    }

    pub(crate) fn get(&self, at: Gva, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.space().read(at, &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn put(&mut self, at: Gva, bytes: &[u8]) {
        let pieces = self.space().pieces(at, bytes.len() as u64).unwrap();
        let mut rest = bytes;
        for piece in pieces {
            let (now, later) = rest.split_at(piece.len as usize);
            self.image.write(piece.gpa, now).unwrap();
            rest = later;
        }
    }

    pub(crate) fn put_u64(&mut self, at: Gva, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    pub(crate) fn put_u32(&mut self, at: Gva, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    /// All of RAM, to see that nothing else was changed.
    pub(crate) fn memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; RAM as usize];
        self.image.read(Gpa(0), &mut bytes).unwrap();
        bytes
    }

    /// Zeroed memory, by its address in the direct map.
    pub(crate) fn alloc(&mut self, len: u64) -> Gva {
        let at = self.heap.next_multiple_of(0x1000);
        self.heap = at + len;
        assert!(self.heap < LOADED_AT);
        Gva(DIRECT_MAP + at)
    }

    fn entry(&mut self, table: Gpa, index: u64, value: u64) {
        let at = table.offset(index * 8);
        self.image.write(at, &value.to_le_bytes()).unwrap();
    }

    fn map(&mut self) {
        let table = |symbol: &str| gpa(self.link(symbol));
        let top = table("init_top_pgt");
        let (level3, image) = (table("level3_kernel_pgt"), table("level2_kernel_pgt"));
        let fixmap = table("level2_fixmap_pgt");
        for table in [top, level3, image, fixmap] {
            self.image.write(table, &[0; 4096]).unwrap();
        }
        self.entry(top, 511, level3.0 | 0x63);
        self.entry(level3, 510, image.0 | 0x63);
        self.entry(level3, 511, fixmap.0 | 0x67);
        let text_end = self.link("_etext").0 - KERNEL_MAP;
        let end = self.link("_end").0 - KERNEL_MAP;
        for offset in (16 * MIB..end).step_by(2 * MIB as usize) {
            let flags = if offset < text_end {
                0x1a1
            } else {
                0x1e3 | (1 << 63)
            };
            let index = (offset + SLIDE.0) / (2 * MIB);
            self.entry(image, index, (LOADED_AT + offset) | flags);
        }
        let (direct3, direct2) = (Gpa(DIRECT_TABLES), Gpa(DIRECT_TABLES + 0x1000));
        self.entry(top, DIRECT_MAP >> 39 & 0x1ff, direct3.0 | 0x63);
        self.entry(direct3, 0, direct2.0 | 0x63);
        for page in 0..RAM / (2 * MIB) {
            self.entry(direct2, page, (page * 2 * MIB) | 0x1e3 | (1 << 63));
        }
    }

    /// What the boot does to the text that these tests look at: no calls of the tracer, and
    /// returns without a thunk.
    fn boot_text(&mut self, image: &Image) {
        let range = self
            .kernel
            .between("__start_mcount_loc", "__stop_mcount_loc")
            .unwrap();
        let len = range.end.distance_from(range.start) as usize;
        let mut sites: Vec<_> = image
            .read(range.start, len)
            .unwrap()
            .chunks_exact(8)
            .map(|raw| LinkAddr(u64::from_le_bytes(raw.try_into().unwrap())))
            .filter(|site| site.0 != 0)
            .collect();
        sites.sort();
        sites.dedup();
        for &site in &sites {
            self.image.write(gpa(site), &NOP5).unwrap();
        }
        self.ftrace(&sites);
        let section = image.section(".return_sites").unwrap();
        let bytes = image.section_bytes(section).unwrap();
        for (index, raw) in bytes.chunks_exact(4).enumerate() {
            let distance = i32::from_le_bytes(raw.try_into().unwrap());
            let entry = section.address.offset(index as u64 * 4);
            let site = gpa(entry.displace(distance.into()));
            self.image
                .write(site, &[0xc3, 0xcc, 0xcc, 0xcc, 0xcc])
                .unwrap();
        }
    }

    fn ftrace(&mut self, sites: &[LinkAddr]) {
        let size = self.kernel.types().size_of("dyn_ftrace").unwrap();
        let records = self.alloc(size * sites.len() as u64);
        let ip = self.field("dyn_ftrace", "ip");
        for (index, site) in sites.iter().enumerate() {
            let record = records.offset(index as u64 * size);
            self.put_u64(record.offset(ip), site.at(SLIDE).0);
        }
        let group = self.alloc(64);
        let member = |guest: &Self, name| group.offset(guest.field("ftrace_page", name));
        let (at_records, at_index) = (member(self, "records"), member(self, "index"));
        self.put_u64(at_records, records.0);
        self.put_u32(at_index, sites.len() as u32);
        let start = self.at("ftrace_pages_start");
        self.put_u64(start, group.0);
        self.nobody_traces();
    }

    /// No user of ftrace is there.
    pub(crate) fn nobody_traces(&mut self) {
        let (tracers, end) = (self.at("ftrace_ops_list"), self.at("ftrace_list_end"));
        self.put_u64(tracers, end.0);
    }

    /// One user of ftrace is there, who wants to hear of `only`, or of everything but `not`.
    pub(crate) fn somebody_traces(&mut self, only: &[Gva], not: &[Gva]) {
        let ops = self.alloc(0x1000);
        let hashes = ops.offset(0x800);
        let end = self.at("ftrace_list_end");
        self.put_u64(ops.offset(self.field("ftrace_ops", "next")), end.0);
        self.put_u64(ops.offset(self.field("ftrace_ops", "func_hash")), hashes.0);
        for (member, functions) in [("filter_hash", only), ("notrace_hash", not)] {
            let hash = self.hash(functions);
            self.put_u64(hashes.offset(self.field("ftrace_ops_hash", member)), hash.0);
        }
        self.put_u64(self.at("ftrace_ops_list"), ops.0);
    }

    /// A `struct ftrace_hash` of these functions, each in a bucket of its own, from the last on.
    fn hash(&mut self, functions: &[Gva]) -> Gva {
        const BITS: u64 = 4;
        let hash = self.alloc(0x800);
        let (buckets, entries) = (hash.offset(0x100), hash.offset(0x200));
        self.put_u64(hash.offset(self.field("ftrace_hash", "size_bits")), BITS);
        self.put_u64(hash.offset(self.field("ftrace_hash", "buckets")), buckets.0);
        let count = hash.offset(self.field("ftrace_hash", "count"));
        self.put_u64(count, functions.len() as u64);
        for (index, function) in (0..).zip(functions) {
            let entry = entries.offset(index * 64);
            let link = entry.offset(self.field("ftrace_func_entry", "hlist"));
            self.put_u64(
                entry.offset(self.field("ftrace_func_entry", "ip")),
                function.0,
            );
            self.put_u64(buckets.offset(8 * ((1 << BITS) - 1 - index)), link.0);
        }
        hash
    }

    /// Address of the flags of the record for a function's entry.
    pub(crate) fn ftrace_flags(&self, entry: Gva) -> Gva {
        let group = self
            .space()
            .read_pointer(self.at("ftrace_pages_start"))
            .unwrap();
        let member = |name| group.offset(self.field("ftrace_page", name));
        let records = self.space().read_pointer(member("records")).unwrap();
        let count = self.space().read_u32(member("index")).unwrap();
        let size = self.kernel.types().size_of("dyn_ftrace").unwrap();
        let record = (0..u64::from(count))
            .map(|index| records.offset(index * size))
            .find(|record| {
                let ip = record.offset(self.field("dyn_ftrace", "ip"));
                self.space().read_u64(ip).unwrap() == entry.0
            });
        record.unwrap().offset(self.field("dyn_ftrace", "flags"))
    }

    fn empty_list(&mut self, head: Gva) {
        self.put_u64(head, head.0);
        self.put_u64(head.offset(8), head.0);
    }

    fn boot_data(&mut self) {
        let running = self
            .kernel
            .types()
            .constant("system_states", "SYSTEM_RUNNING")
            .unwrap();
        self.put_u32(self.at("system_state"), u32::try_from(running).unwrap());
        // As the image is mapped: physical address minus run-time address, from the map's start.
        self.put_u64(self.at("phys_base"), LOADED_AT.wrapping_sub(SLIDE.0));
        self.put_u64(self.at("page_offset_base"), DIRECT_MAP);
        let modules = self.at("modules");
        self.empty_list(modules);
        self.put_u64(self.at("__cpu_possible_mask"), 0b11);
        let size = 2 * MIB;
        for cpu in 0..2 {
            let area = self.alloc(size);
            self.put_u64(self.at("__per_cpu_offset").offset(cpu * 8), area.0);
        }
        if let Ok(domain) = self.kernel.symbols().address("tasks_rcu_exit_srcu") {
            let data = domain.at(SLIDE).offset(self.field("srcu_struct", "sda"));
            self.put_u64(data, size - 0x1000);
        }
        let handler = self.at("asm_exc_int3").0.to_le_bytes();
        let [a, b, c, d, high @ ..] = handler;
        // Gate 3: present, DPL 3, interrupt gate.
        let gate = self.at("idt_table").offset(3 * 16);
        self.put(gate, &[a, b, 0x10, 0, 0, 0xee, c, d]);
        self.put(gate.offset(8), &high);
        let init = self.at("init_task");
        let signals = self.at("init_signals");
        let stack = self
            .kernel
            .symbols()
            .address("init_stack")
            .or_else(|_| self.kernel.symbols().address("init_thread_union"))
            .unwrap()
            .at(SLIDE);
        self.task(init, 0, stack, signals);
        let tasks = init.offset(self.field("task_struct", "tasks"));
        self.empty_list(tasks);
        let idle = self.new_task(0);
        for cpu in 0..2 {
            let rq = self.per_cpu("runqueues", cpu);
            let current = if cpu == 0 { init } else { idle };
            self.put_u64(rq.offset(self.field("rq", "curr")), current.0);
            self.put_u64(rq.offset(self.field("rq", "idle")), current.0);
            let fair = rq.offset(self.field("rq", "cfs_tasks"));
            self.empty_list(fair);
            self.put(current.offset(self.field("task_struct", "on_cpu")), &[1]);
            self.add_vcpu(cpu as u32, current);
        }
    }

    pub(crate) fn per_cpu(&self, symbol: &str, cpu: u64) -> Gva {
        let offset = self.at("__per_cpu_offset").offset(cpu * 8);
        let offset = self.space().read_u64(offset).unwrap();
        Gva(self.kernel.symbols().unique(symbol).unwrap().value()).offset(offset)
    }

    fn task(&mut self, task: Gva, pid: u32, stack: Gva, signals: Gva) {
        let member = |guest: &Self, name| task.offset(guest.field("task_struct", name));
        self.put_u32(member(self, "pid"), pid);
        self.put_u64(member(self, "stack"), stack.0);
        self.put_u64(member(self, "thread.sp"), stack.0 + STACK - 0x200);
        self.put_u64(member(self, "signal"), signals.0);
        let node = member(self, "thread_node");
        let head = signals.offset(self.field("signal_struct", "thread_head"));
        self.put_u64(head, node.0);
        self.put_u64(node, head.0);
        let fair = member(self, "se.group_node");
        self.empty_list(fair);
    }

    fn new_task(&mut self, pid: u32) -> Gva {
        let size = self.kernel.types().size_of("task_struct").unwrap();
        let task = self.alloc(size);
        let stack = self.alloc(STACK);
        let signals = self.alloc(0x1000);
        self.task(task, pid, stack, signals);
        task
    }

    /// Adds a sleeping process to the task list and tells the address of its stack's first word.
    pub(crate) fn sleeper(&mut self, pid: u32, comm: &str) -> Gva {
        let task = self.new_task(pid);
        self.put(
            task.offset(self.field("task_struct", "comm")),
            comm.as_bytes(),
        );
        let tasks = self.field("task_struct", "tasks");
        let head = self.at("init_task").offset(tasks);
        let first = self.space().read_u64(head).unwrap();
        self.put_u64(task.offset(tasks), first);
        self.put_u64(head, task.offset(tasks).0);
        let threads = self.space().read_u32(self.at("nr_threads")).unwrap();
        self.put_u32(self.at("nr_threads"), threads + 1);
        let sp = task.offset(self.field("task_struct", "thread.sp"));
        Gva(self.space().read_u64(sp).unwrap())
    }

    /// The same, but preempted: it is on the run queue.
    pub(crate) fn preempted(&mut self, pid: u32, comm: &str) -> Gva {
        let stack = self.sleeper(pid, comm);
        let tasks = self.field("task_struct", "tasks");
        let head = self.at("init_task").offset(tasks);
        let first = Gva(self.space().read_u64(head).unwrap());
        let task = Gva(first.0 - tasks);
        self.put_u32(task.offset(self.field("task_struct", "on_rq")), 1);
        stack
    }

    fn add_vcpu(&mut self, index: u32, current: Gva) {
        let stack = current.offset(self.field("task_struct", "stack"));
        let stack = self.space().read_u64(stack).unwrap();
        let registers = VcpuRegisters {
            rip: self.at("schedule").0,
            rsp: stack + STACK - 0x100,
            cr0: 0x8005_0033,
            cr3: gpa(self.link("init_top_pgt")).0,
            cr4: 0x20,
            efer: 0xd01,
            cs: 0x10,
            ss: 0x18,
            lstar: self.at("entry_SYSCALL_64").0,
            idt_base: self.at("idt_table").0,
            gs_base: self
                .space()
                .read_u64(self.at("__per_cpu_offset").offset(u64::from(index) * 8))
                .unwrap(),
            ..VcpuRegisters::default()
        };
        self.image.vcpus_mut().push(Vcpu {
            index,
            activity: Activity::Running,
            registers,
            nested: false,
            reinjects: false,
        });
    }
}
