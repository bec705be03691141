//! In which order the probes of a site act.

/// Where a probe with `priority` comes among those that have `others`, in the order in which they
/// act: behind all with the same or a higher one.
#[must_use]
pub fn index(priority: i32, others: impl IntoIterator<Item = i32>) -> usize {
    let before = |other: &i32| *other >= priority;
    others.into_iter().take_while(before).count()
}

#[cfg(test)]
mod tests {
    use super::index;

    #[test]
    fn higher_first_then_older_first() {
        assert_eq!(index(0, []), 0);
        assert_eq!(index(5, [9, 5, 5, 1]), 3);
        assert_eq!(index(10, [9, 5]), 0);
        assert_eq!(index(-1, [9, 5]), 2);
    }
}
