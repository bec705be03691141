//! Names of frames in the kernel's own text. Needs no guest.

use super::Frame;
use super::layout::StackLayout;
use crate::Kernel;
use crate::guest::Slide;

/// The kernel's symbols where it is in a guest.
pub(super) struct Names<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) layout: &'a StackLayout,
    pub(super) slide: Slide,
}

impl Names<'_> {
    /// Function, offset and size, as the kernel prints them: `func+0x12/0x80`.
    pub(super) fn name(&self, frame: &Frame) -> String {
        let (at, back) = frame.instruction();
        match self.kernel.symbols().at(at.linked(self.slide)) {
            Some(place) => {
                let (name, offset) = (place.symbol.name(), place.offset + back);
                format!("{name}+{offset:#x}/{:#x}", place.size)
            }
            None => frame.address.to_string(),
        }
    }

    /// Whether a frame is in the scheduler, which /proc/PID/stack leaves out.
    pub(super) fn is_scheduler(&self, frame: &Frame) -> bool {
        let link = frame.address.linked(self.slide);
        let text = self.layout.sched_text.as_ref();
        text.is_some_and(|text| text.contains(&link))
    }
}
