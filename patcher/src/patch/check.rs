//! What is checked while the guest is stopped, before anything is written.

use std::ops::Range;

use super::PatchError;
use super::breakpoint::Spins;
use super::function::Function;
use super::knowledge::Knowledge;
use super::ledger::Ledger;
use super::module_text::ModuleTexts;
use super::report::{Applied, Evidence, FtraceMark, Kind};
use super::retire::Retirement;
use crate::grace::interior;
use crate::guest::{Activity, Gva, StoppedGuest, Vcpu};
use crate::rules::{self, Rule};
use crate::space::Located;
use crate::tasks::{Context, Found, Hit, Windows, scan};
use crate::text::{MAX_INSTRUCTION, NOP5, branches_into, hex, whole};

/// Longest function whose jumps are followed.
const MAX_FUNCTION: u64 = 1 << 20;

/// A stopped guest whose kernel was found.
pub(super) struct Check<'a> {
    pub(super) know: &'a Knowledge,
    pub(super) located: &'a Located,
    pub(super) guest: &'a dyn StoppedGuest,
    pub(super) ledger: &'a Ledger,
    pub(super) retired: &'a Retirement,
    pub(super) spins: &'a Spins,
    pub(super) modules: &'a ModuleTexts,
}

impl Check<'_> {
    /// The guest is not changing its own text.
    pub(super) fn idle(&self) -> Result<(), PatchError> {
        let space = self.located.space(&self.guest);
        match self.know.busy.check(&space, self.located)? {
            Some(busy) => Err(busy.into()),
            None => Ok(()),
        }
    }

    /// Nobody uses `len` bytes at `at` of `function` who would mind: no change of ours, no jump label or
    /// static call, and no kprobe from the start of the function on. Tells how ftrace has to be kept
    /// away.
    pub(super) fn owners(
        &self,
        ledger: &Ledger,
        function: Option<&Function>,
        at: Gva,
        len: u64,
    ) -> Result<Option<FtraceMark>, PatchError> {
        let owned = |at: Gva, owner: String| PatchError::Owned { at, owner };
        if let Some(id) = ledger.overlap(at, len) {
            return Err(owned(at, format!("change {id}; revert that first")));
        }
        if let Some((site, rewriter)) = self.rewritten(function, at, len) {
            return Err(owned(site, rewriter.to_string()));
        }
        let from = function.map_or(at, |function| function.start);
        self.no_kprobe(&(from..at.offset(len)))?;
        let space = self.located.space(&self.guest);
        let Some(ftrace) = &self.know.ftrace else {
            return Ok(None);
        };
        // A record is about five bytes: one that begins just before them counts as well.
        let reach = NOP5.len() as u64 - 1;
        let first = Gva(at.0.saturating_sub(reach)).max(from);
        let whole = len + at.distance_from(first);
        let Some(record) = ftrace.find(&space, self.located, first, whole)? else {
            return Ok(None);
        };
        if record.in_use {
            let what = format!(
                "ftrace (flags {:#x}): something traces or patches it",
                record.flags
            );
            return Err(owned(at, what));
        }
        Ok(Some(FtraceMark {
            at: record.at,
            before: record.flags,
            after: record.marked,
            size: record.size,
        }))
    }

    /// No kprobe of the guest is in `range`: it keeps a copy of the instruction that it is on.
    pub(super) fn no_kprobe(&self, range: &Range<Gva>) -> Result<(), PatchError> {
        let Some(kprobes) = &self.know.kprobes else {
            return Ok(());
        };
        let space = self.located.space(&self.guest);
        match kprobes.inside(&space, self.located, range)? {
            None => Ok(()),
            Some(at) => Err(PatchError::Owned {
                at,
                owner: "a kprobe of the guest".into(),
            }),
        }
    }

    /// The bytes at `at` are the expected ones.
    pub(super) fn expect(&self, at: Gva, expected: &[u8]) -> Result<(), PatchError> {
        let mut found = vec![0; expected.len()];
        self.located.space(&self.guest).read(at, &mut found)?;
        match expected.iter().zip(&found).position(|(a, b)| a != b) {
            None => Ok(()),
            Some(first) => Err(PatchError::Mismatch {
                at,
                expected: hex(expected),
                found: hex(&found),
                first,
            }),
        }
    }

    /// The bytes from the start of `function` to beyond `end`: where jumps and traps of ours are, the
    /// instructions that they took the place of, without which those behind them cannot be told.
    pub(super) fn code(&self, function: &Function, end: Gva) -> Result<Vec<u8>, PatchError> {
        let space = self.located.space(&self.guest);
        let start = function.start;
        let len = end.distance_from(start);
        if len > MAX_FUNCTION {
            return Err(PatchError::Request(format!(
                "{} is {len:#x} bytes long, too long to be decoded",
                function.name
            )));
        }
        let len = usize::try_from(len).unwrap_or(0);
        let mut code = vec![0; len + MAX_INSTRUCTION];
        // The last function of the text may end with its mapping.
        if space.read(start, &mut code).is_err() {
            code.truncate(len);
            space.read(start, &mut code)?;
        }
        let hides = |entry: &&Applied| matches!(entry.kind, Kind::Probe | Kind::Breakpoint);
        for entry in self.ledger.applied().filter(hides) {
            restore(&mut code, start, entry);
        }
        Ok(code)
    }

    /// No jump of the function, or of its `.cold` part, leads to where the new bytes have no
    /// instruction.
    pub(super) fn no_jump_inside(
        &self,
        function: &Function,
        bytes: &Range<Gva>,
        new: &[u8],
    ) -> Result<(), PatchError> {
        let begins = whole(bytes.start, new)?;
        let is_cut = |to: Gva| {
            let offset = usize::try_from(to.distance_from(bytes.start)).unwrap_or(0);
            offset != 0 && !begins.contains(&offset)
        };
        for part in self.know.parts(function, self.located.slide) {
            let end = part.start.offset(part.size.min(MAX_FUNCTION));
            let code = self.code(&part, end)?;
            for (from, to) in branches_into(part.start, &code, bytes) {
                if is_cut(to) {
                    return Err(PatchError::JumpInside { from, to });
                }
            }
        }
        for (to, leader) in self.leads_into(function, bytes) {
            if is_cut(to) {
                return Err(PatchError::LedInside { to, leader });
            }
        }
        Ok(())
    }

    /// No context is inside `bytes`: beyond the first of them, or at it with an instruction begun.
    /// Where one instruction takes the place of one, no task can be inside.
    pub(super) fn nobody_inside(
        &self,
        bytes: &Range<Gva>,
        one_instruction: bool,
    ) -> Result<Evidence, PatchError> {
        self.nobody_behind(bytes, 1, one_instruction)
    }

    /// The same where no task can be before the byte number `from`.
    pub(super) fn nobody_behind(
        &self,
        bytes: &Range<Gva>,
        from: u64,
        one_instruction: bool,
    ) -> Result<Evidence, PatchError> {
        let hits: Vec<_> = self
            .guest
            .vcpus()
            .iter()
            .filter(|vcpu| is_inside(vcpu, bytes))
            .map(|vcpu| Hit {
                context: Context::Vcpu { index: vcpu.index },
                found: Found::Register("rip"),
                address: Gva(vcpu.registers.rip),
            })
            .collect();
        if !hits.is_empty() {
            return Err(PatchError::Occupied { hits });
        }
        if one_instruction || !rules::holds(Rule::Interior) {
            return Ok(Evidence::SingleInstruction);
        }
        let behind = bytes.start.offset(from.saturating_sub(1))..bytes.end;
        let windows = Windows::new(interior(&behind, self.generated()));
        let space = self.located.space(&self.guest);
        let scanned = scan(
            &space,
            self.located,
            &self.know.tasks,
            self.guest.vcpus(),
            &windows,
        )?;
        if !scanned.is_clear() {
            return Err(PatchError::Occupied { hits: scanned.hits });
        }
        Ok(Evidence::ScanClear {
            tasks: scanned.tasks,
            vcpus: scanned.vcpus,
        })
    }

    /// Code of ours, retired code too, and where it goes on by itself.
    pub(super) fn generated(&self) -> impl Iterator<Item = (Range<Gva>, &[Gva])> {
        let applied = self.ledger.applied().chain(self.spins.all());
        let applied = applied.filter_map(|entry| {
            let placed = entry.code.as_ref()?;
            Some((placed.code, placed.goes_on.as_slice()))
        });
        let all = applied.chain(self.retired.going_on());
        all.map(|(code, goes_on)| (code.range(), goes_on))
    }
}

/// Puts what was there before `entry` into a copy of the bytes from `start` on.
fn restore(code: &mut [u8], start: Gva, entry: &Applied) {
    for (index, byte) in (0..).zip(&entry.before.0) {
        let offset = entry.address.offset(index).distance_from(start);
        let at = usize::try_from(offset).ok().and_then(|at| code.get_mut(at));
        if let Some(at) = at {
            *at = *byte;
        }
    }
}

fn is_inside(vcpu: &Vcpu, bytes: &Range<Gva>) -> bool {
    let at = Gva(vcpu.registers.rip);
    vcpu.activity != Activity::NotStarted
        && vcpu.cpl() != 3
        && bytes.contains(&at)
        && (at != bytes.start || vcpu.reinjects)
}
