//! How is it laid out? The kernel's own type information (BTF).
//!
//! Guaranteed: the data are untrusted; parsing takes time in proportion to their length, looking
//! something up is bounded, and nothing panics. An answer is given only when every type of that
//! name gives the same one. Not guaranteed: that the data describe the guest truly; they are as
//! good as the image that they came from.
//!
//! Offsets and sizes are in bytes, bit positions count from the least significant bit of the
//! little-endian value.

mod enumerator;
mod error;
mod format;
mod function;
mod path;

pub use error::TypeError;
pub use function::Calling;

use std::sync::{Arc, OnceLock};

use crate::hash::hash;
use format::{Kind, Record};
use path::Step;

/// Typedefs and qualifiers in a row, and anonymous members inside each other, that are followed.
const DEPTH: usize = 32;

/// Members that are looked at for one answer.
const LOOKS: usize = 1 << 20;

/// Most bytes that are believed to be type information. Debian's kernels have 5 MiB.
const MAX_LEN: usize = 256 << 20;

/// All types of a kernel.
pub struct Types {
    /// Type records, then strings.
    bytes: Vec<u8>,
    /// Where the strings start.
    strings: usize,
    /// The blob's own description of its kinds, empty where there is none.
    layout: Vec<u8>,
    /// Where each type's record starts; type 1 is the first.
    starts: Vec<u32>,
    /// (hash of the name, type) of every named structure, union, typedef and enumeration, sorted.
    by_name: Vec<(u32, u32)>,
    /// The same of every function, made when the first of them is asked for.
    functions: OnceLock<Vec<(u32, u32)>>,
    /// The kernel's types, for those of a module: numbers and strings go on behind theirs.
    base: Option<Arc<Types>>,
}

/// Where a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Field {
    /// Bytes from the start of the outer type.
    pub offset: u64,
    /// Bytes that it occupies; of a bit field, those that hold any of its bits.
    pub size: u64,
    /// Which bits of those bytes, when it is a bit field.
    pub bits: Option<Bits>,
    /// It is a pointer.
    pub pointer: bool,
}

/// The place of a bit field in its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Bits {
    /// Bits to shift right.
    pub shift: u32,
    /// Bits to keep.
    pub width: u32,
}

impl Bits {
    /// The field's value in `raw`, the little-endian bytes of the [`Field`] as a number.
    #[must_use]
    pub const fn extract(self, raw: u64) -> u64 {
        let shifted = match raw.checked_shr(self.shift) {
            Some(shifted) => shifted,
            None => 0,
        };
        match 1_u64.checked_shl(self.width) {
            Some(above) => shifted & above.wrapping_sub(1),
            None => shifted,
        }
    }
}

/// A step of the way to a member: the type reached, and where it is.
#[derive(Clone, Copy)]
struct Spot {
    id: u32,
    bit: u64,
    width: Option<u32>,
}

impl std::fmt::Debug for Types {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} types", self.len())
    }
}

impl Types {
    /// Reads BTF as it stands in a kernel's `.BTF` section.
    ///
    /// # Errors
    /// [`TypeError`] when it is not BTF version 1, is cut off, or has a type of unknown kind.
    pub fn parse(bytes: &[u8]) -> Result<Self, TypeError> {
        Self::parse_on(bytes, None)
    }

    /// Reads the types of a module, which are split from those of its kernel. What is looked up and
    /// not found in the module is looked up in the kernel.
    ///
    /// # Errors
    /// As [`Types::parse`].
    pub fn parse_split(bytes: &[u8], kernel: Arc<Self>) -> Result<Self, TypeError> {
        if kernel.base.is_some() {
            return Err(TypeError::Malformed {
                id: 0,
                what: "a module's types are on top of those of another module",
            });
        }
        Self::parse_on(bytes, Some(kernel))
    }

    fn parse_on(bytes: &[u8], base: Option<Arc<Self>>) -> Result<Self, TypeError> {
        if bytes.len() > MAX_LEN {
            return Err(TypeError::Malformed {
                id: 0,
                what: "there is too much of it",
            });
        }
        let format::Parts {
            types: records,
            strings,
            layout,
        } = format::parts(bytes)?;
        let mut types = Self {
            bytes: [records, strings].concat(),
            strings: records.len(),
            layout: layout.to_vec(),
            starts: Vec::new(),
            by_name: Vec::new(),
            functions: OnceLock::new(),
            base,
        };
        let (mut at, mut id) = (0, types.first());
        while at < records.len() {
            let (record, next) = Record::read(records, layout, id, at)?;
            types.starts.push(u32::try_from(at).unwrap_or(u32::MAX));
            let wanted = matches!(record.kind, Kind::Typedef | Kind::Enum | Kind::Enum64);
            if wanted || record.kind.is_composite() {
                let name = types.string(record.name);
                if !name.is_empty() {
                    types.by_name.push((hash(name), id));
                }
            }
            at = next;
            id += 1;
        }
        types.by_name.sort_unstable();
        types.starts.shrink_to_fit();
        types.by_name.shrink_to_fit();
        Ok(types)
    }

    /// The number of the first type of its own.
    fn first(&self) -> u32 {
        let below = self.base.as_ref().map_or(0, |base| base.len());
        u32::try_from(below).unwrap_or(u32::MAX - 1) + 1
    }

    /// How many types there are, those of the kernel below a module's not counted.
    #[must_use]
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// Bytes of memory that they take.
    #[must_use]
    pub fn resident(&self) -> usize {
        let functions = self.functions.get().map_or(0, Vec::capacity);
        let names = self.by_name.capacity() + functions;
        self.bytes.capacity() + self.starts.capacity() * 4 + names * 8
    }

    /// Where the member `path` of `holder` is. `holder` is the name of a structure, union or
    /// typedef, with or without its keyword; `path` leads through anonymous members by itself, and
    /// is written as in C: `thread.sp`, `mem[1].base`.
    ///
    /// # Errors
    /// [`TypeError::NoType`] and [`TypeError::NoMember`] when this kernel has no such thing;
    /// others when the path cannot be followed or the data are malformed.
    pub fn field(&self, holder: &str, path: &str) -> Result<Field, TypeError> {
        let steps = path::steps(path)?;
        self.of_all(holder, |id| self.walk(id, holder, path, &steps))
    }

    /// Size in bytes of the structure, union, typedef or enumeration `name`.
    ///
    /// # Errors
    /// [`TypeError::NoType`] when this kernel has none of that name.
    pub fn size_of(&self, name: &str) -> Result<u64, TypeError> {
        self.of_all(name, |id| self.size(id, 0))
    }

    /// The value of the constant `name` of the enumeration `holder`.
    ///
    /// # Errors
    /// [`TypeError::NoType`] and [`TypeError::NoMember`] when this kernel has no such thing.
    pub fn constant(&self, holder: &str, name: &str) -> Result<i64, TypeError> {
        self.of_all(holder, |id| {
            let mut all = self.plain(id)?.enumerators();
            let found = all.find(|&(named, _)| self.string(named) == name.as_bytes());
            found
                .map(|(_, value)| value)
                .ok_or_else(|| no_member(holder, name))
        })
    }

    /// What `answer` says of every type called `name`, when it is the same of all.
    fn of_all<T: PartialEq>(
        &self,
        name: &str,
        answer: impl Fn(u32) -> Result<T, TypeError>,
    ) -> Result<T, TypeError> {
        let all = self.named(name);
        let mut answers = all.iter().map(|&id| answer(id));
        let first = answers.next().ok_or(TypeError::NoType {
            name: name.to_owned(),
        })?;
        for other in answers {
            if other != first {
                return Err(TypeError::Ambiguous {
                    name: name.to_owned(),
                    count: all.len(),
                });
            }
        }
        first
    }

    /// The types called `name`: composites and enumerations, or else typedefs.
    fn named(&self, name: &str) -> Vec<u32> {
        let (keyword, plain) = match name.split_once(' ') {
            Some((keyword @ ("struct" | "union" | "enum"), plain)) => (Some(keyword), plain.trim()),
            _ => (None, name),
        };
        let wanted = hash(plain.as_bytes());
        let start = self.by_name.partition_point(|&(hash, _)| hash < wanted);
        let same = self.by_name.get(start..).unwrap_or_default().iter();
        let (mut tagged, mut typedefs) = (Vec::new(), Vec::new());
        for &(_, id) in same.take_while(|&&(hash, _)| hash == wanted) {
            let Ok(record) = self.record(id) else {
                continue;
            };
            if self.string(record.name) != plain.as_bytes() {
                continue;
            }
            match (record.kind, keyword) {
                (Kind::Struct, None | Some("struct"))
                | (Kind::Union, None | Some("union"))
                | (Kind::Enum | Kind::Enum64, None | Some("enum")) => tagged.push(id),
                (Kind::Typedef, None) => typedefs.push(id),
                _ => {}
            }
        }
        match &self.base {
            Some(base) if tagged.is_empty() && typedefs.is_empty() => base.named(name),
            _ if tagged.is_empty() => typedefs,
            _ => tagged,
        }
    }

    fn walk(
        &self,
        id: u32,
        holder: &str,
        path: &str,
        steps: &[(Step<'_>, usize)],
    ) -> Result<Field, TypeError> {
        let mut spot = Spot {
            id,
            bit: 0,
            width: None,
        };
        let mut followed = 0;
        for &(step, end) in steps {
            let record = self.plain(spot.id)?;
            let stuck = |what| TypeError::NotHere {
                path: path.to_owned(),
                at: path.get(..followed).unwrap_or_default().to_owned(),
                what,
            };
            spot = match step {
                Step::Member(name) if record.kind.is_composite() => {
                    let mut looks = LOOKS;
                    let found = self.member(record, name, 0, &mut looks)?;
                    let found = found.ok_or_else(|| {
                        let way = path.get(..followed).unwrap_or_default();
                        let dot = if way.is_empty() { "" } else { "." };
                        no_member(&format!("{holder}{dot}{way}"), name)
                    })?;
                    Spot {
                        bit: spot.bit.saturating_add(found.bit),
                        ..found
                    }
                }
                Step::Element(index) => {
                    let (element, count) =
                        record.array().ok_or_else(|| stuck(describe(record.kind)))?;
                    // An array of no elements is one of unknown length at the end of a structure.
                    if index >= count && count != 0 {
                        return Err(TypeError::OutsideArray {
                            path: path.to_owned(),
                            index,
                            count,
                        });
                    }
                    let skip = self
                        .size(element, 0)?
                        .saturating_mul(8)
                        .saturating_mul(index);
                    Spot {
                        id: element,
                        bit: spot.bit.saturating_add(skip),
                        width: None,
                    }
                }
                Step::Member(_) => return Err(stuck(describe(record.kind))),
            };
            followed = end;
        }
        self.finish(spot)
    }

    /// The member `name` of a composite, relative to its start.
    fn member(
        &self,
        record: Record<'_>,
        name: &str,
        depth: usize,
        looks: &mut usize,
    ) -> Result<Option<Spot>, TypeError> {
        let malformed = |what| TypeError::Malformed {
            id: record.id,
            what,
        };
        if depth > DEPTH {
            return Err(malformed("members nest too deeply"));
        }
        for member in record.composite_members() {
            *looks = looks
                .checked_sub(1)
                .ok_or_else(|| malformed("it has too many members"))?;
            let found = self.string(member.name);
            if found == name.as_bytes() {
                return Ok(Some(Spot {
                    id: member.kind,
                    bit: member.bit,
                    width: member.width,
                }));
            }
            if !found.is_empty() {
                continue;
            }
            let inner = self.plain(member.kind)?;
            if !inner.kind.is_composite() {
                continue;
            }
            if let Some(spot) = self.member(inner, name, depth + 1, looks)? {
                return Ok(Some(Spot {
                    bit: spot.bit.saturating_add(member.bit),
                    ..spot
                }));
            }
        }
        Ok(None)
    }

    /// Turns a place in bits into one in bytes.
    fn finish(&self, spot: Spot) -> Result<Field, TypeError> {
        let record = self.plain(spot.id)?;
        // Before the flag came, a bit field was an integer narrower than its size.
        let old = record.int_bits().filter(|_| spot.width.is_none());
        let (bit, width) = match (spot.width, old) {
            (Some(width), _) => (spot.bit, Some(width)),
            (None, Some((skip, width))) => (spot.bit.saturating_add(u64::from(skip)), Some(width)),
            (None, None) => (spot.bit, None),
        };
        let pointer = record.kind == Kind::Ptr;
        let (offset, shift) = (bit / 8, u32::try_from(bit % 8).unwrap_or(0));
        match width {
            Some(width) => {
                let size = u64::from(shift.saturating_add(width).div_ceil(8));
                Ok(Field {
                    offset,
                    size,
                    bits: Some(Bits { shift, width }),
                    pointer,
                })
            }
            None if shift != 0 => Err(TypeError::Malformed {
                id: spot.id,
                what: "a member starts within a byte",
            }),
            None => Ok(Field {
                offset,
                size: self.size(spot.id, 0)?,
                bits: None,
                pointer,
            }),
        }
    }

    /// Size in bytes of a type.
    fn size(&self, id: u32, depth: usize) -> Result<u64, TypeError> {
        let record = self.plain(id)?;
        match record.kind {
            Kind::Ptr => Ok(8),
            Kind::Array => {
                let malformed = |what| TypeError::Malformed { id, what };
                let (element, count) = record.array().ok_or_else(|| malformed("it is cut off"))?;
                if depth > DEPTH {
                    return Err(malformed("arrays nest too deeply"));
                }
                let size = self.size(element, depth + 1)?.checked_mul(count);
                size.ok_or_else(|| malformed("its size overflows"))
            }
            Kind::Int
            | Kind::Struct
            | Kind::Union
            | Kind::Enum
            | Kind::Enum64
            | Kind::Float
            | Kind::DataSec => Ok(u64::from(record.size_or_type)),
            _ => Err(TypeError::Malformed {
                id,
                what: "a type without a size is used as a member",
            }),
        }
    }

    /// The type itself, behind typedefs and qualifiers.
    fn plain(&self, id: u32) -> Result<Record<'_>, TypeError> {
        let mut record = self.record(id)?;
        for _ in 0..DEPTH {
            if !record.kind.is_transparent() {
                return Ok(record);
            }
            record = self.record(record.size_or_type)?;
        }
        Err(TypeError::Malformed {
            id,
            what: "its typedefs do not end",
        })
    }

    fn record(&self, id: u32) -> Result<Record<'_>, TypeError> {
        let own = id.checked_sub(self.first());
        if let (None, Some(base)) = (own, &self.base) {
            return base.record(id);
        }
        let index = own.and_then(|index| usize::try_from(index).ok());
        let at = index.and_then(|index| self.starts.get(index));
        let at = at.ok_or(TypeError::Malformed {
            id,
            what: "there is no such type",
        })?;
        let records = self.bytes.get(..self.strings).unwrap_or_default();
        Record::read(records, &self.layout, id, *at as usize).map(|(record, _)| record)
    }

    /// The string at `offset`, empty when there is none.
    fn string(&self, offset: u32) -> &[u8] {
        let mut offset = offset as usize;
        if let Some(base) = &self.base {
            let below = base.bytes.len().saturating_sub(base.strings);
            match offset.checked_sub(below) {
                Some(own) => offset = own,
                None => return base.string(u32::try_from(offset).unwrap_or(0)),
            }
        }
        let at = self.strings.saturating_add(offset);
        let rest = self.bytes.get(at..).unwrap_or_default();
        memchr::memchr(0, rest)
            .and_then(|len| rest.get(..len))
            .unwrap_or_default()
    }
}

fn no_member(holder: &str, member: &str) -> TypeError {
    TypeError::NoMember {
        holder: holder.to_owned(),
        member: member.to_owned(),
    }
}

fn describe(kind: Kind) -> &'static str {
    match kind {
        Kind::Ptr => "a pointer: read it, and go on from what it points to",
        Kind::Array => "an array: say which element",
        Kind::Struct | Kind::Union => "a structure",
        Kind::Fwd => "a type that is not defined",
        _ => "a plain value",
    }
}

#[cfg(test)]
mod tests;
