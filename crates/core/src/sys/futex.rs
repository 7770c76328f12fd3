//! Waiting for a word to change, with a limit.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::futex::{self, Flags, Timespec};

/// Sleeps while `word` is `value`, at most for `timeout`; says whether something else than the
/// time has ended it, which may be nothing that the caller waits for.
pub fn wait(word: &AtomicU32, value: u32, timeout: Duration) -> bool {
    wait_as(Flags::PRIVATE, word, value, timeout)
}

/// The same for a word in memory that other processes map, too.
pub(crate) fn wait_shared(word: &AtomicU32, value: u32, timeout: Duration) -> bool {
    wait_as(Flags::empty(), word, value, timeout)
}

fn wait_as(flags: Flags, word: &AtomicU32, value: u32, timeout: Duration) -> bool {
    // A time that does not fit has no end.
    let timeout = Timespec::try_from(timeout).ok();
    futex::wait(word, flags, value, timeout.as_ref()) != Err(Errno::TIMEDOUT)
}

/// Wakes one thread that sleeps.
pub(crate) fn wake_one(word: &AtomicU32) {
    let _woken = futex::wake(word, Flags::PRIVATE, 1);
}

/// Wakes every thread that sleeps.
pub(crate) fn wake_all(word: &AtomicU32) {
    let _woken = futex::wake(word, Flags::PRIVATE, i32::MAX as u32);
}

/// Wakes every thread that sleeps, in any process.
pub(crate) fn wake_all_shared(word: &AtomicU32) {
    let _woken = futex::wake(word, Flags::empty(), i32::MAX as u32);
}
