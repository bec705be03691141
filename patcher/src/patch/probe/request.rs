//! What is asked of a probe, and what can be checked of it without a guest.

use super::super::knowledge::Knowledge;
use super::super::{PatchError, Patcher};
use super::callback::{Callback, Prepared, variables};
use super::returning::returning;
use super::site::allowed;
use crate::guest::LinkAddr;
use crate::probe::{Predicate, Returning, Variables, When};
use crate::symbols::Site;

/// Where to put a probe, and what it does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProbeRequest {
    /// The entry of a function, or any instruction in it.
    pub site: Site,
    /// What it does.
    pub callback: Callback,
    /// What a callback of somebody else's is given.
    pub value: u64,
    /// Probes of a site with a higher one come first; of equal ones, the one that was there first.
    pub priority: i32,
    /// It does it when the site is reached, or when the function returns whose entry it is.
    pub when: When,
    /// It does it only where this holds of the registers at that moment.
    pub only_if: Option<Predicate>,
    /// At the return: only where this held of the registers when the function was called.
    pub only_if_called: Option<Predicate>,
    /// At the return: words of arguments that the function has on the stack, at most. Without it, as
    /// many as the kernel's types tell.
    pub stack_words: Option<u32>,
    /// The site stays hooked when its last probe is taken out: its trampoline does nothing then, and
    /// the next probe finds the jump there.
    pub permanent: bool,
}

impl ProbeRequest {
    /// A probe that counts.
    #[must_use]
    pub fn counting(site: Site) -> Self {
        Self {
            site,
            callback: Callback::Count,
            value: 0,
            priority: 0,
            when: When::Reached,
            only_if: None,
            only_if_called: None,
            stack_words: None,
            permanent: false,
        }
    }
}

/// A probe that was checked as far as it can be without the guest.
#[derive(Clone, Debug)]
pub struct PreparedProbe {
    pub(super) site: Site,
    /// Where it is linked; unknown yet for a run-time address or a module.
    pub(super) link: Option<LinkAddr>,
    pub(super) callback: Prepared,
    pub(super) value: u64,
    pub(super) priority: i32,
    pub(super) when: When,
    pub(super) only_if: Option<Predicate>,
    pub(super) only_if_called: Option<Predicate>,
    pub(super) stack_words: Option<u32>,
    pub(super) permanent: bool,
    /// What is known of the function's return; nothing yet where `link` is unknown.
    pub(super) returning: Option<Returning>,
    pub(super) variables: Option<Variables>,
}

impl Patcher {
    /// Checks a probe as far as it can be done without the guest.
    ///
    /// # Errors
    /// [`PatchError`]: unknown or forbidden site, a callback that cannot be used.
    pub fn prepare_probe(&self, request: ProbeRequest) -> Result<PreparedProbe, PatchError> {
        let link = request.site.resolve(self.know.kernel.symbols())?;
        let callback = Prepared::new(&self.know, request.callback)?;
        let when = callback.acts(request.when);
        let mut known = None;
        if let Some(link) = link {
            let function = allowed(&self.know, link, &request.site)?;
            if when == When::Returned {
                known = Some(returning(&self.know, &function, None, request.stack_words)?);
            }
        }
        let told = request.only_if_called.is_some() || request.stack_words.is_some();
        if told && when == When::Reached {
            return Err(PatchError::Request(
                "only a probe that acts when a function returns tells what held when it was called, \
                 and how many arguments are on the stack"
                    .into(),
            ));
        }
        let variables = match callback.looks() || request.only_if.is_some() {
            true => Some(variables(&self.know)?),
            false => None,
        };
        if let Some(variables) = &variables {
            callback.check(variables)?;
        }
        Ok(PreparedProbe {
            site: request.site,
            link,
            callback,
            value: request.value,
            priority: request.priority,
            when,
            only_if: request.only_if,
            only_if_called: request.only_if_called,
            stack_words: request.stack_words,
            permanent: request.permanent,
            returning: known,
            variables,
        })
    }
}

impl PreparedProbe {
    /// A probe of our own.
    pub(in super::super) fn internal(
        know: &Knowledge,
        site: Site,
        callback: Prepared,
        variables: Variables,
    ) -> Result<Self, PatchError> {
        let link = site.resolve(know.kernel.symbols())?;
        if let Some(link) = link {
            allowed(know, link, &site)?;
        }
        Ok(Self {
            site,
            link,
            callback,
            value: 0,
            priority: i32::MAX,
            when: When::Reached,
            only_if: None,
            only_if_called: None,
            stack_words: None,
            permanent: false,
            returning: None,
            variables: Some(variables),
        })
    }
}
