//! Writing guest-virtual memory of a stopped guest.

use crate::guest::{Gva, MemoryError, StoppedGuest};
use crate::space::{Piece, Space, SpaceError};

/// Why memory could not be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// It cannot be read before it is written.
    #[error(transparent)]
    Read(#[from] SpaceError),
    /// The memory refuses.
    #[error("{at} cannot be written")]
    Memory {
        /// Where.
        at: Gva,
        /// What the memory said.
        source: MemoryError,
    },
    /// It was written and does not hold what was written.
    #[error("{at} was written and reads back differently")]
    NotStored {
        /// Where.
        at: Gva,
    },
}

/// Writes `bytes` at `at`, whatever pages that takes: all of them or none.
pub(crate) fn write(
    guest: &mut dyn StoppedGuest,
    root: crate::space::Root,
    at: Gva,
    bytes: &[u8],
) -> Result<(), WriteError> {
    let (pieces, before) = {
        let memory = &&*guest;
        let space = Space::new(memory, root);
        let pieces = space.pieces(at, bytes.len() as u64)?;
        let mut before = vec![0; bytes.len()];
        space.read(at, &mut before)?;
        (pieces, before)
    };
    let result = put(guest, &pieces, at, bytes).and_then(|()| {
        let mut found = vec![0; bytes.len()];
        Space::new(&&*guest, root).read(at, &mut found)?;
        if found == bytes {
            Ok(())
        } else {
            Err(WriteError::NotStored { at })
        }
    });
    if result.is_err() {
        // Nothing more can be done when this fails as well.
        let _ = put(guest, &pieces, at, &before);
    }
    result
}

fn put(
    guest: &mut dyn StoppedGuest,
    pieces: &[Piece],
    at: Gva,
    bytes: &[u8],
) -> Result<(), WriteError> {
    let mut rest = bytes;
    for piece in pieces {
        let len = usize::try_from(piece.len)
            .unwrap_or(usize::MAX)
            .min(rest.len());
        let (now, later) = rest.split_at(len);
        guest
            .write(piece.gpa, now)
            .map_err(|source| WriteError::Memory { at, source })?;
        rest = later;
    }
    Ok(())
}
