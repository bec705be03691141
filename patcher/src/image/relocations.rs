//! The words of a kernel that KASLR changes.
//!
//! A bzImage carries them behind the ELF file in its payload (arch/x86/tools/relocs.c): a zero, the
//! words of 64 bits, a zero, the 32-bit words that shrink by the slide (distances to per-CPU
//! variables that do not move with the image, before 6.15), a zero, the 32-bit words that grow by
//! it. The boot reads the list from its end (arch/x86/boot/compressed/misc.c). Each entry is the
//! low half of a link address. A vmlinux as it comes out of a build has no such list.

use crate::guest::LinkAddr;

/// How a word changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Relocation {
    /// 64 bits, grows by the slide.
    Long,
    /// 32 bits, shrinks by the slide.
    Inverse,
    /// 32 bits, grows by the slide.
    Word,
}

/// All words that KASLR changes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Relocations {
    longs: Vec<i32>,
    inverse: Vec<i32>,
    words: Vec<i32>,
}

impl Relocations {
    /// Reads the list in `tail`, which is what follows the ELF file. `None` when there is none,
    /// or when it is not such a list from the first to the last byte.
    pub(super) fn read(tail: &[u8], is_image: impl Fn(LinkAddr) -> bool) -> Option<Self> {
        if tail.is_empty() || tail.len() % 4 != 0 {
            return None;
        }
        let raw = tail.chunks_exact(4).rev();
        let mut entries = raw.filter_map(|raw| Some(i32::from_le_bytes(raw.try_into().ok()?)));
        let mut list = || -> Option<Vec<i32>> {
            let mut list = Vec::new();
            loop {
                match entries.next()? {
                    0 => break,
                    entry if is_image(address(entry)) => list.push(entry),
                    _ => return None,
                }
            }
            list.reverse();
            list.shrink_to_fit();
            Some(list)
        };
        let (words, inverse, longs) = (list()?, list()?, list()?);
        entries.next().is_none().then_some(Self {
            longs,
            inverse,
            words,
        })
    }

    /// Every such word.
    pub fn iter(&self) -> impl Iterator<Item = (LinkAddr, Relocation)> + '_ {
        let lists = [
            (&self.longs, Relocation::Long),
            (&self.inverse, Relocation::Inverse),
            (&self.words, Relocation::Word),
        ];
        lists
            .into_iter()
            .flat_map(|(list, form)| list.iter().map(move |&entry| (address(entry), form)))
    }

    /// Forgets the words that are not `wanted`.
    pub(super) fn retain(&mut self, wanted: impl Fn(LinkAddr) -> bool) {
        for list in [&mut self.longs, &mut self.inverse, &mut self.words] {
            list.retain(|&entry| wanted(address(entry)));
            list.shrink_to_fit();
        }
    }

    /// Bytes of memory that they take.
    pub(super) fn resident(&self) -> usize {
        (self.longs.capacity() + self.inverse.capacity() + self.words.capacity()) * 4
    }
}

/// The link address of an entry: sign-extended, as everything in the top 2 GiB.
fn address(entry: i32) -> LinkAddr {
    LinkAddr(0).displace(entry.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[u32]) -> Vec<u8> {
        entries.iter().flat_map(|e| e.to_le_bytes()).collect()
    }

    #[test]
    fn the_three_lists_are_told_apart() {
        let tail = list(&[0, 0x8200_0000, 0, 0, 0x8100_0010, 0x8100_0020]);
        let found = Relocations::read(&tail, |at| at.0 >= 0xffff_ffff_8000_0000).unwrap();
        let all: Vec<_> = found.iter().collect();
        assert_eq!(
            all,
            [
                (LinkAddr(0xffff_ffff_8200_0000), Relocation::Long),
                (LinkAddr(0xffff_ffff_8100_0010), Relocation::Word),
                (LinkAddr(0xffff_ffff_8100_0020), Relocation::Word),
            ]
        );
    }

    #[test]
    fn what_is_no_such_list_is_none() {
        let image = |at: LinkAddr| at.0 >= 0xffff_ffff_8000_0000;
        for tail in [
            list(&[]),
            list(&[0, 0]),
            list(&[0, 0, 0, 0]),
            list(&[0x8100_0000, 0, 0, 0]),
            list(&[0, 0, 0, 0x10]),
            b"appended".to_vec(),
            vec![0; 13],
        ] {
            assert_eq!(Relocations::read(&tail, image), None, "{tail:x?}");
        }
    }
}
