//! Bytes replaced by bytes.

use super::*;

#[test]
fn the_kernel_is_found_where_kaslr_put_it() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let report = patcher.locate(&mut guest.image).unwrap();
        assert_eq!(report.slide, SLIDE);
        assert_eq!(report.text, guest.at("_stext"));
        assert_eq!(report.possible_cpus, 2);
        assert_eq!(report.release, guest.kernel.release());
    }
}

#[test]
fn one_instruction_is_changed_and_changed_back() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let before = guest.memory();
        let (site, at, old) = instructions(&guest, 1);
        let new = nops(old.len());
        let applied = change(&mut patcher, &mut guest, &site, &old, &new, false).unwrap();
        assert_eq!(applied.address, at);
        assert_eq!(applied.evidence, Evidence::SingleInstruction);
        assert_eq!(guest.get(at, old.len()), new);
        let changed = guest.memory();
        let differ = before.iter().zip(&changed).filter(|(a, b)| a != b).count();
        assert!(differ <= old.len());
        assert_eq!(patcher.list().applied, std::slice::from_ref(&applied));

        let reverted = revert(&mut patcher, &mut guest, applied.id).unwrap();
        assert_eq!(reverted.entry, applied);
        assert!(guest.memory() == before);
        assert!(patcher.list().applied.is_empty());
        assert_eq!(
            revert(&mut patcher, &mut guest, applied.id).unwrap_err(),
            PatchError::NoSuchEntry { id: applied.id }
        );
    }
}

#[test]
fn a_run_time_address_is_a_site_as_well() {
    let mut guest = guest("6.12");
    let mut patcher = patcher(&guest);
    let (_, at, old) = instructions(&guest, 1);
    let new = nops(old.len());
    let applied = change(&mut patcher, &mut guest, &at.to_string(), &old, &new, false).unwrap();
    assert!(applied.place.starts_with(FUNCTION), "{}", applied.place);
    let site = "0xffffffffc0001000";
    let error = change(&mut patcher, &mut guest, site, &old, &new, false).unwrap_err();
    assert_eq!(error.word(), "NotText");
    assert!(error.to_string().contains(site), "{error}");
}

#[test]
fn unexpected_bytes_are_shown() {
    let mut guest = guest("6.12");
    let mut patcher = patcher(&guest);
    let before = guest.memory();
    let (site, at, old) = instructions(&guest, 1);
    let mut wrong = old.clone();
    *wrong.last_mut().unwrap() ^= 0xff;
    let new = nops(old.len());
    let error = change(&mut patcher, &mut guest, &site, &wrong, &new, false).unwrap_err();
    match error {
        PatchError::Mismatch {
            at: where_,
            first,
            found,
            ..
        } => {
            assert_eq!((where_, first), (at, old.len() - 1));
            assert_eq!(found, patcher::text::hex(&old));
        }
        other => panic!("{other}"),
    }
    assert!(guest.memory() == before);
}

#[test]
fn instructions_are_not_cut_unless_forced() {
    let mut guest = guest("6.12");
    let mut patcher = patcher(&guest);
    let entry = entry(&guest);
    let offset = entry.distance_from(guest.at(FUNCTION)) + 1;
    let site = format!("{FUNCTION}+{offset:#x}");
    let old = &NOP5[1..3];
    let error = change(&mut patcher, &mut guest, &site, old, &nops(2), false).unwrap_err();
    assert_eq!(error.word(), "NotWholeInstructions");
    // Whole before, and not after.
    let (site, _, old) = instructions(&guest, 2);
    let mut cut = nops(old.len());
    *cut.last_mut().unwrap() = 0xe8;
    let error = change(&mut patcher, &mut guest, &site, &old, &cut, false).unwrap_err();
    assert_eq!(error.word(), "NotWholeInstructions");
    let applied = change(&mut patcher, &mut guest, &site, &old, &cut, true).unwrap();
    assert!(matches!(applied.evidence, Evidence::ScanClear { .. }));
    revert(&mut patcher, &mut guest, applied.id).unwrap();
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let mut guest = guest("6.12");
    let mut patcher = patcher(&guest);
    for (expect, write) in [
        (vec![], vec![]),
        (vec![0x90], vec![0x90, 0x90]),
        (vec![0x90; 257], vec![0xcc; 257]),
        (vec![0x90], vec![0x90]),
    ] {
        let error = change(&mut patcher, &mut guest, FUNCTION, &expect, &write, false).unwrap_err();
        assert_eq!(error.word(), "BadRequest");
    }
    let site = "no_such_function";
    let error = change(&mut patcher, &mut guest, site, &[1], &[2], false).unwrap_err();
    assert_eq!(error.word(), "NoSuchSite");
}

#[test]
fn text_that_is_out_of_bounds_is_refused_even_when_forced() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        for (site, word) in [
            ("start_kernel", "InitText"),
            ("do_syscall_64", "ForbiddenText"),
            ("entry_SYSCALL_64", "ForbiddenText"),
            ("default_idle", "ForbiddenText"),
            ("kprobe_int3_handler", "ForbiddenText"),
            ("__x86_return_thunk", "ForbiddenText"),
            ("__SCT__cond_resched", "ForbiddenText"),
            ("linux_banner", "NotText"),
            ("init_task", "NotText"),
        ] {
            let error = change(&mut patcher, &mut guest, site, &[0x90], &[0xcc], true).unwrap_err();
            assert_eq!(error.word(), word, "{name} {site}: {error}");
        }
    }
}

#[test]
fn a_context_inside_several_instructions_is_waited_for() {
    for name in KERNELS {
        let mut guest = guest(name);
        let stack = guest.sleeper(100, "sleeper");
        let mut patcher = patcher(&guest);
        let before = guest.memory();
        let (site, at, old) = instructions(&guest, 2);
        let new = nops(old.len());

        // A return address on a sleeper's stack.
        guest.put_u64(stack.offset(0x40), at.0 + 1);
        let error = change(&mut patcher, &mut guest, &site, &old, &new, false).unwrap_err();
        assert!(error.passes());
        assert!(error.to_string().contains("sleeper (pid 100)"), "{error}");
        guest.put_u64(stack.offset(0x40), 0);

        // A vCPU's instruction pointer: inside, and at the start with an instruction begun.
        let rip = guest.image.vcpus()[1].registers.rip;
        guest.image.vcpus_mut()[1].registers.rip = at.0 + 1;
        let error = change(&mut patcher, &mut guest, &site, &old, &new, false).unwrap_err();
        assert!(
            error.passes() && error.to_string().contains("vCPU 1"),
            "{error}"
        );
        guest.image.vcpus_mut()[1].registers.rip = at.0;
        guest.image.vcpus_mut()[1].reinjects = true;
        let error = change(&mut patcher, &mut guest, &site, &old, &new, false).unwrap_err();
        assert!(
            error.passes() && error.to_string().contains("vCPU 1"),
            "{error}"
        );
        guest.image.vcpus_mut()[1].reinjects = false;
        // In user mode the same number means nothing.
        guest.image.vcpus_mut()[1].registers.rip = at.0 + 1;
        guest.image.vcpus_mut()[1].registers.cs = 0x33;
        assert!(guest.memory() == before);

        let applied = change(&mut patcher, &mut guest, &site, &old, &new, false).unwrap();
        let Evidence::ScanClear { tasks, vcpus } = applied.evidence else {
            panic!("{:?}", applied.evidence)
        };
        assert_eq!((tasks, vcpus), (3, 2));
        guest.image.vcpus_mut()[1].registers.cs = 0x10;
        guest.image.vcpus_mut()[1].registers.rip = rip;
        revert(&mut patcher, &mut guest, applied.id).unwrap();
        assert!(guest.memory() == before);
    }
}

#[test]
fn a_jump_into_the_bytes_is_refused() {
    let mut guest = guest("6.12");
    let mut patcher = patcher(&guest);
    let (site, at, old) = instructions(&guest, 2);
    let second = instruction_len(&guest, at);
    // The nop at the entry becomes a jump to the second instruction.
    let entry = entry(&guest);
    let distance = i32::try_from(at.offset(second as u64).distance_from(entry) - 5).unwrap();
    let mut jump = vec![0xe9];
    jump.extend(distance.to_le_bytes());
    guest.put(entry, &jump);
    // One instruction that is as long as both.
    let mut long = nops(old.len());
    long.fill(0x66);
    *long.last_mut().unwrap() = 0x90;
    let error = change(&mut patcher, &mut guest, &site, &old, &long, false).unwrap_err();
    assert_eq!(error.word(), "JumpInside", "{error}");
    // With an instruction there it is fine.
    change(
        &mut patcher,
        &mut guest,
        &site,
        &old,
        &nops(old.len()),
        false,
    )
    .unwrap();
}

#[test]
fn a_change_may_cross_a_page() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let before = guest.memory();
        // The first instruction of plain text that crosses a page.
        let symbols = guest.kernel.symbols();
        let start = guest.link("version_proc_show");
        let found = (1..4096).find_map(|page| {
            let border = (start.0 & !0xfff) + page * 0x1000;
            let place = symbols.function_at(patcher::guest::LinkAddr(border - 1))?;
            let function = place.symbol.address()?.at(SLIDE);
            let mut at = function;
            let border = Gva(border + SLIDE.0);
            while at < border {
                let len = instruction_len(&guest, at);
                let crosses = at.0 < border.0 && at.offset(len as u64) > border;
                if len == 0 || crosses {
                    return (crosses && len < 15).then_some((at, len));
                }
                at = at.offset(len as u64);
            }
            None
        });
        let (at, len) = found.unwrap();
        let (old, new) = (guest.get(at, len), nops(len));
        match change(&mut patcher, &mut guest, &at.to_string(), &old, &new, false) {
            Ok(applied) => {
                assert_eq!(guest.get(at, len), new);
                revert(&mut patcher, &mut guest, applied.id).unwrap();
            }
            Err(error) => panic!("{at}: {error}"),
        }
        assert!(guest.memory() == before);
    }
}

#[test]
fn what_the_guest_rewrites_is_left_alone() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        for table in ["__start___jump_table", "__start_static_call_sites"] {
            let entry = guest.link(table);
            let sites = (0..2000).map(|index| {
                let size = if table.contains("jump") { 16 } else { 8 };
                let at = entry.offset(index * size);
                let raw = guest.get(at.at(SLIDE), 4);
                let distance = i32::from_le_bytes(raw.try_into().unwrap());
                at.displace(distance.into())
            });
            let text_range = guest.link("_stext")..guest.link("__noinstr_text_start");
            let site = sites
                .filter(|site| text_range.contains(site))
                .nth(20)
                .unwrap();
            let at = site.at(SLIDE);
            let len = instruction_len(&guest, at);
            let (old, new) = (guest.get(at, len), nops(len));
            let site = at.to_string();
            let error = change(&mut patcher, &mut guest, &site, &old, &new, true).unwrap_err();
            assert_eq!(error.word(), "Owned", "{name} {table}: {error}");
            assert!(error.to_string().contains("rewrites"), "{error}");
        }
    }
}

#[test]
fn a_guest_that_changes_its_own_text_is_busy() {
    for name in KERNELS {
        let mut guest = guest(name);
        guest.sleeper(77, "modprobe");
        let mut patcher = patcher(&guest);
        let (site, _, old) = instructions(&guest, 1);
        let new = nops(old.len());
        let tasks = guest.field("task_struct", "tasks");
        let first = guest.at("init_task").offset(tasks);
        let owner = guest.space().read_u64(first).unwrap() - tasks;
        for lock in [
            "text_mutex",
            "ftrace_lock",
            "jump_label_mutex",
            "kprobe_mutex",
        ] {
            let at = guest.at(lock).offset(guest.field("mutex", "owner"));
            guest.put_u64(at, owner | 1);
            let error = change(&mut patcher, &mut guest, &site, &old, &new, false).unwrap_err();
            assert!(error.passes());
            let said = error.to_string();
            assert!(
                said.contains(lock) && said.contains("modprobe (pid 77)"),
                "{said}"
            );
            let error = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap_err();
            assert_eq!(error.word(), "GuestBusy");
            // Flags alone are no owner.
            guest.put_u64(at, 1);
        }
        let module = guest.alloc(0x1000);
        let (list, modules) = (guest.field("module", "list"), guest.at("modules"));
        guest.put_u64(modules, module.offset(list).0);
        guest.put_u64(module.offset(list), modules.0);
        guest.put(module.offset(guest.field("module", "name")), b"fresh");
        let coming = guest
            .kernel
            .types()
            .constant("module_state", "MODULE_STATE_COMING")
            .unwrap();
        let state = module.offset(guest.field("module", "state"));
        guest.put_u32(state, u32::try_from(coming).unwrap());
        let error = change(&mut patcher, &mut guest, &site, &old, &new, false).unwrap_err();
        assert!(
            error.passes() && error.to_string().contains("fresh"),
            "{error}"
        );
        guest.put_u32(state, 0);
        change(&mut patcher, &mut guest, &site, &old, &new, false).unwrap();
    }
}

#[test]
fn text_at_an_entry_tells_ftrace_as_well() {
    let mut guest = guest("6.12");
    let mut patcher = patcher(&guest);
    let entry = entry(&guest);
    let flags = guest.ftrace_flags(entry);
    let offset = entry.distance_from(guest.at(FUNCTION));
    let site = format!("{FUNCTION}+{offset:#x}");
    let new = [0x31, 0xc0, 0xc3, 0x90, 0x90];
    let applied = change(&mut patcher, &mut guest, &site, &NOP5, &new, false).unwrap();
    assert_eq!(guest.space().read_u64(flags).unwrap(), 1 << 25);
    revert(&mut patcher, &mut guest, applied.id).unwrap();
    assert_eq!(guest.space().read_u64(flags).unwrap(), 0);
}
