//! Notices a guest that spins after a panic.
//!
//! A panicked kernel that does not reset stops its other CPUs and loops on one. So when one vCPU
//! has wanted a host CPU all the time for a while and the others have not at all, its instruction pointer
//! is sampled; when it stays within a few hundred bytes of kernel code, the kernel's own panic
//! state is looked up. Nothing is sampled in a guest that idles or does varied work, and a
//! false alarm makes the next one wait longer.

use std::sync::Weak;
use std::thread;
use std::time::{Duration, Instant};

use super::autopsy;
use super::shared::Shared;
use super::supervisor::Wish;
use super::vcpu::Ending;

const PERIOD: Duration = Duration::from_secs(1);
const SAMPLES: u32 = 3;
const SAMPLE_GAP: Duration = Duration::from_millis(150);
const STOP_DEADLINE: Duration = Duration::from_millis(500);
/// Loops that wait for time to pass fit into this many bytes.
const LOOP_BYTES: u64 = 1024;
/// Shares of one period, in percent, from which a vCPU counts as busy or as idle.
const BUSY: u128 = 80;
const IDLE: u128 = 5;
/// Busy periods in a row before the first sample.
const BUSY_PERIODS: u32 = 2;
const FIRST_BACKOFF: Duration = Duration::from_secs(30);
const MAX_BACKOFF: Duration = Duration::from_secs(600);

/// Starts the watching thread, which ends with the machine.
pub(super) fn start(shared: Weak<Shared>) -> std::io::Result<()> {
    thread::Builder::new()
        .name("watch".into())
        .stack_size(256 * 1024)
        .spawn(move || watch(&shared))
        .map(drop)
}

fn watch(shared: &Weak<Shared>) {
    let mut before: Vec<Duration> = Vec::new();
    let mut busy_periods = 0;
    let mut backoff = FIRST_BACKOFF;
    let mut not_before = Instant::now();
    loop {
        thread::sleep(PERIOD);
        let Some(shared) = shared.upgrade() else {
            return;
        };
        let now: Vec<Duration> = shared
            .cpus()
            .iter()
            .map(|cpu| thread_time(cpu.thread_id))
            .collect();
        let spins = now.len() == before.len() && one_is_busy(&before, &now);
        before = now;
        busy_periods = if spins { busy_periods + 1 } else { 0 };
        if busy_periods < BUSY_PERIODS || Instant::now() < not_before {
            continue;
        }
        busy_periods = 0;
        let generation = shared.incarnation();
        if !stays_in_place(&shared) {
            continue;
        }
        match panic_of(&shared) {
            // The machine ends, unless another guest runs by now.
            Some(panic) => shared.ask(Wish::Ended(generation, Ending::Panic(panic))),
            None => {
                not_before = Instant::now() + backoff;
                backoff = (backoff * 2).min(MAX_BACKOFF);
            }
        }
    }
}

/// Exactly one vCPU wanted its CPU all the time between two looks, and all others hardly at all.
fn one_is_busy(before: &[Duration], now: &[Duration]) -> bool {
    let shares = before
        .iter()
        .zip(now)
        .map(|(before, now)| now.saturating_sub(*before).as_micros() * 100 / PERIOD.as_micros());
    let (mut busy, mut between) = (0, 0);
    for share in shares {
        busy += u32::from(share >= BUSY);
        between += u32::from(share > IDLE && share < BUSY);
    }
    busy == 1 && between == 0
}

/// How long a thread of this process has run or waited for a CPU to run on: a host that has more to
/// do than CPUs changes nothing. Zero when it cannot be told.
fn thread_time(tid: i32) -> Duration {
    let path = format!("/proc/self/task/{tid}/schedstat");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let nanoseconds = text.split_whitespace().take(2);
    Duration::from_nanos(
        nanoseconds
            .filter_map(|word| word.parse::<u64>().ok())
            .sum(),
    )
}

/// Whether every vCPU that runs kernel code stays in one small loop, and none runs user code.
fn stays_in_place(shared: &Shared) -> bool {
    let mut range: Option<(u64, u64)> = None;
    for _ in 0..SAMPLES {
        let sampled = shared.with_stopped(STOP_DEADLINE, |stopped| {
            use patcher::guest::{Activity, StoppedGuest};
            let running = stopped
                .vcpus()
                .iter()
                .filter(|v| v.activity == Activity::Running);
            running
                .map(|vcpu| (vcpu.cpl(), vcpu.registers.rip))
                .collect::<Vec<_>>()
        });
        let Ok((contexts, _)) = sampled else {
            return false;
        };
        for (cpl, rip) in contexts {
            if cpl != 0 {
                return false;
            }
            let (low, high) = range.unwrap_or((rip, rip));
            range = Some((low.min(rip), high.max(rip)));
        }
        thread::sleep(SAMPLE_GAP);
    }
    range.is_some_and(|(low, high)| high - low <= LOOP_BYTES)
}

fn panic_of(shared: &Shared) -> Option<autopsy::Panic> {
    let kernel = shared.borrow_kernel().ok()?;
    let examined = shared.with_stopped(STOP_DEADLINE, |stopped| autopsy::examine(stopped, &kernel));
    examined.ok()?.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_busy_vcpu_among_idle_ones_is_suspicious() {
        let from = [Duration::ZERO; 3];
        let ms = |a, b, c| [a, b, c].map(Duration::from_millis);
        assert!(one_is_busy(&from, &ms(1000, 0, 10)));
        assert!(!one_is_busy(&from, &ms(1000, 900, 0)), "two work");
        assert!(
            !one_is_busy(&from, &ms(1000, 300, 0)),
            "another does something"
        );
        assert!(!one_is_busy(&from, &ms(0, 0, 0)), "all idle");
    }
}
