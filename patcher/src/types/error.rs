//! Why there is no type information, or not the piece that was asked for.

/// What went wrong with type information.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TypeError {
    /// The kernel was built without CONFIG_DEBUG_INFO_BTF.
    #[error("the kernel carries no type information (.BTF); it needs CONFIG_DEBUG_INFO_BTF=y")]
    Missing,
    /// The data do not start as BTF does, or in a version that is not known.
    #[error("not BTF version 1 (magic {magic:#x}, version {version})")]
    NotBtf {
        /// The first two bytes; BTF has 0xeb9f.
        magic: u16,
        /// The version byte.
        version: u8,
    },
    /// A part lies outside of the data.
    #[error("BTF is cut off: {what} at {at:#x} needs {need:#x} bytes of {have:#x}")]
    Truncated {
        /// The part.
        what: &'static str,
        /// Where it starts.
        at: usize,
        /// Where it would have to end at the least.
        need: usize,
        /// How much there is.
        have: usize,
    },
    /// A kind of type that is not known, so that its length is not either.
    #[error("BTF type {id} is of unknown kind {kind}; this kernel's BTF is newer than stillpoint")]
    UnknownKind {
        /// Number of the type.
        id: u32,
        /// Its kind.
        kind: u32,
    },
    /// The data contradict themselves.
    #[error("BTF type {id} is malformed: {what}")]
    Malformed {
        /// Number of the type.
        id: u32,
        /// What is wrong with it.
        what: &'static str,
    },
    /// No such type.
    #[error("this kernel has no type {name:?}")]
    NoType {
        /// As it was given.
        name: String,
    },
    /// The type has no such member.
    #[error("this kernel's {holder} has no member {member:?}")]
    NoMember {
        /// The type that was searched.
        holder: String,
        /// The member that was not found.
        member: String,
    },
    /// The path goes on where it cannot.
    #[error("{path:?} cannot go on after {at:?}, which is {what}")]
    NotHere {
        /// The whole path.
        path: String,
        /// The part of it that was followed.
        at: String,
        /// What is there.
        what: &'static str,
    },
    /// An array has fewer elements.
    #[error("{path:?} asks for element {index} of an array of {count}")]
    OutsideArray {
        /// The whole path.
        path: String,
        /// The element, counted from 0.
        index: u64,
        /// How many there are.
        count: u64,
    },
    /// Different types have this name, and they differ in what was asked for.
    #[error("this kernel has {count} different types {name:?}")]
    Ambiguous {
        /// As it was given.
        name: String,
        /// How many there are.
        count: usize,
    },
    /// Not a path.
    #[error("{path:?} is not the path of a member; write member, outer.inner or array[1].member")]
    BadPath {
        /// As it was given.
        path: String,
    },
}
