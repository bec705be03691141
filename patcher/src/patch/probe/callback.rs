//! What probes do, and where it is in the guest.

use super::super::code::{Code, Resolved};
use super::super::knowledge::Knowledge;
use super::super::placing::{Placing, give_back};
use super::super::report::PlacedCode;
use super::super::retire::Content;
use super::super::{EntryId, Origin, PatchError};
use crate::arena::{Arena, Slot};
use crate::guest::{Gva, StoppedGuest};
use crate::probe::{
    Act, Action, BUCKETS, Needs, PerCpu, Predicate, RECORD, RECORDED, Register, Variables, When,
    data,
};

/// The name of a callback's function.
const FUNCTION: &str = "stillpoint_callback";
/// Data of a probe begin on a cache line of their own.
const LINE: u64 = 64;
/// Records that a probe keeps when nobody says how many.
const USUAL_RECORDS: u32 = 1024;
/// Most that fit.
const MOST_RECORDS: u32 = 16 << 10;

/// What a probe does when its site is reached.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Callback {
    /// Counts.
    #[default]
    Count,
    /// Counts how often a register has which magnitude, for each CPU.
    Histogram(Register),
    /// Counts how often a function took how long, in cycles of the time stamp counter, for each CPU
    /// that it returned on.
    Latency,
    /// Keeps the last records of who came by, with up to four registers.
    Record {
        /// What to keep.
        registers: Vec<Register>,
        /// How many records; `None` for 1024. Rounded up to a power of two.
        records: Option<u32>,
    },
    /// Calls a function of a relocatable object.
    Code {
        /// The object.
        file: Vec<u8>,
        /// The function; without it `stillpoint_callback`, or the only global one.
        function: Option<String>,
        /// What it needs beside what it says itself.
        needs: Needs,
    },
}

/// What a probe does, checked as far as it can be without a guest.
#[derive(Clone, Debug)]
pub(in super::super) enum Prepared {
    Inline(Action),
    Code {
        code: Code,
        entry: u64,
        /// It can come to a probe while it runs.
        nests: bool,
        needs: Needs,
    },
}

/// What a probe does, for people and programs.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case", tag = "callback")]
pub enum Does {
    /// Counts.
    Count,
    /// A histogram.
    Histogram {
        /// Of this register.
        register: Register,
    },
    /// A histogram of how long the function took.
    Latency,
    /// Records.
    Record {
        /// With these registers.
        registers: Vec<Register>,
        /// At most so many.
        records: u64,
    },
    /// Code of somebody else's.
    Code {
        /// Address of the function.
        function: Gva,
        /// What it needs.
        #[serde(flatten)]
        needs: Needs,
    },
}

impl Does {
    fn of(action: &Action) -> Self {
        match action {
            Action::Count => Self::Count,
            Action::Histogram(register) => Self::Histogram {
                register: *register,
            },
            Action::Latency => Self::Latency,
            Action::Record { registers, records } => Self::Record {
                registers: registers.clone(),
                records: *records,
            },
            Action::Call {
                function, needs, ..
            } => Self::Code {
                function: *function,
                needs: *needs,
            },
        }
    }
}

/// A probe that is in the guest.
#[derive(Debug)]
pub(in super::super) struct Attached {
    pub(in super::super) id: EntryId,
    /// The site as it was given.
    pub(in super::super) site: String,
    pub(in super::super) priority: i32,
    pub(in super::super) act: Act,
    pub(in super::super) data: Slot,
    pub(in super::super) code: Option<(PlacedCode, Content)>,
    pub(in super::super) origin: Origin,
}

impl Attached {
    pub(in super::super) fn does(&self) -> Does {
        Does::of(&self.act.action)
    }

    /// It neither sleeps nor calls, and nothing returns to it. Code of somebody else's may do so even where it calls nothing: a
    /// fault of its own is handled by code that sleeps.
    pub(in super::super) fn is_plain(&self) -> bool {
        !matches!(self.act.action, Action::Call { .. }) && self.act.when == When::Reached
    }
}

impl Prepared {
    pub(in super::super) fn new(know: &Knowledge, callback: Callback) -> Result<Self, PatchError> {
        Ok(match callback {
            Callback::Count => Self::Inline(Action::Count),
            Callback::Histogram(register) => Self::Inline(Action::Histogram(register)),
            Callback::Latency => Self::Inline(Action::Latency),
            Callback::Record { registers, records } => {
                let records = records.unwrap_or(USUAL_RECORDS);
                if records == 0 || records > MOST_RECORDS || registers.len() > RECORDED {
                    return Err(PatchError::Request(format!(
                        "a probe keeps 1 to {MOST_RECORDS} records of at most {RECORDED} registers, \
                         not {records} of {}",
                        registers.len()
                    )));
                }
                Self::Inline(Action::Record {
                    registers,
                    records: u64::from(records.next_power_of_two()),
                })
            }
            Callback::Code {
                file,
                function,
                needs,
            } => {
                let code = Code::object(&file, &|name| know.resolve(name))?;
                Self::Code {
                    entry: code.entry(function.as_deref(), FUNCTION)?,
                    nests: code.nests(),
                    needs: code.needs.or(needs),
                    code,
                }
            }
        })
    }

    /// When it acts, if it is asked to at `when`: a function took some time only when it returns.
    pub(in super::super) fn acts(&self, when: When) -> When {
        match self {
            Self::Inline(Action::Latency) => When::Returned,
            _ => when,
        }
    }

    /// Whether trampolines for it look at the guest's variables.
    pub(in super::super) fn looks(&self) -> bool {
        !matches!(self, Self::Inline(Action::Count))
    }

    /// What is needed of the kernel is there.
    pub(in super::super) fn check(&self, variables: &Variables) -> Result<(), PatchError> {
        match self {
            Self::Code { needs, .. } if needs.may_sleep && !variables.counted => {
                Err(PatchError::Request(
                    "this kernel does not count in __preempt_count where it may not sleep \
                     (CONFIG_PREEMPT_COUNT): a callback that may sleep would do so anywhere"
                        .into(),
                ))
            }
            _ => Ok(()),
        }
    }
}

/// What a callback is placed with.
pub(in super::super) struct Wanted<'a> {
    pub(in super::super) prepared: &'a Prepared,
    pub(in super::super) when: When,
    pub(in super::super) only_if: Option<Predicate>,
    pub(in super::super) only_if_called: Option<Predicate>,
    pub(in super::super) value: u64,
    pub(in super::super) at: Gva,
    pub(in super::super) cpus: u64,
}

/// A callback that is in the arena, and that nothing calls yet.
pub(in super::super) struct Ready {
    pub(in super::super) act: Act,
    pub(in super::super) data: Slot,
    pub(in super::super) code: Option<(PlacedCode, Content)>,
    /// Nobody can have been in the code yet.
    fresh: bool,
}

impl Wanted<'_> {
    pub(in super::super) fn put(
        &self,
        guest: &mut dyn StoppedGuest,
        mut placing: Placing<'_>,
    ) -> Result<Ready, PatchError> {
        let mut placed = None;
        let mut fresh = true;
        let action = match self.prepared {
            Prepared::Inline(action) => action.clone(),
            Prepared::Code {
                code,
                entry,
                nests,
                needs,
            } => {
                let new = placing.place(guest, code, *entry)?;
                fresh = new.fresh;
                let function = new.placed.entry;
                placed = Some((new.placed, new.content));
                Action::Call {
                    function,
                    nests: *nests,
                    needs: *needs,
                }
            }
        };
        let arena = placing.arena(guest)?;
        let more = match &action {
            Action::Count | Action::Call { .. } => 0,
            Action::Histogram(_) | Action::Latency => self.cpus * BUCKETS * 8,
            Action::Record { records, .. } => records * RECORD,
        };
        let mut first = [0; 64];
        for (at, word) in [(data::ARGS, self.value), (data::ARGS + 8, self.at.0)] {
            let at = usize::try_from(at).unwrap_or(0);
            if let Some(to) = first.get_mut(at..at + 8) {
                to.copy_from_slice(&word.to_le_bytes());
            }
        }
        let data = arena.take_data(data::MORE + more, LINE).and_then(|slot| {
            match arena.fill(guest, slot, &first) {
                Ok(()) => Ok(slot),
                Err(error) => {
                    give_back_data(guest, arena, slot);
                    Err(error)
                }
            }
        });
        match data {
            Ok(data) => Ok(Ready {
                act: Act {
                    action,
                    when: self.when,
                    only_if: self.only_if,
                    only_if_called: self.only_if_called,
                    value: self.value,
                    data: data.at,
                },
                data,
                code: placed,
                fresh,
            }),
            Err(error) => {
                if let (Some((placed, _)), true) = (placed, fresh) {
                    give_back(guest, arena, placed.code, placed.data);
                }
                Err(error.into())
            }
        }
    }
}

fn give_back_data(guest: &mut dyn StoppedGuest, arena: &mut Arena, slot: Slot) {
    // One that cannot be cleared stays taken.
    let _ = arena.free(guest, slot);
}

impl Ready {
    /// Nothing will call it.
    /// Code that somebody may still be in from its first life comes back.
    pub(in super::super) fn undo(
        self,
        guest: &mut dyn StoppedGuest,
        arena: &mut Arena,
    ) -> Option<(PlacedCode, Content)> {
        give_back_data(guest, arena, self.data);
        let (placed, content) = self.code?;
        if self.fresh {
            give_back(guest, arena, placed.code, placed.data);
            return None;
        }
        Some((placed, content))
    }
}

/// Where this kernel has what trampolines look at.
pub(in super::super) fn variables(know: &Knowledge) -> Result<Variables, PatchError> {
    let types = know.kernel.types();
    let lacks = |what: &str, why: String| {
        PatchError::Request(format!(
            "only counting is possible in this kernel, which has no {what}: {why}"
        ))
    };
    // 6.2 to 6.14 have them in `pcpu_hot`.
    let per_cpu = |name: &str, member: &str| match types.field("pcpu_hot", member) {
        Ok(field) => know.resolve("pcpu_hot").map(|base| PerCpu {
            base,
            offset: field.offset,
        }),
        Err(_) => know.resolve(name).map(|base| PerCpu { base, offset: 0 }),
    };
    let variable = |name, member| per_cpu(name, member).map_err(|why| lacks(name, why));
    let recursion = types.field("task_struct", "trace_recursion");
    let recursion = recursion
        .map_err(|why| lacks("task_struct.trace_recursion", why.to_string()))?
        .offset;
    let watching = "rcu_is_watching";
    Ok(Variables {
        cpu: variable("cpu_number", "cpu_number")?,
        task: variable("current_task", "current_task")?,
        preempt: variable("__preempt_count", "preempt_count")?,
        recursion,
        rcu_is_watching: know.resolve(watching).map_err(|why| lacks(watching, why))?,
        // It comes with CONFIG_PREEMPTION, which selects CONFIG_PREEMPT_COUNT.
        counted: matches!(
            know.resolve("preempt_schedule_notrace"),
            Ok(Resolved::Linked(_))
        ),
    })
}
