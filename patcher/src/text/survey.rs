//! Which functions of a kernel can be patched, and why the others cannot, by its file alone.
//!
//! A function can be patched when its entry is one that the tracer could take (its file calls
//! `__fentry__` there, and the boot leaves a nop) and no rule of [`Regions`] is against it. What a
//! running guest may have against it (an owner, somebody in it) is not known here.

use std::collections::{BTreeMap, HashSet};

use super::regions::{RegionError, Regions};
use crate::Kernel;
use crate::guest::LinkAddr;
use crate::space::{LayoutError, optional_range};
use crate::symbols::Symbol;

/// An ENDBR64 and the nop behind it.
const ENTRY: u64 = 9;
/// Where the nop may be: behind an ENDBR64, or at the start.
const ENDBR: u64 = 4;

/// What the functions of a kernel come to.
#[derive(Clone, PartialEq, Eq, Debug, Default, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Survey {
    /// Functions, those under several names once.
    pub functions: usize,
    /// Those that can be patched.
    pub patchable: usize,
    /// The others, by why not.
    pub refused: BTreeMap<String, usize>,
}

/// What one function comes to.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FunctionVerdict {
    /// Its name.
    pub name: String,
    /// Where it is linked.
    pub address: LinkAddr,
    /// Bytes to the next symbol.
    pub size: u64,
    /// Why it cannot be patched, if it cannot.
    pub refused: Option<String>,
}

/// What is needed to judge.
pub struct Surveyor<'a> {
    kernel: &'a Kernel,
    regions: Regions,
    /// Every place where a function calls the tracer.
    entries: HashSet<LinkAddr>,
}

impl<'a> Surveyor<'a> {
    /// Reads the kernel's tables.
    ///
    /// # Errors
    /// [`LayoutError`] when the file does not say where its text is.
    pub fn of(kernel: &'a Kernel) -> Result<Self, LayoutError> {
        let table = optional_range(kernel, "__start_mcount_loc", "__stop_mcount_loc");
        let bytes = table.and_then(|range| {
            let len = usize::try_from(range.end.0.checked_sub(range.start.0)?).ok()?;
            kernel.image().read(range.start, len)
        });
        let entries = bytes
            .unwrap_or_default()
            .chunks_exact(8)
            .filter_map(|raw| Some(LinkAddr(u64::from_le_bytes(raw.try_into().ok()?))))
            .filter(|entry| entry.0 != 0)
            .collect();
        Ok(Self {
            kernel,
            regions: Regions::of(kernel)?,
            entries,
        })
    }

    /// All functions.
    #[must_use]
    pub fn all(&self) -> Survey {
        let mut survey = Survey::default();
        let mut seen = HashSet::new();
        for symbol in self.kernel.symbols().iter().filter(Symbol::is_function) {
            let Some(at) = symbol.address().filter(|&at| seen.insert(at)) else {
                continue;
            };
            survey.functions += 1;
            match self.refusal(at) {
                None => survey.patchable += 1,
                Some(why) => *survey.refused.entry(why).or_default() += 1,
            }
        }
        survey
    }

    /// The functions whose names match a pattern of `*`, `?` and `[a-z]`, at most `most` of them.
    #[must_use]
    pub fn matching(&self, pattern: &str, most: usize) -> Vec<FunctionVerdict> {
        let symbols = self.kernel.symbols();
        let functions = symbols.matching(pattern).filter(Symbol::is_function);
        functions
            .filter_map(|symbol| {
                let address = symbol.address()?;
                Some(FunctionVerdict {
                    name: symbol.name(),
                    address,
                    size: symbol.size().unwrap_or(0),
                    refused: self.refusal(address),
                })
            })
            .take(most)
            .collect()
    }

    fn refusal(&self, at: LinkAddr) -> Option<String> {
        match self.regions.check(self.kernel, at, ENTRY, &"") {
            Ok(()) => {}
            Err(RegionError::NotText { .. }) => return Some("not text of the kernel".into()),
            Err(RegionError::Init { .. }) => {
                return Some("init text, which is freed after the boot".into());
            }
            Err(RegionError::Forbidden { what, .. }) => {
                // Not each function by its name.
                let why = what
                    .split_once("(), ")
                    .map_or(what.as_str(), |(_, why)| why);
                return Some(why.to_owned());
            }
        }
        let traced = [at, at.offset(ENDBR)];
        let traced = traced.iter().any(|entry| self.entries.contains(entry));
        (!traced).then(|| "no entry that the tracer could take".to_owned())
    }
}
