//! What a task is doing, in the words of `ps`.

/// A task's state as /proc/PID/stat shows it (`task_state_index()` in include/linux/sched.h).
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub enum TaskState {
    /// Running, or waiting for a CPU.
    #[serde(rename = "R")]
    Running,
    /// Asleep until an event or a signal.
    #[serde(rename = "S")]
    Sleeping,
    /// Asleep until an event.
    #[serde(rename = "D")]
    DiskSleep,
    /// Stopped by a signal.
    #[serde(rename = "T")]
    Stopped,
    /// Stopped by a debugger.
    #[serde(rename = "t")]
    TracingStop,
    /// Gone, but for its last bits.
    #[serde(rename = "X")]
    Dead,
    /// Gone, and its parent has not asked for its status.
    #[serde(rename = "Z")]
    Zombie,
    /// A kernel thread that is parked.
    #[serde(rename = "P")]
    Parked,
    /// A kernel thread that has nothing to do.
    #[serde(rename = "I")]
    Idle,
}

/// Bits of `task_struct.__state` and `exit_state`. They are macros, so the kernel's types do not
/// tell them; they are the same in all kernels from 4.14 to 7.2 that have them.
mod bits {
    /// TASK_REPORT: what is told at all, TASK_INTERRUPTIBLE up to TASK_PARKED.
    pub(super) const REPORT: u64 = 0x7f;
    /// TASK_IDLE: TASK_UNINTERRUPTIBLE and TASK_NOLOAD.
    pub(super) const IDLE: u64 = 0x402;
    /// TASK_RTLOCK_WAIT (5.15) and TASK_FROZEN (6.1), both told as TASK_UNINTERRUPTIBLE.
    pub(super) const UNINTERRUPTIBLE_TOO: u64 = 0x9000;
}

impl TaskState {
    /// From the bits of `__state` and `exit_state`.
    #[must_use]
    pub const fn of(state: u64, exit_state: u64) -> Self {
        if state & bits::IDLE == bits::IDLE {
            return Self::Idle;
        }
        if state & bits::UNINTERRUPTIBLE_TOO != 0 {
            return Self::DiskSleep;
        }
        // The highest bit counts.
        match (state | exit_state) & bits::REPORT {
            0 => Self::Running,
            1 => Self::Sleeping,
            2..=3 => Self::DiskSleep,
            4..=7 => Self::Stopped,
            8..=0xf => Self::TracingStop,
            0x10..=0x1f => Self::Dead,
            0x20..=0x3f => Self::Zombie,
            _ => Self::Parked,
        }
    }

    /// Its letter.
    #[must_use]
    pub const fn letter(self) -> char {
        match self {
            Self::Running => 'R',
            Self::Sleeping => 'S',
            Self::DiskSleep => 'D',
            Self::Stopped => 'T',
            Self::TracingStop => 't',
            Self::Dead => 'X',
            Self::Zombie => 'Z',
            Self::Parked => 'P',
            Self::Idle => 'I',
        }
    }
}

/// What the scheduler has a task for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scheduling {
    /// On a CPU, or just being switched to or from.
    OnCpu,
    /// Waits for a CPU.
    Queued,
    /// Waits for a CPU although its state says that it sleeps: it was preempted on its way there.
    Preempted,
    /// Asleep, and still on its run queue for fairness (`se.sched_delayed`, 6.12 and later).
    Delayed,
    /// Does not want a CPU.
    Off,
}

impl Scheduling {
    /// From a task's `on_cpu`, `on_rq`, `__state` and `se.sched_delayed`.
    #[must_use]
    pub const fn of(on_cpu: bool, on_rq: bool, state: u64, delayed: bool) -> Self {
        match (on_cpu, on_rq, delayed, state) {
            (true, ..) => Self::OnCpu,
            (_, false, ..) => Self::Off,
            (_, _, true, _) => Self::Delayed,
            (_, _, _, 0) => Self::Queued,
            _ => Self::Preempted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_those_of_ps() {
        for (state, exit_state, letter) in [
            (0, 0, 'R'),
            (0x1, 0, 'S'),
            (0x2001, 0, 'S'),
            (0x2, 0, 'D'),
            (0x102, 0, 'D'),
            (0x402, 0, 'I'),
            (0x2402, 0, 'I'),
            (0x1000, 0, 'D'),
            (0x8000, 0, 'D'),
            (0x104, 0, 'T'),
            (0x108, 0, 't'),
            (0x80, 0x10, 'X'),
            (0x80, 0x20, 'Z'),
            (0x40, 0, 'P'),
            (0x200, 0, 'R'),
        ] {
            let told = TaskState::of(state, exit_state);
            assert_eq!(told.letter(), letter, "{state:#x} {exit_state:#x}");
        }
    }

    #[test]
    fn a_task_that_sleeps_may_still_be_queued() {
        assert_eq!(Scheduling::of(true, true, 1, false), Scheduling::OnCpu);
        assert_eq!(Scheduling::of(false, true, 0, false), Scheduling::Queued);
        assert_eq!(Scheduling::of(false, true, 1, false), Scheduling::Preempted);
        assert_eq!(Scheduling::of(false, true, 1, true), Scheduling::Delayed);
        assert_eq!(Scheduling::of(false, false, 0, false), Scheduling::Off);
    }
}
