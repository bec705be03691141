//! Return addresses that tracers have taken off the stack.
//!
//! Function graph tracing and return probes put the address of their own code in the place of a
//! return address, and keep the real one elsewhere, together with where it was
//! (kernel/trace/fgraph.c, kernel/trace/rethook.c). Both may take the same place, one after the
//! other, any number of times: what the later one keeps is then the other's code. The kernel's own
//! unwinder asks each of them once; here they are asked until the address is a real one.

use std::cell::OnceCell;

use super::Why;
use super::layout::{GraphLayout, StackLayout};
use crate::guest::{Gva, Slide};
use crate::space::{Space, SpaceError};
use crate::tasks::ReturnProbes;

/// Most bytes of function graph's stack (SHADOW_STACK_SIZE from 6.11 on; before, 50 entries).
const MAX_GRAPH: u64 = 4096;
/// Bits of the word above an entry that say how many words it has (FGRAPH_FRAME_OFFSET_MASK).
const WORDS_MASK: u64 = 0x3ff;

/// A return address that was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Taken {
    slot: u64,
    address: u64,
}

/// The return addresses of one task that tracers keep, the last taken first.
pub(super) struct Repairs<'a, 'm> {
    space: &'a Space<'m>,
    layout: &'a StackLayout,
    slide: Slide,
    task: Gva,
    graph: OnceCell<Vec<Taken>>,
    probed: OnceCell<Vec<Taken>>,
}

impl<'a, 'm> Repairs<'a, 'm> {
    pub(super) fn new(
        space: &'a Space<'m>,
        layout: &'a StackLayout,
        slide: Slide,
        task: Gva,
    ) -> Self {
        Self {
            space,
            layout,
            slide,
            task,
            graph: OnceCell::new(),
            probed: OnceCell::new(),
        }
    }

    /// The real return address where `address` was found in `slot`.
    pub(super) fn real(&self, address: u64, slot: u64) -> Result<u64, Why> {
        let graph = self.layout.graph.as_ref();
        let probes = self.layout.probes.as_ref();
        let handler = graph.map(|graph| graph.handler.at(self.slide).0);
        let trampoline = probes.map(|probes| probes.trampoline.at(self.slide).0);
        let (mut graph_taken, mut probes_taken) = (None, None);
        let mut address = address;
        // Each round uses up one of the entries for this slot, so this ends.
        loop {
            let next = match (graph, probes) {
                (Some(layout), _) if Some(address) == handler => graph_taken
                    .get_or_insert_with(|| of_slot(self.graph(layout), slot))
                    .next(),
                (_, Some(probes)) if Some(address) == trampoline => probes_taken
                    .get_or_insert_with(|| of_slot(self.probed(probes), slot))
                    .next(),
                _ => return Ok(address),
            };
            address = next.ok_or(Why::LostReturn { slot: Gva(slot) })?;
        }
    }

    /// What cannot be read is not there: its slots are then not found.
    fn graph(&self, layout: &GraphLayout) -> &[Taken] {
        self.graph.get_or_init(|| {
            let read = match layout.in_words {
                true => self.graph_words(layout),
                false => self.graph_array(layout),
            };
            read.unwrap_or_default()
        })
    }

    fn probed(&self, probes: &ReturnProbes) -> &[Taken] {
        self.probed.get_or_init(|| {
            let kept = probes.of_task(self.space, self.slide, self.task);
            let all = kept.unwrap_or_default().into_iter();
            all.map(|kept| Taken {
                slot: kept.slot,
                address: kept.address,
            })
            .collect()
        })
    }

    /// The first `len` bytes of the stack, and the task's index into it.
    fn graph_stack(
        &self,
        layout: &GraphLayout,
        len: impl Fn(u64) -> u64,
    ) -> Result<(Vec<u8>, u64), SpaceError> {
        let index = self.space.read_sized(
            self.task.offset(layout.current.offset),
            layout.current.size.min(8),
        )?;
        let stack = self.space.read_pointer(self.task.offset(layout.stack))?;
        let len = len(index);
        if stack.0 == 0 || len > MAX_GRAPH {
            return Ok((Vec::new(), 0));
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        self.space.read(stack, &mut bytes)?;
        Ok((bytes, index))
    }

    /// An array of entries, of which the last is the task's index; -1 when there is none.
    fn graph_array(&self, layout: &GraphLayout) -> Result<Vec<Taken>, SpaceError> {
        let none = u64::MAX >> (64 - 8 * layout.current.size.clamp(1, 8));
        let len = |index: u64| match index == none {
            true => 0,
            false => index.saturating_add(1).saturating_mul(layout.entry_size),
        };
        let (bytes, _) = self.graph_stack(layout, len)?;
        let size = usize::try_from(layout.entry_size).unwrap_or(0).max(1);
        let entries = bytes.chunks_exact(size);
        Ok(entries.rev().filter_map(|raw| taken(layout, raw)).collect())
    }

    /// Words. The task's index is the first free one; the word below it says how far further down
    /// the entry begins.
    fn graph_words(&self, layout: &GraphLayout) -> Result<Vec<Taken>, SpaceError> {
        let (bytes, mut free) = self.graph_stack(layout, |words| words.saturating_mul(8))?;
        let mut found = Vec::new();
        while let Some(above) = free.checked_sub(1) {
            let begin = word(&bytes, above.saturating_mul(8))
                .map(|word| word & WORDS_MASK)
                .filter(|&words| words > 0)
                .and_then(|words| above.checked_sub(words));
            let Some(begin) = begin else { break };
            let entry = usize::try_from(begin * 8).unwrap_or(usize::MAX);
            found.extend(bytes.get(entry..).and_then(|raw| taken(layout, raw)));
            free = begin;
        }
        Ok(found)
    }
}

fn of_slot(all: &[Taken], slot: u64) -> impl Iterator<Item = u64> {
    all.iter()
        .filter(move |taken| taken.slot == slot)
        .map(|taken| taken.address)
}

fn word(bytes: &[u8], at: u64) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    let raw = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(raw.try_into().ok()?))
}

fn taken(layout: &GraphLayout, raw: &[u8]) -> Option<Taken> {
    Some(Taken {
        slot: word(raw, layout.slot)?,
        address: word(raw, layout.address)?,
    })
}
