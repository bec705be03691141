//! What is known of a kernel before any guest is looked at: everything that its file tells.

use std::sync::Arc;

use super::code::Resolved;
use crate::Kernel;
use crate::arena::ArenaLayout;
use crate::guest::LinkAddr;
use crate::patch::code::ReturnSites;
use crate::space::{Landmarks, LayoutError, Located, Space};
use crate::stack::StackLayout;
use crate::symbols::ModulesLayout;
use crate::tasks::{SurveyLayout, TaskLayout};
use crate::text::{BusyLayout, FtraceLayout, KprobesLayout, ModuleTables, Regions, Rewritten};
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
    pub(super) module_tables: ModuleTables,
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
            module_tables: ModuleTables::of(&kernel),
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
