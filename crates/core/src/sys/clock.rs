//! The clock that the kernel takes the times of files from.

use rustix::time::{clock_gettime, ClockId};

/// Nanoseconds by the coarse clock (`CLOCK_REALTIME_COARSE`, without a system call): no file
/// that is changed from now on has an earlier time.
#[must_use]
pub fn coarse_ns() -> i64 {
    let now = clock_gettime(ClockId::RealtimeCoarse);
    now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec)
}
