//! Putting a jump to new code into a site: what redirects and probes have in common.

use super::placing::{NewPlace, Placing, give_back};
use super::report::{Applied, Bytes, Evidence, FtraceMark, Kind, Origin};
use super::retire::Leaving;
use super::writing::{change, jump};
use super::{PatchError, Patcher};
use crate::guest::{Gva, StoppedGuest};
use crate::patch::code::Code;
use crate::space::Located;

/// A jump that was checked and is ready to be made.
pub(super) struct Hook<'a> {
    pub(super) kind: Kind,
    /// The site as it was given.
    pub(super) site: String,
    /// Function and offset of the jump.
    pub(super) place: String,
    /// Where the jump goes.
    pub(super) at: Gva,
    /// The whole instructions that are there. Those behind the jump stay as they are.
    pub(super) before: Vec<u8>,
    pub(super) evidence: Evidence,
    pub(super) ftrace: Option<FtraceMark>,
    pub(super) code: &'a Code,
    /// Offset of its first instruction.
    pub(super) entry: u64,
    /// Where the code goes on in the guest's own text by itself.
    pub(super) goes_on: Vec<Gva>,
}

impl Patcher {
    /// Places the code and makes the jump: both or none.
    pub(super) fn hook(
        &mut self,
        guest: &mut dyn StoppedGuest,
        found: &Located,
        hook: Hook<'_>,
        origin: &Origin,
    ) -> Result<Applied, PatchError> {
        let NewPlace {
            mut placed,
            content,
            fresh,
        } = Placing {
            know: &self.know,
            located: found,
            arena: &mut self.arena,
            retired: &mut self.retired,
        }
        .place(guest, hook.code, hook.entry)?;
        placed.goes_on = hook.goes_on;
        let changed = jump(hook.at, placed.entry).and_then(|jump| {
            change(guest, found.root, hook.ftrace, hook.at, &jump)?;
            Ok(jump)
        });
        let id = self.ledger.next();
        let jump = match changed {
            Ok(jump) => jump,
            Err(error) => {
                match &mut self.arena {
                    Some(arena) if fresh => give_back(guest, arena, placed.code, placed.data),
                    // Somebody may still be in it from its first life.
                    _ => self
                        .retired
                        .add(Leaving::new(id, &placed, content, origin.at_ms)),
                }
                return Err(error);
            }
        };
        let mut after = jump.to_vec();
        after.extend(hook.before.iter().skip(jump.len()));
        let entry = Applied {
            id,
            kind: hook.kind,
            site: hook.site,
            place: hook.place,
            address: hook.at,
            before: Bytes(hook.before),
            after: Bytes(after),
            evidence: hook.evidence,
            ftrace: hook.ftrace,
            code: Some(placed),
            origin: origin.clone(),
        };
        self.contents.insert(id, content);
        self.ledger.add(entry.clone());
        Ok(entry)
    }
}
