//! What the patcher reads out of kernels as distributions ship them.

#![allow(
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use patcher::Kernel;
use patcher::guest::LinkAddr;
use patcher::image::{Image, Kind};
use patcher::stack::{OrcFormat, StackLayout};
use patcher::symbols::{Site, SiteError, Symbols};
use patcher::types::{TypeError, Types};

mod layouts;

/// Does it for the kernels that every machine with this checkout has, and where `scripts/test --full`
/// says so for those of all series.
fn each_kernel(check: impl Fn(&str)) {
    let series = include_str!("../../../guest-images/series").lines();
    let full = std::env::var_os("STILLPOINT_TEST_FULL").is_some();
    let usual = ["6.1", "6.12", "6.12-generic"];
    for name in usual.into_iter().chain(series.filter(|_| full)) {
        check(name);
    }
}

/// The file of a stock kernel, fetched when it is not there yet.
fn kernel_file(name: &str, file: &str) -> PathBuf {
    let fetch = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-images/fetch");
    let output = Command::new(&fetch)
        .arg(name)
        .stderr(Stdio::inherit())
        .output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", fetch.display()));
    assert!(
        output.status.success(),
        "{} {name}: {}",
        fetch.display(),
        output.status
    );
    let folder = String::from_utf8(output.stdout).expect("the folder of the kernel");
    Path::new(folder.trim_end()).join(file)
}

fn read_kernel(name: &str, file: &str) -> Vec<u8> {
    let file = kernel_file(name, file);
    std::fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

fn kernel(name: &str) -> Image {
    Image::open(read_kernel(name, "vmlinuz")).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn images_say_what_they_are() {
    each_kernel(|name| {
        let image = kernel(name);
        let Kind::BzImage(header) = image.kind() else {
            panic!("{name} is a bzImage")
        };
        let banner = image.banner().expect("a version string");
        let version = header
            .version
            .as_deref()
            .expect("a version in the boot header");
        assert!(
            version.starts_with(&format!("{} ", banner.release())),
            "{version} {banner:?}"
        );
        let build_id = image.build_id().expect("a build id");
        assert_eq!(build_id.bytes.len(), 20);
        assert_eq!(image.read(build_id.address, 20), Some(&build_id.bytes[..]));
        let text = image.section(".text").expect("a text section");
        assert!(text.executable && !text.writable);
        assert_eq!(
            image.read(text.address, 64),
            image.section_bytes(text).map(|b| &b[..64])
        );
        assert_eq!(image.read(LinkAddr(0xffff_ffff_c000_0000), 1), None);
        assert_eq!(image.read(LinkAddr(u64::MAX), 2), None);
    });
}

#[test]
fn a_bzimage_and_its_vmlinux_are_the_same_kernel() {
    let packed = kernel("6.1");
    let plain = Image::open(read_kernel("6.1", "vmlinux")).expect("a kernel");
    assert_eq!(*plain.kind(), Kind::Vmlinux);
    assert_eq!(plain.build_id(), packed.build_id());
    assert_eq!(plain.banner(), packed.banner());
    assert_eq!(plain.sections(), packed.sections());
    for section in plain.sections() {
        assert!(
            plain.section_bytes(section) == packed.section_bytes(section),
            "{}",
            section.name
        );
    }
}

#[test]
fn symbols_are_in_order_and_point_at_what_they_name() {
    each_kernel(|name| {
        let image = kernel(name);
        let symbols = Symbols::of(&image).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(symbols.len() > 80_000, "{name}: {}", symbols.len());
        let placed: Vec<_> = symbols
            .iter()
            .filter_map(|symbol| symbol.address())
            .collect();
        assert!(placed.is_sorted(), "{name}");

        let text = image.section(".text").expect("a text section");
        assert_eq!(symbols.address("_text"), Ok(text.address));
        assert_eq!(symbols.address("_stext"), Ok(text.address));
        let banner = image.banner().expect("a version string");
        assert_eq!(symbols.address("linux_banner"), Ok(banner.address));
        let btf = image.section(".BTF").expect("type information");
        assert_eq!(symbols.address("__start_BTF"), Ok(btf.address));
        assert_eq!(
            symbols.address("__stop_BTF"),
            Ok(btf.address.offset(btf.size))
        );

        let exports = exports(&image);
        assert!(exports.len() > 5_000, "{name}: {}", exports.len());
        for (export, value) in exports {
            let mut values = symbols.named(&export).map(|symbol| symbol.value());
            assert!(
                values.any(|known| known == value),
                "{name}: {export} {value:#x}"
            );
        }
    });
}

/// Names and values of what the kernel exports to modules, from its own tables: entries of three
/// 32-bit offsets from their own places (`struct kernel_symbol`).
fn exports(image: &Image) -> Vec<(String, u64)> {
    let mut exports = Vec::new();
    for table in ["__ksymtab", "__ksymtab_gpl"] {
        // From 7.0 on there is only one.
        let Some(section) = image.section(table) else {
            continue;
        };
        let bytes = image.section_bytes(section).expect("a table");
        assert_eq!(bytes.len() % 12, 0, "{table}");
        for (number, entry) in bytes.chunks_exact(12).enumerate() {
            let at = section.address.offset(12 * number as u64);
            let target = |field: usize| {
                let offset = entry[field..field + 4].try_into().expect("four bytes");
                at.offset(field as u64)
                    .displace(i32::from_le_bytes(offset).into())
            };
            let name = target(4);
            let text = image.read(name, 512).expect("a name");
            let end = text
                .iter()
                .position(|&byte| byte == 0)
                .expect("the end of a name");
            let text = std::str::from_utf8(&text[..end]).expect("a name");
            exports.push((text.to_owned(), target(0).0));
        }
    }
    exports
}

#[test]
fn symbols_are_found_by_address_and_by_pattern() {
    each_kernel(|name| {
        let image = kernel(name);
        let symbols = Symbols::of(&image).unwrap_or_else(|error| panic!("{name}: {error}"));
        let text = image.section(".text").expect("a text section").range();
        let mut functions = 0;
        for symbol in symbols
            .iter()
            .filter(|s| s.is_function() && text.contains(&at(s)))
        {
            functions += 1;
            let place = symbols
                .at(at(&symbol))
                .expect("a symbol covers its own address");
            assert_eq!(place.symbol.address(), symbol.address());
            assert_eq!(place.offset, 0);
            if place.size > 1 {
                let inside = symbols.function_at(at(&symbol).offset(place.size - 1));
                assert_eq!(
                    inside.map(|i| i.symbol.address()),
                    Some(symbol.address()),
                    "{symbol:?}"
                );
            }
        }
        assert!(functions > 30_000, "{name}: {functions}");
        let all: Vec<_> = symbols
            .matching("version_proc_sho?")
            .map(|s| s.name())
            .collect();
        assert_eq!(all, ["version_proc_show"]);
        assert_eq!(
            symbols
                .at(LinkAddr(0xffff_ffff_c000_0000))
                .map(|place| place.offset),
            None
        );
        assert!(symbols.at(LinkAddr(0)).is_none());
    });
}

/// What the kernel's initialised data say of their own layout.
#[test]
fn types_agree_with_the_data_they_describe() {
    each_kernel(|name| {
        let image = kernel(name);
        let symbols = Symbols::of(&image).unwrap_or_else(|error| panic!("{name}: {error}"));
        let btf = image
            .section(".BTF")
            .and_then(|section| image.section_bytes(section));
        let types = Types::parse(btf.expect("types")).unwrap_or_else(|e| panic!("{name}: {e}"));
        let read = |holder: &str, path: &str, at: LinkAddr| {
            let field = types
                .field(holder, path)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            let size = usize::try_from(field.size).expect("a size");
            image
                .read(at.offset(field.offset), size)
                .expect("initialised data")
                .to_vec()
        };
        let long = |bytes: Vec<u8>| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));

        let init = symbols.address("init_task").expect("the first task");
        assert!(
            read("task_struct", "comm", init).starts_with(b"swapper"),
            "{name}"
        );
        assert_eq!(read("task_struct", "pid", init), [0; 4]);
        assert_eq!(read("task_struct", "comm[3]", init), [b'p']);
        let stack = symbols.address("init_stack").expect("its stack");
        assert_eq!(long(read("struct task_struct", "stack", init)), stack.0);
        let link = types.field("task_struct", "tasks").expect("a list").offset;
        assert_eq!(
            long(read("task_struct", "tasks.next", init)),
            init.offset(link).0
        );
        assert_eq!(
            types.field("list_head", "prev").map(|field| field.offset),
            Ok(8)
        );
        assert!(
            types
                .field("task_struct", "stack")
                .expect("a field")
                .pointer
        );
        assert_eq!(
            types.size_of("task_struct"),
            types.size_of("struct task_struct")
        );
        assert!(
            symbols.unique("init_task").expect("a symbol").size()
                >= types.size_of("task_struct").ok()
        );
        assert_eq!(types.size_of("pid_t"), Ok(4));

        // The linker aligns them to 32 bytes.
        let size = types.size_of("tracepoint").expect("a size");
        let sizes = size..=size.next_multiple_of(32);
        let mut tracepoints = 0;
        for symbol in symbols.matching("__tracepoint_*") {
            if !symbol.size().is_some_and(|size| sizes.contains(&size)) {
                continue;
            }
            let named = LinkAddr(long(read("tracepoint", "name", at(&symbol))));
            let event = symbol.name().replacen("__tracepoint_", "", 1) + "\0";
            assert_eq!(
                image.read(named, event.len()),
                Some(event.as_bytes()),
                "{name}"
            );
            tracepoints += 1;
        }
        assert!(tracepoints > 200, "{name}: {tracepoints}");

        assert!(
            types
                .constant("system_states", "SYSTEM_RUNNING")
                .expect("a state")
                > 0
        );
        assert!(matches!(
            types.field("task_struct", "nothing"),
            Err(TypeError::NoMember { .. })
        ));
        assert!(matches!(
            types.field("task_struct", "stack.x"),
            Err(TypeError::NotHere { .. })
        ));
        assert!(matches!(
            types.size_of("nothing"),
            Err(TypeError::NoType { .. })
        ));
    });
}

#[test]
fn a_kernel_is_opened_once_and_shared() {
    fn shareable<T: Send + Sync>(_: &T) {}
    each_kernel(|name| {
        let kernel = Kernel::open(read_kernel(name, "vmlinuz"))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        shareable(&kernel);
        assert!(
            kernel.resident() < 64 << 20,
            "{name}: {}",
            kernel.resident()
        );
        assert_eq!(
            kernel.symbols().address("linux_banner"),
            Ok(kernel.banner().address)
        );
        let text = kernel.section_at(
            kernel
                .symbols()
                .address("version_proc_show")
                .expect("a function"),
        );
        assert_eq!(text.map(|section| section.name.as_str()), Some(".text"));
        let init = kernel.section_at(
            kernel
                .symbols()
                .address("start_kernel")
                .expect("a function"),
        );
        assert_eq!(
            init.map(|section| section.name.as_str()),
            Some(".init.text")
        );
        let noinstr = kernel
            .between("__noinstr_text_start", "__noinstr_text_end")
            .expect("a range");
        assert!(noinstr.start < noinstr.end);
        // Instructions and the tables that are freed after the boot are still there, data are not.
        assert!(kernel.image().read(noinstr.start, 16).is_some());
        let kept = |section: &str| {
            let section = kernel.image().section(section).expect("a section");
            kernel.image().section_bytes(section).map(<[u8]>::len)
        };
        assert!(kept(".return_sites") > Some(1000));
        assert_eq!(kept(".rodata"), None);
    });
}

#[test]
fn sites_are_looked_up() {
    let kernel = kernel("6.12");
    let symbols = Symbols::of(&kernel).unwrap_or_else(|error| panic!("{error}"));
    let resolve = |text: &str| text.parse::<Site>().and_then(|site| site.resolve(&symbols));
    let start = symbols.address("version_proc_show").expect("a function");
    assert_eq!(resolve("version_proc_show"), Ok(Some(start)));
    assert_eq!(resolve("version_proc_show+0x4"), Ok(Some(start.offset(4))));
    assert_eq!(resolve("version_proc_show@1+4"), Ok(Some(start.offset(4))));
    assert_eq!(resolve("0xffffffff81000000"), Ok(None));
    assert!(matches!(
        resolve("version_proc_show@2"),
        Err(SiteError::NoSuchPosition { .. })
    ));
    assert!(matches!(
        resolve("version_proc_show+0x10000"),
        Err(SiteError::OutsideSymbol { .. })
    ));
    assert_eq!(resolve("ext4:ext4_sync_fs"), Ok(None));
    assert!(matches!(
        resolve("runqueues"),
        Err(SiteError::Absolute { .. })
    ));
    let Err(SiteError::Unknown { near, .. }) = resolve("version_prco_show") else {
        panic!()
    };
    assert_eq!(near, ["version_proc_show"]);

    let (name, count) = most_common(&symbols);
    let Err(SiteError::Ambiguous { count: told, .. }) = resolve(&name) else {
        panic!("{name}")
    };
    assert_eq!(told, count);
    let each: Vec<_> = (1..=count)
        .map(|n| resolve(&format!("{name}@{n}")).expect("one"))
        .collect();
    assert!(each.is_sorted());
    let second = symbols.named(&name).nth(1).expect("the second");
    assert_eq!((second.address(), second.position()), (each[1], 2));
}

fn most_common(symbols: &Symbols) -> (String, usize) {
    let mut names: Vec<_> = symbols
        .iter()
        .filter(|s| s.is_function())
        .map(|s| s.name())
        .collect();
    names.sort();
    let runs = names
        .chunk_by(|a, b| a == b)
        .map(|run| (run[0].clone(), run.len()));
    runs.max_by_key(|(_, count)| *count).expect("a symbol")
}

fn at(symbol: &patcher::symbols::Symbol<'_>) -> LinkAddr {
    symbol.address().unwrap_or_default()
}

#[test]
fn unwind_tables_are_of_the_format_that_their_hash_says() {
    let known = [
        ("6.1", OrcFormat::Plain),
        ("6.12", OrcFormat::Signal),
        ("6.12-generic", OrcFormat::Signal),
        ("7.2@sid", OrcFormat::Renumbered),
    ];
    each_kernel(|name| {
        let kernel = Kernel::open(read_kernel(name, "vmlinuz"))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let table = kernel.orc().expect("unwind tables");
        if let Some((_, format)) = known.iter().find(|(known, _)| *known == name) {
            assert_eq!(table.format(), *format, "{name}");
        }
        assert!(table.len() > 300_000, "{name}: {}", table.len());
        assert!(table.resident() < 6 << 20, "{name}: {}", table.resident());
        StackLayout::of(&kernel).unwrap_or_else(|error| panic!("{name}: {error}"));
    });
}

#[test]
fn every_cold_part_belongs_to_a_function() {
    // GCC 12 splits them off in 6.1 and not in 6.12, as Debian configures the two.
    for (name, least) in [("6.1", 2000), ("6.12", 0)] {
        let symbols = Symbols::of(&kernel(name)).expect("symbols");
        let parts: Vec<_> = symbols.matching("*.cold").collect();
        assert!(parts.len() >= least, "{name}: {}", parts.len());
        for part in parts {
            let (part_name, at) = (part.name(), part.address().expect("an address"));
            let mut wholes = symbols.whole_of(&part_name);
            let covers = |whole| symbols.parts(whole).is_some_and(|parts| parts.contains(at));
            assert!(wholes.any(covers), "{name}: {part_name}");
        }
    }
}

#[test]
fn types_of_a_module_go_on_from_those_of_its_kernel() {
    use object::{Object, ObjectSection};
    let kernel = Kernel::open(read_kernel("6.1", "vmlinuz")).expect("a kernel");
    // Not compressed in this one.
    let file = read_kernel("6.1", "modules/kernel/net/netfilter/nf_conntrack.ko");
    let file = object::File::parse(&file[..]).expect("an ELF file");
    let section = file.section_by_name(".BTF").expect("types");
    let data = section.data().expect("their bytes");
    let types = Types::parse_split(data, kernel.shared_types()).expect("split types");
    assert!(types.len() > 100 && types.len() < kernel.types().len() / 10);
    // Its own; one that it extends from the kernel's; and one of the kernel's.
    let own = types.field("nf_conntrack_net", "users4").expect("a member");
    assert_eq!(own.size, 4);
    assert!(kernel.types().size_of("nf_conntrack_net").is_err());
    assert_eq!(
        types.field("task_struct", "comm"),
        kernel.types().field("task_struct", "comm")
    );
    assert!(Types::parse_split(data, std::sync::Arc::new(types)).is_err());
    // On their own they mean nothing, and nothing panics.
    if let Ok(alone) = Types::parse(data) {
        assert!(alone.field("nf_conntrack_net", "users4").is_err());
    }
}
