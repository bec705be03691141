//! Everything that is known of a kernel from its file alone.
//!
//! Opened once, then immutable and shared between threads. Guaranteed: image, symbols and types
//! are of one file, and `linux_banner` is where its symbol says. What is kept in memory is the
//! index of the symbols, the types, and the bytes of those sections that are of use later:
//! instructions, and the tables that a kernel throws away after its boot (`.return_sites` and the
//! like), so that they can be had from nowhere else.

use std::ops::Range;
use std::sync::Arc;

use crate::guest::LinkAddr;
use crate::image::{Banner, BuildId, Image, ImageError, Section};
use crate::stack::{OrcError, OrcTable};
use crate::symbols::{SiteError, Symbols, SymbolsError};
use crate::types::{TypeError, Types};

/// Why a kernel cannot be patched.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file is not a kernel.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It has no symbols.
    #[error("the kernel's symbols cannot be read")]
    Symbols(#[from] SymbolsError),
    /// It has no types.
    #[error("the kernel's types cannot be read")]
    Types(#[from] TypeError),
    /// It does not say which kernel it is.
    #[error("the kernel's version string cannot be found, so no guest could be checked against it")]
    NoBanner,
}

/// A kernel: its image, its symbols and its types.
#[derive(Debug)]
pub struct Kernel {
    image: Image,
    symbols: Symbols,
    types: Arc<Types>,
    banner: Banner,
    orc: Result<OrcTable, OrcError>,
}

/// Sections of interest after the boot, beside those that hold instructions.
const KEPT: [&str; 16] = [
    ".altinstructions",
    ".altinstr_replacement",
    ".call_sites",
    ".ibt_endbr_seal",
    ".init.data",
    ".notes",
    ".parainstructions",
    ".retpoline_sites",
    ".return_sites",
    ".smp_locks",
    "__bug_table",
    "__ex_table",
    "__jump_table",
    "__mcount_loc",
    ".static_call_sites",
    ".orc_header",
];

/// Values that the boot writes into instructions: one section for each of them.
const KEPT_PREFIX: &str = "runtime_";

/// Symbols whose bytes are of interest, and how many: the kernel's nops.
const KEPT_SYMBOLS: [(&str, u64); 1] = [("x86nops", 66)];

/// Tables of interest that are in larger sections.
const KEPT_PARTS: [(&str, &str); 3] = [
    ("skl_call_thunk_template", "skl_call_thunk_tail"),
    ("__start___jump_table", "__stop___jump_table"),
    ("__start_static_call_sites", "__stop_static_call_sites"),
];

impl Kernel {
    /// Opens a whole kernel file (bzImage or vmlinux).
    ///
    /// # Errors
    /// [`KernelError`]: not a kernel, or one without symbols, types or version string.
    pub fn open(file: Vec<u8>) -> Result<Self, KernelError> {
        let mut image = Image::open(file)?;
        let symbols = Symbols::of(&image)?;
        let types = Arc::new(Types::parse(type_data(&image, &symbols)?)?);
        let named = symbols.address("linux_banner").ok();
        let banner = named
            .and_then(|address| image.banner_at(address))
            .or(image.banner());
        let banner = banner.ok_or(KernelError::NoBanner)?.clone();
        let orc = OrcTable::of(&image);
        let parts: Vec<_> = KEPT_PARTS
            .iter()
            .filter_map(|(start, end)| {
                Some(symbols.address(start).ok()?..symbols.address(end).ok()?)
            })
            .chain(KEPT_SYMBOLS.iter().filter_map(|&(name, len)| {
                let start = symbols.address(name).ok()?;
                Some(start..start.offset(len))
            }))
            .collect();
        image.shrink_to(
            |section| {
                let name = section.name.as_str();
                section.executable || KEPT.contains(&name) || name.starts_with(KEPT_PREFIX)
            },
            &parts,
        );
        Ok(Self {
            image,
            symbols,
            types,
            banner,
            orc,
        })
    }

    /// The image. Only the bytes of some sections are still there.
    #[must_use]
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// The symbols.
    #[must_use]
    pub fn symbols(&self) -> &Symbols {
        &self.symbols
    }

    /// The types.
    #[must_use]
    pub fn types(&self) -> &Types {
        &self.types
    }

    /// The types, to be shared with those of modules ([`Types::parse_split`]).
    #[must_use]
    pub fn shared_types(&self) -> Arc<Types> {
        self.types.clone()
    }

    /// The version string and where it is: by this a guest is checked.
    #[must_use]
    pub fn banner(&self) -> &Banner {
        &self.banner
    }

    /// The release, as `uname -r` prints it.
    #[must_use]
    pub fn release(&self) -> &str {
        self.banner.release()
    }

    /// The linker's build id, where there is one.
    #[must_use]
    pub fn build_id(&self) -> Option<&BuildId> {
        self.image.build_id()
    }

    /// The unwind tables, by link address.
    ///
    /// # Errors
    /// [`OrcError`] when the file has none, or none that can be believed: stacks can then not be
    /// told from outside.
    pub fn orc(&self) -> Result<&OrcTable, &OrcError> {
        self.orc.as_ref()
    }

    /// The section that `at` is linked into.
    #[must_use]
    pub fn section_at(&self, at: LinkAddr) -> Option<&Section> {
        self.image.section_at(at)
    }

    /// The link addresses from symbol `start` up to symbol `end`: `__noinstr_text_start` and
    /// `__noinstr_text_end`, for instance.
    ///
    /// # Errors
    /// [`SiteError`] when one of them does not exist, or not once.
    pub fn between(&self, start: &str, end: &str) -> Result<Range<LinkAddr>, SiteError> {
        Ok(self.symbols.address(start)?..self.symbols.address(end)?)
    }

    /// Bytes of memory that all this takes.
    #[must_use]
    pub fn resident(&self) -> usize {
        let orc = self.orc.as_ref().map_or(0, OrcTable::resident);
        self.image.resident() + self.symbols.resident() + self.types.resident() + orc
    }
}

/// The kernel's BTF: its section, or what lies between its two symbols where the file has no
/// section headers.
fn type_data<'a>(image: &'a Image, symbols: &Symbols) -> Result<&'a [u8], TypeError> {
    let section = image
        .section(".BTF")
        .and_then(|section| image.section_bytes(section));
    let named = || {
        let start = symbols.address("__start_BTF").ok()?;
        let end = symbols.address("__stop_BTF").ok()?;
        let len = usize::try_from(end.0.checked_sub(start.0)?).ok()?;
        image.read(start, len)
    };
    section.or_else(named).ok_or(TypeError::Missing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::symbols::{Layout, OffsetForm};
    use crate::synthetic::{self, Kallsyms, Packing, RODATA, TEXT};

    #[test]
    fn a_kernel_is_more_than_its_parts() {
        let example = Kallsyms::example(Layout::C, OffsetForm::Own, 700);
        let packed = synthetic::pack(Packing::Zstd, &synthetic::vmlinux(&example));
        let kernel = Kernel::open(synthetic::bzimage(&packed)).unwrap();
        assert_eq!(kernel.release(), "6.99.0-synthetic");
        assert_eq!(kernel.banner().address, RODATA);
        assert_eq!(kernel.build_id().unwrap().bytes, synthetic::BUILD_ID);
        assert_eq!(kernel.section_at(TEXT).unwrap().name, ".text");
        assert_eq!(kernel.types().size_of("task"), Ok(160));
        assert_eq!(kernel.between("_text", "linux_banner"), Ok(TEXT..RODATA));
        assert!(kernel.between("_text", "_etext").is_err());
        assert_eq!(kernel.image().read(TEXT, 1), Some(&[0xcc][..]));
        assert_eq!(kernel.image().read(RODATA, 1), None);
    }
}
