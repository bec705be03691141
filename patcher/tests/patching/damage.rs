//! Kernel data that a hostile guest has damaged.

use super::*;

/// Words of the kernel that are read on the way to a change.
fn words_of_interest(guest: &KernelGuest) -> Vec<Gva> {
    let init = guest.at("init_task");
    let task = |member| init.offset(guest.field("task_struct", member));
    let rq = |member| {
        guest
            .per_cpu("runqueues", 0)
            .offset(guest.field("rq", member))
    };
    let records = guest
        .space()
        .read_pointer(guest.at("ftrace_pages_start"))
        .unwrap();
    let group = |member| records.offset(guest.field("ftrace_page", member));
    let mutex = guest.field("mutex", "owner");
    // Entries that map the text: by the index of its addresses at each level.
    let text = guest.at(FUNCTION).0;
    let index = |level: u64| (text >> (12 + 9 * (level - 1)) & 0x1ff) * 8;
    let hole = |level: u64| (0xffff_ffff_ff80_0000_u64 >> (12 + 9 * (level - 1)) & 0x1ff) * 8;
    vec![
        task("tasks"),
        task("thread_node"),
        task("signal"),
        task("stack"),
        task("thread.sp"),
        task("ret_stack"),
        task("rethooks.first"),
        guest
            .at("init_signals")
            .offset(guest.field("signal_struct", "thread_head")),
        rq("curr"),
        rq("idle"),
        rq("cfs_tasks"),
        guest.at("modules"),
        guest.at("kprobe_table"),
        guest.at("kprobe_table").offset(8),
        guest.at("ftrace_pages_start"),
        group("records"),
        group("index"),
        group("next"),
        guest.at("__per_cpu_offset"),
        guest.at("__cpu_possible_mask"),
        guest.at("text_mutex").offset(mutex),
        guest.at("klp_mutex").offset(mutex),
        guest.at("nr_threads"),
        guest.at("system_state"),
        guest.at("phys_base"),
        guest.at("__start___jump_table"),
        guest.at("linux_banner"),
        guest.at("init_top_pgt").offset(index(4)),
        guest.at("level3_kernel_pgt").offset(index(3)),
        guest.at("level2_kernel_pgt").offset(index(2)),
        guest.at("level3_kernel_pgt").offset(hole(3)),
        guest.at("level2_fixmap_pgt").offset(hole(2)),
        guest.at("level2_fixmap_pgt").offset(hole(2) + 8),
    ]
}

#[test]
fn damaged_kernel_data_are_errors_at_worst() {
    for name in KERNELS {
        let mut guest = kernel_guest::guest(name);
        let undamaged = guest.memory();
        let (mut fine, mut refused) = (0, 0);
        for at in words_of_interest(&guest) {
            // Found before it is damaged: afterwards nothing may lead there.
            let gpa = guest.space().mapping(at).unwrap().gpa;
            let old = guest.get(at, 8);
            let number = u64::from_le_bytes(old.clone().try_into().unwrap());
            for wild in [
                0,
                1,
                at.0,
                at.0 + 8,
                number ^ 0x1000,
                number ^ 1,
                gpa.0 & !0xfff | 0x63,
                guest.at("init_task").0,
                0x4141_4141_4141_4141,
                0x000f_ffff_ffff_f063,
                u64::MAX,
            ] {
                guest.image.write(gpa, &wild.to_le_bytes()).unwrap();
                let mut patcher = patcher(&guest);
                match redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO) {
                    Ok(applied) => {
                        fine += 1;
                        let _ = patcher.tasks(&mut guest.image);
                        // Whatever else is damaged, what was changed can be changed back.
                        revert(&mut patcher, &mut guest, applied.id).unwrap();
                    }
                    Err(_) => refused += 1,
                }
                guest.image.write(gpa, &old).unwrap();
                if patcher.list().arena.is_none() {
                    continue;
                }
                match patcher.collect(&mut guest.image) {
                    Ok(_) => assert!(patcher.release(&mut guest.image).unwrap()),
                    // What was changed back now looked like another kernel.
                    Err(_) => guest = kernel_guest::guest(name),
                }
            }
        }
        assert!(
            fine > 0 && refused > 0,
            "{name}: {fine} fine, {refused} refused"
        );
        assert!(guest.memory() == undamaged);
    }
}
