//! Compressed symbol names.
//!
//! scripts/kallsyms.c writes for each symbol a length, then that many token numbers; the tokens
//! strung together are the symbol's type (as nm prints it) and its name. The length is one byte,
//! or two with bit 7 of the first set (since 6.1, 73bbb94466fd "kallsyms: support big kernel
//! symbols").

/// The 256 tokens.
#[derive(Clone, Debug)]
pub(super) struct Tokens {
    text: Vec<u8>,
    /// Where each token starts, and after the last one where it ends. All within `text`.
    starts: Vec<u32>,
}

impl Tokens {
    pub(super) const COUNT: usize = 256;

    /// Takes 256 NUL-terminated strings from the start of `bytes`. Also returns their offsets as
    /// kallsyms_token_index lists them, and the length of all.
    pub(super) fn read(bytes: &[u8]) -> Option<(Self, Vec<u16>, usize)> {
        let mut tokens = Self {
            text: Vec::new(),
            starts: vec![0],
        };
        let mut offsets = Vec::with_capacity(Self::COUNT);
        let mut at = 0;
        for _ in 0..Self::COUNT {
            offsets.push(u16::try_from(at).ok()?);
            let rest = bytes.get(at..)?;
            let len = rest.iter().take(MAX_TOKEN).position(|&byte| byte == 0)?;
            tokens.text.extend_from_slice(rest.get(..len)?);
            tokens.starts.push(u32::try_from(tokens.text.len()).ok()?);
            at += len + 1;
        }
        Some((tokens, offsets, at))
    }

    pub(super) fn get(&self, number: u8) -> &[u8] {
        let edge = |at: usize| self.starts.get(at).map_or(0, |&edge| edge as usize);
        let number = usize::from(number);
        self.text
            .get(edge(number)..edge(number + 1))
            .unwrap_or_default()
    }

    pub(super) fn resident(&self) -> usize {
        self.text.capacity() + self.starts.capacity() * 4
    }
}

/// Longer tokens than this do not come out of names of at most 512 characters.
pub(super) const MAX_TOKEN: usize = 512;

/// The entry at `at`: its token numbers, and where the next entry starts.
pub(super) fn entry(names: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let first = usize::from(*names.get(at)?);
    let (len, start) = if first & 0x80 == 0 {
        (first, at + 1)
    } else {
        (first & 0x7f | usize::from(*names.get(at + 1)?) << 7, at + 2)
    };
    let end = start.checked_add(len).filter(|_| len != 0)?;
    Some((names.get(start..end)?, end))
}

/// Writes type and name of an entry into `into`, after emptying it.
pub(super) fn expand(tokens: &Tokens, entry: &[u8], into: &mut Vec<u8>) {
    into.clear();
    for &number in entry {
        into.extend_from_slice(tokens.get(number));
    }
}
