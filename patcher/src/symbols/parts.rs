//! A function is not one range: compilers split parts off it.
//!
//! `name.cold` holds what is seldom executed: it is reached by jumps from the function and is a
//! part of it. `name.constprop.0`, `name.isra.0` and `name.part.0` are functions of their own,
//! called by others: copies of the function or of a piece of it, which a change to the function
//! does not reach.

use std::ops::Range;

use super::{Symbol, Symbols};
use crate::guest::LinkAddr;

/// Endings of what GCC clones from a function, in front of a number.
const CLONES: [&str; 3] = ["constprop", "isra", "part"];
/// The ending of what GCC and Clang split off.
const COLD: &str = ".cold";

/// Everything that a function is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FunctionParts {
    /// From its entry up to the next symbol.
    pub main: Range<LinkAddr>,
    /// Parts that were split off. When several functions have the name, the parts of all of them:
    /// the symbols do not tell whose is which.
    pub cold: Vec<Range<LinkAddr>>,
    /// The padding in front of the entry (`__pfx_`), which no instruction of the function is in.
    pub padding: Option<Range<LinkAddr>>,
}

impl FunctionParts {
    /// All ranges in which an instruction of the function can be.
    pub fn ranges(&self) -> impl Iterator<Item = &Range<LinkAddr>> {
        std::iter::once(&self.main).chain(&self.cold)
    }

    /// Whether an instruction of the function can be at `at`.
    #[must_use]
    pub fn contains(&self, at: LinkAddr) -> bool {
        self.ranges().any(|range| range.contains(&at))
    }
}

impl Symbols {
    /// All parts of a function; `None` for a symbol that is none, or that is a part itself.
    #[must_use]
    pub fn parts(&self, function: Symbol<'_>) -> Option<FunctionParts> {
        let name = function.name();
        if !function.is_function() || name.ends_with(COLD) {
            return None;
        }
        let range = |symbol: Symbol<'_>| {
            let start = symbol.address()?;
            Some(start..start.offset(symbol.size()?))
        };
        let main = range(function)?;
        let cold = format!("{name}{COLD}");
        let padding = format!("__pfx_{name}");
        let mut paddings = self.named(&padding).filter_map(range);
        Some(FunctionParts {
            cold: self.named(&cold).filter_map(range).collect(),
            padding: paddings.find(|padding| padding.end == main.start),
            main,
        })
    }

    /// The functions that the one called `name` may be a part of: itself, or for a `.cold` part
    /// those that it was split from.
    pub fn whole_of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Symbol<'a>> {
        let whole = name.strip_suffix(COLD).unwrap_or(name);
        self.named(whole).filter(Symbol::is_function)
    }

    /// Functions that the compiler made from `name` beside it. Looks through all symbols.
    #[must_use]
    pub fn clones(&self, name: &str) -> Vec<Symbol<'_>> {
        let is_clone = |found: &[u8]| {
            let ending = found.strip_prefix(name.as_bytes());
            let ending = ending.and_then(|ending| std::str::from_utf8(ending).ok());
            ending.is_some_and(is_clone_ending)
        };
        self.iter()
            .filter(|symbol| symbol.is_function() && symbol.with_name(is_clone))
            .collect()
    }
}

/// `.constprop.0.isra.1`, for instance.
fn is_clone_ending(ending: &str) -> bool {
    let Some(ending) = ending.strip_prefix('.') else {
        return false;
    };
    let mut words = ending.split('.');
    while let Some(word) = words.next() {
        let number = words.next().is_some_and(|n| n.parse::<u32>().is_ok());
        if !CLONES.contains(&word) || !number {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::super::format::Region;
    use super::*;
    use crate::symbols::{Layout, OffsetForm};
    use crate::synthetic::{Kallsyms, RODATA, SyntheticSymbol, TEXT};

    fn symbols() -> Symbols {
        let mut kallsyms = Kallsyms::example(Layout::C, OffsetForm::Own, 700);
        let mut at = TEXT.0 + 0x10_0000;
        for name in [
            "__pfx_f",
            "f",
            "f.constprop.0",
            "f.isra.0.part.1",
            "f.llvm.7",
            "twin",
            "twin",
            "f.cold",
            "f.constprop.0.cold",
            "twin.cold",
            "end",
        ] {
            kallsyms.symbols.push(SyntheticSymbol {
                value: at,
                kind: 't',
                name: name.to_owned(),
            });
            at += 0x10;
        }
        kallsyms.symbols.sort_by_key(|symbol| symbol.value);
        let bytes = kallsyms.write(RODATA);
        Symbols::read(&Region {
            base: RODATA,
            bytes: &bytes,
        })
        .unwrap()
    }

    fn at(number: u64) -> Range<LinkAddr> {
        let start = TEXT.offset(0x10_0000 + 0x10 * number);
        start..start.offset(0x10)
    }

    #[test]
    fn a_function_is_all_its_parts() {
        let symbols = symbols();
        let f = symbols.parts(symbols.unique("f").unwrap()).unwrap();
        assert_eq!(
            (&f.main, &f.cold, &f.padding),
            (&at(1), &vec![at(7)], &Some(at(0)))
        );
        assert!(f.contains(at(7).start) && !f.contains(at(0).start));
        assert!(!f.contains(at(8).start));
        let copy = symbols.unique("f.constprop.0").unwrap();
        assert_eq!(symbols.parts(copy).unwrap().cold, [at(8)]);
        for twin in symbols.named("twin") {
            assert_eq!(symbols.parts(twin).unwrap().cold, [at(9)]);
        }
        for none in ["f.cold", "__pfx_f"] {
            assert_eq!(symbols.parts(symbols.unique(none).unwrap()), None);
        }
        assert_eq!(symbols.whole_of("twin.cold").count(), 2);
        assert_eq!(symbols.whole_of("f").count(), 1);
        let clones = symbols.clones("f");
        let clones: Vec<_> = clones.iter().map(Symbol::name).collect();
        assert_eq!(clones, ["f.constprop.0", "f.isra.0.part.1"]);
    }
}
