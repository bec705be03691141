//! Unpacks the payload of a bzImage.
//!
//! The formats are those of scripts/Makefile.lib (`cmd_gzip` to `cmd_zstd22_with_size`): each is
//! followed by the unpacked size as a little-endian u32, which for gzip is the format's own
//! trailer. Exactly that many bytes are produced, or an error is returned; what is allocated is
//! bounded by [`LIMIT`], and by [`DICTIONARY_LIMIT`] for the decompressor itself.

use std::fmt;
use std::io::{self, Read};

use super::ImageError;
use super::recognise::u32_at;

/// The most that is unpacked, in bytes: KERNEL_IMAGE_SIZE without KASLR.
pub(super) const LIMIT: u64 = 512 << 20;

/// The least, in bytes: an ELF header.
const SMALLEST: u64 = 64;

/// The most that an xz or LZMA dictionary may need, in bytes. scripts/xz_wrap.sh uses 128 MiB at
/// the most.
const DICTIONARY_LIMIT: u64 = 192 << 20;

/// Uncompressed bytes of a block in the lz4 legacy frame format (all but the last are full).
const LZ4_BLOCK: usize = 8 << 20;

/// How the payload of a bzImage is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names of the formats")]
pub enum Compression {
    Gzip,
    Bzip2,
    Lzma,
    Xz,
    Lzo,
    Lz4,
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "lzma",
            Self::Xz => "xz",
            Self::Lzo => "lzo",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        })
    }
}

impl Compression {
    /// Recognises a payload by the signatures of lib/decompress.c.
    #[must_use]
    pub fn of(payload: &[u8]) -> Option<Self> {
        match payload {
            [0x1f, 0x8b | 0x9e, ..] => Some(Self::Gzip),
            [b'B', b'Z', b'h', ..] => Some(Self::Bzip2),
            [0x5d, 0, 0, ..] => Some(Self::Lzma),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            [0x89, b'L', b'Z', b'O', ..] => Some(Self::Lzo),
            [0x02, 0x21, 0x4c, 0x18, ..] => Some(Self::Lz4),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// Unpacks a whole payload, its four size bytes included.
///
/// # Errors
/// [`ImageError::UnknownCompression`], [`ImageError::ImplausibleSize`], or
/// [`ImageError::Unpack`] when the data are damaged or not as long as they say.
pub(super) fn unpack(payload: &[u8]) -> Result<Vec<u8>, ImageError> {
    let Some(compression) = Compression::of(payload) else {
        let mut magic = [0; 4];
        magic
            .iter_mut()
            .zip(payload)
            .for_each(|(to, from)| *to = *from);
        return Err(ImageError::UnknownCompression { magic });
    };
    let (packed, trailer) = payload.split_at(payload.len().saturating_sub(4));
    let size = u64::from(u32_at(trailer, 0).unwrap_or(0));
    if !(SMALLEST..=LIMIT).contains(&size) {
        return Err(ImageError::ImplausibleSize {
            what: "the unpacked kernel",
            size,
            limit: LIMIT,
        });
    }
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    match compression {
        Compression::Gzip => read_exactly(flate2::read::GzDecoder::new(payload), size),
        Compression::Bzip2 => read_exactly(bzip2::read::BzDecoder::new(packed), size),
        Compression::Lzma => liblzma::stream::Stream::new_lzma_decoder(DICTIONARY_LIMIT)
            .map_err(io::Error::from)
            .and_then(|s| read_exactly(liblzma::bufread::XzDecoder::new_stream(packed, s), size)),
        Compression::Xz => liblzma::stream::Stream::new_stream_decoder(DICTIONARY_LIMIT, 0)
            .map_err(io::Error::from)
            .and_then(|s| read_exactly(liblzma::bufread::XzDecoder::new_stream(packed, s), size)),
        Compression::Zstd => zstd::bulk::decompress(packed, size).and_then(|out| whole(out, size)),
        Compression::Lz4 => lz4_legacy(packed, size),
        Compression::Lzo => super::lzop::unpack(packed, size),
    }
    .map_err(|source| ImageError::Unpack {
        compression,
        source: source.into(),
    })
}

pub(super) fn damaged(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

pub(super) fn wrong_size(got: usize, size: usize) -> io::Error {
    damaged(format!("it unpacks to {got:#x} bytes instead of {size:#x}"))
}

fn whole(out: Vec<u8>, size: usize) -> io::Result<Vec<u8>> {
    if out.len() == size {
        Ok(out)
    } else {
        Err(wrong_size(out.len(), size))
    }
}

fn read_exactly(reader: impl Read, size: usize) -> io::Result<Vec<u8>> {
    let mut out = Vec::with_capacity(size);
    // One more, to notice output that is too long.
    reader.take(size as u64 + 1).read_to_end(&mut out)?;
    whole(out, size)
}

/// The frame that `lz4 -l` writes: a magic number, then blocks with their packed length in front,
/// to the end of the data. A magic number where a length is expected starts another frame
/// (lib/decompress_unlz4.c).
fn lz4_legacy(packed: &[u8], size: usize) -> io::Result<Vec<u8>> {
    const MAGIC: u32 = 0x184c_2102;
    let mut out = vec![0; size];
    let mut done = 0;
    let mut rest = packed;
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        rest = after;
        let length = u32::from_le_bytes(*length);
        if length == MAGIC {
            continue;
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let (block, after) = rest
            .split_at_checked(length)
            .ok_or_else(|| damaged("an lz4 block is cut off"))?;
        let room = out.get_mut(done..).unwrap_or_default();
        let room = room.len().min(LZ4_BLOCK);
        let into = out.get_mut(done..done + room).unwrap_or_default();
        done += lz4_flex::block::decompress_into(block, into)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        rest = after;
    }
    if done == size {
        Ok(out)
    } else {
        Err(wrong_size(done, size))
    }
}
