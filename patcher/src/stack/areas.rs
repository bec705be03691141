//! The stacks that one context may be on, and their words.
//!
//! A stack is read once, as a whole, when its first word is asked for. A context is on one stack at
//! a time and never comes back to one that it has left.

use super::{StackKind, Why};
use crate::guest::Gva;
use crate::space::{Space, SpaceError};

/// Where one stack is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Area {
    pub(super) kind: StackKind,
    pub(super) start: u64,
    pub(super) end: u64,
    /// Nothing below this is of interest.
    pub(super) used_from: u64,
}

impl Area {
    pub(super) fn whole(kind: StackKind, start: Gva, size: u64) -> Option<Self> {
        Some(Self {
            kind,
            start: start.0,
            end: start.0.checked_add(size)?,
            used_from: start.0,
        })
    }

    /// Whether `len` bytes at `at` are on it.
    fn holds(&self, at: u64, len: u64) -> bool {
        at >= self.start && at.checked_add(len).is_some_and(|end| end <= self.end)
    }
}

struct Held {
    area: Area,
    left: bool,
    bytes: Vec<u8>,
}

/// The stacks of one context.
pub(super) struct Areas<'a, 'm> {
    space: &'a Space<'m>,
    all: Vec<Held>,
    current: Option<usize>,
}

impl<'a, 'm> Areas<'a, 'm> {
    pub(super) fn new(space: &'a Space<'m>, areas: impl IntoIterator<Item = Area>) -> Self {
        let held = |area| Held {
            area,
            left: false,
            bytes: Vec::new(),
        };
        Self {
            space,
            all: areas.into_iter().map(held).collect(),
            current: None,
        }
    }

    /// The stack that the context is on now.
    pub(super) fn kind(&self) -> Option<StackKind> {
        Some(self.all.get(self.current?)?.area.kind)
    }

    /// Whether a word at `at` is on the stack that the context is on now.
    pub(super) fn on_current(&self, at: u64) -> bool {
        let current = self.current.and_then(|index| self.all.get(index));
        current.is_some_and(|held| held.area.holds(at, 8))
    }

    /// Whether nothing but saved registers, which take `registers` bytes, can be above `sp`: it is
    /// user mode's, or where a stack begins.
    pub(super) fn is_end(&self, sp: u64, registers: u64) -> bool {
        /// What the kernel leaves free above them.
        const PADDING: u64 = 64;
        let on = self.all.iter().find(|held| held.area.holds(sp, 0));
        match on {
            Some(held) if held.area.kind == StackKind::Entry => true,
            Some(held) => held.area.end - sp <= registers + PADDING,
            None => sp >> 63 == 0,
        }
    }

    /// Goes to the stack that has `len` bytes at `at`.
    pub(super) fn go_to(&mut self, at: u64, len: u64) -> Result<(), Why> {
        let here = self.current.and_then(|index| self.all.get(index));
        if here.is_some_and(|held| held.area.holds(at, len)) {
            return Ok(());
        }
        let found = self
            .all
            .iter()
            .position(|held| !held.left && held.area.holds(at, len));
        let index = found.ok_or(Why::OutsideStack { at: Gva(at) })?;
        if let Some(held) = self.all.get_mut(index) {
            held.left = true;
        }
        self.current = Some(index);
        Ok(())
    }

    /// The word at `at`, on this stack or one that the context goes to with it.
    pub(super) fn word(&mut self, at: u64) -> Result<u64, Why> {
        self.go_to(at, 8)?;
        let outside = Why::OutsideStack { at: Gva(at) };
        let held = self.current.and_then(|index| self.all.get_mut(index));
        let Some(held) = held else {
            return Err(outside);
        };
        if held.bytes.is_empty() {
            held.bytes = read(self.space, held.area).map_err(Why::Unreadable)?;
        }
        let word = || {
            let skip = usize::try_from(at.checked_sub(held.area.used_from)?).ok()?;
            let raw = held.bytes.get(skip..skip.checked_add(8)?)?;
            Some(u64::from_le_bytes(raw.try_into().ok()?))
        };
        word().ok_or(outside)
    }
}

/// Most bytes that any stack has.
const MAX_STACK: u64 = 1 << 20;

fn read(space: &Space<'_>, area: Area) -> Result<Vec<u8>, SpaceError> {
    let len = area.end.saturating_sub(area.used_from).min(MAX_STACK);
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    space.read(Gva(area.used_from), &mut bytes)?;
    Ok(bytes)
}
