//! Sending the callers of a function to other code.
//!
//! The 5-byte nop that ftrace has at the entry of a function becomes a jump to code in the arena.
//! The entry is decoded, never assumed; where anything else stands, somebody owns it and it is
//! left alone. A call that is already in the function finishes there: what the new code may not
//! tolerate is for the caller to know.

use super::PatchError;
use super::check::Check;
use super::code::Code;
use super::function::Function;
use super::knowledge::Knowledge;
use super::ledger::Ledger;
use super::report::{Evidence, FtraceMark};
use crate::guest::{Gva, LinkAddr};
use crate::symbols::Site;
use crate::text::{EntrySite, MAX_INSTRUCTION, NOP5, entry_site, hex};

/// Bytes of a function's entry in which the nop can be: behind an ENDBR64.
const ENTRY: u64 = 4 + NOP5.len() as u64;

/// New code for a function.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NewCode {
    /// Machine code that runs wherever it is placed, from its first byte.
    Raw(Vec<u8>),
    /// A relocatable x86-64 ELF object.
    Object {
        /// The file.
        file: Vec<u8>,
        /// The function to jump to; without it, the one that is called like the redirected one,
        /// or the only global one.
        function: Option<String>,
    },
}

/// Which function to send where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RedirectRequest {
    /// The function.
    pub site: Site,
    /// What to run instead.
    pub code: NewCode,
}

/// A redirect that was checked as far as it can be without the guest.
#[derive(Clone, Debug)]
pub struct PreparedRedirect {
    pub(super) site: Site,
    pub(super) code: Code,
    /// Offset of the function to jump to.
    pub(super) entry: u64,
    /// Where the function is linked; unknown yet for a run-time address or a module.
    link: Option<LinkAddr>,
    wanted: Option<String>,
}

/// Where the jump goes, after the checks under the stop.
pub(super) struct Ready {
    pub(super) function: Function,
    pub(super) entry: u64,
    /// Address of the nop.
    pub(super) nop: Gva,
    pub(super) evidence: Evidence,
    pub(super) ftrace: Option<FtraceMark>,
}

impl PreparedRedirect {
    pub(super) fn new(know: &Knowledge, request: RedirectRequest) -> Result<Self, PatchError> {
        let link = request.site.resolve(know.kernel.symbols())?;
        let allowed = |link: LinkAddr| {
            let function = know.allowed(link, ENTRY, &request.site)?;
            begins(function, Gva(link.0), &request.site)
        };
        let function = link.map(allowed).transpose()?;
        let resolve = |name: &str| know.resolve(name);
        let (code, wanted) = match request.code {
            NewCode::Raw(bytes) => (Code::raw(&bytes)?, Some(String::new())),
            NewCode::Object { file, function } => (Code::object(&file, &resolve)?, function),
        };
        let entry = match &function {
            Some(function) => code.entry(wanted.as_deref(), &function.name)?,
            None => 0,
        };
        Ok(Self {
            site: request.site,
            code,
            entry,
            link,
            wanted,
        })
    }

    pub(super) fn check(&self, check: &Check<'_>, ledger: &Ledger) -> Result<Ready, PatchError> {
        check.idle()?;
        let (start, function) = check.target(&self.site, self.link, ENTRY)?;
        let function = begins(function, start, &self.site)?;
        let entry = match self.link {
            Some(_) => self.entry,
            None => self.code.entry(self.wanted.as_deref(), &function.name)?,
        };
        let mut code = [0; MAX_INSTRUCTION];
        check.located.space(&check.guest).read(start, &mut code)?;
        if let Some(id) = ledger.overlap(start, ENTRY) {
            return Err(PatchError::Owned {
                at: start,
                owner: format!("change {id}; revert that first"),
            });
        }
        let nop = match entry_site(start, &code) {
            EntrySite::Nop(offset) => start.offset(offset as u64),
            EntrySite::Other(offset) => {
                let at = start.offset(offset as u64);
                return Err(occupied_entry(at, code.get(offset..).unwrap_or_default()));
            }
        };
        let len = NOP5.len() as u64;
        let ftrace = check.owners(ledger, Some(&function), nop, len)?;
        if check.know.ftrace.is_some() && ftrace.is_none() {
            return Err(PatchError::Owned {
                at: nop,
                owner: "somebody unknown: ftrace has no record of this entry, so it cannot be \
                        told to leave it alone"
                    .into(),
            });
        }
        let bytes = nop..nop.offset(len);
        let evidence = check.nobody_inside(&bytes, true)?;
        Ok(Ready {
            function,
            entry,
            nop,
            evidence,
            ftrace,
        })
    }
}

/// A function, when it begins at `start`.
fn begins(function: Function, start: Gva, site: &Site) -> Result<Function, PatchError> {
    match function.start == start {
        true => Ok(function),
        false => Err(PatchError::Request(format!(
            "{site} is not the start of a function; only whole functions can be redirected"
        ))),
    }
}

/// Who may have put other bytes at an entry.
fn occupied_entry(at: Gva, bytes: &[u8]) -> PatchError {
    let shown = hex(bytes.get(..NOP5.len()).unwrap_or(bytes));
    let who = match bytes.first() {
        Some(0xe8) => "ftrace or a livepatch of the guest, which has a call there",
        Some(0xe9) => "an optimised kprobe or another patch, which has a jump there",
        Some(0xcc) => "a kprobe or a debugger, which has a breakpoint there",
        _ => "nobody known: it has no nop for a jump, so it is not a function that can be traced",
    };
    PatchError::Owned {
        at,
        owner: format!("{who} ({shown})"),
    }
}
