//! The container that lzop writes around LZO1X blocks.
//!
//! Read as lib/decompress_unlzo.c does, which skips the checksums as well; the blocks themselves
//! are decoded by the `lzokay` crate, whose output is bounded by the slice that it is given.

use std::io;

use super::unpack::{damaged, wrong_size};

const MAGIC: [u8; 9] = [0x89, b'L', b'Z', b'O', 0, 0x0d, 0x0a, 0x1a, 0x0a];
/// From this format version on, the header has a level, a needed version and a high mtime.
const VERSION_LONG: u16 = 0x0940;
const ADLER32_D: u32 = 0x1;
const ADLER32_C: u32 = 0x2;
const EXTRA_FIELD: u32 = 0x40;
const CRC32_D: u32 = 0x100;
const CRC32_C: u32 = 0x200;
const FILTER: u32 = 0x800;

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, len: usize) -> io::Result<&'a [u8]> {
        let (head, rest) = self
            .0
            .split_at_checked(len)
            .ok_or_else(|| damaged("the lzop file is cut off"))?;
        self.0 = rest;
        Ok(head)
    }

    fn u8(&mut self) -> io::Result<u8> {
        Ok(self.take(1)?.iter().fold(0, |_, &byte| byte))
    }

    fn u16(&mut self) -> io::Result<u16> {
        Ok(self
            .take(2)?
            .iter()
            .fold(0, |sum, &byte| sum << 8 | u16::from(byte)))
    }

    fn u32(&mut self) -> io::Result<u32> {
        Ok(self
            .take(4)?
            .iter()
            .fold(0, |sum, &byte| sum << 8 | u32::from(byte)))
    }

    fn len(&mut self) -> io::Result<usize> {
        Ok(usize::try_from(self.u32()?).unwrap_or(usize::MAX))
    }
}

/// Unpacks a whole lzop file into exactly `size` bytes.
pub(super) fn unpack(packed: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let mut input = Input(packed);
    let flags = header(&mut input)?;
    let plain_sums =
        4 * usize::from(flags & ADLER32_D != 0) + 4 * usize::from(flags & CRC32_D != 0);
    let packed_sums =
        4 * usize::from(flags & ADLER32_C != 0) + 4 * usize::from(flags & CRC32_C != 0);
    let mut out = vec![0; size];
    let mut done = 0_usize;
    loop {
        let plain_len = input.len()?;
        if plain_len == 0 {
            break;
        }
        let packed_len = input.len()?;
        input.take(plain_sums)?;
        if packed_len > plain_len {
            return Err(damaged("an lzo block is longer packed than unpacked"));
        }
        if packed_len < plain_len {
            input.take(packed_sums)?;
        }
        let block = input.take(packed_len)?;
        let end = done.checked_add(plain_len).filter(|&end| end <= size);
        let into = end.and_then(|end| out.get_mut(done..end));
        let into = into.ok_or_else(|| damaged("it unpacks to more than its size"))?;
        if packed_len == plain_len {
            into.copy_from_slice(block);
        } else {
            let got = lzokay::decompress::decompress(block, into)
                .map_err(|error| damaged(format!("an lzo block is damaged: {error:?}")))?;
            if got != plain_len {
                return Err(wrong_size(got, plain_len));
            }
        }
        done += plain_len;
    }
    if done == size {
        Ok(out)
    } else {
        Err(wrong_size(done, size))
    }
}

/// Reads the header and returns its flags.
fn header(input: &mut Input<'_>) -> io::Result<u32> {
    if input.take(MAGIC.len())? != MAGIC {
        return Err(damaged("the lzop signature is wrong"));
    }
    let version = input.u16()?;
    let long = version >= VERSION_LONG;
    // Version of the library, then the version needed to extract.
    input.take(if long { 4 } else { 2 })?;
    let method = input.u8()?;
    if !(1..=3).contains(&method) {
        return Err(damaged(format!("lzop method {method} is not LZO1X")));
    }
    input.take(usize::from(long))?;
    let flags = input.u32()?;
    if flags & FILTER != 0 {
        input.take(4)?;
    }
    // Mode and modification time.
    input.take(if long { 12 } else { 8 })?;
    let name = input.u8()?;
    input.take(usize::from(name))?;
    input.take(4)?;
    if flags & EXTRA_FIELD != 0 {
        let len = input.len()?;
        input.take(len)?;
        input.take(4)?;
    }
    Ok(flags)
}
