//! The rules, each of which can be switched off.

/// One rule. The number in brackets is the section of the design that states it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Rule {
    /// Instruction pointers of vCPUs are looked at (3).
    Registers,
    /// So are the words of every stack, the saved instruction pointer of who was preempted among
    /// them (3).
    Stacks,
    /// So are return addresses that a tracer keeps off the stack (3).
    ShadowReturns,
    /// Tasks count until their last switch, on the task list or not (3).
    ExitingTasks,
    /// Idle tasks, which are on no list, count (3).
    IdleTasks,
    /// A vCPU that the host does not run is a context like any other (8).
    DelayedVcpu,
    /// A stack that cannot be followed to its end proves nothing (3).
    ReliableUnwind,
    /// A voluntary switch proves nothing where a context may sleep, or which calls (3).
    SleepersByStack,
    /// Who is in generated code that goes on inside the bytes counts as inside (3).
    Closure,
    /// Several instructions change only when nobody is between them (4, rule 6).
    Interior,
    /// What goes with a site's trampoline waits for the site's earlier trampolines (6).
    SiteOrder,
    /// Callback and data are one immutable pair (6).
    OnePair,
    /// A cookie has passed when everything up to it is clear (7).
    CookieCoversAll,
    /// What is placed anew gets memory that was freed (5).
    FreedSlotsOnly,
    /// A tracepoint changes only when nobody is between the load of its array and the return (6).
    WindowEmpty,
    /// That also where no callback is called directly, before or after (6).
    WindowAlways,
    /// An array is freed when nobody is there any more who was there when it was replaced (6).
    ArrayGrace,
    /// The guest waits for its readers where it comes to one callback, from more or again from none
    /// (6).
    GuestWaits,
    /// While the guest changes its tracepoints, we do not (4, rule 5).
    GuestLocks,
    /// An array that the guest may free is from the guest's allocator (6).
    GuestAllocator,
}

/// All rules but some.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    without: &'static [Rule],
}

impl Rules {
    pub(crate) const ALL: Self = Self::without(&[]);

    pub(crate) const fn without(without: &'static [Rule]) -> Self {
        Self { without }
    }

    pub(crate) fn has(self, rule: Rule) -> bool {
        !self.without.contains(&rule)
    }
}
