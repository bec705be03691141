//! The command line: every command, option and value syntax that users type.
//!
//! The names here are relied on by scripts outside this repository: add to them freely, change one
//! only with a good reason. Wrong usage ends with exit status 2 before anything has happened.

mod probes;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use super::bounds::BoundsArgs;
use super::run::RunArgs;
use super::values::{Deadline, HexBytes, Site};
pub use probes::{CallbackOptions, ProbeCommand, ReturnOptions, TracepointCommand};

/// A virtual machine monitor that live-patches the kernel of the Linux guest it runs.
#[derive(Parser, Debug)]
#[command(name = "stillpoint", version, disable_help_subcommand = true)]
#[command(
    after_help = "Exit status: 0 done; 1 refused or failed, nothing changed; 2 wrong usage; \
    3 deadline passed.\nOf `run`: 0 guest powered off; 1 could not start or ran into an error; \
    2 wrong usage; 4 guest panicked; 5 guest died of a triple fault."
)]
pub struct Cli {
    /// Control socket: `run` creates it, every other command talks to the VMM that listens there
    #[arg(long, short = 'c', global = true, value_name = "SOCKET")]
    pub control: Option<PathBuf>,

    /// Print JSON for programs instead of text for people
    #[arg(long, global = true)]
    pub json: bool,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Boot a Linux guest
    Run(Box<RunArgs>),
    /// Everything that is said to a running VMM.
    #[command(flatten)]
    Client(ClientCommand),
}

/// Commands to a running VMM.
#[derive(Subcommand, Debug)]
pub enum ClientCommand {
    /// Say what the guest is doing
    Status,
    /// Stop every vCPU until `resume`
    Pause {
        /// How long to wait for the vCPUs, such as 500ms or 5s
        #[arg(long, value_name = "TIME")]
        deadline: Option<Deadline>,
    },
    /// Let a paused guest go on
    Resume,
    /// Press the ACPI power button
    Powerdown,
    /// Reset the machine: it starts again from its kernel
    Reset,
    /// End the VMM
    Quit,
    /// Write guest memory and registers to an ELF core file; the guest stands still meanwhile
    Dump {
        /// File to write; it must not exist
        file: PathBuf,
        /// First guest-physical address to dump
        #[arg(long, value_name = "ADDRESS", value_parser = super::values::number, requires = "length")]
        begin: Option<u64>,
        /// Number of bytes to dump
        #[arg(long, value_name = "BYTES", value_parser = super::values::number, requires = "begin")]
        length: Option<u64>,
    },
    /// Print events as they happen, until the VMM ends
    Events,
    /// Say what a kernel or a memory dump is, or whether the running guest's kernel text is untouched
    Inspect(InspectArgs),
    /// Say which kernel the guest runs and where it is
    Kernel,
    /// Look up symbols of the guest kernel and its modules
    Symbols {
        /// Name, in which `*` and `?` match anything, or an address
        pattern: String,
        /// Only of this module; `vmlinux` is the kernel itself
        #[arg(long, value_name = "NAME")]
        module: Option<String>,
        /// Show at most so many
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
    },
    /// List the guest's tasks
    Tasks {
        /// Only this process with its threads, or this thread
        pid: Option<u32>,
    },
    /// List the modules of the guest kernel
    Modules,
    /// Show the stacks of the guest's tasks
    Stacks {
        /// Only of this task, or of all threads of this process
        pid: Option<u32>,
    },
    /// Say what each vCPU is doing
    Cpus,
    /// Change bytes of the guest kernel's text
    #[command(subcommand)]
    Text(TextCommand),
    /// Apply and revert patches of whole functions
    #[command(subcommand, hide = true)]
    Patch(PatchCommand),
    /// Count how often places in the guest kernel are reached
    #[command(subcommand)]
    Probe(ProbeCommand),
    /// Attach to and detach from the guest's own tracepoints
    #[command(subcommand, hide = true)]
    Tracepoint(TracepointCommand),
    /// List trampolines and what they wait for
    Trampolines,
    /// List what holds up grace periods
    Holdouts,
    /// Wait until nobody is in code that was taken out
    #[command(subcommand)]
    Gp(GpCommand),
    /// Hold and release single vCPUs
    #[command(subcommand)]
    Vcpu(VcpuCommand),
    /// Change bytes and functions in named steps, each in force for everybody before the next
    #[command(subcommand)]
    Steps(StepsCommand),
}

/// `inspect`.
#[derive(clap::Args, Debug)]
pub struct InspectArgs {
    /// A kernel (bzImage or vmlinux) or a memory dump; without it, the guest at the control socket
    pub file: Option<PathBuf>,
    /// The kernel of a memory dump
    #[arg(long, value_name = "FILE", requires = "file")]
    pub kernel: Option<PathBuf>,
    /// Of a kernel, only the functions whose names match, in which `*` and `?` match anything
    #[arg(
        long,
        value_name = "PATTERN",
        requires = "file",
        conflicts_with = "kernel"
    )]
    pub function: Option<String>,
    /// Of a memory dump, only these, separated by commas; without it, all but modules and stacks
    #[arg(long, value_name = "PARTS", value_delimiter = ',', requires = "kernel")]
    pub show: Vec<Part>,
    /// Of a memory dump, only this process with its threads, or this thread
    #[arg(long, value_name = "PID", requires = "kernel")]
    pub pid: Option<u32>,
    /// How far the dump is followed.
    #[command(flatten)]
    pub bounds: BoundsArgs,
}

/// A part of what a memory dump says.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// What each vCPU was doing
    Cpus,
    /// The tasks
    Tasks,
    /// The modules
    Modules,
    /// The stacks of the tasks
    Stacks,
    /// Whether the kernel's text is what the kernel makes of it
    Text,
}

/// `text`.
#[derive(Subcommand, Debug)]
pub enum TextCommand {
    /// Replace bytes at a site, if they are the expected ones
    Patch {
        /// `symbol`, `symbol+0x12`, `symbol@2+0x12`, `module:symbol` or an address
        site: Site,
        /// Bytes that must be there now
        #[arg(long, value_name = "HEX")]
        expect: HexBytes,
        /// Bytes to write, as many as expected
        #[arg(long, value_name = "HEX")]
        write: HexBytes,
        /// Allow a write that does not end on an instruction boundary
        #[arg(long)]
        force: bool,
        /// How long to try, such as 500ms or 5s
        #[arg(long, value_name = "TIME")]
        deadline: Option<Deadline>,
    },
    /// Put the bytes back that a patch or redirection replaced
    Revert {
        /// The number that `text patch`, `text redirect` or `text list` printed
        id: u64,
        /// How long to try, such as 500ms or 5s
        #[arg(long, value_name = "TIME")]
        deadline: Option<Deadline>,
    },
    /// Redirect a function at its entry to new code
    #[command(group(clap::ArgGroup::new("new-code").required(true).args(["object", "code"])))]
    Redirect {
        /// The function: `symbol`, `symbol@2`, `module:symbol` or an address
        site: Site,
        /// Relocatable ELF object that holds the new code
        #[arg(long, value_name = "FILE")]
        object: Option<PathBuf>,
        /// Machine code in hexadecimal, without relocations
        #[arg(long, value_name = "HEX", conflicts_with = "entry")]
        code: Option<HexBytes>,
        /// Symbol of the object at which the new code begins
        #[arg(long, value_name = "SYMBOL")]
        entry: Option<String>,
        /// How long to try, such as 500ms or 5s
        #[arg(long, value_name = "TIME")]
        deadline: Option<Deadline>,
    },
    /// List what is changed
    List,
}

/// `patch`.
#[derive(Subcommand, Debug)]
pub enum PatchCommand {
    /// Say whether a patch would go in, and change nothing
    Check {
        /// Patch module or bundle
        file: PathBuf,
    },
    /// Apply a patch: all of it or nothing
    Apply {
        /// Patch module or bundle
        file: PathBuf,
        /// How long to try, such as 500ms or 5s
        #[arg(long, value_name = "TIME")]
        deadline: Option<Deadline>,
    },
    /// Take a patch out again
    Revert {
        /// The patch
        id: String,
        /// How long to try, such as 500ms or 5s
        #[arg(long, value_name = "TIME")]
        deadline: Option<Deadline>,
    },
    /// List the patches that are in
    List,
    /// Show one patch in full
    Show {
        /// The patch
        id: String,
    },
}

/// `gp`.
#[derive(Subcommand, Debug)]
pub enum GpCommand {
    /// Print a cookie for the current state
    Snapshot,
    /// Say whether a full grace period has passed since
    Poll {
        /// What `gp snapshot` printed
        cookie: String,
    },
    /// Wait until a full grace period has passed since
    Wait {
        /// What `gp snapshot` printed
        cookie: String,
        /// How long to wait, such as 500ms or 5s
        #[arg(long, value_name = "TIME")]
        deadline: Option<Deadline>,
    },
}

/// `steps`.
#[derive(Subcommand, Debug)]
pub enum StepsCommand {
    /// Make all steps that FILE says, or none
    ///
    /// FILE holds JSON: {"steps": [{"name": "callers", "text": [{"site": "vfs_read+0x4", "expect":
    /// "0f1f440000", "write": "6690666690"}], "redirect": [{"site": "vfs_write", "object": "new.o"}]},
    /// ...]}, with either or both in a step; paths begin where FILE is. A step is made in one stop.
    /// Before the next step, everybody who was in a changed function then has to leave it once: `steps
    /// list` says who has not.
    Apply {
        /// The steps
        file: PathBuf,
        /// How long all of it may take; when it takes longer, what was made is taken back
        #[arg(long, value_name = "TIME")]
        deadline: Option<Deadline>,
    },
    /// Take steps back, the last first
    Revert {
        /// Their number, as `steps list` shows it
        id: u64,
        /// How long it may take
        #[arg(long, value_name = "TIME")]
        deadline: Option<Deadline>,
    },
    /// Have somebody's `steps apply` end that is under way, and what it has made taken back
    Cancel {
        /// Their number, as `steps list` shows it
        id: u64,
    },
    /// The steps that are made or being made
    List,
}

/// `vcpu`.
#[derive(Subcommand, Debug)]
pub enum VcpuCommand {
    /// Hold one vCPU while the others run on
    ///
    /// It does not enter the guest at all: whatever waits there for an answer of this vCPU waits
    /// until it is released. The guest's own watchdogs see that after some 10 to 20 seconds. Events
    /// tell when it is held (VCPU_HELD), when it goes on and why (VCPU_RELEASED), and when it did not
    /// get to the site (VCPU_NOT_REACHED).
    Hold {
        /// Its number
        index: u32,
        /// Hold it when it gets there, before the instruction at this site: `symbol`,
        /// `symbol+0x12`, `symbol@2+0x12` or an address
        #[arg(long, value_name = "SITE")]
        at: Option<Site>,
        /// Let it serve interrupts meanwhile: it waits in a loop, and goes on where it was
        #[arg(long)]
        soft: bool,
        /// Be done when it is set up, and do not wait until the vCPU gets there; the event VCPU_HELD
        /// tells
        #[arg(long, requires = "at")]
        no_wait: bool,
        /// How long the vCPU may take to get there, and then how long it is held before it is
        /// released: 10s unless said otherwise, 1h at most
        #[arg(long, value_name = "TIME")]
        deadline: Option<Deadline>,
    },
    /// Let a held vCPU go on, or do not hold it when it gets there
    Release {
        /// Its number
        index: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_control_socket_may_come_before_and_after_the_command() {
        for line in [
            "stillpoint -c vm.sock status",
            "stillpoint status --control vm.sock",
            "stillpoint --control=vm.sock status --json",
        ] {
            let cli = parse(line).unwrap_or_else(|e| panic!("{line}: {e}"));
            assert_eq!(cli.control, Some(PathBuf::from("vm.sock")), "{line}");
            assert!(matches!(
                cli.command,
                Command::Client(ClientCommand::Status)
            ));
        }
    }

    #[test]
    fn run_takes_what_the_documentation_shows() {
        let cli = parse(
            "stillpoint run --kernel vmlinuz --initrd initrd.img --cpus 2 --memory 512M \
             --control vm.sock --serial unix:/tmp/tty --no-reboot --cmdline console=ttyS0",
        )
        .unwrap_or_else(|e| panic!("{e}"));
        let Command::Run(run) = cli.command else {
            panic!("not run");
        };
        assert_eq!(cli.control, Some(PathBuf::from("vm.sock")));
        assert_eq!((run.cpus, run.memory), (2, 512 << 20));
        assert!(run.no_reboot);
    }

    #[test]
    fn text_commands_parse() {
        let cli = parse(
            "stillpoint -c s text patch version_proc_show+0x4 --expect e8:00:00:00:00 --write 0x0f1f440000",
        )
        .unwrap_or_else(|e| panic!("{e}"));
        let Command::Client(ClientCommand::Text(TextCommand::Patch { expect, write, .. })) =
            cli.command
        else {
            panic!("not text patch");
        };
        assert_eq!(expect.0, [0xe8, 0, 0, 0, 0]);
        assert_eq!(write.0, [0x0f, 0x1f, 0x44, 0, 0]);

        assert!(parse("stillpoint -c s text redirect f").is_err());
        assert!(parse("stillpoint -c s text redirect f --code c3 --object a.o").is_err());
        assert!(parse("stillpoint -c s text redirect f --object a.o --entry g").is_ok());
    }

    #[test]
    fn wrong_usage_is_exit_status_2() {
        for line in [
            "stillpoint",
            "stillpoint frobnicate",
            "stillpoint run",
            "stillpoint run --kernel k --memory lots",
            "stillpoint run --kernel k --serial carrier-pigeon",
            "stillpoint -c s dump f --begin 4096",
            "stillpoint -c s text patch f --expect 9 --write 90",
        ] {
            let error = parse(line).err().unwrap_or_else(|| panic!("{line} parses"));
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
