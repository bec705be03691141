//! Threads for commands that can wait.
//!
//! A command never queues behind another: a thread is started when none is idle. One idle thread
//! is kept for the next command (a stop should not pay for a new thread), the others end.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What a thread does.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// Below 2 MiB, so that the host does not back a stack with one huge page.
const STACK: usize = 1 << 20;

/// How long a thread waits for work before it ends, unless it is the last.
const LINGER: Duration = Duration::from_secs(2);

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    idle: usize,
    threads: usize,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module's documentation.
#[derive(Clone, Default)]
pub(crate) struct Workers {
    shared: Arc<Shared>,
}

impl Workers {
    /// Has the job done on another thread.
    ///
    /// # Errors
    /// When there is no thread and the host gives none; the job is then not done.
    pub(crate) fn run(&self, job: Job) -> io::Result<()> {
        let mut state = self.shared.state();
        if state.idle <= state.jobs.len() {
            let shared = Arc::clone(&self.shared);
            let started = std::thread::Builder::new()
                .name("control-job".to_owned())
                .stack_size(STACK)
                .spawn(move || work(&shared));
            match started {
                Ok(_) => state.threads += 1,
                // Better late than never, if there is a thread that will come to it.
                Err(error) if state.threads == 0 => return Err(error),
                Err(error) => tracing::warn!(%error, "no thread for a command; it has to wait"),
            }
        }
        state.jobs.push_back(job);
        drop(state);
        self.shared.work.notify_one();
        Ok(())
    }
}

fn work(shared: &Shared) {
    let mut state = shared.state();
    loop {
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!("a command panicked");
            }
            state = shared.state();
            continue;
        }
        state.idle += 1;
        let (woken, waited) = shared
            .work
            .wait_timeout(state, LINGER)
            .unwrap_or_else(PoisonError::into_inner);
        state = woken;
        state.idle -= 1;
        if waited.timed_out() && state.jobs.is_empty() && state.threads > 1 {
            state.threads -= 1;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::mpsc::channel;

    #[test]
    fn no_job_waits_for_another() {
        let workers = Workers::default();
        // All of them have to run at the same time for any of them to end.
        let barrier = Arc::new(Barrier::new(20));
        let (done, all) = channel();
        for _ in 0..20 {
            let (barrier, done) = (Arc::clone(&barrier), done.clone());
            let job = Box::new(move || {
                barrier.wait();
                let _ = done.send(());
            });
            assert!(workers.run(job).is_ok());
        }
        for _ in 0..20 {
            assert!(all.recv_timeout(Duration::from_secs(20)).is_ok());
        }
    }

    #[test]
    fn a_panic_takes_no_thread_away() {
        let workers = Workers::default();
        let (done, all) = channel::<()>();
        for n in 0..10 {
            let done = done.clone();
            let job = Box::new(move || {
                let _done = done;
                assert!(n % 2 == 0, "on purpose");
            });
            assert!(workers.run(job).is_ok());
        }
        drop(done);
        // Every sender is dropped when every job has run.
        let ended = all.recv_timeout(Duration::from_secs(20));
        assert_eq!(ended, Err(std::sync::mpsc::RecvTimeoutError::Disconnected));
        assert!(workers.shared.state().jobs.is_empty());
    }
}
