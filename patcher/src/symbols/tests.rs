//! Symbol tables in every layout, damaged ones, and none.

use super::*;
use crate::synthetic::{self, Kallsyms, RODATA, Random, TEXT};

/// Every combination of order and form that kernels have had.
const FORMS: [(Layout, OffsetForm); 5] = [
    (Layout::A, OffsetForm::PerCpu),
    (Layout::A, OffsetForm::Base),
    (Layout::B, OffsetForm::PerCpu),
    (Layout::B, OffsetForm::Base),
    (Layout::C, OffsetForm::Own),
];

/// The table between other data.
fn region(kallsyms: &Kallsyms) -> Vec<u8> {
    let mut random = Random::new(7);
    let mut bytes: Vec<u8> = (0..0x1000)
        .map(|_| u8::try_from(random.below(256)).unwrap())
        .collect();
    // Zeroes and rising words, as markers start.
    bytes.extend((0..256_u32).flat_map(|n| (n % 5 * 600).to_le_bytes()));
    bytes.extend(kallsyms.write(RODATA.offset(bytes.len() as u64)));
    bytes.extend((0..0x1000).map(|_| u8::try_from(random.below(256)).unwrap()));
    bytes
}

fn read(bytes: &[u8]) -> Result<Symbols, SymbolsError> {
    Symbols::read(&Region {
        base: RODATA,
        bytes,
    })
}

#[test]
fn every_layout_is_read_back() {
    for (layout, offsets) in FORMS {
        for align in [4, 8] {
            for (sorted_names, count) in [(true, 1500), (false, 1501), (true, 767), (false, 1022)] {
                let mut kallsyms = Kallsyms::example(layout, offsets, count);
                kallsyms.align = align;
                kallsyms.sorted_names = sorted_names;
                let case = format!("{layout:?} {offsets:?} {align} {sorted_names} {count}");
                let symbols = read(&region(&kallsyms)).unwrap_or_else(|e| panic!("{case}: {e}"));
                assert_eq!(symbols.format().layout, layout, "{case}");
                assert_eq!(symbols.format().offsets, offsets, "{case}");
                assert_eq!(symbols.format().sorted_names, sorted_names, "{case}");
                assert_eq!(symbols.len(), kallsyms.symbols.len(), "{case}");
                for (found, wanted) in symbols.iter().zip(&kallsyms.symbols) {
                    assert_eq!(found.name(), wanted.name, "{case}");
                    assert_eq!(found.kind(), wanted.kind, "{case}");
                    assert_eq!(found.value(), wanted.value, "{case}");
                    let absolute = wanted.kind == 'A';
                    assert_eq!(found.address().is_none(), absolute, "{case}");
                }
            }
        }
    }
}

#[test]
fn names_lead_to_symbols_in_order_of_address() {
    let kallsyms = Kallsyms::example(Layout::B, OffsetForm::PerCpu, 1500);
    let symbols = read(&region(&kallsyms)).unwrap();
    let wanted: Vec<_> = kallsyms
        .symbols
        .iter()
        .filter(|s| s.name == "duplicate")
        .collect();
    let found: Vec<_> = symbols
        .named("duplicate")
        .map(|symbol| symbol.value())
        .collect();
    assert_eq!(found, wanted.iter().map(|s| s.value).collect::<Vec<_>>());
    assert_eq!(symbols.named("duplicate").nth(4).unwrap().position(), 5);
    assert!(matches!(
        symbols.unique("duplicate"),
        Err(SiteError::Ambiguous { count, .. }) if count == wanted.len()
    ));
    let Err(SiteError::Unknown { near, .. }) = symbols.unique("functoin_9") else {
        panic!()
    };
    assert_eq!(near.first().map(String::as_str), Some("function_9"));
    assert_eq!(symbols.unique("function_9").unwrap().kind(), 't');
    assert!(matches!(
        symbols.address("cpu_number"),
        Err(SiteError::Absolute { value: 0x1000, .. })
    ));
    assert_eq!(symbols.matching("function_?").count(), 2);
    assert_eq!(symbols.matching("*").count(), symbols.len());
}

#[test]
fn addresses_lead_to_symbols() {
    let kallsyms = Kallsyms::example(Layout::C, OffsetForm::Own, 1500);
    let mut symbols = read(&region(&kallsyms)).unwrap();
    // As Symbols::of does.
    symbols.parts = vec![TEXT.0..TEXT.0 + 0x2_0000, RODATA.0..RODATA.0 + 0x10_0000];
    let function = symbols.address("function_9").unwrap();
    let place = symbols.at(function.offset(3)).unwrap();
    assert_eq!(
        (place.symbol.name().as_str(), place.offset, place.size),
        ("function_9", 3, 0x30)
    );
    let padding = symbols.at(function.displace(-1)).unwrap();
    assert_eq!(
        (padding.symbol.name().as_str(), padding.offset),
        ("__pfx_function_9", 0xf)
    );
    assert!(symbols.function_at(function.displace(-1)).is_none());
    assert_eq!(
        symbols.function_at(function).unwrap().symbol.name(),
        "function_9"
    );
    // Of two at one address it is the first.
    assert_eq!(symbols.at(TEXT.offset(8)).unwrap().symbol.name(), "_text");
    assert!(symbols.at(TEXT.displace(-1)).is_none());
    // Data are no function, and nothing reaches beyond the end of its section.
    assert_eq!(
        symbols.at(RODATA.offset(8)).unwrap().symbol.name(),
        "linux_banner"
    );
    assert!(symbols.function_at(RODATA.offset(8)).is_none());
    assert!(symbols.at(TEXT.offset(0x2_0000)).is_none());
    assert!(symbols.at(RODATA.offset(0x10_0000)).is_none());
    assert!(symbols.at(LinkAddr(0)).is_none());
    assert!(symbols.at(LinkAddr(u64::MAX)).is_none());
}

#[test]
fn what_is_missing_is_named() {
    assert_eq!(read(&[0; 0x1000]).unwrap_err(), SymbolsError::NoTokens);
    let kallsyms = Kallsyms::example(Layout::B, OffsetForm::Base, 1000);
    let whole = region(&kallsyms);
    // Names of no length.
    let mut names = whole.clone();
    let digits = memchr::memmem::find(&whole, b"0\x001\x002\x00").unwrap();
    names[digits - 3000..digits - 2000].fill(0);
    assert!(matches!(
        read(&names).unwrap_err(),
        SymbolsError::NoNames { .. }
    ));
    // Text that is not where text can be.
    let mut low = kallsyms.clone();
    low.symbols
        .iter_mut()
        .for_each(|symbol| symbol.value += 0x1000);
    assert!(matches!(
        read(&region(&low)).unwrap_err(),
        SymbolsError::NoAddresses { .. }
    ));
    let twice = [whole.clone(), whole].concat();
    assert_eq!(
        read(&twice).unwrap_err(),
        SymbolsError::Ambiguous { readings: 2 }
    );
}

#[test]
fn no_prefix_and_no_damage_leads_to_a_panic() {
    for (layout, offsets) in FORMS {
        let kallsyms = Kallsyms::example(layout, offsets, 300);
        let whole = kallsyms.write(RODATA);
        for len in (0..whole.len()).step_by(13) {
            let _ = read(&whole[..len]);
        }
        let mut random = Random::new(offsets as u64);
        for _ in 0..500 {
            let mut bytes = whole.clone();
            random.damage(&mut bytes);
            if let Ok(symbols) = read(&bytes) {
                use_everything(&symbols);
            }
        }
    }
}

fn use_everything(symbols: &Symbols) {
    for symbol in symbols.iter().step_by(7) {
        let _ = (
            symbol.name(),
            symbol.kind(),
            symbol.size(),
            symbol.position(),
        );
        if let Some(address) = symbol.address() {
            let _ = symbols.function_at(address.offset(5));
        }
    }
    let _ = symbols.unique("function_1O");
    let _ = symbols.matching("*_[0-9]*").count();
}

#[test]
fn hostile_data_do_not_hold_the_search_up() {
    // Digits and rising words without end.
    let digits = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00".repeat(20_000);
    let _ = read(&digits);
    let words: Vec<u8> = (0..200_000_u32)
        .flat_map(|n| (n % 300 * 600).to_le_bytes())
        .collect();
    let kallsyms = Kallsyms::example(Layout::C, OffsetForm::Own, 300);
    let table = kallsyms.write(RODATA.offset(words.len() as u64));
    assert!(read(&[words, table].concat()).is_ok());
}

#[test]
fn a_table_of_another_kernel_is_refused() {
    let mut kallsyms = Kallsyms::example(Layout::B, OffsetForm::PerCpu, 600);
    let open = |k: &Kallsyms| Symbols::of(&Image::open(synthetic::vmlinux(k)).unwrap());
    assert!(open(&kallsyms).is_ok());
    let banner = kallsyms
        .symbols
        .iter_mut()
        .find(|s| s.name == "linux_banner")
        .unwrap();
    banner.value += 8;
    assert!(matches!(
        open(&kallsyms),
        Err(SymbolsError::BannerMismatch { .. })
    ));
}
