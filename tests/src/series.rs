//! Stock kernels beside the two that every test boots.

/// A test on one kernel of each series that the mirror has, from 5.10 to 7.3, and on the real-time
/// ones: `$test` takes the kernel's name. They take long: for tests of the feature `full`.
///
/// The compilers differ too: GCC 10 made the first, 12 those of Debian 12, 14 those of trixie and 16
/// the last.
#[macro_export]
macro_rules! on_every_series {
    ($test:path) => {
        $crate::on_every_series! { $test:
            v5_10 "5.10@bullseye",
            v6_1_rt "6.1-rt",
            v6_12_rt "6.12-rt",
            v6_12_by_gcc_14 "6.12@trixie",
            v6_16 "6.16@trixie-backports",
            v6_17 "6.17@trixie-backports",
            v6_18 "6.18@trixie-backports",
            v6_19 "6.19@trixie-backports",
            v7_0 "7.0@trixie-backports",
            v7_1 "7.1@trixie-backports",
            v7_2 "7.2@sid",
            v7_2_rt "7.2-rt@sid",
            v7_3 "7.3@experimental",
        }
    };
    ($test:path: $($name:ident $kernel:literal,)*) => {
        $(
            #[test]
            fn $name() -> $crate::TestResult {
                $crate::on_kvm_with(&[$kernel], || $test($kernel))
            }
        )*
    };
}

#[cfg(test)]
mod tests {
    /// The same list is in guest-images/series, for tests that boot nothing.
    #[test]
    fn the_kernels_are_those_of_the_list() {
        let lines = include_str!("series.rs").lines();
        let here: Vec<_> = lines
            .filter_map(|line| line.trim().strip_prefix('v')?.strip_suffix("\","))
            .filter_map(|line| Some(line.split_once('"')?.1))
            .collect();
        let list: Vec<_> = include_str!("../../guest-images/series").lines().collect();
        assert_eq!(here, list);
    }
}
