//! The rules that keep a guest alive while code comes and goes, by name.
//!
//! What a rule is for shows when it is left out. That takes the feature `broken-rules`, with which
//! tests build a binary of their own; everywhere else every rule holds, which the compiler knows.

/// A rule that a test may leave out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rule {
    /// What was unhooked is freed when nobody can come back to it, not before.
    GracePeriod,
    /// Who will return to code is in it, as who is there is.
    ReturnAddresses,
    /// To have gone to sleep proves nothing about code that may sleep.
    Sleepers,
    /// Idle tasks are contexts like all others.
    IdleTasks,
    /// So is what a vCPU runs at the moment of the stop.
    RunningTasks,
    /// A step begins when everybody has left what the one before it changed.
    Steps,
    /// No task is between the instructions that one jump takes the place of.
    Interior,
    /// Text in which the kernel is not watched by RCU is not changed.
    ForbiddenText,
    /// A callback that uses RCU is skipped where RCU is not watching.
    RcuWatching,
    /// What a tracepoint's callers may have loaded is freed after the guest waited for them.
    Readers,
}

#[cfg(feature = "broken-rules")]
mod broken {
    use std::sync::OnceLock;

    use super::Rule;

    const NAMES: [(&str, Rule); 10] = [
        ("grace-period", Rule::GracePeriod),
        ("return-addresses", Rule::ReturnAddresses),
        ("sleepers", Rule::Sleepers),
        ("idle-tasks", Rule::IdleTasks),
        ("running-tasks", Rule::RunningTasks),
        ("steps", Rule::Steps),
        ("interior", Rule::Interior),
        ("forbidden-text", Rule::ForbiddenText),
        ("rcu-watching", Rule::RcuWatching),
        ("readers", Rule::Readers),
    ];

    static LEFT_OUT: OnceLock<Vec<Rule>> = OnceLock::new();

    /// Leaves rules out from now on, by their names, separated by commas.
    ///
    /// # Errors
    /// The first word that is no rule's name.
    pub fn leave_out(names: &str) -> Result<(), String> {
        let rule = |word: &str| {
            let found = NAMES.iter().find(|(name, _)| *name == word);
            found
                .map(|(_, rule)| *rule)
                .ok_or_else(|| format!("no rule is called {word:?}"))
        };
        let rules: Result<Vec<_>, _> = names.split(',').map(rule).collect();
        // Once in a process: what holds does not change while a guest runs.
        let _ = LEFT_OUT.set(rules?);
        Ok(())
    }

    pub(crate) fn holds(rule: Rule) -> bool {
        !LEFT_OUT.get().is_some_and(|out| out.contains(&rule))
    }
}

#[cfg(feature = "broken-rules")]
pub(crate) use broken::holds;
#[cfg(feature = "broken-rules")]
pub use broken::leave_out;

/// Whether a rule holds: all of them do.
#[cfg(not(feature = "broken-rules"))]
pub(crate) const fn holds(_: Rule) -> bool {
    true
}
