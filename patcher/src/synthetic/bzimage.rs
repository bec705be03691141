//! Writes bzImages, packed in every way that Linux knows.

use std::io::Write;

/// How to pack a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names of the formats")]
pub enum Packing {
    Gzip,
    Bzip2,
    Lzma,
    Xz,
    Lzo,
    Lz4,
    Zstd,
}

impl Packing {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Gzip,
        Self::Bzip2,
        Self::Lzma,
        Self::Xz,
        Self::Lzo,
        Self::Lz4,
        Self::Zstd,
    ];
}

/// Packs `plain` and puts its size behind it, as scripts/Makefile.lib does.
#[must_use]
pub fn pack(packing: Packing, plain: &[u8]) -> Vec<u8> {
    let mut packed = match packing {
        Packing::Gzip => {
            let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            out.write_all(plain).unwrap();
            // The format ends with the size by itself.
            return out.finish().unwrap();
        }
        Packing::Bzip2 => {
            let mut out = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
            out.write_all(plain).unwrap();
            out.finish().unwrap()
        }
        Packing::Lzma => {
            let options = liblzma::stream::LzmaOptions::new_preset(1).unwrap();
            lzma(
                liblzma::stream::Stream::new_lzma_encoder(&options).unwrap(),
                plain,
            )
        }
        Packing::Xz => {
            let check = liblzma::stream::Check::Crc32;
            lzma(
                liblzma::stream::Stream::new_easy_encoder(1, check).unwrap(),
                plain,
            )
        }
        Packing::Zstd => zstd::bulk::compress(plain, 1).unwrap(),
        Packing::Lz4 => {
            let mut out = 0x184c_2102_u32.to_le_bytes().to_vec();
            for block in plain.chunks(8 << 20) {
                let block = lz4_flex::block::compress(block);
                out.extend((block.len() as u32).to_le_bytes());
                out.extend(block);
            }
            out
        }
        Packing::Lzo => lzop(plain),
    };
    packed.extend((plain.len() as u32).to_le_bytes());
    packed
}

fn lzma(stream: liblzma::stream::Stream, plain: &[u8]) -> Vec<u8> {
    let mut out = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
    out.write_all(plain).unwrap();
    out.finish().unwrap()
}

/// An lzop file of version 1.030 with Adler-32 sums of the plain blocks, whose values nobody reads.
fn lzop(plain: &[u8]) -> Vec<u8> {
    let mut out = b"\x89LZO\0\r\n\x1a\n".to_vec();
    for half in [0x1030_u16, 0x2080, 0x0940] {
        out.extend(half.to_be_bytes());
    }
    out.extend([3, 9]);
    for word in [1_u32, 0o100_644, 0, 0] {
        out.extend(word.to_be_bytes());
    }
    out.push(5);
    out.extend(b"image");
    out.extend([0; 4]);
    for block in plain.chunks(256 << 10) {
        let packed = lzokay::compress::compress(block).unwrap();
        let packed = if packed.len() < block.len() {
            &packed[..]
        } else {
            block
        };
        out.extend((block.len() as u32).to_be_bytes());
        out.extend((packed.len() as u32).to_be_bytes());
        out.extend([0; 4]);
        out.extend(packed);
    }
    out.extend([0; 4]);
    out
}

/// A bzImage of boot protocol 2.15 with a packed payload, as [`pack`] makes it.
#[must_use]
pub fn bzimage(payload: &[u8]) -> Vec<u8> {
    const SETUP_SECTS: u8 = 3;
    const BEFORE: u32 = 0x80;
    let setup = (usize::from(SETUP_SECTS) + 1) * 512;
    let mut out = vec![0; setup + BEFORE as usize];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[SETUP_SECTS]);
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes());
    put(0x20e, &0x400_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x236, &0x7f_u16.to_le_bytes());
    put(0x248, &BEFORE.to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x260, &0x0400_0000_u32.to_le_bytes());
    put(0x600, b"6.99.0-synthetic (nobody@nowhere) #1 SMP\0");
    out.extend(payload);
    out
}
