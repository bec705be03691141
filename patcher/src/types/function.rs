//! What functions take and give back.

use super::{Kind, Record, TypeError, Types};
use crate::hash::hash;

/// Bytes of a register, and of a word on the stack.
const WORD: u64 = 8;
/// Integer registers that arguments are given in (System V ABI for x86-64, 3.2.3).
const REGISTERS: u64 = 6;
/// A value of up to so many registers is returned in registers.
const RETURNED: u64 = 2;

/// How a function of the kernel is called, as far as its stack goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Calling {
    /// Words of arguments that its callers put on the stack, at most: structures that are given by
    /// value may be in registers all the same.
    pub stack_words: u64,
    /// More may follow than it declares.
    pub variadic: bool,
}

impl Types {
    /// How the function `name` is called.
    ///
    /// # Errors
    /// [`TypeError::NoType`] where the kernel does not tell, [`TypeError::Ambiguous`] when there are
    /// several functions of that name that are called in different ways.
    pub fn calling(&self, name: &str) -> Result<Calling, TypeError> {
        let wanted = hash(name.as_bytes());
        let all = self.functions.get_or_init(|| self.index_functions());
        let start = all.partition_point(|&(hash, _)| hash < wanted);
        let same = all.get(start..).unwrap_or_default().iter();
        let same = same.take_while(|&&(hash, _)| hash == wanted);
        let named: Vec<_> = same
            .filter_map(|&(_, id)| self.record(id).ok())
            .filter(|record| self.string(record.name) == name.as_bytes())
            .collect();
        let mut answers = named.iter().map(|record| self.calling_of(*record));
        let first = answers.next().ok_or_else(|| TypeError::NoType {
            name: name.to_owned(),
        })??;
        for other in answers {
            if other? != first {
                return Err(TypeError::Ambiguous {
                    name: name.to_owned(),
                    count: named.len(),
                });
            }
        }
        Ok(first)
    }

    /// (hash of the name, type) of every function, sorted.
    fn index_functions(&self) -> Vec<(u32, u32)> {
        let first = self.first();
        let numbers = (0..self.starts.len()).filter_map(|index| u32::try_from(index).ok());
        let mut all: Vec<_> = numbers
            .filter_map(|index| self.record(first.saturating_add(index)).ok())
            .filter(|record| record.kind == Kind::Func)
            .map(|record| (hash(self.string(record.name)), record.id))
            .collect();
        all.sort_unstable();
        all.shrink_to_fit();
        all
    }

    fn calling_of(&self, function: Record<'_>) -> Result<Calling, TypeError> {
        let prototype = self.record(function.size_or_type)?;
        let malformed = |what| TypeError::Malformed {
            id: prototype.id,
            what,
        };
        if prototype.kind != Kind::FuncProto {
            return Err(malformed("a function's type is no prototype"));
        }
        let (mut words, mut plain, mut variadic) = (0_u64, true, false);
        if self.words_returned(prototype.size_or_type)? > RETURNED {
            // The caller says where to put it.
            words += 1;
        }
        for kind in prototype.parameters() {
            // A type of 0 is `...`.
            if kind == 0 {
                variadic = true;
                continue;
            }
            let takes = self.size(kind, 0)?.div_ceil(WORD);
            plain &= takes == 1 && !self.plain(kind)?.kind.is_composite();
            // One that does not fit into what is left of the registers, or that has to be aligned.
            words = words.saturating_add(takes + u64::from(takes > 1));
        }
        Ok(Calling {
            stack_words: match plain {
                true => words.saturating_sub(REGISTERS),
                false => words,
            },
            variadic,
        })
    }

    /// Words of what is returned by value, where that may be more than registers hold.
    fn words_returned(&self, id: u32) -> Result<u64, TypeError> {
        match self.plain(id) {
            Ok(record) if record.kind.is_composite() => Ok(self.size(id, 0)?.div_ceil(WORD)),
            _ => Ok(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::Btf;

    fn types() -> Types {
        let mut btf = Btf::new();
        let long = btf.int("long", 8);
        let wide = btf.int("__int128", 16);
        let pointer = btf.pointer(long);
        let pair = btf.structure("pair", 16, &[("a", long, 0), ("b", long, 64)]);
        let large = btf.structure("large", 24, &[("a", pair, 0), ("b", long, 128)]);
        let alias = btf.typedef("pair_t", pair);
        btf.function("none", 0, &[]);
        btf.function("six", long, &[long, pointer, long, long, long, pointer]);
        btf.function("seven", 0, &[long; 7]);
        btf.function("pairs", 0, &[alias, pair, long]);
        btf.function("four_pairs", 0, &[pair; 4]);
        btf.function("by_value", 0, &[pointer, large]);
        btf.function("gives_large", large, &[long; 6]);
        btf.function("gives_pair", alias, &[long; 6]);
        btf.function("print", long, &[pointer, 0]);
        btf.function("wide", 0, &[wide, long]);
        btf.function("twice", 0, &[long]);
        btf.function("twice", 0, &[long; 8]);
        btf.function("same", 0, &[long]);
        btf.function("same", 0, &[pointer, pointer]);
        Types::parse(&btf.write()).unwrap()
    }

    #[test]
    fn what_is_on_the_stack_is_told_or_more() {
        let types = types();
        for (name, stack_words, variadic) in [
            ("none", 0, false),
            ("six", 0, false),
            ("seven", 1, false),
            // All of it, as it may not be in registers.
            ("pairs", 7, false),
            ("four_pairs", 12, false),
            ("by_value", 5, false),
            ("gives_large", 1, false),
            ("gives_pair", 0, false),
            ("print", 0, true),
            ("wide", 4, false),
            ("same", 0, false),
        ] {
            let expected = Calling {
                stack_words,
                variadic,
            };
            assert_eq!(types.calling(name), Ok(expected), "{name}");
        }
    }

    #[test]
    fn what_is_not_told_is_not_guessed() {
        let types = types();
        assert!(matches!(
            types.calling("twice"),
            Err(TypeError::Ambiguous { count: 2, .. })
        ));
        for name in ["", "pair", "sixth"] {
            assert!(matches!(types.calling(name), Err(TypeError::NoType { .. })));
        }
    }
}
