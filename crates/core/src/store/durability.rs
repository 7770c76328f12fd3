//! Which writes of a file are known to be on the disk.
//!
//! The kernel reports a failed write-back once to each open file description, and then calls the
//! pages clean: a second `fsync` succeeds even if data was lost. So fremap remembers the error if a
//! write before it cannot be repeated, and every later sync returns it until it is
//! [acknowledged](Durability::acknowledge). Pages that a window still has as dirty are written
//! again, so they do not count here.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use rustix::io::Errno;

/// How long somebody waits between two looks at a sync of another thread's.
const PAUSE: Duration = Duration::from_millis(1);

/// Why writes are not known to be on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unsynced {
    /// This sync failed; who still has the pages can write them again.
    Failed(Errno),
    /// This sync or one before it failed, and somebody's writes may be gone with it.
    Lost(Errno),
}

/// The syncs of one file, which share what the kernel tells its descriptor.
#[derive(Debug, Default)]
pub(super) struct Durability {
    /// The process one thread of which syncs; 0 when none does. A child of fork does not wait
    /// for a thread of its parent's.
    syncing: AtomicU32,
    /// Counts writes that nobody can make again, once before each and once after it.
    passing: AtomicU64,
    /// What that was when the last sync began that succeeded.
    synced: AtomicU64,
    failures: AtomicU64,
    /// The first error that is not acknowledged; 0 when there is none.
    lost: AtomicI32,
}

/// The one sync of a file that is under way.
pub(super) struct Syncing<'d> {
    durability: &'d Durability,
    seen: u64,
}

impl Drop for Syncing<'_> {
    fn drop(&mut self) {
        self.durability.syncing.store(0, Ordering::Release);
    }
}

impl Durability {
    /// Somebody is about to write, or has written, what he cannot write again.
    pub(super) fn note_passing(&self) {
        self.passing.fetch_add(1, Ordering::AcqRel);
    }

    /// How many syncs have failed. What was written before one of them may be lost.
    pub(super) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Acquire)
    }

    /// # Errors
    /// The error that is not acknowledged.
    pub(super) fn check(&self) -> Result<(), Unsynced> {
        match self.lost.load(Ordering::Acquire) {
            0 => Ok(()),
            errno => Err(Unsynced::Lost(Errno::from_raw_os_error(errno))),
        }
    }

    /// Waits until nobody else syncs: the error is told to one of them, and all have to know
    /// of it before they call their own a success.
    pub(super) fn begin(&self) -> Syncing<'_> {
        let own = crate::sys::process::id();
        loop {
            let free = match self.syncing.load(Ordering::Acquire) {
                process if process == own => {
                    std::thread::sleep(PAUSE);
                    continue;
                }
                // Nobody, or a thread that this child of fork does not have.
                other => other,
            };
            let (taken, seen) = (Ordering::AcqRel, Ordering::Relaxed);
            if self.syncing.compare_exchange(free, own, taken, seen).is_ok() {
                // What is counted now is in the page cache, and so part of this sync.
                return Syncing { durability: self, seen: self.passing.load(Ordering::Acquire) };
            }
        }
    }

    /// Forgets the error that was told: its writes count as made again.
    pub(super) fn acknowledge(&self) {
        if self.lost.load(Ordering::Acquire) != 0 {
            self.synced.fetch_max(self.passing.load(Ordering::Acquire), Ordering::AcqRel);
            self.lost.store(0, Ordering::Release);
        }
    }
}

impl Syncing<'_> {
    /// Notes how the sync has ended.
    ///
    /// # Errors
    /// Why the file's writes are not known to be on the disk.
    pub(super) fn end(self, outcome: Result<(), Errno>) -> Result<(), Unsynced> {
        let all = self.durability;
        match outcome {
            Ok(()) => {
                all.check()?;
                all.synced.fetch_max(self.seen, Ordering::AcqRel);
                Ok(())
            }
            Err(errno) => {
                all.failures.fetch_add(1, Ordering::AcqRel);
                if all.passing.load(Ordering::Acquire) > all.synced.load(Ordering::Acquire) {
                    let (set, seen) = (Ordering::AcqRel, Ordering::Acquire);
                    let code = errno.raw_os_error();
                    let _first = all.lost.compare_exchange(0, code, set, seen);
                }
                all.check()?;
                Err(Unsynced::Failed(errno))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sync(durability: &Durability, outcome: Result<(), Errno>) -> Result<(), Unsynced> {
        durability.begin().end(outcome)
    }

    #[test]
    fn an_error_is_told_once_where_everything_can_be_written_again() {
        let file = Durability::default();
        assert_eq!(sync(&file, Err(Errno::IO)), Err(Unsynced::Failed(Errno::IO)));
        assert_eq!(file.failures(), 1);
        assert_eq!(sync(&file, Ok(())), Ok(()));
    }

    #[test]
    fn what_nobody_can_write_again_is_lost_until_that_is_acknowledged() {
        let file = Durability::default();
        file.note_passing();
        assert_eq!(sync(&file, Err(Errno::NOSPC)), Err(Unsynced::Lost(Errno::NOSPC)));
        assert_eq!(sync(&file, Ok(())), Err(Unsynced::Lost(Errno::NOSPC)));
        assert_eq!(sync(&file, Err(Errno::IO)), Err(Unsynced::Lost(Errno::NOSPC)));
        assert_eq!(file.check(), Err(Unsynced::Lost(Errno::NOSPC)));
        file.acknowledge();
        assert_eq!((file.check(), sync(&file, Ok(()))), (Ok(()), Ok(())));
        assert_eq!(sync(&file, Err(Errno::IO)), Err(Unsynced::Failed(Errno::IO)));
    }

    #[test]
    fn a_write_that_ends_during_a_sync_is_not_part_of_it() {
        let file = Durability::default();
        file.note_passing();
        let syncing = file.begin();
        file.note_passing();
        assert_eq!(syncing.end(Ok(())), Ok(()));
        assert_eq!(sync(&file, Err(Errno::IO)), Err(Unsynced::Lost(Errno::IO)));
    }

    #[test]
    fn a_write_that_was_synced_is_not_lost_with_what_fails_later() {
        let file = Durability::default();
        file.note_passing();
        file.note_passing();
        assert_eq!(sync(&file, Ok(())), Ok(()));
        assert_eq!(sync(&file, Err(Errno::IO)), Err(Unsynced::Failed(Errno::IO)));
    }

    #[test]
    fn a_sync_of_the_parent_s_is_not_waited_for() {
        let file = Durability::default();
        file.syncing.store(crate::sys::process::id() + 1, Ordering::Release);
        assert_eq!(sync(&file, Ok(())), Ok(()));
    }
}
