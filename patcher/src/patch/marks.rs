//! ftrace's records that stay marked for a while after we have left their functions.
//!
//! A mark that keeps ftrace away from a function of ours must not go while somebody in the guest
//! traces that function: he was not counted when he began. It goes at a later look, when nobody
//! does. Until then nobody in the guest can trace the function.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::module_text::ModuleText;
use super::report::FtraceMark;
use super::writing::{set_mark, unmark};
use super::{Patcher, report::Applied};
use crate::guest::{Gva, StoppedGuest};
use crate::space::Located;

/// Marks that have stayed, by where they are; and the module whose functions they are about, which has
/// its records as long as it is there.
pub(super) type Marks = BTreeMap<Gva, (FtraceMark, Option<Arc<ModuleText>>)>;

impl Patcher {
    /// How to take the mark of a change off when it is taken back now; nothing when there is none, or
    /// when it has to stay for a while, which is then remembered.
    pub(super) fn leave_mark(
        &mut self,
        guest: &dyn StoppedGuest,
        found: &Located,
        entry: &Applied,
    ) -> Option<FtraceMark> {
        let mark = unmark(&self.know, guest, found, entry.ftrace)?;
        if self.may_unmark(guest, found, mark) {
            return Some(mark);
        }
        let module = self.module_of(entry.id);
        self.marks.insert(mark.at, (mark, module));
        None
    }

    /// Takes marks off that have stayed and that nobody minds any more.
    pub(super) fn unmark_left(&mut self, guest: &mut dyn StoppedGuest, found: &Located) {
        if self.marks.is_empty() {
            return;
        }
        for (at, (left, module)) in std::mem::take(&mut self.marks) {
            if !self.is_loaded(guest, found, module.as_deref()) {
                continue;
            }
            let in_use = |entry: &Applied| entry.ftrace.is_some_and(|mark| mark.at == at);
            let now = unmark(&self.know, guest, found, Some(left));
            let gone = match now {
                // The guest has taken it off itself, or the record is gone.
                None => true,
                Some(_) if self.ledger.applied().any(in_use) => false,
                Some(mark) => {
                    self.may_unmark(guest, found, mark)
                        && set_mark(guest, found.root, mark, mark.after).is_ok()
                }
            };
            if !gone {
                self.marks.insert(at, (left, module));
            }
        }
    }

    /// Nobody in the guest traces the function, by all that can be read.
    fn may_unmark(&self, guest: &dyn StoppedGuest, found: &Located, mark: FtraceMark) -> bool {
        let space = found.space(&guest);
        let ftrace = self.know.ftrace.as_ref();
        ftrace.is_some_and(|ftrace| ftrace.is_wanted(&space, found, mark.at) == Ok(false))
    }

    /// ftrace is still kept away from functions that nothing of ours is in any more.
    #[must_use]
    pub fn has_left_marks(&self) -> bool {
        !self.marks.is_empty()
    }
}
