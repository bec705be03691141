//! Probes: code in the arena that runs whenever a site of the kernel is reached.
//!
//! The instructions that a jump takes the place of are moved into the trampoline ([`displace`]),
//! between what the probe does and the jump back ([`trampoline`]). Guaranteed: registers, flags and
//! the stack are as they would be without the probe, for every instruction that is moved; what
//! cannot be moved is refused by name. Moved code holds no return address of its own: a call is
//! made to return to where it stood. Only a trampoline that waits for a function's return calls what is
//! left of the function, in a frame that unwinders get through ([`returning`]).
//!
//! A breakpoint has the same for one instruction ([`aside`]): whoever is not to stop there runs it
//! elsewhere.

mod acts;
mod aside;
mod asm;
mod callback;
mod displace;
mod errand;
mod order;
mod returning;
mod section;
mod trampoline;

pub(crate) use aside::{OPEN, aside, spin};
pub(crate) use asm::PerCpu;
pub use callback::{Comparison, Needs, Predicate, PredicateError, Register, UnknownRegister};
pub use displace::DisplaceError;
pub(crate) use displace::{Displaced, displace};
pub(crate) use errand::{Call, Errand, errand_data, return_now};
pub use order::index;
pub(crate) use returning::Returning;
pub use trampoline::When;
pub(crate) use trampoline::{
    Act, Action, BUCKETS, Plan, RECORD, RECORDED, UNFINISHED, Variables, data, trampoline,
};
