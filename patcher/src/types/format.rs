//! The records of BTF, version 1 (Documentation/bpf/btf.rst, include/uapi/linux/btf.h).
//!
//! Known kinds: INT (1) to ENUM64 (19), as of Linux 7.3. The number of members is read as 24 bits
//! and the kind as 7 (f7a6b9eaff3e, in 2026); older kernels have zeroes in the bits that this adds.
//! Records of later kinds can be skipped where the blob has a layout section that says how long
//! they are (`struct btf_layout`); otherwise they are refused.

use super::TypeError;

pub(super) const MAGIC: u16 = 0xeb9f;
const HEADER_LEN: usize = 24;
const RECORD_LEN: usize = 12;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Int,
    Ptr,
    Array,
    Struct,
    Union,
    Enum,
    Fwd,
    Typedef,
    Volatile,
    Const,
    Restrict,
    Func,
    FuncProto,
    Var,
    DataSec,
    Float,
    DeclTag,
    TypeTag,
    Enum64,
    /// Of no known kind, but of known length.
    Other,
}

impl Kind {
    fn of(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::Int,
            2 => Self::Ptr,
            3 => Self::Array,
            4 => Self::Struct,
            5 => Self::Union,
            6 => Self::Enum,
            7 => Self::Fwd,
            8 => Self::Typedef,
            9 => Self::Volatile,
            10 => Self::Const,
            11 => Self::Restrict,
            12 => Self::Func,
            13 => Self::FuncProto,
            14 => Self::Var,
            15 => Self::DataSec,
            16 => Self::Float,
            17 => Self::DeclTag,
            18 => Self::TypeTag,
            19 => Self::Enum64,
            _ => return None,
        })
    }

    /// Bytes behind a record: fixed, and for each of its members.
    const fn extra(self) -> (usize, usize) {
        match self {
            Self::Int | Self::Var | Self::DeclTag => (4, 0),
            Self::Array => (12, 0),
            Self::Struct | Self::Union | Self::DataSec | Self::Enum64 => (0, 12),
            Self::Enum | Self::FuncProto => (0, 8),
            Self::Ptr
            | Self::Fwd
            | Self::Typedef
            | Self::Volatile
            | Self::Const
            | Self::Restrict
            | Self::Func
            | Self::Float
            | Self::TypeTag
            | Self::Other => (0, 0),
        }
    }

    /// A type that only points on to another one that has the same layout.
    pub(super) const fn is_transparent(self) -> bool {
        matches!(
            self,
            Self::Typedef | Self::Volatile | Self::Const | Self::Restrict | Self::TypeTag
        )
    }

    pub(super) const fn is_composite(self) -> bool {
        matches!(self, Self::Struct | Self::Union)
    }
}

/// One type.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record<'a> {
    pub(super) id: u32,
    pub(super) name: u32,
    pub(super) kind: Kind,
    /// For composites: offsets hold a bit field's width as well.
    pub(super) flag: bool,
    /// Size in bytes, or the number of another type.
    pub(super) size_or_type: u32,
    /// What follows the record.
    pub(super) extra: &'a [u8],
}

/// A member of a structure or union.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub(super) name: u32,
    pub(super) kind: u32,
    /// Bits from the start of the composite.
    pub(super) bit: u64,
    /// Width of a bit field in bits.
    pub(super) width: Option<u32>,
}

pub(super) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|raw| u32::from_le_bytes(*raw))
}

impl<'a> Record<'a> {
    /// Reads the record at `at` and says where the next one starts.
    pub(super) fn read(
        types: &'a [u8],
        layout: &[u8],
        id: u32,
        at: usize,
    ) -> Result<(Self, usize), TypeError> {
        let have = types.len();
        let cut = |need: usize| TypeError::Truncated {
            what: "a type",
            at,
            need,
            have,
        };
        let field = |offset: usize| word(types, at.saturating_add(offset));
        let short = at.saturating_add(RECORD_LEN);
        let (Some(name), Some(info), Some(size_or_type)) = (field(0), field(4), field(8)) else {
            return Err(cut(short));
        };
        let number = info >> 24 & 0x7f;
        let members = (info & 0x00ff_ffff) as usize;
        let (kind, (fixed, each)) = match Kind::of(number) {
            Some(kind) => (kind, kind.extra()),
            None => {
                let extra = layout_of(layout, number);
                (
                    Kind::Other,
                    extra.ok_or(TypeError::UnknownKind { id, kind: number })?,
                )
            }
        };
        let end = short
            .saturating_add(fixed)
            .saturating_add(each.saturating_mul(members));
        let extra = types.get(short..end).ok_or_else(|| cut(end))?;
        let flag = info >> 31 != 0;
        Ok((
            Self {
                id,
                name,
                kind,
                flag,
                size_or_type,
                extra,
            },
            end,
        ))
    }

    /// Members of a structure or union; none for other kinds.
    pub(super) fn composite_members(self) -> impl Iterator<Item = Member> + 'a {
        let composite = if self.kind.is_composite() {
            self.extra
        } else {
            &[]
        };
        composite.chunks_exact(12).filter_map(move |raw| {
            let (name, kind, place) = (word(raw, 0)?, word(raw, 4)?, word(raw, 8)?);
            let width = Some(place >> 24).filter(|&width| self.flag && width != 0);
            let bit = if self.flag {
                place & 0x00ff_ffff
            } else {
                place
            };
            Some(Member {
                name,
                kind,
                bit: u64::from(bit),
                width,
            })
        })
    }

    /// Types of a function's parameters; none for other kinds.
    pub(super) fn parameters(self) -> impl Iterator<Item = u32> + 'a {
        let own = match self.kind {
            Kind::FuncProto => self.extra,
            _ => &[],
        };
        own.chunks_exact(8).filter_map(|raw| word(raw, 4))
    }

    /// Element type and count of an array.
    pub(super) fn array(self) -> Option<(u32, u64)> {
        let kind = Some(self.kind).filter(|&kind| kind == Kind::Array);
        kind.and_then(|_| Some((word(self.extra, 0)?, u64::from(word(self.extra, 8)?))))
    }

    /// Offset and width in bits of an integer, where they are not those of its size.
    pub(super) fn int_bits(self) -> Option<(u32, u32)> {
        let encoding = word(self.extra, 0).filter(|_| self.kind == Kind::Int)?;
        let (offset, bits) = (encoding >> 16 & 0xff, encoding & 0xff);
        (offset != 0 || bits != self.size_or_type.saturating_mul(8)).then_some((offset, bits))
    }

    /// Names and values of an enumeration.
    pub(super) fn enumerators(self) -> impl Iterator<Item = (u32, i64)> + 'a {
        let each = match self.kind {
            Kind::Enum => 8,
            Kind::Enum64 => 12,
            _ => usize::MAX,
        };
        self.extra.chunks_exact(each).filter_map(move |raw| {
            let low = word(raw, 4)?;
            let value = match word(raw, 8) {
                Some(high) => {
                    i64::from_le_bytes((u64::from(high) << 32 | u64::from(low)).to_le_bytes())
                }
                // The flag says whether it is signed.
                None if self.flag => i64::from(i32::from_le_bytes(low.to_le_bytes())),
                None => i64::from(low),
            };
            Some((word(raw, 0)?, value))
        })
    }
}

/// Bytes behind a record of kind `number`, as the layout section says: for each kind the fixed part,
/// the part for each member, and two bytes of flags.
fn layout_of(layout: &[u8], number: u32) -> Option<(usize, usize)> {
    let at = usize::try_from(number).ok()?.checked_mul(4)?;
    let entry = layout.get(at..at.checked_add(4)?)?;
    Some((usize::from(*entry.first()?), usize::from(*entry.get(1)?)))
}

/// The sections of a BTF blob.
pub(super) struct Parts<'a> {
    pub(super) types: &'a [u8],
    pub(super) strings: &'a [u8],
    /// Empty where there is none.
    pub(super) layout: &'a [u8],
}

pub(super) fn parts(bytes: &[u8]) -> Result<Parts<'_>, TypeError> {
    let have = bytes.len();
    let cut = |what, at, need| TypeError::Truncated {
        what,
        at,
        need,
        have,
    };
    let (Some(first), Some(&version)) = (word(bytes, 0), bytes.get(2)) else {
        return Err(cut("the header", 0, HEADER_LEN));
    };
    let magic = u16::try_from(first & 0xffff).unwrap_or_default();
    if magic != MAGIC || version != 1 {
        return Err(TypeError::NotBtf { magic, version });
    }
    let field = |at| {
        let value = word(bytes, at).ok_or_else(|| cut("the header", 0, at + 4))?;
        Ok(usize::try_from(value).unwrap_or(usize::MAX))
    };
    let header = field(4)?;
    let part = |what, place: usize| {
        let at = header.saturating_add(field(place)?);
        let end = at.saturating_add(field(place + 4)?);
        bytes.get(at..end).ok_or_else(|| cut(what, at, end))
    };
    let layout = if header >= HEADER_LEN + 8 {
        part("the layouts", HEADER_LEN)?
    } else {
        &[]
    };
    Ok(Parts {
        types: part("the types", 8)?,
        strings: part("the strings", 16)?,
        layout,
    })
}
