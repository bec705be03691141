//! Changes that come one after the other.

use super::*;
use patcher::patch::{PreparedChange, Step};

/// A change of `expect` at `at` into nops.
fn prepared(patcher: &Patcher, at: Gva, expect: &[u8]) -> PreparedChange {
    let request = TextRequest {
        site: at.to_string().parse().unwrap(),
        expect: expect.to_vec(),
        write: nops(expect.len()),
        force: false,
    };
    PreparedChange::Text(patcher.prepare_text(request).unwrap())
}

/// The first two instructions behind the entry: address and bytes.
fn two(guest: &KernelGuest) -> [(Gva, Vec<u8>); 2] {
    let first = entry(guest).offset(5);
    let len = instruction_len(guest, first);
    let second = first.offset(len as u64);
    let next = instruction_len(guest, second);
    [
        (first, guest.get(first, len)),
        (second, guest.get(second, next)),
    ]
}

fn ids(step: &Step) -> Vec<EntryId> {
    step.changes.iter().map(|change| change.id).collect()
}

#[test]
fn all_changes_of_a_step_are_made_or_none() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let before = guest.memory();
        let [(first, old), (second, next)] = two(&guest);
        let mut wrong = next.clone();
        *wrong.last_mut().unwrap() ^= 0xff;
        let texts = [
            prepared(&patcher, first, &old),
            prepared(&patcher, second, &wrong),
        ];
        let error = patcher
            .commit_step(&mut guest.image, &texts, &origin())
            .unwrap_err();
        assert_eq!(error.word(), "BytesDiffer");
        assert!(guest.memory() == before);
        assert!(patcher.list().applied.is_empty());

        let texts = [
            prepared(&patcher, first, &old),
            prepared(&patcher, second, &next),
        ];
        let step = patcher
            .commit_step(&mut guest.image, &texts, &origin())
            .unwrap();
        assert_eq!(
            guest.get(first, old.len() + next.len()),
            nops(old.len() + next.len())
        );
        let mut passage = step.passage.clone();
        assert!(passage.inside().is_empty());
        patcher.has_passed(&mut guest.image, &mut passage).unwrap();
        let alone = patcher.revert(&mut guest.image, ids(&step)[0], &origin());
        let error = alone.unwrap_err().to_string();
        assert!(error.contains("ordered steps"), "{error}");

        let taken = patcher
            .revert_step(&mut guest.image, &ids(&step), &origin())
            .unwrap();
        assert_eq!(taken.changes.len(), 2);
        assert!(guest.memory() == before);
        // Nothing is left to take back.
        let again = patcher
            .revert_step(&mut guest.image, &ids(&step), &origin())
            .unwrap();
        assert!(again.changes.is_empty());
    }
}

#[test]
fn who_is_in_a_changed_function_has_to_leave_it_once() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let [(first, old), (second, _)] = two(&guest);
        let stack = guest.sleeper(55, "asleep");
        guest.put_u64(stack, second.0);
        let texts = [prepared(&patcher, first, &old)];
        let step = patcher
            .commit_step(&mut guest.image, &texts, &origin())
            .unwrap();
        let mut passage = step.passage.clone();
        let error = patcher
            .has_passed(&mut guest.image, &mut passage)
            .unwrap_err();
        assert!(
            error.passes() && error.to_string().contains("asleep (pid 55)"),
            "{error}"
        );
        // It has left, and somebody else came.
        guest.put_u64(stack, 0);
        let other = guest.sleeper(56, "later");
        guest.put_u64(other, second.0);
        patcher.has_passed(&mut guest.image, &mut passage).unwrap();
        assert!(passage.inside().is_empty());
    }
}

#[test]
fn who_is_in_new_code_has_to_leave_it_when_that_is_taken_back() {
    for name in KERNELS {
        let mut guest = guest(name);
        let mut patcher = patcher(&guest);
        let redirect = patcher.prepare_redirect(RedirectRequest {
            site: FUNCTION.parse().unwrap(),
            code: NewCode::Raw(vec![0x31, 0xc0, 0xc3]),
        });
        let change = PreparedChange::Redirect(redirect.unwrap());
        let step = patcher
            .commit_step(&mut guest.image, &[change], &origin())
            .unwrap();
        let code = step.changes[0].code.as_ref().unwrap().code;
        let stack = guest.sleeper(57, "in new code");
        guest.put_u64(stack, code.at.0 + 1);
        let taken = patcher
            .revert_step(&mut guest.image, &ids(&step), &origin())
            .unwrap();
        let mut passage = taken.passage.clone();
        let error = patcher
            .has_passed(&mut guest.image, &mut passage)
            .unwrap_err();
        assert!(error.to_string().contains("pid 57"), "{error}");
        guest.put_u64(stack, 0);
        patcher.has_passed(&mut guest.image, &mut passage).unwrap();
    }
}
