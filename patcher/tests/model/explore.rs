//! Every order in which tasks, vCPUs, the host and clients can go on.

use std::collections::BTreeSet;
use std::hash::Hash;
use std::sync::{Arc, Mutex};

use patcher::grace::{Evidence, Queue};
use stateright::{Checker, HasDiscoveries, Model, Property};

use super::engine::Client;
use super::guest::{Fault, Runs, SITES, State, Task, USER};
use super::scenario::Scenario;

/// Nothing that must not happen has happened.
pub(crate) const SAFE: &str = "safe";
/// When everybody has left, everything is freed, and nobody waits for anything.
pub(crate) const LIVE: &str = "live";

/// There is such an end at all.
pub(crate) const ENDS: &str = "ends";

/// A state in which something may have gone wrong.
pub(crate) trait Faulty {
    type Fault: std::fmt::Debug;

    fn fault(&self) -> Option<Self::Fault>;
}

/// How it came to a state.
pub(crate) struct Way<F> {
    pub(crate) fault: Option<F>,
    pub(crate) actions: Vec<String>,
}

/// What came out of looking at all states.
pub(crate) struct Outcome<F> {
    pub(crate) states: usize,
    /// To a state that is not safe.
    pub(crate) wrong: Option<Way<F>>,
    /// To an end at which something is left.
    pub(crate) stuck: Option<Way<F>>,
    /// To one at which nothing is.
    pub(crate) end: Option<Way<F>>,
}

/// Looks at all states, or until one is found that must not be.
pub(crate) fn explore<M>(model: M) -> Outcome<<M::State as Faulty>::Fault>
where
    M: Model + Send + Sync + 'static,
    M::State: Faulty + Clone + PartialEq + Hash + Send + Sync + 'static,
    M::Action: Clone + PartialEq + std::fmt::Debug + Send + Sync + 'static,
{
    let any = HasDiscoveries::AnyFailures;
    let checked = model.checker().finish_when(any).spawn_bfs().join();
    let way = |name| {
        let path = checked.discovery(name)?;
        let fault = path.last_state().fault();
        let actions = path.into_actions();
        let actions = actions.iter().map(|action| format!("{action:?}"));
        Some(Way {
            fault,
            actions: actions.collect(),
        })
    };
    Outcome {
        states: checked.unique_state_count(),
        wrong: way(SAFE),
        stuck: way(LIVE),
        end: way(ENDS),
    }
}

/// What goes on next.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Action {
    /// A task executes one instruction.
    Step(usize),
    /// An interrupt takes a task off its vCPU.
    Preempt(usize),
    /// A vCPU takes a task up.
    Run { task: usize, vcpu: usize },
    /// What a task slept for has come.
    Wake(usize),
    /// The host takes a vCPU off.
    Hold(usize),
    /// The host runs it again.
    Release(usize),
    /// The guest is stopped for what a client asks for next.
    Ask(usize),
    /// The guest is stopped to see what can be freed.
    Look,
}

/// The model of probes.
#[derive(Clone, Debug)]
pub(crate) struct Probes {
    pub(crate) scenario: Scenario,
    /// What has ever spoken for a task.
    pub(crate) spoke: Arc<Mutex<BTreeSet<Evidence>>>,
}

impl Probes {
    pub(crate) fn new(scenario: Scenario) -> Self {
        Self {
            scenario,
            spoke: Arc::default(),
        }
    }

    fn look(&self, state: &mut State) -> Result<(), Fault> {
        let (cleared, done) = state.collect(&self.scenario);
        if let (false, Ok(mut spoke)) = (cleared.is_empty(), self.spoke.lock()) {
            spoke.extend(cleared);
        }
        done
    }

    /// Every task has left, and nothing that the host does changes anything.
    fn is_over(&self, state: &State) -> bool {
        let left = |task: &Task| task.runs == Runs::Done;
        let waits = |client| state.clone().ask(client, &self.scenario).is_none();
        state.tasks.iter().all(left)
            && (0..state.clients.len()).all(waits)
            && self.next_state(state, Action::Look).is_none()
    }

    fn is_done(&self, state: &State) -> bool {
        let asked = |(client, asks): (&Client, &Vec<_>)| client.next == asks.len();
        let mut clients = state.clients.iter().zip(&self.scenario.clients);
        let taken = state.code.iter().flatten().count() + state.data.iter().flatten().count();
        let sites = state.sites.iter().flatten();
        let hooked: usize = sites.map(|site| 1 + 2 * site.acts.len()).sum();
        clients.all(asked) && state.queue.is_empty() && taken == hooked
    }
}

impl Faulty for State {
    type Fault = Fault;

    fn fault(&self) -> Option<Fault> {
        self.fault
    }
}

impl Model for Probes {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let scenario = &self.scenario;
        let natures = scenario.tasks.iter();
        vec![State {
            tasks: natures.map(|nature| Task::new(nature.laps)).collect(),
            held: vec![false; scenario.vcpus],
            holds: scenario.holds,
            code: vec![None; scenario.slots],
            data: vec![None; scenario.slots / 2],
            sites: vec![None; SITES.len()],
            queue: Queue::default(),
            clients: vec![Client::default(); scenario.clients.len()],
            fault: None,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.fault.is_some() {
            return;
        }
        let on = |vcpu| {
            let mut tasks = state.tasks.iter();
            tasks.any(|task| task.runs == Runs::On(vcpu))
        };
        // It does not matter which of those that have nothing to do.
        let free = (0..state.held.len()).find(|vcpu| !on(*vcpu) && !state.held[*vcpu]);
        for (index, task) in state.tasks.iter().enumerate() {
            match task.runs {
                Runs::On(vcpu) if !state.held[vcpu] => {
                    actions.push(Action::Step(index));
                    if !self.scenario.tasks[index].idle || task.at == USER {
                        actions.push(Action::Preempt(index));
                    }
                }
                Runs::Ready => actions.extend(free.map(|vcpu| Action::Run { task: index, vcpu })),
                Runs::Asleep => actions.push(Action::Wake(index)),
                Runs::On(_) | Runs::Done => {}
            }
        }
        for (vcpu, held) in state.held.iter().enumerate() {
            if *held {
                actions.push(Action::Release(vcpu));
            } else if state.holds > 0 && on(vcpu) {
                actions.push(Action::Hold(vcpu));
            }
        }
        actions.extend((0..state.clients.len()).map(Action::Ask));
        if !state.queue.is_empty() {
            actions.push(Action::Look);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        let done = match action {
            Action::Step(task) => state.step(task, &self.scenario),
            Action::Preempt(task) | Action::Wake(task) => {
                state.tasks[task].runs = Runs::Ready;
                Ok(())
            }
            Action::Run { task, vcpu } => {
                state.tasks[task].runs = Runs::On(vcpu);
                Ok(())
            }
            Action::Hold(vcpu) => {
                state.held[vcpu] = true;
                state.holds -= 1;
                Ok(())
            }
            Action::Release(vcpu) => {
                state.held[vcpu] = false;
                Ok(())
            }
            Action::Ask(client) => state.ask(client, &self.scenario)?,
            Action::Look => self.look(&mut state),
        };
        state.fault = done.err();
        state.settle_debts();
        (state != *last).then_some(state)
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
