//! `probe-attach`, `probe-detach`, `query-probes`, `query-histogram`, `query-records` and
//! `query-trampolines`.

use patcher::guest::Gva;
use patcher::patch::{
    AllDetached, Applied, Collected, Detached, EntryId, Kind, NewProbe, Patcher, Retired,
};
use serde::{Deserialize, Serialize};

use super::callback::Attach;
use super::commands::{invalid, origin};
use super::session::Patching;
use crate::control::command::{DeadlineArgument, NoArguments, NumberArgument, Registry};
use crate::control::protocol::{QmpError, Reason};

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct QueryHistogram {
    id: u64,
}

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct QueryRecords {
    id: u64,
    #[serde(default)]
    since: NumberArgument,
}

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct ProbeDetach {
    id: Option<u64>,
    /// Several, in one stop.
    ids: Option<Vec<u64>>,
    #[serde(default)]
    deadline: DeadlineArgument,
}

/// The answer to `probe-attach`.
#[derive(Serialize)]
#[serde(untagged)]
enum Attached {
    One(Box<NewProbe>),
    Many { probes: Vec<NewProbe> },
}

/// The answer to `probe-detach`.
#[derive(Serialize)]
#[serde(untagged)]
enum Gone {
    One(Box<Detached>),
    Many(AllDetached),
}

impl Gone {
    fn collected(&self) -> &Collected {
        match self {
            Self::One(detached) => &detached.reverted.collected,
            Self::Many(all) => &all.collected,
        }
    }
}

/// Code of ours in the guest, and what it waits for.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Trampoline {
    /// The change that it belongs to.
    id: EntryId,
    state: State,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<Kind>,
    #[serde(skip_serializing_if = "Option::is_none")]
    place: Option<String>,
    /// The probes that act in it, for a site with probes.
    #[serde(skip_serializing_if = "Option::is_none")]
    probes: Option<Vec<EntryId>>,
    /// It stays when no probe is left, and passes straight through.
    #[serde(skip_serializing_if = "Option::is_none")]
    permanent: Option<bool>,
    code: Gva,
    code_bytes: u64,
    data_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    since_ms: Option<u64>,
    /// Who may still be in it.
    held_by: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    keep: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    /// The guest's text jumps to it.
    Hooked,
    /// Nothing jumps to it any more; it is freed when nobody is in it.
    Retired,
    /// It is never freed, because its addresses may be anywhere.
    Kept,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Trampolines {
    trampolines: Vec<Trampoline>,
}

impl Trampoline {
    fn hooked(entry: &Applied, patcher: &Patcher) -> Option<Self> {
        let placed = entry.code.as_ref()?;
        let (probes, permanent) = patcher.probes_at(entry.id).unzip();
        Some(Self {
            probes,
            permanent,
            id: entry.id,
            state: State::Hooked,
            kind: Some(entry.kind),
            place: Some(entry.place.clone()),
            code: placed.code.at,
            code_bytes: placed.code.len,
            data_bytes: placed.data.map_or(0, |data| data.len),
            since_ms: None,
            held_by: Vec::new(),
            keep: placed.keep.clone(),
        })
    }

    fn retired(retired: &Retired) -> Self {
        Self {
            id: retired.id,
            state: match retired.keep {
                Some(_) => State::Kept,
                None => State::Retired,
            },
            kind: None,
            place: None,
            probes: None,
            permanent: None,
            code: retired.code.at,
            code_bytes: retired.code.len
                + retired.callbacks.iter().map(|slot| slot.len).sum::<u64>(),
            data_bytes: retired.data.iter().map(|slot| slot.len).sum(),
            since_ms: Some(retired.since_ms),
            held_by: retired.held_by.clone(),
            keep: retired.keep.clone(),
        }
    }
}

/// Adds the commands.
pub(super) fn register(registry: &mut Registry, patching: &Patching) {
    let p = patching.clone();
    registry.slow("probe-attach", move |context, arguments: Attach| {
        let within = arguments.deadline.or_usual();
        let many = arguments.is_many();
        let requests = arguments.probes()?;
        let prepare = |request| p.with(|patcher| patcher.prepare_probe(request));
        let prepared: Vec<_> = requests
            .into_iter()
            .map(prepare)
            .collect::<Result<_, _>>()?;
        p.get_arena_ready();
        let origin = origin(context);
        let attached = p.stopped(context, "probe-attach", within, |patcher, guest| {
            patcher.attach_probes(guest, &prepared, &origin)
        })?;
        Ok(attached.map(|mut probes| match (probes.pop(), many) {
            (Some(probe), false) => Attached::One(Box::new(probe)),
            (last, _) => {
                probes.extend(last);
                Attached::Many { probes }
            }
        }))
    });
    let p = patching.clone();
    registry.slow("probe-detach", move |context, arguments: ProbeDetach| {
        let origin = origin(context);
        let within = arguments.deadline.or_usual();
        let ids: Vec<_> = match (arguments.id, arguments.ids) {
            (Some(id), None) => vec![EntryId(id)],
            (None, Some(ids)) => ids.into_iter().map(EntryId).collect(),
            (Some(_), Some(_)) => return Err(invalid("ids", "give either one id or several")),
            (None, None) => return Err(QmpError::new(Reason::MissingArgument, "id".to_owned())),
        };
        let detached = p.stopped(context, "probe-detach", within, |patcher, guest| {
            match (arguments.id, ids.as_slice()) {
                (Some(_), [id]) => {
                    let detached = patcher.detach_probe(guest, *id, &origin)?;
                    Ok(Gone::One(Box::new(detached)))
                }
                (_, ids) => Ok(Gone::Many(patcher.detach_probes(guest, ids, &origin)?)),
            }
        })?;
        p.retired(detached.answer().collected());
        Ok(detached)
    });
    let p = patching.clone();
    registry.slow("query-probes", move |_, _: NoArguments| {
        let probes = p.peek(|patcher, memory| patcher.probes(memory))?;
        Ok(Probes { probes })
    });
    let p = patching.clone();
    registry.slow("query-histogram", move |_, arguments: QueryHistogram| {
        p.peek(|patcher, memory| patcher.histogram(memory, EntryId(arguments.id)))
    });
    let p = patching.clone();
    registry.slow("query-records", move |_, arguments: QueryRecords| {
        let since = arguments.since.0;
        p.peek(|patcher, memory| patcher.records(memory, EntryId(arguments.id), since))
    });
    let p = patching.clone();
    registry.slow("query-trampolines", move |_, _: NoArguments| {
        p.with(|patcher| {
            let listing = patcher.list();
            let hooked = listing.applied.iter().chain(&listing.held);
            let hooked = hooked.filter_map(|entry| Trampoline::hooked(entry, patcher));
            let retired = listing.retired.iter().map(Trampoline::retired);
            Ok(Trampolines {
                trampolines: hooked.chain(retired).collect(),
            })
        })
    });
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Probes {
    probes: Vec<patcher::patch::ProbeInfo>,
}
