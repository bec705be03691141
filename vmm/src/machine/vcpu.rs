//! A vCPU's thread: from the gate into the guest and, exit by exit, back.

use std::sync::Arc;

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::autopsy::Panic;
use super::board::{Board, VcpuSlot};
use super::breakpoints;
use super::bus::Request;
use super::gate::{Gate, Pass};
use super::refused::{self, RefusedWrite};
use super::stop::tell_clock;

/// Why a vCPU's thread ended the machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Ending {
    PowerOff,
    Reset,
    TripleFault,
    /// The kernel was found spinning after a panic.
    Panic(Panic),
    Error(String),
}

/// What a vCPU tells the machine.
pub(super) trait Reports: Send + Sync {
    /// A vCPU of this set of threads ended the machine.
    fn ended(&self, generation: u64, ending: Ending);
    fn write_refused(&self, write: RefusedWrite);
}

/// Body of the thread of vCPU `index`.
pub(super) fn run(
    gate: &Gate,
    generation: u64,
    board: &Arc<Board>,
    index: usize,
    reports: &dyn Reports,
) {
    let Some(slot) = board.vcpus().get(index) else {
        return;
    };
    slot.set_tid();
    loop {
        let late = match gate.pass(index, || slot.unkick()) {
            Pass::Leave => return,
            Pass::Go => false,
            Pass::GoAfterPark { late } => {
                serialise();
                late
            }
        };
        let mut fd = slot.lock();
        if late {
            tell_clock(&fd);
        }
        let ending = stay_in_guest(&mut fd, slot, gate, board, index, reports);
        drop(fd);
        if let Some(ending) = ending {
            reports.ended(generation, ending);
            gate.leave(index);
            return;
        }
    }
}

/// Guest text may have changed while this thread was parked: the instruction set asks for a
/// serialising instruction on each processor that will execute it (SDM vol. 3A, 9.1.3,
/// "Handling Self- and Cross-Modifying Code").
fn serialise() {
    std::hint::black_box(std::arch::x86_64::__cpuid(0));
}

/// Runs the vCPU until it is kicked or runs into a breakpoint (`None`), or ends the machine.
fn stay_in_guest(
    fd: &mut VcpuFd,
    slot: &VcpuSlot,
    gate: &Gate,
    board: &Board,
    index: usize,
    reports: &dyn Reports,
) -> Option<Ending> {
    let mut trapped = false;
    loop {
        match fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => board.bus().read(port, data),
            Ok(VcpuExit::IoOut(port, _)) if board.breakpoints().may_be(port) => {
                // Registers are settled when KVM has completed the write.
                trapped = true;
                slot.come_back();
            }
            Ok(VcpuExit::IoOut(port, data)) => match board.bus().write(board.vm(), port, data) {
                None => {}
                Some(Request::PowerOff) => return Some(Ending::PowerOff),
                Some(Request::Reset) => return Some(Ending::Reset),
            },
            Ok(VcpuExit::MmioRead(_, data)) => data.fill(0xff),
            Ok(VcpuExit::MmioWrite(at, data)) => {
                if let Some(count) = board.blocks().refuse_write(at) {
                    reports.write_refused(RefusedWrite::new(at, data.len(), index, count));
                }
            }
            Ok(VcpuExit::Shutdown) => return Some(Ending::TripleFault),
            Ok(VcpuExit::InternalError) => match refused::handle(fd, board, index) {
                Ok(Some(write)) => reports.write_refused(write),
                Ok(None) => {}
                Err(what) => return Some(Ending::Error(format!("vCPU {index}: {what}"))),
            },
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return Some(Ending::Error(format!(
                    "vCPU {index}: entry failed on host CPU {cpu}, reason {reason:#x}"
                )));
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => {}
            Ok(other) => {
                return Some(Ending::Error(format!(
                    "vCPU {index}: unexpected exit {other:?}"
                )));
            }
            // A kick; on a vCPU that waits for its SIPI also "not runnable yet".
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {
                let sorted = match trapped {
                    true => breakpoints::sort(fd, gate, board, index),
                    false => Ok(()),
                };
                return sorted
                    .err()
                    .map(|what| Ending::Error(format!("vCPU {index}: {what}")));
            }
            Err(error) => return Some(Ending::Error(format!("vCPU {index}: KVM_RUN: {error}"))),
        }
    }
}
