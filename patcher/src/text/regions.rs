//! Which text may be changed at all.
//!
//! Decided from the kernel's file, before the guest is stopped. Refused are: what is not kernel
//! text, what only ran during the boot, code that must not be interrupted by a probe (`noinstr`,
//! entry, idle), the kernel's own list of functions that kprobes may not touch, and text that the
//! guest rewrites by itself while it runs (jump labels and static calls are looked up in guest
//! memory, see [`super::tables`]).

use std::fmt::Display;
use std::ops::Range;

use crate::Kernel;
use crate::guest::LinkAddr;
use crate::rules::{self, Rule};
use crate::space::{LayoutError, optional_range};

/// Why text may not be changed, by place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// Not text of the kernel.
    #[error("{site} is not text of the kernel{}", in_section(inside.as_deref()))]
    NotText {
        /// The site as it was given.
        site: String,
        /// The section that it is in.
        inside: Option<String>,
    },
    /// Only run during the boot, and freed since.
    #[error("{site} is in init text, which the guest has freed after its boot")]
    Init {
        /// The site as it was given.
        site: String,
    },
    /// Text that the kernel keeps probes out of.
    #[error("{site} is in {what}: it must not be changed while the kernel runs")]
    Forbidden {
        /// The site as it was given.
        site: String,
        /// What is there.
        what: String,
    },
}

fn in_section(name: Option<&str>) -> String {
    name.map(|name| format!(": it is in {name}"))
        .unwrap_or_default()
}

/// The kernel's text and the parts of it that are out of bounds.
#[derive(Clone, Debug)]
pub struct Regions {
    text: Range<LinkAddr>,
    init: Option<Range<LinkAddr>>,
    forbidden: Vec<(&'static str, Range<LinkAddr>)>,
    /// Functions on the kernel's kprobe blacklist, by start.
    blacklist: Vec<Range<LinkAddr>>,
}

const THUNKS: &str = "the retpoline thunks";

/// Ranges between two symbols, where a kernel has them.
const FORBIDDEN: [(&str, &str, &str); 6] = [
    ("noinstr text", "__noinstr_text_start", "__noinstr_text_end"),
    ("entry text", "__entry_text_start", "__entry_text_end"),
    ("idle text", "__cpuidle_text_start", "__cpuidle_text_end"),
    ("kprobes text", "__kprobes_text_start", "__kprobes_text_end"),
    // Called from noinstr text, and rewritten by the mitigations that the boot chose.
    (THUNKS, "__indirect_thunk_start", "__indirect_thunk_end"),
    // Rewritten by every static_call_update().
    (
        "the static call trampolines",
        "__static_call_text_start",
        "__static_call_text_end",
    ),
];

impl Regions {
    /// Looks them up in the kernel's file.
    ///
    /// # Errors
    /// [`LayoutError`] when the file does not say where its text is.
    pub fn of(kernel: &Kernel) -> Result<Self, LayoutError> {
        let mut blacklist = blacklist(kernel);
        blacklist.sort_by_key(|range| range.start);
        Ok(Self {
            text: kernel.between("_stext", "_etext")?,
            init: optional_range(kernel, "_sinittext", "_einittext"),
            forbidden: FORBIDDEN
                .into_iter()
                .filter_map(|(what, start, end)| Some((what, optional_range(kernel, start, end)?)))
                .collect(),
            blacklist,
        })
    }

    /// The kernel's text.
    #[must_use]
    pub fn text(&self) -> Range<LinkAddr> {
        self.text.clone()
    }

    /// Whether this is a thunk that jumps to the address in a register.
    #[must_use]
    pub fn is_thunk(&self, at: LinkAddr) -> bool {
        let mut thunks = self.forbidden.iter().filter(|(what, _)| *what == THUNKS);
        thunks.any(|(_, range)| range.contains(&at))
    }

    /// Whether `len` bytes at `at` may be changed. Errors call the place `site`.
    ///
    /// # Errors
    /// [`RegionError`] says what is there.
    pub fn check(
        &self,
        kernel: &Kernel,
        at: LinkAddr,
        len: u64,
        site: &dyn Display,
    ) -> Result<(), RegionError> {
        let forbidden = |what: String| RegionError::Forbidden {
            site: site.to_string(),
            what,
        };
        let touches = |range: &Range<LinkAddr>| {
            at.0 < range.end.0 && range.start.0 < at.0.saturating_add(len)
        };
        if self.init.as_ref().is_some_and(touches) {
            return Err(RegionError::Init {
                site: site.to_string(),
            });
        }
        let inside = at >= self.text.start
            && at
                .0
                .checked_add(len)
                .is_some_and(|end| end <= self.text.end.0);
        let section = kernel.section_at(at);
        if !inside || section.is_some_and(|section| !section.executable) {
            return Err(RegionError::NotText {
                site: site.to_string(),
                inside: section.map(|section| section.name.clone()),
            });
        }
        let mut forbidden_text = self.forbidden.iter();
        if let Some((what, _)) = forbidden_text
            .find(|(_, range)| touches(range))
            .filter(|_| rules::holds(Rule::ForbiddenText))
        {
            return Err(forbidden((*what).to_owned()));
        }
        let place = kernel.symbols().at(at).map(|place| place.symbol.name());
        if let Some(name) = place.filter(|name| is_return_thunk(name)) {
            return Err(forbidden(format!(
                "{name}(), through which all of the kernel returns"
            )));
        }
        let above = self
            .blacklist
            .partition_point(|range| range.start.0 < at.0.saturating_add(len));
        // Functions do not overlap, but one may be listed under two names.
        let near = self
            .blacklist
            .get(above.saturating_sub(4)..above)
            .unwrap_or_default();
        if let Some(range) = near.iter().find(|range| touches(range)) {
            let name = kernel
                .symbols()
                .at(range.start)
                .map(|place| place.symbol.name())
                .unwrap_or_default();
            return Err(forbidden(format!(
                "{name}(), which the kernel itself keeps probes out of"
            )));
        }
        Ok(())
    }
}

/// The thunks of arch/x86/lib/retpoline.S: noinstr text runs them, and the boot chooses among them.
fn is_return_thunk(name: &str) -> bool {
    ["return_thunk", "safe_ret", "untrain_ret"]
        .iter()
        .any(|part| name.contains(part))
}

/// NOKPROBE_SYMBOL() functions: 8-byte link addresses in a table that the boot frees.
fn blacklist(kernel: &Kernel) -> Vec<Range<LinkAddr>> {
    let table = || {
        let range = optional_range(
            kernel,
            "__start_kprobe_blacklist",
            "__stop_kprobe_blacklist",
        )?;
        let len = usize::try_from(range.end.distance_from(range.start)).ok()?;
        kernel.image().read(range.start, len)
    };
    table()
        .unwrap_or_default()
        .chunks_exact(8)
        .filter_map(|raw| {
            let start = LinkAddr(u64::from_le_bytes(raw.try_into().ok()?));
            let place = kernel.symbols().at(start)?;
            let end = start.offset(place.size.checked_sub(place.offset)?);
            Some(start..end)
        })
        .collect()
}
