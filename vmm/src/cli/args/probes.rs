//! The command lines of `probe` and `tracepoint`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::cli::values::{self, Deadline, Site};

/// What a probe or a callback on a tracepoint does.
#[derive(Args, Debug)]
pub struct CallbackOptions {
    /// Call `stillpoint_callback`, or the only global function, of this relocatable object
    #[arg(long, value_name = "FILE", conflicts_with_all = ["histogram", "record"])]
    pub callback: Option<PathBuf>,
    /// Call this function of the object
    #[arg(long, value_name = "NAME", requires = "callback")]
    pub entry: Option<String>,
    /// The callback may sleep; it is skipped where it may not
    #[arg(long, requires = "callback")]
    pub may_sleep: bool,
    /// The callback uses RCU; it is skipped where RCU is not watching
    #[arg(long, requires = "callback")]
    pub needs_rcu: bool,
    /// The callback may run in a non-maskable interrupt; otherwise it is skipped there
    #[arg(long, requires = "callback")]
    pub nmi: bool,
    /// Count for each CPU how often this register has which magnitude
    #[arg(long, value_name = "REGISTER", conflicts_with = "record")]
    pub histogram: Option<String>,
    /// Keep records with up to four registers
    #[arg(long, value_name = "REGISTERS", value_delimiter = ',', num_args = 0..)]
    pub record: Option<Vec<String>>,
    /// How many records to keep
    #[arg(long, value_name = "N", requires = "record")]
    pub records: Option<u32>,
    /// Only where this holds, such as di==5 or si>=0x1000
    #[arg(long = "if", value_name = "COMPARISON")]
    pub only_if: Option<String>,
    /// Number that the callback is called with
    #[arg(long, value_name = "N", value_parser = values::number)]
    pub data: Option<u64>,
    /// Of several in one place, those of higher priority come first
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub priority: Option<i32>,
}

/// What a probe does when a function returns.
#[derive(Args, Debug, Default)]
pub struct ReturnOptions {
    /// Do it when the function returns that begins at the site; ax is what it returns
    #[arg(long = "return")]
    pub returned: bool,
    /// Count for each CPU how often the function took how many cycles of the time stamp counter
    #[arg(long, conflicts_with_all = ["histogram", "record", "callback"])]
    pub latency: bool,
    /// With --return or --latency: only where this held when the function was called
    #[arg(long, value_name = "COMPARISON")]
    pub if_called: Option<String>,
    /// With --return or --latency: the function has at most so many 8-byte words of arguments on the
    /// stack; needed where the kernel's types do not tell
    #[arg(long, value_name = "N")]
    pub stack_words: Option<u32>,
}

/// `probe`.
#[derive(Subcommand, Debug)]
pub enum ProbeCommand {
    /// Do something whenever a site is reached: the entry of a function, or any instruction in it
    ///
    /// Without more, it is counted. With --return it is done when the function returns that begins
    /// there: ax is what it returns, and sp is as at its entry. However many calls are in the function,
    /// recursive ones too, none is missed, because the trampoline calls the function as its caller did.
    /// So whoever is in the function, asleep or not, holds the trampoline up by name until he leaves;
    /// a probe that was taken out meanwhile does not act for him any more. The guest does not know that
    /// code: what its own /proc/PID/stack shows ends there, what its other backtraces print goes on with
    /// question marks, and its own livepatching waits for such a task. `stacks` goes on. Functions that
    /// never return, or return in another task, are refused.
    Attach {
        /// `symbol`, `symbol+0x12`, `symbol@2+0x12` or an address; several are one change
        #[arg(required = true)]
        sites: Vec<Site>,
        /// What it does
        #[command(flatten)]
        callback: Box<CallbackOptions>,
        /// When it does it
        #[command(flatten)]
        returns: ReturnOptions,
        /// Leave the site hooked when its last probe is taken out: its trampoline passes straight
        /// through then, and the next probe is attached sooner. `trampolines` shows such sites; `text
        /// revert` with the number of the change ends it
        #[arg(long)]
        permanent: bool,
        /// How long to try, such as 500ms or 5s
        #[arg(long, value_name = "TIME")]
        deadline: Option<Deadline>,
    },
    /// Take a probe out; its trampoline is freed when nobody is in it any more
    Detach {
        /// The number that `probe attach` or `probe list` printed; several are one change
        #[arg(required = true)]
        ids: Vec<u64>,
        /// How long to try, such as 500ms or 5s
        #[arg(long, value_name = "TIME")]
        deadline: Option<Deadline>,
    },
    /// List probes and their hits
    List,
    /// Show what a probe with `--histogram` or `--latency` has counted
    Histogram {
        /// Its number
        id: u64,
    },
    /// Show what a probe with `--record` has kept
    Records {
        /// Its number
        id: u64,
        /// Only records from this number on
        #[arg(long, value_name = "N")]
        since: Option<u64>,
    },
}

/// `tracepoint`.
#[derive(Subcommand, Debug)]
pub enum TracepointCommand {
    /// Do something whenever the guest comes by one of its tracepoints
    ///
    /// Registers are those of the call: si is the first argument of the tracepoint, then dx, cx, r8 and
    /// r9. Without more, it is counted.
    Attach {
        /// Name of the tracepoint
        name: String,
        /// What it does
        #[command(flatten)]
        callback: CallbackOptions,
        /// How long to try, such as 500ms or 5s
        #[arg(long, value_name = "TIME")]
        deadline: Option<Deadline>,
    },
    /// Detach a callback
    Detach {
        /// The number that `tracepoint attach` or `tracepoint list` printed
        id: u64,
        /// How long to try, such as 500ms or 5s
        #[arg(long, value_name = "TIME")]
        deadline: Option<Deadline>,
    },
    /// List tracepoints that have callbacks
    List,
}
