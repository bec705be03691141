//! Types by a few words each, and where their members are.

use std::collections::BTreeMap;

use super::Btf;

/// Where a member is: bytes from the start of its structure, and how many it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Bytes from the start.
    pub offset: u64,
    /// Bytes that it has.
    pub size: u64,
}

/// A type that others are made of.
#[derive(Clone, Debug)]
struct Known {
    id: u32,
    size: u64,
    align: u64,
}

/// Structures whose members lie one behind the other, as the C compiler puts them. The offsets are
/// reckoned here, not read back from what is written.
#[derive(Clone, Debug)]
pub struct Shape {
    btf: Btf,
    known: BTreeMap<String, Known>,
    /// By `structure.member.member[1]`.
    spans: BTreeMap<String, Span>,
}

impl Default for Shape {
    fn default() -> Self {
        Self::new()
    }
}

impl Shape {
    /// Integers `u8` to `u64`, and `ptr`.
    #[must_use]
    pub fn new() -> Self {
        let mut btf = Btf::new();
        let mut known = BTreeMap::new();
        for (name, size) in [("u8", 1), ("u16", 2), ("u32", 4), ("u64", 8)] {
            let id = btf.int(name, size);
            let size = u64::from(size);
            let align = size;
            known.insert(name.to_owned(), Known { id, size, align });
        }
        let pointer = Known {
            id: btf.pointer(0),
            size: 8,
            align: 8,
        };
        known.insert("ptr".into(), pointer);
        Self {
            btf,
            known,
            spans: BTreeMap::new(),
        }
    }

    /// Adds a structure: its members as `name:type`, or `name:type[count]`, with spaces between.
    pub fn add(&mut self, name: &str, members: &str) -> &mut Self {
        let (mut end, mut align) = (0_u64, 1);
        let mut rows = Vec::new();
        for member in members.split_whitespace() {
            let (member, kind) = member.split_once(':').unwrap();
            let (element, count) = match kind.split_once('[') {
                Some((element, count)) => (element, count.strip_suffix(']').unwrap().parse().ok()),
                None => (kind, None),
            };
            let of = self.known[element].clone();
            let start = end.next_multiple_of(of.align);
            end = start + of.size * u64::from(count.unwrap_or(1));
            align = align.max(of.align);
            let path = format!("{name}.{member}");
            let id = match count {
                Some(count) => self.btf.array(of.id, self.known["u32"].id, count),
                None => of.id,
            };
            rows.push((member, id, 8 * start as u32));
            let size = end - start;
            let span = |offset, size| Span {
                offset: start + offset,
                size,
            };
            self.spans.insert(path.clone(), span(0, size));
            let inner: Vec<_> = self.spans.range(format!("{element}.")..).collect();
            let inner: Vec<_> = inner
                .into_iter()
                .map_while(|(path, &at)| {
                    let rest = path.strip_prefix(element)?.strip_prefix('.')?;
                    Some((rest.to_owned(), at))
                })
                .collect();
            for number in 0..u64::from(count.unwrap_or(1)) {
                let (path, base) = match count {
                    Some(_) => (format!("{path}[{number}]"), number * of.size),
                    None => (path.clone(), 0),
                };
                self.spans.insert(path.clone(), span(base, of.size));
                for (rest, at) in &inner {
                    let inner = span(base + at.offset, at.size);
                    self.spans.insert(format!("{path}.{rest}"), inner);
                }
            }
            if count.is_some() {
                self.spans.insert(path, span(0, size));
            }
        }
        let size = end.next_multiple_of(align);
        let id = self.btf.structure(name, size as u32, &rows);
        self.known
            .insert(name.to_owned(), Known { id, size, align });
        self
    }

    /// Adds an enumeration of 4 bytes; without a name it is an anonymous one.
    pub fn constants(&mut self, name: &str, values: &[(&str, u32)]) -> &mut Self {
        let extra: Vec<u32> = values
            .iter()
            .flat_map(|&(name, value)| [self.btf.string(name), value])
            .collect();
        let kind = (6, false, values.len() as u32);
        self.btf.record(name, kind, 4, &extra);
        self
    }

    /// Where a member is: `task_struct.thread.sp`.
    #[must_use]
    pub fn span(&self, path: &str) -> Span {
        let span = self.spans.get(path);
        *span.unwrap_or_else(|| panic!("there is no {path}"))
    }

    /// Bytes of a type.
    #[must_use]
    pub fn size(&self, name: &str) -> u64 {
        self.known[name].size
    }

    /// The type information.
    #[must_use]
    pub fn btf(&self) -> &Btf {
        &self.btf
    }
}
