//! Counts what ran where, for `scripts/test` to print at its end.
//!
//! The file named by `STILLPOINT_TEST_TALLY` gets one line for each test (`native NAME`, `lab NAME
//! SECONDS`) and each machine that was lost (`lost ...`). Without the variable nothing is counted.

use std::fs::File;
use std::io::Write;

/// Adds a line.
pub fn note(line: &str) {
    let Some(path) = std::env::var_os("STILLPOINT_TEST_TALLY") else {
        return;
    };
    // One write of a short line to a file opened for appending: lines do not mix. A count that
    // cannot be kept shows as a missing one at the end of scripts/test, which fails then.
    if let Ok(mut file) = File::options().create(true).append(true).open(path) {
        let _ = file.write_all(format!("{line}\n").as_bytes());
    }
}
