//! Which kernel runs in the guest, and where it put itself.
//!
//! The slide of KASLR follows from MSR_LSTAR, which points to `entry_SYSCALL_64` on every CPU that
//! has come up; it is believed only when all CPUs agree and when the version string and the build
//! id in guest memory are those of the kernel's file. Guaranteed: an answer is for this very
//! kernel, finished with its boot. With FRED (6.9 and later, on CPUs that have it) the kernel does
//! not set MSR_LSTAR, and is taken for one that is still booting.

use super::percpu::PerCpuMarks;
use super::walk::{Root, walk};
use super::{Bounds, LayoutError, PerCpu, Space, SpaceError, optional};
use crate::Kernel;
use crate::guest::{Activity, Gpa, GuestMemory, Gva, LinkAddr, Slide, StoppedGuest, Vcpu};

/// KERNEL_IMAGE_SIZE with KASLR (arch/x86/include/asm/page_64_types.h): slides are below it.
pub(super) const IMAGE_SPACE: u64 = 1 << 30;
/// Smallest CONFIG_PHYSICAL_ALIGN on x86-64.
pub(super) const SLIDE_ALIGN: u64 = 2 << 20;
/// Where the kernel image is linked: `__START_KERNEL_map`.
const KERNEL_MAP: Gva = Gva(0xffff_ffff_8000_0000);

/// Where a kernel keeps what it is recognised by.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Landmarks {
    pub(crate) entry: LinkAddr,
    pub(crate) banner: LinkAddr,
    pub(crate) banner_text: Vec<u8>,
    pub(crate) build_id: Option<(LinkAddr, Vec<u8>)>,
    pub(crate) top_table: LinkAddr,
    pub(crate) state: LinkAddr,
    pub(crate) state_size: u64,
    /// Value and name of each `enum system_states`, SYSTEM_RUNNING first.
    pub(crate) states: Vec<(u64, &'static str)>,
    pub(crate) phys_base: Option<LinkAddr>,
    pub(crate) page_offset_base: Option<LinkAddr>,
    pub(crate) per_cpu: PerCpuMarks,
    /// How much may be read of a guest that is found by these.
    pub bounds: Bounds,
}

/// The states of a kernel; the first is the one in which it can be patched.
const STATES: [&str; 8] = [
    "SYSTEM_RUNNING",
    "SYSTEM_BOOTING",
    "SYSTEM_SCHEDULING",
    "SYSTEM_FREEING_INITMEM",
    "SYSTEM_HALT",
    "SYSTEM_POWER_OFF",
    "SYSTEM_RESTART",
    "SYSTEM_SUSPEND",
];

impl Landmarks {
    /// Looks them up in the kernel's file.
    ///
    /// # Errors
    /// [`LayoutError`] names what the file lacks.
    pub fn of(kernel: &Kernel) -> Result<Self, LayoutError> {
        let symbols = kernel.symbols();
        let types = kernel.types();
        types.constant("system_states", "SYSTEM_RUNNING")?;
        let states = STATES
            .iter()
            .filter_map(|&name| {
                let value = types.constant("system_states", name).ok()?;
                Some((u64::try_from(value).ok()?, name))
            })
            .collect();
        Ok(Self {
            entry: symbols.address("entry_SYSCALL_64")?,
            banner: kernel.banner().address,
            banner_text: kernel.banner().text.clone().into_bytes(),
            build_id: kernel.build_id().map(|id| (id.address, id.bytes.clone())),
            top_table: symbols.address("init_top_pgt")?,
            state: symbols.address("system_state")?,
            state_size: types.size_of("system_states")?,
            states,
            phys_base: optional(symbols, "phys_base"),
            page_offset_base: optional(symbols, "page_offset_base"),
            per_cpu: PerCpuMarks::of(symbols)?,
            bounds: Bounds::USUAL,
        })
    }
}

/// A kernel found in a guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Located {
    /// What KASLR added to every address of the image.
    pub slide: Slide,
    /// The kernel's own top-level page table: it maps all of the kernel whoever runs.
    pub root: Root,
    /// Guest-physical address of the (run-time) virtual address `__START_KERNEL_map`, as the image
    /// is mapped: `phys_base` in the kernel's words. Wraps below zero when KASLR moved the image
    /// further up in virtual than in physical memory.
    pub phys_base: Gpa,
    /// Start of the direct map of all memory, where the kernel moves it.
    pub page_offset_base: Option<Gva>,
    /// The per-CPU areas.
    pub per_cpu: PerCpu,
    /// How much may be read in one look: [`Landmarks::bounds`].
    pub bounds: Bounds,
}

/// Why the kernel was not found in the guest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LocateError {
    /// It has not booted far enough.
    #[error("the guest kernel is still booting ({why}); try again when it is up")]
    StillBooting {
        /// How that was seen.
        why: String,
    },
    /// It is on its way down, or suspended.
    #[error("the guest kernel is not running any more: its system_state is {state}")]
    NotRunning {
        /// Its state in the kernel's words.
        state: String,
    },
    /// Every vCPU with a context runs a guest of the guest.
    #[error("every vCPU is in a nested guest; its kernel cannot be told from here, try again")]
    Nested,
    /// The vCPUs' system call entries do not belong to one kernel.
    #[error("vCPU {vcpu} has MSR_LSTAR {lstar}, vCPU {other} {expected}: not one kernel")]
    Disagreement {
        /// A vCPU.
        vcpu: u32,
        /// Its MSR_LSTAR.
        lstar: Gva,
        /// Another one.
        other: u32,
        /// And its MSR_LSTAR.
        expected: Gva,
    },
    /// MSR_LSTAR is no address that KASLR could give to this kernel.
    #[error(
        "the guest runs another kernel: MSR_LSTAR is {lstar}, which this kernel's \
         entry_SYSCALL_64, linked at {linked}, cannot be moved to"
    )]
    ImpossibleSlide {
        /// MSR_LSTAR.
        lstar: Gva,
        /// Link address of the system call entry.
        linked: LinkAddr,
    },
    /// The kernel in guest memory is another one than that of the file.
    #[error(
        "the guest runs another kernel: its {what} at {at} is {found:?}, the file's is {expected:?}"
    )]
    OtherKernel {
        /// What was compared.
        what: &'static str,
        /// Where in the guest.
        at: Gva,
        /// The file's.
        expected: String,
        /// The guest's.
        found: String,
    },
    /// The kernel's addresses are not mapped as they should be.
    #[error("the guest runs another kernel, or none: {what} cannot be read")]
    Unreadable {
        /// What was looked for.
        what: &'static str,
        /// Why it cannot be read.
        source: SpaceError,
    },
}

impl Located {
    /// Finds the kernel in a stopped guest.
    ///
    /// # Errors
    /// [`LocateError`]. [`LocateError::StillBooting`] and [`LocateError::Nested`] may pass.
    pub fn find(guest: &dyn StoppedGuest, marks: &Landmarks) -> Result<Self, LocateError> {
        let located = Self::find_in_any_state(guest, marks)?;
        let memory: &dyn GuestMemory = &guest;
        running(&located.space(memory), marks, located.slide)?;
        Ok(located)
    }

    /// Finds the kernel in a guest that may be booting, going down or dead: good for reading
    /// only.
    ///
    /// # Errors
    /// [`LocateError`] when it has not got as far as its own page tables, or is another kernel.
    pub fn find_in_any_state(
        guest: &dyn StoppedGuest,
        marks: &Landmarks,
    ) -> Result<Self, LocateError> {
        let slide = slide(guest.vcpus(), marks)?;
        let memory: &dyn GuestMemory = &guest;
        let by_vcpu = root_with_banner(memory, guest.vcpus(), marks, slide)?;
        let unreadable = |what| move |source| LocateError::Unreadable { what, source };

        // The table of a process may go away; the kernel's own stays.
        let top = walk(memory, by_vcpu, marks.top_table.at(slide))
            .map_err(SpaceError::from)
            .map_err(unreadable("its top-level page table"))?;
        let root = Root {
            table: top.gpa,
            ..by_vcpu
        };
        let space = Space::new(memory, root);
        check(&space, marks, slide)?;
        let banner = space
            .mapping(marks.banner.at(slide))
            .map_err(SpaceError::from)
            .map_err(unreadable("linux_banner"))?;
        let read = |address: LinkAddr| space.read_u64(address.at(slide));
        // Both are the same by definition; where the variable exists it has to agree.
        let phys_base = Gpa(banner
            .gpa
            .0
            .wrapping_sub(marks.banner.at(slide).distance_from(KERNEL_MAP)));
        if let Some(variable) = marks.phys_base {
            let said = read(variable).map_err(unreadable("phys_base"))?;
            if said != phys_base.0 {
                return Err(LocateError::OtherKernel {
                    what: "phys_base",
                    at: variable.at(slide),
                    expected: phys_base.to_string(),
                    found: format!("{said:#x}"),
                });
            }
        }
        Ok(Self {
            slide,
            root,
            phys_base,
            page_offset_base: marks
                .page_offset_base
                .map(|address| read(address).map(Gva))
                .transpose()
                .map_err(unreadable("page_offset_base"))?,
            per_cpu: marks
                .per_cpu
                .read(&space, slide)
                .map_err(unreadable("__per_cpu_offset"))?,
            bounds: marks.bounds,
        })
    }

    /// The kernel's address space.
    #[must_use]
    pub fn space<'m>(&self, memory: &'m dyn GuestMemory) -> Space<'m> {
        Space::bounded(memory, self.root, self.bounds)
    }
}

/// The slide on which all vCPUs agree that have come up.
fn slide(vcpus: &[Vcpu], marks: &Landmarks) -> Result<Slide, LocateError> {
    let started = |vcpu: &&Vcpu| vcpu.activity != Activity::NotStarted;
    let mut nested = false;
    let mut first: Option<&Vcpu> = None;
    for vcpu in vcpus.iter().filter(started) {
        nested |= vcpu.nested;
        if vcpu.nested || vcpu.registers.lstar == 0 {
            continue;
        }
        match first {
            None => first = Some(vcpu),
            Some(other) if other.registers.lstar != vcpu.registers.lstar => {
                return Err(LocateError::Disagreement {
                    vcpu: vcpu.index,
                    lstar: Gva(vcpu.registers.lstar),
                    other: other.index,
                    expected: Gva(other.registers.lstar),
                });
            }
            Some(_) => {}
        }
    }
    let Some(vcpu) = first else {
        return Err(if nested {
            LocateError::Nested
        } else {
            LocateError::StillBooting {
                why: "no vCPU has set up its system call entry".into(),
            }
        });
    };
    let lstar = Gva(vcpu.registers.lstar);
    let slide = lstar.0.wrapping_sub(marks.entry.0);
    if slide >= IMAGE_SPACE || slide % SLIDE_ALIGN != 0 {
        return Err(LocateError::ImpossibleSlide {
            lstar,
            linked: marks.entry,
        });
    }
    Ok(Slide(slide))
}

/// A vCPU's page table in which the version string is where it should be.
pub(super) fn root_with_banner(
    memory: &dyn GuestMemory,
    vcpus: &[Vcpu],
    marks: &Landmarks,
    slide: Slide,
) -> Result<Root, LocateError> {
    let mut reason = None;
    let started = vcpus
        .iter()
        .filter(|vcpu| vcpu.activity != Activity::NotStarted && !vcpu.nested);
    for vcpu in started {
        let Ok(roots) = Root::candidates(&vcpu.registers) else {
            continue;
        };
        for root in roots {
            match check(&Space::new(memory, root), marks, slide) {
                Ok(()) => return Ok(root),
                // Bytes that differ say more than a table without the kernel.
                Err(error @ LocateError::OtherKernel { .. }) => reason = Some(error),
                Err(error) => reason = reason.or(Some(error)),
            }
        }
    }
    Err(reason.unwrap_or_else(|| LocateError::StillBooting {
        why: "no vCPU is in 64-bit mode".into(),
    }))
}

/// Compares the version string and the build id in guest memory with the file's.
fn check(space: &Space<'_>, marks: &Landmarks, slide: Slide) -> Result<(), LocateError> {
    let text = |bytes: &[u8]| {
        let end = bytes.iter().position(|byte| !matches!(byte, b' '..=b'~'));
        String::from_utf8_lossy(bytes.get(..end.unwrap_or(bytes.len())).unwrap_or_default())
            .into_owned()
    };
    let id = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    compare(
        space,
        "linux_banner",
        marks.banner.at(slide),
        &marks.banner_text,
        text,
    )?;
    match &marks.build_id {
        Some((at, bytes)) => compare(space, "build id", at.at(slide), bytes, id),
        None => Ok(()),
    }
}

fn compare(
    space: &Space<'_>,
    what: &'static str,
    at: Gva,
    expected: &[u8],
    show: impl Fn(&[u8]) -> String,
) -> Result<(), LocateError> {
    let mut found = vec![0; expected.len()];
    space
        .read(at, &mut found)
        .map_err(|source| LocateError::Unreadable { what, source })?;
    if found == expected {
        return Ok(());
    }
    Err(LocateError::OtherKernel {
        what,
        at,
        expected: show(expected),
        found: show(&found),
    })
}

/// Whether the kernel is up and not on its way down.
fn running(space: &Space<'_>, marks: &Landmarks, slide: Slide) -> Result<(), LocateError> {
    let state = space
        .read_sized(marks.state.at(slide), marks.state_size)
        .map_err(|source| LocateError::Unreadable {
            what: "system_state",
            source,
        })?;
    let running = marks.states.first().map_or(u64::MAX, |&(value, _)| value);
    if state == running {
        return Ok(());
    }
    let known = marks.states.iter().find(|&&(value, _)| value == state);
    let name = known.map_or_else(|| format!("{state:#x}"), |(_, name)| (*name).to_owned());
    Err(if state < running {
        LocateError::StillBooting {
            why: format!("its system_state is {name}"),
        }
    } else {
        LocateError::NotRunning { state: name }
    })
}

#[cfg(test)]
#[path = "located_tests.rs"]
mod tests;
