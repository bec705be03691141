//! How much is tested: all, or what fits into every run.

/// `all` where everything is asked for (`scripts/test --full`), else `few`.
#[must_use]
pub fn all_or<T>(all: T, few: T) -> T {
    match std::env::var_os("STILLPOINT_TEST_FULL") {
        Some(_) => all,
        None => few,
    }
}
