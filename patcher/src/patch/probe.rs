//! Probes: counting how often a site is reached.

use super::check::Check;
use super::hook::Hook;
use super::knowledge::{Function, Knowledge};
use super::report::{Applied, Kind, Origin};
use super::{EntryId, PatchError, Patcher};
use crate::guest::{GuestMemory, Gva, LinkAddr, StoppedGuest};
use crate::probe::{Displaced, counting, displace};
use crate::symbols::Site;
use crate::text::{EntrySite, MAX_INSTRUCTION, NOP5, boundaries, entry_site, indirect_jump};

/// Bytes of a jump.
const JUMP: usize = NOP5.len();

/// Where to put a probe.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProbeRequest {
    /// The entry of a function, or any instruction in it.
    pub site: Site,
}

/// A probe that was checked as far as it can be without the guest.
#[derive(Clone, Debug)]
pub struct PreparedProbe {
    site: Site,
    /// Where it is linked; unknown yet for a run-time address.
    link: Option<LinkAddr>,
}

/// A probe that is in the guest.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ProbeInfo {
    /// Its number.
    pub id: EntryId,
    /// The site as it was given.
    pub site: String,
    /// Function and offset of the jump.
    pub place: String,
    /// Address of the jump.
    pub address: Gva,
    /// How often the site was reached since the probe was attached.
    pub hits: u64,
}

/// A probe that was detached.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Detached {
    /// The probe, with its last count.
    pub probe: ProbeInfo,
    /// What became of its trampoline, and of others.
    #[serde(flatten)]
    pub reverted: super::Reverted,
}

impl Patcher {
    /// Checks a probe as far as it can be done without the guest.
    ///
    /// # Errors
    /// [`PatchError`]: unknown or forbidden site.
    pub fn prepare_probe(&self, request: ProbeRequest) -> Result<PreparedProbe, PatchError> {
        let link = request.site.resolve(self.know.kernel.symbols())?;
        if let Some(link) = link {
            allowed(&self.know, link, &request.site)?;
        }
        Ok(PreparedProbe {
            site: request.site,
            link,
        })
    }

    /// Attaches a probe to a site of the stopped guest.
    ///
    /// # Errors
    /// [`PatchError`]; where [`PatchError::passes`], let the guest run on and try again.
    pub fn attach_probe(
        &mut self,
        guest: &mut dyn StoppedGuest,
        prepared: &PreparedProbe,
        origin: &Origin,
    ) -> Result<Applied, PatchError> {
        let found = self.identify(guest)?;
        let check = self.check(&found, guest);
        let link = match (prepared.link, &prepared.site) {
            (Some(link), _) => link,
            (None, Site::Address(at)) => at.linked(found.slide),
            (None, site) => return Err(PatchError::Request(format!("{site} has no address"))),
        };
        let function = allowed(&self.know, link, &prepared.site)?;
        check.idle()?;
        let (link, displaced, before) = instructions(&check, &function, link)?;
        let at = link.at(found.slide);
        let back = at.offset(displaced.len as u64);
        let ftrace = check.owners(&self.ledger, function.start, link, displaced.len as u64)?;
        let one = displaced.instructions == 1;
        if !one {
            nothing_leads_inside(&check, &function, &(at..back))?;
        }
        let evidence = check.nobody_inside(&(at..back), one)?;
        let mut goes_on = displaced.branches.clone();
        if displaced.falls_through {
            goes_on.push(back);
        }
        let hook = Hook {
            kind: Kind::Probe,
            site: prepared.site.to_string(),
            place: function.place(link),
            at,
            before,
            evidence,
            ftrace,
            code: &counting(&displaced, back),
            entry: 0,
            goes_on,
        };
        self.hook(guest, &found, hook, origin)
    }

    /// Detaches a probe, and frees retired code that nobody is in.
    ///
    /// # Errors
    /// Those of [`Patcher::revert`]; [`PatchError::NoSuchEntry`] for what is no probe.
    pub fn detach_probe(
        &mut self,
        guest: &mut dyn StoppedGuest,
        id: EntryId,
        origin: &Origin,
    ) -> Result<Detached, PatchError> {
        self.identify(guest)?;
        let entry = self
            .ledger
            .get(id)
            .filter(|entry| entry.kind == Kind::Probe);
        let entry = entry.ok_or(PatchError::NoSuchProbe { id })?;
        let probe = self.probe_info(guest, entry)?;
        Ok(Detached {
            probe,
            reverted: self.revert(guest, id, origin)?,
        })
    }

    /// The probes that are in the stopped guest.
    ///
    /// # Errors
    /// Those of [`Patcher::locate`]; [`PatchError::Arena`] when a count cannot be read.
    pub fn probes(&mut self, guest: &mut dyn StoppedGuest) -> Result<Vec<ProbeInfo>, PatchError> {
        let probes = |entry: &&Applied| entry.kind == Kind::Probe;
        if self.ledger.applied().any(|entry| probes(&entry)) {
            self.identify(guest)?;
        }
        let all = self.ledger.applied().filter(probes);
        all.map(|entry| self.probe_info(guest, entry)).collect()
    }

    fn probe_info(
        &self,
        guest: &dyn StoppedGuest,
        entry: &Applied,
    ) -> Result<ProbeInfo, PatchError> {
        let data = entry.code.as_ref().and_then(|placed| placed.data);
        let memory: &dyn GuestMemory = &guest;
        let hits = match (&self.arena, data) {
            (Some(arena), Some(slot)) => arena.read_u64(memory, slot)?,
            _ => 0,
        };
        Ok(ProbeInfo {
            id: entry.id,
            site: entry.site.clone(),
            place: entry.place.clone(),
            address: entry.address,
            hits,
        })
    }
}

/// The function that `link` is in, when its text may be changed there.
fn allowed(know: &Knowledge, link: LinkAddr, site: &Site) -> Result<Function, PatchError> {
    know.regions.check(&know.kernel, link, JUMP as u64, site)?;
    know.function(link).ok_or_else(|| {
        PatchError::Request(format!(
            "{site} is in no function, so its instructions are not known"
        ))
    })
}

/// The instructions that a jump at `link` takes the place of, and where it really goes: at the
/// start of a function behind the landing place of indirect calls, where the tracer's nop is.
fn instructions(
    check: &Check<'_>,
    function: &Function,
    link: LinkAddr,
) -> Result<(LinkAddr, Displaced, Vec<u8>), PatchError> {
    let slide = check.located.slide;
    let start = function.start.at(slide);
    let longest = (JUMP + 2 * MAX_INSTRUCTION) as u64;
    let code = check.code(function, link.offset(longest))?;
    let asked = usize::try_from(link.distance_from(function.start)).unwrap_or(usize::MAX);
    let from = match asked {
        0 => match entry_site(start, &code) {
            EntrySite::Nop(offset) | EntrySite::Other(offset) => offset,
        },
        asked => asked,
    };
    let link = function.start.offset(from as u64);
    let here = code.get(from..).unwrap_or_default();
    let displaced = displace(link.at(slide), here, JUMP)?;
    boundaries(start, &code, from, displaced.len)?;
    let end = from as u64 + displaced.len as u64;
    if end > function.size {
        return Err(PatchError::Request(format!(
            "{} ends {} bytes behind {}: there is no room for a jump of {JUMP} bytes",
            function.name,
            function.size.saturating_sub(from as u64),
            function.place(link)
        )));
    }
    let before = here.get(..displaced.len).unwrap_or_default().to_vec();
    Ok((link, displaced, before))
}

/// No jump of the function leads behind the first of the instructions in `bytes`, as far as that
/// can be told: a function that jumps to computed addresses cannot be judged.
fn nothing_leads_inside(
    check: &Check<'_>,
    function: &Function,
    bytes: &std::ops::Range<Gva>,
) -> Result<(), PatchError> {
    // One instruction takes the place of all.
    const ONE: [u8; 1] = [0x90];
    check.no_jump_inside(function, bytes, &ONE)?;
    let end = function.start.offset(function.size);
    let code = check.code(function, end)?;
    let whole = usize::try_from(function.size).unwrap_or(0);
    let slide = check.located.slide;
    let is_thunk = |target: Gva| check.know.regions.is_thunk(target.linked(slide));
    let start = function.start.at(slide);
    match indirect_jump(start, code.get(..whole).unwrap_or(&code), &is_thunk) {
        Some(from) => Err(PatchError::JumpUnknown { from }),
        None => Ok(()),
    }
}
