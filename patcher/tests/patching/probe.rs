//! Probes in guests made of stock kernels.

use super::*;
use patcher::patch::{Cookie, Detached, ProbeRequest};

fn attach(
    patcher: &mut Patcher,
    guest: &mut KernelGuest,
    site: &str,
) -> Result<Applied, PatchError> {
    let prepared = patcher.prepare_probe(ProbeRequest {
        site: site.parse().unwrap(),
    })?;
    patcher.attach_probe(&mut guest.image, &prepared, &origin())
}

fn detach(
    patcher: &mut Patcher,
    guest: &mut KernelGuest,
    id: EntryId,
) -> Result<Detached, PatchError> {
    patcher.detach_probe(&mut guest.image, id, &origin())
}

/// Where a jump at `at` leads.
fn target(guest: &KernelGuest, at: Gva) -> Gva {
    let jump = guest.get(at, 5);
    assert_eq!(jump[0], 0xe9, "no jump at {at}");
    let distance = i32::from_le_bytes(jump[1..].try_into().unwrap());
    at.offset(5).displace(distance.into())
}

#[test]
fn a_probe_at_the_entry_counts_and_comes_back() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let at = entry(&guest);
        let applied = attach(&mut patcher, &mut guest, FUNCTION).unwrap();
        assert_eq!(applied.address, at);
        let placed = applied.code.clone().unwrap();
        assert_eq!(target(&guest, at), placed.entry);
        // pushfq ; lock incq ; popfq ; jmp back: nothing of the nop is left.
        assert_eq!(target(&guest, placed.entry.offset(10)), at.offset(5));
        let data = placed.data.unwrap();
        guest.put_u64(data.at, 41);
        assert_eq!(patcher.probes(&mut guest.image).unwrap()[0].hits, 41);
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
        let stack = guest.sleeper(55, "asleep");
        let mut patcher = patcher(&guest);
        let earlier = patcher.gp_snapshot();
        let applied = attach(&mut patcher, &mut guest, FUNCTION).unwrap();
        let code = applied.code.clone().unwrap().code;
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
                assert!(waiting[0].held_by[0].contains("asleep (pid 55)"));
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
