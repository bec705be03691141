//! What the control socket needs of a machine.
//!
//! The protocol server and every command work on this trait, so that they can be tried without a
//! hypervisor; [`Machine`] is the implementation that counts.

use std::time::Duration;

use patcher::guest::{Gpa, GuestMemory, MemoryError, StoppedGuest};

use crate::machine::{
    CpuInfo, CpuState, EventSink, HoldInfo, Machine, RamRegion, Resumed, RunState, StopError,
    StopTimes, Stopped,
};

/// Work that is done while the guest is stopped.
pub type StoppedWork<'a> = &'a mut dyn FnMut(&mut dyn StoppedHost);

/// A machine, as commands see it. Every method may be called from any thread.
pub trait Host: Send + Sync + 'static {
    /// What the guest is doing now.
    fn run_state(&self) -> RunState;

    /// Stops the guest for a client, until [`Host::cont`].
    ///
    /// # Errors
    /// [`StopError`]; the guest then runs on.
    fn stop(&self, deadline: Duration) -> Result<StopTimes, StopError>;

    /// Ends [`Host::stop`]; returns how long the guest was stopped.
    ///
    /// # Errors
    /// [`StopError::Ended`].
    fn cont(&self) -> Result<Resumed, StopError>;

    /// Ends the machine and the process.
    fn quit(&self);

    /// Presses the ACPI power button.
    fn power_button(&self);

    /// Resets the machine.
    fn reset(&self);

    /// The vCPUs.
    fn cpus(&self) -> Vec<CpuInfo>;

    /// The vCPUs that are held one by one, or are to be.
    fn holds(&self) -> Vec<HoldInfo>;

    /// Guest RAM and where it is in this process.
    fn regions(&self) -> Vec<RamRegion>;

    /// Reads guest RAM, running or not.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`].
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError>;

    /// Stops the guest, does the work once, and lets go on exactly what it stopped.
    ///
    /// # Errors
    /// [`StopError`]; the work was then not done.
    fn with_stopped(
        &self,
        deadline: Duration,
        work: StoppedWork<'_>,
    ) -> Result<StopTimes, StopError>;

    /// Adds a receiver of events, which must return at once.
    fn subscribe(&self, sink: EventSink);
}

/// A stopped machine, as commands see it.
pub trait StoppedHost: StoppedGuest {
    /// All registers of a vCPU.
    ///
    /// # Errors
    /// [`StopError::Kvm`].
    fn cpu_state(&self, index: u32) -> Result<CpuState, StopError>;
}

impl StoppedHost for Stopped<'_> {
    fn cpu_state(&self, index: u32) -> Result<CpuState, StopError> {
        Stopped::cpu_state(self, index)
    }
}

impl Host for Machine {
    fn run_state(&self) -> RunState {
        Machine::run_state(self)
    }

    fn stop(&self, deadline: Duration) -> Result<StopTimes, StopError> {
        Machine::stop(self, deadline)
    }

    fn cont(&self) -> Result<Resumed, StopError> {
        Machine::cont(self)
    }

    fn quit(&self) {
        Machine::quit(self);
    }

    fn power_button(&self) {
        Machine::power_button(self);
    }

    fn reset(&self) {
        Machine::reset(self);
    }

    fn cpus(&self) -> Vec<CpuInfo> {
        Machine::cpus(self)
    }

    fn holds(&self) -> Vec<HoldInfo> {
        Machine::holds(self)
    }

    fn regions(&self) -> Vec<RamRegion> {
        self.ram().regions().to_vec()
    }

    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.ram().read(at, into)
    }

    fn with_stopped(
        &self,
        deadline: Duration,
        work: StoppedWork<'_>,
    ) -> Result<StopTimes, StopError> {
        let ((), times) = Machine::with_stopped(self, deadline, |stopped| work(stopped))?;
        Ok(times)
    }

    fn subscribe(&self, sink: EventSink) {
        Machine::subscribe(self, sink);
    }
}
