//! Counted calls (call depth tracking, arch/x86/kernel/callthunks.c): where the boot chose it, a
//! call leads to accounting code in the padding in front of a function.

use iced_x86::{Decoder, DecoderOptions};

use super::alternatives::Alternatives;
use super::report::{Class, CompareError};
use super::sheet::Sheet;
use super::view::{Table, View};
use crate::guest::{Gva, LinkAddr};
use crate::image::Relocation;
use crate::space::{LayoutError, optional_range};
use crate::symbols::Symbol;

const CALL: u8 = 0xe8;
const CS: u8 = 0x2e;
const NOP: u8 = 0x90;
/// Functions that are called without (`skip_addr`).
const SKIPPED: [&str; 7] = [
    "error_entry",
    "paranoid_entry",
    "xen_error_entry",
    "__switch_to_asm",
    "ret_from_fork",
    "soft_restart_cpu",
    "__fentry__",
];
/// KEXEC_CONTROL_CODE_MAX_SIZE.
const CONTROL_CODE: u64 = 2048;

/// The accounting code of a guest that counts its calls.
pub(super) struct Depth {
    from: LinkAddr,
    code: Vec<u8>,
    skipped: Vec<LinkAddr>,
    relocate: Option<LinkAddr>,
    text: std::ops::Range<LinkAddr>,
}

impl Depth {
    /// `None` where calls are not counted.
    pub(super) fn of(view: &View<'_>) -> Result<Option<Self>, CompareError> {
        if view.variable("thunks_initialized", 1)?.unwrap_or(0) == 0 {
            return Ok(None);
        }
        let unknown = LayoutError::Unknown {
            what: "accounting of calls",
        };
        let range = optional_range(
            view.kernel,
            "skl_call_thunk_template",
            "skl_call_thunk_tail",
        );
        let template = range.and_then(|range| {
            let len = usize::try_from(range.end.0.checked_sub(range.start.0)?).ok()?;
            Some((range.start, view.kernel.image().read(range.start, len)?))
        });
        let (from, code) = template.ok_or(unknown)?;
        let mut code = code.to_vec();
        let [a, b, c, d, ..] = view.located.slide.0.to_le_bytes();
        let slide = u32::from_le_bytes([a, b, c, d]);
        let relocations = view.kernel.image().relocations();
        for (at, form) in relocations.into_iter().flat_map(|all| all.iter()) {
            let to = at.0.checked_sub(from.0);
            let to = to.and_then(|to| code.get_mut(usize::try_from(to).ok()?..)?.first_chunk_mut());
            let Some(to) = to else { continue };
            let word = u32::from_le_bytes(*to);
            *to = match form {
                Relocation::Inverse => word.wrapping_sub(slide).to_le_bytes(),
                _ => word.wrapping_add(slide).to_le_bytes(),
            };
        }
        let skipped = SKIPPED.iter().filter_map(|name| view.symbol(name));
        Ok(Some(Self {
            from,
            code,
            skipped: skipped.collect(),
            relocate: view.symbol("relocate_kernel"),
            text: view
                .kernel
                .between("_text", "_etext")
                .map_err(LayoutError::from)?,
        }))
    }

    /// The accounting code as it is at `pad`.
    fn code_at(&self, pad: LinkAddr) -> Vec<u8> {
        let mut code = self.code.clone();
        let moved = self.from.displacement_from(pad);
        let mut decoder = Decoder::with_ip(64, &self.code, 0, DecoderOptions::NONE);
        while decoder.can_decode() {
            let at = decoder.position();
            let instruction = decoder.decode();
            if !instruction.is_ip_rel_memory_operand() {
                continue;
            }
            let place = at
                + decoder
                    .get_constant_offsets(&instruction)
                    .displacement_offset();
            let to = code.get_mut(place..).and_then(|to| to.first_chunk_mut());
            let Some(to) = to else { continue };
            let distance = i64::from(i32::from_le_bytes(*to)).wrapping_add(moved);
            *to = i32::try_from(distance).unwrap_or(0).to_le_bytes();
        }
        code
    }

    /// Where a call of `target` leads instead (`callthunks_translate_call_dest`).
    pub(super) fn translate(&self, sheet: &mut Sheet, target: LinkAddr) -> LinkAddr {
        let relocates = self
            .relocate
            .is_some_and(|at| (at..at.offset(CONTROL_CODE)).contains(&target));
        if !self.text.contains(&target) || self.skipped.contains(&target) || relocates {
            return target;
        }
        let len = self.code.len();
        let pad = LinkAddr(target.0.wrapping_sub(len as u64));
        let code = self.code_at(pad);
        let Some(found) = sheet.get(pad, len) else {
            return target;
        };
        if found.iter().all(|&byte| byte == NOP) {
            sheet.put(pad, &code, Class::CallDepth);
        } else if found != code {
            return target;
        }
        pad
    }

    /// The same for an address in the guest.
    pub(super) fn translate_run_time(&self, sheet: &mut Sheet, target: Gva) -> Gva {
        let slide = sheet.slide;
        self.translate(sheet, target.linked(slide)).at(slide)
    }

    /// All calls (`callthunks_patch_builtin_calls`).
    pub(super) fn apply(&self, view: &View<'_>, sheet: &mut Sheet, alternatives: &Alternatives) {
        let sites = view.places(&Table::Section(".call_sites"));
        let everywhere = LinkAddr(0)..LinkAddr(u64::MAX);
        for at in sites.chain(alternatives.within(everywhere).map(|choice| choice.at)) {
            let prefix = u64::from(sheet.get(at, 1) == Some(&[CS]));
            let opcode = at.offset(prefix);
            if !self.text.contains(&at) || sheet.get(opcode, 1) != Some(&[CALL]) {
                continue;
            }
            let Some(target) = sheet.target(opcode) else {
                continue;
            };
            let pad = self.translate(sheet, target);
            if pad == target {
                continue;
            }
            if let Some(call) = sheet.branch(CALL, at, sheet.run_time(pad)) {
                sheet.put(at, &call, Class::CallDepth);
            }
        }
        // Modules call functions that the kernel itself does not.
        let functions = view.kernel.symbols().iter().filter(Symbol::is_function);
        for at in functions.filter_map(|function| function.address()) {
            let pad = LinkAddr(at.0.wrapping_sub(self.code.len() as u64));
            let padding = sheet.get(pad, self.code.len());
            if padding.is_some_and(|bytes| bytes.iter().all(|&byte| byte == NOP)) {
                sheet.also(pad, &self.code_at(pad));
            }
        }
    }
}
