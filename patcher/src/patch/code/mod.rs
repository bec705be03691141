//! New code: machine code as it stands, or a relocatable object, ready to be placed in the arena.
//!
//! What comes in is untrusted. Everything that can be decided without knowing where the code will
//! live is decided here, before the guest is stopped; [`link()`] then only adds addresses.
//!
//! Not supported, and refused by name: whatever the guest's kernel would have to know about, such
//! as exception tables, alternatives, jump labels, static calls, bug entries and per-CPU variables
//! of the object's own. A fault in arena code is a fault in the guest's kernel.

mod elf;
mod keep;
mod link;

use std::ops::Range;

use crate::guest::LinkAddr;
use crate::probe::Needs;

pub use elf::ObjectError;
pub use link::LinkError;
pub(crate) use link::{Placed, ReturnSites, link};

/// Which of the two blocks of the arena something is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Part {
    /// Instructions and read-only data: the guest cannot write it.
    Code,
    /// Writable data: never executable.
    Data,
}

/// Where a symbol of the guest's kernel is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resolved {
    /// At a link address, moved by the slide.
    Linked(LinkAddr),
    /// At the same value whatever the slide: per-CPU variables before 6.15.
    Absolute(u64),
}

/// What a relocation refers to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Target {
    Own(Part, u64),
    Kernel(Resolved),
    /// The jump that stands for a return, which the running kernel may have replaced everywhere.
    Return(Resolved),
}

/// How a relocation is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Width {
    Absolute64,
    Unsigned32,
    Signed32,
    Relative32,
    Relative64,
}

/// One relocation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Fixup {
    pub(crate) part: Part,
    pub(crate) offset: usize,
    pub(crate) width: Width,
    pub(crate) target: Target,
    pub(crate) addend: i64,
}

/// A function of an object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) offset: u64,
    pub(crate) global: bool,
}

/// Code that can be placed in the arena.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Code {
    /// What goes into the code block.
    pub(crate) text: Vec<u8>,
    pub(crate) text_align: u64,
    /// Which parts of `text` are instructions.
    pub(crate) instructions: Vec<Range<usize>>,
    /// What goes into the data block.
    pub(crate) data: Vec<u8>,
    pub(crate) data_align: u64,
    pub(crate) fixups: Vec<Fixup>,
    pub(crate) functions: Vec<Function>,
    /// What it says that it needs of the place where it is called.
    pub(crate) needs: Needs,
    /// Wherever it calls anything, its frame pointer leads to the frame below.
    pub(crate) keeps_frames: bool,
    /// Why it may never be freed, when it may not.
    pub(crate) keep: Option<String>,
}

impl Code {
    /// Machine code that runs wherever it is placed, from its first byte.
    ///
    /// # Errors
    /// [`ObjectError::Empty`] or [`ObjectError::TooLarge`].
    pub fn raw(bytes: &[u8]) -> Result<Self, ObjectError> {
        if bytes.is_empty() {
            return Err(ObjectError::Empty);
        }
        if bytes.len() > elf::MAX_CODE {
            return Err(ObjectError::TooLarge { size: bytes.len() });
        }
        let mut code = Self {
            text: bytes.to_vec(),
            text_align: 16,
            instructions: std::iter::once(0..bytes.len()).collect(),
            data: Vec::new(),
            data_align: 16,
            fixups: Vec::new(),
            functions: vec![Function {
                name: String::new(),
                offset: 0,
                global: true,
            }],
            needs: Needs::default(),
            keeps_frames: false,
            keep: None,
        };
        code.keep = keep::reason(&code);
        Ok(code)
    }

    /// A relocatable x86-64 ELF object. `resolve` finds the symbols that it does not define.
    ///
    /// # Errors
    /// [`ObjectError`] names the section, symbol or relocation that stands in the way.
    pub fn object(
        file: &[u8],
        resolve: &dyn Fn(&str) -> Result<Resolved, String>,
    ) -> Result<Self, ObjectError> {
        let mut code = elf::parse(file, resolve)?;
        code.keep = keep::reason(&code);
        Ok(code)
    }

    /// Whether it can come to a probe while it runs: it calls or jumps to code that is not its own.
    pub(crate) fn nests(&self) -> bool {
        keep::leaves(self)
    }

    /// Where the function to jump to begins: the one that is named, else the one called
    /// `replaced`, else the only global one.
    ///
    /// # Errors
    /// [`ObjectError::NoEntry`] lists the functions that there are.
    pub(crate) fn entry(&self, name: Option<&str>, replaced: &str) -> Result<u64, ObjectError> {
        let find = |wanted: &str| self.functions.iter().find(|f| f.name == wanted);
        let mut globals = self.functions.iter().filter(|f| f.global);
        let found = match name {
            Some(name) => find(name),
            None => find(replaced).or_else(|| match (globals.next(), globals.next()) {
                (Some(only), None) => Some(only),
                _ => None,
            }),
        };
        found.map(|f| f.offset).ok_or_else(|| ObjectError::NoEntry {
            wanted: name.unwrap_or(replaced).to_owned(),
            functions: self
                .functions
                .iter()
                .map(|f| f.name.as_str())
                .collect::<Vec<_>>()
                .join(", "),
        })
    }
}

#[cfg(test)]
mod tests;
