//! What a probe does when its site is reached.

use std::fmt;
use std::str::FromStr;

/// What code that somebody else wrote needs of the place where it is called.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Needs {
    /// It may sleep: it is skipped where that is not allowed.
    pub may_sleep: bool,
    /// It uses RCU: it is skipped where RCU is not watching.
    pub needs_rcu: bool,
    /// It may be called in a non-maskable interrupt; otherwise it is skipped there.
    pub nmi: bool,
    /// It does not look at the registers.
    pub no_registers: bool,
}

impl Needs {
    /// From the flags of the C header.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Option<Self> {
        if bits & !0xf != 0 {
            return None;
        }
        Some(Self {
            may_sleep: bits & 1 != 0,
            needs_rcu: bits & 2 != 0,
            nmi: bits & 4 != 0,
            no_registers: bits & 8 != 0,
        })
    }

    /// Whatever one of them says.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self {
            may_sleep: self.may_sleep || other.may_sleep,
            needs_rcu: self.needs_rcu || other.needs_rcu,
            nmi: self.nmi || other.nmi,
            no_registers: self.no_registers || other.no_registers,
        }
    }
}

macro_rules! registers {
    ($($register:ident $name:literal $number:literal $offset:literal,)*) => {
        /// A general register of a site, as it is when the site is reached.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[allow(missing_docs, reason = "they are the registers of the CPU")]
        pub enum Register {
            $($register,)*
        }

        impl Register {
            /// Its name, without the `r` of the 64-bit ones: `di`, `r8`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$register => $name,)*
                }
            }

            /// Its number in an instruction.
            pub(super) const fn number(self) -> u8 {
                match self {
                    $(Self::$register => $number,)*
                }
            }

            /// Where a trampoline has put it, from the stack pointer on.
            pub(super) const fn saved_at(self) -> u8 {
                match self {
                    $(Self::$register => $offset,)*
                }
            }
        }

        impl FromStr for Register {
            type Err = UnknownRegister;

            fn from_str(text: &str) -> Result<Self, UnknownRegister> {
                let name = match text.strip_prefix('r') {
                    Some(rest) if !rest.starts_with(|c: char| c == 'r' || c.is_ascii_digit()) => rest,
                    _ => text,
                };
                match name {
                    $($name => Ok(Self::$register),)*
                    _ => Err(UnknownRegister(text.to_owned())),
                }
            }
        }
    };
}

registers! {
    Sp "sp" 4 16,
    R15 "r15" 15 24,
    R14 "r14" 14 32,
    R13 "r13" 13 40,
    R12 "r12" 12 48,
    Bx "bx" 3 56,
    R11 "r11" 11 64,
    R10 "r10" 10 72,
    R9 "r9" 9 80,
    R8 "r8" 8 88,
    Ax "ax" 0 96,
    Cx "cx" 1 104,
    Dx "dx" 2 112,
    Si "si" 6 120,
    Di "di" 7 128,
    Bp "bp" 5 144,
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl serde::Serialize for Register {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// No register of this CPU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no general register: ax, bx, cx, dx, si, di, bp, sp, r8 to r15")]
pub struct UnknownRegister(String);

/// How a register is compared with a number, both without a sign.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Comparison {
    /// `==`
    Equal,
    /// `!=`
    NotEqual,
    /// `<`
    Below,
    /// `<=`
    BelowOrEqual,
    /// `>`
    Above,
    /// `>=`
    AboveOrEqual,
}

impl Comparison {
    const ALL: [(&'static str, Self); 6] = [
        ("==", Self::Equal),
        ("!=", Self::NotEqual),
        ("<=", Self::BelowOrEqual),
        (">=", Self::AboveOrEqual),
        ("<", Self::Below),
        (">", Self::Above),
    ];

    /// Second opcode byte of the jump that is taken where it does not hold.
    pub(super) const fn unless(self) -> u8 {
        match self {
            Self::Equal => 0x85,
            Self::NotEqual => 0x84,
            Self::Below => 0x83,
            Self::BelowOrEqual => 0x87,
            Self::Above => 0x86,
            Self::AboveOrEqual => 0x82,
        }
    }
}

/// A probe acts only where this holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Predicate {
    /// What is compared.
    pub register: Register,
    /// How.
    pub comparison: Comparison,
    /// With what.
    pub value: u64,
}

impl fmt::Display for Predicate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut all = Comparison::ALL.iter();
        let sign = all.find(|(_, comparison)| *comparison == self.comparison);
        let sign = sign.map_or("", |(sign, _)| sign);
        write!(f, "{}{sign}{:#x}", self.register, self.value)
    }
}

impl serde::Serialize for Predicate {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Text that is no predicate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PredicateError {
    /// There is no comparison in it.
    #[error("'{0}' is no comparison such as di==5: ==, !=, <, <=, > and >= are there")]
    NoComparison(String),
    /// What is compared is no register.
    #[error(transparent)]
    Register(#[from] UnknownRegister),
    /// What it is compared with is no number.
    #[error("'{0}' is no number of at most 64 bits (decimal, or hexadecimal with 0x)")]
    Number(String),
}

impl FromStr for Predicate {
    type Err = PredicateError;

    fn from_str(text: &str) -> Result<Self, PredicateError> {
        let found = Comparison::ALL.iter().find_map(|(sign, comparison)| {
            let (left, right) = text.split_once(sign)?;
            Some((left.trim(), *comparison, right.trim()))
        });
        let none = || PredicateError::NoComparison(text.to_owned());
        let (register, comparison, value) = found.ok_or_else(none)?;
        let parsed = match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => value.parse().ok().or_else(|| {
                value
                    .parse::<i64>()
                    .ok()
                    .map(|value| 0_u64.wrapping_add_signed(value))
            }),
        };
        Ok(Self {
            register: register.parse()?,
            comparison,
            value: parsed.ok_or_else(|| PredicateError::Number(value.to_owned()))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn predicates_are_read_as_people_write_them() {
        for (text, told) in [
            ("di==5", "di==0x5"),
            ("rdi == 5", "di==0x5"),
            ("r8<=0x10", "r8<=0x10"),
            ("ax != -1", "ax!=0xffffffffffffffff"),
            ("sp>18446744073709551615", "sp>0xffffffffffffffff"),
        ] {
            assert_eq!(text.parse::<Predicate>().unwrap().to_string(), told);
        }
        for text in [
            "", "di", "di=5", "==5", "di==", "di==five", "xmm0==1", "rr8==1", "r16<1",
        ] {
            assert!(text.parse::<Predicate>().is_err(), "{text}");
        }
    }

    #[test]
    fn flags_of_later_headers_are_not_guessed() {
        assert_eq!(Needs::from_bits(0), Some(Needs::default()));
        assert!(Needs::from_bits(5).is_some_and(|needs| needs.may_sleep && needs.nmi));
        assert_eq!(Needs::from_bits(16), None);
    }
}
