//! What was unhooked, in the order in which it was, until nobody can come back to it.
//!
//! Everything gets a number when it is unhooked. A cookie of a grace period is such a number: it has
//! passed when nobody is in anything any more that has this or a lower one. What is of one *line* is
//! freed in the order in which it was unhooked: whoever is in something earlier may still use what
//! goes with the later. This module has the numbers and the order; what it is about, who may come
//! back, and how it is freed is the caller's.

use std::collections::BTreeMap;

use crate::guest::Gva;

/// What was unhooked and is not freed yet, in order.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Queue<T> {
    /// The number that was given last. Never given twice.
    last: u64,
    all: Vec<Waiting<T>>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Waiting<T> {
    number: u64,
    line: Option<Gva>,
    /// Nobody is in it any more, though it is kept.
    clear: bool,
    what: T,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            last: 0,
            all: Vec::new(),
        }
    }
}

impl<T> Queue<T> {
    /// Takes over what nothing leads to any more. It comes after what is of the same `line`.
    pub fn add(&mut self, what: T, line: Option<Gva>) {
        self.last += 1;
        self.all.push(Waiting {
            number: self.last,
            line,
            clear: false,
            what,
        });
    }

    /// The number of what was unhooked last; 0 when nothing was.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Nobody is in anything any more that was unhooked up to `number`.
    #[must_use]
    pub fn has_passed(&self, number: u64) -> bool {
        self.pending(number).next().is_none()
    }

    /// What somebody may still be in, up to `number`.
    pub fn pending(&self, number: u64) -> impl Iterator<Item = &T> {
        let upto = self
            .all
            .iter()
            .filter(move |waiting| waiting.number <= number);
        upto.filter(|waiting| !waiting.clear)
            .map(|waiting| &waiting.what)
    }

    /// Everything, in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.all.iter().map(|waiting| &waiting.what)
    }

    /// Everything, in order.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.all.iter_mut().map(|waiting| &mut waiting.what)
    }

    /// Nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Everything is gone, with whoever was in it.
    pub fn clear(&mut self) {
        self.all.clear();
    }

    /// Takes the first out that is `wanted`, because it is hooked again: no cookie waits for it any
    /// more. The order of the others stays.
    pub fn take(&mut self, wanted: impl Fn(&T) -> bool) -> Option<T> {
        let index = self.all.iter().position(|waiting| wanted(&waiting.what))?;
        Some(self.all.remove(index).what)
    }

    /// Takes note of a look at all contexts. `found` says for each, in order, who may come back to
    /// it; what it says nothing about stays as it is. `tell` is given that, and who holds up what is
    /// earlier in its line; `free` is asked to free what nobody holds up, and says whether it did.
    pub fn settle<H: Clone>(
        &mut self,
        found: impl IntoIterator<Item = Vec<H>>,
        mut tell: impl FnMut(&mut T, Vec<H>),
        mut free: impl FnMut(&mut T) -> bool,
    ) {
        let mut found = found.into_iter();
        let mut lines: BTreeMap<Gva, Vec<H>> = BTreeMap::new();
        self.all.retain_mut(|waiting| {
            let Some(mut holders) = found.next() else {
                return true;
            };
            if let Some(line) = waiting.line {
                let earlier = lines.entry(line).or_default();
                let own = holders.clone();
                holders.extend_from_slice(earlier);
                earlier.extend(own);
            }
            waiting.clear = holders.is_empty();
            tell(&mut waiting.what, holders);
            !(waiting.clear && free(&mut waiting.what))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: Option<Gva> = Some(Gva(0x1000));

    fn queue(lines: &[Option<Gva>]) -> Queue<usize> {
        let mut queue = Queue::default();
        for (index, line) in lines.iter().enumerate() {
            queue.add(index, *line);
        }
        queue
    }

    fn settle(queue: &mut Queue<usize>, found: &[&[u8]]) -> Vec<(usize, Vec<u8>)> {
        let mut told = Vec::new();
        let found = found.iter().map(|holders| holders.to_vec());
        queue.settle(found, |what, by| told.push((*what, by)), |_| true);
        told
    }

    #[test]
    fn a_later_one_of_a_line_waits_for_the_earlier() {
        let mut queue = queue(&[LINE, None, LINE, LINE]);
        let told = settle(&mut queue, &[&[7], &[], &[], &[8]]);
        assert_eq!(
            told,
            [(0, vec![7]), (1, vec![]), (2, vec![7]), (3, vec![8, 7])]
        );
        assert_eq!(queue.iter().copied().collect::<Vec<_>>(), [0, 2, 3]);
    }

    /// A holder is told once for each that it holds up, however long the line is.
    #[test]
    fn a_long_line_is_told_in_short() {
        let mut queue = queue(&[LINE; 64]);
        let mut found = vec![&[][..]; 64];
        found[0] = &[7];
        let told = settle(&mut queue, &found);
        assert!(told.iter().all(|(_, holders)| *holders == [7]));
    }

    #[test]
    fn taking_one_out_keeps_the_order() {
        let mut queue = queue(&[None, LINE, LINE]);
        assert_eq!(queue.take(|what| *what == 0), Some(0));
        settle(&mut queue, &[&[7], &[]]);
        assert_eq!(queue.iter().copied().collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn a_cookie_covers_everything_up_to_it() {
        let mut queue = queue(&[None, None, None]);
        settle(&mut queue, &[&[7], &[], &[7]]);
        assert_eq!(queue.last(), 3);
        assert!(queue.has_passed(0));
        assert!(!queue.has_passed(2));
        settle(&mut queue, &[&[], &[7]]);
        assert!(queue.has_passed(2));
        assert!(!queue.has_passed(3));
    }

    #[test]
    fn what_nothing_is_said_about_stays() {
        let mut queue = queue(&[None, None]);
        settle(&mut queue, &[&[]]);
        assert_eq!(queue.iter().copied().collect::<Vec<_>>(), [1]);
        assert!(!queue.has_passed(2));
    }
}
