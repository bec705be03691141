//! Is this text what the kernel itself makes of its file?
//!
//! The boot and the running kernel change their own text: KASLR, alternatives, paravirt calls,
//! retpolines, returns, sealed ENDBRs, lock prefixes, tracer calls, jump labels, static calls,
//! runtime constants. [`compare`] does the same to the text of the file, in the same order, with the
//! CPU features and the variables that the guest has now, and holds the result against the guest's
//! memory. Guaranteed: a byte counts as explained only when it equals what this kernel would have
//! there; that some table names its place is not enough. What is left is listed with its owner,
//! where the guest's own structures or our ledger tell one.
//!
//! Not guaranteed: that the variables themselves are as the guest's owner wants them; that text
//! outside `[_stext, _etext)` (modules, BPF, trampolines) is unchanged. Choices that the boot made by
//! CPU features are checked against the features as they are now. Known are kernels from 6.1 to
//! 6.12; a kernel with call depth tracking, or with the thunks against indirect target selection in
//! use, is named as a doubt.
//!
//! KASLR: a bzImage lists the words that it changes, and so does what was unpacked from one. For a
//! vmlinux without that list, a 32-bit word that points into the image and has grown by exactly the
//! slide counts as moved, and one that has shrunk by it.

mod alternatives;
mod boot;
mod difference;
mod keys;
mod nops;
mod owners;
mod report;
mod returns;
mod sheet;
mod view;

pub use report::{Class, CompareError, Comparison, Count, Foreign, Owner};

use alternatives::Alternatives;
use returns::Returns;
use sheet::Sheet;
use view::View;

use crate::Kernel;
use crate::patch::Applied;
use crate::space::{LayoutError, Located, Space};

/// Compares the kernel's text in the guest with what it should be. `ours` is what we have changed
/// in it.
///
/// # Errors
/// [`CompareError`] when the kernel's file does not tell enough, or guest memory cannot be read.
pub fn compare(
    kernel: &Kernel,
    space: &Space<'_>,
    located: &Located,
    ours: &[Applied],
) -> Result<Comparison, CompareError> {
    let view = View::new(kernel, space, located)?;
    let text = kernel
        .between("_stext", "_etext")
        .map_err(LayoutError::from)?;
    let mut sheet = Sheet::of(kernel, located.slide);
    let listed = boot::relocate(&view, &mut sheet);
    let alternatives = Alternatives::of(kernel, &view)?;
    let returns = Returns::of(&view, &alternatives)?;
    keys::jump_labels(&view, &mut sheet)?;
    keys::static_calls(&view, &mut sheet, &returns)?;
    boot::entries(&view, &mut sheet);
    boot::tracers(&view, &mut sheet)?;
    boot::paravirt(&view, &mut sheet)?;
    returns::retpolines(&view, &mut sheet, &alternatives);
    returns.apply(&view, &mut sheet);
    alternatives.apply(&view, &mut sheet)?;
    boot::seals(&view, &mut sheet)?;
    boot::locks(&view, &mut sheet)?;
    keys::runtime_constants(&view, &mut sheet)?;
    difference::of(&view, sheet, text, listed, ours)
}
