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
//! 7.3; one that uses thunks against indirect target selection (ITS) is named as a doubt.
//!
//! KASLR: a bzImage lists the words that it changes, and so does what was unpacked from one. For a
//! vmlinux without that list, an operand of an instruction that has grown or shrunk by exactly the
//! slide counts as moved.

mod alternatives;
mod boot;
mod constants;
mod depth;
mod difference;
mod keys;
mod moved;
mod nops;
mod owners;
mod report;
mod returns;
mod sheet;
mod users;
mod view;

pub use report::{Class, CompareError, Comparison, Count, Foreign, Owner};

use alternatives::Alternatives;
use depth::Depth;
use returns::Returns;
use sheet::Sheet;
use view::View;

use std::ops::Range;

use crate::Kernel;
use crate::guest::LinkAddr;
use crate::patch::Applied;
use crate::space::{LayoutError, Located, Space};
use crate::text::BusyLayout;

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
    Expected::of(kernel, space, located)?.compare(ours)
}

/// A place that the kernel itself writes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SitePlace {
    /// Where it is linked.
    pub at: LinkAddr,
    /// Its length in bytes.
    pub len: u8,
    /// What writes there.
    pub class: Class,
}

/// The text that a guest's kernel should have.
pub struct Expected<'a> {
    view: View<'a>,
    sheet: Sheet,
    text: Range<LinkAddr>,
    /// The kernel's file lists its relocations.
    listed: bool,
    /// What could not be checked.
    doubts: Vec<String>,
}

impl<'a> Expected<'a> {
    /// What `kernel` makes of its text with the features and variables of the guest.
    ///
    /// # Errors
    /// As [`compare`].
    pub fn of(
        kernel: &'a Kernel,
        space: &'a Space<'a>,
        located: &'a Located,
    ) -> Result<Self, CompareError> {
        let view = View::new(kernel, space, located)?;
        let text = kernel
            .between("_stext", "_etext")
            .map_err(LayoutError::from)?;
        let mut sheet = Sheet::of(kernel, located.slide);
        let listed = boot::relocate(&view, &mut sheet);
        let alternatives = Alternatives::of(kernel, &view)?;
        let returns = Returns::of(&view, &alternatives)?;
        keys::jump_labels(&view, &mut sheet)?;
        let depth = Depth::of(&view)?;
        keys::static_calls(&view, &mut sheet, &returns, depth.as_ref())?;
        boot::entries(&view, &mut sheet);
        boot::tracers(&view, &mut sheet)?;
        boot::paravirt(&view, &mut sheet)?;
        returns::retpolines(&view, &mut sheet, &alternatives, depth.is_some());
        returns.apply(&view, &mut sheet);
        alternatives.apply(&view, &mut sheet)?;
        if let Some(depth) = &depth {
            depth.apply(&view, &mut sheet, &alternatives);
        }
        boot::seals(&view, &mut sheet)?;
        boot::locks(&view, &mut sheet)?;
        let doubts = constants::runtime_constants(&view, &mut sheet, &text)?;
        Ok(Self {
            view,
            sheet,
            text,
            listed,
            doubts,
        })
    }

    /// The text that is compared.
    #[must_use]
    pub fn text(&self) -> Range<LinkAddr> {
        self.text.clone()
    }

    /// The bytes that should be at `at`.
    #[must_use]
    pub fn bytes(&self, at: LinkAddr, len: usize) -> Option<&[u8]> {
        self.sheet.get(at, len)
    }

    /// Every place in the text that the kernel itself writes, by address.
    pub fn sites(&mut self) -> impl Iterator<Item = SitePlace> + '_ {
        let text = self.text.clone();
        let marks = self.sheet.marks().iter();
        marks
            .filter(move |mark| text.contains(&mark.at))
            .map(|mark| SitePlace {
                at: mark.at,
                len: mark.len,
                class: mark.class,
            })
    }

    /// Compares with what the guest has. `ours` is what we have changed in it.
    ///
    /// # Errors
    /// As [`compare`].
    pub fn compare(self, ours: &[Applied]) -> Result<Comparison, CompareError> {
        let mut comparison = difference::of(&self.view, self.sheet, self.text, self.listed, ours)?;
        comparison.doubts.extend(self.doubts);
        comparison.doubts.extend(doubts(&self.view)?);
        Ok(comparison)
    }
}

/// What the guest does with its text that is not known here.
fn doubts(view: &View<'_>) -> Result<Vec<String>, CompareError> {
    let mut doubts = Vec::new();
    let on = |name, size| Ok::<_, CompareError>(view.variable(name, size)?.unwrap_or(0) != 0);
    if on("its_page", 8)? {
        doubts.push(
            "indirect branches go through thunks of their own (ITS), which is not explained".into(),
        );
    }
    match BusyLayout::of(view.kernel)?.check(view.space, view.located) {
        Ok(None) => {}
        Ok(Some(busy)) => doubts.push(busy.to_string()),
        Err(error) => doubts.push(format!("whether the guest is changing its text: {error}")),
    }
    Ok(doubts)
}
