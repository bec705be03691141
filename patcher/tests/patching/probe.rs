//! Probes in guests made of stock kernels.

use super::*;
use patcher::patch::{Callback, Cookie, Detached, ProbeInfo, ProbeRequest};

fn attach(
    patcher: &mut Patcher,
    guest: &mut KernelGuest,
    site: &str,
) -> Result<ProbeInfo, PatchError> {
    attach_as(
        patcher,
        guest,
        ProbeRequest::counting(site.parse().unwrap()),
    )
}

fn attach_as(
    patcher: &mut Patcher,
    guest: &mut KernelGuest,
    request: ProbeRequest,
) -> Result<ProbeInfo, PatchError> {
    let prepared = patcher.prepare_probe(request)?;
    let new = patcher.attach_probe(&mut guest.image, &prepared, &origin())?;
    assert_eq!(change_of(patcher, &new.probe), new.change);
    Ok(new.probe)
}

/// The change that a probe is in.
fn change_of(patcher: &Patcher, probe: &ProbeInfo) -> Applied {
    let mut all = patcher.list().applied.into_iter();
    all.find(|entry| entry.address == probe.address).unwrap()
}

fn detach(
    patcher: &mut Patcher,
    guest: &mut KernelGuest,
    id: EntryId,
) -> Result<Detached, PatchError> {
    patcher.detach_probe(&mut guest.image, id, &origin())
}

#[test]
fn a_probe_at_the_entry_counts_and_comes_back() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let at = entry(&guest);
        let applied = attach(&mut patcher, &mut guest, FUNCTION).unwrap();
        assert_eq!(applied.address, at);
        let placed = change_of(&patcher, &applied).code.unwrap();
        assert_eq!(target(&guest, at), placed.entry);
        // pushfq ; lock incq ; popfq ; jmp back: nothing of the nop is left.
        assert_eq!(target(&guest, placed.entry.offset(11)), at.offset(5));
        let counter = guest.get(placed.entry.offset(6), 4).try_into().unwrap();
        let counter = Gva(0).displace(i32::from_le_bytes(counter).into());
        guest.put_u64(counter, 41);
        assert_eq!(patcher.probes(&guest.image).unwrap()[0].hits, 41);
        let detached = detach(&mut patcher, &mut guest, applied.id).unwrap();
        assert_eq!(detached.probe.hits, 41);
        assert_eq!(detached.reverted.collected.freed, [applied.id]);
        assert_eq!(guest.get(at, 5), NOP5);
    }
}

#[test]
fn every_instruction_of_a_function_is_a_site_or_refused_with_a_reason() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let (mut taken, mut refused) = (0, 0);
        for function in [FUNCTION, "vfs_read", "do_sys_poll", "schedule_timeout"] {
            let start = guest.at(function);
            let before = guest.get(start, 0x100);
            for offset in 0..0xf0 {
                match attach(&mut patcher, &mut guest, &format!("{function}+{offset:#x}")) {
                    Ok(applied) => {
                        taken += 1;
                        detach(&mut patcher, &mut guest, applied.id).unwrap();
                    }
                    Err(error) => {
                        refused += 1;
                        assert!(!error.passes(), "{function}+{offset:#x}: {error}");
                        assert!(!error.to_string().is_empty());
                    }
                }
                assert_eq!(guest.get(start, 0x100), before, "{function}+{offset:#x}");
            }
        }
        assert!(taken > 40 && refused > 100, "{name}: {taken} and {refused}");
        assert_eq!(patcher.list().arena.unwrap().code_slots, 0);
    }
}

#[test]
fn a_trampoline_waits_for_whoever_is_in_it() {
    for name in KERNELS {
        let mut guest = guest(name);
        let stack = guest.preempted(55, "inside");
        let mut patcher = patcher(&guest);
        let earlier = patcher.gp_snapshot();
        let applied = attach(&mut patcher, &mut guest, FUNCTION).unwrap();
        let code = change_of(&patcher, &applied).code.unwrap().code;
        guest.put_u64(stack.offset(0x20), code.at.0 + 2);
        let detached = detach(&mut patcher, &mut guest, applied.id).unwrap();
        assert!(detached.reverted.collected.freed.is_empty());
        let now = patcher.gp_snapshot();
        assert!(patcher.gp_poll(earlier).unwrap());
        assert!(!patcher.gp_poll(now).unwrap());
        assert!(matches!(
            patcher.gp_poll(Cookie(now.0 + 1)),
            Err(PatchError::NoSuchCookie { .. })
        ));
        match patcher.gp_wait(&mut guest.image, now) {
            Err(PatchError::Waiting { waiting }) => {
                assert!(waiting[0].held_by[0].contains("inside (pid 55)"));
            }
            other => panic!("{other:?}"),
        }
        // Where its trampoline goes on, nothing may be changed that makes it land inside.
        let (site, at, bytes) = instructions(&guest, 1);
        assert_eq!(at, applied.address.offset(5));
        change(
            &mut patcher,
            &mut guest,
            &site,
            &bytes,
            &nops(bytes.len()),
            false,
        )
        .unwrap();
        guest.put_u64(stack.offset(0x20), 0);
        assert_eq!(
            patcher.gp_wait(&mut guest.image, now).unwrap().freed,
            [applied.id]
        );
        assert!(patcher.gp_poll(now).unwrap());
        assert_eq!(guest.get(code.at, 4), [0xcc; 4]);
    }
}

#[test]
fn nobody_sleeps_in_a_trampoline_that_only_counts() {
    let mut guest = guest(KERNELS[0]);
    let stack = guest.sleeper(55, "asleep");
    let mut patcher = patcher(&guest);
    let probe = attach(&mut patcher, &mut guest, FUNCTION).unwrap();
    let code = change_of(&patcher, &probe).code.unwrap().code;
    // An address that was left there.
    guest.put_u64(stack.offset(0x20), code.at.0 + 2);
    let detached = detach(&mut patcher, &mut guest, probe.id).unwrap();
    assert_eq!(detached.reverted.collected.freed, [probe.id]);
}

#[test]
fn what_is_no_probe_is_not_detached() {
    let mut guest = guest(KERNELS[0]);
    let mut patcher = patcher(&guest);
    let redirected = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap();
    for id in [redirected.id, EntryId(99)] {
        assert_eq!(
            detach(&mut patcher, &mut guest, id),
            Err(PatchError::NoSuchProbe { id })
        );
    }
    assert!(matches!(
        attach(&mut patcher, &mut guest, FUNCTION),
        Err(PatchError::Owned { .. } | PatchError::Displace(_))
    ));
}

/// A count that only one probe has.
fn put_hits(patcher: &Patcher, guest: &mut KernelGuest, id: EntryId, hits: u64) {
    // The first word that changes what is told of it.
    let told = |patcher: &Patcher, guest: &KernelGuest| {
        let probes = patcher.probes(&guest.image).unwrap();
        probes.iter().find(|probe| probe.id == id).unwrap().hits
    };
    let data = patcher.list().arena.unwrap().data;
    for line in (0..0x40_0000).step_by(64) {
        let at = data.offset(line);
        let before = guest.get(at, 8);
        guest.put_u64(at, hits);
        if told(patcher, guest) == hits {
            return;
        }
        guest.put_u64(at, u64::from_le_bytes(before.try_into().unwrap()));
    }
    panic!("no count of {id}");
}

#[test]
fn probes_come_to_a_site_and_go_in_any_order() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let at = entry(&guest);
        let request = |priority, callback| ProbeRequest {
            priority,
            callback,
            ..ProbeRequest::counting(FUNCTION.parse().unwrap())
        };
        let record = Callback::Record {
            registers: vec!["di".parse().unwrap(), "sp".parse().unwrap()],
            records: Some(100),
        };
        let histogram = Callback::Histogram("si".parse().unwrap());
        let mut ids = Vec::new();
        let mut targets = Vec::new();
        for (priority, callback) in [
            (0, Callback::Count),
            (5, histogram),
            (-1, record),
            (0, Callback::Count),
        ] {
            let probe = attach_as(&mut patcher, &mut guest, request(priority, callback)).unwrap();
            assert_eq!((probe.address, probe.hits), (at, 0));
            ids.push(probe.id);
            targets.push(target(&guest, at));
        }
        targets.dedup();
        assert_eq!(
            targets.len(),
            4,
            "each set of probes has its own trampoline"
        );
        // One change of the text, and what is not needed any more is gone.
        assert_eq!(patcher.list().applied.len(), 1);
        patcher.collect(&mut guest.image).unwrap();
        assert_eq!(patcher.list().retired, []);
        put_hits(&patcher, &mut guest, ids[0], 41);
        put_hits(&patcher, &mut guest, ids[3], 17);
        let order: Vec<_> = patcher.probes(&guest.image).unwrap();
        assert_eq!(order.iter().map(|probe| probe.id).collect::<Vec<_>>(), ids);
        let rows = patcher.histogram(&guest.image, ids[1]).unwrap().cpus;
        assert!(!rows.is_empty() && rows.iter().all(Vec::is_empty));
        let records = patcher.records(&guest.image, ids[2], 0).unwrap();
        assert_eq!(
            (records.records.len(), records.lost, records.next),
            (0, 0, 0)
        );
        assert!(patcher.histogram(&guest.image, ids[0]).is_err());

        // The first one goes; its number is no probe any more, though the change has it.
        let detached = detach(&mut patcher, &mut guest, ids[0]).unwrap();
        assert_eq!(detached.probe.hits, 41);
        assert!(matches!(
            detach(&mut patcher, &mut guest, ids[0]),
            Err(PatchError::NoSuchProbe { .. })
        ));
        for (id, hits) in [(ids[2], 0), (ids[3], 17), (ids[1], 0)] {
            let detached = detach(&mut patcher, &mut guest, id).unwrap();
            assert_eq!(detached.probe.hits, hits);
            assert_eq!(detached.reverted.collected.freed.last(), Some(&id));
        }
        assert_eq!(guest.get(at, 5), NOP5);
        let arena = patcher.list().arena.unwrap();
        assert_eq!((arena.code_slots, arena.data_used), (0, 0));
    }
}

#[test]
fn several_probes_are_one_change() {
    let mut guest = guest(KERNELS[0]);
    let mut patcher = patcher(&guest);
    let prepare = |patcher: &Patcher, site: &str| {
        let request = ProbeRequest::counting(site.parse().unwrap());
        patcher.prepare_probe(request).unwrap()
    };
    let all: Vec<_> = [FUNCTION, "vfs_read", FUNCTION]
        .map(|site| prepare(&patcher, site))
        .into();
    let mut wrong = all.clone();
    wrong.push(prepare(&patcher, &format!("{FUNCTION}+1")));
    patcher
        .attach_probes(&mut guest.image, &wrong, &origin())
        .unwrap_err();
    assert_eq!(patcher.probes(&guest.image).unwrap(), []);
    assert_eq!(patcher.list().arena.unwrap().code_slots, 0);

    let new = patcher.attach_probes(&mut guest.image, &all, &origin());
    let mut ids: Vec<_> = new.unwrap().iter().map(|new| new.probe.id).collect();
    for bad in [ids[0], EntryId(99)] {
        ids.push(bad);
        let refused = patcher.detach_probes(&mut guest.image, &ids, &origin());
        assert!(refused.is_err());
        assert_eq!(patcher.probes(&guest.image).unwrap().len(), 3);
        ids.pop();
    }
    let gone = patcher.detach_probes(&mut guest.image, &ids, &origin());
    assert_eq!(gone.unwrap().probes.len(), 3);
    assert_eq!(patcher.list().arena.unwrap().code_slots, 0);
}

/// A jump in the place of one long instruction leaves bytes behind it, where nobody can be all the same.
#[test]
fn none_of_several_is_attached_when_the_tasks_are_not_known() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let mut at = entry(&guest).offset(5);
        while instruction_len(&guest, at) <= 5 {
            at = at.offset(instruction_len(&guest, at) as u64);
        }
        let before = guest.get(at, 16);
        let all = [at.to_string(), format!("{FUNCTION}+1")].map(|site| {
            let request = ProbeRequest::counting(site.parse().unwrap());
            patcher.prepare_probe(request).unwrap()
        });
        guest.put_u32(guest.at("nr_threads"), 9);
        let refused = patcher.attach_probes(&mut guest.image, &all, &origin());
        // The second of them is in the middle of an instruction.
        let word = refused.unwrap_err().word();
        assert!(
            ["CannotMove", "NotWholeInstructions"].contains(&word),
            "{word}"
        );
        assert_eq!(patcher.probes(&guest.image).unwrap(), []);
        assert_eq!(guest.get(at, 16), before);
        // The first alone comes and goes.
        let [first, _] = &all;
        let one = std::slice::from_ref(first);
        let new = patcher.attach_probes(&mut guest.image, one, &origin());
        let id = new.unwrap()[0].probe.id;
        patcher
            .detach_probe(&mut guest.image, id, &origin())
            .unwrap();
        guest.put_u32(guest.at("nr_threads"), 0);
        patcher.collect(&mut guest.image).unwrap();
        assert_eq!(patcher.list().arena.unwrap().code_slots, 0);
    }
}

#[test]
fn a_change_is_taken_back_with_all_its_probes() {
    let mut guest = guest(KERNELS[0]);
    let mut patcher = patcher(&guest);
    let first = attach(&mut patcher, &mut guest, FUNCTION).unwrap();
    attach(&mut patcher, &mut guest, FUNCTION).unwrap();
    let reverted = revert(&mut patcher, &mut guest, first.id).unwrap();
    assert_eq!(reverted.collected.freed.last(), Some(&first.id));
    assert_eq!(patcher.probes(&guest.image).unwrap(), []);
    assert_eq!(patcher.list().arena.unwrap().data_used, 0);
}

#[test]
fn what_an_earlier_trampoline_uses_stays_as_long_as_that() {
    let mut guest = guest(KERNELS[0]);
    let stack = guest.preempted(55, "inside");
    let mut patcher = patcher(&guest);
    let first = attach(&mut patcher, &mut guest, FUNCTION).unwrap();
    let old = change_of(&patcher, &first).code.unwrap().code;
    // Somebody is in the trampoline of the first alone.
    guest.put_u64(stack.offset(0x20), old.at.0 + 2);
    let second = attach(&mut patcher, &mut guest, FUNCTION).unwrap();
    let detached = detach(&mut patcher, &mut guest, first.id).unwrap();
    assert!(detached.reverted.collected.freed.is_empty());
    let waiting = patcher.waiting();
    assert_eq!(waiting.len(), 2);
    assert!(
        waiting
            .iter()
            .all(|retired| retired.held_by[0].contains("inside (pid 55)"))
    );
    guest.put_u64(stack.offset(0x20), 0);
    let freed = patcher.collect(&mut guest.image).unwrap().freed;
    assert_eq!(freed, [second.id, first.id]);
}

#[test]
fn a_permanent_site_stays_hooked_without_probes() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let start = guest.at(FUNCTION);
        let before = guest.get(start, 16);
        let request = ProbeRequest {
            permanent: true,
            ..ProbeRequest::counting(FUNCTION.parse().unwrap())
        };
        let prepared = patcher.prepare_probe(request).unwrap();
        let first = patcher
            .attach_probe(&mut guest.image, &prepared, &origin())
            .unwrap();
        let change = change_of(&patcher, &first.probe).id;
        patcher
            .detach_probe(&mut guest.image, first.probe.id, &origin())
            .unwrap();
        assert_eq!(patcher.probes_at(change), Some((vec![], true)));
        let listing = patcher.list();
        assert!(listing.retired.is_empty(), "{:?}", listing.retired);
        // What passes straight through: what was displaced, and a jump.
        let entry = &listing.applied[0];
        assert!(
            entry.code.as_ref().unwrap().code.len <= 16,
            "{:?}",
            entry.code
        );
        let plain = ProbeRequest::counting(FUNCTION.parse().unwrap());
        let prepared = patcher.prepare_probe(plain).unwrap();
        let again = patcher
            .attach_probe(&mut guest.image, &prepared, &origin())
            .unwrap();
        assert_eq!(
            patcher.probes_at(change),
            Some((vec![again.probe.id], true))
        );
        patcher
            .detach_probe(&mut guest.image, again.probe.id, &origin())
            .unwrap();
        patcher.revert(&mut guest.image, change, &origin()).unwrap();
        assert!(patcher.list().applied.is_empty() && patcher.list().retired.is_empty());
        assert_eq!(guest.get(start, 16), before);
    }
}

#[test]
fn where_a_jump_label_leads_no_jump_covers() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let mut led = Vec::new();
        for offset in 5..0x200 {
            let site = format!("kernel_clone+{offset:#x}").parse().unwrap();
            let prepared = patcher.prepare_probe(ProbeRequest::counting(site));
            let Ok(prepared) = prepared else { continue };
            match patcher.attach_probe(&mut guest.image, &prepared, &origin()) {
                Ok(new) => {
                    detach(&mut patcher, &mut guest, new.probe.id).unwrap();
                }
                Err(error @ PatchError::LedInside { .. }) => led.push(error.to_string()),
                Err(_) => {}
            }
        }
        // The tracepoint of a fork is in it, out of line behind a short jump.
        assert!(!led.is_empty(), "{name}");
        assert!(led[0].contains("a jump label leads there"), "{}", led[0]);
    }
}
