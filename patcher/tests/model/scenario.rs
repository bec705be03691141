//! What is explored: which tasks there are, and what clients ask for.

use super::guest::Probe;
use super::rules::Rules;

/// One step of a client.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ask {
    /// Put a probe on a site.
    Attach(usize, Probe),
    Detach(Probe),
    /// Take a cookie.
    Snapshot,
    /// Go on when the cookie has passed.
    Wait,
}

/// A task, by what it may do.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Nature {
    /// It is some CPU's idle task: on no list, and preempted only in its own loop.
    pub(crate) idle: bool,
    /// It leaves the task list, and then comes to the function once more.
    pub(crate) exits: bool,
    /// How often it comes to the function.
    pub(crate) laps: u8,
}

/// Where no stack can be followed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lost {
    Nowhere,
    /// In what callbacks call.
    InCallee,
    /// The kernel has no unwind tables.
    Everywhere,
}

#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) rules: Rules,
    pub(crate) vcpus: usize,
    pub(crate) tasks: Vec<Nature>,
    pub(crate) clients: Vec<Vec<Ask>>,
    /// Slots for code; there are half as many for data.
    pub(crate) slots: usize,
    /// How often the host takes a vCPU off.
    pub(crate) holds: u8,
    /// Callbacks call a function of the guest.
    pub(crate) callee: bool,
    /// Where the unwinder cannot follow a stack.
    pub(crate) lost: Lost,
    /// Return addresses of what is called are kept off the stack.
    pub(crate) graph_traced: bool,
    /// Return addresses stay on stacks when they were used.
    pub(crate) stale_words: bool,
    /// The function sleeps, behind the first site.
    pub(crate) function_sleeps: bool,
}

const TASK: Nature = Nature {
    idle: false,
    exits: false,
    laps: 1,
};

const fn probe(name: char) -> Probe {
    Probe {
        name,
        priority: 0,
        sleeps: false,
    }
}

/// The site of several instructions.
const LONG: usize = 0;
/// One that overlaps with it.
const OVERLAPS: usize = 1;
/// The site of one instruction.
const SHORT: usize = 2;

const fn attach(site: usize, name: char) -> Ask {
    Ask::Attach(site, probe(name))
}

const fn detach(name: char) -> Ask {
    Ask::Detach(probe(name))
}

/// A client whose probe comes and goes before it puts another one there.
fn one_after_another() -> Vec<Vec<Ask>> {
    let asks = [
        attach(SHORT, 'a'),
        detach('a'),
        attach(SHORT, 'b'),
        detach('b'),
    ];
    vec![asks.to_vec()]
}

impl Scenario {
    /// Two tasks, and two clients whose probes come and go at one site.
    fn new(name: &'static str) -> Self {
        Self {
            name,
            rules: Rules::ALL,
            vcpus: 2,
            tasks: vec![TASK; 2],
            clients: vec![
                vec![attach(SHORT, 'a'), detach('a')],
                vec![attach(SHORT, 'b'), detach('b')],
            ],
            slots: 6,
            holds: 0,
            callee: false,
            lost: Lost::Nowhere,
            graph_traced: false,
            stale_words: false,
            function_sleeps: false,
        }
    }

    /// Two clients put probes on one site, and take them away.
    pub(crate) fn clients() -> Self {
        Self {
            clients: vec![
                vec![attach(LONG, 'a'), detach('a'), Ask::Snapshot, Ask::Wait],
                vec![attach(LONG, 'b'), detach('b')],
            ],
            ..Self::new("two clients")
        }
    }

    /// One vCPU does for three tasks: two are always preempted somewhere.
    pub(crate) fn preempted() -> Self {
        Self {
            vcpus: 1,
            tasks: vec![TASK; 3],
            clients: one_after_another(),
            ..Self::new("preempted tasks")
        }
    }

    /// Probes of different priority come and go at one site, in every order.
    pub(crate) fn permuted() -> Self {
        let first = Probe {
            priority: 1,
            ..probe('c')
        };
        Self {
            tasks: vec![TASK],
            clients: vec![
                vec![attach(LONG, 'a'), detach('a'), Ask::Snapshot, Ask::Wait],
                vec![attach(LONG, 'b'), detach('b')],
                vec![Ask::Attach(LONG, first), Ask::Detach(first)],
            ],
            slots: 8,
            ..Self::new("three probes")
        }
    }

    /// A trampoline that waits to be freed is hooked again, before others that wait.
    pub(crate) fn hooked_again() -> Self {
        let asks = [
            attach(SHORT, 'a'),
            attach(SHORT, 'b'),
            attach(SHORT, 'c'),
            detach('b'),
            detach('c'),
            detach('a'),
        ];
        Self {
            clients: vec![asks.to_vec()],
            slots: 8,
            ..Self::new("hooked again")
        }
    }

    /// An idle task is in what a callback calls.
    pub(crate) fn idle() -> Self {
        let idle = Nature { idle: true, ..TASK };
        Self {
            tasks: vec![idle, TASK],
            callee: true,
            ..Self::new("idle task")
        }
    }

    /// A task that is on no list any more is preempted.
    pub(crate) fn exiting() -> Self {
        let exits = Nature {
            exits: true,
            ..TASK
        };
        Self {
            tasks: vec![exits, TASK],
            callee: true,
            ..Self::new("exiting task")
        }
    }

    /// The host takes a vCPU off at any instruction.
    pub(crate) fn delayed() -> Self {
        Self {
            clients: one_after_another(),
            holds: 1,
            ..Self::new("delayed vCPU")
        }
    }

    /// A callback sleeps, and calls what no unwinder follows.
    pub(crate) fn sleeping() -> Self {
        let sleeper = Probe {
            sleeps: true,
            ..probe('s')
        };
        Self {
            clients: vec![
                vec![Ask::Attach(SHORT, sleeper), Ask::Detach(sleeper)],
                vec![attach(SHORT, 'b'), detach('b')],
            ],
            callee: true,
            lost: Lost::InCallee,
            ..Self::new("sleeping callback")
        }
    }

    /// A tracer has taken the return addresses.
    pub(crate) fn traced() -> Self {
        Self {
            callee: true,
            graph_traced: true,
            ..Self::new("shadow returns")
        }
    }

    /// One site after another that overlaps with it.
    pub(crate) fn overlapping() -> Self {
        Self {
            clients: vec![
                vec![attach(LONG, 'a'), detach('a')],
                vec![attach(OVERLAPS, 'b'), detach('b')],
            ],
            ..Self::new("overlapping sites")
        }
    }

    /// Two sites in one function, and a cookie for each.
    pub(crate) fn two_sites() -> Self {
        Self {
            clients: vec![
                vec![attach(LONG, 'a'), detach('a'), Ask::Snapshot, Ask::Wait],
                vec![attach(SHORT, 'b'), detach('b'), Ask::Snapshot, Ask::Wait],
            ],
            ..Self::new("cookies of two sites")
        }
    }

    /// Addresses stay on the stacks of tasks that have left: each kind of evidence is needed.
    pub(crate) fn stale() -> Self {
        let often = Nature { laps: 2, ..TASK };
        Self {
            tasks: vec![often, TASK],
            clients: vec![vec![
                attach(LONG, 'a'),
                detach('a'),
                Ask::Snapshot,
                Ask::Wait,
            ]],
            stale_words: true,
            function_sleeps: true,
            ..Self::new("stale words")
        }
    }

    /// The same in a kernel whose stacks cannot be followed.
    pub(crate) fn stale_and_lost() -> Self {
        Self {
            name: "stale words, no unwinder",
            lost: Lost::Everywhere,
            ..Self::stale()
        }
    }
}
