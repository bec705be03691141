//! The `stillpoint` binary: `stillpoint run` is the VMM, everything else is its client.

use std::process::ExitCode;

use clap::Parser;
use vmm::cli::args::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.command {
        Command::Run(mut args) => {
            args.control = cli.control;
            vmm::cli::run::main(*args)
        }
        Command::Client(command) => vmm::cli::client::main(cli.control, cli.json, command),
    }
}
