//! Places in the guest's kernel as people write them.

use std::fmt;
use std::str::FromStr;

use super::{SiteError, Symbol, Symbols};
use crate::guest::{Gva, LinkAddr};

/// A place in the guest's kernel, not yet looked up.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Site {
    /// A run-time address in the guest, such as 0xffffffff8a000010.
    Address(Gva),
    /// `[module:]symbol[@position][+offset]`.
    Symbol {
        /// The module that the symbol is in; `None` for the kernel itself.
        module: Option<String>,
        /// Name of the symbol.
        name: String,
        /// Which of several of that name, counted from 1 in order of address.
        position: Option<u32>,
        /// Bytes from its start.
        offset: u64,
    },
}

impl Site {
    /// The link address in the kernel image of a site that names a symbol of the kernel; `None` for
    /// what only a running guest tells: a run-time address, or a symbol of a module.
    ///
    /// # Errors
    /// [`SiteError`]: unknown, ambiguous, not in the image, or beyond the end of the symbol.
    pub fn resolve(&self, symbols: &Symbols) -> Result<Option<LinkAddr>, SiteError> {
        let Self::Symbol {
            module: None,
            name,
            position,
            offset,
        } = self
        else {
            return Ok(None);
        };
        let symbol = select(symbols, name, *position)?;
        let start = symbol.address().ok_or_else(|| SiteError::Absolute {
            name: name.clone(),
            value: symbol.value(),
        })?;
        let size = symbol.size().unwrap_or(0);
        if *offset != 0 && *offset >= size {
            return Err(SiteError::OutsideSymbol {
                name: name.clone(),
                offset: *offset,
                size,
            });
        }
        Ok(Some(start.offset(*offset)))
    }
}

fn select<'a>(
    symbols: &'a Symbols,
    name: &str,
    position: Option<u32>,
) -> Result<Symbol<'a>, SiteError> {
    let Some(position) = position else {
        return symbols.unique(name);
    };
    let all: Vec<_> = symbols.named(name).map(|symbol| symbol.index).collect();
    if all.is_empty() {
        return symbols.unique(name);
    }
    let wanted = usize::try_from(position)
        .ok()
        .and_then(|position| position.checked_sub(1));
    match wanted.and_then(|wanted| all.get(wanted)) {
        Some(&index) => Ok(Symbol { symbols, index }),
        None => Err(SiteError::NoSuchPosition {
            name: name.to_owned(),
            position,
            count: all.len(),
        }),
    }
}

impl FromStr for Site {
    type Err = SiteError;

    fn from_str(text: &str) -> Result<Self, SiteError> {
        let wrong = |why| SiteError::Syntax {
            text: text.to_owned(),
            why,
        };
        let (place, offset) = match text.rsplit_once('+') {
            Some((place, offset)) => (
                place,
                number(offset).ok_or_else(|| wrong("the offset is not a number"))?,
            ),
            None => (text, 0),
        };
        if let Some(address) = address(place) {
            let address = address.ok_or_else(|| wrong("the address is not a number"))?;
            let address = address.checked_add(offset);
            return address
                .map(|a| Self::Address(Gva(a)))
                .ok_or_else(|| wrong("it is too high"));
        }
        let (module, place) = match place.split_once(':') {
            Some(("", _)) => return Err(wrong("no module is named before the colon")),
            Some(("vmlinux", place)) => (None, place),
            Some((module, place)) => (Some(module.to_owned()), place),
            None => (None, place),
        };
        let (name, position) = match place.split_once('@') {
            Some((name, position)) => {
                let position = position.parse().ok().filter(|&position| position > 0);
                (
                    name,
                    Some(position.ok_or_else(|| wrong("positions count from 1"))?),
                )
            }
            None => (place, None),
        };
        if name.is_empty() {
            return Err(wrong("no symbol is named"));
        }
        if name.contains(|c: char| c.is_whitespace() || c.is_control() || ":@+".contains(c)) {
            return Err(wrong("a symbol has no such characters"));
        }
        Ok(Self::Symbol {
            module,
            name: name.to_owned(),
            position,
            offset,
        })
    }
}

/// Reads what looks like an address: hexadecimal after 0x, or 16 digits as /proc/kallsyms has them.
fn address(text: &str) -> Option<Option<u64>> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => Some(hex(digits)),
        None if text.len() == 16 => hex(text).map(Some),
        None => None,
    }
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => hex(digits),
        None if text.starts_with(|c: char| c.is_ascii_digit()) => text.parse().ok(),
        None => None,
    }
}

fn hex(digits: &str) -> Option<u64> {
    let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    plain
        .then(|| u64::from_str_radix(digits, 16).ok())
        .flatten()
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Symbol {
                module,
                name,
                position,
                offset,
            } => {
                if let Some(module) = module {
                    write!(f, "{module}:")?;
                }
                f.write_str(name)?;
                if let Some(position) = position {
                    write!(f, "@{position}")?;
                }
                if *offset != 0 {
                    write!(f, "+{offset:#x}")?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symbol(module: Option<&str>, name: &str, position: Option<u32>, offset: u64) -> Site {
        Site::Symbol {
            module: module.map(str::to_owned),
            name: name.to_owned(),
            position,
            offset,
        }
    }

    #[test]
    fn every_form_is_understood() {
        for (text, site) in [
            ("tcp_v4_rcv", symbol(None, "tcp_v4_rcv", None, 0)),
            ("tcp_v4_rcv+0x12", symbol(None, "tcp_v4_rcv", None, 0x12)),
            ("get+18", symbol(None, "get", None, 18)),
            ("get@2+0x12", symbol(None, "get", Some(2), 0x12)),
            (
                "ext4:ext4_sync_fs",
                symbol(Some("ext4"), "ext4_sync_fs", None, 0),
            ),
            ("vmlinux:get@1", symbol(None, "get", Some(1), 0)),
            ("foo.constprop.0", symbol(None, "foo.constprop.0", None, 0)),
            (
                "0xffffffff81000010",
                Site::Address(Gva(0xffff_ffff_8100_0010)),
            ),
            (
                "0xffffffff81000010+0x2",
                Site::Address(Gva(0xffff_ffff_8100_0012)),
            ),
            (
                "ffffffff81000010",
                Site::Address(Gva(0xffff_ffff_8100_0010)),
            ),
        ] {
            assert_eq!(text.parse::<Site>().unwrap(), site, "{text}");
            let again = site.to_string();
            assert_eq!(again.parse::<Site>().unwrap(), site, "{again}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "+0x1",
            "a+",
            "a+-1",
            "a++1",
            "a+0x",
            "a@",
            "a@0",
            "a@x",
            "a@-1",
            ":a",
            "a:",
            "a b",
            "0x",
            "0xg",
            "0x11112222333344445",
            "0xffffffffffffffff+1",
            "a@1@2",
            "m:n:o",
            "@1",
        ] {
            let refused = text.parse::<Site>();
            assert!(
                matches!(refused, Err(SiteError::Syntax { .. })),
                "{text:?}: {refused:?}"
            );
        }
    }
}
