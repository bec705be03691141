//! The kernel in a memory image that lacks registers.
//!
//! A core of `dump-guest-memory` holds no MSRs, so the slide does not follow from MSR_LSTAR. There
//! are few places where KASLR can put a kernel: the version string is looked for at each of them,
//! through the page tables that the vCPUs use.

use super::located::{IMAGE_SPACE, Landmarks, LocateError, SLIDE_ALIGN, root_with_banner};
use crate::guest::{Activity, MemoryImage, Slide, StoppedGuest};

/// Sets MSR_LSTAR of the vCPUs of `image` to what the kernel of `marks` has there, where they have
/// none.
///
/// # Errors
/// [`LocateError`] when that kernel is nowhere; it is then as it was.
pub fn complete_registers(image: &mut MemoryImage, marks: &Landmarks) -> Result<(), LocateError> {
    let started = |activity| activity != Activity::NotStarted;
    let mut vcpus = image.vcpus().iter();
    if vcpus.any(|vcpu| started(vcpu.activity) && vcpu.registers.lstar != 0) {
        return Ok(());
    }
    let mut reason = None;
    let step = usize::try_from(SLIDE_ALIGN).unwrap_or(usize::MAX);
    let slide = (0..IMAGE_SPACE).step_by(step).map(Slide).find(|&slide| {
        root_with_banner(image, image.vcpus(), marks, slide)
            .map_err(|error| reason = Some(error))
            .is_ok()
    });
    let Some(slide) = slide else {
        return Err(reason.unwrap_or_else(|| LocateError::StillBooting {
            why: "no vCPU has been started".into(),
        }));
    };
    let entry = marks.entry.at(slide).0;
    for vcpu in image.vcpus_mut() {
        if started(vcpu.activity) {
            vcpu.registers.lstar = entry;
        }
    }
    Ok(())
}
