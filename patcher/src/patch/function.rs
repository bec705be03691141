//! Functions of the guest, at the addresses where they run: the kernel's own, and those of modules.

use std::ops::Range;
use std::sync::Arc;

use super::PatchError;
use super::check::Check;
use super::knowledge::Knowledge;
use super::module_text::ModuleText;
use crate::guest::{Gva, LinkAddr, Slide};
use crate::symbols::{Site, SiteError};
use crate::text::{Leader, Rewriter};

/// A function of the guest. For what is checked without one, that of a guest that KASLR has not moved.
#[derive(Clone, Debug)]
pub(super) struct Function {
    pub(super) name: String,
    pub(super) start: Gva,
    pub(super) size: u64,
    /// The module that it is in; `None` for the kernel itself.
    pub(super) module: Option<Arc<ModuleText>>,
}

impl Function {
    /// Function and offset of an address in it.
    pub(super) fn place(&self, at: Gva) -> String {
        let module = self.module.as_ref().map(|text| format!("{}:", text.name()));
        let module = module.unwrap_or_default();
        match at.distance_from(self.start) {
            0 => format!("{module}{}", self.name),
            offset => format!("{module}{}+{offset:#x}", self.name),
        }
    }

    /// Behind its last byte.
    pub(super) fn end(&self) -> Gva {
        self.start.offset(self.size)
    }
}

impl Knowledge {
    /// The function of the kernel that `at` is in, where KASLR has moved it by `slide`.
    pub(super) fn function(&self, at: LinkAddr, slide: Slide) -> Option<Function> {
        let place = self.kernel.symbols().function_at(at)?;
        Some(Function {
            name: place.symbol.name(),
            start: place.symbol.address()?.at(slide),
            size: place.size,
            module: None,
        })
    }

    /// The function, and its `.cold` part.
    pub(super) fn parts(&self, function: &Function, slide: Slide) -> Vec<Function> {
        let mut parts = vec![function.clone()];
        let cold = format!("{}.cold", function.name);
        match &function.module {
            Some(text) => parts.extend(text.named(&cold)),
            None => {
                let named = self.kernel.symbols().named(&cold);
                parts.extend(named.filter_map(|symbol| {
                    Some(Function {
                        name: cold.clone(),
                        start: symbol.address()?.at(slide),
                        size: symbol.size()?,
                        module: None,
                    })
                }));
            }
        }
        parts
    }

    /// The function that `link` is in, when `len` bytes of its text may be changed there, as its file
    /// has it.
    pub(super) fn allowed(
        &self,
        link: LinkAddr,
        len: u64,
        site: &Site,
    ) -> Result<Function, PatchError> {
        self.regions.check(&self.kernel, link, len, site)?;
        self.function(link, Slide(0))
            .ok_or_else(|| in_no_function(site))
    }

    fn is_kernel_text(&self, at: LinkAddr) -> bool {
        self.regions.text().contains(&at)
    }
}

impl Check<'_> {
    /// Where `site` is, of which `link` is known where it names a symbol of the kernel, and the function
    /// that it is in, when `len` bytes of its text may be changed there.
    pub(super) fn target(
        &self,
        site: &Site,
        link: Option<LinkAddr>,
        len: u64,
    ) -> Result<(Gva, Function), PatchError> {
        let (at, function) = self.place(site, link, len)?;
        Ok((at, function.ok_or_else(|| in_no_function(site))?))
    }

    /// The same; without a function where the text of the kernel is in none.
    pub(super) fn place(
        &self,
        site: &Site,
        link: Option<LinkAddr>,
        len: u64,
    ) -> Result<(Gva, Option<Function>), PatchError> {
        let at = match (link, site) {
            (Some(link), _) => link.at(self.located.slide),
            (None, Site::Address(at)) => *at,
            (
                None,
                Site::Symbol {
                    module: Some(module),
                    name,
                    position,
                    offset,
                },
            ) => {
                let text = self.module_named(module)?;
                let text = text.ok_or_else(|| SiteError::NoModule {
                    module: module.clone(),
                })?;
                let at = text.resolve(name, *position, *offset)?;
                return Ok((at, Some(text.check(at, len, site)?)));
            }
            (None, Site::Symbol { .. }) => {
                return Err(PatchError::Request(format!("{site} has no address")));
            }
        };
        Ok((at, self.text(at, len, site)?))
    }

    /// The function that `at` is in, when `len` bytes of its text may be changed there.
    pub(super) fn function(
        &self,
        at: Gva,
        len: u64,
        site: &dyn std::fmt::Display,
    ) -> Result<Function, PatchError> {
        self.text(at, len, site)?
            .ok_or_else(|| in_no_function(site))
    }

    /// The same; `None` where the text of the kernel is in no function.
    fn text(
        &self,
        at: Gva,
        len: u64,
        site: &dyn std::fmt::Display,
    ) -> Result<Option<Function>, PatchError> {
        let slide = self.located.slide;
        let link = at.linked(slide);
        if !self.know.is_kernel_text(link) {
            if let Some(text) = self.module_at(at)? {
                return text.check(at, len, site).map(Some);
            }
        }
        self.know
            .regions
            .check(&self.know.kernel, link, len, site)?;
        Ok(self.know.function(link, slide))
    }

    /// The function that `at` is in, for those who do not change it.
    pub(super) fn function_around(&self, at: Gva) -> Option<Function> {
        let slide = self.located.slide;
        let link = at.linked(slide);
        match self.know.is_kernel_text(link) {
            true => self.know.function(link, slide),
            false => self.module_at(at).ok()??.function(at),
        }
    }

    /// What the guest rewrites by itself, or counts on, among `len` bytes at `at` of `function`.
    pub(super) fn rewritten(
        &self,
        function: Option<&Function>,
        at: Gva,
        len: u64,
    ) -> Option<(Gva, Rewriter)> {
        let slide = self.located.slide;
        match function.and_then(|function| function.module.as_ref()) {
            Some(text) => {
                let space = self.located.space(&self.guest);
                text.sites().overlap(&space, at, len)
            }
            None => {
                let kernel = &self.know.kernel;
                let found = self.know.rewritten.overlap(kernel, at.linked(slide), len);
                found.map(|(site, rewriter)| (site.at(slide), rewriter))
            }
        }
    }

    /// Where the guest goes on by itself in `bytes` of `function`, but for the first of them: no jump
    /// need be in the text that leads there.
    pub(super) fn leads_into(&self, function: &Function, bytes: &Range<Gva>) -> Vec<(Gva, Leader)> {
        let slide = self.located.slide;
        match &function.module {
            Some(text) => text.sites().leads_into(bytes).collect(),
            None => {
                let linked = bytes.start.linked(slide)..bytes.end.linked(slide);
                let all = self.know.rewritten.leads_into(&linked);
                all.map(|(to, leader)| (to.at(slide), leader)).collect()
            }
        }
    }
}

fn in_no_function(site: &dyn std::fmt::Display) -> PatchError {
    PatchError::Request(format!(
        "{site} is in no function, so its instructions are not known"
    ))
}
