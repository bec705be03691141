//! The guest kernel's VMCOREINFO, read from its own memory.
//!
//! It is the text by which debuggers find their way in a dump (kernel/vmcore_info.c). Other VMMs
//! get it from a device that the guest must have a driver for.

use std::sync::{Arc, Mutex, PoisonError};

use patcher::Kernel;
use patcher::guest::{GuestMemory, LinkAddr, StoppedGuest};
use patcher::space::{Landmarks, Located};

use crate::control::dump::{VmcoreinfoReader, VmcoreinfoSource};
use crate::machine::Machine;

/// Linux writes at most one page of it (VMCOREINFO_BYTES).
const MAX_LEN: u64 = 4096;

/// Where a kernel keeps it.
#[derive(Debug)]
struct Place {
    marks: Landmarks,
    data: LinkAddr,
    size: LinkAddr,
}

impl Place {
    fn of(kernel: &Kernel) -> Option<Self> {
        Some(Self {
            marks: Landmarks::of(kernel).ok()?,
            data: kernel.symbols().address("vmcoreinfo_data").ok()?,
            size: kernel.symbols().address("vmcoreinfo_size").ok()?,
        })
    }

    /// The text, or `None` where the guest runs another kernel or has none yet.
    fn read(&self, guest: &dyn StoppedGuest) -> Option<Vec<u8>> {
        let located = Located::find_in_any_state(guest, &self.marks)
            .map_err(|error| tracing::info!(%error, "no VMCOREINFO"))
            .ok()?;
        let memory: &dyn GuestMemory = &guest;
        let space = located.space(memory);
        let start = space.read_pointer(self.data.at(located.slide)).ok()?;
        let len = space.read_u64(self.size.at(located.slide)).ok()?;
        if len == 0 || len > MAX_LEN {
            return None;
        }
        let mut text = vec![0; usize::try_from(len).ok()?];
        space.read(start, &mut text).ok()?;
        Some(text)
    }
}

/// What the kernel's file was unpacked into goes back to the host, which the allocator would keep.
fn give_memory_back() {
    // SAFETY: malloc_trim(3) takes no pointer, may be called from any thread at any time, and
    // changes nothing but unused memory of the allocator.
    unsafe { libc::malloc_trim(0) };
}

/// Finds it for dumps. The kernel's file is opened once, for a moment, before the first dump stops
/// the guest; only three addresses are kept.
#[must_use]
pub fn vmcoreinfo_source(machine: &Machine) -> VmcoreinfoSource {
    let machine = machine.clone();
    let known: Mutex<Option<Arc<Place>>> = Mutex::default();
    Arc::new(move || {
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.is_none() {
            let kernel = machine
                .borrow_kernel()
                .map_err(|error| tracing::info!(%error, "no VMCOREINFO"))
                .ok()?;
            *known = Place::of(&kernel).map(Arc::new);
            drop(kernel);
            give_memory_back();
        }
        let place = Arc::clone(known.as_ref()?);
        let reader: VmcoreinfoReader = Box::new(move |guest| place.read(guest));
        Some(reader)
    })
}
