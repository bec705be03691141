//! What is known of a kernel before any guest is looked at: everything that its file tells.

use std::sync::Arc;

use super::PatchError;
use super::code::Resolved;
use crate::Kernel;
use crate::arena::ArenaLayout;
use crate::guest::{LinkAddr, Slide};
use crate::patch::code::ReturnSites;
use crate::space::{Landmarks, LayoutError, Located, Space};
use crate::stack::StackLayout;
use crate::symbols::{ModulesLayout, Site};
use crate::tasks::{SurveyLayout, TaskLayout};
use crate::text::{BusyLayout, FtraceLayout, KprobesLayout, Regions, Rewritten};
use crate::types::Field;

/// Return sites that are looked at to learn what the boot made of them.
const SAMPLES: usize = 4;
const JUMP: usize = 5;

/// Everything that a kernel's file tells.
#[derive(Debug)]
pub(super) struct Knowledge {
    pub(super) kernel: Arc<Kernel>,
    pub(super) landmarks: Landmarks,
    pub(super) tasks: TaskLayout,
    /// What is only shown: without it, the kernel can be patched all the same.
    pub(super) survey: Result<SurveyLayout, LayoutError>,
    /// For showing stacks: without it, the kernel can be patched all the same.
    pub(super) stack: Result<StackLayout, LayoutError>,
    /// `None` for a kernel that has no modules.
    pub(super) modules: Option<ModulesLayout>,
    pub(super) regions: Regions,
    pub(super) busy: BusyLayout,
    pub(super) rewritten: Rewritten,
    pub(super) ftrace: Option<FtraceLayout>,
    pub(super) kprobes: Option<KprobesLayout>,
    pub(super) arena: ArenaLayout,
    /// `task_struct.nvcsw`, where it proves that a task was out of code that cannot sleep.
    pub(super) switches: Option<Field>,
    /// Some jumps that stand for returns.
    return_sites: Vec<LinkAddr>,
}

impl Knowledge {
    pub(super) fn of(kernel: Arc<Kernel>) -> Result<Self, LayoutError> {
        let regions = Regions::of(&kernel)?;
        Ok(Self {
            landmarks: Landmarks::of(&kernel)?,
            tasks: TaskLayout::of(&kernel)?,
            survey: SurveyLayout::of(&kernel),
            stack: StackLayout::of(&kernel),
            modules: ModulesLayout::of(&kernel)?,
            busy: BusyLayout::of(&kernel)?,
            rewritten: Rewritten::of(&kernel)?,
            ftrace: FtraceLayout::of(&kernel)?,
            kprobes: KprobesLayout::of(&kernel),
            arena: ArenaLayout::of(&kernel)?,
            switches: switches(&kernel),
            return_sites: return_sites(&kernel, &regions),
            regions,
            kernel,
        })
    }

    /// The function that `link` is in, when `len` bytes of its text may be changed there.
    pub(super) fn allowed(
        &self,
        link: LinkAddr,
        len: u64,
        site: &Site,
    ) -> Result<Function, PatchError> {
        self.regions.check(&self.kernel, link, len, site)?;
        self.function(link).ok_or_else(|| {
            PatchError::Request(format!(
                "{site} is in no function, so its instructions are not known"
            ))
        })
    }

    /// Function and offset of a link address, and where the function begins and how long it is.
    pub(super) fn function(&self, at: LinkAddr) -> Option<Function> {
        let place = self.kernel.symbols().function_at(at)?;
        Some(Function {
            name: place.symbol.name(),
            start: place.symbol.address()?,
            size: place.size,
        })
    }

    /// The function, and its `.cold` part.
    pub(super) fn parts(&self, function: &Function) -> Vec<Function> {
        let mut parts = vec![function.clone()];
        let cold = format!("{}.cold", function.name);
        let symbols = self.kernel.symbols();
        parts.extend(symbols.named(&cold).filter_map(|symbol| {
            Some(Function {
                name: cold.clone(),
                start: symbol.address()?,
                size: symbol.size()?,
            })
        }));
        parts
    }

    /// Where the kernel has a symbol that an object refers to.
    pub(super) fn resolve(&self, name: &str) -> Result<Resolved, String> {
        let all: Vec<_> = self.kernel.symbols().named(name).collect();
        let mut global = all.iter().filter(|s| s.kind().is_ascii_uppercase());
        let symbol = match (&all[..], global.next(), global.next()) {
            ([], ..) => {
                return Err("this kernel has no such symbol (modules are not looked at)".into());
            }
            ([only], ..) => only,
            (_, Some(only), None) => only,
            _ => {
                return Err(format!(
                    "this kernel has {} symbols of that name; which one is meant is not clear",
                    all.len()
                ));
            }
        };
        Ok(symbol
            .address()
            .map_or(Resolved::Absolute(symbol.value()), Resolved::Linked))
    }

    /// What the running kernel made of its returns.
    pub(super) fn returns(&self, space: &Space<'_>, located: &Located) -> ReturnSites {
        for site in &self.return_sites {
            let at = site.at(located.slide);
            let mut bytes = [0; JUMP];
            if space.read(at, &mut bytes).is_err() {
                continue;
            }
            match bytes {
                [0xc3, ..] => return ReturnSites::Ret,
                [0xe9, a, b, c, d] => {
                    let distance = i32::from_le_bytes([a, b, c, d]);
                    let to = at.offset(JUMP as u64).displace(distance.into());
                    return ReturnSites::Jump(to);
                }
                _ => {}
            }
        }
        ReturnSites::AsBuilt
    }
}

/// With PREEMPT_RT any spinlock may sleep, so a voluntary switch says nothing.
fn switches(kernel: &Kernel) -> Option<Field> {
    let sleeping_locks = kernel.banner().text.contains("PREEMPT_RT");
    let field = kernel.types().field("task_struct", "nvcsw").ok()?;
    (!sleeping_locks).then_some(field)
}

/// A function of the kernel.
#[derive(Clone, Debug)]
pub(super) struct Function {
    pub(super) name: String,
    pub(super) start: LinkAddr,
    pub(super) size: u64,
}

/// Where `site` is linked: what its name has said, or by its run-time address.
pub(super) fn linked(
    site: &Site,
    by_name: Option<LinkAddr>,
    slide: Slide,
) -> Result<LinkAddr, PatchError> {
    match (by_name, site) {
        (Some(link), _) => Ok(link),
        (None, Site::Address(at)) => Ok(at.linked(slide)),
        (None, site) => Err(PatchError::Request(format!("{site} has no address"))),
    }
}

impl Function {
    pub(super) fn place(&self, at: LinkAddr) -> String {
        match at.distance_from(self.start) {
            0 => self.name.clone(),
            offset => format!("{}+{offset:#x}", self.name),
        }
    }
}

/// `.return_sites`: distances from each entry to its jump. The boot frees it, so it is taken from
/// the file.
fn return_sites(kernel: &Kernel, regions: &Regions) -> Vec<LinkAddr> {
    let Some(section) = kernel.image().section(".return_sites") else {
        return Vec::new();
    };
    let bytes = kernel.image().section_bytes(section).unwrap_or_default();
    bytes
        .chunks_exact(4)
        .enumerate()
        .filter_map(|(index, raw)| {
            let distance = i32::from_le_bytes(raw.try_into().ok()?);
            let entry = section.address.offset(index as u64 * 4);
            Some(entry.displace(distance.into()))
        })
        .filter(|&site| regions.check(kernel, site, JUMP as u64, &site).is_ok())
        .take(SAMPLES)
        .collect()
}
