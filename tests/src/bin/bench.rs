//! What `scripts/bench` runs.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use stillpoint_tests::bench;

#[derive(Parser)]
#[command(about = "Measures Stillpoint beside QEMU")]
struct Options {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Measure; the last line of each is its ratio
    Run {
        /// Samples of each VMM in real time
        #[arg(long, default_value_t = 7)]
        rounds: u32,
        /// boot, stop, grace or probes; all when none is named
        names: Vec<String>,
    },
    /// Carry out a plan where guests can run (started by `run`)
    #[command(hide = true)]
    CarryOut { plan: String },
}

fn main() -> ExitCode {
    let done = match Options::parse().verb {
        Verb::Run { rounds, names } => {
            let names = if names.is_empty() {
                bench::NAMES.map(str::to_owned).to_vec()
            } else {
                names
            };
            names.iter().try_for_each(|name| bench::run(name, rounds))
        }
        Verb::CarryOut { plan } => bench::carry_out(&plan),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("bench: {failure}");
            ExitCode::FAILURE
        }
    }
}
