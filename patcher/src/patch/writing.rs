//! The writes of a change: text, and ftrace's mark with it.

use super::PatchError;
use super::check::Check;
use super::knowledge::Knowledge;
use super::report::{Applied, Evidence, FtraceMark, Kind};
use crate::guest::{Gva, StoppedGuest};
use crate::space::{Located, Root, Space};
use crate::text::{NOP5, WriteError, instruction_len, whole, write};

/// Whether the guest has run since a change was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Seen {
    /// Somebody may be in it.
    Perhaps,
    /// It was made in this very stop: it can be taken back whatever else is known of the guest.
    Never,
}

/// The bytes of a change are still those that we wrote.
pub(super) fn still_ours(check: &Check<'_>, entry: &Applied) -> Result<(), PatchError> {
    let ours = &entry.after.0;
    let mut found = vec![0; ours.len()];
    check
        .located
        .space(&check.guest)
        .read(entry.address, &mut found)?;
    let other = ours
        .iter()
        .zip(&found)
        .enumerate()
        .find(|(_, (a, b))| a != b);
    match other {
        None => Ok(()),
        Some((index, (&ours, &found))) => Err(PatchError::NotOurs {
            id: entry.id,
            at: entry.address.offset(index as u64),
            ours,
            found,
        }),
    }
}

/// The bytes of a change may be what they were before, by what is known of the guest.
pub(super) fn may_go(check: &Check<'_>, entry: &Applied) -> Result<Evidence, PatchError> {
    still_ours(check, entry)?;
    let end = entry.address.offset(entry.after.0.len() as u64);
    check.no_kprobe(&(entry.address..end))?;
    let one = whole(entry.address, &entry.after.0).is_ok_and(|all| all.len() == 1);
    let bytes = entry.address..end;
    match entry.kind {
        // Trampolines leave the address behind the first byte on stacks, for who unwinds them. Nobody was
        // behind the first instruction when the jump was made, and nobody comes behind a jump's first byte.
        Kind::Probe => {
            let first = instruction_len(&entry.before.0).unwrap_or(0);
            let from = first.max(2);
            let one = one || from >= entry.after.0.len() as u64;
            check.nobody_behind(&bytes, from, one)
        }
        _ => check.nobody_inside(&bytes, one),
    }
}

/// Whether the bytes of a change are in the guest.
pub(super) fn is_there(space: &Space<'_>, entry: &Applied) -> bool {
    let mut found = vec![0; entry.after.0.len()];
    space.read(entry.address, &mut found).is_ok() && found == entry.after.0
}

/// Writes text and ftrace's mark: both or none.
pub(super) fn change(
    guest: &mut dyn StoppedGuest,
    root: Root,
    mark: Option<FtraceMark>,
    at: Gva,
    bytes: &[u8],
) -> Result<(), PatchError> {
    let mark = mark.filter(|mark| mark.before != mark.after);
    if let Some(mark) = mark {
        set_mark(guest, root, mark, mark.after)?;
    }
    let written = write(guest, root, at, bytes);
    if let (Err(_), Some(mark)) = (&written, mark) {
        // The text is as it was; so must the mark be.
        let _ = set_mark(guest, root, mark, mark.before);
    }
    Ok(written?)
}

/// Writes the flags of ftrace's record.
pub(super) fn set_mark(
    guest: &mut dyn StoppedGuest,
    root: Root,
    mark: FtraceMark,
    flags: u64,
) -> Result<(), WriteError> {
    let raw = flags.to_le_bytes();
    let size = usize::try_from(mark.size).unwrap_or(8).min(8);
    write(guest, root, mark.at, raw.get(..size).unwrap_or(&raw))
}

/// A jump from `at` to `to`.
pub(super) fn jump(at: Gva, to: Gva) -> Result<[u8; NOP5.len()], PatchError> {
    let distance = to.displacement_from(at.offset(NOP5.len() as u64));
    let distance = i32::try_from(distance).map_err(|_| {
        PatchError::Request(format!("a jump at {at} does not reach the arena at {to}"))
    })?;
    let [a, b, c, d] = distance.to_le_bytes();
    Ok([0xe9, a, b, c, d])
}

/// How to take our mark off ftrace's record, when we set it and it is still there.
pub(super) fn unmark(
    know: &Knowledge,
    guest: &dyn StoppedGuest,
    located: &Located,
    mark: Option<FtraceMark>,
) -> Option<FtraceMark> {
    let mark = mark.filter(|mark| mark.before != mark.after)?;
    let now = located.space(&guest).read_sized(mark.at, mark.size).ok()?;
    let after = know.ftrace.as_ref()?.unmarked(now);
    (after != now).then_some(FtraceMark {
        before: now,
        after,
        ..mark
    })
}
