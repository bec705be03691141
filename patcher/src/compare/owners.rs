//! Whose a change is. Nobody is named for bytes that he would not have written.

use super::report::{Class, Owner};
use super::users::{
    Probe, Program, Tracer, UserError, called, livepatched, probes, programs, tracers,
};
use super::view::View;
use crate::guest::Gva;
use crate::patch::Applied;
use crate::text::FtraceLayout;

const CALL: u8 = 0xe8;
const JUMP: u8 = 0xe9;
const INT3: u8 = 0xcc;

/// Everybody who may have changed text.
pub(super) struct Owners<'a> {
    view: &'a View<'a>,
    ours: &'a [Applied],
    probes: Vec<Probe>,
    tracers: Vec<Tracer>,
    programs: Vec<Program>,
    records: Option<FtraceLayout>,
}

/// A difference: where it is, what should be there and what is.
pub(super) struct Change<'a> {
    pub(super) at: Gva,
    pub(super) expected: &'a [u8],
    pub(super) found: &'a [u8],
    pub(super) site: Option<Class>,
}

impl<'a> Owners<'a> {
    /// Reads who there is; what cannot be read is told in `doubts`.
    pub(super) fn of(view: &'a View<'a>, ours: &'a [Applied], doubts: &mut Vec<String>) -> Self {
        fn known<T>(
            what: &str,
            all: Result<Vec<T>, UserError>,
            doubts: &mut Vec<String>,
        ) -> Vec<T> {
            all.unwrap_or_else(|error| {
                doubts.push(format!("the guest's {what} cannot be told: {error}"));
                Vec::new()
            })
        }
        Self {
            view,
            ours,
            probes: known("kprobes", probes(view), doubts),
            tracers: known("users of ftrace", tracers(view), doubts),
            programs: known("BPF programs", programs(view), doubts),
            records: FtraceLayout::of(view.kernel).unwrap_or_default(),
        }
    }

    pub(super) fn of_change(&self, change: &Change<'_>) -> Owner {
        self.ours(change)
            .or_else(|| self.probe(change))
            .or_else(|| self.tracer(change))
            .unwrap_or(Owner::Unknown)
    }

    /// A change of our own that is still as we made it.
    fn ours(&self, change: &Change<'_>) -> Option<Owner> {
        let differs = |n: usize| change.expected.get(n) != change.found.get(n);
        let own = self.ours.iter().find(|own| {
            (0_u64..)
                .zip(change.found)
                .enumerate()
                .all(|(n, (offset, byte))| {
                    let distance = change.at.offset(offset).displacement_from(own.address);
                    let written = usize::try_from(distance)
                        .ok()
                        .and_then(|n| own.after.0.get(n));
                    written.map_or(!differs(n), |written| written == byte)
                })
        })?;
        Some(Owner::Ours { id: own.id })
    }

    /// A kprobe: a breakpoint, or a jump to its own detour.
    fn probe(&self, change: &Change<'_>) -> Option<Owner> {
        let probe = self.probes.iter().find(|probe| {
            let offset = usize::try_from(probe.at.displacement_from(change.at)).ok();
            let Some(offset) = offset.filter(|&offset| offset < change.found.len()) else {
                return false;
            };
            let written = match change.found.get(offset) {
                Some(&INT3) => 1,
                Some(&JUMP) if probe.detour.is_some() => {
                    let to = branch_target(probe.at, change.found.get(offset..));
                    if to != probe.detour {
                        return false;
                    }
                    5
                }
                _ => return false,
            };
            let both = change.expected.iter().zip(change.found).enumerate();
            let mut others = both.filter(|(n, _)| !(offset..offset + written).contains(n));
            others.all(|(_, (expected, found))| expected == found)
        })?;
        let what = probe
            .name
            .clone()
            .unwrap_or_else(|| called(self.view, probe.at));
        Some(Owner::Kprobe { what })
    }

    /// A call at the entry of a function that ftrace says is in use.
    fn tracer(&self, change: &Change<'_>) -> Option<Owner> {
        if change.site != Some(Class::Fentry) || change.found.first() != Some(&CALL) {
            return None;
        }
        let target = branch_target(change.at, Some(change.found))?;
        let records = self.records.as_ref()?;
        let (space, located) = (self.view.space, self.view.located);
        let record = records.find(space, located, change.at, 5).ok()??;
        if !record.in_use {
            return None;
        }
        let mut programs = self.programs.iter();
        if let Some(program) =
            programs.find(|program| program.start <= target && target < program.end)
        {
            let what = program.name.clone();
            return Some(Owner::Bpf { what });
        }
        let shared = ["ftrace_caller", "ftrace_regs_caller"]
            .into_iter()
            .filter_map(|name| self.view.symbol(name))
            .any(|at| self.view.run_time(at) == target);
        let users: Vec<_> = self
            .tracers
            .iter()
            .filter(|tracer| tracer.wants(change.at))
            .filter(|tracer| shared || tracer.trampoline == Some(target))
            .collect();
        let named = |name| {
            let at = self.view.symbol(name).map(|at| self.view.run_time(at))?;
            users.iter().find(|user| user.func == at)
        };
        if let Some(patch) = named("klp_ftrace_handler") {
            let new = livepatched(self.view, patch);
            let what = new.map_or_else(String::new, |new| format!("function at {new}"));
            return Some(Owner::Livepatch { what });
        }
        if named("kprobe_ftrace_handler").is_some() {
            let what = called(self.view, change.at);
            return Some(Owner::Kprobe { what });
        }
        let functions: Vec<_> = users
            .iter()
            .map(|user| called(self.view, user.func))
            .collect();
        (!functions.is_empty()).then(|| Owner::Ftrace {
            what: functions.join(", "),
        })
    }
}

/// Where a branch of 5 bytes leads.
fn branch_target(at: Gva, code: Option<&[u8]>) -> Option<Gva> {
    let raw = code?.get(1..5)?.first_chunk()?;
    Some(at.offset(5).displace(i32::from_le_bytes(*raw).into()))
}
