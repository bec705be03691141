//! Which kernel is this? A bzImage or vmlinux, unpacked, with its sections and its identity.
//!
//! Guaranteed: the file is untrusted; sizes are bounded, nothing panics, and whatever
//! [`Image::read`] returns is what the file says is loaded at that link address. Not guaranteed:
//! that a guest has the same bytes there now, because a boot changes its own text.
//!
//! All addresses are [`LinkAddr`]: as linked, before KASLR. Known formats: boot protocol 2.08 and
//! later with a gzip, bzip2, lzma, xz, lzo, lz4 or zstd payload, and x86-64 ELF executables with
//! or without symbol tables. Symbol tables are not used: see [`crate::symbols`].

mod elf;
mod error;
mod lzop;
mod recognise;
mod relocations;
mod unpack;

use std::ops::Range;

use memchr::memmem;

pub use error::ImageError;
pub use recognise::{BootHeader, HEADER_LEN, Kind, recognise};
pub use relocations::{Relocation, Relocations};
pub use unpack::Compression;

use elf::KERNEL_START;

use crate::guest::LinkAddr;

/// One section of the kernel's ELF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Name, such as `.text`. Not always unique.
    pub name: String,
    /// Where it is linked; 0 when it is not loaded.
    pub address: LinkAddr,
    /// Bytes in memory.
    pub size: u64,
    /// It is part of the kernel's memory.
    pub allocated: bool,
    /// It holds instructions.
    pub executable: bool,
    /// It is linked as writable.
    pub writable: bool,
    /// Where its bytes are in [`Image::bytes`]; `None` when it has none (or no longer has).
    file: Option<Range<usize>>,
}

impl Section {
    /// The link addresses that it occupies.
    #[must_use]
    pub fn range(&self) -> Range<LinkAddr> {
        self.address..self.address.offset(self.size)
    }
}

/// One loadable segment of the kernel's ELF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it is linked. The per-CPU segment of kernels before 6.15 is linked at 0.
    pub address: LinkAddr,
    /// The guest-physical address where a loader puts it, if it does not move the kernel.
    pub physical: u64,
    /// Bytes in memory; those beyond the file's are zero.
    pub size: u64,
    /// It is mapped executable.
    pub executable: bool,
    /// It is mapped writable.
    pub writable: bool,
    file: Range<usize>,
}

/// Where the kernel's version string is, and what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Banner {
    /// Link address of `linux_banner`.
    pub address: LinkAddr,
    /// `Linux version …`, without the newline at its end.
    pub text: String,
}

impl Banner {
    /// The release, as `uname -r` prints it.
    #[must_use]
    pub fn release(&self) -> &str {
        self.text.split(' ').nth(2).unwrap_or_default()
    }

    /// Whether it says which build it is: `#1 SMP`.
    fn is_numbered(&self) -> bool {
        let (_, build) = self.text.rsplit_once('#').unwrap_or_default();
        build.starts_with(|c: char| c.is_ascii_digit())
    }
}

/// The build id of the linker, and where the kernel keeps it in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildId {
    /// Link address of the bytes.
    pub address: LinkAddr,
    /// The id, usually 20 bytes.
    pub bytes: Vec<u8>,
}

/// A stretch of link addresses whose bytes are in the image.
#[derive(Clone, Debug)]
struct Extent {
    address: LinkAddr,
    bytes: Range<usize>,
}

/// An unpacked kernel.
pub struct Image {
    kind: Kind,
    entry: u64,
    bytes: Vec<u8>,
    sections: Vec<Section>,
    segments: Vec<Segment>,
    extents: Vec<Extent>,
    banners: Vec<Banner>,
    build_id: Option<BuildId>,
    relocations: Option<Relocations>,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let release = self.banner().map(Banner::release);
        write!(
            f,
            "{:?} {release:?}, {:#x} bytes",
            self.kind,
            self.bytes.len()
        )
    }
}

impl Image {
    /// Opens a whole kernel file, unpacking it where it is compressed.
    ///
    /// # Errors
    /// [`ImageError`] says what the file is instead, or what is wrong with it.
    pub fn open(file: Vec<u8>) -> Result<Self, ImageError> {
        let kind = recognise(file.get(..HEADER_LEN).unwrap_or(&file))?;
        let bytes = match &kind {
            Kind::Vmlinux => file,
            Kind::BzImage(header) => {
                let unpacked = unpack::unpack(payload(&file, header)?)?;
                match recognise(&unpacked)? {
                    Kind::Vmlinux => unpacked,
                    Kind::BzImage(_) => {
                        return Err(ImageError::NotAKernel {
                            found: "a bzImage inside a bzImage",
                        });
                    }
                }
            }
        };
        let layout = elf::layout(&bytes)?;
        let extents = layout
            .segments
            .iter()
            .filter(|segment| !segment.file.is_empty())
            .map(|segment| Extent {
                address: segment.address,
                bytes: segment.file.clone(),
            })
            .collect();
        let build_id = layout.notes.iter().find_map(|(address, range)| {
            let notes = bytes.get(range.clone())?;
            let id = elf::build_id(notes)?;
            let address = address.offset(id.start as u64);
            Some(BuildId {
                address,
                bytes: notes.get(id)?.to_vec(),
            })
        });
        let tail = bytes.get(layout.end..).unwrap_or_default();
        // Per-CPU data are listed where they are loaded, between two segments.
        let ends = layout.segments.iter().map(|s| s.address.offset(s.size));
        let end = ends.max().unwrap_or_default();
        let relocations = Relocations::read(tail, |at| KERNEL_START <= at.0 && at < end);
        let mut image = Self {
            kind,
            entry: layout.entry,
            bytes,
            sections: layout.sections,
            segments: layout.segments,
            extents,
            banners: Vec::new(),
            build_id,
            relocations,
        };
        image.banners = image.find_banners();
        Ok(image)
    }

    /// What kind of file it was.
    #[must_use]
    pub fn kind(&self) -> &Kind {
        &self.kind
    }

    /// The ELF entry point: the physical address at which the 64-bit code starts when the kernel
    /// is loaded where its segments say.
    #[must_use]
    pub fn entry(&self) -> u64 {
        self.entry
    }

    /// All sections, in the order of the file.
    #[must_use]
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// All loadable segments, in the order of the file.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The first section of that name.
    #[must_use]
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// The allocated section that occupies `at`.
    #[must_use]
    pub fn section_at(&self, at: LinkAddr) -> Option<&Section> {
        self.sections
            .iter()
            .find(|section| section.allocated && section.range().contains(&at))
    }

    /// The bytes of a section as they are in the file; `None` when it has none there.
    #[must_use]
    pub fn section_bytes(&self, section: &Section) -> Option<&[u8]> {
        self.bytes.get(section.file.clone()?)
    }

    /// The `len` bytes that are loaded at `at`, when the file has all of them.
    ///
    /// Zero-initialised data (`.bss`) need not be in the file.
    #[must_use]
    pub fn read(&self, at: LinkAddr, len: usize) -> Option<&[u8]> {
        self.extents.iter().find_map(|extent| {
            let skip = usize::try_from(at.0.checked_sub(extent.address.0)?).ok()?;
            self.bytes
                .get(extent.bytes.clone())?
                .get(skip..skip.checked_add(len)?)
        })
    }

    /// The GNU build id, where the kernel was linked with one.
    #[must_use]
    pub fn build_id(&self) -> Option<&BuildId> {
        self.build_id.as_ref()
    }

    /// The version string, by which a guest is recognised.
    ///
    /// A kernel may hold a second one that it does not use: the weak one of init/version.c, which
    /// lacks the build number. The one with a number is preferred.
    #[must_use]
    pub fn banner(&self) -> Option<&Banner> {
        let numbered = self.banners.iter().find(|banner| banner.is_numbered());
        numbered.or_else(|| self.banners.last())
    }

    /// The version string at `address`.
    pub(crate) fn banner_at(&self, address: LinkAddr) -> Option<&Banner> {
        self.banners.iter().find(|banner| banner.address == address)
    }

    /// The words that KASLR changes, where the file lists them: a bzImage does, or what was
    /// unpacked from one. After [`Image::shrink_to`] only those among instructions.
    #[must_use]
    pub fn relocations(&self) -> Option<&Relocations> {
        self.relocations.as_ref()
    }

    /// Bytes of the image that are held in memory.
    #[must_use]
    pub fn resident(&self) -> usize {
        let relocations = self.relocations.as_ref();
        self.bytes.capacity() + relocations.map_or(0, Relocations::resident)
    }

    /// Forgets the bytes of every section that `keep` does not want, but for `parts` of them.
    /// Addresses, sizes and the image's identity stay known.
    pub fn shrink_to(&mut self, keep: impl Fn(&Section) -> bool, parts: &[Range<LinkAddr>]) {
        let start = |section: &Section| section.file.as_ref().map_or(0, |file| file.start);
        let mut order: Vec<&mut Section> = self.sections.iter_mut().collect();
        order.sort_by_key(|section| start(section));
        let mut parts = parts.to_vec();
        parts.sort_by_key(|part| part.start);
        self.extents.clear();
        // Wanted bytes move down in place: pages that are never touched again cost nothing.
        let mut end = 0;
        for section in order {
            let whole = section.allocated && keep(section);
            // Sections of a kernel do not overlap. Of those that do, the first is kept.
            let len = self.bytes.len();
            let file = section
                .file
                .take()
                .filter(|file| section.allocated && file.start >= end && file.end <= len);
            let Some(file) = file else { continue };
            let wanted = match whole {
                true => vec![section.range()],
                false => parts.clone(),
            };
            for part in wanted {
                let offset = |at: LinkAddr| usize::try_from(at.distance_from(section.address)).ok();
                let inside = part.start >= section.address && part.end <= section.range().end;
                let (true, Some(from), Some(to)) = (inside, offset(part.start), offset(part.end))
                else {
                    continue;
                };
                let old = file.start.saturating_add(from)..file.start.saturating_add(to);
                if old.start < end || old.end > file.end || old.is_empty() {
                    continue;
                }
                let new = end..end + old.len();
                self.bytes.copy_within(old, end);
                end = new.end;
                self.extents.push(Extent {
                    address: part.start,
                    bytes: new.clone(),
                });
                if whole {
                    section.file = Some(new);
                }
            }
        }
        self.bytes.truncate(end);
        self.bytes.shrink_to_fit();
        for segment in &mut self.segments {
            segment.file = 0..0;
        }
        if let Some(relocations) = &mut self.relocations {
            let code: Vec<_> = self
                .sections
                .iter()
                .filter(|section| section.executable)
                .map(Section::range)
                .chain(parts)
                .collect();
            relocations.retain(|at| code.iter().any(|range| range.contains(&at)));
        }
    }

    /// Where read-only data may be, most likely place first: link address and bytes.
    pub(crate) fn data(&self) -> Vec<(LinkAddr, &[u8])> {
        let rodata = self
            .sections
            .iter()
            .filter(|section| section.name == ".rodata");
        let mut found: Vec<_> = rodata
            .filter_map(|section| Some((section.address, self.section_bytes(section)?)))
            .collect();
        if found.is_empty() {
            found.extend(self.extents.iter().filter_map(|extent| {
                Some((extent.address, self.bytes.get(extent.bytes.clone())?))
            }));
        }
        found
    }

    /// Every "Linux version " that a digit follows (init/version-timestamp.c).
    fn find_banners(&self) -> Vec<Banner> {
        const START: &[u8] = b"Linux version ";
        const LONGEST: usize = 1024;
        const MOST: usize = 8;
        let read = |address: LinkAddr, bytes: &[u8], at: usize| {
            let text = bytes.get(at..)?;
            let text = text.get(..LONGEST).unwrap_or(text);
            let text = text.get(..memmem::find(text, b"\n\0")?)?;
            text.get(START.len()).filter(|byte| byte.is_ascii_digit())?;
            let text = std::str::from_utf8(text).ok()?.to_owned();
            Some(Banner {
                address: address.offset(at as u64),
                text,
            })
        };
        let data = self.data();
        let all = data.iter().flat_map(|&(address, bytes)| {
            memmem::find_iter(bytes, START).filter_map(move |at| read(address, bytes, at))
        });
        all.take(MOST).collect()
    }
}

/// The compressed payload of a bzImage.
fn payload<'a>(file: &'a [u8], header: &BootHeader) -> Result<&'a [u8], ImageError> {
    let have = file.len() as u64;
    let need = header.payload_offset + header.payload_len;
    if need > have {
        return Err(ImageError::Truncated {
            what: "the compressed kernel",
            need,
            have,
        });
    }
    let start = usize::try_from(header.payload_offset).unwrap_or(usize::MAX);
    let len = usize::try_from(header.payload_len).unwrap_or(usize::MAX);
    Ok(file
        .get(start..)
        .and_then(|rest| rest.get(..len))
        .unwrap_or_default())
}

#[cfg(test)]
mod tests;
