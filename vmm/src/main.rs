//! The `stillpoint` binary: `stillpoint run` is the VMM, everything else is its client.

use std::process::ExitCode;

use clap::Parser;
use vmm::cli::args::{Cli, Command};

fn main() -> ExitCode {
    #[cfg(feature = "broken-rules")]
    if let Err(error) = broken::leave_out() {
        eprintln!("stillpoint: {error}");
        return ExitCode::from(2);
    }
    let cli = Cli::parse();
    match cli.command {
        Command::Run(mut args) => {
            args.control = cli.control;
            vmm::cli::run::main(*args)
        }
        Command::Client(command) => vmm::cli::client::main(cli.control, cli.json, command),
    }
}

/// For tests of what rules are for; in no release.
#[cfg(feature = "broken-rules")]
mod broken {
    /// Names rules that are not to hold, separated by commas.
    const SWITCH: &str = "STILLPOINT_WITHOUT_RULES";

    pub(super) fn leave_out() -> Result<(), String> {
        match std::env::var(SWITCH) {
            Ok(names) => patcher::rules::leave_out(&names),
            Err(_) => Ok(()),
        }
    }
}
