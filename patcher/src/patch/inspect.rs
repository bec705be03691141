//! Whether the text of a running guest's kernel is what the kernel makes of it, at the price of a
//! stop in which memory is only copied.

use std::sync::Arc;

use super::{Applied, PatchError, Patcher};
use crate::compare::{CompareError, Comparison, compare};
use crate::guest::{Copies, GuestMemory, Lack, StoppedGuest};
use crate::space::Located;

/// What a comparison takes: [`Patcher::follow_text`], [`Patcher::copy_text`] and
/// [`Patcher::compare_copy`], in that order.
#[derive(Debug, Default)]
pub struct TextCopy {
    copies: Copies,
    moment: Option<Moment>,
}

/// What there was when the guest was stopped last.
#[derive(Debug)]
struct Moment {
    found: Arc<Located>,
    ours: Vec<Applied>,
}

/// What came of a comparison.
#[derive(Debug)]
pub enum Compared {
    /// It is done.
    Done(Comparison),
    /// The guest has put things elsewhere since: follow and copy again.
    CopyAgain,
    /// There is more to look at than is copied: compare while the guest is stopped.
    TooMuch,
}

impl Patcher {
    /// Finds out, while the guest runs, which memory a comparison of its text takes. Only for a
    /// guest whose kernel was located.
    pub fn follow_text(&self, running: &dyn GuestMemory, text: &mut TextCopy) {
        if let Some(found) = &self.found {
            let following = text.copies.follow(running);
            let space = found.space(&following);
            // What is read while the guest changes it says nothing.
            let _ = compare(&self.know.kernel, &space, found, &self.applied());
        }
    }

    /// Copies what a comparison takes, while the guest is stopped.
    ///
    /// # Errors
    /// [`PatchError::Copy`], and those of [`Patcher::locate`].
    pub fn copy_text(
        &mut self,
        guest: &mut dyn StoppedGuest,
        text: &mut TextCopy,
    ) -> Result<(), PatchError> {
        let found = self.identify(guest)?;
        text.copies.refresh(&&*guest)?;
        text.moment = Some(Moment {
            found,
            ours: self.applied(),
        });
        Ok(())
    }

    /// Compares what was copied last. The guest need not be stopped.
    ///
    /// # Errors
    /// [`PatchError::Layout`], [`PatchError::Read`].
    pub fn compare_copy(&self, text: &TextCopy) -> Result<Compared, PatchError> {
        // Nothing was copied yet.
        let Some(moment) = &text.moment else {
            return Ok(Compared::CopyAgain);
        };
        let space = moment.found.space(&text.copies);
        let compared = compare(&self.know.kernel, &space, &moment.found, &moment.ours);
        match text.copies.lacks() {
            Some(Lack::Pages) => Ok(Compared::CopyAgain),
            Some(Lack::Room) => Ok(Compared::TooMuch),
            None => compared.map(Compared::Done).map_err(PatchError::from),
        }
    }

    /// Compares the text of the stopped guest with what its kernel makes of it.
    ///
    /// # Errors
    /// [`PatchError::Layout`], [`PatchError::Read`], and those of [`Patcher::locate`].
    pub fn compare_text(&mut self, guest: &mut dyn StoppedGuest) -> Result<Comparison, PatchError> {
        let found = self.identify(guest)?;
        let memory = &&*guest;
        let space = found.space(memory);
        let ours = self.applied();
        Ok(compare(&self.know.kernel, &space, &found, &ours)?)
    }

    fn applied(&self) -> Vec<Applied> {
        self.ledger.applied().cloned().collect()
    }
}

impl From<CompareError> for PatchError {
    fn from(error: CompareError) -> Self {
        match error {
            CompareError::Layout(error) => error.into(),
            CompareError::Read { source, .. } => source.into(),
        }
    }
}
