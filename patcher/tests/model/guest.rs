//! The guest: a function with three sites, memory for generated code, tasks on vCPUs.
//!
//! Every context goes on by one instruction at a time. What the model knows beside what a guest
//! would, which code a context believes to be in, is only there to notice that it is wrong.

use std::ops::Range;

use patcher::grace::Queue;
use patcher::guest::Gva;

use super::engine::{Client, Entry, Site};
use super::rules::Rule;
use super::scenario::Scenario;

/// Where tasks are that are not in the kernel; for idle tasks, their own loop.
pub(crate) const USER: Gva = Gva(0x10);
/// The function.
pub(crate) const TEXT: Gva = Gva(0x1000);
/// A function of the guest that callbacks call.
pub(crate) const CALLEE: Gva = Gva(0x2000);
const ARENA: Gva = Gva(0x1_0000);
const SLOT: u64 = 0x100;

/// The function's instructions, as offset and the next one's.
const INSTRUCTIONS: [(u64, u64); 5] = [(0, 2), (2, 4), (4, 7), (7, 9), (9, 14)];
/// Where it ends.
const END: u64 = 14;
/// The instruction at which a function that sleeps does so.
const SLEEPS: u64 = 7;

/// Bytes that a jump takes the place of. The first two overlap.
pub(crate) const SITES: [Range<u64>; 3] = [2..7, 4..9, 9..14];

/// A probe, from when it is attached.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Probe {
    /// Never that of another.
    pub(crate) name: char,
    pub(crate) priority: i32,
    /// Its callback may sleep.
    pub(crate) sleeps: bool,
}

/// A callback and its data, as a trampoline has them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Act {
    pub(crate) probe: Probe,
    pub(crate) callback: usize,
    pub(crate) data: usize,
}

/// What is in a slot for code.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Code {
    Trampoline { site: usize, acts: Vec<Act> },
    Callback(Probe),
}

/// A return address.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Frame {
    pub(crate) to: Gva,
    pub(crate) code: Code,
    argument: Option<usize>,
    /// A tracer keeps it off the stack.
    pub(crate) shadow: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Runs {
    On(usize),
    /// Preempted, or just woken.
    Ready,
    Asleep,
    /// It does not come into the kernel any more.
    Done,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Task {
    pub(crate) runs: Runs,
    /// The instruction that comes next.
    pub(crate) at: Gva,
    /// The generated code that it believes to be in.
    pub(crate) within: Option<Code>,
    /// The data that a callback was given.
    argument: Option<usize>,
    /// What was loaded of a pair that is not one.
    loaded: Option<Act>,
    /// Innermost last.
    pub(crate) stack: Vec<Frame>,
    /// A word that an earlier call left on the stack.
    pub(crate) stale: Option<Gva>,
    pub(crate) listed: bool,
    laps: u8,
    pub(crate) switches: u64,
}

/// What must not happen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Fault {
    FreedCodeRuns,
    OtherCodeRuns,
    MiddleOfJumpRuns,
    FreedDataUsed,
    OthersDataUsed,
    CookiePassedEarly,
    FreedTwice,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct State {
    pub(crate) tasks: Vec<Task>,
    /// vCPUs that the host does not run.
    pub(crate) held: Vec<bool>,
    pub(crate) holds: u8,
    pub(crate) code: Vec<Option<Code>>,
    pub(crate) data: Vec<Option<Probe>>,
    pub(crate) sites: Vec<Option<Site>>,
    pub(crate) queue: Queue<Entry>,
    pub(crate) clients: Vec<Client>,
    pub(crate) fault: Option<Fault>,
}

enum Region {
    User,
    Text(u64),
    Callee,
    Slot(usize, u64),
}

fn region(at: Gva) -> Region {
    if at == USER {
        Region::User
    } else if at == CALLEE {
        Region::Callee
    } else if at < CALLEE {
        Region::Text(at.0 - TEXT.0)
    } else {
        let from = at.0 - ARENA.0;
        Region::Slot(
            usize::try_from(from / SLOT).unwrap_or(usize::MAX),
            from % SLOT,
        )
    }
}

fn address(slot: usize, step: u64) -> Gva {
    ARENA.offset(slot as u64 * SLOT + step)
}

/// All of a slot.
pub(crate) fn slot_range(slot: usize) -> Range<Gva> {
    address(slot, 0)..address(slot + 1, 0)
}

impl Task {
    pub(crate) fn new(laps: u8) -> Self {
        Self {
            runs: Runs::Ready,
            at: USER,
            within: None,
            argument: None,
            loaded: None,
            stack: Vec::new(),
            stale: None,
            listed: true,
            laps,
            switches: 0,
        }
    }

    fn sleep(&mut self) {
        self.runs = Runs::Asleep;
        self.switches += 1;
    }

    fn go_on(&mut self, offset: u64) {
        self.within = None;
        self.at = TEXT.offset(offset);
        if offset == END {
            self.at = USER;
            if self.laps == 0 {
                self.runs = Runs::Done;
                self.stale = None;
            }
        }
    }

    fn call(&mut self, act: Act, back: Gva, from: Code, shadow: bool) {
        self.stack.push(Frame {
            to: back,
            code: from,
            argument: None,
            shadow,
        });
        self.at = address(act.callback, 0);
        self.within = Some(Code::Callback(act.probe));
        self.argument = Some(act.data);
    }

    fn ret(&mut self) -> Option<Gva> {
        let frame = self.stack.pop()?;
        self.at = frame.to;
        self.within = Some(frame.code);
        self.argument = frame.argument;
        Some(frame.to)
    }
}

impl State {
    /// One instruction of a task.
    pub(crate) fn step(&mut self, index: usize, scenario: &Scenario) -> Result<(), Fault> {
        let task = &mut self.tasks[index];
        match region(task.at) {
            Region::User => {
                if scenario.tasks[index].exits && task.listed {
                    task.listed = false;
                } else {
                    task.laps -= 1;
                    task.stale = None;
                    task.at = TEXT;
                }
                Ok(())
            }
            Region::Callee => {
                task.ret();
                Ok(())
            }
            Region::Text(offset) => self.text(index, offset, scenario),
            Region::Slot(slot, step) => self.slot(index, slot, step, scenario),
        }
    }

    fn text(&mut self, index: usize, offset: u64, scenario: &Scenario) -> Result<(), Fault> {
        let task = &mut self.tasks[index];
        let mut sites = SITES.iter().zip(&self.sites);
        let hooked = sites.find_map(|(bytes, site)| {
            let site = site.as_ref()?;
            bytes.contains(&offset).then_some((bytes.start, site.slot))
        });
        match hooked {
            Some((start, slot)) if start == offset => {
                task.at = address(slot, 0);
                task.within.clone_from(&self.code[slot]);
                task.within
                    .is_some()
                    .then_some(())
                    .ok_or(Fault::FreedCodeRuns)
            }
            Some(_) => Err(Fault::MiddleOfJumpRuns),
            None => {
                let mut all = INSTRUCTIONS.iter();
                let next = all
                    .find(|(at, _)| *at == offset)
                    .map_or(END, |(_, next)| *next);
                task.go_on(next);
                if offset == SLEEPS && scenario.function_sleeps {
                    task.sleep();
                }
                Ok(())
            }
        }
    }

    fn slot(
        &mut self,
        index: usize,
        slot: usize,
        step: u64,
        scenario: &Scenario,
    ) -> Result<(), Fault> {
        let task = &mut self.tasks[index];
        let code = match &self.code[slot] {
            None => return Err(Fault::FreedCodeRuns),
            code if *code != task.within => return Err(Fault::OtherCodeRuns),
            Some(code) => code.clone(),
        };
        match &code {
            Code::Trampoline { site, acts } => {
                let (done, shadow) = (SITES[*site].end, scenario.graph_traced);
                let step = usize::try_from(step).unwrap_or(usize::MAX);
                if scenario.rules.has(Rule::OnePair) {
                    match acts.get(step).copied() {
                        Some(act) => task.call(act, address(slot, step as u64 + 1), code, shadow),
                        None => task.go_on(done),
                    }
                    return Ok(());
                }
                // One variable for callbacks and one for data, which are changed in place.
                let live = self.sites[*site].as_ref();
                let live = live.and_then(|site| site.acts.get(step / 2)).copied();
                match (task.loaded.take(), live) {
                    (None, None) => task.go_on(done),
                    (None, Some(act)) => {
                        task.loaded = Some(act);
                        task.at = address(slot, step as u64 + 1);
                    }
                    (Some(callback), act) => {
                        let data = act.unwrap_or(callback).data;
                        let torn = Act { data, ..callback };
                        task.call(torn, address(slot, step as u64 + 1), code, shadow);
                    }
                }
                Ok(())
            }
            Code::Callback(probe) => {
                let data = task.argument.and_then(|data| self.data[data]);
                match data {
                    None => return Err(Fault::FreedDataUsed),
                    Some(owner) if owner != *probe => return Err(Fault::OthersDataUsed),
                    Some(_) => {}
                }
                match step {
                    0 => {
                        task.at = address(slot, 1);
                        if probe.sleeps {
                            task.sleep();
                        }
                    }
                    1 if scenario.callee => {
                        task.stack.push(Frame {
                            to: address(slot, 2),
                            argument: task.argument,
                            shadow: scenario.graph_traced,
                            code,
                        });
                        task.within = None;
                        task.at = CALLEE;
                    }
                    _ => {
                        let left = task.ret();
                        task.stale = left.filter(|_| scenario.stale_words);
                    }
                }
                Ok(())
            }
        }
    }
}
