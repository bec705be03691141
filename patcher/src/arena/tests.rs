use super::*;
use crate::guest::fake::{self, FakeGuest};
use crate::guest::{LinkAddr, MemoryImage, Slide};
use crate::space::{PerCpu, Root};

const TEXT: LinkAddr = LinkAddr(0xffff_ffff_8100_0000);
const FIXMAP_TABLE: LinkAddr = LinkAddr(0xffff_ffff_8102_0000);
const KERNEL_TABLE: LinkAddr = LinkAddr(0xffff_ffff_8103_0000);
const HOLE: Gva = Gva(0xffff_ffff_ff80_0000);
const SLIDE: Slide = Slide(0x20_0000);

struct Setup {
    guest: FakeGuest,
    located: Located,
    layout: ArenaLayout,
}

/// A guest whose two level 2 tables are where their symbols say.
fn setup(global: u64) -> Setup {
    let mut guest = FakeGuest::new(0x40_0000);
    guest.page(TEXT.at(SLIDE), global);
    for (symbol, of) in [(FIXMAP_TABLE, HOLE), (KERNEL_TABLE, TEXT.at(SLIDE))] {
        let table = Gpa(guest.entry(of, 2).0 & !0xfff);
        let slot = guest.entry(symbol.at(SLIDE), 1);
        guest.set(slot, table.0 | fake::PRESENT | fake::WRITABLE);
    }
    let located = Located {
        slide: SLIDE,
        root: guest.root(),
        phys_base: Gpa(0),
        page_offset_base: None,
        per_cpu: PerCpu::none(),
        bounds: crate::space::Bounds::USUAL,
    };
    let layout = ArenaLayout {
        fixmap: FIXMAP_TABLE,
        kernel: KERNEL_TABLE,
        text: TEXT,
    };
    Setup {
        guest,
        located,
        layout,
    }
}

fn snapshot(image: &MemoryImage) -> Vec<u8> {
    let mut bytes = vec![0; 0x40_0000];
    crate::guest::GuestMemory::read(image, Gpa(0), &mut bytes).unwrap();
    bytes
}

#[test]
fn code_is_executable_and_data_is_not() {
    for global in [0, fake::GLOBAL] {
        let mut setup = setup(global);
        let image = &mut setup.guest.image;
        let mut arena = Arena::install(image, &setup.located, &setup.layout).unwrap();
        let report = arena.report();
        assert_eq!((report.code, report.data), (HOLE, HOLE.offset(BLOCK)));

        let slot = arena.take_code(5, 1).unwrap();
        arena.fill(image, slot, &[0x90, 0xc3]).unwrap();
        let data = arena.take_data(8, 64).unwrap();
        arena.fill(image, data, &[7; 8]).unwrap();
        arena.check(image).unwrap();

        let space = setup.located.space(image);
        let code = space.mapping(slot.at).unwrap();
        assert!(code.executable && !code.writable && !code.user);
        assert_eq!(code.global, global != 0);
        assert!(!image.guest_may_write(code.gpa));
        let data = space.mapping(data.at).unwrap();
        assert!(!data.executable && data.writable && !data.user);
        let mut found = [0; 4];
        space.read(slot.at, &mut found).unwrap();
        assert_eq!(found, [0x90, 0xc3, 0xcc, 0xcc]);
    }
}

#[test]
fn freed_code_is_int3_and_can_be_taken_again() {
    let mut setup = setup(0);
    let image = &mut setup.guest.image;
    let mut arena = Arena::install(image, &setup.located, &setup.layout).unwrap();
    let slot = arena.take_code(32, 1).unwrap();
    arena.fill(image, slot, &[0x90; 32]).unwrap();
    arena.free(image, slot).unwrap();
    let mut found = [0; 32];
    setup
        .located
        .space(image)
        .read(slot.at, &mut found)
        .unwrap();
    assert_eq!(found, [0xcc; 32]);
    assert_eq!(arena.take_code(16, 1).unwrap().at, slot.at);
    let error = arena.take_code(BLOCK, 1).unwrap_err();
    assert!(matches!(error, ArenaError::Full { .. }));
}

#[test]
fn removal_leaves_the_guest_as_it_was() {
    let mut setup = setup(0);
    let image = &mut setup.guest.image;
    let before = snapshot(image);
    let arena = Arena::install(image, &setup.located, &setup.layout).unwrap();
    let [code, data] = arena.blocks();
    assert_ne!(snapshot(image), before);
    arena.remove(image).unwrap();
    assert_eq!(snapshot(image), before);
    for block in [code, data] {
        assert!(crate::guest::GuestMemory::read_u64(image, block).is_err());
    }
}

#[test]
fn taken_entries_are_left_alone() {
    let mut setup = setup(0);
    // Present, and not present but not empty.
    for (index, raw) in [(0, 0x1000_00e3), (2, 0x1234_5000)] {
        let slot = setup.guest.entry(HOLE.offset(index * BLOCK), 2);
        setup.guest.set(slot, raw);
    }
    let image = &mut setup.guest.image;
    let arena = Arena::install(image, &setup.located, &setup.layout).unwrap();
    let report = arena.report();
    assert_eq!(report.code, HOLE.offset(BLOCK));
    // The last entry beside the image.
    assert_eq!(report.data, Gva(0xffff_ffff_bfe0_0000));
}

#[test]
fn a_table_that_is_not_the_kernels_is_left_alone() {
    let mut setup = setup(0);
    setup.layout.fixmap = TEXT;
    setup.layout.kernel = TEXT;
    let image = &mut setup.guest.image;
    let before = snapshot(image);
    let error = Arena::install(image, &setup.located, &setup.layout).unwrap_err();
    assert_eq!(error, ArenaError::NoEntry { looked: 515 });
    assert_eq!(snapshot(image), before);
}

#[test]
fn a_changed_entry_is_noticed_and_not_overwritten() {
    let mut setup = setup(0);
    let image = &mut setup.guest.image;
    let arena = Arena::install(image, &setup.located, &setup.layout).unwrap();
    let entry = arena.code.entry.at;
    image.write(entry, &0x55_u64.to_le_bytes()).unwrap();
    assert!(matches!(
        arena.check(image),
        Err(ArenaError::Changed { found: 0x55, .. })
    ));
    arena.remove(image).unwrap();
    assert_eq!(
        crate::guest::GuestMemory::read_u64(image, entry).unwrap(),
        0x55
    );
}

/// A kernel that writes to our code with its write protection off.
#[test]
fn what_the_cpu_notes_in_an_entry_is_no_change() {
    let mut setup = setup(0);
    let image = &mut setup.guest.image;
    let before = snapshot(image);
    let arena = Arena::install(image, &setup.located, &setup.layout).unwrap();
    let entry = arena.code.entry;
    image
        .write(entry.at, &(entry.raw | DIRTY).to_le_bytes())
        .unwrap();
    arena.check(image).unwrap();
    arena.remove(image).unwrap();
    assert_eq!(snapshot(image), before);
}

#[test]
fn blocks_out_of_reach_are_refused() {
    assert_eq!(place::entry(Gpa(0x1000), 1), None);
    assert_eq!(place::entry(Gpa(1 << 52), 1), None);
    assert_eq!(place::entry(Gpa(0x20_0000), 1), Some(0x20_0001));
}

#[test]
fn a_guest_without_tables_gets_no_arena() {
    let mut guest = FakeGuest::new(0x20_0000);
    let located = Located {
        slide: SLIDE,
        root: Root {
            table: Gpa(0xffff_f000),
            levels: 4,
        },
        phys_base: Gpa(0),
        page_offset_base: None,
        per_cpu: PerCpu::none(),
        bounds: crate::space::Bounds::USUAL,
    };
    let layout = setup(0).layout;
    assert!(matches!(
        Arena::install(&mut guest.image, &located, &layout),
        Err(ArenaError::Text(_))
    ));
}
