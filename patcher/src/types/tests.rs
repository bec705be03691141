//! Every kind of type, damaged ones, and none.

use super::*;
use crate::synthetic::{Btf, Random};

fn example() -> Types {
    Types::parse(&Btf::example().write()).unwrap()
}

fn plain(offset: u64, size: u64) -> Field {
    Field {
        offset,
        size,
        bits: None,
        pointer: false,
    }
}

#[test]
fn members_are_found_through_everything() {
    let types = example();
    for (path, field) in [
        ("lock", plain(0, 4)),
        ("lock.raw", plain(0, 4)),
        ("state", plain(8, 4)),
        ("whole", plain(8, 8)),
        (
            "next",
            Field {
                pointer: true,
                ..plain(16, 8)
            },
        ),
        ("name", plain(24, 16)),
        ("name[15]", plain(39, 1)),
        ("mem", plain(40, 112)),
        (
            "mem[0].base",
            Field {
                pointer: true,
                ..plain(40, 8)
            },
        ),
        ("mem[6].size", plain(144, 4)),
        ("tail[3]", plain(184, 8)),
    ] {
        assert_eq!(types.field("task", path), Ok(field), "{path}");
        assert_eq!(types.field("struct task", path), Ok(field), "{path}");
    }
    assert_eq!(types.field("spinlock_t", "raw"), Ok(plain(0, 4)));
    assert_eq!(types.size_of("task"), Ok(160));
    assert_eq!(types.size_of("spinlock_t"), Ok(4));
    assert_eq!(types.size_of("enum states"), Ok(4));
    assert_eq!(types.constant("states", "BOOTING"), Ok(-1));
    assert_eq!(types.constant("states", "RUNNING"), Ok(3));
    assert_eq!(types.constant("wide", "WIDE"), Ok(0x2_0000_0001));
}

#[test]
fn bit_fields_are_told() {
    let types = example();
    let bits = |offset, size, shift, width| {
        Ok(Field {
            bits: Some(Bits { shift, width }),
            ..plain(offset, size)
        })
    };
    assert_eq!(types.field("flags", "one"), bits(0, 1, 0, 1));
    assert_eq!(types.field("flags", "two"), bits(0, 2, 7, 3));
    assert_eq!(types.field("flags", "rest"), Ok(plain(4, 8)));
    assert_eq!(types.field("old_flags", "first"), bits(1, 1, 2, 5));
    assert_eq!(Bits { shift: 7, width: 3 }.extract(0x0280), 5);
    assert_eq!(
        Bits {
            shift: 0,
            width: 64
        }
        .extract(u64::MAX),
        u64::MAX
    );
    assert_eq!(
        Bits {
            shift: 64,
            width: 1
        }
        .extract(u64::MAX),
        0
    );
}

#[test]
fn refusals_say_what_is_wrong() {
    let types = example();
    let field = |path| types.field("task", path).unwrap_err();
    assert!(matches!(field("nothing"), TypeError::NoMember { .. }));
    assert!(
        matches!(field("lock.nothing"), TypeError::NoMember { holder, .. } if holder == "task.lock")
    );
    assert!(matches!(field("next.more"), TypeError::NotHere { .. }));
    assert!(matches!(field("mem.base"), TypeError::NotHere { .. }));
    assert!(matches!(field("state[0]"), TypeError::NotHere { .. }));
    assert!(matches!(
        field("mem[7].base"),
        TypeError::OutsideArray {
            index: 7,
            count: 7,
            ..
        }
    ));
    assert!(matches!(field("mem[0]]"), TypeError::BadPath { .. }));
    assert!(matches!(
        types.size_of("nothing"),
        Err(TypeError::NoType { .. })
    ));
    assert!(matches!(
        types.size_of("union task"),
        Err(TypeError::NoType { .. })
    ));
    assert!(matches!(
        types.constant("states", "NO"),
        Err(TypeError::NoMember { .. })
    ));
    assert_eq!(types.field("twice", "same"), Ok(plain(0, 4)));
    assert!(matches!(
        types.field("twice", "moved"),
        Err(TypeError::Ambiguous { count: 2, .. })
    ));
    assert!(matches!(
        types.size_of("twice"),
        Err(TypeError::Ambiguous { .. })
    ));
}

#[test]
fn what_is_not_btf_is_refused() {
    let good = Btf::example().write();
    assert!(matches!(
        Types::parse(&[]),
        Err(TypeError::Truncated { .. })
    ));
    assert!(matches!(
        Types::parse(&[0; 64]),
        Err(TypeError::NotBtf { .. })
    ));
    let mut newer = good.clone();
    newer[2] = 2;
    assert!(matches!(
        Types::parse(&newer),
        Err(TypeError::NotBtf { version: 2, .. })
    ));
    let mut unknown = Btf::new();
    unknown.int("int", 4);
    unknown.record("", (20, false, 2), 0, &[1, 2, 3]);
    unknown.structure("known", 4, &[("int", 1, 0)]);
    let refused = Types::parse(&unknown.write()).unwrap_err();
    assert_eq!(refused, TypeError::UnknownKind { id: 2, kind: 20 });
    // Unless the blob says how long it is.
    let mut layout = vec![(0, 0); 21];
    layout[20] = (4, 4);
    let types = Types::parse(&unknown.write_with_layout(&layout)).unwrap();
    assert_eq!(types.field("known", "int"), Ok(plain(0, 4)));
    let refused = Types::parse(&unknown.write_with_layout(&layout[..20])).unwrap_err();
    assert_eq!(refused, TypeError::UnknownKind { id: 2, kind: 20 });
}

#[test]
fn circles_and_towers_end() {
    let mut btf = Btf::new();
    // Types 1 and 2 stand for each other.
    btf.typedef("chicken", 2);
    btf.typedef("egg", 1);
    // Type 3 holds itself without a name; type 4 is an array of itself.
    btf.structure("nest", 8, &[("", 3, 0)]);
    btf.array(4, 4, 2);
    btf.structure(
        "tower",
        8,
        &[
            ("floors", 4, 0),
            ("egg", 1, 0),
            ("void", 0, 0),
            ("none", 99, 0),
        ],
    );
    // A tree of anonymous members, each twice of the one before.
    let mut below = btf.structure("", 8, &[]);
    for _ in 0..30 {
        below = btf.structure("", 8, &[("", below, 0), ("", below, 0)]);
    }
    btf.structure("forest", 8, &[("", below, 0)]);
    let types = Types::parse(&btf.write()).unwrap();
    let malformed = |result: Result<Field, _>| {
        assert!(
            matches!(result, Err(TypeError::Malformed { .. })),
            "{result:?}"
        );
    };
    assert!(matches!(
        types.size_of("chicken"),
        Err(TypeError::Malformed { .. })
    ));
    malformed(types.field("nest", "bird"));
    malformed(types.field("forest", "tree"));
    for member in ["floors", "egg", "void", "none"] {
        malformed(types.field("tower", member));
    }
}

#[test]
fn no_prefix_and_no_damage_leads_to_a_panic() {
    let whole = Btf::example().write();
    for len in 0..whole.len() {
        let cut = Types::parse(&whole[..len]).unwrap_err();
        assert!(matches!(cut, TypeError::Truncated { .. }), "{len}: {cut}");
    }
    let mut random = Random::new(3);
    for _ in 0..20_000 {
        let mut bytes = whole.clone();
        random.damage(&mut bytes);
        let Ok(types) = Types::parse(&bytes) else {
            continue;
        };
        for holder in ["task", "flags", "old_flags", "twice", "memory"] {
            let _ = types.size_of(holder);
            for path in [
                "lock.raw",
                "state",
                "next",
                "mem[3].size",
                "tail[99]",
                "two",
                "first",
            ] {
                let _ = types.field(holder, path);
            }
        }
        let _ = types.constant("states", "RUNNING");
        let _ = types.constant("wide", "WIDE");
    }
}
