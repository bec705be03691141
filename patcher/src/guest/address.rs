//! Addresses of different spaces as different types, so that they cannot be mixed up.
//!
//! To programs they are told as strings of hexadecimal digits behind `0x`: many readers of JSON
//! (jq 1.6, JavaScript) keep 53 bits of a number, and a string can be given back as a site.

use std::fmt;

macro_rules! hexadecimal {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }
    };
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        hexadecimal!($name);

        impl $name {
            /// The address `bytes` further on, wrapping at 2^64 as the CPU does.
            #[must_use]
            pub const fn offset(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// The address `bytes` away in either direction, wrapping at 2^64.
            #[must_use]
            pub const fn displace(self, bytes: i64) -> Self {
                Self(self.0.wrapping_add_signed(bytes))
            }

            /// Distance in bytes from `from` up to this address, wrapping at 2^64.
            #[must_use]
            pub const fn distance_from(self, from: Self) -> u64 {
                self.0.wrapping_sub(from.0)
            }

            /// Distance in bytes from `from` to this address, in either direction.
            #[must_use]
            pub const fn displacement_from(self, from: Self) -> i64 {
                i64::from_ne_bytes(self.0.wrapping_sub(from.0).to_ne_bytes())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

address! {
    /// A guest-virtual address, as the guest's kernel uses it at run time.
    Gva
}
address! {
    /// A guest-physical address.
    Gpa
}
address! {
    /// An address as the kernel image was linked, before KASLR moved it.
    LinkAddr
}

/// What KASLR added to every link address of the kernel image, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Slide(pub u64);

hexadecimal!(Slide);

impl LinkAddr {
    /// Where this part of the image lives in a guest that was moved by `slide`.
    #[must_use]
    pub const fn at(self, slide: Slide) -> Gva {
        Gva(self.0.wrapping_add(slide.0))
    }
}

impl Gva {
    /// The link address that `slide` moved here. Meaningful for addresses of the image only.
    #[must_use]
    pub const fn linked(self, slide: Slide) -> LinkAddr {
        LinkAddr(self.0.wrapping_sub(slide.0))
    }
}
