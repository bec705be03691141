//! `vcpu-hold` and `vcpu-release`: one vCPU is held while the others run.
//!
//! A hold at a place, and every soft one, takes a change to the guest: it is made in the stop in
//! which the hold begins, and looked after at each of its turns, until nothing of it is left but
//! what a grace period keeps.

use std::time::Duration;

use patcher::guest::{Activity, StoppedGuest};
use patcher::patch::{BreakpointRequest, EntryId, Origin, PatchError, Patcher};
use patcher::symbols::Site;
use serde::Deserialize;
use serde_json::Value;

use crate::control::command::{Context, DeadlineArgument, Registry};
use crate::control::protocol::{QmpError, Reason};
use crate::machine::{
    EndOfHold, HOLD_AT_MOST, HOLD_USUALLY, HoldEnd, HoldError, HoldInfo, HoldPhase, HoldRequest,
    HoldSite, HoldTicket, Machine,
};
use crate::patching::{Patching, WithStop, origin_of};

/// While a vCPU is waited for, its client is looked for this often.
const LOOK_FOR_CLIENT: Duration = Duration::from_millis(100);

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct Hold {
    vcpu: u32,
    /// Where; without it, wherever the vCPU is.
    at: Option<String>,
    /// It is to wait in a loop, and serve interrupts.
    #[serde(default)]
    soft: bool,
    /// False: answer when the hold is armed, and tell by the event VCPU_HELD when it is in force.
    #[serde(default = "yes")]
    wait: bool,
    /// How long the vCPU may take to get there, and then how long it is held.
    #[serde(default)]
    deadline: DeadlineArgument,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct Release {
    vcpu: u32,
}

/// What holds are made with.
#[derive(Clone)]
struct Holding {
    machine: Machine,
    patching: Patching,
}

/// Adds the commands.
pub fn register(registry: &mut Registry, machine: &Machine, patching: &Patching) {
    let holding = Holding {
        machine: machine.clone(),
        patching: patching.clone(),
    };
    let h = holding.clone();
    registry.slow("vcpu-hold", move |context, arguments: Hold| {
        h.hold(context, &arguments)
    });
    registry.slow("vcpu-release", move |context, arguments: Release| {
        let end = holding.machine.release_vcpu(arguments.vcpu)?;
        if let Some(change) = end.change {
            holding.settle(change, &context.peer.to_string());
        }
        Ok(end.to_value())
    });
}

impl Holding {
    fn hold(&self, context: &Context, arguments: &Hold) -> Result<Value, QmpError> {
        let limit = arguments.deadline.or(HOLD_USUALLY);
        if limit > HOLD_AT_MOST {
            let most = HOLD_AT_MOST.as_secs() / 60;
            let text = format!("deadline: a vCPU is held for at most {most} minutes");
            return Err(QmpError::new(Reason::InvalidArgument, text));
        }
        let site =
            match &arguments.at {
                None if !arguments.soft => {
                    return Ok(self.machine.hold_vcpu(arguments.vcpu, limit)?.to_value());
                }
                None => None,
                Some(site) => Some(site.parse::<Site>().map_err(|error| {
                    QmpError::new(Reason::InvalidArgument, format!("at: {error}"))
                })?),
            };
        let held = self.change_and_hold(context, arguments, site.as_ref(), limit)?;
        let shown = held.map(|info| info.to_value());
        serde_json::to_value(shown)
            .map_err(|error| QmpError::new(Reason::Internal, error.to_string()))
    }

    /// Holds by a change to the guest: at `site`, or in a loop where the vCPU is.
    fn change_and_hold(
        &self,
        context: &Context,
        arguments: &Hold,
        site: Option<&Site>,
        limit: Duration,
    ) -> Result<WithStop<HoldInfo>, QmpError> {
        let vcpu = arguments.vcpu;
        let origin = origin_of(context.peer.to_string());
        if let Some(site) = site {
            // A name that there is not is compared with all that there are: not in a stop.
            self.patching.with(|patcher| patcher.check_site(site))?;
        }
        self.patching.get_arena_ready();
        let begun = self
            .patching
            .stopped(context, "vcpu-hold", limit, |patcher, guest| {
                if let Err(error) = self.can_hold(guest, vcpu) {
                    return Ok((None, Err(error)));
                }
                let mut request = match site {
                    Some(site) => {
                        let request = BreakpointRequest {
                            site: site.clone(),
                            soft: arguments.soft,
                        };
                        self.arm(patcher, guest, &request, &origin)?
                    }
                    None => spin(patcher, guest, vcpu, &origin)?,
                };
                request.vcpu = vcpu;
                request.limit = limit;
                Ok((Some(request.change), self.machine.begin_hold(request)))
            })?;
        begun.try_map(|(change, ticket)| {
            let who = context.peer.to_string();
            let kept = ticket.and_then(|ticket| {
                let (holding, who) = (self.clone(), who.clone());
                let settle = move || change.into_iter().for_each(|id| holding.settle(id, &who));
                self.machine.keep_hold(&ticket, Box::new(settle))?;
                Ok(ticket)
            });
            let ticket = kept.inspect_err(|_| {
                change.into_iter().for_each(|id| self.settle(id, &who));
            })?;
            let info = match arguments.wait {
                true => self.wait(context, &ticket)?,
                false => self
                    .machine
                    .hold_info(&ticket)
                    .ok_or(HoldError::ReleasedMeanwhile { vcpu })?,
            };
            if info.is_still() {
                // Its text is as it was when the answer comes.
                change.into_iter().for_each(|id| self.settle(id, &who));
            }
            Ok(info)
        })
    }

    fn can_hold(&self, guest: &dyn StoppedGuest, vcpu: u32) -> Result<(), HoldError> {
        self.machine.can_hold(vcpu)?;
        let mut vcpus = guest.vcpus().iter();
        let found = vcpus.find(|found| found.index == vcpu);
        match found.map(|found| found.activity) {
            None | Some(Activity::NotStarted) => Err(HoldError::NotStarted { vcpu }),
            Some(Activity::Running | Activity::Halted) => Ok(()),
        }
    }

    fn arm(
        &self,
        patcher: &mut Patcher,
        guest: &mut dyn StoppedGuest,
        request: &BreakpointRequest,
        origin: &Origin,
    ) -> Result<HoldRequest, PatchError> {
        let breakpoint = patcher.arm_breakpoint(guest, request, origin)?;
        self.machine.breakpoint_set(&breakpoint);
        Ok(HoldRequest {
            vcpu: 0,
            site: HoldSite {
                address: breakpoint.address,
                place: breakpoint.place,
            },
            soft: request.soft,
            change: breakpoint.id,
            spins: false,
            limit: Duration::ZERO,
        })
    }

    /// Takes out of the guest what no hold needs any more. Tried until it is done; what cannot be
    /// done is logged, and harms nobody: every vCPU passes.
    fn settle(&self, change: EntryId, who: &str) {
        let settled = self.patching.persist(|patcher, guest| {
            let holds = self.machine.holds();
            let mut of_it = holds.iter().filter(|hold| hold.change == Some(change));
            let waited_for = of_it.clone().any(|hold| hold.phase == HoldPhase::Armed);
            let spinning =
                of_it.any(|hold| hold.soft && matches!(hold.phase, HoldPhase::Held { .. }));
            let origin = origin_of(who.to_owned());
            let settled =
                patcher.settle_breakpoint(guest, change, waited_for, spinning, &origin)?;
            self.machine.breakpoint_settled(change, &settled);
            Ok(settled)
        });
        match settled {
            Ok(settled) => self.patching.retired(&settled.collected),
            Err(error) if error.reason() == Reason::Ended => {}
            Err(error) => {
                tracing::warn!(change = change.0, %error, "a breakpoint stays in the guest");
            }
        }
    }

    /// Waits until the vCPU is where it is to be held. When nobody waits for the answer any more, it
    /// is not to be held either.
    fn wait(&self, context: &Context, ticket: &HoldTicket) -> Result<HoldInfo, QmpError> {
        loop {
            match self.machine.wait_held(ticket, LOOK_FOR_CLIENT) {
                Some(Ok(info)) => return Ok(info),
                Some(Err(end)) => return Err(missed(&end)),
                None if context.peer.is_gone() => {
                    self.machine.give_up_hold(ticket);
                    let text = "nobody waits for the answer";
                    return Err(QmpError::new(Reason::Cancelled, text));
                }
                None => {}
            }
        }
    }
}

fn spin(
    patcher: &mut Patcher,
    guest: &mut dyn StoppedGuest,
    vcpu: u32,
    origin: &Origin,
) -> Result<HoldRequest, PatchError> {
    let spinning = patcher.spin_vcpu(guest, vcpu, origin)?;
    Ok(HoldRequest {
        vcpu,
        site: HoldSite {
            address: spinning.address,
            place: spinning.place,
        },
        soft: true,
        change: spinning.id,
        spins: true,
        limit: Duration::ZERO,
    })
}

fn missed(end: &EndOfHold) -> QmpError {
    let place = end.site.as_ref().map_or("there", |site| &site.place);
    let vcpu = end.vcpu;
    match end.why {
        _ if end.held.is_some() => {
            let text = format!("vCPU {vcpu} came to {place}, and was let go at once");
            QmpError::new(Reason::Deadline, text)
        }
        HoldEnd::Deadline => {
            let text = format!("vCPU {vcpu} has not come to {place} in time; it runs on");
            QmpError::new(Reason::Deadline, text)
        }
        HoldEnd::Released => HoldError::ReleasedMeanwhile { vcpu }.into(),
        HoldEnd::GuestEnded => {
            let text = format!("the guest ended before vCPU {vcpu} came to {place}");
            QmpError::new(Reason::Ended, text)
        }
    }
}

impl From<HoldError> for QmpError {
    fn from(error: HoldError) -> Self {
        let reason = match error {
            HoldError::Stop(error) => return error.into(),
            HoldError::NoSuchVcpu { .. } | HoldError::NotHeld { .. } => Reason::NotFound,
            HoldError::AlreadyHeld { .. } => Reason::Busy,
            HoldError::ReleasedMeanwhile { .. } => Reason::Cancelled,
            HoldError::NotStarted { .. } => Reason::Refused,
            HoldError::Late { .. } => Reason::Deadline,
            HoldError::NoThread(_) => Reason::Internal,
        };
        Self::new(reason, error.to_string())
    }
}
