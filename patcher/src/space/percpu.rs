//! Per-CPU variables.
//!
//! Up to 6.14 they are linked at 0 and live at their value plus `__per_cpu_offset[cpu]`; from 6.15
//! on they are linked into the image and the slide is added as well (sums wrap at 2^64). A symbol
//! says by itself which of the two it is.

use super::{LayoutError, Space, SpaceError};
use crate::guest::{Gva, LinkAddr, Slide, VcpuRegisters};
use crate::symbols::{SiteError, Symbol, Symbols};

/// Most CPUs that are believed in: NR_CPUS of any x86 kernel is at most this.
const MAX_CPUS: u64 = 8192;

/// Where a per-CPU variable is linked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PerCpuVariable {
    /// In the image.
    Linked(LinkAddr),
    /// In an area that starts at 0.
    Absolute(u64),
}

impl PerCpuVariable {
    /// The variable called `name`.
    ///
    /// # Errors
    /// [`SiteError`] when there is no such symbol, or more than one.
    pub fn named(symbols: &Symbols, name: &str) -> Result<Self, SiteError> {
        symbols.unique(name).map(Self::of)
    }

    fn of(symbol: Symbol<'_>) -> Self {
        symbol
            .address()
            .map_or(Self::Absolute(symbol.value()), Self::Linked)
    }
}

/// The per-CPU areas of a running kernel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PerCpu {
    slide: Slide,
    /// CPU number and offset of every possible CPU.
    offsets: Vec<(u32, u64)>,
}

/// Where the kernel says how its per-CPU areas lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PerCpuMarks {
    offsets: LinkAddr,
    /// Length of the array of offsets.
    cpus: u64,
    possible: LinkAddr,
    /// Bytes of the mask.
    mask: u64,
}

impl PerCpuMarks {
    pub(crate) fn of(symbols: &Symbols) -> Result<Self, LayoutError> {
        let offsets = symbols.unique("__per_cpu_offset")?;
        let possible = symbols.unique("__cpu_possible_mask")?;
        // A symbol reaches to the next one, so this may be too long, but not too short.
        let bytes = |symbol: Symbol<'_>| symbol.size().unwrap_or(8).max(8);
        Ok(Self {
            offsets: symbols.address("__per_cpu_offset")?,
            cpus: (bytes(offsets) / 8).min(MAX_CPUS),
            possible: symbols.address("__cpu_possible_mask")?,
            mask: bytes(possible).min(MAX_CPUS / 8),
        })
    }

    #[cfg(test)]
    pub(crate) const fn new(offsets: LinkAddr, possible: LinkAddr, cpus: u64) -> Self {
        Self {
            offsets,
            cpus,
            possible,
            mask: cpus.div_ceil(64) * 8,
        }
    }

    pub(crate) fn read(&self, space: &Space<'_>, slide: Slide) -> Result<PerCpu, SpaceError> {
        let mut mask = vec![0; usize::try_from(self.mask).unwrap_or(0)];
        space.read(self.possible.at(slide), &mut mask)?;
        let mut offsets = Vec::new();
        // Nearly all of thousands of CPUs do not exist.
        let some = (0..).zip(&mask).filter(|(_, byte)| **byte != 0);
        let possible = some.flat_map(|(index, byte)| {
            let set = (0..8).filter(move |bit| byte >> bit & 1 != 0);
            set.map(move |bit| index * 8 + bit)
        });
        for cpu in possible.take_while(|&cpu| cpu < self.cpus) {
            let offset = space.read_u64(self.offsets.offset(cpu * 8).at(slide))?;
            offsets.push((u32::try_from(cpu).unwrap_or(u32::MAX), offset));
        }
        Ok(PerCpu { slide, offsets })
    }
}

impl PerCpu {
    #[cfg(test)]
    pub(crate) const fn none() -> Self {
        Self {
            slide: Slide(0),
            offsets: Vec::new(),
        }
    }

    #[cfg(test)]
    pub(crate) fn single(cpu: u32, offset: u64) -> Self {
        Self {
            slide: Slide(0),
            offsets: vec![(cpu, offset)],
        }
    }

    /// The numbers of all possible CPUs, those that are offline included.
    pub fn cpus(&self) -> impl Iterator<Item = u32> + '_ {
        self.offsets.iter().map(|&(cpu, _)| cpu)
    }

    /// Where CPU `cpu` has its copy of `variable`; `None` for a CPU that cannot exist.
    #[must_use]
    pub fn address(&self, variable: PerCpuVariable, cpu: u32) -> Option<Gva> {
        let base = match variable {
            PerCpuVariable::Linked(address) => address.at(self.slide),
            PerCpuVariable::Absolute(value) => Gva(value),
        };
        self.of_pointer(base, cpu)
    }

    /// Where a pointer to allocated per-CPU memory leads for CPU `cpu`.
    #[must_use]
    pub fn of_pointer(&self, pointer: Gva, cpu: u32) -> Option<Gva> {
        let &(_, offset) = self.offsets.iter().find(|&&(known, _)| known == cpu)?;
        Some(pointer.offset(offset))
    }

    /// Which CPU a vCPU is to the kernel, told by its GS base: in the kernel that is the offset of
    /// its per-CPU area, in user mode (and for a few instructions on the way) the kernel's value
    /// waits in MSR_KERNEL_GS_BASE. vCPU numbers are APIC ids and need not be CPU numbers.
    #[must_use]
    pub fn cpu_of(&self, registers: &VcpuRegisters) -> Option<u32> {
        let by = |base: u64| {
            let mut found = self.offsets.iter().filter(|&&(_, offset)| offset == base);
            found.next().map(|&(cpu, _)| cpu)
        };
        let in_kernel = registers.cs & 3 == 0;
        if in_kernel {
            by(registers.gs_base).or_else(|| by(registers.kernel_gs_base))
        } else {
            by(registers.kernel_gs_base)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::fake::FakeGuest;

    #[test]
    fn the_cpus_are_those_that_can_exist() {
        let offsets = LinkAddr(0xffff_ffff_8100_0000);
        let possible = offsets.offset(0x1000);
        let slide = Slide(0);
        let mut guest = FakeGuest::new(0x10_0000);
        guest.map(offsets.at(slide), 0x2000, 0);
        for cpu in 0..24 {
            guest.put_u64(offsets.at(slide).offset(cpu * 8), cpu << 20);
        }
        // 0, 9, 19 and 22, of 20.
        guest.put(possible.at(slide), &[0x01, 0x02, 0x48]);
        let marks = PerCpuMarks::new(offsets, possible, 20);
        let space = Space::new(&guest.image, guest.root());
        let found = marks.read(&space, slide).unwrap();
        assert_eq!(found.offsets, [(0, 0), (9, 9 << 20), (19, 19 << 20)]);
    }
}
