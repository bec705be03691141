//! Replacing bytes that someone gives by bytes that someone gives.

use super::PatchError;
use super::check::Check;
use super::knowledge::{Function, Knowledge, linked};
use super::ledger::Ledger;
use super::report::{Evidence, FtraceMark};
use crate::guest::{LinkAddr, Slide};
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
    /// Where it is linked; unknown yet for a run-time address.
    link: Option<LinkAddr>,
}

/// Where bytes go, after the checks under the stop.
pub(super) struct Ready {
    pub(super) link: LinkAddr,
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
            prepared.check_place(know, link)?;
        }
        if !prepared.request.force {
            whole(crate::guest::Gva(0), &prepared.request.write)?;
        }
        Ok(prepared)
    }

    fn check_place(&self, know: &Knowledge, link: LinkAddr) -> Result<(), PatchError> {
        let len = self.request.write.len() as u64;
        Ok(know
            .regions
            .check(&know.kernel, link, len, &self.request.site)?)
    }

    fn link(&self, know: &Knowledge, slide: Slide) -> Result<LinkAddr, PatchError> {
        let link = linked(&self.request.site, self.link, slide)?;
        if self.link.is_none() {
            self.check_place(know, link)?;
        }
        Ok(link)
    }

    pub(super) fn check(&self, check: &Check<'_>, ledger: &Ledger) -> Result<Ready, PatchError> {
        let request = &self.request;
        let link = self.link(check.know, check.located.slide)?;
        let slide = check.located.slide;
        let len = request.write.len();
        let bytes = link.at(slide)..link.offset(len as u64).at(slide);
        check.idle()?;
        let function = check.know.function(link);
        let from = function.as_ref().map_or(link, |function| function.start);
        let ftrace = check.owners(ledger, from, link, len as u64)?;
        check.expect(bytes.start, &request.expect)?;
        let instructions = match self.instructions(check, link, function.as_ref()) {
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
            link,
            function,
            evidence,
            ftrace,
        })
    }

    /// How many instructions the bytes are now.
    fn instructions(
        &self,
        check: &Check<'_>,
        link: LinkAddr,
        function: Option<&Function>,
    ) -> Result<usize, PatchError> {
        let len = self.request.write.len();
        let slide = check.located.slide;
        let Some(function) = function else {
            // Between functions there is only filler, of which any byte begins an instruction.
            return Err(DecodeError::NotCode {
                at: link.at(slide),
                bytes: crate::text::hex(&self.request.expect),
            }
            .into());
        };
        let code = check.code(function, link.offset(len as u64))?;
        let from = usize::try_from(link.distance_from(function.start)).unwrap_or(usize::MAX);
        Ok(boundaries(function.start.at(slide), &code, from, len)?.len())
    }
}
