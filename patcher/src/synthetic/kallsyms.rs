//! Writes symbol tables as scripts/kallsyms.c does, in every layout.

use std::collections::BTreeSet;

use crate::guest::LinkAddr;
use crate::symbols::{Layout, OffsetForm};

use super::{RODATA, TEXT};

/// One symbol to write.
#[derive(Clone, Debug)]
pub struct SyntheticSymbol {
    /// Link address, or an absolute value.
    pub value: u64,
    /// As nm prints it.
    pub kind: char,
    /// Its name.
    pub name: String,
}

/// A symbol table to write.
#[derive(Clone, Debug)]
pub struct Kallsyms {
    /// Order of the tables.
    pub layout: Layout,
    /// Form of the offsets.
    pub offsets: OffsetForm,
    /// Boundary on which tables start: 4 or 8.
    pub align: usize,
    /// Write the names' order, too.
    pub sorted_names: bool,
    /// In the order in which they are written, which should be that of values.
    pub symbols: Vec<SyntheticSymbol>,
}

impl Kallsyms {
    /// A table of `count` symbols and a few that every kernel has.
    #[must_use]
    pub fn example(layout: Layout, offsets: OffsetForm, count: usize) -> Self {
        let mut symbols = Vec::new();
        let mut add = |value: u64, kind, name: &str| {
            symbols.push(SyntheticSymbol {
                value,
                kind,
                name: name.to_owned(),
            });
        };
        if offsets == OffsetForm::PerCpu {
            add(0, 'A', "__per_cpu_start");
            add(0x1000, 'A', "cpu_number");
        }
        add(TEXT.0, 'T', "_text");
        add(TEXT.0, 'T', "_stext");
        for number in 0..count {
            let at = TEXT.0 + 0x100 + 0x40 * number as u64;
            match number % 8 {
                0 => add(at, 't', "duplicate"),
                1 => {
                    add(at, 't', &format!("__pfx_function_{number}"));
                    add(at + 0x10, 't', &format!("function_{number}"));
                }
                2 => add(
                    at,
                    'T',
                    &format!("exported_{}_{}", number * 7919 % 1000, number),
                ),
                3 => add(at, 't', &format!("function_{number}.cold")),
                // Long enough for a length of two bytes, also when packed.
                4 if number % 64 == 4 => {
                    add(at, 't', &"_RNvXs9_zyx".repeat(41)[..400 + number % 50])
                }
                _ => add(at, 't', &format!("static_{number:x}.isra.0")),
            }
        }
        add(RODATA.0, 'D', "linux_banner");
        add(RODATA.0 + 0x10_0000, 'D', "_end_of_rodata");
        Self {
            layout,
            offsets,
            align: 8,
            sorted_names: true,
            symbols,
        }
    }

    /// The tables, as they stand at link address `base`, which is a multiple of 8.
    #[must_use]
    pub fn write(&self, base: LinkAddr) -> Vec<u8> {
        let tokens = self.tokens();
        let mut out = Vec::new();
        if self.layout == Layout::A {
            self.write_offsets(&mut out, base);
            out.extend(TEXT.0.to_le_bytes());
        }
        self.put(&mut out, &(self.symbols.len() as u32).to_le_bytes());
        let mut names = Vec::new();
        let mut markers = Vec::new();
        for (index, symbol) in self.symbols.iter().enumerate() {
            if index % 256 == 0 {
                markers.extend((names.len() as u32).to_le_bytes());
            }
            let packed = pack(&format!("{}{}", symbol.kind, symbol.name), &tokens);
            match packed.len() {
                short @ ..0x80 => names.push(short as u8),
                long => names.extend([0x80 | long as u8, (long >> 7) as u8]),
            }
            names.extend(packed);
        }
        self.put(&mut out, &names);
        self.put(&mut out, &markers);
        if self.layout == Layout::A && self.sorted_names {
            self.write_order(&mut out);
        }
        let mut table = Vec::new();
        let mut index = Vec::new();
        for token in &tokens {
            index.extend((table.len() as u16).to_le_bytes());
            table.extend(token.bytes());
            table.push(0);
        }
        self.put(&mut out, &table);
        self.put(&mut out, &index);
        if self.layout != Layout::A {
            self.write_offsets(&mut out, base);
            if self.layout == Layout::B {
                out.extend(TEXT.0.to_le_bytes());
            }
            if self.sorted_names {
                self.write_order(&mut out);
            }
        }
        out
    }

    fn put(&self, out: &mut Vec<u8>, table: &[u8]) {
        out.extend(table);
        out.resize(out.len().next_multiple_of(self.align), 0);
    }

    fn write_offsets(&self, out: &mut Vec<u8>, base: LinkAddr) {
        let start = base.offset(out.len() as u64);
        let mut offsets = Vec::new();
        for (index, symbol) in self.symbols.iter().enumerate() {
            let absolute = symbol.value < 1 << 31;
            let offset = match self.offsets {
                OffsetForm::PerCpu if absolute => symbol.value,
                OffsetForm::PerCpu => (TEXT.0 - 1).wrapping_sub(symbol.value),
                OffsetForm::Base => symbol.value.wrapping_sub(TEXT.0),
                OffsetForm::Own => symbol.value.wrapping_sub(start.0 + 4 * index as u64),
            };
            offsets.extend((offset as u32).to_le_bytes());
        }
        self.put(out, &offsets);
    }

    fn write_order(&self, out: &mut Vec<u8>) {
        let mut order: Vec<usize> = (0..self.symbols.len()).collect();
        order.sort_by_key(|&index| &self.symbols[index].name);
        let order: Vec<u8> = order
            .iter()
            .flat_map(|&index| (index as u32).to_be_bytes().into_iter().skip(1))
            .collect();
        self.put(out, &order);
    }

    /// A token for each character that occurs, and in the other places longer ones.
    fn tokens(&self) -> Vec<String> {
        let mut used: BTreeSet<char> = self.symbols.iter().flat_map(|s| s.name.chars()).collect();
        used.extend(self.symbols.iter().map(|symbol| symbol.kind));
        // As in every kernel, all digits occur.
        used.extend('0'..='9');
        let mut longer = [
            "static_",
            "function",
            ".isra",
            "_",
            "exported",
            "tfunction_",
            "dup",
        ]
        .into_iter()
        .filter(|token| token.len() > 1);
        (0..=255_u8)
            .map(|byte| match char::from(byte) {
                known if used.contains(&known) => known.to_string(),
                _ => longer.next().unwrap_or_default().to_owned(),
            })
            .collect()
    }
}

/// Packs a name with the longest tokens first.
fn pack(name: &str, tokens: &[String]) -> Vec<u8> {
    let mut packed = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let fits = |(_, token): &(usize, &String)| !token.is_empty() && rest.starts_with(*token);
        let best = tokens
            .iter()
            .enumerate()
            .filter(fits)
            .max_by_key(|(_, token)| token.len());
        let (number, token) = best.expect("a token for each character");
        packed.push(number as u8);
        rest = &rest[token.len()..];
    }
    packed
}
