//! The instructions of a guest kernel's functions, from its file.

use iced_x86::{Decoder, DecoderOptions, FlowControl};
use object::{Object, ObjectSegment};
use serde_json::{Value, json};

use crate::{Failure, Qmp, needs};

/// An instruction of a function.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Instruction {
    /// Bytes from the start of the function.
    pub offset: u64,
    /// As they are in the file.
    pub bytes: Vec<u8>,
    /// The run-time address that it calls.
    pub calls: Option<u64>,
}

/// Run-time address of the symbol called `name`, and its size in bytes.
///
/// # Errors
///
/// When the guest has none of that name.
pub fn symbol(qmp: &mut Qmp, name: &str) -> Result<(u64, u64), Failure> {
    let reply = qmp.execute("query-symbols", json!({"pattern": name}))?;
    let found = &reply["symbols"][0];
    match (number(&found["address"]), found["size"].as_u64()) {
        (Some(address), Some(size)) => Ok((address, size)),
        _ => Err(Failure::new(format!("no {name}: {reply}"))),
    }
}

/// The text of a guest's kernel, as its file has it.
pub struct KernelText {
    file: Vec<u8>,
    slide: u64,
}

impl std::fmt::Debug for KernelText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes at {:#x}", self.file.len(), self.slide)
    }
}

impl KernelText {
    /// That of the guest's kernel, which `guest-images/fetch` calls `kernel`.
    ///
    /// # Errors
    ///
    /// When the guest does not say where its kernel is, or the file cannot be read.
    pub fn of(qmp: &mut Qmp, kernel: &str) -> Result<Self, Failure> {
        let told = qmp.execute("query-kernel", json!({}))?;
        let slide = number(&told["slide"]);
        Ok(Self {
            slide: slide.ok_or_else(|| Failure::new(format!("no slide: {told}")))?,
            file: std::fs::read(needs::kernel(kernel).join("vmlinux"))?,
        })
    }

    /// The instructions of the function of `size` bytes at the run-time address `address`; `None` when
    /// the file does not hold it.
    #[must_use]
    pub fn instructions(&self, address: u64, size: u64) -> Option<Vec<Instruction>> {
        let code = text(&self.file, address.wrapping_sub(self.slide), size)?;
        let mut decoder = Decoder::with_ip(64, code, address, DecoderOptions::NONE);
        let mut found = Vec::new();
        while decoder.can_decode() {
            let from = decoder.position();
            let instruction = decoder.decode();
            let calls = instruction.flow_control() == FlowControl::Call;
            found.push(Instruction {
                offset: from as u64,
                bytes: code
                    .get(from..decoder.position())
                    .unwrap_or_default()
                    .to_vec(),
                calls: calls.then(|| instruction.near_branch_target()),
            });
        }
        Some(found)
    }
}

/// The instructions of the guest's function called `name`, in order.
///
/// # Errors
///
/// When there is no such function, or the kernel's file does not hold it.
pub fn instructions(qmp: &mut Qmp, kernel: &str, name: &str) -> Result<Vec<Instruction>, Failure> {
    let (address, size) = symbol(qmp, name)?;
    let found = KernelText::of(qmp, kernel)?.instructions(address, size);
    found.ok_or_else(|| Failure::new(format!("{name} is not in the kernel's file")))
}

fn text(file: &[u8], at: u64, len: u64) -> Option<&[u8]> {
    let file = object::File::parse(file).ok()?;
    file.segments()
        .find_map(|segment| segment.data_range(at, len).ok().flatten())
}

/// A number as answers have it: hexadecimal, in a string.
#[must_use]
pub fn number(value: &Value) -> Option<u64> {
    u64::from_str_radix(value.as_str()?.trim_start_matches("0x"), 16).ok()
}
