//! What reads whole files, or sections of them.

use std::collections::BTreeSet;
use std::sync::Arc;

use patcher::guest::{Gpa, GuestMemory, LinkAddr, MemoryImage, StoppedGuest};
use patcher::image::{Image, recognise};
use patcher::space::{Root, complete_registers, walk};
use patcher::stack::{OrcFormat, OrcTable};
use patcher::symbols::{Site, Symbol, Symbols};
use patcher::synthetic::{ElfSection, RODATA, TEXT, elf};
use patcher::types::Types;

use crate::Input;
use crate::guests::Base;

/// A kernel's file: recognised, unpacked, its headers read; then cut down to parts of it.
pub fn image(data: &[u8]) {
    let _ = recognise(data);
    let Ok(mut image) = Image::open(data.to_vec()) else {
        return;
    };
    for section in image.sections() {
        let _ = image.section_bytes(section);
        let _ = image.read(section.address, 16);
        let _ = image.section_at(section.address);
    }
    let parts: Vec<_> = image
        .sections()
        .iter()
        .take(4)
        .map(|section| section.address.offset(1)..section.address.offset(section.size / 2))
        .collect();
    let _ = Symbols::of(&image);
    let _ = OrcTable::of(&image);
    image.shrink_to(|section| section.executable, &parts);
    for section in image.sections() {
        let _ = image.section_bytes(section);
        let _ = image.read(section.address, 16);
    }
    let _ = image.relocations().map(|all| all.iter().count());
}

/// A kernel's read-only data: a symbol table is looked for in them, and used.
pub fn kallsyms(data: &[u8]) {
    let section = |name, address, bytes: &[u8], executable| ElfSection {
        name,
        address,
        bytes: bytes.to_vec(),
        executable,
    };
    let file = elf(&[
        section(".text", TEXT, &[0xcc; 0x40], true),
        section(".rodata", RODATA, data, false),
    ]);
    let Ok(image) = Image::open(file) else {
        return;
    };
    let Ok(symbols) = Symbols::of(&image) else {
        return;
    };
    let count = symbols.len();
    assert_eq!(symbols.iter().count(), count);
    let picked = symbols.iter().step_by(count / 16 + 1);
    for symbol in picked {
        let name = symbol.name();
        // A name that is no text is shown as text all the same, and found only as it is.
        let is_text = !name.contains(char::REPLACEMENT_CHARACTER);
        let is_it = |other: Symbol<'_>| other.value() == symbol.value();
        assert!(!is_text || symbols.named(&name).any(is_it));
        assert!(symbol.position() > 0);
        let _ = (symbol.kind(), symbol.size());
        let _ = symbols.unique(&name);
        if let Some(at) = symbol.address() {
            let _ = symbols.at(at);
            let _ = symbols.function_at(at.offset(3));
        }
        let _ = symbols.parts(symbol);
        let _ = symbols.clones(&name);
        if let Ok(site) = name.parse::<Site>() {
            let _ = site.resolve(&symbols);
        }
    }
    let _ = symbols.matching("*[a-f]?_*").take(10).count();
    let _ = symbols.at(LinkAddr(u64::MAX));
    let _ = symbols.resident();
}

/// Names that real kernels have, beside those in the data.
const NAMES: [&str; 6] = [
    "task",
    "flags",
    "list_head",
    "task_struct",
    "struct pid",
    "wide",
];

/// Types, and types of a module on top of them: the first two bytes say how long the first are.
pub fn btf(data: &[u8]) {
    let mut input = Input::new(data);
    let len = usize::from(input.short());
    let kernel = input.bytes(len);
    let Ok(types) = Types::parse(kernel) else {
        return;
    };
    ask(&types, kernel);
    let types = Arc::new(types);
    if let Ok(split) = Types::parse_split(input.rest(), types) {
        ask(&split, input.rest());
        assert!(Types::parse_split(input.rest(), Arc::new(split)).is_err());
    }
}

/// Looks up what the data themselves name.
fn ask(types: &Types, data: &[u8]) {
    let words = data.split(|&byte| byte == 0).rev();
    let words = words.filter_map(|word| std::str::from_utf8(word).ok());
    let words: BTreeSet<&str> = words.filter(|word| !word.is_empty()).take(24).collect();
    for holder in words.iter().copied().chain(NAMES) {
        let _ = types.size_of(holder);
        let _ = types.enumerator(holder);
        let _ = types.calling(holder);
        for member in words.iter().copied().take(12) {
            let _ = types.field(holder, member);
            let _ = types.field(holder, &format!("{member}[3].{holder}"));
            let _ = types.constant(holder, member);
        }
    }
}

/// The formats of unwind tables.
pub(crate) const FORMATS: [OrcFormat; 3] =
    [OrcFormat::Plain, OrcFormat::Signal, OrcFormat::Renumbered];

/// Unwind tables: a byte for the format, two for the number of addresses, and both tables.
pub fn orc(data: &[u8]) {
    let mut input = Input::new(data);
    let Some(&format) = input.pick(&FORMATS) else {
        return;
    };
    let slots = TEXT.0.wrapping_add(u64::from(input.byte()) << 24);
    let count = usize::from(input.short());
    let addresses = input.bytes(count.saturating_mul(4));
    if let Ok(table) = OrcTable::new(format, slots, addresses, input.rest()) {
        assert_eq!(table.len(), addresses.len() / 4);
        assert!(table.resident() <= 64 * (table.len() + 16));
    }
    let sections = super::orc_sections(format, slots, addresses.to_vec(), input.rest().to_vec());
    let mut all = vec![ElfSection {
        name: ".text",
        address: TEXT,
        bytes: vec![0xcc; 0x40],
        executable: true,
    }];
    all.extend(sections);
    if let Ok(image) = Image::open(elf(&all)) {
        let _ = OrcTable::of(&image);
    }
}

/// A memory dump, and the kernel looked for in it.
pub fn core(data: &[u8]) {
    let Ok(mut image) = MemoryImage::from_core(data.to_vec()) else {
        return;
    };
    let mut bytes = [0; 64];
    for range in image.ram() {
        assert!(range.start.0.checked_add(range.len).is_some());
        assert!(image.read(range.start, &mut bytes[..1]).is_ok());
        assert!(
            image
                .read(range.start.offset(range.len - 1), &mut bytes[..1])
                .is_ok()
        );
        let _ = image.read(range.start.offset(range.len / 2), &mut bytes);
        let _ = image.read(Gpa(range.start.0.wrapping_sub(1)), &mut bytes);
    }
    for vcpu in image.vcpus().iter().take(4) {
        if let Ok(roots) = Root::candidates(&vcpu.registers) {
            for root in roots {
                let _ = walk(&image, root, patcher::guest::Gva(vcpu.registers.rip));
            }
        }
    }
    // Every place that KASLR knows is tried with every one of them.
    image.vcpus_mut().truncate(2);
    let _ = complete_registers(&mut image, &Base::get().marks);
}
