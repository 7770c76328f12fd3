//! The clocks from which the kernel takes the times of files.

use rustix::time::{clock_gettime, ClockId};

/// Nanoseconds by the coarse clock (`CLOCK_REALTIME_COARSE`, without a system call): no file
/// that is changed from now on has an earlier time.
#[must_use]
pub fn coarse_ns() -> i64 {
    nanoseconds(ClockId::RealtimeCoarse)
}

/// Nanoseconds by the clock that the coarse one follows, some milliseconds behind
/// (`CLOCK_REALTIME`): no file that was changed before has a later time.
#[must_use]
pub fn fine_ns() -> i64 {
    nanoseconds(ClockId::Realtime)
}

fn nanoseconds(clock: ClockId) -> i64 {
    let now = clock_gettime(clock);
    now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec)
}
