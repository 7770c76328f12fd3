//! The kernel's clocks that are read without a system call.

use std::time::Duration;

use rustix::time::{clock_gettime, ClockId};

/// Nanoseconds by the coarse clock (`CLOCK_REALTIME_COARSE`, without a system call): no file
/// that is changed from now on has an earlier time.
pub(crate) fn coarse_ns() -> i64 {
    now(ClockId::RealtimeCoarse)
}

/// Nanoseconds by the clock that the coarse one follows, some milliseconds behind
/// (`CLOCK_REALTIME`): no file that was changed before has a later time.
pub(crate) fn fine_ns() -> i64 {
    now(ClockId::Realtime)
}

/// How far [`coarse_time`] is behind at most: a tick of the kernel.
pub const COARSE_TICK: Duration = Duration::from_millis(10);

/// The time since some moment, behind by up to a [tick](COARSE_TICK) of the kernel: for what is
/// asked often, as it costs a tenth of a precise clock (`CLOCK_MONOTONIC_COARSE`).
#[must_use]
pub fn coarse_time() -> Duration {
    Duration::from_nanos(now(ClockId::MonotonicCoarse).unsigned_abs())
}

fn now(clock: ClockId) -> i64 {
    let now = clock_gettime(clock);
    nanoseconds(now.tv_sec, now.tv_nsec)
}

/// A duration as the C library takes it.
pub(super) fn timespec(duration: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: libc::time_t::try_from(duration.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

/// A time in nanoseconds.
pub(super) fn nanoseconds(seconds: i64, rest: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_coarse_clock_is_behind_by_a_tick_at_most() {
        let tick = rustix::time::clock_getres(ClockId::MonotonicCoarse);
        assert_eq!(tick.tv_sec, 0);
        assert!(Duration::from_nanos(tick.tv_nsec.unsigned_abs()) <= COARSE_TICK);
    }
}
