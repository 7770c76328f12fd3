//! How many requests of the whole process may be in flight together.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::sys::process;

/// A number of requests that is divided among those who want to have some in flight: each gets
/// what it wants as long as there is enough for all, then in proportion, and always one.
#[derive(Debug)]
pub(crate) struct Quota {
    limit: usize,
    /// What is wanted, all together, in the lower half, by the process that the upper half
    /// names: nobody in a child of fork wants what its parent's threads did.
    wanted: AtomicU64,
}

impl Quota {
    pub(crate) const fn new(limit: usize) -> Self {
        Self { limit, wanted: AtomicU64::new(0) }
    }

    /// A share for somebody who wants to have `wanted` requests in flight, until it is dropped.
    pub(crate) fn share(&self, wanted: usize) -> Share<'_> {
        self.change(|all| all + wanted as u64);
        Share { quota: self, wanted, owner: process::id() }
    }

    fn change(&self, change: impl Fn(u64) -> u64) {
        let owner = u64::from(process::id()) << 32;
        let changed = |word| Some(owner | change(wanted_in(word)));
        let _always = self.wanted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, changed);
    }
}

/// What this process wants.
fn wanted_in(word: u64) -> u64 {
    let own = word >> 32 == u64::from(process::id());
    if own {
        word & u64::from(u32::MAX)
    } else {
        0
    }
}

/// What one of them may have in flight.
#[derive(Debug)]
pub(crate) struct Share<'q> {
    quota: &'q Quota,
    wanted: usize,
    owner: u32,
}

impl Share<'_> {
    /// Requests that may be in flight now.
    pub(crate) fn limit(&self) -> usize {
        let all = wanted_in(self.quota.wanted.load(Ordering::Relaxed)) as usize;
        if all <= self.quota.limit {
            return self.wanted;
        }
        (self.wanted * self.quota.limit / all).max(1)
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        if self.owner == process::id() {
            self.quota.change(|all| all - self.wanted as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_get_what_they_want_while_there_is_enough() {
        let quota = Quota::new(100);
        let (one, other) = (quota.share(60), quota.share(40));
        assert_eq!((one.limit(), other.limit()), (60, 40));
        let third = quota.share(100);
        assert_eq!((one.limit(), other.limit(), third.limit()), (30, 20, 50));
        drop(third);
        assert_eq!((one.limit(), other.limit()), (60, 40));
    }

    #[test]
    fn everybody_gets_one() {
        let quota = Quota::new(2);
        let shares: Vec<_> = (0..10).map(|_| quota.share(5)).collect();
        assert!(shares.iter().all(|share| share.limit() == 1));
        drop(shares);
        assert_eq!(quota.share(2).limit(), 2);
    }

    #[test]
    fn a_child_of_fork_begins_anew() {
        let quota = Quota::new(10);
        // As a parent leaves it.
        let parents = Share { owner: process::id() ^ 1, ..quota.share(30) };
        quota.wanted.store((u64::from(parents.owner) << 32) + 30, Ordering::Relaxed);
        let own = quota.share(8);
        assert_eq!(own.limit(), 8);
        drop(parents);
        let more = quota.share(12);
        assert_eq!((own.limit(), more.limit()), (4, 6));
    }
}
