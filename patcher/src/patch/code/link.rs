//! Giving code its final addresses.

use super::{Code, Part, Resolved, Target, Width};
use crate::guest::{Gva, Slide};

/// Where code is to live.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Placed {
    pub(crate) code: Gva,
    pub(crate) data: Gva,
}

/// What the running kernel has made of the jumps that stand for its returns.
///
/// Where it needs no mitigation it writes `ret` over them, else a jump to the thunk that it chose
/// (`patch_return()`, arch/x86/kernel/alternative.c). From 6.9 on the thunk that the compiler
/// names warns when it is executed, so new code must do as the kernel's own does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ReturnSites {
    /// `ret; int3; int3; int3; int3`.
    Ret,
    /// A jump to here.
    Jump(Gva),
    /// Untouched: the compiler's thunk is in use.
    AsBuilt,
}

/// Why code does not fit where it is placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the relocation at byte {offset:#x} does not reach from {place} to {target:#x}")]
pub struct LinkError {
    /// Offset in the code or data.
    pub offset: usize,
    /// Address of the relocation.
    pub place: Gva,
    /// What it refers to.
    pub target: u64,
}

/// The code and data of `code` with all addresses filled in.
pub(crate) fn link(
    code: &Code,
    placed: Placed,
    slide: Slide,
    returns: ReturnSites,
) -> Result<(Vec<u8>, Vec<u8>), LinkError> {
    let mut text = code.text.clone();
    let mut data = code.data.clone();
    let kernel = |resolved: Resolved| match resolved {
        Resolved::Linked(address) => address.at(slide).0,
        Resolved::Absolute(value) => value,
    };
    for fixup in &code.fixups {
        let (bytes, base) = match fixup.part {
            Part::Code => (&mut text, placed.code),
            Part::Data => (&mut data, placed.data),
        };
        let place = base.offset(fixup.offset as u64);
        let symbol = match fixup.target {
            Target::Own(Part::Code, offset) => placed.code.0.wrapping_add(offset),
            Target::Own(Part::Data, offset) => placed.data.0.wrapping_add(offset),
            Target::Kernel(resolved) => kernel(resolved),
            Target::Return(resolved) => match returns {
                ReturnSites::Ret if write_ret(bytes, fixup.offset) => continue,
                ReturnSites::Jump(to) => to.0,
                ReturnSites::Ret | ReturnSites::AsBuilt => kernel(resolved),
            },
        };
        let target = symbol.wrapping_add_signed(fixup.addend);
        let error = LinkError {
            offset: fixup.offset,
            place,
            target,
        };
        let distance = Gva(target).displacement_from(place);
        match fixup.width {
            Width::Absolute64 => put(bytes, fixup.offset, &target.to_le_bytes()),
            Width::Relative64 => put(bytes, fixup.offset, &distance.to_le_bytes()),
            Width::Unsigned32 => {
                let value = u32::try_from(target).map_err(|_| error)?;
                put(bytes, fixup.offset, &value.to_le_bytes())
            }
            Width::Signed32 => {
                let value =
                    i32::try_from(Gva(target).displacement_from(Gva(0))).map_err(|_| error)?;
                put(bytes, fixup.offset, &value.to_le_bytes())
            }
            Width::Relative32 => {
                let value = i32::try_from(distance).map_err(|_| error)?;
                put(bytes, fixup.offset, &value.to_le_bytes())
            }
        }
        .ok_or(error)?;
    }
    Ok((text, data))
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) -> Option<()> {
    let to = bytes.get_mut(at..at.checked_add(value.len())?)?;
    to.copy_from_slice(value);
    Some(())
}

/// Writes a return over the 5-byte jump whose displacement is at `at`.
fn write_ret(bytes: &mut [u8], at: usize) -> bool {
    let jump = at
        .checked_sub(1)
        .and_then(|start| bytes.get_mut(start..start + 5));
    match jump {
        Some(jump) if jump.first() == Some(&0xe9) => {
            jump.copy_from_slice(&[0xc3, 0xcc, 0xcc, 0xcc, 0xcc]);
            true
        }
        _ => false,
    }
}
