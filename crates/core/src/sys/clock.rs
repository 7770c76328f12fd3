//! The kernel's clocks that are read without a system call.

use std::time::Duration;

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

/// The time since some moment, behind by up to a tick of the kernel, 10 ms at most: for what
/// is asked often, as it costs a tenth of a precise clock (`CLOCK_MONOTONIC_COARSE`).
#[must_use]
pub fn coarse_time() -> Duration {
    Duration::from_nanos(nanoseconds(ClockId::MonotonicCoarse).unsigned_abs())
}

fn nanoseconds(clock: ClockId) -> i64 {
    let now = clock_gettime(clock);
    now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec)
}
