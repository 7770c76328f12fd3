//! Whether a file stayed unchanged while something was copied from a map of it.
//!
//! If a file is truncated within a page, the kernel clears the end of that page in the page cache,
//! and a map shows the zeros without a fault. The size alone does not tell: the file may have been
//! made as long again. But each change of the size also sets the time of the last change (ctime),
//! from the kernel's coarse clock. So a copy is good under two conditions. Before it, the file was
//! whole and its ctime was in the past by that clock, so that a later change has another ctime.
//! After it, the file is whole and has the same ctime. Everything else is read by system calls,
//! which check the size themselves.

use std::sync::atomic::{AtomicI64, Ordering};

use crate::sys::clock::coarse_ns;
use crate::sys::file::Facts;

/// Not a time: nothing is known of the file.
const UNKNOWN: i64 = i64::MIN;

/// The file has not changed after this time, as far as was looked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unchanged(i64);

impl Unchanged {
    /// The time, in nanoseconds. Two of the same file that are alike are of the same size. Of
    /// the same content only if nothing was being written at either: the kernel changes the
    /// time first.
    pub(crate) fn ns(self) -> i64 {
        self.0
    }
}

/// When a file changed last, if it was whole then.
#[derive(Debug)]
pub(crate) struct LastChange {
    ns: AtomicI64,
}

impl Default for LastChange {
    fn default() -> Self {
        Self { ns: AtomicI64::new(UNKNOWN) }
    }
}

impl LastChange {
    /// To be asked before copying; none where nothing may be copied, as the file has less
    /// than `size_bytes`, or changed so lately that another change might have the same time.
    pub(crate) fn before(
        &self,
        size_bytes: u64,
        look: impl FnOnce() -> Option<Facts>,
    ) -> Option<Unchanged> {
        let known = self.ns.load(Ordering::Acquire);
        if known != UNKNOWN {
            return Some(Unchanged(known));
        }
        let now = coarse_ns();
        let facts = look()?;
        let settled = facts.size_bytes >= size_bytes && facts.changed_ns < now;
        settled.then(|| {
            self.ns.store(facts.changed_ns, Ordering::Release);
            Unchanged(facts.changed_ns)
        })
    }

    /// Whether what was copied since is good, by what the file is now.
    pub(crate) fn after(&self, since: Unchanged, size_bytes: u64, facts: Option<Facts>) -> bool {
        let same = facts
            .is_some_and(|facts| facts.size_bytes >= size_bytes && facts.changed_ns == since.0);
        if !same {
            self.ns.store(UNKNOWN, Ordering::Release);
        }
        same
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::file;

    fn facts(size_bytes: u64, changed_ns: i64) -> Facts {
        let file = std::fs::File::open("/proc/self/exe").expect("there is one");
        let real = file::facts(std::os::fd::AsFd::as_fd(&file)).expect("it is open");
        Facts { size_bytes, changed_ns, ..real }
    }

    #[test]
    fn what_changed_long_ago_is_looked_at_once() {
        let last = LastChange::default();
        let since = last.before(10, || Some(facts(10, 5))).expect("it is whole and old");
        assert!(last.after(since, 10, Some(facts(10, 5))));
        assert_eq!(last.before(10, || panic!("it is known")), Some(since));
    }

    #[test]
    fn a_change_that_left_the_size_is_noticed_and_looked_at_again() {
        let last = LastChange::default();
        let since = last.before(10, || Some(facts(10, 5))).expect("it is whole and old");
        assert!(!last.after(since, 10, Some(facts(10, 6))));
        assert!(last.before(10, || Some(facts(10, 6))).is_some());
        for found in [Some(facts(9, 6)), None] {
            let since = last.before(10, || panic!("it is known")).expect("the same");
            assert!(!last.after(since, 10, found));
            assert!(last.before(10, || Some(facts(10, 6))).is_some());
        }
    }

    #[test]
    fn nothing_is_copied_of_what_is_cut_or_has_just_changed() {
        let last = LastChange::default();
        assert_eq!(last.before(10, || Some(facts(9, 5))), None);
        assert_eq!(last.before(10, || Some(facts(10, coarse_ns() + 1_000_000_000))), None);
        assert_eq!(last.before(10, || None), None);
    }
}
