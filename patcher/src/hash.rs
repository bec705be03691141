//! The hash by which names are indexed.

/// FNV-1a in 32 bits. Names that collide are told apart by comparing them.
pub(crate) fn hash(name: &[u8]) -> u32 {
    name.iter().fold(0x811c_9dc5, |hash, &byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}
