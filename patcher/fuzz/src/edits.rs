//! Changes of a guest's memory.

use patcher::guest::{Gpa, GuestMemory, MemoryImage, StoppedGuest, Vcpu};
use patcher::synthetic::Place;

use crate::Input;

/// Changes that are made at the most.
const MOST: usize = 64;

/// A synthetic guest whose memory was changed as fuzzed bytes say, until this is dropped.
///
/// An edit is a place that means something to the kernel (a pointer, a number, an entry of a page
/// table: whatever was written when the guest was made), a byte that says how its new value comes
/// about, and what that needs.
pub struct Edits<'a> {
    /// The guest as it is now.
    pub image: &'a mut MemoryImage,
    undo: Vec<(Gpa, u64)>,
    vcpus: Vec<Vcpu>,
}

impl<'a> Edits<'a> {
    /// Reads edits until 0xff comes in the place of a kind, or the input ends.
    pub fn apply(image: &'a mut MemoryImage, places: &[Place], input: &mut Input<'_>) -> Self {
        let mut edits = Self {
            vcpus: image.vcpus().to_vec(),
            image,
            undo: Vec::new(),
        };
        for _ in 0..MOST {
            if input.is_empty() {
                break;
            }
            let kind = input.byte();
            if kind == 0xff {
                break;
            }
            let Some(place) = input.pick(places) else {
                break;
            };
            edits.one(kind, *place, places, input);
        }
        edits
    }

    fn one(&mut self, kind: u8, place: Place, places: &[Place], input: &mut Input<'_>) {
        let Ok(old) = self.image.read_u64(place.gpa) else {
            return;
        };
        let new = match kind & 7 {
            0 => 0,
            1 => u64::MAX,
            // A pointer to, or into the neighbourhood of, something else.
            2 => {
                let other = input.pick(places).copied().unwrap_or(place);
                let near = other.gva.map_or(other.gpa.0, |gva| gva.0);
                near.wrapping_add(u64::from(input.byte())).wrapping_sub(8)
            }
            // What another place holds.
            3 => {
                let other = input.pick(places).copied().unwrap_or(place);
                self.image.read_u64(other.gpa).unwrap_or(0)
            }
            4 => old.wrapping_add(u64::from(input.byte())),
            5 => input.long(),
            // Only the first bytes: most numbers are short.
            6 => old & !0xffff | u64::from(input.short()),
            // An entry of a page table, to any page at all.
            _ => {
                let page = u64::from(input.byte()) << 12;
                page | u64::from(input.short() & 0x1ff) | old & 1
            }
        };
        self.write(place.gpa, new);
    }

    /// Writes a word.
    pub fn write(&mut self, at: Gpa, value: u64) {
        if let Ok(old) = self.image.read_u64(at) {
            if self.image.write(at, &value.to_le_bytes()).is_ok() {
                self.undo.push((at, old));
            }
        }
    }
}

impl Drop for Edits<'_> {
    fn drop(&mut self) {
        for (at, old) in self.undo.drain(..).rev() {
            // What was written can be written again.
            let _ = self.image.write(at, &old.to_le_bytes());
        }
        self.image.vcpus_mut().clone_from(&self.vcpus);
    }
}
