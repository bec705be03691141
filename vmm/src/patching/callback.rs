//! What a probe or a callback on a tracepoint is asked to do, in requests.

use std::path::PathBuf;

use patcher::patch::{Callback, ProbeRequest, TracepointRequest, USUAL_PRIORITY};
use patcher::probe::{Needs, Predicate, Register, When};
use serde::Deserialize;

use super::commands::{invalid, object, site};
use crate::control::command::{DeadlineArgument, NumberArgument};
use crate::control::protocol::{QmpError, Reason};

/// Most probes that one request attaches.
const MOST_SITES: usize = 4096;

/// What a probe does.
#[derive(Clone, Copy, PartialEq, Eq, Deserialize, Debug, Default)]
#[serde(rename_all = "kebab-case")]
enum Kinds {
    #[default]
    Count,
    Histogram,
    Latency,
    Record,
    Code,
}

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Attach {
    /// For a probe.
    site: Option<String>,
    /// For several, in one stop.
    sites: Option<Vec<String>>,
    /// For a tracepoint.
    name: Option<String>,
    /// Without it: code where there is an object, else counting.
    callback: Option<Kinds>,
    /// Path of a relocatable object, as this process sees it.
    object: Option<PathBuf>,
    entry: Option<String>,
    #[serde(default)]
    may_sleep: bool,
    #[serde(default)]
    needs_rcu: bool,
    #[serde(default)]
    nmi: bool,
    #[serde(default)]
    no_registers: bool,
    /// For a histogram: one.
    #[serde(default)]
    registers: Vec<String>,
    records: Option<u32>,
    /// When the function returns that begins there.
    #[serde(default, rename = "return")]
    returned: bool,
    #[serde(rename = "if")]
    only_if: Option<String>,
    /// At the return: what held when the function was called.
    #[serde(rename = "if-called")]
    only_if_called: Option<String>,
    /// At the return: how much the function's callers put on the stack for it.
    stack_words: Option<u32>,
    /// The site stays hooked when its last probe is taken out.
    #[serde(default)]
    permanent: bool,
    data: Option<NumberArgument>,
    priority: Option<i32>,
    #[serde(default)]
    pub(super) deadline: DeadlineArgument,
}

impl Attach {
    /// Whether it is about several probes.
    pub(super) fn is_many(&self) -> bool {
        self.sites.is_some()
    }

    /// The probes.
    pub(super) fn probes(mut self) -> Result<Vec<ProbeRequest>, QmpError> {
        let sites = match self.sites.take() {
            Some(_) if self.site.is_some() => {
                return Err(invalid("sites", "give either a site or several"));
            }
            Some(sites) if sites.is_empty() || sites.len() > MOST_SITES => {
                let why = format_args!("{} of them; 1 to {MOST_SITES} make sense", sites.len());
                return Err(invalid("sites", why));
            }
            Some(sites) => sites,
            None => {
                let name = ("name", self.name.as_deref());
                vec![given("site", self.site.as_deref(), name)?.to_owned()]
            }
        };
        let sites = sites.iter().map(|text| site(text));
        let sites = sites.collect::<Result<Vec<_>, _>>()?;
        let value = self.data.unwrap_or_default().0;
        let priority = self.priority.unwrap_or(0);
        let only_if = predicate("if", self.only_if.as_deref())?;
        let only_if_called = predicate("if-called", self.only_if_called.as_deref())?;
        let (stack_words, permanent) = (self.stack_words, self.permanent);
        let when = match self.returned {
            true => When::Returned,
            false => When::Reached,
        };
        let callback = self.callback()?;
        let all = sites.into_iter().map(|site| ProbeRequest {
            site,
            value,
            priority,
            when,
            only_if,
            only_if_called,
            stack_words,
            permanent,
            callback: callback.clone(),
        });
        Ok(all.collect())
    }

    /// A callback on a tracepoint.
    pub(super) fn tracepoint(self) -> Result<TracepointRequest, QmpError> {
        let site = self.sites.as_ref().and_then(|sites| sites.first());
        let site = self.site.as_ref().or(site).map(String::as_str);
        let name = given("name", self.name.as_deref(), ("site", site))?;
        if self.permanent {
            let why = "a tracepoint is the guest's own: nothing of its text is changed";
            return Err(invalid("permanent", why));
        }
        let of_functions = [
            ("return", self.returned),
            ("if-called", self.only_if_called.is_some()),
            ("stack-words", self.stack_words.is_some()),
        ];
        if let Some((argument, _)) = of_functions.iter().find(|(_, given)| *given) {
            return Err(invalid(
                argument,
                "a tracepoint is no function that returns",
            ));
        }
        Ok(TracepointRequest {
            name: name.to_owned(),
            value: self.data.unwrap_or_default().0,
            priority: self.priority.unwrap_or(USUAL_PRIORITY),
            only_if: predicate("if", self.only_if.as_deref())?,
            callback: self.callback()?,
        })
    }

    fn callback(self) -> Result<Callback, QmpError> {
        let usual = match self.object {
            Some(_) => Kinds::Code,
            None => Kinds::Count,
        };
        let kind = self.callback.unwrap_or(usual);
        let needs = Needs {
            may_sleep: self.may_sleep,
            needs_rcu: self.needs_rcu,
            nmi: self.nmi,
            no_registers: self.no_registers,
        };
        let has_code = self.object.is_some() || self.entry.is_some() || needs != Needs::default();
        if kind != Kinds::Code && has_code {
            let why = "only code has an object, an entry and needs";
            return Err(invalid("callback", why));
        }
        if self.records.is_some() && kind != Kinds::Record {
            return Err(invalid("records", "only a probe that records has them"));
        }
        let registers = self.registers.iter().map(|name| name.parse());
        let registers = registers.collect::<Result<Vec<Register>, _>>();
        let registers = registers.map_err(|error| invalid("registers", error))?;
        match (kind, self.object, registers.as_slice()) {
            (Kinds::Count, None, []) => Ok(Callback::Count),
            (Kinds::Histogram, None, [register]) => Ok(Callback::Histogram(*register)),
            (Kinds::Latency, None, []) => Ok(Callback::Latency),
            (Kinds::Record, None, _) => Ok(Callback::Record {
                registers,
                records: self.records,
            }),
            (Kinds::Code, Some(path), []) => Ok(Callback::Code {
                file: object(&path)?,
                function: self.entry,
                needs,
            }),
            (Kinds::Code, None, _) => Err(invalid("object", "code is in one: give its path")),
            (Kinds::Histogram, ..) => Err(invalid("registers", "a histogram is of one register")),
            (Kinds::Count | Kinds::Latency | Kinds::Code, ..) => Err(invalid(
                "registers",
                "only histograms and records have them",
            )),
            (Kinds::Record, Some(_), _) => Err(invalid("object", "records need none")),
        }
    }
}

fn predicate(argument: &str, text: Option<&str>) -> Result<Option<Predicate>, QmpError> {
    let parsed = text.map(str::parse::<Predicate>).transpose();
    parsed.map_err(|error| invalid(argument, error))
}

/// One of two arguments, of which each belongs to another command.
fn given<'a>(
    wanted: &str,
    value: Option<&'a str>,
    (other, not): (&str, Option<&str>),
) -> Result<&'a str, QmpError> {
    if not.is_some() {
        return Err(QmpError::new(Reason::UnknownArgument, other.to_owned()));
    }
    value.ok_or_else(|| QmpError::new(Reason::MissingArgument, wanted.to_owned()))
}
