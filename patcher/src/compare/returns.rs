//! Returns and indirect branches: what the boot makes of the thunks that the compiler calls.

use super::alternatives::Alternatives;
use super::report::{Class, CompareError};
use super::sheet::Sheet;
use super::view::{Table, View};
use crate::guest::{Gva, LinkAddr};

const JUMP: u8 = 0xe9;
const CALL: u8 = 0xe8;
const INT3: u8 = 0xcc;
const CS: u8 = 0x2e;
pub(super) const RET: [u8; 5] = [0xc3, INT3, INT3, INT3, INT3];
/// `ud1` behind the trampoline of a static call: not an ordinary return (`tramp_ud`).
const TRAMPOLINE_END: [u8; 3] = [0x0f, 0xb9, 0xcc];
/// X86_FEATURE_RETHUNK (arch/x86/include/asm/cpufeatures.h since 5.19); a kernel that has it asks
/// for it where it patches returns.
const RETHUNK: u32 = 11 * 32 + 14;

/// What a return looks like.
pub(super) struct Returns {
    /// The thunk that the boot chose, where returns go through one.
    thunk: Option<Gva>,
    /// The thunk is only for returns in the lower half of a cache line.
    lower_half: bool,
    /// `__static_call_return`, to which a conditional jump can go where there is no thunk.
    plain: Option<Gva>,
}

impl Returns {
    pub(super) fn of(view: &View<'_>, alternatives: &Alternatives) -> Result<Self, CompareError> {
        let askers = [
            "cpu_wants_rethunk_at",
            "cpu_wants_rethunk",
            "apply_returns",
            "__static_call_transform",
        ];
        let asked = askers
            .iter()
            .any(|name| alternatives.asks(view.kernel, name, RETHUNK));
        // Wherever else the variable may point, no kernel returns through that.
        let thunk = view
            .variable("x86_return_thunk", 8)?
            .map(Gva)
            .filter(|&thunk| is_thunk(view, thunk));
        let on = asked && view.has(RETHUNK) == Some(true);
        let its = view.symbol("its_return_thunk").map(|at| view.run_time(at));
        Ok(Self {
            thunk: thunk.filter(|_| on),
            lower_half: its.is_some() && its == thunk,
            plain: view
                .symbol("__static_call_return")
                .map(|at| view.run_time(at)),
        })
    }

    /// The return at `at`: five bytes.
    pub(super) fn at(&self, sheet: &Sheet, at: LinkAddr) -> [u8; 5] {
        let exempt = self.lower_half && sheet.run_time(at).0 & 0x20 != 0;
        self.thunk
            .filter(|_| !exempt)
            .and_then(|thunk| sheet.branch(JUMP, at, thunk))
            .unwrap_or(RET)
    }

    /// Where a conditional jump leads that is to return.
    pub(super) fn stand_in(&self) -> Option<Gva> {
        self.thunk.or(self.plain)
    }

    /// All returns (`apply_returns`).
    pub(super) fn apply(&self, view: &View<'_>, sheet: &mut Sheet) {
        let generic = view.symbol("__x86_return_thunk");
        for at in view.places(&Table::Section(".return_sites")) {
            let jumps = sheet.get(at, 1) == Some(&[JUMP]) && sheet.target(at) == generic;
            if !jumps || sheet.get(at.offset(5), 3) == Some(&TRAMPOLINE_END) {
                continue;
            }
            let bytes = self.at(sheet, at);
            sheet.put(at, &bytes, Class::Return);
        }
    }
}

/// Whether it is one of the kernel's return thunks (arch/x86/lib/retpoline.S).
fn is_thunk(view: &View<'_>, at: Gva) -> bool {
    let place = view.kernel.symbols().at(at.linked(view.located.slide));
    place.is_some_and(|place| place.offset == 0 && place.symbol.name().contains("return_thunk"))
}

/// Indirect calls and jumps (`apply_retpolines`): they stay calls of a thunk where the guest wants
/// retpolines, and become plain ones, or plain ones behind an LFENCE, where it does not.
pub(super) fn retpolines(
    view: &View<'_>,
    sheet: &mut Sheet,
    alternatives: &Alternatives,
    counted: bool,
) {
    let (Some(array), Some(next)) = (
        view.symbol("__x86_indirect_thunk_array")
            .or(view.symbol("__x86_indirect_thunk_rax")),
        view.symbol("__x86_indirect_thunk_rcx"),
    ) else {
        return;
    };
    let size = next.distance_from(array).max(1);
    // The thunk itself is chosen by the same two features.
    let (mut lfence, mut kept) = (false, true);
    for choice in alternatives.within(array..next) {
        let has = view.has(choice.feature).unwrap_or(false);
        if choice.not {
            kept = has;
        } else {
            lfence = has;
        }
    }
    let kept = kept && !lfence;
    for at in view.places(&Table::Section(".retpoline_sites")) {
        // With -mindirect-branch-cs-prefix, for the registers that need a byte more.
        let prefix = usize::from(sheet.get(at, 1) == Some(&[CS]));
        let code = at.offset(prefix as u64);
        let first = sheet.get(code, 2).and_then(|two| two.first_chunk::<2>());
        let Some(first) = first.copied() else {
            continue;
        };
        let (len, branch) = match first {
            [CALL | JUMP, _] => (prefix + 5, code),
            [0x0f, 0x80..=0x8f] => (prefix + 6, code.offset(1)),
            _ => continue,
        };
        let register = sheet
            .target(branch)
            .map(|target| target.distance_from(array) / size)
            .and_then(|index| u8::try_from(index).ok())
            .filter(|&index| index < 16);
        if let (true, Some(register)) = (kept && counted, register) {
            let array = match first {
                [CALL, _] => view.symbol("__x86_indirect_call_thunk_array"),
                _ => view.symbol("__x86_indirect_jump_thunk_array"),
            };
            let target = array.map(|at| at.offset(u64::from(register) * size));
            let target = target.map(|at| sheet.run_time(at));
            if let Some([_, to @ ..]) = target.and_then(|to| sheet.branch(CALL, branch, to)) {
                sheet.set(branch.offset(1), &to);
            }
        }
        let plain = register.map(|register| direct(first, len, register, lfence));
        match plain.filter(|plain| !kept && plain.len() == len) {
            Some(plain) => sheet.put(at, &plain, Class::Retpoline),
            None => sheet.mark(at, len, Class::Retpoline),
        }
    }
}

/// A call of, or jump to, what a register holds, in the room of `len` bytes (`patch_retpoline`).
fn direct(first: [u8; 2], len: usize, register: u8, lfence: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    let [opcode, condition] = first;
    if opcode == 0x0f {
        // Around the jump where the condition does not hold.
        bytes.push(0x70 | (condition & 0xf ^ 1));
        bytes.push(u8::try_from(len.saturating_sub(2)).unwrap_or(0));
    }
    if lfence {
        bytes.extend([0x0f, 0xae, 0xe8]);
    }
    if register >= 8 {
        bytes.push(0x41);
    }
    let call = opcode == CALL;
    let modrm = if call { 0xd0 } else { 0xe0 };
    bytes.extend([0xff, modrm + (register & 7)]);
    if !call && bytes.len() < len {
        bytes.push(INT3);
    }
    let have = bytes.len();
    bytes.extend(super::nops::nop(len.saturating_sub(have)));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thunk_becomes_a_plain_branch_in_the_same_room() {
        let call = [CALL, 0];
        let jump = [JUMP, 0];
        let below = [0x0f, 0x82];
        assert_eq!(direct(call, 5, 0, false), [0xff, 0xd0, 0x0f, 0x1f, 0x00]);
        assert_eq!(
            direct(call, 6, 10, false),
            [0x41, 0xff, 0xd2, 0x0f, 0x1f, 0x00]
        );
        assert_eq!(
            direct(call, 6, 10, true),
            [0x0f, 0xae, 0xe8, 0x41, 0xff, 0xd2]
        );
        assert_eq!(direct(jump, 5, 1, false), [0xff, 0xe1, INT3, 0x66, 0x90]);
        assert_eq!(
            direct(below, 6, 2, false),
            [0x73, 4, 0xff, 0xe2, INT3, 0x90]
        );
        // Too long for its room: it stays a thunk's.
        assert_ne!(direct(jump, 5, 11, true).len(), 5);
    }
}
