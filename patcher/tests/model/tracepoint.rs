//! A tracepoint of the guest, which the guest and the host change in turn.
//!
//! Callers check the key, load the array, load the first callback's data from it, and call through
//! the static call: either the only callback itself, with these data, or the iterator, which loads
//! the array anew. The guest changes array, static call and key one after the other, in the order and
//! with the waits of `kernel/tracepoint.c` since 5.15, and frees what it replaced after a grace
//! period; the host changes all three in one stop.

use patcher::probe::index;
use stateright::{Model, Property};

use super::explore::{ENDS, Faulty, LIVE, SAFE};
use super::rules::{Rule, Rules};

/// A callback with its data: both have this name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Func {
    name: char,
    priority: i32,
}

const fn func(name: char) -> Func {
    Func { name, priority: 0 }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Ask {
    Add(Func),
    Remove(Func),
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Array {
    funcs: Vec<Func>,
    /// It is not from the guest's allocator.
    ours: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Caller {
    Outside,
    /// The key was on.
    Entered,
    /// It has loaded the array, and believes it to be this.
    Loaded(usize, Array),
    /// It has loaded the data of its first callback.
    WithData(Func),
    /// It is in that callback.
    Called {
        callback: Func,
        data: Func,
    },
    /// It walks an array and is at this one.
    Iterates(usize, Array, usize),
}

/// One step of a change by the guest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Micro {
    Key(bool),
    Call,
    Funcs,
    /// The next 0 to 1 waits for who is there now.
    Note101,
    Wait101,
    Wait21,
    FreeOld,
}

/// What the guest is in the middle of, with its lock held.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Change {
    steps: &'static [Micro],
    old: Option<usize>,
    new: Option<usize>,
}

/// An array that is freed when these callers have left.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Pending {
    array: usize,
    owed: Vec<usize>,
    by_guest: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Fault {
    FreedArrayUsed,
    OthersData,
    FreedTwice,
    GuestFreedOurs,
    CallbackLost,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct State {
    key: bool,
    /// The only callback; without it the iterator.
    direct: Option<Func>,
    funcs: Option<usize>,
    arrays: Vec<Option<Array>>,
    callers: Vec<Caller>,
    laps: Vec<u8>,
    change: Option<Change>,
    /// Whom the guest's next change from 0 to 1, or to 1, waits for.
    owed_101: Vec<usize>,
    owed_21: Vec<usize>,
    pending: Vec<Pending>,
    by_guest: usize,
    by_host: usize,
    fault: Option<Fault>,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Action {
    Caller(usize),
    Guest,
    Host,
    Free(usize),
}

#[derive(Clone, Debug)]
pub(crate) struct Tracepoint {
    pub(crate) name: &'static str,
    pub(crate) rules: Rules,
    pub(crate) laps: u8,
    pub(crate) by_guest: Vec<Ask>,
    pub(crate) by_host: Vec<Ask>,
}

impl Tracepoint {
    /// The host's callback comes first, and the guest's come and go beside it.
    pub(crate) fn together() -> Self {
        let first = Func {
            priority: 1,
            ..func('h')
        };
        let (f, g) = (func('f'), func('g'));
        Self {
            name: "tracepoint, guest and host",
            rules: Rules::ALL,
            laps: 1,
            by_guest: vec![Ask::Add(f), Ask::Add(g), Ask::Remove(f), Ask::Remove(g)],
            by_host: vec![Ask::Add(first), Ask::Remove(first)],
        }
    }

    /// From nothing to one and back, by the host and then by whoever comes.
    pub(crate) fn alone() -> Self {
        let (f, h, i) = (func('f'), func('h'), func('i'));
        Self {
            name: "tracepoint, one callback after another",
            rules: Rules::ALL,
            laps: 1,
            by_guest: vec![Ask::Add(f), Ask::Remove(f)],
            by_host: vec![Ask::Add(h), Ask::Remove(h), Ask::Add(i), Ask::Remove(i)],
        }
    }

    /// The guest changes it by itself, for us as well.
    pub(crate) fn by_the_guest() -> Self {
        let (f, g, h) = (func('f'), func('g'), func('h'));
        Self {
            name: "tracepoint, by the guest",
            rules: Rules::ALL,
            laps: 2,
            by_guest: vec![
                Ask::Add(f),
                Ask::Remove(f),
                Ask::Add(h),
                Ask::Add(g),
                Ask::Remove(h),
                Ask::Remove(g),
            ],
            by_host: Vec::new(),
        }
    }

    fn is_over(&self, state: &State) -> bool {
        let mut callers = state.callers.iter().zip(&state.laps);
        callers.all(|(caller, laps)| *caller == Caller::Outside && (*laps == 0 || !state.key))
            && self.next_states(state).is_empty()
    }

    fn is_done(&self, state: &State) -> bool {
        let arrays = state.arrays.iter().flatten().count();
        state.by_guest == self.by_guest.len()
            && state.by_host == self.by_host.len()
            && arrays == usize::from(state.funcs.is_some())
    }
}

/// The functions after a change; `None` when what is to be removed is not there.
fn changed(mut funcs: Vec<Func>, ask: Ask) -> Option<Vec<Func>> {
    match ask {
        Ask::Add(func) => {
            let others = funcs.iter().map(|other| other.priority);
            funcs.insert(index(func.priority, others), func);
        }
        Ask::Remove(func) => {
            let at = funcs.iter().position(|other| *other == func)?;
            funcs.remove(at);
        }
    }
    Some(funcs)
}

fn only(funcs: &[Func]) -> Option<Func> {
    funcs.first().copied().filter(|_| funcs.len() == 1)
}

impl State {
    fn in_window(&self) -> Vec<usize> {
        let callers = self.callers.iter().enumerate();
        let inside =
            callers.filter(|(_, caller)| !matches!(caller, Caller::Outside | Caller::Entered));
        inside.map(|(index, _)| index).collect()
    }

    fn funcs_of(&self, array: Option<usize>) -> Vec<Func> {
        let array = array.and_then(|array| self.arrays[array].as_ref());
        array.map_or_else(Vec::new, |array| array.funcs.clone())
    }

    /// `None` without memory.
    fn allocate(&mut self, funcs: Vec<Func>, ours: bool) -> Option<Option<usize>> {
        if funcs.is_empty() {
            return Some(None);
        }
        let free = self.arrays.iter().position(Option::is_none)?;
        self.arrays[free] = Some(Array { funcs, ours });
        Some(Some(free))
    }

    fn caller(&mut self, index: usize) -> Result<(), Fault> {
        let intact = |at: usize, array: &Array| match self.arrays[at].as_ref() == Some(array) {
            true => Ok(()),
            false => Err(Fault::FreedArrayUsed),
        };
        let load = |walk: bool| {
            let at = self.funcs?;
            let array = self.arrays[at].clone()?;
            Some(match walk {
                true => Caller::Iterates(at, array, 0),
                false => Caller::Loaded(at, array),
            })
        };
        let next = match &self.callers[index] {
            Caller::Outside => {
                self.laps[index] -= 1;
                Some(Caller::Entered)
            }
            Caller::Entered => load(false),
            Caller::Loaded(at, array) => {
                intact(*at, array)?;
                array.funcs.first().map(|func| Caller::WithData(*func))
            }
            Caller::WithData(data) => match self.direct {
                Some(callback) => Some(Caller::Called {
                    callback,
                    data: *data,
                }),
                None => load(true),
            },
            Caller::Called { callback, data } if callback != data => {
                return Err(Fault::OthersData);
            }
            Caller::Called { .. } => None,
            Caller::Iterates(at, array, next) => {
                intact(*at, array)?;
                let next = next + 1;
                (next < array.funcs.len()).then(|| Caller::Iterates(*at, array.clone(), next))
            }
        };
        self.callers[index] = next.unwrap_or(Caller::Outside);
        if self.callers[index] == Caller::Outside {
            let pending = self.pending.iter_mut().map(|pending| &mut pending.owed);
            for owed in pending.chain([&mut self.owed_101, &mut self.owed_21]) {
                owed.retain(|caller| *caller != index);
            }
        }
        Ok(())
    }

    /// One step of the guest's own changes.
    fn guest(&mut self, asks: &[Ask], rules: Rules) -> Option<Result<(), Fault>> {
        let Some(change) = &self.change else {
            let ask = *asks.get(self.by_guest)?;
            let old = self.funcs_of(self.funcs);
            let steps: &[Micro] = match (ask, old.len()) {
                (Ask::Add(_), 0) => &[Micro::Wait101, Micro::Call, Micro::Funcs, Micro::Key(true)],
                (Ask::Add(_), 1) => &[Micro::Call, Micro::Funcs, Micro::FreeOld],
                (Ask::Remove(_), 1) => &[
                    Micro::Key(false),
                    Micro::Call,
                    Micro::Funcs,
                    Micro::Note101,
                    Micro::FreeOld,
                ],
                (Ask::Remove(_), 2) => &[Micro::Funcs, Micro::Wait21, Micro::Call, Micro::FreeOld],
                _ => &[Micro::Funcs, Micro::FreeOld],
            };
            let Some(funcs) = changed(old, ask) else {
                return Some(Err(Fault::CallbackLost));
            };
            self.change = Some(Change {
                steps,
                old: self.funcs,
                new: self.allocate(funcs, false)?,
            });
            return Some(Ok(()));
        };
        let Change { steps, old, new } = change.clone();
        let (step, rest) = steps.split_first()?;
        let waits = rules.has(Rule::GuestWaits);
        match step {
            Micro::Key(on) => self.key = *on,
            Micro::Call => self.direct = only(&self.funcs_of(new)),
            Micro::Funcs => {
                self.funcs = new;
                let (old, new) = (self.funcs_of(old), self.funcs_of(new));
                if !old.is_empty() && !new.is_empty() && old.first() != new.first() {
                    self.owed_21 = self.in_window();
                }
            }
            Micro::Note101 => self.owed_101 = self.in_window(),
            Micro::Wait101 if waits && !self.owed_101.is_empty() => return None,
            Micro::Wait21 if waits && !self.owed_21.is_empty() => return None,
            Micro::Wait101 | Micro::Wait21 => {}
            Micro::FreeOld => {
                let owed = self.in_window();
                self.pending.extend(old.map(|array| Pending {
                    array,
                    owed,
                    by_guest: true,
                }));
            }
        }
        self.change = (!rest.is_empty()).then_some(Change {
            steps: rest,
            old,
            new,
        });
        self.by_guest += usize::from(rest.is_empty());
        Some(Ok(()))
    }

    /// A change by the host, in one stop; `None` when it has to come back.
    fn host(&mut self, asks: &[Ask], rules: Rules) -> Option<Result<(), Fault>> {
        let ask = *asks.get(self.by_host)?;
        if rules.has(Rule::GuestLocks) && self.change.is_some() {
            return None;
        }
        let old = self.funcs_of(self.funcs);
        let Some(funcs) = changed(old.clone(), ask) else {
            return Some(Err(Fault::CallbackLost));
        };
        let direct = self.direct.is_some() || funcs.len() < 2 || old.is_empty();
        let asked = direct || rules.has(Rule::WindowAlways);
        let inside = self.in_window();
        if asked && rules.has(Rule::WindowEmpty) && !inside.is_empty() {
            return None;
        }
        self.direct = only(&funcs);
        self.key = !funcs.is_empty();
        let replaced = self.funcs;
        self.funcs = self.allocate(funcs, !rules.has(Rule::GuestAllocator))?;
        let graced = rules.has(Rule::ArrayGrace);
        self.pending.extend(replaced.map(|array| Pending {
            array,
            owed: inside.into_iter().filter(|_| graced).collect(),
            by_guest: false,
        }));
        self.by_host += 1;
        Some(Ok(()))
    }

    fn free(&mut self, index: usize) -> Option<Result<(), Fault>> {
        if !self.pending[index].owed.is_empty() {
            return None;
        }
        let Pending {
            array, by_guest, ..
        } = self.pending.remove(index);
        Some(match self.arrays[array].take() {
            None => Err(Fault::FreedTwice),
            Some(array) if array.ours && by_guest => Err(Fault::GuestFreedOurs),
            Some(_) => Ok(()),
        })
    }
}

impl Faulty for State {
    type Fault = Fault;

    fn fault(&self) -> Option<Fault> {
        self.fault
    }
}

impl Model for Tracepoint {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            key: false,
            direct: None,
            funcs: None,
            arrays: vec![None; 4],
            callers: vec![Caller::Outside; 2],
            laps: vec![self.laps; 2],
            change: None,
            owed_101: Vec::new(),
            owed_21: Vec::new(),
            pending: Vec::new(),
            by_guest: 0,
            by_host: 0,
            fault: None,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.fault.is_some() {
            return;
        }
        for (index, caller) in state.callers.iter().enumerate() {
            // Without the key it goes on as if the tracepoint was not there.
            if *caller != Caller::Outside || (state.key && state.laps[index] > 0) {
                actions.push(Action::Caller(index));
            }
        }
        actions.extend([Action::Guest, Action::Host]);
        actions.extend((0..state.pending.len()).map(Action::Free));
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        let done = match action {
            Action::Caller(index) => state.caller(index),
            Action::Guest => state.guest(&self.by_guest, self.rules)?,
            Action::Host => state.host(&self.by_host, self.rules)?,
            Action::Free(index) => state.free(index)?,
        };
        state.fault = done.err();
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(SAFE, |_, state: &State| state.fault.is_none()),
            Property::always(LIVE, |model: &Self, state: &State| {
                state.fault.is_some() || !model.is_over(state) || model.is_done(state)
            }),
            Property::sometimes(ENDS, |model: &Self, state: &State| {
                model.is_over(state) && model.is_done(state)
            }),
        ]
    }
}
