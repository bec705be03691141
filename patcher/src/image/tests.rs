//! Images in every packing, damaged ones, and what is none.

use super::*;
use crate::symbols::{Layout, OffsetForm};
use crate::synthetic::{self, Kallsyms, Packing, RODATA, Random, TEXT, TYPES};

fn vmlinux() -> Vec<u8> {
    synthetic::vmlinux(&Kallsyms::example(Layout::B, OffsetForm::PerCpu, 600))
}

#[test]
fn a_vmlinux_is_taken_apart() {
    let image = Image::open(vmlinux()).unwrap();
    assert_eq!(*image.kind(), Kind::Vmlinux);
    assert_eq!(image.entry(), 0x0100_0000);
    let names: Vec<_> = image
        .sections()
        .iter()
        .map(|section| section.name.as_str())
        .collect();
    assert_eq!(names, [".text", ".rodata", ".BTF", ".notes", ".shstrtab"]);
    assert_eq!(image.segments().len(), 4);
    assert_eq!(image.read(TEXT, 4), Some(&[0xcc; 4][..]));
    assert_eq!(image.read(TEXT.offset(0x1_ffff), 1), Some(&[0xcc][..]));
    assert_eq!(image.read(TEXT.offset(0x1_ffff), 2), None);
    assert_eq!(image.read(TEXT.displace(-1), 1), None);
    assert_eq!(image.read(TEXT, usize::MAX), None);
    let banner = image.banner().unwrap();
    assert_eq!(
        (banner.address, banner.text.as_str()),
        (RODATA, synthetic::BANNER)
    );
    assert_eq!(banner.release(), "6.99.0-synthetic");
    let build_id = image.build_id().unwrap();
    assert_eq!(build_id.bytes, synthetic::BUILD_ID);
    assert_eq!(build_id.address, TYPES.offset(0x10_0000 + 16));
    assert_eq!(image.section_at(TEXT.offset(5)).unwrap().name, ".text");
}

#[test]
fn every_packing_is_unpacked() {
    let plain = vmlinux();
    for packing in Packing::ALL {
        let file = synthetic::bzimage(&synthetic::pack(packing, &plain));
        let image = Image::open(file).unwrap_or_else(|error| panic!("{packing:?}: {error}"));
        assert_eq!(image.bytes, plain, "{packing:?}");
        let Kind::BzImage(header) = image.kind() else {
            panic!("{packing:?}")
        };
        assert_eq!(
            header.version.as_deref(),
            Some("6.99.0-synthetic (nobody@nowhere) #1 SMP")
        );
    }
}

/// More than one block of lz4's and lzop's.
#[test]
fn long_payloads_are_unpacked() {
    let mut random = Random::new(1);
    let plain: Vec<u8> = (0..9 << 20)
        .map(|_| u8::try_from(random.below(16)).unwrap())
        .collect();
    for packing in [Packing::Lz4, Packing::Lzo] {
        assert!(
            unpack::unpack(&synthetic::pack(packing, &plain)).unwrap() == plain,
            "{packing:?}"
        );
    }
}

#[test]
fn wrong_sizes_are_refused() {
    let plain = vmlinux();
    for packing in Packing::ALL {
        let packed = synthetic::pack(packing, &plain);
        let end = packed.len() - 4;
        for wrong in [plain.len() - 1, plain.len() + 1, 0x1000] {
            let size = u32::try_from(wrong).unwrap().to_le_bytes();
            let file = synthetic::bzimage(&[&packed[..end], &size].concat());
            let refused = Image::open(file).unwrap_err();
            assert!(
                matches!(refused, ImageError::Unpack { .. }),
                "{packing:?} {wrong}: {refused}"
            );
        }
        for wrong in [0, u32::MAX] {
            let file = synthetic::bzimage(&[&packed[..end], &wrong.to_le_bytes()].concat());
            let refused = Image::open(file).unwrap_err();
            assert!(
                matches!(refused, ImageError::ImplausibleSize { .. }),
                "{packing:?}: {refused}"
            );
        }
    }
}

#[test]
fn refusals_are_distinct() {
    let unknown = synthetic::bzimage(b"neither this nor that");
    assert!(
        matches!(Image::open(unknown), Err(ImageError::UnknownCompression { magic }) if magic == *b"neit")
    );
    let inner = synthetic::bzimage(&synthetic::pack(Packing::Zstd, &[7; 4096]));
    assert!(matches!(
        Image::open(inner),
        Err(ImageError::NotAKernel { .. })
    ));
    let mut whole = synthetic::bzimage(&synthetic::pack(Packing::Zstd, &vmlinux()));
    whole.pop();
    assert!(matches!(
        Image::open(whole),
        Err(ImageError::Truncated { .. })
    ));
    let user = synthetic::elf(&[synthetic::ElfSection {
        name: ".text",
        address: LinkAddr(0x40_0000),
        bytes: vec![0; 64],
        executable: true,
    }]);
    assert!(matches!(
        Image::open(user),
        Err(ImageError::NotAKernel { .. })
    ));
    let nothing = Image::open(Vec::new());
    assert!(matches!(
        nothing,
        Err(ImageError::NotAKernel {
            found: "the file is empty"
        })
    ));
}

#[test]
fn shrinking_keeps_what_is_wanted() {
    let mut image = Image::open(vmlinux()).unwrap();
    let whole = image.resident();
    let part = RODATA.offset(8)..RODATA.offset(24);
    let wanted = image.read(part.start, 16).unwrap().to_vec();
    image.shrink_to(
        |section| section.executable || section.name == ".notes",
        &[part.clone(), LinkAddr(8)..LinkAddr(16)],
    );
    assert!(image.resident() < whole);
    assert_eq!(image.read(TEXT.offset(0x100), 2), Some(&[0xcc; 2][..]));
    assert_eq!(image.read(RODATA, 1), None);
    assert_eq!(image.read(part.start, 16), Some(&wanted[..]));
    assert_eq!(image.read(part.start, 17), None);
    let id = image.build_id().unwrap().clone();
    assert_eq!(image.read(id.address, 20), Some(&id.bytes[..]));
    assert_eq!(image.banner().unwrap().release(), "6.99.0-synthetic");
    let bytes = |name| {
        image
            .section_bytes(image.section(name).unwrap())
            .map(<[u8]>::len)
    };
    assert_eq!((bytes(".text"), bytes(".rodata")), (Some(0x2_0000), None));
}

#[test]
fn no_prefix_and_no_damage_leads_to_a_panic() {
    let plain = vmlinux();
    let headers = [0..0x400, plain.len() - 0x400..plain.len()];
    for len in headers.iter().cloned().flatten() {
        let cut = Image::open(plain[..len].to_vec()).unwrap_err();
        assert!(!matches!(cut, ImageError::Unpack { .. }), "{len}: {cut}");
    }
    let mut random = Random::new(9);
    for range in headers.iter().cycle().take(2000) {
        let mut bytes = plain.clone();
        random.damage(&mut bytes[range.clone()]);
        if let Ok(mut image) = Image::open(bytes) {
            let _ = (
                image.read(TEXT, 16),
                image.section_at(RODATA),
                image.banner(),
            );
            image.shrink_to(|_| true, &[]);
            assert!(image.resident() <= plain.len() + 64);
        }
    }
}

#[test]
fn damaged_payloads_are_refused_or_unpack_to_their_size() {
    let plain = &vmlinux()[..0x8000];
    for packing in Packing::ALL {
        let packed = synthetic::pack(packing, plain);
        let mut random = Random::new(packing as u64);
        for _ in 0..300 {
            let mut bytes = packed.clone();
            random.damage(&mut bytes[..packed.len() - 4]);
            if let Ok(out) = unpack::unpack(&bytes) {
                assert_eq!(out.len(), plain.len(), "{packing:?}");
            }
        }
        for len in (0..packed.len()).step_by(packed.len() / 100 + 1) {
            assert!(unpack::unpack(&packed[..len]).is_err(), "{packing:?} {len}");
        }
    }
}
