//! Replacing bytes that someone gives by bytes that someone gives.

use super::PatchError;
use super::check::Check;
use super::function::Function;
use super::knowledge::Knowledge;
use super::ledger::Ledger;
use super::report::{Evidence, FtraceMark};
use crate::guest::{Gva, LinkAddr};
use crate::symbols::Site;
use crate::text::{DecodeError, boundaries, whole};

/// Most bytes that one change may have.
pub const MAX_TEXT: usize = 256;

/// What to replace by what.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TextRequest {
    /// Where.
    pub site: Site,
    /// The bytes that must be there.
    pub expect: Vec<u8>,
    /// The bytes to write instead, as many.
    pub write: Vec<u8>,
    /// Do it even where instructions are cut in two.
    pub force: bool,
}

/// A change that was checked as far as it can be without the guest.
#[derive(Clone, Debug)]
pub struct PreparedText {
    pub(super) request: TextRequest,
    /// Where it is linked; unknown yet for a run-time address or a module.
    link: Option<LinkAddr>,
}

/// Where bytes go, after the checks under the stop.
pub(super) struct Ready {
    pub(super) at: Gva,
    pub(super) function: Option<Function>,
    pub(super) evidence: Evidence,
    pub(super) ftrace: Option<FtraceMark>,
}

impl PreparedText {
    pub(super) fn new(know: &Knowledge, request: TextRequest) -> Result<Self, PatchError> {
        let len = request.write.len();
        if len == 0 || len > MAX_TEXT {
            return Err(PatchError::Request(format!(
                "{len} bytes to write; between 1 and {MAX_TEXT} can be changed at once"
            )));
        }
        if request.expect.len() != len {
            return Err(PatchError::Request(format!(
                "{} bytes are expected and {len} are to be written; give as many of both",
                request.expect.len()
            )));
        }
        if request.expect == request.write {
            return Err(PatchError::Request(
                "the bytes to write are those that are expected: there is nothing to change".into(),
            ));
        }
        let link = request.site.resolve(know.kernel.symbols())?;
        let prepared = Self { request, link };
        if let Some(link) = link {
            let site = &prepared.request.site;
            know.regions.check(&know.kernel, link, len as u64, site)?;
        }
        if !prepared.request.force {
            whole(Gva(0), &prepared.request.write)?;
        }
        Ok(prepared)
    }

    pub(super) fn check(&self, check: &Check<'_>, ledger: &Ledger) -> Result<Ready, PatchError> {
        let request = &self.request;
        check.idle()?;
        let len = request.write.len();
        let (at, function) = check.place(&request.site, self.link, len as u64)?;
        let bytes = at..at.offset(len as u64);
        let ftrace = check.owners(ledger, function.as_ref(), at, len as u64)?;
        check.expect(bytes.start, &request.expect)?;
        let instructions = match self.instructions(check, at, function.as_ref()) {
            Ok(instructions) => instructions,
            // Forced: then anybody may be anywhere inside.
            Err(PatchError::Decode(_)) if request.force => 0,
            Err(error) => return Err(error),
        };
        let one = instructions == 1 && !request.force;
        if let Some(function) = function.as_ref().filter(|_| !one && !request.force) {
            check.no_jump_inside(function, &bytes, &request.write)?;
        }
        let evidence = check.nobody_inside(&bytes, one)?;
        Ok(Ready {
            at,
            function,
            evidence,
            ftrace,
        })
    }

    /// How many instructions the bytes are now.
    fn instructions(
        &self,
        check: &Check<'_>,
        at: Gva,
        function: Option<&Function>,
    ) -> Result<usize, PatchError> {
        let len = self.request.write.len();
        let Some(function) = function else {
            // Between functions there is only filler, of which any byte begins an instruction.
            return Err(DecodeError::NotCode {
                at,
                bytes: crate::text::hex(&self.request.expect),
            }
            .into());
        };
        let code = check.code(function, at.offset(len as u64))?;
        let from = usize::try_from(at.distance_from(function.start)).unwrap_or(usize::MAX);
        Ok(boundaries(function.start, &code, from, len)?.len())
    }
}
