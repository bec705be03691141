//! Finds the kallsyms tables in a kernel's read-only data, without any symbol.
//!
//! The tokens of the ten digits stand in a row in every token table, and its index confirms it.
//! From there the markers and the names are found backwards, and the addresses as
//! [`super::addresses`] says. Nothing is decided by the kernel's release, because distributions
//! backport: every reading is tried, and exactly one must make sense. The search is bounded by
//! [`Budget`].

use std::ops::{Range, RangeInclusive};

use super::SymbolsError;
use super::addresses;
use super::format::{Region, Tables};
use super::names::{self, MAX_TOKEN, Tokens};

/// The most symbols that are believed. Debian's kernels have 200,000.
const MAX_SYMBOLS: usize = 1 << 21;

/// Names between two markers (scripts/kallsyms.c).
const MARKER_STEP: usize = 256;

/// Bytes between two markers: each name has a length and a token at least, at most KSYM_NAME_LEN
/// (512) tokens and two bytes of length.
const MARKER_GAP: RangeInclusive<u32> = 256 * 2..=256 * (512 + 2);

/// Tokens before the digit '0'.
const BEFORE_DIGITS: usize = 0x30;
const DIGITS: &[u8] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";

/// What a search may cost in entries looked at, so that made-up data cannot hold it up.
struct Budget(u64);

impl Budget {
    fn spend(&mut self, cost: usize) -> Result<(), SymbolsError> {
        self.0 = self
            .0
            .checked_sub(cost as u64)
            .ok_or(SymbolsError::TooComplex)?;
        Ok(())
    }
}

/// A token table with its index.
pub(super) struct Found {
    pub(super) tokens: Tokens,
    pub(super) start: usize,
    pub(super) index_end: usize,
    pub(super) align: usize,
}

/// A list of names with its markers.
pub(super) struct Names {
    pub(super) range: Range<usize>,
    pub(super) count: usize,
    pub(super) markers_end: usize,
}

/// The one way to read a symbol table out of `region`.
pub(super) fn find(region: &Region<'_>) -> Result<Tables, SymbolsError> {
    let mut budget = Budget(256 << 20);
    let mut reason = SymbolsError::NoTokens;
    let mut readings: Vec<Tables> = Vec::new();
    for digits in memchr::memmem::find_iter(region.bytes, DIGITS) {
        for found in token_tables(region, digits, &mut budget)? {
            if matches!(reason, SymbolsError::NoTokens) {
                reason = SymbolsError::NoNames {
                    tokens: region.address(found.start),
                };
            }
            for names in name_tables(region, &found, &mut budget)? {
                reason = SymbolsError::NoAddresses {
                    names: region.address(names.range.start),
                    count: u32::try_from(names.count).unwrap_or(u32::MAX),
                };
                budget.spend(names.count)?;
                let Some(text) = text_symbol(region, &found.tokens, &names) else {
                    continue;
                };
                for tables in addresses::readings(region, &found, &names) {
                    budget.spend(names.count)?;
                    let known = readings.iter().any(|known| {
                        known.names == tables.names
                            && known.offsets == tables.offsets
                            && known.format.offsets == tables.format.offsets
                    });
                    if !known && addresses::plausible(region, &tables, text) {
                        readings.push(addresses::finished(region, tables));
                    }
                }
            }
        }
    }
    match readings.len() {
        0 => Err(reason),
        1 => readings.pop().ok_or(reason),
        readings => Err(SymbolsError::Ambiguous { readings }),
    }
}

/// Token tables whose digits are at `digits` and which the index confirms, for both alignments.
fn token_tables(
    region: &Region<'_>,
    digits: usize,
    budget: &mut Budget,
) -> Result<Vec<Found>, SymbolsError> {
    let mut first = digits;
    let mut second = digits;
    for _ in 0..BEFORE_DIGITS {
        second = first;
        // The byte before a token is the end of the one before it.
        let Some(end) = first
            .checked_sub(1)
            .filter(|&end| region.bytes.get(end) == Some(&0))
        else {
            return Ok(Vec::new());
        };
        let before = region
            .bytes
            .get(end.saturating_sub(MAX_TOKEN)..end)
            .unwrap_or_default();
        let len = before
            .iter()
            .rev()
            .position(|&byte| byte == 0)
            .unwrap_or(before.len());
        budget.spend(len + 1)?;
        first = end - len;
    }
    // Without padding in front, what is before the first token looks like a part of it.
    let mut found = Vec::new();
    for start in first..second {
        for align in [8, 4] {
            if !region.aligned(start, align) {
                continue;
            }
            budget.spend(Tokens::COUNT * 8)?;
            let rest = region.bytes.get(start..).unwrap_or_default();
            let Some((tokens, offsets, len)) = Tokens::read(rest) else {
                continue;
            };
            let index = region.up(start + len, align);
            let index_end = index + Tokens::COUNT * 2;
            let Some(raw) = region.bytes.get(index..index_end) else {
                continue;
            };
            if offsets
                .iter()
                .flat_map(|offset| offset.to_le_bytes())
                .eq(raw.iter().copied())
            {
                found.push(Found {
                    tokens,
                    start,
                    index_end,
                    align,
                });
            }
        }
    }
    Ok(found)
}

/// Lists of names in front of a token table whose markers fit them.
fn name_tables(
    region: &Region<'_>,
    found: &Found,
    budget: &mut Budget,
) -> Result<Vec<Names>, SymbolsError> {
    let align = found.align;
    // Between the markers and the tokens there may be the names' order, 3 bytes for each symbol.
    let reach = 3 * MAX_SYMBOLS + 4 * MAX_SYMBOLS / MARKER_STEP + 2 * align;
    let lowest = region.up(found.start.saturating_sub(reach), align);
    let mut lists = Vec::new();
    budget.spend((found.start - lowest.min(found.start)) / align)?;
    let mut at = lowest;
    while at < found.start {
        let step = region
            .word(at)
            .filter(|&first| first == 0)
            .and(region.word(at + 4));
        if !step.is_some_and(|step| MARKER_GAP.contains(&step)) {
            at += align;
            continue;
        }
        let run = marker_run(region, at, found.start);
        // What comes behind the markers may look like one more.
        for len in (run.len().saturating_sub(2)..=run.len()).rev() {
            let markers = run.get(..len).unwrap_or_default();
            let behind = found.start - (at + 4 * len);
            if markers.len() >= 2 && leads_up(len, behind, align) {
                lists.extend(names_before(region, at, markers, align, budget)?);
            }
        }
        budget.spend(run.len())?;
        at += align;
    }
    Ok(lists)
}

/// Whether `len` markers can be followed by a token table after `gap` bytes: directly, or with
/// three bytes for each symbol between.
fn leads_up(len: usize, gap: usize, align: usize) -> bool {
    let fewest = 3 * ((len - 1) * MARKER_STEP + 1);
    let most = 3 * len * MARKER_STEP + 2 * align;
    gap < align || (fewest..=most).contains(&gap)
}

/// The markers that could start at `at`: 0, then rising in believable steps.
fn marker_run(region: &Region<'_>, at: usize, end: usize) -> Vec<u32> {
    let mut run = Vec::new();
    let mut place = at;
    while place + 4 <= end {
        let Some(word) = region.word(place) else {
            break;
        };
        let fits = match run.last() {
            None => word == 0,
            Some(&last) => word
                .checked_sub(last)
                .is_some_and(|gap| MARKER_GAP.contains(&gap)),
        };
        if !fits {
            break;
        }
        run.push(word);
        place += 4;
    }
    run
}

/// The lists of names that end where `markers` start and that every marker fits.
fn names_before(
    region: &Region<'_>,
    markers_at: usize,
    markers: &[u32],
    align: usize,
    budget: &mut Budget,
) -> Result<Vec<Names>, SymbolsError> {
    let last = markers.last().map_or(0, |&last| last as usize);
    let fewest = (markers.len() - 1) * MARKER_STEP + 1;
    let most = markers.len() * MARKER_STEP;
    let Some(highest) = markers_at.checked_sub(last + 1) else {
        return Ok(Vec::new());
    };
    let lowest = highest.saturating_sub(*MARKER_GAP.end() as usize + align);
    let mut lists = Vec::new();
    let mut start = region.up(lowest, align);
    while start <= highest {
        let count = start.checked_sub(align).and_then(|at| region.word(at));
        let count = count.map_or(0, |count| count as usize);
        if (fewest..=most).contains(&count) && count <= MAX_SYMBOLS {
            let bytes = region.bytes.get(start..markers_at).unwrap_or_default();
            if let Some(len) = walk(bytes, markers, count, budget)? {
                if region.up(start + len, align) == markers_at {
                    lists.push(Names {
                        range: start..start + len,
                        count,
                        markers_end: markers_at + 4 * markers.len(),
                    });
                }
            }
        }
        budget.spend(1)?;
        start += align;
    }
    Ok(lists)
}

/// The length of `count` names, when they are where the markers say.
fn walk(
    bytes: &[u8],
    markers: &[u32],
    count: usize,
    budget: &mut Budget,
) -> Result<Option<usize>, SymbolsError> {
    let mut at = 0;
    for index in 0..count {
        if index % MARKER_STEP == 0 {
            budget.spend(MARKER_STEP)?;
            if markers
                .get(index / MARKER_STEP)
                .map(|&marker| marker as usize)
                != Some(at)
            {
                return Ok(None);
            }
        }
        match names::entry(bytes, at) {
            Some((_, next)) => at = next,
            None => return Ok(None),
        }
    }
    Ok(Some(at))
}

/// The number of the symbol `_text`, or of `_stext`, which is at the same address on x86-64.
fn text_symbol(region: &Region<'_>, tokens: &Tokens, names: &Names) -> Option<usize> {
    let bytes = region.bytes.get(names.range.clone())?;
    let mut name = Vec::new();
    let mut at = 0;
    for index in 0..names.count {
        let (entry, next) = names::entry(bytes, at)?;
        names::expand(tokens, entry, &mut name);
        if matches!(name.get(1..), Some(b"_text" | b"_stext")) {
            return Some(index);
        }
        at = next;
    }
    None
}
