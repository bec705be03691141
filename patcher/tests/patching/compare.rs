//! Text that is as the kernel would have made it, and text that is not.

use std::collections::BTreeMap;
use std::ops::Range;

use patcher::compare::{Class, Comparison, Expected, Owner, SitePlace, compare};
use patcher::guest::LinkAddr;
use patcher::patch::{Applied, Compared, TextCopy};
use patcher::space::{Landmarks, Located};

use super::{
    FUNCTION, KERNELS, KernelGuest, NOP5, RETURN_ZERO, SLIDE, change, guest, patcher, redirect,
};

fn located(guest: &KernelGuest) -> Located {
    let marks = Landmarks::of(&guest.kernel).unwrap();
    Located::find(&guest.image, &marks).unwrap()
}

fn compared(guest: &KernelGuest, ours: &[Applied]) -> Comparison {
    let located = located(guest);
    let space = located.space(&guest.image);
    compare(&guest.kernel, &space, &located, ours).unwrap()
}

/// Gives the guest the text that its kernel would have, and tells the places that it writes.
fn finish_boot(guest: &mut KernelGuest) -> Vec<SitePlace> {
    let (start, bytes, sites) = {
        let located = located(guest);
        let space = located.space(&guest.image);
        let mut expected = Expected::of(&guest.kernel, &space, &located).unwrap();
        let text = expected.text();
        // The text ends with a section, what is behind the last function in it is zero.
        let mut bytes = guest.get(text.start.at(SLIDE), len(&text));
        for (n, byte) in (0..).zip(&mut bytes) {
            let should = expected.bytes(text.start.offset(n), 1);
            *byte = should.map_or(*byte, |should| should[0]);
        }
        (text.start, bytes, expected.sites().collect())
    };
    guest.put(start.at(SLIDE), &bytes);
    // There are no BPF programs.
    let programs = guest.at("bpf_kallsyms");
    guest.put_u64(programs, programs.0);
    sites
}

fn len(range: &Range<LinkAddr>) -> usize {
    usize::try_from(range.end.distance_from(range.start)).unwrap()
}

/// A place of each class that no other class has a byte of, from the middle of the text.
fn one_of_each(sites: &[SitePlace]) -> BTreeMap<Class, LinkAddr> {
    let mut all: BTreeMap<Class, Vec<LinkAddr>> = BTreeMap::new();
    let end = |site: &SitePlace| site.at.offset(site.len.into());
    for three in sites.windows(3) {
        let apart = end(&three[0]) < three[1].at && end(&three[1]) < three[2].at;
        if apart {
            all.entry(three[1].class).or_default().push(three[1].at);
        }
    }
    all.into_iter()
        .map(|(class, places)| (class, places[places.len() / 2]))
        .collect()
}

#[test]
fn a_byte_flipped_in_any_class_of_place_is_found() {
    for name in KERNELS {
        let mut guest = guest(name);
        let sites = finish_boot(&mut guest);
        let clean = compared(&guest, &[]);
        assert_eq!(clean.foreign, [], "{name}");
        assert_eq!(clean.doubts, [""; 0], "{name}");
        assert!(clean.explained > 100_000, "{name}: {}", clean.explained);

        let flipped = one_of_each(&sites);
        let wanted: &[Class] = match name {
            "6.1" => &[Class::Paravirt],
            _ => &[Class::Endbr, Class::RuntimeConstant],
        };
        let everywhere = [
            Class::Relocation,
            Class::Fentry,
            Class::JumpLabel,
            Class::StaticCall,
            Class::StaticCallTrampoline,
            Class::Retpoline,
            Class::Return,
            Class::Alternative,
            Class::SmpLock,
        ];
        for class in wanted.iter().chain(&everywhere) {
            assert!(flipped.contains_key(class), "{name}: no place of {class}");
        }
        for &at in flipped.values() {
            let byte = guest.get(at.at(SLIDE), 1)[0];
            guest.put(at.at(SLIDE), &[byte ^ 0x41]);
        }
        let found = compared(&guest, &[]);
        assert_eq!(found.foreign_bytes, flipped.len() as u64, "{name}");
        assert_eq!(found.foreign.len(), flipped.len(), "{name}");
        for (class, at) in flipped {
            let at = at.at(SLIDE);
            let end = |foreign: &patcher::compare::Foreign| {
                foreign.address.offset(foreign.found.0.len() as u64)
            };
            let foreign = found
                .foreign
                .iter()
                .find(|foreign| foreign.address <= at && at < end(foreign))
                .unwrap_or_else(|| panic!("{name}: {class} at {at} is not reported"));
            let site = (class != Class::Relocation).then_some(class);
            assert_eq!(foreign.site, site, "{name}: {foreign:?}");
            assert_eq!(foreign.owner, Owner::Unknown, "{name}: {foreign:?}");
        }
    }
}

#[test]
fn our_own_changes_are_named() {
    for name in KERNELS {
        let mut guest = guest(name);
        finish_boot(&mut guest);
        let mut patcher = patcher(&guest);
        let sent = redirect(&mut patcher, &mut guest, FUNCTION, &RETURN_ZERO).unwrap();
        let entry = if name == "6.1" { "" } else { "+0x4" };
        let site = format!("cmdline_proc_show{entry}");
        let zero = [0x31, 0xc0, 0xc3, 0x90, 0x90];
        let text = change(&mut patcher, &mut guest, &site, &NOP5, &zero, false).unwrap();
        let ours = patcher.list().applied;
        let found = compared(&guest, &ours);
        let owners: Vec<_> = found.foreign.iter().map(|foreign| &foreign.owner).collect();
        let mine = |id| Owner::Ours { id };
        assert_eq!(found.foreign.len(), 2, "{name}: {:?}", found.foreign);
        for id in [sent.id, text.id] {
            assert!(owners.contains(&&mine(id)), "{name}: {owners:?}");
        }
        // When a byte of it is not ours any more it is nobody's.
        guest.put(text.address.offset(2), &[0xc2]);
        let found = compared(&guest, &ours);
        let owners: Vec<_> = found.foreign.iter().map(|foreign| &foreign.owner).collect();
        assert!(owners.contains(&&Owner::Unknown), "{name}: {owners:?}");
    }
}

#[test]
fn a_copy_says_the_same_as_the_guest() {
    let mut guest = guest("6.12");
    finish_boot(&mut guest);
    let mut patcher = patcher(&guest);
    let expected = patcher.compare_text(&mut guest.image).unwrap();
    assert!(expected.is_clean(), "{expected:?}");

    let mut text = TextCopy::default();
    let again = |compared| matches!(compared, Compared::CopyAgain);
    assert!(again(patcher.compare_copy(&text).unwrap()));
    patcher.follow_text(&guest.image, &mut text);
    patcher.copy_text(&mut guest.image, &mut text).unwrap();
    // What the guest does now comes too late.
    let key = guest.at("cmdline_proc_show").offset(0x20);
    let byte = guest.get(key, 1)[0];
    guest.put(key, &[byte ^ 1]);
    let Compared::Done(found) = patcher.compare_copy(&text).unwrap() else {
        panic!("nothing has moved");
    };
    assert_eq!(found, expected);

    // A change whose owner is looked for where nobody has looked before.
    let mut tries = 0;
    let found = loop {
        patcher.follow_text(&guest.image, &mut text);
        patcher.copy_text(&mut guest.image, &mut text).unwrap();
        tries += 1;
        match patcher.compare_copy(&text).unwrap() {
            Compared::Done(found) => break found,
            other => assert!(again(other) && tries < 3),
        }
    };
    assert_eq!(found, patcher.compare_text(&mut guest.image).unwrap());
    assert_eq!(found.foreign_bytes, 1);
}
