//! The commands that only look: `query-modules`, `query-tasks` and `query-symbols`.
//!
//! Answers are bounded: what does not fit is counted in `more`.

use patcher::guest::Gva;
use patcher::patch::PatchError;
use patcher::symbols::{GuestSymbols, Module, PlaceInfo, Site, SymbolInfo, SymbolQuery};
use patcher::tasks::{Counts, Survey, TaskError, TaskInfo};
use serde::{Deserialize, Serialize};

use super::session::{Patching, WithStop};
use crate::control::command::{Context, DeadlineArgument, Registry};
use crate::control::protocol::QmpError;

/// Tasks that are told unless the client says otherwise, and at the most.
const USUAL_TASKS: usize = 20_000;
const MOST_TASKS: usize = 200_000;
/// Stops in which the guest's counts of tasks may disagree before that is told: a thread that is
/// being made or ended is counted on one side only for a moment.
const DISAGREEING_STOPS: u32 = 5;

/// Symbols that are told unless the client says otherwise, and at the most.
const USUAL_SYMBOLS: usize = 1000;
const MOST_SYMBOLS: usize = 20_000;

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct QuerySymbols {
    /// Name with `*`, `?` and `[a-z]`; or an address, to be told what is there.
    pattern: String,
    /// Only of this module; `vmlinux` is the kernel itself.
    module: Option<String>,
    /// Matches to leave out at the beginning.
    #[serde(default)]
    skip: usize,
    limit: Option<usize>,
    #[serde(default)]
    deadline: DeadlineArgument,
}

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct QueryModules {
    #[serde(default)]
    deadline: DeadlineArgument,
}

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct QueryTasks {
    /// Only tasks of this process (or this thread).
    pid: Option<u32>,
    limit: Option<usize>,
    #[serde(default)]
    deadline: DeadlineArgument,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Modules {
    modules: Vec<ModuleRow>,
}

/// A module, with what lsmod adds up.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ModuleRow {
    #[serde(flatten)]
    module: Module,
    size: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Tasks {
    tasks: Vec<TaskInfo>,
    /// Tasks that were left out because of the limit.
    more: usize,
    counts: Counts,
    disagreements: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Symbols {
    symbols: Vec<SymbolInfo>,
    /// Matches behind those that are told.
    more: usize,
    /// For an address: the symbol that covers it, and the place as the kernel writes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    place: Option<Place>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Place {
    #[serde(flatten)]
    info: PlaceInfo,
    text: String,
}

/// Adds the commands.
pub(super) fn register(registry: &mut Registry, patching: &Patching) {
    let p = patching.clone();
    registry.slow("query-modules", move |context, query: QueryModules| {
        p.stopped(
            context,
            "query-modules",
            query.deadline.or_usual(),
            |patcher, guest| {
                let modules = patcher.modules(guest)?.into_iter();
                let row = |module: Module| ModuleRow {
                    size: module.size(),
                    module,
                };
                Ok(Modules {
                    modules: modules.map(row).collect(),
                })
            },
        )
    });
    let p = patching.clone();
    registry.slow("query-tasks", move |context, query: QueryTasks| {
        tasks(&p, context, &query)
    });
    let p = patching.clone();
    registry.slow("query-symbols", move |context, query: QuerySymbols| {
        symbols(&p, context, &query)
    });
}

fn symbols(
    patching: &Patching,
    context: &Context,
    query: &QuerySymbols,
) -> Result<WithStop<Symbols>, QmpError> {
    let address = match query.pattern.parse() {
        Ok(Site::Address(address)) => Some(address),
        _ => None,
    };
    let module = query.module.as_deref();
    let wanted = |loaded: &Module| match address {
        Some(address) => loaded.contains(address),
        None => module.is_none_or(|name| loaded.name == name),
    };
    let loaded = patching.stopped(
        context,
        "query-symbols",
        query.deadline.or_usual(),
        |patcher, guest| patcher.loaded(guest, &wanted),
    )?;
    let kernel = patching.kernel()?;
    Ok(loaded.map(|loaded| {
        let symbols = GuestSymbols::new(kernel.symbols(), &loaded);
        match address {
            Some(address) => at(symbols, address),
            None => matching(symbols, query),
        }
    }))
}

fn at(symbols: GuestSymbols<'_>, address: Gva) -> Symbols {
    let place = symbols.at(address);
    Symbols {
        symbols: place.iter().map(|place| place.symbol.clone()).collect(),
        more: 0,
        place: place.map(|info| Place {
            text: info.to_string(),
            info,
        }),
    }
}

fn matching(symbols: GuestSymbols<'_>, query: &QuerySymbols) -> Symbols {
    let limit = query.limit.unwrap_or(USUAL_SYMBOLS).min(MOST_SYMBOLS);
    let (symbols, more) = symbols.matching(&SymbolQuery {
        pattern: &query.pattern,
        module: query.module.as_deref(),
        skip: query.skip,
        limit,
    });
    Symbols {
        symbols,
        more,
        place: None,
    }
}

fn tasks(
    patching: &Patching,
    context: &Context,
    query: &QueryTasks,
) -> Result<WithStop<Tasks>, QmpError> {
    let mut stops = 0;
    let found = patching.stopped(
        context,
        "query-tasks",
        query.deadline.or_usual(),
        |patcher, guest| {
            let survey = patcher.survey(guest)?;
            stops += 1;
            let counts = survey.counts;
            if survey.disagreements.is_empty() || stops >= DISAGREEING_STOPS {
                return Ok(survey);
            }
            Err(PatchError::Tasks(TaskError::Miscount {
                listed: counts.listed,
                counted: counts.counted.or(counts.by_pid).unwrap_or(0),
            }))
        },
    )?;
    Ok(found.map(|survey| shown(survey, query)))
}

fn shown(survey: Survey, query: &QueryTasks) -> Tasks {
    let limit = query.limit.unwrap_or(USUAL_TASKS).min(MOST_TASKS);
    let wanted = |task: &TaskInfo| {
        let pid = query.pid.unwrap_or(task.pid);
        task.pid == pid || task.tgid == pid
    };
    let mut tasks: Vec<_> = survey.tasks.into_iter().filter(wanted).collect();
    let more = tasks.len().saturating_sub(limit);
    tasks.truncate(limit);
    Tasks {
        tasks,
        more,
        counts: survey.counts,
        disagreements: survey.disagreements,
    }
}
