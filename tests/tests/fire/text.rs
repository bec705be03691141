//! The text of the guest's kernel, byte by byte.

use serde_json::{Value, json};
use stillpoint_tests::{Failure, Guest, Qmp, number, symbol};

/// Where the kernel's image is mapped, before its slide is added to it.
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// Differences that are told.
const TOLD: usize = 8;

/// A copy of it, with the address of its first byte.
pub(crate) struct Text {
    at: u64,
    bytes: Vec<u8>,
}

impl Text {
    /// Copies it out of the guest by a dump of the memory that it is in.
    pub(crate) fn copy(guest: &Guest, qmp: &mut Qmp) -> Result<Self, Failure> {
        let (at, _) = symbol(qmp, "_stext")?;
        let (end, _) = symbol(qmp, "_etext")?;
        let told = qmp.execute("query-kernel", json!({}))?;
        let base = number(&told["phys-base"]);
        let base = base.ok_or_else(|| Failure::new(format!("no phys-base: {told}")))?;
        let path = guest.dir().join("text");
        let begin = (at - KERNEL_MAP).wrapping_add(base);
        let length = end - at;
        qmp.execute(
            "dump-guest-memory",
            json!({
                "paging": false,
                "protocol": format!("file:{}", path.display()),
                "begin": begin,
                "length": length,
            }),
        )?;
        let core = std::fs::read(&path)?;
        std::fs::remove_file(&path)?;
        // In an ELF core of one piece of memory, that is last.
        let from = core.len().checked_sub(usize::try_from(length)?);
        let bytes = from.and_then(|from| core.get(from..));
        let bytes = bytes.ok_or_else(|| Failure::new("the dump is too short"))?;
        Ok(Self {
            at,
            bytes: bytes.to_vec(),
        })
    }

    /// FNV-1a.
    pub(crate) fn checksum(&self) -> u64 {
        self.bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
            (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        })
    }

    /// Where another copy differs, for people. Nothing when it does not.
    pub(crate) fn differences(&self, other: &Self, qmp: &mut Qmp) -> Result<Vec<String>, Failure> {
        let mut told = Vec::new();
        let mut behind = 0;
        for (index, (a, b)) in self.bytes.iter().zip(&other.bytes).enumerate() {
            if a == b || index < behind {
                continue;
            }
            let at = self.at + index as u64;
            let place = qmp.execute("query-symbols", json!({"pattern": format!("{at:#x}")}))?;
            let near = |bytes: &[u8]| -> String {
                let bytes = bytes.iter().skip(index).take(8);
                bytes.map(|byte| format!("{byte:02x}")).collect()
            };
            let (was, is) = (near(&self.bytes), near(&other.bytes));
            told.push(format!(
                "{at:#x} ({}): {was} -> {is}",
                place["place"]["text"]
            ));
            behind = index + 8;
            if told.len() == TOLD {
                break;
            }
        }
        if (self.at, self.bytes.len()) != (other.at, other.bytes.len()) {
            told.push("it is elsewhere".to_owned());
        }
        Ok(told)
    }
}

/// The product's own look at it finds nothing that the kernel does not make itself.
pub(crate) fn explained(qmp: &mut Qmp) -> Result<(), Failure> {
    let told = qmp.execute("inspect-text", json!({}))?;
    match (&told["foreign"], &told["doubts"]) {
        (Value::Array(foreign), Value::Array(doubts))
            if foreign.is_empty() && doubts.is_empty() =>
        {
            Ok(())
        }
        (foreign, doubts) => Err(Failure::new(format!("foreign text: {foreign}, {doubts}"))),
    }
}
