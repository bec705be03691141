//! What unwinding a stack gives.

use std::fmt;

use crate::guest::Gva;
use crate::space::SpaceError;

/// The frames of one context, innermost first, and whether they are all.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trace {
    /// The frames. Those from [`Doubt::frame`] on may be wrong or missing.
    pub frames: Vec<Frame>,
    /// Whether they can be relied on.
    pub reliability: Reliability,
}

/// Whether a trace can be relied on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reliability {
    /// Every frame is there, and the stack was followed to its end.
    Reliable(End),
    /// It is not known what is on the stack.
    Unreliable(Doubt),
}

/// How a stack ended that was followed to its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// The registers with which user mode was left.
    UserMode,
    /// Code that has no callers: where a kernel thread or a CPU begins.
    Bottom,
    /// There is no stack any more: the task is dead, and its parent has not asked for it yet.
    NoStack,
}

/// Why a trace cannot be relied on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Doubt {
    /// Index of the first frame from which it was not clear how to go on; the number of frames
    /// when there is none.
    pub frame: usize,
    /// What was wrong.
    pub why: Why,
}

/// One frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame {
    /// Where execution goes on in this function.
    pub address: Gva,
    /// How it came to be there.
    pub kind: FrameKind,
    /// The stack that the address was found on.
    pub stack: StackKind,
    /// What was on the stack in place of the address, when a tracer had taken it away.
    pub repaired_from: Option<Gva>,
}

/// How a frame came to be where it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FrameKind {
    /// A vCPU executes it.
    Running,
    /// The task was switched away from here.
    Switched,
    /// It called the frame before.
    Called,
    /// An interrupt or exception came before this instruction, or in it.
    Interrupted,
}

/// The stacks of a kernel.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StackKind {
    /// A task's own.
    Task,
    /// A CPU's for device interrupts and what they leave to be done.
    Interrupt,
    /// A CPU's for double faults.
    DoubleFault,
    /// A CPU's for non-maskable interrupts.
    Nmi,
    /// A CPU's for breakpoints and single steps.
    Debug,
    /// A CPU's for machine checks.
    MachineCheck,
    /// A CPU's for what a confidential guest asks its hypervisor.
    VmmCommunication,
    /// Another of those.
    VmmCommunication2,
    /// A CPU's for the first instructions after user mode.
    Entry,
    /// None: the address was in a register.
    Register,
}

/// Why it is not known what is on a stack.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// The kernel's file has no table for it.
    #[error("the kernel's unwind tables cannot be used")]
    NoTables,
    /// A task that is being switched to or from, and no vCPU is on its stack.
    #[error("it is being switched to or from")]
    Switching,
    /// Its vCPU runs a guest of the guest.
    #[error("its vCPU runs a nested guest")]
    Nested,
    /// The saved stack pointer is not on the task's stack.
    #[error("its stack pointer {sp} is not on its stack")]
    WildStackPointer {
        /// The stack pointer.
        sp: Gva,
    },
    /// A stack cannot be read.
    #[error("its stack cannot be read")]
    Unreadable(#[source] SpaceError),
    /// What a frame says leads to no stack that it can be on, or back to one that was left.
    #[error("{at} is on no stack that it can be on")]
    OutsideStack {
        /// The address.
        at: Gva,
    },
    /// The next frame would be below the one before.
    #[error("the stack pointer goes back to {sp}")]
    Backwards {
        /// Where it goes to.
        sp: Gva,
    },
    /// Code that is neither the kernel's nor a module's nor known in any other way.
    #[error("{at} is in no code that is known")]
    UnknownCode {
        /// The address.
        at: Gva,
    },
    /// Code of a module whose unwind tables cannot be read.
    #[error("{at} is in a module whose unwind tables cannot be used")]
    NoModuleTables {
        /// The address.
        at: Gva,
    },
    /// Generated code: whether it keeps a frame pointer is not known.
    #[error("{at} is in generated code, which may not keep a frame pointer")]
    GeneratedCode {
        /// The address.
        at: Gva,
    },
    /// Code that the kernel's tables say nothing about: entry code and the like.
    #[error("nothing is known about the frame of {at}")]
    Undefined {
        /// The address.
        at: Gva,
    },
    /// The frame's size is in a register that was not saved.
    #[error("the frame of {at} depends on a register that is not known")]
    LostRegister {
        /// The address.
        at: Gva,
    },
    /// A tracer took the return address, and what it put in its place is not among those it keeps.
    #[error("the return address at {slot} was taken by a tracer and cannot be found")]
    LostReturn {
        /// Where on the stack.
        slot: Gva,
    },
    /// More frames than fit on a stack.
    #[error("there are more than {limit} frames")]
    TooDeep {
        /// The bound that was hit.
        limit: usize,
    },
}

impl Trace {
    /// A trace without frames.
    #[must_use]
    pub const fn empty(end: End) -> Self {
        Self {
            frames: Vec::new(),
            reliability: Reliability::Reliable(end),
        }
    }

    pub(super) const fn unknown(why: Why) -> Self {
        Self {
            frames: Vec::new(),
            reliability: Reliability::Unreliable(Doubt { frame: 0, why }),
        }
    }

    /// Every frame is there.
    #[must_use]
    pub const fn is_reliable(&self) -> bool {
        matches!(self.reliability, Reliability::Reliable(_))
    }

    /// Why it cannot be relied on.
    #[must_use]
    pub const fn doubt(&self) -> Option<&Doubt> {
        match &self.reliability {
            Reliability::Reliable(_) => None,
            Reliability::Unreliable(doubt) => Some(doubt),
        }
    }
}

impl Frame {
    /// An address in the instruction that the frame is at, and how many bytes behind it
    /// [`Frame::address`] is: a return address may be the first one of another function.
    pub(super) const fn instruction(&self) -> (Gva, u64) {
        let back = match self.kind {
            FrameKind::Called | FrameKind::Switched => 1,
            FrameKind::Running | FrameKind::Interrupted => 0,
        };
        (Gva(self.address.0.wrapping_sub(back)), back)
    }
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (frame {})", self.why, self.frame)?;
        if let Why::Unreadable(source) = &self.why {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl fmt::Display for StackKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Task => "task",
            Self::Interrupt => "interrupt",
            Self::DoubleFault => "double fault",
            Self::Nmi => "NMI",
            Self::Debug => "debug",
            Self::MachineCheck => "machine check",
            Self::VmmCommunication | Self::VmmCommunication2 => "VMM communication",
            Self::Entry => "entry",
            Self::Register => "register",
        })
    }
}
