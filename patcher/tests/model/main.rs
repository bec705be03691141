//! A model of how probes come and go, and of when what they leave behind is freed, checked in every
//! order in which its parts can go on.
//!
//! Modelled: tasks that execute a function with three sites by one instruction at a time, on one or
//! two vCPUs; preempted at any of them, on another vCPU afterwards; asleep in a callback or behind
//! the site; idle tasks; tasks that have left the task list; a vCPU that the host does not run;
//! clients that attach and detach probes of different priority and wait for cookies, each stop one
//! step; memory for code and data that is used again as soon as it is freed. Apart from that, a
//! tracepoint of the guest, whose array, static call and key the guest changes in its own order, for
//! itself or because we ask it to, and the host in one stop, as the design has it ([`tracepoint`]).
//!
//! Not modelled: how contexts are found and read (that is tested on images and in guests), bytes
//! (an instruction is one step, a jump is written at once, as no vCPU runs meanwhile), interrupts on
//! top of a task, what fails for want of memory.
//!
//! What must not happen is in [`guest::Fault`] and [`tracepoint::Fault`]; and when all tasks have
//! left, everything must be freed and nobody may wait. [`rules::Rule`] names the rules and where the
//! design states them. For each there is a test that without it something goes wrong: it is not
//! there for nothing, and the model would notice if the engine lost it.
//!
//! The numbers of what was unhooked, its order and cookies, what speaks for a task, where nobody
//! must be and the order of probes are the engine's own code, not a copy.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

mod engine;
mod explore;
mod guest;
mod rules;
mod scenario;
mod tracepoint;

use std::collections::BTreeSet;
use std::fmt::Debug;

use explore::{Outcome, Probes, Way, explore};
use guest::Fault;
use patcher::grace::Evidence;
use rules::{Rule, Rules};
use scenario::Scenario;
use tracepoint::Tracepoint;

#[track_caller]
fn all_is_well<F: Debug>(name: &str, outcome: Outcome<F>) {
    println!("{name}: {} states", outcome.states);
    for (way, what) in [(outcome.wrong, "not safe"), (outcome.stuck, "not freed")] {
        if let Some(Way { fault, actions }) = way {
            panic!("{name}: {what}: {fault:?} after {}", actions.join(", "));
        }
    }
    assert!(outcome.end.is_some(), "{name}: no end was reached");
}

#[track_caller]
fn goes_wrong<F: Debug + PartialEq>(without: &[Rule], outcome: Outcome<F>, how: F) {
    let states = outcome.states;
    let Some(Way { fault, actions }) = outcome.wrong else {
        panic!("{without:?} is not needed in {states} states");
    };
    let (len, actions) = (actions.len(), actions.join(", "));
    println!("without {without:?}: {fault:?} after {len} actions: {actions}");
    assert_eq!(fault, Some(how), "without {without:?}");
}

#[track_caller]
fn without(without: &'static [Rule], scenario: Scenario, how: Fault) {
    let rules = Rules::without(without);
    let scenario = Scenario { rules, ..scenario };
    goes_wrong(without, explore(Probes::new(scenario)), how);
}

#[track_caller]
fn tracepoint_without(without: &'static [Rule], model: Tracepoint, how: tracepoint::Fault) {
    let rules = Rules::without(without);
    goes_wrong(without, explore(Tracepoint { rules, ..model }), how);
}

#[test]
fn probes_come_and_go_in_every_order() {
    use Scenario as S;
    for scenario in [S::clients(), S::permuted(), S::hooked_again()] {
        all_is_well(scenario.name, explore(Probes::new(scenario)));
    }
}

#[test]
fn whoever_is_in_unhooked_code_is_waited_for() {
    use Scenario as S;
    let tasks = [S::preempted(), S::idle(), S::exiting(), S::sleeping()];
    let others = [S::delayed(), S::traced(), S::overlapping(), S::two_sites()];
    for scenario in tasks.into_iter().chain(others) {
        all_is_well(scenario.name, explore(Probes::new(scenario)));
    }
}

#[test]
fn stale_words_hold_nothing_up_for_good() {
    let mut spoke = BTreeSet::new();
    for scenario in [Scenario::stale(), Scenario::stale_and_lost()] {
        let name = scenario.name;
        let model = Probes::new(scenario);
        let evidence = model.spoke.clone();
        all_is_well(name, explore(model));
        spoke.extend(evidence.lock().unwrap().iter().copied());
    }
    // Each kind was needed.
    let all = [
        Evidence::UserMode,
        Evidence::VoluntarySwitch,
        Evidence::UnwindClear,
    ];
    assert_eq!(spoke, BTreeSet::from(all));
}

#[test]
fn registers_are_looked_at() {
    without(
        &[Rule::Registers],
        Scenario::delayed(),
        Fault::FreedCodeRuns,
    );
}

#[test]
fn stacks_are_looked_at() {
    without(&[Rule::Stacks], Scenario::preempted(), Fault::FreedCodeRuns);
}

#[test]
fn shadow_returns_are_looked_at() {
    without(
        &[Rule::ShadowReturns],
        Scenario::traced(),
        Fault::FreedCodeRuns,
    );
}

#[test]
fn exiting_tasks_count() {
    without(
        &[Rule::ExitingTasks],
        Scenario::exiting(),
        Fault::FreedCodeRuns,
    );
}

#[test]
fn idle_tasks_count() {
    without(&[Rule::IdleTasks], Scenario::idle(), Fault::FreedCodeRuns);
}

#[test]
fn delayed_vcpus_count() {
    without(
        &[Rule::DelayedVcpu],
        Scenario::delayed(),
        Fault::FreedCodeRuns,
    );
}

#[test]
fn a_stack_that_cannot_be_followed_proves_nothing() {
    without(
        &[Rule::ReliableUnwind],
        Scenario::sleeping(),
        Fault::FreedCodeRuns,
    );
}

#[test]
fn who_sleeps_in_a_callback_has_not_left_it() {
    without(
        &[Rule::SleepersByStack],
        Scenario::sleeping(),
        Fault::FreedCodeRuns,
    );
}

#[test]
fn generated_code_goes_on_elsewhere() {
    without(
        &[Rule::Closure],
        Scenario::overlapping(),
        Fault::MiddleOfJumpRuns,
    );
}

#[test]
fn nobody_is_inside_bytes_that_change() {
    without(
        &[Rule::Interior],
        Scenario::overlapping(),
        Fault::MiddleOfJumpRuns,
    );
}

#[test]
fn trampolines_of_a_site_are_freed_in_order() {
    without(
        &[Rule::SiteOrder],
        Scenario::clients(),
        Fault::FreedCodeRuns,
    );
}

#[test]
fn callback_and_data_are_one_pair() {
    without(&[Rule::OnePair], Scenario::clients(), Fault::OthersDataUsed);
}

#[test]
fn a_cookie_covers_all_up_to_it() {
    without(
        &[Rule::CookieCoversAll],
        Scenario::two_sites(),
        Fault::CookiePassedEarly,
    );
}

#[test]
fn only_freed_memory_is_used_again() {
    without(
        &[Rule::FreedSlotsOnly],
        Scenario::clients(),
        Fault::FreedTwice,
    );
}

#[test]
fn nothing_goes_wrong_with_a_tracepoint() {
    use Tracepoint as T;
    for model in [T::by_the_guest(), T::together(), T::alone()] {
        all_is_well(model.name, explore(model));
    }
}

#[test]
fn nobody_is_in_the_window_of_a_tracepoint() {
    tracepoint_without(
        &[Rule::WindowEmpty],
        Tracepoint::alone(),
        tracepoint::Fault::OthersData,
    );
}

/// The guest waits for readers of a first callback's data only when it has itself replaced that.
#[test]
fn nor_where_only_the_iterator_is_called() {
    tracepoint_without(
        &[Rule::WindowAlways],
        Tracepoint::together(),
        tracepoint::Fault::OthersData,
    );
}

#[test]
fn arrays_are_freed_when_nobody_reads_them() {
    const RULES: &[Rule] = &[Rule::WindowAlways, Rule::ArrayGrace];
    tracepoint_without(
        RULES,
        Tracepoint::together(),
        tracepoint::Fault::FreedArrayUsed,
    );
    // Where nobody is in the window at all, their grace period is over at once.
    let rules = Rules::without(&[Rule::ArrayGrace]);
    let name = "tracepoint, arrays freed at once";
    let model = Tracepoint {
        rules,
        ..Tracepoint::alone()
    };
    all_is_well(name, explore(model));
}

/// What the guest's own kernel must do when it is asked to add and remove callbacks.
#[test]
fn the_guest_waits_for_its_readers() {
    tracepoint_without(
        &[Rule::GuestWaits],
        Tracepoint::by_the_guest(),
        tracepoint::Fault::OthersData,
    );
}

#[test]
fn the_guest_is_not_changing_the_tracepoint() {
    tracepoint_without(
        &[Rule::GuestLocks],
        Tracepoint::together(),
        tracepoint::Fault::CallbackLost,
    );
}

#[test]
fn arrays_are_from_the_guests_allocator() {
    tracepoint_without(
        &[Rule::GuestAllocator],
        Tracepoint::together(),
        tracepoint::Fault::GuestFreedOurs,
    );
}
