//! Probes of returns in guests made of stock kernels.

use super::*;
use patcher::patch::{
    Callback, Measured, ProbeInfo, ProbeRequest, ReturnError, TracepointRequest, USUAL_PRIORITY,
};
use patcher::probe::When;

fn request(site: &str, callback: Callback) -> ProbeRequest {
    ProbeRequest {
        when: When::Returned,
        callback,
        ..ProbeRequest::counting(site.parse().unwrap())
    }
}

fn attach(
    patcher: &mut Patcher,
    guest: &mut KernelGuest,
    request: ProbeRequest,
) -> Result<ProbeInfo, PatchError> {
    let prepared = patcher.prepare_probe(request)?;
    let new = patcher.attach_probe(&mut guest.image, &prepared, &origin())?;
    Ok(new.probe)
}

fn refused(patcher: &mut Patcher, guest: &mut KernelGuest, request: ProbeRequest) -> ReturnError {
    match attach(patcher, guest, request) {
        Err(PatchError::Return { why, .. }) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn whose_return_is_not_known_is_refused_with_a_way_out() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let count = |site: &str| request(site, Callback::Count);
        let mut why = |request| refused(&mut patcher, &mut guest, request);
        assert_eq!(
            why(count(&format!("{FUNCTION}+0x9"))),
            ReturnError::NotItsEntry
        );
        assert_eq!(why(count("do_exit")), ReturnError::NeverReturns);
        assert_eq!(why(count("clear_page_erms")), ReturnError::NotTraced);
        assert_eq!(why(count("__switch_to")), ReturnError::Switches);
        assert!(matches!(
            why(count("_printk")),
            ReturnError::UnknownArguments { .. }
        ));
        let words = |site, words| ProbeRequest {
            stack_words: Some(words),
            ..count(site)
        };
        assert_eq!(why(words("panic", 9)), ReturnError::NeverReturns);
        assert_eq!(
            why(words("_printk", 65)),
            ReturnError::TooManyWords { words: 65 }
        );
        attach(&mut patcher, &mut guest, words("_printk", 12)).unwrap();
        // What makes no sense for a probe that waits for no return.
        let asked = ProbeRequest {
            when: When::Reached,
            ..words(FUNCTION, 3)
        };
        assert!(matches!(
            patcher.prepare_probe(asked),
            Err(PatchError::Request(_))
        ));
    }
}

/// Nearly every function that can be probed has a return that can be.
#[test]
fn returns_of_most_functions_can_be_probed() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let kernel = guest.kernel.clone();
        let (mut taken, mut why) = (0, Vec::new());
        for pattern in ["vfs_*", "tcp_*", "ext4_*", "__x64_sys_*"] {
            let symbols = kernel.symbols().matching(pattern);
            for symbol in symbols.filter(|one| one.is_function()).step_by(7) {
                let site = symbol.name();
                let entry = ProbeRequest::counting(site.parse().unwrap());
                let Ok(probe) = attach(&mut patcher, &mut guest, entry) else {
                    continue;
                };
                match attach(&mut patcher, &mut guest, request(&site, Callback::Latency)) {
                    Ok(_) => taken += 1,
                    // A copy that the compiler made, or what it has split off.
                    Err(PatchError::Return { .. }) if site.contains('.') => {}
                    Err(error) => why.push(error.to_string()),
                }
                revert(&mut patcher, &mut guest, probe.id).unwrap();
            }
        }
        assert!(taken > 100 && why.len() < 4, "{name}: {taken}, {why:#?}");
        let arena = patcher.list().arena.unwrap();
        assert_eq!((arena.code_slots, arena.data_used), (0, 0));
    }
}

#[test]
fn whoever_sleeps_in_the_function_holds_its_trampoline_up() {
    for name in KERNELS {
        let mut guest = guest(name);
        let stack = guest.sleeper(55, "asleep");
        let mut patcher = patcher(&guest);
        let at = entry(&guest);
        let first = attach(&mut patcher, &mut guest, request(FUNCTION, Callback::Count)).unwrap();
        assert_eq!((first.address, first.when), (at, When::Returned));
        let code = patcher.list().applied[0].code.clone().unwrap().code;
        // Where a call in it returns to.
        let text = guest.get(code.at, 32);
        let call = text.iter().position(|byte| *byte == 0xe8).unwrap();
        guest.put_u64(stack.offset(0x20), code.at.0 + call as u64 + 5);

        // Another probe comes and goes meanwhile: the first is in a trampoline of its own again.
        let second = attach(
            &mut patcher,
            &mut guest,
            request(FUNCTION, Callback::Latency),
        )
        .unwrap();
        patcher.collect(&mut guest.image).unwrap();
        assert!(patcher.waiting()[0].held_by[0].contains("asleep (pid 55)"));
        let histogram = patcher.histogram(&guest.image, second.id).unwrap();
        assert!(matches!(
            histogram.of,
            Measured::Latency {
                unit: "tsc-cycles",
                ..
            }
        ));
        // That is the trampoline that he is in.
        for (id, freed) in [(second.id, vec![second.id]), (first.id, vec![])] {
            let gone = patcher
                .detach_probe(&mut guest.image, id, &origin())
                .unwrap();
            assert_eq!(gone.reverted.collected.freed, freed);
        }
        assert_eq!(guest.get(at, 5), NOP5);
        guest.put_u64(stack.offset(0x20), 0);
        let freed = patcher.collect(&mut guest.image).unwrap().freed;
        assert_eq!(freed, [first.id]);
        let arena = patcher.list().arena.unwrap();
        assert_eq!((arena.code_slots, arena.data_used), (0, 0));
    }
}

/// What was taken out says so where the trampoline looks before it does anything.
#[test]
fn who_returns_late_finds_that_a_probe_was_taken_out() {
    let mut guest = guest(KERNELS[0]);
    let stack = guest.sleeper(55, "asleep");
    let mut patcher = patcher(&guest);
    let entry = entry(&guest);
    let stays = attach(&mut patcher, &mut guest, request(FUNCTION, Callback::Count)).unwrap();
    let goes = attach(&mut patcher, &mut guest, request(FUNCTION, Callback::Count)).unwrap();
    let code = patcher.list().applied[0].code.clone().unwrap().code;
    guest.put_u64(stack.offset(0x20), code.at.0 + 2);
    // testb $1,out
    let text = guest.get(code.at, usize::try_from(code.len).unwrap());
    let tests: Vec<_> = text
        .windows(8)
        .filter(|bytes| bytes[..3] == [0xf6, 0x04, 0x25] && bytes[7] == 1)
        .map(|bytes| i32::from_le_bytes(bytes[3..7].try_into().unwrap()))
        .map(|at| Gva(0).displace(at.into()))
        .collect();
    let [first, second] = tests[..] else {
        panic!("{tests:?}");
    };
    let out = |guest: &KernelGuest| (guest.get(first, 1)[0], guest.get(second, 1)[0]);
    assert_eq!(out(&guest), (0, 0));
    patcher
        .detach_probe(&mut guest.image, goes.id, &origin())
        .unwrap();
    assert_eq!(out(&guest), (0, 1));
    // A change that cannot be taken back leaves everything as it was.
    let ours = guest.get(entry, 5);
    guest.put(entry, &[0xcc]);
    patcher
        .detach_probe(&mut guest.image, stays.id, &origin())
        .unwrap_err();
    assert_eq!(out(&guest), (0, 1));
    guest.put(entry, &ours);
    revert(&mut patcher, &mut guest, stays.id).unwrap();
    assert_eq!(out(&guest), (1, 1));
}

#[test]
fn run_time_addresses_are_judged_like_names() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let at = |guest: &KernelGuest, symbol: &str| guest.at(symbol).to_string();
        let (good, bad) = (at(&guest, FUNCTION), at(&guest, "do_exit"));
        let nop = entry(&guest);
        let probe = attach(&mut patcher, &mut guest, request(&good, Callback::Latency)).unwrap();
        assert_eq!(probe.address, nop);
        assert_eq!(
            refused(&mut patcher, &mut guest, request(&bad, Callback::Count)),
            ReturnError::NeverReturns
        );
    }
}

#[test]
fn a_tracepoint_takes_no_time() {
    let guest = guest(KERNELS[0]);
    let refused = patcher(&guest).prepare_tracepoint(TracepointRequest {
        name: "sched_switch".into(),
        callback: Callback::Latency,
        value: 0,
        priority: USUAL_PRIORITY,
        only_if: None,
    });
    let why = refused.unwrap_err().to_string();
    assert!(why.contains("takes no time"), "{why}");
}
