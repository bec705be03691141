//! Where a probe may be, and what its jump takes the place of.

use std::ops::Range;

use super::super::PatchError;
use super::super::check::Check;
use super::super::function::Function;
use super::super::knowledge::Knowledge;
use crate::guest::{Gva, LinkAddr};
use crate::probe::{Displaced, displace};
use crate::symbols::Site;
use crate::text::{EntrySite, MAX_INSTRUCTION, NOP5, boundaries, entry_site, indirect_jump};

/// Bytes of a jump.
pub(super) const JUMP: usize = NOP5.len();

/// The function that `link` is in, when a jump may be put there, as its file has it.
pub(super) fn allowed(
    know: &Knowledge,
    link: LinkAddr,
    site: &Site,
) -> Result<Function, PatchError> {
    know.allowed(link, JUMP as u64, site)
}

/// The place of a jump.
pub(super) struct Place {
    pub(super) at: Gva,
    /// It is where the kernel's own tracer would be.
    pub(super) entry: bool,
    /// Bytes from the start of the function.
    from: usize,
    /// What is in the guest from the start of the function on.
    code: Vec<u8>,
}

/// Where a jump for `asked` really goes: at the start of a function behind the landing place of
/// indirect calls, where the tracer's nop is.
pub(super) fn place(
    check: &Check<'_>,
    function: &Function,
    asked: Gva,
) -> Result<Place, PatchError> {
    let start = function.start;
    let longest = (JUMP + 2 * MAX_INSTRUCTION) as u64;
    let code = check.code(function, asked.offset(longest))?;
    let asked = usize::try_from(asked.distance_from(start)).unwrap_or(usize::MAX);
    let at_entry = match entry_site(start, &code) {
        EntrySite::Nop(offset) | EntrySite::Other(offset) => offset,
    };
    let from = if asked == 0 { at_entry } else { asked };
    Ok(Place {
        at: start.offset(from as u64),
        entry: from == at_entry,
        from,
        code,
    })
}

impl Place {
    /// The instructions that the jump takes the place of, made ready to be moved, and their bytes.
    pub(super) fn instructions(
        &self,
        function: &Function,
    ) -> Result<(Displaced, Vec<u8>), PatchError> {
        let Self { at, from, code, .. } = self;
        let (at, from) = (*at, *from);
        let here = code.get(from..).unwrap_or_default();
        let displaced = displace(at, here, JUMP)?;
        boundaries(function.start, code, from, displaced.len)?;
        let end = from as u64 + displaced.len as u64;
        if end > function.size {
            return Err(PatchError::Request(format!(
                "{} ends {} bytes behind {}: there is no room for a jump of {JUMP} bytes",
                function.name,
                function.size.saturating_sub(from as u64),
                function.place(at)
            )));
        }
        let before = here.get(..displaced.len).unwrap_or_default().to_vec();
        Ok((displaced, before))
    }
}

/// No jump of the function leads behind the first of the instructions in `bytes`, as far as that
/// can be told: a function that jumps to computed addresses cannot be judged.
pub(super) fn nothing_leads_inside(
    check: &Check<'_>,
    function: &Function,
    bytes: &Range<Gva>,
) -> Result<(), PatchError> {
    // One instruction takes the place of all.
    const ONE: [u8; 1] = [0x90];
    check.no_jump_inside(function, bytes, &ONE)?;
    let code = check.code(function, function.end())?;
    let whole = usize::try_from(function.size).unwrap_or(0);
    let slide = check.located.slide;
    let is_thunk = |target: Gva| check.know.regions.is_thunk(target.linked(slide));
    match indirect_jump(
        function.start,
        code.get(..whole).unwrap_or(&code),
        &is_thunk,
    ) {
        Some(from) => Err(PatchError::JumpUnknown { from }),
        None => Ok(()),
    }
}
