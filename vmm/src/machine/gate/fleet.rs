//! For tests: threads that behave like vCPUs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use patcher::guest::Gva;

use super::{Arrival, Gate, Pass, deadline_in};
use crate::machine::stop::StopError;

/// Threads that pass the gate, "run" until they are kicked or come to a breakpoint, and come back.
pub(super) struct Fleet {
    pub(super) gate: Arc<Gate>,
    pub(super) generation: u64,
    vcpus: Arc<Vec<FakeVcpu>>,
    threads: Vec<thread::JoinHandle<()>>,
}

#[derive(Default)]
struct FakeVcpu {
    kicked: AtomicBool,
    inside: AtomicBool,
    /// It gets to where a breakpoint may be.
    gets_there: AtomicBool,
}

impl FakeVcpu {
    fn run(&self, gate: &Gate, index: usize) {
        while gate.pass(index, || self.kicked.store(false, Ordering::SeqCst)) != Pass::Leave {
            self.inside.store(true, Ordering::SeqCst);
            while !self.kicked.load(Ordering::SeqCst) {
                let there = self.gets_there.load(Ordering::SeqCst);
                if there && gate.arrive(index, Gva(0x10), true) == Arrival::Held {
                    break;
                }
                thread::yield_now();
            }
            self.inside.store(false, Ordering::SeqCst);
        }
    }
}

impl Fleet {
    pub(super) fn start(count: usize) -> Self {
        let gate = Arc::new(Gate::default());
        let generation = gate.seat(count);
        let vcpus: Arc<Vec<_>> = Arc::new((0..count).map(|_| FakeVcpu::default()).collect());
        let start = |index: usize| {
            let (gate, vcpus) = (gate.clone(), vcpus.clone());
            thread::spawn(move || vcpus[index].run(&gate, index))
        };
        Self {
            threads: (0..count).map(start).collect(),
            gate,
            generation,
            vcpus,
        }
    }

    pub(super) fn kick(&self, index: usize) {
        self.vcpus[index].kicked.store(true, Ordering::SeqCst);
    }

    /// Lets a vCPU get to where a breakpoint may be, or not any more.
    pub(super) fn gets_there(&self, index: usize, there: bool) {
        self.vcpus[index].gets_there.store(there, Ordering::SeqCst);
    }

    /// How many are in the guest.
    pub(super) fn inside(&self) -> usize {
        (0..self.vcpus.len()).filter(|i| self.is_inside(*i)).count()
    }

    pub(super) fn is_inside(&self, index: usize) -> bool {
        self.vcpus[index].inside.load(Ordering::SeqCst)
    }

    /// Waits for a vCPU to be in the guest.
    pub(super) fn comes_inside(&self, index: usize) {
        let begun = Instant::now();
        while !self.is_inside(index) {
            assert!(begun.elapsed() < Duration::from_secs(10), "vCPU {index}");
            thread::yield_now();
        }
    }

    pub(super) fn hold(&self) -> Result<Instant, StopError> {
        let deadline = deadline_in(Duration::from_secs(10));
        self.gate
            .hold(self.generation, deadline, |index| self.kick(index))
    }

    pub(super) fn end(self) {
        self.gate.close();
        (0..self.vcpus.len()).for_each(|index| self.kick(index));
        for thread in self.threads {
            thread.join().unwrap();
        }
    }
}
