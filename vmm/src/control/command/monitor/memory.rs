//! Guest memory in QEMU's human form: `info mtree -f`, `gpa2hva`, `xp`.

use std::fmt::Write;

use patcher::guest::Gpa;

use crate::cli::values::number;
use crate::control::host::Host;

/// What guest RAM is called.
const NAME: &str = "guest.ram";

/// Most that one `xp` reads.
const MAX_XP: usize = 64 << 10;

/// The address space `memory`, with nothing but RAM in it.
pub(super) fn flat_view(host: &dyn Host) -> String {
    let mut text =
        String::from("FlatView #0\n AS \"memory\", root: system\n Root memory region: system\n");
    for region in host.regions() {
        let (start, last) = (region.start.0, region.start.0 + (region.len - 1));
        let offset = match start {
            0 => String::new(),
            _ => format!(" @{start:016x}"),
        };
        let _ = writeln!(
            text,
            "  {start:016x}-{last:016x} (prio 0, ram): {NAME}{offset}"
        );
    }
    text
}

pub(super) fn gpa2hva(host: &dyn Host, address: &str) -> String {
    let Ok(address) = number(address) else {
        return "expected an address\nTry \"help gpa2hva\" for more information\n".to_owned();
    };
    let found = host.regions().into_iter().find_map(|region| {
        let offset = address.checked_sub(region.start.0)?;
        (offset < region.len).then(|| region.host + offset)
    });
    match found {
        Some(host) => format!("Host virtual address for {address:#x} ({NAME}) is {host:#x}\n"),
        None => format!("No memory is mapped at address {address:#x}\n"),
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Format {
    count: usize,
    base: char,
    size: usize,
}

impl Default for Format {
    fn default() -> Self {
        Self {
            count: 1,
            base: 'x',
            size: 4,
        }
    }
}

impl Format {
    /// `NNNfs`: a count, a format, a size, each of which may be missing.
    fn parse(text: &str) -> Result<Self, String> {
        let mut format = Self::default();
        let digits = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (count, letters) = text.split_at(digits);
        if !count.is_empty() {
            format.count = count
                .parse()
                .map_err(|_| "invalid count in format\n".to_owned())?;
        }
        for letter in letters.chars() {
            match letter {
                'x' | 'd' | 'u' | 'o' | 'c' => format.base = letter,
                'b' => format.size = 1,
                'h' => format.size = 2,
                'w' => format.size = 4,
                'g' => format.size = 8,
                other => return Err(format!("invalid char in format: '{other}'\n")),
            }
        }
        if format.base == 'c' {
            format.size = 1;
        }
        Ok(format)
    }

    fn value(self, bytes: &[u8]) -> String {
        let mut raw = [0; 8];
        raw.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        let value = u64::from_le_bytes(raw);
        let bits = u32::try_from(self.size * 8).unwrap_or(64);
        let signed = i64::from_le_bytes((value << (64 - bits)).to_le_bytes()) >> (64 - bits);
        match self.base {
            'x' => format!("0x{value:0width$x}", width = self.size * 2),
            'o' => format!("0{value:0width$o}", width = (self.size * 8).div_ceil(3)),
            'u' => format!("{value:width$}", width = (self.size * 80).div_ceil(33)),
            'd' => format!("{signed:width$}", width = (self.size * 80).div_ceil(33)),
            _ => character(raw[0]),
        }
    }
}

fn character(byte: u8) -> String {
    match byte {
        b'\'' => "'\\''".to_owned(),
        b'\\' => "'\\\\'".to_owned(),
        b'\n' => "'\\n'".to_owned(),
        b'\r' => "'\\r'".to_owned(),
        b' '..=b'~' => format!("'{}'", char::from(byte)),
        _ => format!("'\\x{byte:02x}'"),
    }
}

pub(super) fn xp(host: &dyn Host, words: &[&str]) -> String {
    const HELP: &str = "Try \"help xp\" for more information\n";
    let (format, address) = match words {
        [format, address] if format.starts_with('/') => {
            (Format::parse(format.trim_start_matches('/')), *address)
        }
        [address] if !address.starts_with('/') => (Ok(Format::default()), *address),
        _ => return format!("unexpected end of expression\n{HELP}"),
    };
    let (format, address) = match (format, number(address)) {
        (Ok(format), Ok(address)) => (format, address),
        (Err(text), _) => return format!("{text}{HELP}"),
        (_, Err(_)) => return format!("expected an address\n{HELP}"),
    };
    let len = format.count.saturating_mul(format.size);
    if len > MAX_XP {
        return format!("at most {MAX_XP} bytes at a time\n");
    }
    let mut text = String::new();
    let line_len = if format.size == 1 { 8 } else { 16 };
    for done in (0..len).step_by(line_len) {
        let at = address.wrapping_add(done as u64);
        let _ = write!(text, "{at:016x}:");
        let mut line = vec![0; line_len.min(len - done)];
        if host.read(Gpa(at), &mut line).is_err() {
            text.push_str(" Cannot access memory\n");
            break;
        }
        for item in line.chunks(format.size) {
            text.push(' ');
            text.push_str(&format.value(item));
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats() {
        let parse = |text| Format::parse(text).ok().map(|f| (f.count, f.base, f.size));
        assert_eq!(parse(""), Some((1, 'x', 4)));
        assert_eq!(parse("1024xb"), Some((1024, 'x', 1)));
        assert_eq!(parse("3gx"), Some((3, 'x', 8)));
        assert_eq!(parse("8c"), Some((8, 'c', 1)));
        assert_eq!(parse("zz"), None);
        assert_eq!(parse("99999999999999999999"), None);
    }

    #[test]
    fn values_look_as_in_qemu() {
        let show = |text, bytes: &[u8]| {
            let format = Format::parse(text).unwrap_or_else(|e| panic!("{e}"));
            format.value(bytes)
        };
        assert_eq!(show("xb", &[0xab]), "0xab");
        assert_eq!(
            show("xg", &[1, 0, 0, 0, 0, 0, 0, 0x80]),
            "0x8000000000000001"
        );
        assert_eq!(show("wd", &[0xff, 0xff, 0xff, 0xff]), "        -1");
        assert_eq!(show("wu", &[0xff, 0xff, 0xff, 0xff]), "4294967295");
        assert_eq!(show("ob", &[8]), "0010");
        assert_eq!(show("c", b"A"), "'A'");
        assert_eq!(show("c", b"\0"), "'\\x00'");
    }
}
