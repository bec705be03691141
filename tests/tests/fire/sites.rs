//! Where probes are put: functions that the guest runs all the time, and any others.

use std::collections::HashMap;

use serde_json::{Value, json};
use stillpoint_tests::{Failure, Guest, KernelText, Qmp, number};

use stillpoint_tests::Random;

/// Functions that a guest comes by often when it does what guest-images/programs/storm.c does.
const OFTEN: &[&str] = &[
    "__alloc_pages_noprof",
    "__fput",
    "__handle_mm_fault",
    "__mmap_region",
    "__send_signal_locked",
    "__vm_munmap",
    "__x64_sys_clone",
    "__x64_sys_exit_group",
    "__x64_sys_getppid",
    "__x64_sys_kill",
    "__x64_sys_mmap",
    "__x64_sys_munmap",
    "__x64_sys_nanosleep",
    "__x64_sys_read",
    "__x64_sys_sched_yield",
    "__x64_sys_setitimer",
    "__x64_sys_wait4",
    "__x64_sys_write",
    "account_process_tick",
    "alarm_timer",
    "alloc_pid",
    "anon_pipe_write",
    "begin_new_exec",
    "bprm_execve",
    "copy_process",
    "copy_page_range",
    "dequeue_task_fair",
    "do_anonymous_page",
    "do_exit",
    "do_filp_open",
    "do_mmap",
    "do_sys_openat2",
    "do_wait",
    "dup_mm",
    "enqueue_task_fair",
    "exit_mmap",
    "free_unref_page",
    "get_signal",
    "handle_mm_fault",
    "hrtimer_interrupt",
    "hrtimer_nanosleep",
    "hrtimer_start_range_ns",
    "it_real_fn",
    "jiffies_to_msecs",
    "kmem_cache_free",
    "ktime_get",
    "kernel_clone",
    "lock_mm_and_find_vma",
    "meminfo_proc_show",
    "mmput",
    "path_openat",
    "pipe_read",
    "pipe_write",
    "proc_pid_status",
    "release_task",
    "rcu_core",
    "sched_clock_cpu",
    "sched_tick",
    "scheduler_tick",
    "seq_printf",
    "seq_read_iter",
    "show_map_vma",
    "task_tick_fair",
    "tick_nohz_idle_enter",
    "tick_sched_handle",
    "timerqueue_add",
    "try_to_wake_up",
    "unmap_region",
    "update_curr",
    "update_process_times",
    "version_proc_show",
    "vfs_open",
    "vfs_read",
    "vfs_write",
    "vma_interval_tree_insert",
    "wake_up_new_task",
    "zap_pte_range",
];

const TRACEPOINTS: &[&str] = &[
    "hrtimer_expire_entry",
    "page_fault_user",
    "sched_process_exec",
    "sched_process_fork",
    "sched_switch",
    "sched_wakeup",
    "signal_generate",
    "sys_enter",
    "timer_start",
];

/// The kernel has more than so many symbols.
const MOST_SYMBOLS: usize = 90_000;

/// Who calls these may not come back for minutes, and a probe of their return waits for them.
const SLEEPS_LONG: &[&str] = &[
    "schedule",
    "do_wait",
    "kthread",
    "rcu_",
    "wait_",
    "do_sys_poll",
    "ep_poll",
    "do_select",
    "core_sys_select",
    "kern_select",
    "smpboot_",
    "io_schedule",
    "kcompactd",
    "kswapd",
    "khugepaged",
    "oom_reaper",
    "tty_",
    "n_tty_",
    "freezer",
];

/// A function of the guest.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) address: u64,
    size: u64,
}

/// A place for a probe.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// As a request has it.
    pub(crate) site: String,
    pub(crate) address: u64,
    /// The function begins there.
    pub(crate) entry: bool,
    /// Who calls the function comes back soon.
    pub(crate) returns: bool,
}

/// Functions of the guest's kernel that have a name of their own, and what else probes need to know.
#[derive(Debug)]
pub(crate) struct Sites {
    text: KernelText,
    all: Vec<Function>,
    often: Vec<Function>,
    tracepoints: Vec<(&'static str, u64)>,
}

impl Sites {
    /// Those that run often, and so many others that stand together anywhere.
    pub(crate) fn of(
        guest: &Guest,
        qmp: &mut Qmp,
        random: &mut Random,
        others: usize,
    ) -> Result<Self, Failure> {
        let variable = |name: &&str| format!("__tracepoint_{name}");
        let names = OFTEN.iter().map(ToString::to_string);
        let names: Vec<_> = names.chain(TRACEPOINTS.iter().map(variable)).collect();
        let said = guest.sh(&format!("grep -wE '{}' /proc/kallsyms", names.join("|")))?;
        let mut addresses: HashMap<&str, Vec<u64>> = HashMap::new();
        for line in said.lines() {
            let mut words = line.split_whitespace();
            let address = words
                .next()
                .and_then(|word| u64::from_str_radix(word, 16).ok());
            if let (Some(address), Some(name), None) = (address, words.nth(1), words.next()) {
                addresses.entry(name).or_default().push(address);
            }
        }
        let single = |name: &str| match addresses.get(name)?.as_slice() {
            [address] => Some(*address),
            _ => None,
        };
        let mut often = Vec::new();
        for address in OFTEN.iter().filter_map(|name| single(name)) {
            let told = qmp.execute("query-symbols", json!({"pattern": format!("{address:#x}")}))?;
            often.extend(function(&told["symbols"][0]));
        }
        let traced = TRACEPOINTS.iter();
        let traced = traced.filter_map(|name| Some((*name, single(&variable(name))?)));
        let from = random.index(MOST_SYMBOLS.saturating_sub(others).max(1));
        let window = json!({"pattern": "*", "skip": from, "limit": others});
        let told = qmp.execute("query-symbols", window)?;
        let all = told["symbols"].as_array().into_iter().flatten();
        let found = Self {
            text: KernelText::of(qmp, super::KERNEL)?,
            all: all.filter_map(function).collect(),
            often,
            tracepoints: traced.collect(),
        };
        match (found.all.len(), found.often.len(), found.tracepoints.len()) {
            (1000.., 40.., 5..) => Ok(found),
            counts => Err(Failure::new(format!("too few to choose from: {counts:?}"))),
        }
    }

    /// A tracepoint, and its address.
    pub(crate) fn tracepoint(&self, random: &mut Random) -> Option<(&'static str, u64)> {
        random.one_of(&self.tracepoints).copied()
    }

    /// Any function, but more likely one that the guest comes by often.
    fn function(&self, random: &mut Random) -> Option<&Function> {
        match random.percent(65) {
            true => random.one_of(&self.often),
            false => random.one_of(&self.all),
        }
    }

    /// A function's entry or any of its instructions; now and then no instruction at all.
    pub(crate) fn place(&self, random: &mut Random) -> Option<Place> {
        let function = self.function(random)?;
        let boundaries = self.text.instructions(function.address, function.size)?;
        let entry = entry(&boundaries.first()?.bytes);
        let offset = match random.below(20) {
            0..=9 => entry,
            10..=18 => random.one_of(&boundaries)?.offset,
            _ => random.below(function.size),
        };
        // A probe of a function is put behind what may stand first in it.
        let offset = if offset == 0 { entry } else { offset };
        let address = function.address + offset;
        // Of the others it is not known whether there are several.
        let named = OFTEN.contains(&function.name.as_str()) && random.percent(80);
        let site = match named {
            true => format!("{}+{offset:#x}", function.name),
            false => format!("{address:#x}"),
        };
        Some(Place {
            site,
            address,
            entry: offset == entry,
            returns: !SLEEPS_LONG
                .iter()
                .any(|start| function.name.starts_with(start)),
        })
    }

    /// Where the tracer's nop is in a function that runs often.
    pub(crate) fn nop(&self, random: &mut Random) -> Option<String> {
        let function = random.one_of(&self.often)?;
        let boundaries = self.text.instructions(function.address, function.size)?;
        let entry = entry(&boundaries.first()?.bytes);
        Some(format!("{}+{entry:#x}", function.name))
    }
}

/// A symbol of text, when it is one that can be probed.
fn function(symbol: &Value) -> Option<Function> {
    let text = symbol["type"] == "T" || symbol["type"] == "t";
    let name = symbol["name"].as_str()?;
    let size = symbol["size"].as_u64()?;
    // What stands before functions is no code.
    let code = text && size >= 16 && !name.starts_with("__pfx_");
    code.then_some(Function {
        name: name.to_owned(),
        address: number(&symbol["address"])?,
        size,
    })
}

/// Where the tracer's nop is: behind the landing place of indirect calls, where there is one.
fn entry(first: &[u8]) -> u64 {
    match first {
        [0xf3, 0x0f, 0x1e, 0xfa] => 4,
        _ => 0,
    }
}
