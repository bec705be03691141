//! Every size and every member's place, against what bpftool (libbpf) reads in the same file.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::process::Command;

use patcher::types::{TypeError, Types};

use super::{each_kernel, kernel_file, read_kernel};

/// A line or group of lines of `bpftool btf dump`.
#[derive(Default)]
struct Told {
    kind: String,
    name: String,
    size: Option<u64>,
    /// What it refers to.
    target: usize,
    members: Vec<Member>,
}

/// A member of a composite, or a constant of an enumeration.
#[derive(Default)]
struct Member {
    name: String,
    target: usize,
    bit: u64,
    /// Bits of a bit field.
    width: Option<u64>,
    value: Option<i128>,
}

/// The number behind `name=`.
fn number<T: std::str::FromStr>(words: &str, name: &str) -> Option<T> {
    let mut all = words.split(' ').filter_map(|word| word.split_once('='));
    let (_, value) = all.find(|(key, _)| *key == name)?;
    // Large constants are marked as C has them: 1ULL.
    value.trim_end_matches(['U', 'L']).parse().ok()
}

/// The name in quotes, and what comes behind it.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let (name, rest) = text.strip_prefix('\'')?.split_once('\'')?;
    Some((if name == "(anon)" { "" } else { name }, rest.trim_start()))
}

/// What bpftool says, by type number.
fn told(dump: &str) -> Vec<Told> {
    let mut all = vec![Told::default()];
    for line in dump.lines() {
        if let Some(member) = line.strip_prefix('\t') {
            let Some((name, rest)) = quoted(member) else {
                continue; // A variable of a section.
            };
            let member = Member {
                name: name.to_owned(),
                target: number(rest, "type_id").unwrap_or(0),
                bit: number(rest, "bits_offset").unwrap_or(0),
                width: number(rest, "bitfield_size"),
                value: number(rest, "val"),
            };
            all.last_mut().expect("a type").members.push(member);
            continue;
        }
        let (id, rest) = line.split_once("] ").expect("a type");
        assert_eq!(id, format!("[{}", all.len()));
        let (kind, rest) = rest.split_once(' ').expect("a kind");
        let (name, rest) = quoted(rest).expect("a name");
        all.push(Told {
            kind: kind.to_owned(),
            name: name.to_owned(),
            size: number(rest, "size"),
            target: number(rest, "type_id").unwrap_or(0),
            members: Vec::new(),
        });
    }
    all
}

/// Where a member is: its first bit, the bits of a bit field, and the type.
type Place = (u64, Option<u64>, usize);

/// The members of a composite by name, those of anonymous ones in it included. C allows each name
/// once in all of them.
fn members<'a>(all: &'a [Told], id: usize, base: u64, into: &mut Vec<(&'a str, Place)>) {
    for member in &all[id].members {
        let bit = base + member.bit;
        if !member.name.is_empty() {
            into.push((&member.name, (bit, member.width, member.target)));
        } else if matches!(all[member.target].kind.as_str(), "STRUCT" | "UNION") {
            members(all, member.target, bit, into);
        }
    }
}

/// Bytes of a type, where bpftool says so; behind typedefs and qualifiers.
fn size(all: &[Told], id: usize) -> Option<u64> {
    match all[id].kind.as_str() {
        "PTR" => Some(8),
        "TYPEDEF" | "CONST" | "VOLATILE" | "RESTRICT" | "TYPE_TAG" => size(all, all[id].target),
        _ => all[id].size,
    }
}

fn compare(kernel: &str, all: &[Told], types: &Types) -> usize {
    let mut named: BTreeMap<(&str, &str), Vec<usize>> = BTreeMap::new();
    for (id, told) in all.iter().enumerate() {
        let keyword = match told.kind.as_str() {
            "STRUCT" => "struct",
            "UNION" => "union",
            "ENUM" | "ENUM64" => "enum",
            _ => continue,
        };
        if !told.name.is_empty() {
            named.entry((keyword, &told.name)).or_default().push(id);
        }
    }
    let mut compared = 0;
    for ((keyword, name), ids) in named {
        let holder = format!("{keyword} {name}");
        let context = |what: &str| format!("{kernel}: {holder}: {what}");
        let sizes: HashSet<_> = ids.iter().map(|&id| all[id].size).collect();
        let ours = types.size_of(&holder);
        match sizes.into_iter().collect::<Vec<_>>()[..] {
            [size] => assert_eq!(ours.ok(), size, "{}", context("size")),
            _ => assert!(
                matches!(ours, Err(TypeError::Ambiguous { .. })),
                "{}",
                context("size")
            ),
        }
        compared += 1;
        if keyword == "enum" {
            if let [id] = ids[..] {
                for constant in &all[id].members {
                    let ours = types.constant(&holder, &constant.name).ok();
                    // Of 64 bits without a sign ours are the same bits.
                    let bits = |value: i128| u64::try_from(value).ok().map(u64::to_ne_bytes);
                    let theirs = constant.value.and_then(|value| {
                        let signed = i64::try_from(value).ok();
                        signed.or_else(|| bits(value).map(i64::from_ne_bytes))
                    });
                    assert_eq!(ours, theirs, "{}", context(&constant.name));
                    compared += 1;
                }
            }
            continue;
        }
        let each: Vec<HashMap<&str, Place>> = ids
            .iter()
            .map(|&id| {
                let mut found = Vec::new();
                members(all, id, 0, &mut found);
                let count = found.len();
                let found: HashMap<_, _> = found.into_iter().collect();
                assert_eq!(found.len(), count, "{}", context("a name twice"));
                found
            })
            .collect();
        let names: HashSet<_> = each.iter().flat_map(HashMap::keys).copied().collect();
        for name in names {
            let ours = types.field(&holder, name);
            let places: Vec<_> = each.iter().map(|members| members.get(name)).collect();
            let Some((bit, width, target)) = places[0].copied() else {
                assert!(ours.is_err(), "{}", context(name));
                continue;
            };
            let same = |place: &Option<&Place>| {
                place.is_some_and(|place| (place.0, place.1) == (bit, width))
            };
            let Ok(ours) = ours else {
                // Several types of one name, in which it is not the same.
                assert!(places.len() > 1, "{}", context(name));
                continue;
            };
            assert!(places.iter().all(same), "{}", context(name));
            assert_eq!(ours.offset, bit / 8, "{}", context(name));
            let bits = ours.bits.map(|bits| (bits.shift.into(), bits.width.into()));
            assert_eq!(
                bits,
                width.map(|width| (bit % 8, width)),
                "{}",
                context(name)
            );
            if let (None, Some(size)) = (width, size(all, target)) {
                assert_eq!(ours.size, size, "{}", context(name));
            }
            compared += 1;
        }
    }
    compared
}

/// A type of one word that is no structure.
fn is_plain(all: &[Told], id: usize) -> bool {
    match all[id].kind.as_str() {
        "TYPEDEF" | "CONST" | "VOLATILE" | "RESTRICT" | "TYPE_TAG" => is_plain(all, all[id].target),
        "PTR" | "INT" | "ENUM" | "ENUM64" => size(all, id).is_some_and(|size| size <= 8),
        _ => false,
    }
}

/// Functions whose arguments are all plain have those on the stack that registers do not hold.
fn compare_calls(kernel: &str, all: &[Told], types: &Types) -> usize {
    let functions = all.iter().filter(|told| told.kind == "FUNC");
    let mut compared = 0;
    for function in functions {
        let parameters = &all[function.target].members;
        // The last of type 0 stands for `...`.
        let (last, others) = match parameters.split_last() {
            Some((last, others)) if last.target == 0 => (true, others),
            _ => (false, parameters.as_slice()),
        };
        let Ok(calling) = types.calling(&function.name) else {
            // There are several, and they differ.
            continue;
        };
        assert_eq!(calling.variadic, last, "{kernel}: {}", function.name);
        let plain = others.iter().all(|one| is_plain(all, one.target));
        // A structure that is returned in memory takes a register.
        let beyond = |more: usize| (others.len() + more).saturating_sub(6) as u64;
        let right = [beyond(0), beyond(1)].contains(&calling.stack_words);
        assert!(!plain || right, "{kernel}: {}", function.name);
        compared += usize::from(plain);
    }
    compared
}

#[test]
fn sizes_and_members_are_those_that_bpftool_reads() {
    each_kernel(|name| {
        let ran = Command::new("bpftool")
            .args(["btf", "dump", "file"])
            .arg(kernel_file(name, "vmlinux"))
            .output()
            .expect("bpftool; scripts/setup installs it");
        assert!(ran.status.success(), "{name}: {ran:?}");
        let all = told(std::str::from_utf8(&ran.stdout).expect("text"));
        let image = patcher::image::Image::open(read_kernel(name, "vmlinux")).expect("a kernel");
        let section = image.section(".BTF").expect("types");
        let types = Types::parse(image.section_bytes(section).expect("their bytes"));
        let types = types.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(types.len() + 1, all.len(), "{name}");
        let compared = compare(name, &all, &types);
        println!("{name}: {compared} sizes, places and constants");
        assert!(compared > 50_000, "{name}: {compared}");
        let compared = compare_calls(name, &all, &types);
        println!("{name}: {compared} functions");
        assert!(compared > 30_000, "{name}: {compared}");
    });
}
