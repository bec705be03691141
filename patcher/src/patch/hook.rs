//! Putting a jump to new code into a site, or a trap: what redirects, probes and breakpoints have in
//! common.

use std::sync::Arc;

use super::module_text::ModuleText;
use super::placing::{NewPlace, Placing, give_back};
use super::report::{Applied, Bytes, Evidence, FtraceMark, Kind, Origin, PlacedCode};
use super::retire::{Content, Leaving};
use super::writing::{change, jump};
use super::{PatchError, Patcher};
use crate::guest::{Gva, StoppedGuest};
use crate::patch::code::Code;
use crate::space::Located;

/// What a trap is made of.
const INT3: u8 = 0xcc;

/// Code, and where a jump or a trap is to lead to it from.
pub(super) struct Lead<'a> {
    /// Where the jump goes.
    pub(super) at: Gva,
    /// The whole instructions that were there. Those behind the jump stay as they are.
    pub(super) before: &'a [u8],
    pub(super) ftrace: Option<FtraceMark>,
    pub(super) code: &'a Code,
    /// Offset of its first instruction.
    pub(super) entry: u64,
    /// Where the code goes on in the guest's own text by itself.
    pub(super) goes_on: Vec<Gva>,
    pub(super) means: Means,
}

/// What leads a vCPU from a site to code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Means {
    Jump,
    /// An `int3`, after which the hypervisor says where it goes on.
    Trap,
}

impl Means {
    fn bytes(self, at: Gva, entry: Gva) -> Result<Vec<u8>, PatchError> {
        match self {
            Self::Jump => Ok(jump(at, entry)?.to_vec()),
            Self::Trap => Ok(vec![INT3]),
        }
    }
}

/// A jump or a trap that was made.
pub(super) struct Led {
    pub(super) placed: PlacedCode,
    pub(super) content: Content,
    /// What the instructions are now.
    pub(super) after: Bytes,
}

/// A jump or a trap that was checked and is ready to be made for the first time.
pub(super) struct Hook<'a> {
    pub(super) kind: Kind,
    /// The site as it was given.
    pub(super) site: String,
    /// Function and offset of the jump.
    pub(super) place: String,
    /// The module that it is in.
    pub(super) module: Option<Arc<ModuleText>>,
    pub(super) evidence: Evidence,
    pub(super) lead: Lead<'a>,
}

impl Patcher {
    /// Places the code and makes the jump or the trap: both or none.
    pub(super) fn lead(
        &mut self,
        guest: &mut dyn StoppedGuest,
        found: &Located,
        lead: Lead<'_>,
        origin: &Origin,
    ) -> Result<Led, PatchError> {
        let NewPlace {
            mut placed,
            content,
            fresh,
        } = self.placing(found).place(guest, lead.code, lead.entry)?;
        placed.goes_on = lead.goes_on;
        let changed = lead.means.bytes(lead.at, placed.entry).and_then(|bytes| {
            change(guest, found.root, lead.ftrace, lead.at, &bytes)?;
            Ok(bytes)
        });
        match changed {
            Ok(mut after) => {
                after.extend(lead.before.iter().skip(after.len()));
                Ok(Led {
                    placed,
                    content,
                    after: Bytes(after),
                })
            }
            Err(error) => {
                self.unplace(guest, &placed, content, fresh, origin);
                Err(error)
            }
        }
    }

    /// Nothing leads to what was placed: it is given back, or retired where somebody may still be in it
    /// from its first life.
    pub(super) fn unplace(
        &mut self,
        guest: &mut dyn StoppedGuest,
        placed: &PlacedCode,
        content: Content,
        fresh: bool,
        origin: &Origin,
    ) {
        match &mut self.arena {
            Some(arena) if fresh => give_back(guest, arena, placed.code, placed.data),
            _ => self.retire_again(placed, content, origin),
        }
    }

    /// Makes a jump or a trap where there was none.
    pub(super) fn hook(
        &mut self,
        guest: &mut dyn StoppedGuest,
        found: &Located,
        hook: Hook<'_>,
        origin: &Origin,
    ) -> Result<Applied, PatchError> {
        let Lead {
            at, before, ftrace, ..
        } = hook.lead;
        let led = self.lead(guest, found, hook.lead, origin)?;
        let id = self.ledger.next();
        let entry = Applied {
            id,
            kind: hook.kind,
            site: hook.site,
            place: hook.place,
            address: at,
            before: Bytes(before.to_vec()),
            after: led.after,
            evidence: hook.evidence,
            ftrace,
            code: Some(led.placed),
            module: hook.module.as_ref().map(|text| text.name().to_owned()),
            origin: origin.clone(),
        };
        self.contents.insert(id, led.content);
        self.add(entry.clone(), hook.module);
        Ok(entry)
    }

    /// Somebody may still be in it from its first life.
    pub(super) fn retire_again(&mut self, placed: &PlacedCode, content: Content, origin: &Origin) {
        let id = self.ledger.next();
        self.retired
            .add(Leaving::new(id, placed, content, origin.at_ms));
    }

    pub(super) fn placing<'a>(&'a mut self, found: &'a Located) -> Placing<'a> {
        Placing {
            know: &self.know,
            located: found,
            arena: &mut self.arena,
            retired: &mut self.retired,
        }
    }
}
