//! A few types out of many, with all that they are made of.

use std::collections::BTreeMap;

/// Bytes behind a record, and for each of its members, by kind (include/uapi/linux/btf.h).
const EXTRA: [(usize, usize); 20] = [
    (0, 0),
    (4, 0),
    (0, 0),
    (12, 0),
    (0, 12),
    (0, 12),
    (0, 8),
    (0, 0),
    (0, 0),
    (0, 0),
    (0, 0),
    (0, 0),
    (0, 0),
    (0, 8),
    (4, 0),
    (0, 12),
    (0, 0),
    (4, 0),
    (0, 0),
    (0, 12),
];
const POINTER: u32 = 2;
const ARRAY: u32 = 3;
const COMPOSITES: std::ops::RangeInclusive<u32> = 4..=5;
const ENUMS: [u32; 2] = [6, 19];
/// Typedefs and qualifiers.
const TRANSPARENT: [u32; 5] = [8, 9, 10, 11, 18];

struct Source<'a> {
    bytes: &'a [u8],
    /// Where each type's record is; type 1 is the first.
    records: Vec<usize>,
    strings: usize,
}

impl<'a> Source<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        let word = |at| word(bytes, at) as usize;
        let types = word(4) + word(8);
        let mut source = Self {
            bytes,
            records: Vec::new(),
            strings: word(4) + word(16),
        };
        let mut at = types;
        while at < types + word(12) {
            source.records.push(at);
            let info = source.info(at);
            let (fixed, each) = EXTRA[(info >> 24 & 0x1f) as usize];
            at += 12 + fixed + each * (info & 0xffff) as usize;
        }
        source
    }

    fn info(&self, at: usize) -> u32 {
        word(self.bytes, at + 4)
    }

    fn string(&self, at: u32) -> &'a [u8] {
        let rest = &self.bytes[self.strings + at as usize..];
        &rest[..rest.iter().position(|&byte| byte == 0).unwrap()]
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// What is written.
struct Cut<'a> {
    source: Source<'a>,
    /// New numbers of types by old ones; 0 while one is being taken.
    taken: BTreeMap<u32, u32>,
    types: Vec<u8>,
    count: u32,
    strings: Vec<u8>,
}

impl Cut<'_> {
    fn string(&mut self, at: u32) -> u32 {
        let text = self.source.string(at);
        if text.is_empty() {
            return 0;
        }
        let new = u32::try_from(self.strings.len()).unwrap();
        self.strings.extend(text);
        self.strings.push(0);
        new
    }

    /// Takes a type with all that it is made of; what it only points to is left behind.
    fn take(&mut self, id: u32) -> u32 {
        if id == 0 {
            return 0;
        }
        if let Some(&known) = self.taken.get(&id) {
            return known;
        }
        self.taken.insert(id, 0);
        let at = self.source.records[id as usize - 1];
        let info = self.source.info(at);
        let kind = info >> 24 & 0x1f;
        let name = self.string(word(self.source.bytes, at));
        let mut last = word(self.source.bytes, at + 8);
        if kind == POINTER {
            last = 0;
        } else if TRANSPARENT.contains(&kind) {
            last = self.take(last);
        }
        let (fixed, each) = EXTRA[kind as usize];
        let len = fixed + each * (info & 0xffff) as usize;
        let mut extra: Vec<u32> = (0..len / 4)
            .map(|index| word(self.source.bytes, at + 12 + 4 * index))
            .collect();
        if kind == ARRAY {
            extra[0] = self.take(extra[0]);
            extra[1] = 0;
        }
        if COMPOSITES.contains(&kind) {
            for member in extra.chunks_exact_mut(3) {
                member[0] = self.string(member[0]);
                member[1] = self.take(member[1]);
            }
        }
        if ENUMS.contains(&kind) {
            for value in extra.chunks_exact_mut(each / 4) {
                value[0] = self.string(value[0]);
            }
        }
        for word in [name, info, last].iter().chain(&extra) {
            self.types.extend(word.to_le_bytes());
        }
        self.count += 1;
        self.taken.insert(id, self.count);
        self.count
    }
}

/// The structures of these names.
pub(crate) fn types(bytes: &[u8], names: &[&str]) -> Vec<u8> {
    let mut cut = Cut {
        source: Source::new(bytes),
        taken: BTreeMap::new(),
        types: Vec::new(),
        count: 0,
        strings: vec![0],
    };
    for (index, &at) in cut.source.records.clone().iter().enumerate() {
        let name = cut.source.string(word(bytes, at));
        let composite = COMPOSITES.contains(&(cut.source.info(at) >> 24 & 0x1f));
        if composite && names.iter().any(|wanted| wanted.as_bytes() == name) {
            cut.take(u32::try_from(index).unwrap() + 1);
        }
    }
    let lens = [cut.types.len(), cut.strings.len()].map(|len| u32::try_from(len).unwrap());
    let header = [24, 0, lens[0], lens[0], lens[1]].map(u32::to_le_bytes);
    [
        &[0x9f, 0xeb, 1, 0],
        &header.concat()[..],
        &cut.types,
        &cut.strings,
    ]
    .concat()
}
