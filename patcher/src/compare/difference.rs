//! Where the guest's text and the sheet differ.

use std::collections::BTreeMap;
use std::ops::Range;

use super::moved::moved;
use super::owners::{Change, Owners};
use super::report::{Class, CompareError, Comparison, Count, Foreign, Owner};
use super::sheet::{Mark, Sheet};
use super::view::View;
use crate::guest::LinkAddr;
use crate::patch::{Applied, Bytes};

/// Foreign ranges that are listed at most.
const MOST: usize = 10_000;
/// Bytes that differ after which no more are looked for.
const MOST_BYTES: usize = 1 << 20;
/// Equal bytes between two differences that still make one range.
const GAP: u64 = 3;
/// Bytes of a range that are shown at most.
const SHOWN: usize = 64;
/// Marks reach at most this far.
const LONGEST: u64 = 255;

pub(super) fn of(
    view: &View<'_>,
    mut sheet: Sheet,
    text: Range<LinkAddr>,
    relocations_listed: bool,
    ours: &[Applied],
) -> Result<Comparison, CompareError> {
    let len = usize::try_from(text.end.distance_from(text.start)).unwrap_or(0);
    let found = view.bytes(text.start, len, "the kernel's text")?;
    let at_found = |at: LinkAddr, len: usize| {
        let from = usize::try_from(at.0.checked_sub(text.start.0)?).ok()?;
        found.get(from..from.checked_add(len)?)
    };
    sheet.settle(at_found);
    let mut differences = differences(&sheet, &text, &found);
    if !relocations_listed {
        moved(view, &mut sheet, &mut differences, &at_found);
    }
    let mut doubts = Vec::new();
    if differences.len() >= MOST_BYTES {
        doubts.push("so much differs that the rest of the text was not looked at".into());
    }
    let sites = count(view, &mut sheet, &text, &at_found);
    let marks = sheet.marks().to_vec();
    let mut foreign = Vec::new();
    let mut foreign_bytes = 0;
    let ranges = ranges(&differences);
    for range in &ranges {
        foreign_bytes += range.end.distance_from(range.start);
    }
    let all = whole_sites(&ranges, &marks);
    let truncated = all.len() > MOST || differences.len() >= MOST_BYTES;
    // Reading them takes as long as comparing: only where there is something to own.
    let owners = (!all.is_empty()).then(|| Owners::of(view, ours, &mut doubts));
    for (range, site) in all.into_iter().take(MOST) {
        let len = usize::try_from(range.end.distance_from(range.start)).unwrap_or(0);
        let len = len.min(SHOWN);
        let expected = sheet.get(range.start, len).unwrap_or_default().to_vec();
        let found = at_found(range.start, len).unwrap_or_default().to_vec();
        let address = view.run_time(range.start);
        foreign.push(Foreign {
            address,
            place: place(view, range.start),
            owner: owners.as_ref().map_or(Owner::Unknown, |owners| {
                owners.of_change(&Change {
                    at: address,
                    expected: &expected,
                    found: &found,
                    site,
                })
            }),
            expected: Bytes(expected),
            found: Bytes(found),
            site,
        });
    }
    let changed = changed(view, &text, &found);
    Ok(Comparison {
        text: view.run_time(text.start),
        len: len as u64,
        explained: changed.saturating_sub(foreign_bytes),
        foreign_bytes,
        sites,
        foreign,
        truncated,
        doubts,
    })
}

/// Every byte that differs.
fn differences(sheet: &Sheet, text: &Range<LinkAddr>, found: &[u8]) -> Vec<LinkAddr> {
    const PAGE: usize = 4096;
    let mut differences = Vec::new();
    let mut at = text.start;
    for page in found.chunks(PAGE) {
        if differences.len() >= MOST_BYTES {
            break;
        }
        match sheet.get(at, page.len()) {
            Some(expected) if expected == page => {}
            _ => {
                let bytes = (0_u64..).zip(page).map(|(n, found)| (at.offset(n), found));
                // What is between sections is in no file, and never run.
                let unequal = bytes.filter(|&(at, found)| {
                    sheet
                        .get(at, 1)
                        .and_then(<[u8]>::first)
                        .is_some_and(|byte| byte != found)
                });
                differences.extend(unequal.map(|(at, _)| at));
            }
        }
        at = at.offset(page.len() as u64);
    }
    differences
}

/// How many bytes are not as in the file.
fn changed(view: &View<'_>, text: &Range<LinkAddr>, found: &[u8]) -> u64 {
    const PAGE: usize = 4096;
    let mut changed = 0;
    let mut at = text.start;
    for page in found.chunks(PAGE) {
        if let Some(file) = view.kernel.image().read(at, page.len()) {
            if file != page {
                changed += file.iter().zip(page).filter(|(a, b)| a != b).count() as u64;
            }
        }
        at = at.offset(page.len() as u64);
    }
    changed
}

/// Bytes that differ, with few equal ones between, as ranges.
fn ranges(differences: &[LinkAddr]) -> Vec<Range<LinkAddr>> {
    let mut ranges: Vec<Range<LinkAddr>> = Vec::new();
    for &at in differences {
        match ranges.last_mut() {
            Some(last) if at.distance_from(last.end) <= GAP => last.end = at.offset(1),
            _ => ranges.push(at..at.offset(1)),
        }
    }
    ranges
}

/// The ranges, grown to the whole of the place that they are in.
fn whole_sites(
    ranges: &[Range<LinkAddr>],
    marks: &[Mark],
) -> Vec<(Range<LinkAddr>, Option<Class>)> {
    let mut all: Vec<(Range<LinkAddr>, Option<Class>)> = Vec::new();
    for range in ranges {
        let from = LinkAddr(range.start.0.saturating_sub(LONGEST));
        let first = marks.partition_point(|mark| mark.at < from);
        let near = marks.get(first..).unwrap_or_default().iter();
        let hit = near
            .take_while(|mark| mark.at < range.end)
            .filter(|mark| mark.range().end > range.start && mark.class != Class::Relocation)
            .last();
        let (whole, class) = match hit {
            Some(mark) => {
                let site = mark.range();
                let whole = range.start.min(site.start)..range.end.max(site.end);
                (whole, Some(mark.class))
            }
            None => (range.clone(), None),
        };
        match all.last_mut() {
            Some((last, _)) if whole.start < last.end => last.end = last.end.max(whole.end),
            _ => all.push((whole, class)),
        }
    }
    all
}

/// How many places of each class there are, and how many the guest has changed.
fn count<'f>(
    view: &View<'_>,
    sheet: &mut Sheet,
    text: &Range<LinkAddr>,
    found: &impl Fn(LinkAddr, usize) -> Option<&'f [u8]>,
) -> BTreeMap<Class, Count> {
    let mut counts: BTreeMap<Class, Count> = BTreeMap::new();
    let mut last = None;
    for mark in sheet.marks() {
        let same = last.replace((mark.at, mark.class)) == Some((mark.at, mark.class));
        if same || !text.contains(&mark.at) {
            continue;
        }
        let count = counts.entry(mark.class).or_default();
        count.sites += 1;
        let file = view.kernel.image().read(mark.at, mark.len.into());
        if file != found(mark.at, mark.len.into()) {
            count.changed += 1;
        }
    }
    counts
}

/// Function and offset, as the kernel would print it.
fn place(view: &View<'_>, at: LinkAddr) -> String {
    match view.kernel.symbols().at(at) {
        Some(place) => format!(
            "{}+{:#x}/{:#x}",
            place.symbol.name(),
            place.offset,
            place.size
        ),
        None => at.at(view.located.slide).to_string(),
    }
}
