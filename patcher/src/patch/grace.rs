//! Grace periods as users wait for them.

use super::report::Retired;
use super::{PatchError, Patcher};
use crate::guest::StoppedGuest;

/// A point in time: everything that was unhooked before it. Stays valid when the guest is reset,
/// which ends every grace period.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cookie(pub u64);

impl Patcher {
    /// A cookie for now.
    #[must_use]
    pub fn gp_snapshot(&self) -> Cookie {
        Cookie(self.retired.last())
    }

    /// Whether nobody is in code any more that was unhooked before `cookie` was given, as far as
    /// earlier stops have told.
    ///
    /// # Errors
    /// [`PatchError::NoSuchCookie`] for one that was never given.
    pub fn gp_poll(&self, cookie: Cookie) -> Result<bool, PatchError> {
        let last = self.retired.last();
        if cookie.0 > last {
            return Err(PatchError::NoSuchCookie {
                cookie: cookie.0,
                last,
            });
        }
        Ok(self.retired.has_passed(cookie.0))
    }

    /// Looks at the stopped guest; one look serves everybody who waits.
    ///
    /// # Errors
    /// [`PatchError::Waiting`] names who stands in the way: let the guest run on and try again.
    pub fn gp_wait(
        &mut self,
        guest: &mut dyn StoppedGuest,
        cookie: Cookie,
    ) -> Result<super::Collected, PatchError> {
        let collected = self.collect(guest)?;
        if self.gp_poll(cookie)? {
            return Ok(collected);
        }
        Err(PatchError::Waiting {
            waiting: self.retired.pending(cookie.0).cloned().collect(),
        })
    }

    /// What was unhooked and somebody may still be in, as the last look told.
    #[must_use]
    pub fn waiting(&self) -> Vec<Retired> {
        self.retired.pending(u64::MAX).cloned().collect()
    }
}
