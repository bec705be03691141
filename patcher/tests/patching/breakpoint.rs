//! Breakpoints in guests made of stock kernels.

use super::*;
use patcher::patch::{
    Breakpoint, BreakpointRequest, Cookie, Kind, ProbeRequest, Settled, TRAP_PORT,
};

const INT3: u8 = 0xcc;

fn arm(
    patcher: &mut Patcher,
    guest: &mut KernelGuest,
    site: &str,
    soft: bool,
) -> Result<Breakpoint, PatchError> {
    let request = BreakpointRequest {
        site: site.parse().unwrap(),
        soft,
    };
    patcher.arm_breakpoint(&mut guest.image, &request, &origin())
}

fn settle(
    patcher: &mut Patcher,
    guest: &mut KernelGuest,
    id: EntryId,
    waited_for: bool,
    spinning: bool,
) -> Result<Settled, PatchError> {
    patcher.settle_breakpoint(&mut guest.image, id, waited_for, spinning, &origin())
}

/// Nobody waits, nobody is in the loop.
fn end(patcher: &mut Patcher, guest: &mut KernelGuest, id: EntryId) -> Settled {
    settle(patcher, guest, id, false, false).unwrap()
}

#[test]
fn every_instruction_takes_a_breakpoint_or_is_refused_with_a_reason() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let handler = guest.at("asm_exc_int3");
        let handled = guest.get(handler, 16);
        let (mut taken, mut refused, mut more) = (0, 0, 0);
        for function in [FUNCTION, "vfs_read", "do_sys_poll", "schedule_timeout"] {
            let start = guest.at(function);
            let before = guest.get(start, 0x100);
            for offset in 0..0xf0 {
                let site = format!("{function}+{offset:#x}");
                match arm(&mut patcher, &mut guest, &site, offset % 2 == 0) {
                    Ok(breakpoint) => {
                        taken += 1;
                        let mut armed = before.clone();
                        let at = usize::try_from(breakpoint.address.distance_from(start)).unwrap();
                        armed[at] = INT3;
                        assert_eq!(guest.get(start, 0x100), armed, "{site}");
                        let trap = guest.get(breakpoint.trap.at, 2);
                        assert_eq!(trap, [0xe6, TRAP_PORT], "{site}");
                        let settled = end(&mut patcher, &mut guest, breakpoint.id);
                        assert!(!settled.armed && !settled.trapping);
                        let request = ProbeRequest::counting(site.parse().unwrap());
                        let prepared = patcher.prepare_probe(request).unwrap();
                        match patcher.attach_probe(&mut guest.image, &prepared, &origin()) {
                            Ok(probe) => {
                                revert(&mut patcher, &mut guest, probe.change.id).unwrap();
                            }
                            Err(_) => more += 1,
                        }
                    }
                    Err(error) => {
                        refused += 1;
                        assert!(!error.passes(), "{site}: {error}");
                    }
                }
                assert_eq!(guest.get(start, 0x100), before, "{site}");
                assert_eq!(guest.get(handler, 16), handled, "{site}");
            }
        }
        assert!(taken > 60 && refused > 100, "{name}: {taken} and {refused}");
        assert!(more > 10, "{name}: {more} that no probe can have");
        assert_eq!(patcher.list().arena.unwrap().code_slots, 0);
        assert!(!patcher.has_applied());
    }
}

#[test]
fn the_copy_goes_on_behind_and_the_loop_at_the_site() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        // The second instruction behind the entry.
        let (in_front, first, two) = instructions(&guest, 2);
        let at = first.offset(instruction_len(&guest, first) as u64);
        let bytes = guest.get(at, instruction_len(&guest, at));
        let site = format!("{FUNCTION}+{:#x}", at.distance_from(guest.at(FUNCTION)));
        let memory = guest.memory();
        let found = arm(&mut patcher, &mut guest, &site, true).unwrap();
        assert_eq!((found.address, found.place.as_str()), (at, site.as_str()));
        let spin = found.spin.unwrap();
        assert_eq!(guest.get(spin, 4), [0xf3, 0x90, 0xeb, 0xfc]);
        assert_eq!(target(&guest, spin.offset(4)), at);
        assert_eq!(guest.get(found.aside, bytes.len()), bytes);
        let len = bytes.len() as u64;
        assert_eq!(target(&guest, found.aside.offset(len)), at.offset(len));

        // Somebody is in the loop: the text is as it was, and the loop stays, whatever is freed.
        let settled = settle(&mut patcher, &mut guest, found.id, false, true).unwrap();
        assert!(!settled.armed && !settled.trapping);
        assert_eq!(guest.get(at, bytes.len()), bytes);
        assert_eq!(patcher.list().held.len(), 1);
        assert!(patcher.has_applied());
        assert!(patcher.gp_poll(patcher.gp_snapshot()).unwrap());
        guest.image.vcpus_mut()[0].registers.rip = spin.0;

        // It counts as being at the site, behind which nothing may be changed under it.
        let nothing = nops(two.len());
        let changed = change(&mut patcher, &mut guest, &in_front, &two, &nothing, true);
        let error = changed.unwrap_err();
        assert!(error.passes(), "{error}");

        // Opened, it leads to the jump; it is freed when nobody is in it.
        let settled = settle(&mut patcher, &mut guest, found.id, false, false).unwrap();
        assert_eq!(guest.get(spin, 4), [0xf3, 0x90, 0xeb, 0x00]);
        assert_eq!(settled.collected.freed, []);
        assert_eq!(patcher.gp_snapshot(), Cookie(1));
        assert!(!patcher.gp_poll(Cookie(1)).unwrap());
        guest.image.vcpus_mut()[0].registers.rip = at.0;
        assert_eq!(patcher.collect(&mut guest.image).unwrap().freed, [found.id]);
        assert_eq!(guest.get(spin, 1), [INT3]);
        guest.image.vcpus_mut()[0].registers.rip = guest.at("schedule").0;
        let (now, changed) = (guest.memory(), 64);
        let differ = memory.iter().zip(&now).filter(|(a, b)| a != b).count();
        // Only the page table entries that map the arena.
        assert!(differ < changed, "{differ} bytes");
    }
}

#[test]
fn one_breakpoint_serves_all_that_need_no_loop() {
    let mut guest = guest("6.12");
    let mut patcher = patcher(&guest);
    let (site, at, bytes) = instructions(&guest, 1);
    let first = arm(&mut patcher, &mut guest, &site, false).unwrap();
    assert_eq!(arm(&mut patcher, &mut guest, &site, false).unwrap(), first);
    assert!(first.spin.is_none());
    let error = arm(&mut patcher, &mut guest, &site, true).unwrap_err();
    assert_eq!(error.word(), "Owned", "{error}");
    let second = arm(&mut patcher, &mut guest, "vfs_read", true).unwrap();
    // What is behind it is told as if it were not there.
    for offset in 1..0x40_u64 {
        let near = format!(
            "{FUNCTION}+{:#x}",
            at.distance_from(guest.at(FUNCTION)) + offset
        );
        let boundary = bytes.len() as u64 <= offset;
        match arm(&mut patcher, &mut guest, &near, true) {
            Ok(other) => {
                assert!(boundary, "{near} is inside {site}");
                end(&mut patcher, &mut guest, other.id);
            }
            Err(error) if offset == bytes.len() as u64 => {
                assert_ne!(error.word(), "NotWholeInstructions", "{near}");
            }
            Err(_) => {}
        }
    }
    // The trap is there as long as any of them.
    let settled = settle(&mut patcher, &mut guest, first.id, true, false).unwrap();
    assert!(settled.armed && settled.trapping);
    let settled = end(&mut patcher, &mut guest, first.id);
    assert!(!settled.armed && settled.trapping);
    assert_eq!(guest.get(at, bytes.len()), bytes);
    assert!(!end(&mut patcher, &mut guest, second.id).trapping);
    // Again, and one that never was.
    for id in [first.id, EntryId(4711)] {
        assert_eq!(end(&mut patcher, &mut guest, id), Settled::default());
    }
}

#[test]
fn they_are_taken_back_by_their_own_rules_only() {
    let mut guest = guest("6.12");
    let mut patcher = patcher(&guest);
    let (site, at, bytes) = instructions(&guest, 1);
    let armed = arm(&mut patcher, &mut guest, &site, false).unwrap();
    let kinds: Vec<_> = patcher
        .list()
        .applied
        .iter()
        .map(|e| (e.id, e.kind))
        .collect();
    assert_eq!(kinds.iter().filter(|(_, k)| *k == Kind::Trap).count(), 1);
    for (id, _) in kinds {
        let error = revert(&mut patcher, &mut guest, id).unwrap_err();
        assert!(error.to_string().contains("release the vCPU"), "{error}");
    }
    // The guest has begun to handle it: wherever it is in front of the trap, or with one pending.
    let before = guest.image.vcpus_mut()[1].registers;
    for rip in [guest.at("asm_exc_int3"), armed.trap.at] {
        guest.image.vcpus_mut()[1].registers.rip = rip.0;
        let error = settle(&mut patcher, &mut guest, armed.id, false, false).unwrap_err();
        assert!(error.passes(), "{error}");
        assert_eq!(guest.get(at, 1), [INT3]);
    }
    // An NMI came in between.
    guest.image.vcpus_mut()[1].registers = before;
    let stack = Gva(before.rsp);
    let word = guest.get(stack, 8);
    guest.put_u64(stack, armed.trap.at.0);
    let error = settle(&mut patcher, &mut guest, armed.id, false, false).unwrap_err();
    assert!(error.passes(), "{error}");
    guest.put(stack, &word);
    guest.image.vcpus_mut()[1].registers.rip = at.0;
    guest.image.vcpus_mut()[1].reinjects = true;
    let error = settle(&mut patcher, &mut guest, armed.id, false, false).unwrap_err();
    assert!(error.passes(), "{error}");
    // Held there, before the instruction, it does not stand in the way.
    guest.image.vcpus_mut()[1].reinjects = false;
    assert!(!end(&mut patcher, &mut guest, armed.id).armed);
    assert_eq!(guest.get(at, bytes.len()), bytes);

    // What the guest has changed is not ours to put back.
    let armed = arm(&mut patcher, &mut guest, &site, false).unwrap();
    guest.put(at, &[0x90]);
    let error = settle(&mut patcher, &mut guest, armed.id, false, false).unwrap_err();
    assert_eq!(error.word(), "NotOurs", "{error}");
    guest.put(at, &[INT3]);
    end(&mut patcher, &mut guest, armed.id);
}

#[test]
fn sites_and_handlers_that_cannot_have_one_are_refused() {
    let mut guest = guest("6.12");
    let mut patcher = patcher(&guest);
    for (site, word) in [
        ("no_such_symbol_anywhere", "NoSuchSite"),
        ("linux_banner", "NotText"),
        ("start_kernel", "InitText"),
        ("entry_SYSCALL_64", "ForbiddenText"),
        ("asm_exc_int3", "ForbiddenText"),
        ("version_proc_show+0x100000", "NoSuchSite"),
    ] {
        let error = arm(&mut patcher, &mut guest, site, false).unwrap_err();
        assert_eq!(error.word(), word, "{site}: {error}");
    }
    let (site, at, _) = instructions(&guest, 2);
    let probe = ProbeRequest::counting(site.parse().unwrap());
    let prepared = patcher.prepare_probe(probe).unwrap();
    let probe = patcher
        .attach_probe(&mut guest.image, &prepared, &origin())
        .unwrap();
    let error = arm(&mut patcher, &mut guest, &at.to_string(), false).unwrap_err();
    assert_eq!(error.word(), "Owned", "{error}");
    assert!(error.to_string().contains("change 1"), "{error}");
    revert(&mut patcher, &mut guest, probe.change.id).unwrap();

    // The handler, or the way to it, is not what is known.
    let memory = guest.memory();
    let cr4 = guest.image.vcpus_mut()[1].registers.cr4;
    guest.image.vcpus_mut()[1].registers.cr4 |= 1 << 32;
    let error = arm(&mut patcher, &mut guest, &site, false).unwrap_err();
    assert!(error.to_string().contains("FRED"), "{error}");
    guest.image.vcpus_mut()[1].registers.cr4 = cr4;
    let handler = guest.at("asm_exc_int3");
    let was = guest.get(handler, 8);
    guest.put(handler, &[0xfc; 8]);
    let error = arm(&mut patcher, &mut guest, &site, false).unwrap_err();
    assert_eq!(error.word(), "NoBreakpoints", "{error}");
    guest.put(handler, &was);
    assert!(guest.memory() == memory);
    let armed = arm(&mut patcher, &mut guest, &site, true).unwrap();
    end(&mut patcher, &mut guest, armed.id);
    assert!(guest.memory() == memory, "the handler is as it was");
}

#[test]
fn a_vcpu_waits_where_it_may_be_interrupted() {
    let mut guest = guest("6.12");
    let mut patcher = patcher(&guest);
    let at = guest.at(FUNCTION);
    let spin = |patcher: &mut Patcher, guest: &mut KernelGuest, rip: Gva, rflags: u64| {
        guest.image.vcpus_mut()[1].registers.rip = rip.0;
        guest.image.vcpus_mut()[1].registers.rflags = rflags;
        patcher.spin_vcpu(&mut guest.image, 1, &origin())
    };
    for (rip, rflags) in [
        (at, 2),
        (guest.at("entry_SYSCALL_64"), 0x202),
        (guest.at("asm_exc_int3"), 0x202),
        (Gva(0x401000), 0x202),
    ] {
        let error = spin(&mut patcher, &mut guest, rip, rflags).unwrap_err();
        assert!(error.passes(), "{rip}: {error}");
    }
    let spinning = spin(&mut patcher, &mut guest, at, 0x202).unwrap();
    assert_eq!((spinning.address, spinning.place.as_str()), (at, FUNCTION));
    let slot = patcher.list().held[0].code.clone().unwrap();
    assert_eq!(guest.image.vcpus()[1].registers.rip, slot.entry.0);
    assert_eq!(slot.goes_on, [at]);
    let settled = settle(&mut patcher, &mut guest, spinning.id, false, true).unwrap();
    assert_eq!(settled, Settled::default());
    assert_eq!(guest.get(slot.entry, 4), [0xf3, 0x90, 0xeb, 0xfc]);
    end(&mut patcher, &mut guest, spinning.id);
    assert_eq!(guest.get(slot.entry, 4), [0xf3, 0x90, 0xeb, 0x00]);
    guest.image.vcpus_mut()[1].registers.rip = at.0;
    let freed = patcher.collect(&mut guest.image).unwrap().freed;
    assert_eq!(freed, [spinning.id]);
    assert!(!patcher.has_applied());
}
