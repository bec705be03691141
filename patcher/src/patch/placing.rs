//! Putting code into the arena.

use super::PatchError;
use super::code::{Code, Placed, link};
use super::knowledge::Knowledge;
use super::report::PlacedCode;
use super::retire::{Content, Retirement};
use crate::arena::{Arena, Slot};
use crate::guest::{Gva, StoppedGuest};
use crate::space::Located;

/// Code that was put into the arena.
pub(super) struct NewPlace {
    pub(super) placed: PlacedCode,
    pub(super) content: Content,
    /// Nobody can have been there yet.
    pub(super) fresh: bool,
}

/// What code is placed with.
pub(super) struct Placing<'a> {
    pub(super) know: &'a Knowledge,
    pub(super) located: &'a Located,
    pub(super) arena: &'a mut Option<Arena>,
    pub(super) retired: &'a mut Retirement,
}

impl Placing<'_> {
    /// The arena, made when there is none yet.
    pub(super) fn arena(&mut self, guest: &mut dyn StoppedGuest) -> Result<&mut Arena, PatchError> {
        ready(self.arena, guest, self.located, self.know)
    }

    /// Puts code into the arena, which is made when there is none yet.
    pub(super) fn place(
        &mut self,
        guest: &mut dyn StoppedGuest,
        code: &Code,
        entry: u64,
    ) -> Result<NewPlace, PatchError> {
        let Self {
            know,
            located,
            arena,
            retired,
        } = self;
        let returns = {
            let memory = &&*guest;
            know.returns(&located.space(memory), located)
        };
        let arena = ready(arena, guest, located, know)?;
        let linked = |slot: Slot, data: Option<Slot>| {
            let placed = Placed {
                code: slot.at,
                data: data.map_or(Gva(0), |slot| slot.at),
            };
            link(code, placed, located.slide, returns)
        };
        let place = |slot: Slot, data, linked| NewPlace {
            placed: PlacedCode {
                code: slot,
                data,
                entry: slot.at.offset(entry),
                goes_on: Vec::new(),
                keep: code.keep.clone(),
            },
            content: Content {
                code: code.clone(),
                linked,
            },
            fresh: true,
        };
        if code.data.is_empty() {
            let text_at = |slot| linked(slot, None).ok().map(|(text, _)| text);
            if let Some((slot, content)) = retired.reuse(code, text_at) {
                return Ok(NewPlace {
                    fresh: false,
                    ..place(slot, None, content.linked)
                });
            }
        }
        let slot = arena.take_code(code.text.len() as u64, code.text_align)?;
        let data = match code.data.len() as u64 {
            0 => None,
            len => match arena.take_data(len, code.data_align) {
                Ok(data) => Some(data),
                Err(error) => {
                    give_back(guest, arena, slot, None);
                    return Err(error.into());
                }
            },
        };
        let filled = linked(slot, data)
            .map_err(PatchError::from)
            .and_then(|(text, content)| {
                if let Some(data) = data {
                    arena.fill(guest, data, &content)?;
                }
                arena.fill(guest, slot, &text)?;
                Ok(place(slot, data, text))
            });
        if filled.is_err() {
            give_back(guest, arena, slot, data);
        }
        filled
    }
}

fn ready<'a>(
    arena: &'a mut Option<Arena>,
    guest: &mut dyn StoppedGuest,
    located: &Located,
    know: &Knowledge,
) -> Result<&'a mut Arena, PatchError> {
    match arena {
        Some(arena) => {
            arena.check(guest)?;
            Ok(arena)
        }
        none => Ok(none.insert(Arena::install(guest, located, &know.arena)?)),
    }
}

/// Gives slots back that nothing has used. One that cannot be cleared stays taken.
pub(super) fn give_back(
    guest: &mut dyn StoppedGuest,
    arena: &mut Arena,
    code: Slot,
    data: Option<Slot>,
) {
    for slot in data.into_iter().chain([code]) {
        let _ = arena.free(guest, slot);
    }
}
