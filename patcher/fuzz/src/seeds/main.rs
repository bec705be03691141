//! Makes the corpora that fuzzing begins with: `seeds FOLDER [FILE...]`.
//!
//! Into a folder for each target go small inputs that are well, from the synthetic writers and out
//! of the kernels and memory dumps that are named.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a tool of the tests: it fails by panicking"
)]

mod cut;
mod real;

use std::path::{Path, PathBuf};

use patcher::symbols::{Layout, OffsetForm};
use patcher::synthetic::{
    Btf, ElfSection, FakeGuest, Guest, Kallsyms, Packing, Plan, RODATA, Random, TEXT, bzimage,
    core, elf, pack,
};

/// Where inputs go.
struct Corpora(PathBuf);

impl Corpora {
    fn add(&self, target: &str, name: &str, input: &[u8]) {
        assert!(
            fuzz::ALL.iter().any(|&(known, _)| known == target),
            "{target}"
        );
        let folder = self.0.join(target);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(name), input).unwrap();
    }
}

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let folder = arguments
        .next()
        .unwrap_or_else(|| panic!("seeds FOLDER [FILE...]"));
    let corpora = Corpora(folder.into());
    images(&corpora);
    tables(&corpora);
    guests(&corpora);
    for file in arguments {
        real::add(&corpora, Path::new(&file));
    }
}

/// A kernel in each packing.
fn images(corpora: &Corpora) {
    let section = |name, address, bytes: &[u8], executable| ElfSection {
        name,
        address,
        bytes: bytes.to_vec(),
        executable,
    };
    let notes = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0a synthetic build id";
    let banner = b"Linux version 6.99.0-fuzz (a@b) #1 SMP\n\0";
    let mut file = elf(&[
        section(".text", TEXT, &[0xcc; 0x80], true),
        section(".rodata", RODATA, banner, false),
        section(".notes", RODATA.offset(0x1000), notes, false),
    ]);
    corpora.add("image", "vmlinux", &file);
    // The list of what KASLR moves, behind the file.
    for word in [0, 0, 0x8100_0010_u32, 0, 0x8100_0020] {
        file.extend(word.to_le_bytes());
    }
    for packing in Packing::ALL {
        let name = format!("{packing:?}").to_lowercase();
        corpora.add("image", &name, &bzimage(&pack(packing, &file)));
    }
}

/// Symbol tables and types.
fn tables(corpora: &Corpora) {
    for layout in [Layout::A, Layout::B, Layout::C] {
        for form in [OffsetForm::PerCpu, OffsetForm::Base, OffsetForm::Own] {
            if (layout == Layout::C) != (form == OffsetForm::Own) {
                continue;
            }
            let table = Kallsyms::example(layout, form, 260).write(RODATA);
            corpora.add("kallsyms", &format!("{layout:?}-{form:?}"), &table);
        }
    }
    let example = Btf::example().write();
    corpora.add("btf", "example", &with_split(&example, &example));
}

/// An input for the target `btf`.
fn with_split(kernel: &[u8], module: &[u8]) -> Vec<u8> {
    let len = u16::try_from(kernel.len()).unwrap();
    [&len.to_le_bytes()[..], kernel, module].concat()
}

/// Edits of a guest, stacks, and a dump.
fn guests(corpora: &Corpora) {
    let mut random = Random::new(1);
    let mut bytes = |len: usize| -> Vec<u8> {
        (0..len)
            .map(|_| u8::try_from(random.below(256)).unwrap())
            .collect()
    };
    for target in ["page_walk", "tasks", "modules", "log", "stacks"] {
        corpora.add(target, "none", &[0xff]);
        for number in 0..16 {
            corpora.add(target, &number.to_string(), &bytes(4 + 4 * number));
        }
    }
    // No tables of its own, no edits; words of code and places on the stack.
    let mut stack = vec![0, 0xff, 40];
    for number in 0..40_u8 {
        stack.extend([1, 0x10, 0x10 + 0x10 * (number % 8)]);
    }
    corpora.add("stacks", "code", &stack);
    // Enough of a guest to find its kernel in: its page tables and its version string.
    let guest = Guest::new(Plan::new(), 0x8_0000);
    let mut small = FakeGuest::new(0xa000);
    let mut page = vec![0; 0xa000];
    use patcher::guest::{Gpa, GuestMemory, StoppedGuest};
    guest.fake.image.read(Gpa(0), &mut page).unwrap();
    small.image.write(Gpa(0), &page).unwrap();
    *small.image.vcpus_mut() = guest.fake.image.vcpus().to_vec();
    corpora.add("core", "synthetic", &core(&small.image));
}
