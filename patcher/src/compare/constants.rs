//! Values that the boot writes into instructions (include/asm-generic/runtime-const.h, 6.11 and
//! later): each table of places is a section named after the variable.
//!
//! A variable that nothing but these instructions reads is one that the compiler leaves out (the
//! pointers to slab caches, 6.19 and later): its value stands nowhere else. Then the places vouch
//! for each other: what most of them have is the value if it can be one. One place alone is taken at
//! its word, and named as a doubt.

use std::collections::HashMap;
use std::hash::Hash;
use std::ops::Range;

use super::report::{Class, CompareError};
use super::sheet::Sheet;
use super::view::View;
use crate::guest::{Gva, LinkAddr};
use crate::image::Section;

/// Kinds of tables: what their names begin with, and the bytes of a value.
const KINDS: [(&str, usize); 3] = [
    ("runtime_ptr_", 8),
    ("runtime_shift_", 1),
    // From 7.3 on.
    ("runtime_mask_", 4),
];
/// The end of user space: no variable, but a choice that is made with the page tables.
const LIMIT: &str = "USER_PTR_MAX";

/// Puts every such value in `text` where it belongs. Returns what could not be checked.
pub(super) fn runtime_constants(
    view: &View<'_>,
    sheet: &mut Sheet,
    text: &Range<LinkAddr>,
) -> Result<Vec<String>, CompareError> {
    let mut doubts = Vec::new();
    for section in view.kernel.image().sections() {
        let name = section.name.as_str();
        let kind = KINDS.iter().find_map(|&(prefix, len)| {
            let variable = name.strip_prefix(prefix)?;
            Some((variable, len))
        });
        let Some((variable, len)) = kind else {
            continue;
        };
        let mut places = places(view, section);
        // Init text is gone.
        places.retain(|at| text.contains(at));
        let value = match view.symbol(variable) {
            Some(at) => Some(view.bytes(at, len, "a runtime constant")?),
            None if variable == LIMIT => None,
            None => match agreed(view, &places, len)? {
                Some(value) => Some(value),
                // What the file says stays, which is what no guest has.
                None => continue,
            },
        };
        if places.len() == 1 && variable != LIMIT && view.symbol(variable).is_none() {
            doubts.push(format!(
                "the runtime constant {variable} stands in one place and nowhere else: whether it is right cannot be told"
            ));
        }
        for at in places {
            let value = match &value {
                Some(value) => value.clone(),
                None => limit(view, at)?,
            };
            sheet.put(at, &value, Class::RuntimeConstant);
        }
    }
    Ok(doubts)
}

/// Distances of 32 bits from the table's own entries.
fn places(view: &View<'_>, section: &Section) -> Vec<LinkAddr> {
    let bytes = view.kernel.image().section_bytes(section);
    (0_u64..)
        .zip(bytes.unwrap_or_default().chunks_exact(4))
        .map(|(n, raw)| {
            let distance = raw.first_chunk().map_or(0, |raw| i32::from_le_bytes(*raw));
            section.address.offset(n * 4).displace(distance.into())
        })
        .collect()
}

/// What the places themselves agree upon, if it can be such a value.
fn agreed(
    view: &View<'_>,
    places: &[LinkAddr],
    len: usize,
) -> Result<Option<Vec<u8>>, CompareError> {
    let found = places
        .iter()
        .map(|&at| view.bytes(at, len, "a runtime constant"));
    let found = found.collect::<Result<Vec<_>, _>>()?;
    Ok(of_most(&found)
        .filter(|value| is_plausible(view, value))
        .cloned())
}

/// What more than half of them are.
fn of_most<T: Eq + Hash>(all: &[T]) -> Option<&T> {
    let mut votes: HashMap<&T, usize> = HashMap::new();
    for one in all {
        *votes.entry(one).or_default() += 1;
    }
    let (value, count) = votes.into_iter().max_by_key(|&(_, count)| count)?;
    (2 * count > all.len()).then_some(value)
}

/// A pointer leads to a word of the kernel's memory; what is shorter may be any number.
fn is_plausible(view: &View<'_>, value: &[u8]) -> bool {
    let Some(raw) = value.first_chunk() else {
        return true;
    };
    let pointer = Gva(u64::from_le_bytes(*raw));
    pointer.0 >> 63 == 1 && pointer.0 % 8 == 0 && view.space.read_u64(pointer).is_ok()
}

/// `USER_PTR_MAX`, which is no variable: the end of user space with 4 or with 5 levels of page
/// tables (`task_size_max`), the one that the guest chose.
fn limit(view: &View<'_>, at: LinkAddr) -> Result<Vec<u8>, CompareError> {
    let found = view.bytes(at, 8, "a runtime constant")?;
    let limits = [47, 56].map(|bits| ((1_u64 << bits) - 0x1000).to_le_bytes());
    let [usual, large] = limits;
    let chosen = if found == large { large } else { usual };
    Ok(chosen.to_vec())
}

#[cfg(test)]
mod tests {
    use super::of_most;

    #[test]
    fn one_place_that_differs_is_outvoted() {
        assert_eq!(of_most(&[7, 7, 9]), Some(&7));
        assert_eq!(of_most(&[7, 7]), Some(&7));
        assert_eq!(of_most(&[7]), Some(&7));
        // Two that differ say nothing.
        assert_eq!(of_most(&[7, 9]), None);
        assert_eq!(of_most(&[7, 7, 9, 9]), None);
        assert_eq!(of_most::<u8>(&[]), None);
    }
}
