//! Following the kernel's circular lists.
//!
//! Guaranteed: each walk comes back to where it began, or is an error. A list that runs into itself
//! is noticed by comparing each entry with an earlier one, which is taken anew after 1, 2, 4, 8 …
//! steps: at the latest when the circle was gone through twice.

use super::list::{TaskError, Walker};
use super::parts::{Parts, Record};
use crate::guest::Gva;

/// Where a walk is.
struct Steps {
    what: &'static str,
    done: usize,
    earlier: Gva,
}

impl Steps {
    const fn from(what: &'static str, head: Gva) -> Self {
        Self {
            what,
            done: 0,
            earlier: head,
        }
    }

    /// Takes the step to `at`.
    fn to(&mut self, walker: &Walker<'_, '_>, at: Gva) -> Result<(), TaskError> {
        if at == self.earlier {
            return Err(TaskError::Circle {
                what: self.what,
                at,
            });
        }
        self.done += 1;
        walker.bound(self.what, self.done)?;
        if self.done.is_power_of_two() {
            self.earlier = at;
        }
        Ok(())
    }
}

impl Walker<'_, '_> {
    /// The structures on a list, `member` bytes before their entries.
    pub(super) fn entries(
        &self,
        what: &'static str,
        head: Gva,
        member: u64,
    ) -> Result<Vec<Gva>, TaskError> {
        let mut found = Vec::new();
        let mut steps = Steps::from(what, head);
        let next = self.layout.list_next;
        let mut at = self.pointer(what, head.offset(next))?;
        while at != head {
            steps.to(self, at)?;
            found.push(Gva(at.0.wrapping_sub(member)));
            at = self.pointer(what, at.offset(next))?;
        }
        Ok(found)
    }

    /// As [`Walker::entries`], for a list that is all zero until its CPU comes up.
    pub(super) fn optional(
        &self,
        what: &'static str,
        head: Gva,
        member: u64,
    ) -> Result<Vec<Gva>, TaskError> {
        let first = self.pointer(what, head.offset(self.layout.list_next))?;
        if first.0 == 0 {
            return Ok(Vec::new());
        }
        self.entries(what, head, member)
    }

    /// Shows `each` every thread of a process, with those of its members that are in `parts`; the
    /// link to the next thread has to be among them.
    pub(super) fn threads(
        &self,
        leader: Gva,
        parts: &Parts,
        each: &mut dyn FnMut(Gva, &Record<'_>) -> Result<(), TaskError>,
    ) -> Result<(), TaskError> {
        const WHAT: &str = "thread list";
        let layout = self.layout;
        let member = layout.task.thread_node;
        let signal = self.pointer("task list", leader.offset(layout.task.signal))?;
        let head = signal.offset(layout.thread_head);
        let mut steps = Steps::from(WHAT, head);
        let mut record = parts.empty();
        let mut at = self.pointer(WHAT, head.offset(layout.list_next))?;
        while at != head {
            steps.to(self, at)?;
            let thread = Gva(at.0.wrapping_sub(member));
            self.fill(&mut record, thread)?;
            each(thread, &record)?;
            at = record.pointer(layout.task.next_thread);
        }
        Ok(())
    }

    /// At most so many are believed.
    pub(super) fn bound(&self, what: &'static str, count: usize) -> Result<(), TaskError> {
        if count > self.limit {
            return Err(TaskError::Endless {
                what,
                limit: self.limit,
            });
        }
        Ok(())
    }
}
