//! Functions sent to code in the arena, and what becomes of that code.

use super::*;

#[test]
fn a_function_is_redirected_and_back_a_thousand_times() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let before = guest.memory();
        let entry = entry(&guest);
        let flags = guest.ftrace_flags(entry);
        for round in 0..1000 {
            let applied = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap();
            let code = applied.code.unwrap();
            assert_eq!(applied.address, entry);
            let bytes = guest.get(entry, 5);
            assert_eq!(bytes[0], 0xe9);
            let distance = i32::from_le_bytes(bytes[1..].try_into().unwrap());
            assert_eq!(entry.offset(5).displace(distance.into()), code.entry);
            assert_eq!(guest.get(code.entry, 4), [0x31, 0xc0, 0xc3, 0xcc]);
            assert_eq!(guest.space().read_u64(flags).unwrap(), 1 << 25);
            let reverted = revert(&mut patcher, &mut guest, applied.id).unwrap();
            assert_eq!(reverted.collected.freed, [applied.id], "round {round}");
            assert_eq!(guest.get(code.entry, 4), [0xcc; 4]);
            assert_eq!(guest.space().read_u64(flags).unwrap(), 0);
        }
        assert!(patcher.release(&mut guest.image).unwrap());
        assert!(guest.memory() == before);
        assert!(patcher.list().arena.is_none());
    }
}

/// ftrace does not count who begins while its record is marked, and minds when he ends without the mark.
#[test]
fn ftrace_is_kept_away_until_nobody_traces_the_function() {
    const MARK: u64 = 1 << 25;
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let entry = entry(&guest);
        let at = guest.ftrace_flags(entry);
        let flags = |guest: &KernelGuest| guest.space().read_u64(at).unwrap();
        let other = guest.at("vfs_read");
        for (only, not, stays) in [
            (vec![], vec![], true),
            (vec![entry], vec![], true),
            (vec![other, entry], vec![], true),
            (vec![], vec![other], true),
            (vec![other], vec![], false),
            (vec![], vec![other, entry], false),
        ] {
            let what = format!("{name}: {only:?}, {not:?}");
            let applied = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap();
            guest.somebody_traces(&only, &not);
            revert(&mut patcher, &mut guest, applied.id).unwrap();
            assert_eq!(guest.get(entry, 5), NOP5, "{what}");
            assert_eq!(flags(&guest), if stays { MARK } else { 0 }, "{what}");
            assert_eq!(patcher.has_left_marks(), stays, "{what}");
            // It stays for a new change, and whatever is left of it goes with that one.
            let again = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap();
            guest.nobody_traces();
            patcher.collect(&mut guest.image).unwrap();
            assert_eq!(flags(&guest), MARK, "{what}");
            revert(&mut patcher, &mut guest, again.id).unwrap();
            assert_eq!(flags(&guest), 0, "{what}");
            assert!(!patcher.has_left_marks(), "{what}");
        }
        // By itself, when the guest ends.
        let applied = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap();
        guest.somebody_traces(&[entry], &[]);
        revert(&mut patcher, &mut guest, applied.id).unwrap();
        patcher.collect(&mut guest.image).unwrap();
        assert_eq!(flags(&guest), MARK, "{name}");
        guest.nobody_traces();
        patcher.collect(&mut guest.image).unwrap();
        assert_eq!(flags(&guest), 0, "{name}");
        // A list that does not end says nothing.
        let applied = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap();
        guest.somebody_traces(&[other], &[]);
        let ops = guest.space().read_u64(guest.at("ftrace_ops_list")).unwrap();
        let next = Gva(ops).offset(guest.field("ftrace_ops", "next"));
        guest.put_u64(next, ops);
        revert(&mut patcher, &mut guest, applied.id).unwrap();
        assert_eq!(flags(&guest), MARK, "{name}");
    }
}

#[test]
fn the_arena_is_write_protected_and_not_executable_by_parts() {
    let mut guest = guest("6.12");
    let mut patcher = patcher(&guest);
    redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap();
    let arena = patcher.list().arena.unwrap();
    assert_eq!(arena.code, Gva(0xffff_ffff_ff80_0000));
    let code = guest.space().mapping(arena.code).unwrap();
    assert!(code.executable && !code.writable && code.global && !code.user);
    assert!(!guest.image.guest_may_write(code.gpa));
    let data = guest.space().mapping(arena.data).unwrap();
    assert!(!data.executable && data.writable);
}

#[test]
fn an_entry_that_somebody_owns_is_left_alone() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let entry = entry(&guest);
        let flags = guest.ftrace_flags(entry);
        for (bytes, who) in [
            ([0xe8, 1, 2, 3, 4], "ftrace"),
            ([0xe9, 1, 2, 3, 4], "optimised kprobe"),
            ([0xcc, 0x1f, 0x44, 0, 0], "breakpoint"),
        ] {
            guest.put(entry, &bytes);
            let error = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap_err();
            assert_eq!(error.word(), "Owned");
            assert!(error.to_string().contains(who), "{error}");
        }
        guest.put(entry, &NOP5);
        guest.put_u64(flags, 1);
        let error = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap_err();
        assert!(error.to_string().contains("ftrace"), "{error}");
        guest.put_u64(flags, 0);
        // A kprobe that is not armed has changed nothing yet.
        let probe = guest.alloc(0x1000);
        let node = probe.offset(guest.field("kprobe", "hlist"));
        guest.put_u64(probe.offset(guest.field("kprobe", "addr")), entry.0);
        let bucket = guest.at("kprobe_table").offset(8 * 63);
        guest.put_u64(bucket, node.0);
        let error = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap_err();
        assert!(error.to_string().contains("kprobe"), "{error}");
        guest.put_u64(node, node.0);
        assert!(redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).is_err());
        guest.put_u64(bucket, 0);
        redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap();
        let error = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap_err();
        assert!(error.to_string().contains("change 1"), "{error}");
    }
}

#[test]
fn only_whole_functions_are_redirected() {
    let guest = guest("6.12");
    let patcher = patcher(&guest);
    for site in ["version_proc_show+0x4", "linux_banner", "do_syscall_64"] {
        let request = RedirectRequest {
            site: site.parse().unwrap(),
            code: NewCode::Raw(RETURN_ZERO.to_vec()),
        };
        assert!(patcher.prepare_redirect(request).is_err(), "{site}");
    }
}

#[test]
fn bytes_that_the_guest_changed_are_not_reverted() {
    let mut guest = guest("6.12");
    let mut patcher = patcher(&guest);
    let applied = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap();
    let at = applied.address.offset(3);
    let ours = guest.get(at, 1)[0];
    guest.put(at, &[!ours]);
    let error = revert(&mut patcher, &mut guest, applied.id).unwrap_err();
    assert_eq!(
        error,
        PatchError::NotOurs {
            id: applied.id,
            at,
            ours,
            found: !ours
        }
    );
    assert_eq!(patcher.list().applied.len(), 1);
    guest.put(at, &[ours]);
    revert(&mut patcher, &mut guest, applied.id).unwrap();
}

#[test]
fn retired_code_is_kept_while_anybody_may_return_to_it() {
    for name in KERNELS {
        let mut guest = guest(name);
        let stack = guest.sleeper(55, "asleep");
        let mut patcher = patcher(&guest);
        let applied = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap();
        let code = applied.code.unwrap().code;
        guest.put_u64(stack.offset(0x20), code.at.0 + 2);
        let reverted = revert(&mut patcher, &mut guest, applied.id).unwrap();
        assert!(reverted.collected.freed.is_empty());
        let held = &patcher.list().retired[0].held_by[0];
        assert!(held.contains("asleep (pid 55)"), "{held}");
        assert_eq!(guest.get(code.at, 3), RETURN_ZERO);
        // Other code gets another place.
        let other = redirect(&mut patcher, &mut guest, FUNCTION, &[0xc3]).unwrap();
        assert_ne!(other.code.as_ref().unwrap().code.at, code.at);
        revert(&mut patcher, &mut guest, other.id).unwrap();
        // The same code may have the same place.
        let again = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap();
        assert_eq!(again.code.as_ref().unwrap().code.at, code.at);
        revert(&mut patcher, &mut guest, again.id).unwrap();
        assert_eq!(patcher.list().retired.len(), 1);
        assert!(!patcher.release(&mut guest.image).unwrap());

        guest.put_u64(stack.offset(0x20), 0);
        let collected = patcher.collect(&mut guest.image).unwrap();
        assert_eq!(collected.freed, [again.id]);
        assert_eq!(guest.get(code.at, 3), [0xcc; 3]);
        assert!(patcher.list().retired.is_empty());
    }
}

#[test]
fn nothing_is_freed_when_the_tasks_are_not_known() {
    let mut guest = guest("6.12");
    let mut patcher = patcher(&guest);
    let applied = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap();
    guest.put_u32(guest.at("nr_threads"), 9);
    let reverted = revert(&mut patcher, &mut guest, applied.id).unwrap();
    assert!(reverted.collected.undecided.is_some());
    assert_eq!(patcher.list().retired.len(), 1);
    guest.put_u32(guest.at("nr_threads"), 0);
    assert_eq!(
        patcher.collect(&mut guest.image).unwrap().freed,
        [applied.id]
    );
}

#[test]
fn a_kernel_that_went_away_takes_everything_with_it() {
    let mut guest = guest("6.12");
    let mut patcher = patcher(&guest);
    let applied = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap();
    let arena = patcher.list().arena.unwrap();
    for vcpu in guest.image.vcpus_mut() {
        vcpu.registers.lstar = 0;
    }
    match patcher.locate(&mut guest.image).unwrap_err() {
        PatchError::Gone { lost, .. } => assert_eq!(lost, [applied.id]),
        other => panic!("{other}"),
    }
    let listing = patcher.list();
    assert!(listing.applied.is_empty() && listing.arena.is_none());
    assert_eq!(listing.closed.len(), 1);
    // The hypervisor's memory is given back, too.
    assert!(patcher::guest::GuestMemory::read_u64(&guest.image, arena.code_gpa).is_err());
    // It is told once.
    match patcher.locate(&mut guest.image).unwrap_err() {
        PatchError::Locate(LocateError::StillBooting { .. }) => {}
        other => panic!("{other}"),
    }
}

#[test]
fn forgetting_names_what_is_lost() {
    let mut guest = guest("6.1");
    let mut patcher = patcher(&guest);
    let applied = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap();
    let arena = patcher.list().arena.unwrap();
    let forgotten = patcher.forget("the machine was reset");
    assert_eq!(forgotten.lost, [applied]);
    assert_eq!(forgotten.blocks, [arena.code_gpa, arena.data_gpa]);
    assert!(patcher.list().arena.is_none());
}
