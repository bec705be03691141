//! What a guest and its VMM say, kept while they run and printed when a test fails.

use std::cell::RefCell;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::TestResult;

/// Text that grows; clones share it.
#[derive(Clone, Default)]
pub(crate) struct Text(Arc<(Mutex<State>, Condvar)>);

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

/// Text that did not come.
#[derive(Debug, thiserror::Error)]
#[error("no {wanted:?} {why}")]
pub(crate) struct Missing {
    wanted: String,
    why: String,
}

impl Text {
    /// Everything that comes from `from`, read by a thread of its own.
    pub(crate) fn of(mut from: impl Read + Send + 'static) -> Self {
        let text = Self::default();
        let filled = text.clone();
        thread::spawn(move || {
            let mut bytes = vec![0; 4096];
            while let Ok(n @ 1..) = from.read(&mut bytes) {
                let mut state = filled.lock();
                state
                    .bytes
                    .extend_from_slice(bytes.get(..n).unwrap_or_default());
                filled.0.1.notify_all();
            }
            filled.lock().ended = true;
            filled.0.1.notify_all();
        });
        text
    }

    /// All of it so far.
    pub(crate) fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    /// Its length in bytes so far.
    pub(crate) fn len(&self) -> usize {
        self.lock().bytes.len()
    }

    /// All of it, once it has ended, or what there is after `limit`.
    pub(crate) fn whole(&self, limit: Duration) -> String {
        let state = self.lock();
        let (state, _) = self
            .0
            .1
            .wait_timeout_while(state, limit, |state| !state.ended)
            .unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&state.bytes).into_owned()
    }

    /// Waits for `wanted` behind the first `from` bytes and returns what stands between.
    pub(crate) fn wait_for(
        &self,
        from: usize,
        wanted: &str,
        limit: Duration,
    ) -> Result<String, Missing> {
        let deadline = Instant::now() + limit;
        let missing = |why: String| Missing {
            wanted: wanted.to_owned(),
            why,
        };
        let mut state = self.lock();
        loop {
            let new = state.bytes.get(from..).unwrap_or_default();
            let new = String::from_utf8_lossy(new);
            if let Some((before, _)) = new.split_once(wanted) {
                return Ok(before.to_owned());
            }
            if state.ended {
                return Err(missing("before the output ended".into()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(missing(format!("within {limit:?}")));
            }
            state = self
                .0
                .1
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

thread_local! {
    /// What this test's guests said, under a title each.
    static SAID: RefCell<Vec<(String, Text)>> = const { RefCell::new(Vec::new()) };
}

/// Has a text printed if the test of this thread fails.
pub(crate) fn print_on_failure(title: String, text: Text) {
    SAID.with_borrow_mut(|said| said.push((title, text)));
}

/// Runs a test and prints what its guests said if it fails, by an error or a panic.
pub(crate) fn printed_on_failure(test: impl FnOnce() -> TestResult) -> TestResult {
    let result = catch_unwind(AssertUnwindSafe(test));
    let said = SAID.take();
    if !matches!(result, Ok(Ok(()))) {
        for (title, text) in said {
            eprintln!("----- {title} -----\n{}\n-----", text.so_far().trim_end());
        }
    }
    result.unwrap_or_else(|panic| resume_unwind(panic))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_for_what_comes_and_not_for_what_does_not() {
        let text = Text::of(&b"one two three"[..]);
        let soon = Duration::from_secs(5);
        assert_eq!(text.wait_for(0, "two", soon).unwrap(), "one ");
        assert_eq!(text.wait_for(4, "three", soon).unwrap(), "two ");
        let missing = text.wait_for(5, "two", soon).unwrap_err().to_string();
        assert_eq!(missing, "no \"two\" before the output ended");
    }
}
