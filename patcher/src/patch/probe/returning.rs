//! Whose return a probe can act at.
//!
//! The function must begin where the probe is and return to where it was called from, and it must be
//! known how much its callers put on the stack for it: that is what the kernel's own types tell.

use super::super::check::Check;
use super::super::function::Function;
use super::super::knowledge::Knowledge;
use super::super::module_text::ModuleText;
use super::super::{EntryId, PatchError, Patcher};
use super::PreparedProbe;
use super::site::Place;
use crate::arena::Slot;
use crate::guest::{Slide, StoppedGuest};
use crate::probe::{Returning, When, data};
use crate::text::{EntrySite, MAX_INSTRUCTION, NOP5, entry_site, leaves};

/// Functions that begin in one task and end in another, by how their names begin.
const SWITCHING: [&str; 2] = ["__switch_to", "ret_from_fork"];
/// Bytes in which the tracer's call begins: it may be behind an ENDBR64.
const ENTRY: u64 = 4 + 1;
/// No function of the kernel has half as many.
const MOST_STACK_WORDS: u32 = 64;

/// Why no probe can act at the return of a function.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReturnError {
    /// It is not where the function begins.
    #[error("a probe of its return is put where it begins: give its name alone")]
    NotItsEntry,
    /// It may not even be called.
    #[error(
        "it does not begin with the call of the kernel's tracer, as compiled functions do: what is on its \
         stack is not known; probe where it begins, or the function that calls it"
    )]
    NotTraced,
    /// Its stack is another one when it returns.
    #[error("it begins in one task and returns in another; probe the function that calls it")]
    Switches,
    /// There is no way out of it.
    #[error("it has no return in it; probe where it begins")]
    NeverReturns,
    /// What is on the stack is not known.
    #[error(
        "how many arguments it has on the stack is not known ({why}); say with stack-words how many \
         8-byte words they may have, which is 0 for up to six plain arguments"
    )]
    UnknownArguments {
        /// What the types lack.
        why: String,
    },
    /// Nobody would need that many.
    #[error(
        "{words} words of arguments on the stack are too many; at most {MOST_STACK_WORDS} are copied"
    )]
    TooManyWords {
        /// As they were given.
        words: u32,
    },
}

/// What there is to know of `function` to act at its return. `told` is what somebody says of its
/// arguments. A function of the kernel is looked up in its file, and needs no guest; `check` is for one
/// of a module.
pub(super) fn returning(
    know: &Knowledge,
    function: &Function,
    check: Option<&Check<'_>>,
    told: Option<u32>,
) -> Result<Returning, PatchError> {
    let refuse = |why| PatchError::Return {
        function: function.name.clone(),
        why,
    };
    let slide = check.map_or(Slide(0), |check| check.located.slide);
    let subject = match (&function.module, check) {
        (Some(text), Some(check)) => Subject::Module(check, text),
        _ => Subject::Kernel(know, slide),
    };
    let names = subject.names(function);
    let switches = |name: &String| SWITCHING.iter().any(|start| name.starts_with(start));
    if names.iter().any(switches) {
        return Err(refuse(ReturnError::Switches));
    }
    if !subject.is_traced(function)? {
        return Err(refuse(ReturnError::NotTraced));
    }
    let stack_words = match told {
        Some(words) => words,
        None => subject
            .stack_words(&names)
            .map_err(|why| refuse(ReturnError::UnknownArguments { why }))?,
    };
    if !subject.comes_back(&know.parts(function, slide))? {
        return Err(refuse(ReturnError::NeverReturns));
    }
    if stack_words > MOST_STACK_WORDS {
        return Err(refuse(ReturnError::TooManyWords { words: stack_words }));
    }
    Ok(Returning {
        stack_words,
        thunk: know.resolve("__x86_return_thunk").ok(),
    })
}

impl PreparedProbe {
    /// What it needs to know of the return of `function`, when it acts there.
    pub(super) fn returning_from(
        &self,
        check: &Check<'_>,
        function: &Function,
        place: &Place,
    ) -> Result<Option<Returning>, PatchError> {
        match (self.when, self.returning) {
            (When::Reached, _) => Ok(None),
            (When::Returned, _) if !place.entry => Err(PatchError::Return {
                function: function.name.clone(),
                why: ReturnError::NotItsEntry,
            }),
            (When::Returned, Some(known)) => Ok(Some(known)),
            (When::Returned, None) => {
                returning(check.know, function, Some(check), self.stack_words).map(Some)
            }
        }
    }
}

/// Whose function it is, and what tells of it.
enum Subject<'a> {
    /// The kernel's: its file does. The boot has moved it, and adds no way out of it.
    Kernel(&'a Knowledge, Slide),
    /// A module's: the guest does.
    Module(&'a Check<'a>, &'a ModuleText),
}

impl Subject<'_> {
    /// All names of a function.
    fn names(&self, function: &Function) -> Vec<String> {
        let mut names: Vec<_> = match self {
            Self::Kernel(know, slide) => {
                let symbols = know.kernel.symbols();
                let all = symbols.functions_from(function.start.linked(*slide));
                all.map(|symbol| symbol.name()).collect()
            }
            Self::Module(..) => Vec::new(),
        };
        if names.is_empty() {
            names.push(function.name.clone());
        }
        names
    }

    /// It was compiled to be traced: it begins with a call of `__fentry__`, which the kernel takes out
    /// and keeps a record of. Functions in assembly and parts that the compiler has split off do not.
    fn is_traced(&self, function: &Function) -> Result<bool, PatchError> {
        match self {
            Self::Kernel(know, slide) => {
                let image = know.kernel.image();
                let longest = MAX_INSTRUCTION + NOP5.len();
                let code = image.read(function.start.linked(*slide), longest);
                let tracer = know.kernel.symbols().address("__fentry__");
                let (Some(code), Ok(tracer)) = (code, tracer) else {
                    return Ok(false);
                };
                let start = function.start;
                let (EntrySite::Nop(at) | EntrySite::Other(at)) = entry_site(start, code);
                let call = code.get(at..).unwrap_or_default();
                Ok(match call {
                    [0xe8, a, b, c, d, ..] => {
                        let distance = i32::from_le_bytes([*a, *b, *c, *d]);
                        let behind = start.offset((at + NOP5.len()) as u64);
                        behind.displace(distance.into()) == tracer.at(*slide)
                    }
                    _ => false,
                })
            }
            Self::Module(check, _) => {
                let Some(ftrace) = &check.know.ftrace else {
                    return Ok(false);
                };
                let space = check.located.space(&check.guest);
                let record = ftrace.find(&space, check.located, function.start, ENTRY)?;
                Ok(record.is_some())
            }
        }
    }

    /// There is a way out of it.
    fn comes_back(&self, parts: &[Function]) -> Result<bool, PatchError> {
        let within: Vec<_> = parts.iter().map(|part| part.start..part.end()).collect();
        for part in parts {
            let back = match self {
                Self::Kernel(know, slide) => {
                    let len = usize::try_from(part.size).unwrap_or(usize::MAX);
                    let code = know.kernel.image().read(part.start.linked(*slide), len);
                    code.is_some_and(|code| leaves(part.start, code, &within))
                }
                Self::Module(check, _) => {
                    let code = check.code(part, part.end())?;
                    let len = usize::try_from(part.size).unwrap_or(usize::MAX);
                    leaves(part.start, code.get(..len).unwrap_or(&code), &within)
                }
            };
            if back {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Words of arguments on the stack, by the types of whichever of its names there are types for.
    fn stack_words(&self, names: &[String]) -> Result<u32, String> {
        let space;
        let (types, count): (_, &dyn Fn(&str) -> usize) = match self {
            Self::Kernel(know, _) => (know.kernel.types(), &|name: &str| {
                let symbols = know.kernel.symbols().named(name);
                symbols.filter(|one| one.is_function()).count()
            }),
            Self::Module(check, text) => {
                space = check.located.space(&check.guest);
                (text.types(check.know, &space)?, &|name| {
                    text.functions(name)
                })
            }
        };
        let mut most = None;
        let mut why = String::new();
        for name in names {
            // The types have one function of each name.
            if count(name) > 1 {
                why = format!("there are several functions called {name}");
                continue;
            }
            match types.calling(name) {
                Ok(calling) if calling.variadic => {
                    return Err("their number varies".into());
                }
                Ok(calling) => most = most.max(Some(calling.stack_words)),
                Err(_) if most.is_some() => {}
                Err(error) => why = error.to_string(),
            }
        }
        let words = most.ok_or(why)?;
        Ok(u32::try_from(words).unwrap_or(u32::MAX))
    }
}

impl Patcher {
    /// Whoever is in the function returns without what the probes of a site do; or only one of them.
    /// `out` is false to take that back.
    pub(in super::super) fn set_out(
        &self,
        guest: &mut dyn StoppedGuest,
        change: EntryId,
        only: Option<EntryId>,
        out: bool,
    ) -> Result<(), PatchError> {
        let Some(site) = self.sites.get(&change) else {
            return Ok(());
        };
        let all = site.attached.iter();
        let waiting = all.filter(|probe| probe.act.when == When::Returned);
        for probe in waiting.filter(|probe| only.is_none_or(|only| only == probe.id)) {
            let word = Slot {
                at: probe.data.at.offset(data::OUT),
                len: 8,
            };
            let arena = self.arena_or_lost()?;
            arena.fill(guest, word, &u64::from(out).to_le_bytes())?;
        }
        Ok(())
    }
}
