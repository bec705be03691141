//! What the guest's memory says about the choices that its kernel made.

use super::report::CompareError;
use crate::Kernel;
use crate::guest::{Gva, LinkAddr};
use crate::space::{LayoutError, Located, Space, optional, optional_range};

/// A kernel's file and the guest that runs it.
pub(super) struct View<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) space: &'a Space<'a>,
    pub(super) located: &'a Located,
    features: Vec<u8>,
}

impl<'a> View<'a> {
    pub(super) fn new(
        kernel: &'a Kernel,
        space: &'a Space<'a>,
        located: &'a Located,
    ) -> Result<Self, CompareError> {
        let mut view = Self {
            kernel,
            space,
            located,
            features: Vec::new(),
        };
        let field = kernel
            .types()
            .field("cpuinfo_x86", "x86_capability")
            .map_err(LayoutError::from)?;
        let cpu = kernel
            .symbols()
            .address("boot_cpu_data")
            .map_err(LayoutError::from)?;
        // Far more than any kernel has.
        let len = usize::try_from(field.size.min(4096)).unwrap_or(0);
        view.features = view.bytes(cpu.offset(field.offset), len, "boot_cpu_data")?;
        Ok(view)
    }

    /// Whether the kernel believes that its CPUs have feature (or bug) number `bit`; `None` for a
    /// number that it does not know.
    pub(super) fn has(&self, bit: u32) -> Option<bool> {
        let byte = self.features.get(usize::try_from(bit / 8).ok()?)?;
        Some(byte >> (bit % 8) & 1 != 0)
    }

    pub(super) fn run_time(&self, at: LinkAddr) -> Gva {
        at.at(self.located.slide)
    }

    /// Bytes of guest memory at a link address.
    pub(super) fn bytes(
        &self,
        at: LinkAddr,
        len: usize,
        what: &'static str,
    ) -> Result<Vec<u8>, CompareError> {
        let mut bytes = vec![0; len];
        self.space
            .read(self.run_time(at), &mut bytes)
            .map_err(|source| CompareError::Read { what, source })?;
        Ok(bytes)
    }

    /// A variable of 1, 2, 4 or 8 bytes, where the kernel has it.
    pub(super) fn variable(
        &self,
        name: &'static str,
        size: u64,
    ) -> Result<Option<u64>, CompareError> {
        let Some(at) = optional(self.kernel.symbols(), name) else {
            return Ok(None);
        };
        self.space
            .read_sized(self.run_time(at), size)
            .map(Some)
            .map_err(|source| CompareError::Read { what: name, source })
    }

    /// The link address of a symbol, where the kernel has exactly one.
    pub(super) fn symbol(&self, name: &str) -> Option<LinkAddr> {
        optional(self.kernel.symbols(), name)
    }

    /// A table in the kernel's file: its own section, or what lies between two symbols.
    pub(super) fn table(&self, place: &Table) -> Option<(LinkAddr, &'a [u8])> {
        let image = self.kernel.image();
        match *place {
            Table::Section(name) => {
                let section = image.section(name)?;
                Some((section.address, image.section_bytes(section)?))
            }
            Table::Between(start, end) => {
                let range = optional_range(self.kernel, start, end)?;
                let len = usize::try_from(range.end.0.checked_sub(range.start.0)?).ok()?;
                Some((range.start, image.read(range.start, len)?))
            }
        }
    }

    /// The places that a table of 32-bit distances from its own entries names.
    pub(super) fn places(&self, place: &Table) -> impl Iterator<Item = LinkAddr> + use<'a> {
        let (start, bytes) = self.table(place).unwrap_or_default();
        (0_u64..).zip(bytes.chunks_exact(4)).map(move |(n, raw)| {
            let distance = raw.first_chunk().map_or(0, |raw| i32::from_le_bytes(*raw));
            start.offset(n * 4).displace(distance.into())
        })
    }
}

/// Where a table is.
pub(super) enum Table {
    Section(&'static str),
    Between(&'static str, &'static str),
}
