//! `probes`: instructions that a hit of a probe adds, beside what the guest's own tracers add to the
//! same function of the same guest.
//!
//! Under icount only: there the time stamp counter counts instructions. A module calls the function
//! in a loop (guest-images/modules/probe_cost.c); what the same loop takes without a probe is
//! subtracted. What a trap, a cache miss or a mispredicted branch costs on hardware is not in it.

use std::fs;

use super::cost::{Attached, ROWS, Row};
use super::errand::{self, Clock};
use super::peer::Files;
use super::stats::cell;
use super::{Finding, KERNEL, Work};
use crate::{Failure, TestResult, cpio, needs};

/// Probes elsewhere, in the second half.
pub(super) const ELSEWHERE: usize = 1000;

/// Rows that do the same work: ours, and theirs.
const PAIRS: [(&str, &str); 3] = [
    ("entry, callback, no registers", "ftrace"),
    ("entry, callback", "ftrace, registers"),
    ("body, callback", "kprobe, optimised"),
];

/// What a hit adds.
#[derive(Clone, Copy, Debug)]
struct Added {
    row: usize,
    elsewhere: usize,
    instructions: f64,
    /// Flags and registers are as without it.
    kept: bool,
}

pub(super) fn run() -> TestResult {
    if !errand::in_lab()? {
        println!("probes: only where guests run in the lab, which can count instructions");
        return Ok(());
    }
    let files = files()?;
    let mut found = Vec::new();
    for attempt in 1..=errand::ICOUNT_TRIES {
        eprintln!("bench: 1 vCPU, icount: probes, machine {attempt}");
        found = errand::send(&files, Work::Probes, Clock::Icount)?;
        if found.iter().any(|finding| matches!(finding, Finding::End)) {
            break;
        }
    }
    let added = added(&found)?;
    println!("probes, 1 vCPU, icount: instructions that a hit adds");
    println!(
        "  {:<34} {:>9} {:>9} {:>22} {:>14}",
        "", "to reach", "added", "with 1,000 elsewhere", "flags kept"
    );
    for (index, row) in ROWS.iter().enumerate() {
        let of_row = |elsewhere| of(&added, index, elsewhere);
        let number = |elsewhere| cell(of_row(elsewhere).map(|added| added.instructions), 2);
        let most = row.most.map_or_else(String::new, |most| most.to_string());
        println!(
            "  {:<34} {most:>9} {:>9} {:>22} {:>14}",
            row.name,
            number(0),
            number(ELSEWHERE),
            of_row(0).map_or("-", |added| if added.kept { "yes" } else { "no" })
        );
    }
    println!("{}", last_line(&added)?);
    Ok(())
}

/// An initramfs with the module, too.
fn files() -> Result<Files, Failure> {
    let mut files = errand::files()?;
    let module = needs::build_module(KERNEL, "probe_cost")?;
    let bytes = cpio::with_files(&files.shell, &vec![("probe_cost.ko".into(), module)])?;
    let kernel = needs::kernel(KERNEL);
    let new = tempfile::NamedTempFile::new_in(&kernel)?;
    fs::write(new.path(), bytes)?;
    files.shell = kernel.join("probe-cost.cpio");
    new.persist(&files.shell).map_err(|error| error.error)?;
    Ok(files)
}

/// What was counted, less what the loop takes by itself.
///
/// # Errors
///
/// When a hit was not counted, or a probe of ours left something changed.
fn added(found: &[Finding]) -> Result<Vec<Added>, Failure> {
    let mut without = None;
    let mut all = Vec::new();
    for finding in found {
        let Finding::Hits {
            row,
            elsewhere,
            per_call,
            faithful,
            counted,
        } = *finding
        else {
            continue;
        };
        let name = ROWS.get(row).map(|row| row.name).unwrap_or_default();
        let ours = matches!(
            ROWS.get(row),
            Some(Row {
                attached: Attached::Ours { .. },
                ..
            })
        );
        if ours && !counted {
            return Err(Failure::new(format!("{name}: hits were not counted")));
        }
        if ours && !faithful {
            return Err(Failure::new(format!("{name}: flags or registers changed")));
        }
        let base = *without.get_or_insert(per_call);
        all.push(Added {
            row,
            elsewhere,
            instructions: per_call - base,
            kept: faithful,
        });
    }
    Ok(all)
}

fn of(added: &[Added], row: usize, elsewhere: usize) -> Option<Added> {
    let mut all = added.iter().copied();
    all.find(|added| added.row == row && added.elsewhere == elsewhere)
}

/// The smallest ratio of all pairs.
fn last_line(added: &[Added]) -> Result<String, Failure> {
    let by_name = |name: &str| {
        let row = ROWS.iter().position(|row| row.name == name)?;
        Some(of(added, row, 0)?.instructions)
    };
    let mut worst: Option<(f64, String)> = None;
    for (ours_name, theirs_name) in PAIRS {
        let (Some(ours), Some(theirs)) = (by_name(ours_name), by_name(theirs_name)) else {
            return Err(Failure::new(format!("{ours_name} could not be measured")));
        };
        let ratio = theirs / ours;
        if worst.as_ref().is_none_or(|(least, _)| ratio < *least) {
            let text = format!(
                "probes: ratio {ratio:.2} (ours {ours:.1} instructions, theirs {theirs:.1}: \
                 {ours_name} against {theirs_name}, the least of {} pairs)",
                PAIRS.len()
            );
            worst = Some((ratio, text));
        }
    }
    worst
        .map(|(_, text)| text)
        .ok_or_else(|| Failure::new("nothing was measured"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hits(name: &str, elsewhere: usize, per_call: f64) -> Finding {
        Finding::Hits {
            row: ROWS.iter().position(|row| row.name == name).unwrap(),
            elsewhere,
            per_call,
            faithful: true,
            counted: true,
        }
    }

    #[test]
    fn the_last_line_tells_the_worst_pair() {
        let mut found = vec![hits("nothing", 0, 10.0)];
        for (ours, theirs) in PAIRS {
            found.push(hits(ours, 0, 20.0));
            found.push(hits(theirs, 0, 110.0));
        }
        found.push(hits("ftrace, registers", 1000, 30.0));
        let line = last_line(&added(&found).unwrap()).unwrap();
        assert!(line.starts_with("probes: ratio 10.00 (ours 10.0 instructions, theirs 100.0: "));
        let mut slow = found.clone();
        slow[1] = hits(PAIRS[0].0, 0, 30.0);
        let line = last_line(&added(&slow).unwrap()).unwrap();
        assert!(line.starts_with("probes: ratio 5.00 "), "{line}");
        assert!(last_line(&[]).is_err());
    }

    #[test]
    fn a_lost_hit_is_no_figure() {
        let mut found = [hits("nothing", 0, 10.0), hits(PAIRS[0].0, 0, 20.0)];
        if let Finding::Hits { counted, .. } = &mut found[1] {
            *counted = false;
        }
        assert!(added(&found).is_err());
    }
}
