use super::*;
use crate::guest::fake::{FakeGuest, kernel_registers};
use crate::space::PerCpuVariable;

const ENTRY: LinkAddr = LinkAddr(0xffff_ffff_8100_0080);
const BANNER: LinkAddr = LinkAddr(0xffff_ffff_8110_0000);
const BUILD_ID: LinkAddr = LinkAddr(0xffff_ffff_8110_0800);
const TOP_TABLE: LinkAddr = LinkAddr(0xffff_ffff_8120_0000);
const STATE: LinkAddr = LinkAddr(0xffff_ffff_8110_1000);
const PHYS_BASE: LinkAddr = LinkAddr(0xffff_ffff_8110_1008);
const DIRECT_MAP: LinkAddr = LinkAddr(0xffff_ffff_8110_1010);
const OFFSETS: LinkAddr = LinkAddr(0xffff_ffff_8110_1100);
const POSSIBLE: LinkAddr = LinkAddr(0xffff_ffff_8110_1200);
const SLIDE: Slide = Slide(0x0340_0000);
const TEXT: &[u8] = b"Linux version 6.12.0 (someone@somewhere)";
const RUNNING: u64 = 3;

fn marks() -> Landmarks {
    Landmarks {
        entry: ENTRY,
        banner: BANNER,
        banner_text: TEXT.to_vec(),
        build_id: Some((BUILD_ID, vec![0xab; 20])),
        top_table: TOP_TABLE,
        state: STATE,
        state_size: 4,
        states: vec![
            (RUNNING, "SYSTEM_RUNNING"),
            (0, "SYSTEM_BOOTING"),
            (7, "SYSTEM_SUSPEND"),
        ],
        phys_base: Some(PHYS_BASE),
        page_offset_base: Some(DIRECT_MAP),
        per_cpu: PerCpuMarks::new(OFFSETS, POSSIBLE, 8),
        bounds: Bounds::USUAL,
    }
}

/// A booted kernel with CPUs 0 and 2.
fn guest() -> FakeGuest {
    let mut guest = FakeGuest::new(0x40_0000);
    let page = guest.page(BANNER.at(SLIDE), 0);
    guest.page(STATE.at(SLIDE), 0);
    let slot = guest.entry(TOP_TABLE.at(SLIDE), 1);
    guest.set(slot, guest.root.0 | 3);
    guest.put(BANNER.at(SLIDE), TEXT);
    guest.put(BUILD_ID.at(SLIDE), &[0xab; 20]);
    guest.put(STATE.at(SLIDE), &[3, 0, 0, 0]);
    let base = page
        .0
        .wrapping_sub(BANNER.at(SLIDE).distance_from(KERNEL_MAP));
    guest.put_u64(PHYS_BASE.at(SLIDE), base);
    guest.put_u64(DIRECT_MAP.at(SLIDE), 0xffff_8880_0000_0000);
    guest.put_u64(OFFSETS.at(SLIDE), 0xffff_8880_0010_0000);
    guest.put_u64(OFFSETS.at(SLIDE).offset(16), 0xffff_8880_0020_0000);
    guest.put_u64(POSSIBLE.at(SLIDE), 0b101);
    guest.add_vcpu(|vcpu| vcpu.registers.lstar = ENTRY.at(SLIDE).0);
    guest
}

fn find(guest: &FakeGuest) -> Result<Located, LocateError> {
    Located::find(&guest.image, &marks())
}

#[test]
fn a_booted_kernel_is_found() {
    let guest = guest();
    let found = find(&guest).unwrap();
    assert_eq!(found.slide, SLIDE);
    assert_eq!(found.root, guest.root());
    assert_eq!(found.page_offset_base, Some(Gva(0xffff_8880_0000_0000)));
    assert_eq!(found.per_cpu.cpus().collect::<Vec<_>>(), [0, 2]);
    let variable = PerCpuVariable::Absolute(0x40);
    assert_eq!(
        found.per_cpu.address(variable, 2),
        Some(Gva(0xffff_8880_0020_0040))
    );
    assert_eq!(found.per_cpu.address(variable, 1), None);
    let mut registers = kernel_registers(guest.root);
    registers.gs_base = 0xffff_8880_0020_0000;
    assert_eq!(found.per_cpu.cpu_of(&registers), Some(2));
    registers.cs = 0x33;
    assert_eq!(found.per_cpu.cpu_of(&registers), None);
    registers.kernel_gs_base = 0xffff_8880_0010_0000;
    assert_eq!(found.per_cpu.cpu_of(&registers), Some(0));
}

#[test]
fn cpus_that_have_not_come_up_do_not_matter() {
    let mut guest = guest();
    guest.add_vcpu(|vcpu| vcpu.activity = Activity::NotStarted);
    guest.add_vcpu(|vcpu| vcpu.registers.lstar = 0);
    guest.add_vcpu(|vcpu| {
        vcpu.nested = true;
        vcpu.registers.lstar = 0x1234;
    });
    assert_eq!(find(&guest).unwrap().slide, SLIDE);
}

#[test]
fn a_user_mode_table_under_isolation_is_replaced_by_the_kernels() {
    let mut guest = guest();
    let user = Gpa(guest.root.0 | 0x1000);
    for vcpu in guest.image.vcpus_mut() {
        vcpu.registers.cr3 = user.0 | 0x8000_0000_0000_0801;
        vcpu.registers.cs = 0x33;
    }
    assert_eq!(find(&guest).unwrap().root, guest.root());
}

#[test]
fn a_kernel_that_is_not_up_is_told_from_one_that_goes_down() {
    let mut guest = guest();
    for (state, booting) in [(0, true), (1, true), (7, false), (200, false)] {
        guest.put(STATE.at(SLIDE), &[state, 0, 0, 0]);
        let error = find(&guest).unwrap_err();
        assert_eq!(
            matches!(error, LocateError::StillBooting { .. }),
            booting,
            "{error}"
        );
    }
    guest
        .image
        .vcpus_mut()
        .iter_mut()
        .for_each(|vcpu| vcpu.registers.lstar = 0);
    assert!(matches!(
        find(&guest),
        Err(LocateError::StillBooting { .. })
    ));
    guest.image.vcpus_mut().clear();
    assert!(matches!(
        find(&guest),
        Err(LocateError::StillBooting { .. })
    ));
}

#[test]
fn another_kernel_is_refused_with_what_it_is() {
    let mut other = guest();
    other.put(BANNER.at(SLIDE).offset(14), b"5.10.7");
    let error = find(&other).unwrap_err().to_string();
    assert!(error.contains("Linux version 5.10.7"), "{error}");
    assert!(error.contains("Linux version 6.12.0"), "{error}");

    let mut rebuilt = guest();
    rebuilt.put(BUILD_ID.at(SLIDE), &[0xcd; 20]);
    let error = find(&rebuilt).unwrap_err().to_string();
    assert!(error.contains(&"cd".repeat(20)), "{error}");

    let mut moved = guest();
    moved.put_u64(PHYS_BASE.at(SLIDE), 0x1000);
    assert!(matches!(
        find(&moved),
        Err(LocateError::OtherKernel {
            what: "phys_base",
            ..
        })
    ));
}

#[test]
fn impossible_slides_are_refused() {
    let mut guest = guest();
    for lstar in [
        0x1000,
        ENTRY.0 - 1,
        ENTRY.0 + 0x1000,
        ENTRY.0 + IMAGE_SPACE,
        u64::MAX,
    ] {
        guest
            .image
            .vcpus_mut()
            .iter_mut()
            .for_each(|vcpu| vcpu.registers.lstar = lstar);
        assert!(
            matches!(find(&guest), Err(LocateError::ImpossibleSlide { .. })),
            "{lstar:#x}"
        );
    }
    guest.add_vcpu(|vcpu| vcpu.registers.lstar = 0x5000);
    assert!(matches!(
        find(&guest),
        Err(LocateError::Disagreement { .. })
    ));
}

#[test]
fn vcpus_that_are_all_nested_tell_nothing() {
    let mut guest = guest();
    guest
        .image
        .vcpus_mut()
        .iter_mut()
        .for_each(|vcpu| vcpu.nested = true);
    assert_eq!(find(&guest), Err(LocateError::Nested));
}

#[test]
fn wild_page_tables_are_an_error() {
    for wild in [0, 0x000f_ffff_ffff_f000, 0x1000 | 1] {
        let mut guest = guest();
        for vcpu in guest.image.vcpus_mut() {
            vcpu.registers.cr3 = wild;
        }
        let _ = find(&guest);
    }
    let mut guest = guest();
    let slot = guest.entry(TOP_TABLE.at(SLIDE), 1);
    guest.set(slot, 0x000f_ffff_ffff_f000 | 1);
    assert!(matches!(find(&guest), Err(LocateError::Unreadable { .. })));
}
