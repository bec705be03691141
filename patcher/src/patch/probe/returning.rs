//! Whose return a probe can act at.
//!
//! The function must begin where the probe is and return to where it was called from, and it must be
//! known how much its callers put on the stack for it: that is what the kernel's own types tell.

use super::super::knowledge::{Function, Knowledge};
use super::super::{EntryId, PatchError, Patcher};
use super::PreparedProbe;
use super::site::Place;
use crate::arena::Slot;
use crate::guest::{Gva, StoppedGuest};
use crate::probe::{Returning, When, data};
use crate::text::{EntrySite, MAX_INSTRUCTION, NOP5, entry_site, leaves};

/// Functions that begin in one task and end in another, by how their names begin.
const SWITCHING: [&str; 2] = ["__switch_to", "ret_from_fork"];
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

/// What there is to know of `function` to act at its return, without a guest. `told` is what somebody
/// says of its arguments.
pub(super) fn returning(
    know: &Knowledge,
    function: &Function,
    told: Option<u32>,
) -> Result<Returning, PatchError> {
    let refuse = |why| PatchError::Return {
        function: function.name.clone(),
        why,
    };
    let names = names(know, function);
    let switches = |name: &String| SWITCHING.iter().any(|start| name.starts_with(start));
    if names.iter().any(switches) {
        return Err(refuse(ReturnError::Switches));
    }
    if !is_traced(know, function) {
        return Err(refuse(ReturnError::NotTraced));
    }
    let stack_words = match told {
        Some(words) => words,
        None => stack_words(know, &names)
            .map_err(|why| refuse(ReturnError::UnknownArguments { why }))?,
    };
    if !comes_back(know, function) {
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
        know: &Knowledge,
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
            (When::Returned, None) => returning(know, function, self.stack_words).map(Some),
        }
    }
}

/// There is a way out of it, in its file: the boot adds none.
fn comes_back(know: &Knowledge, function: &Function) -> bool {
    let parts = know.parts(function);
    let range = |part: &Function| Gva(part.start.0)..Gva(part.start.offset(part.size).0);
    let within: Vec<_> = parts.iter().map(range).collect();
    parts.iter().any(|part| {
        let len = usize::try_from(part.size).unwrap_or(usize::MAX);
        let code = know.kernel.image().read(part.start, len);
        code.is_some_and(|code| leaves(Gva(part.start.0), code, &within))
    })
}

/// It was compiled to be traced: it begins with a call of `__fentry__`, which the boot has taken out.
/// Functions in assembly and parts that the compiler has split off do not.
fn is_traced(know: &Knowledge, function: &Function) -> bool {
    let longest = MAX_INSTRUCTION + NOP5.len();
    let code = know.kernel.image().read(function.start, longest);
    let tracer = know.kernel.symbols().address("__fentry__");
    let (Some(code), Ok(tracer)) = (code, tracer) else {
        return false;
    };
    let start = Gva(function.start.0);
    let (EntrySite::Nop(at) | EntrySite::Other(at)) = entry_site(start, code);
    let call = code.get(at..).unwrap_or_default();
    match call {
        [0xe8, a, b, c, d, ..] => {
            let distance = i32::from_le_bytes([*a, *b, *c, *d]);
            let behind = start.offset((at + NOP5.len()) as u64);
            behind.displace(distance.into()).0 == tracer.0
        }
        _ => false,
    }
}

/// All names of a function.
fn names(know: &Knowledge, function: &Function) -> Vec<String> {
    let symbols = know.kernel.symbols();
    let mut names: Vec<_> = symbols
        .functions_from(function.start)
        .map(|symbol| symbol.name())
        .collect();
    if names.is_empty() {
        names.push(function.name.clone());
    }
    names
}

/// Words of arguments on the stack, by the types of whichever of its names the kernel has types for.
fn stack_words(know: &Knowledge, names: &[String]) -> Result<u32, String> {
    let symbols = know.kernel.symbols();
    let mut most = None;
    let mut why = String::new();
    for name in names {
        // The types have one function of each name.
        if symbols.named(name).filter(|one| one.is_function()).count() > 1 {
            why = format!("there are several functions called {name}");
            continue;
        }
        match know.kernel.types().calling(name) {
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
