//! Where a context must not be when bytes that are several instructions change.

use std::ops::Range;

use crate::guest::Gva;

/// The addresses behind the first of `bytes`, and all code among `generated` that goes on there by
/// itself: whoever is in that will be in the bytes, and no stack tells so.
///
/// At the first byte no instruction has begun.
pub fn interior<'a>(
    bytes: &Range<Gva>,
    generated: impl Iterator<Item = (Range<Gva>, &'a [Gva])>,
) -> impl Iterator<Item = Range<Gva>> {
    let inside = bytes.start.offset(1)..bytes.end;
    let first = inside.clone();
    generated
        .filter(move |(_, goes_on)| goes_on.iter().any(|at| inside.contains(at)))
        .map(|(code, _)| code)
        .chain([first])
}
