//! A kernel with every symbol and type that a guest is understood by.

use std::collections::BTreeMap;

use super::{BANNER, ElfSection, Kallsyms, RODATA, Shape, SyntheticSymbol, TEXT, TYPES, elf};
use crate::guest::LinkAddr;
use crate::symbols::{Layout, OffsetForm};

/// Where its variables are linked.
pub const VARIABLES: LinkAddr = LinkAddr(RODATA.0 + 0x20_0000);
/// Bytes of a task's stack, and of each of a CPU's.
pub const STACK_SIZE: u64 = 0x1000;
/// Bytes of a CPU's own variables and stacks.
pub const PER_CPU_SIZE: u64 = 0x4000;
/// CPUs that its tables have room for.
pub(super) const MAX_CPUS: u32 = 4;

/// Structures, in the order in which they need each other.
const STRUCTURES: &[(&str, &str)] = &[
    ("list_head", "next:ptr prev:ptr"),
    ("hlist_head", "first:ptr"),
    ("hlist_node", "next:ptr pprev:ptr"),
    ("llist_node", "next:ptr"),
    ("llist_head", "first:ptr"),
    ("thread_info", "flags:u64 cpu:u32"),
    ("thread_struct", "sp:u64"),
    ("sched_entity", "group_node:list_head sched_delayed:u8"),
    (
        "task_struct",
        "thread_info:thread_info __state:u32 stack:ptr flags:u32 on_cpu:u32 on_rq:u32 \
         se:sched_entity tasks:list_head mm:ptr exit_state:u32 pid:u32 tgid:u32 real_parent:ptr \
         thread_pid:ptr pid_links:hlist_node[4] thread_node:list_head nvcsw:u64 nivcsw:u64 \
         start_boottime:u64 comm:u8[16] signal:ptr rcu_tasks_exit_list:list_head \
         curr_ret_stack:u32 ret_stack:ptr rethooks:llist_head thread:thread_struct",
    ),
    ("signal_struct", "live:u32 thread_head:list_head"),
    ("rq", "lock:u32 curr:ptr idle:ptr cfs_tasks:list_head"),
    ("rcu_tasks_percpu", "lock:u32 rtp_exit_list:list_head"),
    ("xarray", "xa_flags:u32 xa_head:ptr"),
    ("idr", "idr_rt:xarray idr_base:u32"),
    ("pid_namespace", "idr:idr"),
    ("xa_node", "shift:u8 offset:u8 count:u8 slots:ptr[64]"),
    ("pid", "count:u32 tasks:hlist_head[4]"),
    ("thread_union", "stack:u8[4096]"),
    ("irq_stack", "stack:u8[4096]"),
    ("exception_stacks", "stack:u8[4096]"),
    ("entry_stack_page", "stack:u8[4096]"),
    (
        "cea_exception_stacks",
        "DF_stack:u8[512] NMI_stack:u8[1024] DB_stack:u8[512] MCE_stack:u8[512] VC_stack:u8[512] \
         VC2_stack:u8[1024]",
    ),
    (
        "cpu_entry_area",
        "gdt:u8[4096] entry_stack_page:entry_stack_page estacks:cea_exception_stacks",
    ),
    (
        "pt_regs",
        "r15:u64 r14:u64 r13:u64 r12:u64 bp:u64 bx:u64 r11:u64 r10:u64 r9:u64 r8:u64 ax:u64 cx:u64 \
         dx:u64 si:u64 di:u64 orig_ax:u64 ip:u64 cs:u64 flags:u64 sp:u64 ss:u64",
    ),
    (
        "inactive_task_frame",
        "r15:u64 r14:u64 r13:u64 r12:u64 bx:u64 bp:u64 ret_addr:u64",
    ),
    ("ftrace_ret_stack", "ret:u64 func:u64 retp:u64"),
    ("fgraph_ops", "idx:u32"),
    (
        "rethook_node",
        "rcu:u64 llist:llist_node rethook:ptr ret_addr:u64 frame:u64",
    ),
    (
        "ftrace_ops",
        "func:ptr next:ptr flags:u64 trampoline:u64 trampoline_size:u64",
    ),
    (
        "bpf_ksym",
        "start:u64 end:u64 name:u8[32] lnode:list_head fp_start:u32 fp_end:u32",
    ),
    ("atomic_t", "counter:u32"),
    ("module_memory", "base:ptr size:u32"),
    (
        "mod_arch_specific",
        "num_orcs:u32 orc_unwind_ip:ptr orc_unwind:ptr",
    ),
    (
        "mod_kallsyms",
        "symtab:ptr num_symtab:u32 strtab:ptr typetab:ptr",
    ),
    (
        "elf64_sym",
        "st_name:u32 st_info:u8 st_other:u8 st_shndx:u16 st_value:u64 st_size:u64",
    ),
    ("kernel_symbol", "value_offset:u32 name_offset:u32"),
    (
        "module",
        "state:u32 list:list_head name:u8[56] srcversion:ptr refcnt:atomic_t taints:u64 syms:ptr \
         num_syms:u32 mem:module_memory[7] arch:mod_arch_specific kallsyms:ptr",
    ),
    ("btf", "data:ptr data_size:u32"),
    ("btf_module", "list:list_head module:ptr btf:ptr"),
    (
        "prb_desc_ring",
        "count_bits:u32 descs:ptr infos:ptr head_id:u64",
    ),
    ("prb_data_ring", "size_bits:u32 data:ptr"),
    (
        "printk_ringbuffer",
        "desc_ring:prb_desc_ring text_data_ring:prb_data_ring",
    ),
    ("prb_data_blk_lpos", "begin:u64 next:u64"),
    ("prb_desc", "state_var:u64 text_blk_lpos:prb_data_blk_lpos"),
    ("printk_info", "seq:u64 ts_nsec:u64 text_len:u16"),
];

/// Enumerations.
const CONSTANTS: &[(&str, &[(&str, u32)])] = &[
    (
        "system_states",
        &[
            ("SYSTEM_BOOTING", 0),
            ("SYSTEM_RUNNING", 3),
            ("SYSTEM_HALT", 4),
        ],
    ),
    (
        "module_state",
        &[
            ("MODULE_STATE_LIVE", 0),
            ("MODULE_STATE_COMING", 1),
            ("MODULE_STATE_GOING", 2),
            ("MODULE_STATE_UNFORMED", 3),
        ],
    ),
    (
        "mod_mem_type",
        &[
            ("MOD_TEXT", 0),
            ("MOD_DATA", 1),
            ("MOD_RODATA", 2),
            ("MOD_RO_AFTER_INIT", 3),
            ("MOD_INIT_TEXT", 4),
            ("MOD_INIT_DATA", 5),
            ("MOD_INIT_RODATA", 6),
        ],
    ),
    ("", &[("FTRACE_OPS_FL_SAVE_REGS", 4)]),
];

/// Symbols: per-CPU ones by their offset, then text by its distance from [`TEXT`], then variables
/// by theirs from [`VARIABLES`].
const PER_CPU: &[(u64, &str)] = &[
    (0, "fixed_percpu_data"),
    (0x100, "runqueues"),
    (0x200, "rcu_tasks__percpu"),
    (0x300, "current_task"),
    (0x308, "hardirq_stack_ptr"),
    (0x310, "cea_exception_stacks"),
    (0x1000, "irq_stack_backing_store"),
    (0x2000, "exception_stacks"),
    (0x3000, "entry_stack_storage"),
    (PER_CPU_SIZE, "__per_cpu_end"),
];
const CODE: &[(u64, &str)] = &[
    (0, "_text"),
    (0, "_stext"),
    (0x40, "__entry_text_start"),
    (0x80, "entry_SYSCALL_64"),
    (0x200, "__entry_text_end"),
    (0x1000, "schedule"),
    (0x2000, "wait_for_something"),
    (0x3000, "do_syscall_64"),
    (0x4000, "ret_from_fork_asm"),
    (0x5000, "call_on_irqstack"),
    (0x6000, "has_no_frame"),
    (0x7000, "asm_common_interrupt"),
    (0x8000, "ftrace_caller"),
    (0x9000, "ftrace_regs_caller"),
    (0xa000, "return_to_handler"),
    (0xb000, "arch_rethook_trampoline"),
    (0xc000, "_etext"),
];
const DATA: &[(u64, &str)] = &[
    (0, "system_state"),
    (0x8, "phys_base"),
    (0x10, "page_offset_base"),
    (0x20, "__per_cpu_offset"),
    (0x40, "__cpu_possible_mask"),
    (0x48, "nr_threads"),
    (0x50, "panic_cpu"),
    (0x58, "prb"),
    (0x60, "modules"),
    (0x70, "btf_modules"),
    (0x80, "ftrace_ops_list"),
    (0x90, "bpf_kallsyms"),
    (0x100, "init_pid_ns"),
    (0x400, "init_task"),
    (0x1000, "init_top_pgt"),
];

/// Symbols that nobody asks for, so that the table is long enough to be found.
const OTHERS: u64 = 300;

/// The plan of a kernel: what [`super::Guest`] is a guest of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its types.
    pub shape: Shape,
    symbols: BTreeMap<&'static str, u64>,
    rodata: Vec<u8>,
}

impl Default for Plan {
    fn default() -> Self {
        Self::new()
    }
}

impl Plan {
    /// A kernel that is laid out as 6.12 is.
    #[must_use]
    pub fn new() -> Self {
        let mut shape = Shape::new();
        for (name, members) in STRUCTURES {
            shape.add(name, members);
        }
        for (name, values) in CONSTANTS {
            shape.constants(name, values);
        }
        let symbol = |value: u64, kind, name: String| SyntheticSymbol { value, kind, name };
        let at = |base: LinkAddr, kind| {
            move |&(offset, name): &(u64, &str)| symbol(base.0 + offset, kind, name.to_owned())
        };
        let mut symbols: Vec<_> = PER_CPU.iter().map(at(LinkAddr(0), 'A')).collect();
        symbols.extend(CODE.iter().map(at(TEXT, 'T')));
        symbols.push(symbol(RODATA.0, 'D', "linux_banner".into()));
        symbols.extend(DATA.iter().map(at(VARIABLES, 'D')));
        let others = (0..OTHERS).map(|n| symbol(TEXT.0 + 0x200 + 8 * n, 't', format!("f{n}")));
        symbols.extend(others);
        symbols.sort_by_key(|symbol| symbol.value);
        let table = Kallsyms {
            layout: Layout::B,
            offsets: OffsetForm::PerCpu,
            align: 8,
            sorted_names: false,
            symbols,
        };
        let mut rodata = [BANNER.as_bytes(), b"\n\0"].concat();
        rodata.resize(0x100, 0);
        rodata.extend(table.write(RODATA.offset(0x100)));
        rodata.extend([0; 64]);
        let named = |base: u64, list: &[(u64, &'static str)]| -> Vec<_> {
            list.iter()
                .map(|&(offset, name)| (name, base + offset))
                .collect()
        };
        let all = [
            named(0, PER_CPU),
            named(TEXT.0, CODE),
            named(VARIABLES.0, DATA),
        ];
        Self {
            shape,
            symbols: all.concat().into_iter().collect(),
            rodata,
        }
    }

    /// The link address of a symbol, or the offset of a per-CPU variable.
    #[must_use]
    pub fn symbol(&self, name: &str) -> u64 {
        let value = self.symbols.get(name);
        *value.unwrap_or_else(|| panic!("there is no {name}"))
    }

    /// The kernel's file, with more sections.
    #[must_use]
    pub fn file(&self, more: &[ElfSection]) -> Vec<u8> {
        let section = |name, address, bytes, executable| ElfSection {
            name,
            address,
            bytes,
            executable,
        };
        let mut sections = vec![
            section(".text", TEXT, vec![0xcc; 0x40], true),
            section(".rodata", RODATA, self.rodata.clone(), false),
            section(".BTF", TYPES, self.shape.btf().write(), false),
        ];
        sections.extend_from_slice(more);
        elf(&sections)
    }
}
