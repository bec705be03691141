//! What a comparison says.

use std::collections::BTreeMap;
use std::fmt;

use crate::guest::Gva;
use crate::patch::{Bytes, EntryId};
use crate::space::{LayoutError, SpaceError};

/// Places that the kernel itself writes, by what writes them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// Words that KASLR changes.
    Relocation,
    /// Entries of functions, which ftrace may take.
    Fentry,
    /// ftrace's own calls in its trampolines.
    FtraceCall,
    /// Jump labels (static keys).
    JumpLabel,
    /// Static calls.
    StaticCall,
    /// The trampolines of static calls.
    StaticCallTrampoline,
    /// Calls through `pv_ops` (up to 6.7; alternatives since).
    Paravirt,
    /// Indirect calls and jumps.
    Retpoline,
    /// Calls that are counted, and the padding in which they are.
    CallDepth,
    /// Returns.
    Return,
    /// Code chosen by the CPU's features.
    Alternative,
    /// ENDBR of functions that are never called indirectly.
    Endbr,
    /// Lock prefixes.
    SmpLock,
    /// Values that are written into instructions once they are known.
    RuntimeConstant,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Relocation => "relocation",
            Self::Fentry => "function entry",
            Self::FtraceCall => "ftrace's own call",
            Self::JumpLabel => "jump label",
            Self::StaticCall => "static call",
            Self::StaticCallTrampoline => "static call trampoline",
            Self::Paravirt => "paravirt call",
            Self::Retpoline => "retpoline",
            Self::CallDepth => "counted call",
            Self::Return => "return",
            Self::Alternative => "alternative",
            Self::Endbr => "endbr",
            Self::SmpLock => "lock prefix",
            Self::RuntimeConstant => "runtime constant",
        })
    }
}

/// Who changed text, where the guest's own structures or our ledger tell.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Owner {
    /// A kprobe.
    Kprobe {
        /// Its function or address, as the guest has it.
        what: String,
    },
    /// A tracer of ftrace's.
    Ftrace {
        /// What is called.
        what: String,
    },
    /// A livepatch.
    Livepatch {
        /// The new function, where it is known.
        what: String,
    },
    /// A BPF trampoline.
    Bpf {
        /// Its name.
        what: String,
    },
    /// A change of our own.
    Ours {
        /// Its number in the ledger.
        id: EntryId,
    },
    /// Nobody that is known.
    Unknown,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kprobe { what } => write!(f, "kprobe {what}"),
            Self::Ftrace { what } => write!(f, "ftrace: {what}"),
            Self::Livepatch { what } => write!(f, "livepatch: {what}"),
            Self::Bpf { what } => write!(f, "BPF: {what}"),
            Self::Ours { id } => write!(f, "our change {id}"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

/// Bytes that are not what this kernel would have there.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Foreign {
    /// Where, in the guest.
    pub address: Gva,
    /// The same as function and offset.
    pub place: String,
    /// What the kernel would have there.
    pub expected: Bytes,
    /// What is there.
    pub found: Bytes,
    /// What kind of place it is, when the kernel itself writes there.
    pub site: Option<Class>,
    /// Whose it is.
    pub owner: Owner,
}

/// How much of one class there is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Count {
    /// Places in the text that was compared.
    pub sites: usize,
    /// Places that hold other bytes than the kernel's file.
    pub changed: usize,
}

/// A guest's text, explained.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Comparison {
    /// First byte that was compared.
    pub text: Gva,
    /// How many bytes were compared.
    pub len: u64,
    /// How many of them the boot and the guest changed and are explained.
    pub explained: u64,
    /// How many of them are foreign.
    pub foreign_bytes: u64,
    /// What explains the changes.
    pub sites: BTreeMap<Class, Count>,
    /// What is left, by address.
    pub foreign: Vec<Foreign>,
    /// There are more foreign ranges than are listed.
    pub truncated: bool,
    /// What could not be known, so that something foreign may be missing or wrongly named.
    pub doubts: Vec<String>,
}

impl Comparison {
    /// Everything is explained.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.foreign.is_empty() && self.doubts.is_empty()
    }
}

/// Why text could not be compared at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CompareError {
    /// The kernel's file lacks something.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Guest memory cannot be read.
    #[error("{what} cannot be read in the guest")]
    Read {
        /// What was wanted.
        what: &'static str,
        /// Why not.
        source: SpaceError,
    },
}
