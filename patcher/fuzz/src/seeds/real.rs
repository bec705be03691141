//! Small inputs out of the kernels of distributions, and out of memory dumps.

use std::path::Path;

use patcher::guest::LinkAddr;
use patcher::image::{HEADER_LEN, Image, Kind};
use patcher::symbols::{OffsetForm, Symbols};
use patcher::synthetic::{Kallsyms, Packing, RODATA, SyntheticSymbol, TEXT, bzimage, pack};

use crate::{Corpora, cut, with_split};

/// Symbols of a table: more than one marker's worth.
const SYMBOLS: usize = 280;
/// Entries of unwind tables.
const ENTRIES: usize = 120;
/// Bytes of each section that are kept.
const SECTION: u64 = 48;

/// Adds what can be made of one file.
pub(crate) fn add(corpora: &Corpora, file: &Path) {
    let bytes = std::fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let folder = file.parent().and_then(Path::file_name).unwrap_or_default();
    let name = format!(
        "{}-{}",
        folder.to_string_lossy(),
        file.file_name().unwrap_or_default().to_string_lossy()
    );
    if bytes.get(16) == Some(&4) {
        corpora.add("core", &name, &shrunk(&bytes));
        return;
    }
    let image = Image::open(bytes.clone()).unwrap_or_else(|error| panic!("{name}: {error}"));
    match image.kind() {
        Kind::Vmlinux => {
            let small = shrunk(&bytes);
            corpora.add("image", &name, &small);
            corpora.add(
                "image",
                &format!("{name}-lz4"),
                &bzimage(&pack(Packing::Lz4, &small)),
            );
        }
        Kind::BzImage(_) => {
            corpora.add("image", &name, &bytes[..HEADER_LEN / 4]);
        }
    }
    symbols(corpora, &name, &image);
    orc(corpora, &name, &image);
    let btf = image
        .section(".BTF")
        .and_then(|section| image.section_bytes(section))
        .unwrap();
    let small = [
        "list_head",
        "xa_node",
        "pid",
        "inactive_task_frame",
        "module_memory",
    ];
    let kernel = cut::types(btf, &small);
    let module = cut::types(btf, &["pt_regs", "rethook_node"]);
    corpora.add("btf", &name, &with_split(&kernel, &module));
    corpora.add(
        "btf",
        &format!("{name}-task"),
        &with_split(
            &cut::types(btf, &["thread_struct", "sched_entity", "module"]),
            &[],
        ),
    );
}

/// Some of its symbols, in its own layout.
fn symbols(corpora: &Corpora, name: &str, image: &Image) {
    let all = Symbols::of(image).unwrap();
    let format = all.format();
    let absolute = |value: u64| value < TEXT.0;
    let mut symbols: Vec<_> = all
        .iter()
        .enumerate()
        .filter(|(index, symbol)| {
            let known = ["_text", "_stext", "linux_banner"].contains(&symbol.name().as_str());
            known || index % (all.len() / SYMBOLS) == 0
        })
        .map(|(_, symbol)| SyntheticSymbol {
            value: symbol.value(),
            kind: symbol.kind(),
            name: symbol.name(),
        })
        .collect();
    if format.offsets != OffsetForm::PerCpu {
        symbols.retain(|symbol| !absolute(symbol.value));
    }
    let table = Kallsyms {
        layout: format.layout,
        offsets: format.offsets,
        align: format.align,
        sorted_names: format.sorted_names,
        symbols,
    };
    corpora.add("kallsyms", name, &table.write(RODATA));
}

/// The first of its unwind entries, for both targets that take any.
fn orc(corpora: &Corpora, name: &str, image: &Image) {
    let bytes = |name| {
        let section = image.section(name)?;
        Some((section.address, image.section_bytes(section)?))
    };
    let (Some((slots, addresses)), Some((_, entries))) =
        (bytes(".orc_unwind_ip"), bytes(".orc_unwind"))
    else {
        return;
    };
    // The formats are numbered in the order in which they came.
    let format: u16 = match bytes(".orc_header") {
        None => 0,
        Some((_, [0xfe, ..])) => 1,
        Some(_) => 2,
    };
    let distances = addresses.chunks_exact(4).take(ENTRIES).enumerate();
    let starts: Vec<u64> = distances
        .map(|(index, raw)| {
            let at: LinkAddr = slots.offset(4 * index as u64);
            at.displace(i32::from_le_bytes(raw.try_into().unwrap()).into())
                .0
        })
        .collect();
    let mut plain = format.to_le_bytes().to_vec();
    plain.push(0);
    plain.extend(u16::try_from(starts.len()).unwrap().to_le_bytes());
    let mut stacks = vec![1];
    stacks.extend(format.to_le_bytes());
    stacks.push(u8::try_from(starts.len()).unwrap());
    let mut last = starts.first().copied().unwrap_or(0);
    for (index, (&start, entry)) in starts.iter().zip(entries.chunks_exact(6)).enumerate() {
        let slot = TEXT.0 + 4 * index as u64;
        let moved = TEXT.0 + 0x1000 + (start - starts[0]);
        plain.extend(&moved.wrapping_sub(slot).to_le_bytes()[..4]);
        stacks.extend(
            u16::try_from(start - last)
                .unwrap_or(u16::MAX)
                .to_le_bytes(),
        );
        stacks.extend(entry);
        last = start;
    }
    plain.extend(entries.iter().take(6 * starts.len()));
    stacks.extend([0xff, 30]);
    for number in 0..30_u8 {
        stacks.extend([1, number.wrapping_mul(37), number]);
    }
    corpora.add("orc", name, &plain);
    corpora.add("stacks", name, &stacks);
}

/// An ELF file with all its headers and little of what they are about.
fn shrunk(file: &[u8]) -> Vec<u8> {
    let half = |at: usize| usize::from(u16::from_le_bytes(file[at..at + 2].try_into().unwrap()));
    let long = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
    let (programs, sections) = (half(56), half(60));
    let at = |value: u64| usize::try_from(value).unwrap();
    let mut out = file[..64].to_vec();
    let mut data: Vec<u8> = Vec::new();
    let start = (64 + 56 * programs + 64 * sections) as u64;
    let mut keep = |offset: u64, len: u64, most: u64| {
        let len = len.min(most);
        let place = start + data.len() as u64;
        data.extend(file.get(at(offset)..at(offset + len)).unwrap_or_default());
        (place, len)
    };
    let put = |out: &mut Vec<u8>, at: usize, value: u64| {
        out[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    put(&mut out, 32, 64);
    put(
        &mut out,
        40,
        if sections > 0 {
            (64 + 56 * programs) as u64
        } else {
            0
        },
    );
    for number in 0..programs {
        let from = at(long(32)) + 56 * number;
        let mut header = file[from..from + 56].to_vec();
        let notes = header[0] == 4;
        let (place, len) = keep(
            long(from + 8),
            long(from + 32),
            if notes { 2048 } else { SECTION },
        );
        put(&mut header, 8, place);
        put(&mut header, 32, len);
        out.extend(header);
    }
    let names = half(62);
    for number in 0..sections {
        let from = at(long(40)) + 64 * number;
        let mut header = file[from..from + 64].to_vec();
        let bss = header[4] == 8;
        let most = if number == names { u64::MAX } else { SECTION };
        if !bss {
            let (place, len) = keep(long(from + 24), long(from + 32), most);
            put(&mut header, 24, place);
            put(&mut header, 32, len);
        }
        out.extend(header);
    }
    out.extend(data);
    out
}
