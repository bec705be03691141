//! Changing stock kernels: in guests made of their own images, whose memory can be looked at
//! byte for byte.

#![allow(
    clippy::panic,
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

mod breakpoint;
mod compare;
mod damage;
mod kernel_guest;
mod probe;
mod redirect;
mod returns;
mod steps;
mod text;

use kernel_guest::{KERNELS, KernelGuest, NOP5, SLIDE, guest};
use patcher::guest::{Gva, StoppedGuest};
use patcher::patch::{
    Applied, EntryId, Evidence, NewCode, Origin, PatchError, Patcher, RedirectRequest, Reverted,
    TextRequest,
};
use patcher::space::LocateError;

/// A function with a plain entry that nothing special is about.
const FUNCTION: &str = "version_proc_show";
/// xor %eax,%eax ; ret
const RETURN_ZERO: [u8; 3] = [0x31, 0xc0, 0xc3];

fn origin() -> Origin {
    Origin {
        who: "test".into(),
        at_ms: 1,
    }
}

fn patcher(guest: &KernelGuest) -> Patcher {
    Patcher::new(guest.kernel.clone()).unwrap()
}

fn change(
    patcher: &mut Patcher,
    guest: &mut KernelGuest,
    site: &str,
    expect: &[u8],
    write: &[u8],
    force: bool,
) -> Result<Applied, PatchError> {
    let prepared = patcher.prepare_text(TextRequest {
        site: site.parse().unwrap(),
        expect: expect.to_vec(),
        write: write.to_vec(),
        force,
    })?;
    patcher.commit_text(&mut guest.image, &prepared, &origin())
}

fn redirect(
    patcher: &mut Patcher,
    guest: &mut KernelGuest,
    site: &str,
    code: &[u8],
) -> Result<Applied, PatchError> {
    let prepared = patcher.prepare_redirect(RedirectRequest {
        site: site.parse().unwrap(),
        code: NewCode::Raw(code.to_vec()),
    })?;
    patcher.commit_redirect(&mut guest.image, &prepared, &origin())
}

fn revert(
    patcher: &mut Patcher,
    guest: &mut KernelGuest,
    id: EntryId,
) -> Result<Reverted, PatchError> {
    patcher.revert(&mut guest.image, id, &origin())
}

/// Where ftrace's nop is in `FUNCTION`.
fn entry(guest: &KernelGuest) -> Gva {
    let start = guest.at(FUNCTION);
    let code = guest.get(start, 16);
    let offset = code.windows(5).position(|bytes| bytes == NOP5).unwrap();
    start.offset(offset as u64)
}

/// Length of the instruction at `at`.
fn instruction_len(guest: &KernelGuest, at: Gva) -> usize {
    let bytes = guest.get(at, 15);
    let mut decoder = iced_x86::Decoder::new(64, &bytes, iced_x86::DecoderOptions::NONE);
    decoder.decode().len()
}

/// The first `count` instructions behind the entry of `FUNCTION`: site and bytes.
fn instructions(guest: &KernelGuest, count: usize) -> (String, Gva, Vec<u8>) {
    let start = entry(guest).offset(5);
    let mut len = 0;
    for _ in 0..count {
        len += instruction_len(guest, start.offset(len as u64));
    }
    let site = format!("{FUNCTION}+{:#x}", start.distance_from(guest.at(FUNCTION)));
    (site, start, guest.get(start, len))
}

fn nops(len: usize) -> Vec<u8> {
    vec![0x90; len]
}

/// Where a jump at `at` leads.
fn target(guest: &KernelGuest, at: Gva) -> Gva {
    let jump = guest.get(at, 5);
    assert_eq!(jump[0], 0xe9, "no jump at {at}");
    let distance = i32::from_le_bytes(jump[1..].try_into().unwrap());
    at.offset(5).displace(distance.into())
}
