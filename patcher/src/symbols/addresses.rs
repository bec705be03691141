//! Where the addresses of symbols are, and which reading of them makes sense.

use super::find::{Found, Names};
use super::format::{Format, Layout, OffsetForm, Region, Tables};

/// Alignment of the kernel's text (CONFIG_PHYSICAL_ALIGN is at least this on x86-64).
const TEXT_ALIGN: u64 = 2 << 20;
/// Where the kernel is linked, and how much it can occupy (KERNEL_IMAGE_SIZE with KASLR).
pub(super) const KERNEL_START: u64 = 0xffff_ffff_8000_0000;
const KERNEL_SIZE: u64 = 1 << 30;

/// Every known place and form of the addresses.
pub(super) fn readings(region: &Region<'_>, found: &Found, names: &Names) -> Vec<Tables> {
    let align = found.align;
    let behind_markers = region.up(names.markers_end, align);
    let sorted = region.up(behind_markers + 3 * names.count, align) == found.start;
    let plain = behind_markers == found.start;
    let mut readings = Vec::new();
    let mut push = |layout, form, offsets, base, behind| {
        readings.push(Tables {
            format: Format {
                layout,
                offsets: form,
                align,
                sorted_names: sorted,
            },
            tokens: found.tokens.clone(),
            names: names.range.clone(),
            count: names.count,
            offsets,
            base,
            behind,
        });
    };
    if plain || sorted {
        let base = names.range.start.checked_sub(align + 8);
        let offsets = base.and_then(|base| base.checked_sub(4 * names.count));
        if let (Some(base), Some(offsets)) = (base, offsets) {
            // The padding, if any, is behind the offsets.
            let offsets = offsets - offsets.min((align - region.padding(offsets, align)) % align);
            if let Some(base) = region.long(base) {
                for form in [OffsetForm::PerCpu, OffsetForm::Base] {
                    push(Layout::A, form, offsets, base, 0);
                }
            }
        }
    }
    if plain {
        let offsets = region.up(found.index_end, align);
        let behind = region.up(offsets + 4 * names.count, align);
        if let Some(base) = region.long(behind) {
            for form in [OffsetForm::PerCpu, OffsetForm::Base] {
                push(Layout::B, form, offsets, base, region.up(behind + 8, align));
            }
        }
        push(Layout::C, OffsetForm::Own, offsets, 0, behind);
    }
    readings
}

/// A reading that is accepted, with what it says beside the addresses.
pub(super) fn finished(region: &Region<'_>, mut tables: Tables) -> Tables {
    if tables.format.layout != Layout::A {
        tables.format.sorted_names = is_order(region, tables.behind, tables.count);
    }
    tables
}

/// Whether a names' order may start at `at`: three bytes each, most significant first.
fn is_order(region: &Region<'_>, at: usize, count: usize) -> bool {
    let Some(table) = region.bytes.get(at..at.saturating_add(3 * count)) else {
        return false;
    };
    table.chunks_exact(3).all(|entry| {
        entry
            .iter()
            .fold(0, |number, &byte| number << 8 | usize::from(byte))
            < count
    })
}

/// Whether addresses make sense: `_text` where a kernel can be, everything behind it and near
/// enough, and in order but for one in a thousand.
pub(super) fn plausible(region: &Region<'_>, tables: &Tables, text: usize) -> bool {
    let Some(text) = tables.value(region, text) else {
        return false;
    };
    if text % TEXT_ALIGN != 0 || text < KERNEL_START {
        return false;
    }
    let (mut placed, mut strays, mut last) = (0_usize, 0_usize, 0);
    for index in 0..tables.count {
        let Some(value) = tables.value(region, index) else {
            return false;
        };
        if tables.format.offsets == OffsetForm::PerCpu && value < KERNEL_START {
            continue;
        }
        placed += 1;
        if value < last || value < text || value - text > KERNEL_SIZE {
            strays += 1;
        } else {
            last = value;
        }
    }
    placed > 0 && strays <= placed / 1000
}
