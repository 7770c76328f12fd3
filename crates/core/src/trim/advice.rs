//! Which read-ahead suits the way a window is touched: pure.
//!
//! A touch maps all pages that the kernel reads around it. Scattered touches leave short runs of
//! mapped pages, no longer than that; touches in order leave long runs.

use super::ReadAhead;

/// Runs of this many pages or fewer are touches here and there: the kernel reads up to 128 KiB
/// around a page, and maps what it has read.
const SHORT_RUN: u64 = 48;
/// New runs that are enough to tell.
const ENOUGH_RUNS: u64 = 8;
/// Pages in runs this long are touched in order.
const LONG_RUN: u64 = 256;

/// Pages that are mapped, and in how many runs they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) pages: u64,
    pub(super) runs: u64,
}

/// The advice that fits what was mapped between two looks, if it differs from the present one.
pub(super) fn fitting(now: ReadAhead, before: Shape, after: Shape) -> Option<ReadAhead> {
    let pages = after.pages.saturating_sub(before.pages);
    let runs = after.runs.saturating_sub(before.runs);
    match now {
        ReadAhead::Random if pages >= LONG_RUN * runs.max(1) => Some(ReadAhead::Normal),
        ReadAhead::Random => None,
        _ if runs >= ENOUGH_RUNS && pages <= SHORT_RUN * runs => Some(ReadAhead::Random),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Shape = Shape { pages: 0, runs: 0 };

    #[test]
    fn touches_here_and_there_need_no_read_ahead() {
        let after = Shape { pages: 32 * 100, runs: 100 };
        assert_eq!(fitting(ReadAhead::Normal, NOTHING, after), Some(ReadAhead::Random));
        let few = Shape { pages: 4, runs: 4 };
        assert_eq!(fitting(ReadAhead::Normal, NOTHING, few), None);
    }

    #[test]
    fn touches_in_order_need_it() {
        let after = Shape { pages: 4000, runs: 4 };
        assert_eq!(fitting(ReadAhead::Normal, NOTHING, after), None);
        assert_eq!(fitting(ReadAhead::Random, NOTHING, after), Some(ReadAhead::Normal));
        let joined = Shape { pages: 300, runs: 0 };
        let before = Shape { pages: 20, runs: 20 };
        assert_eq!(fitting(ReadAhead::Random, before, joined), Some(ReadAhead::Normal));
    }

    #[test]
    fn touches_that_go_on_here_and_there_change_nothing() {
        let after = Shape { pages: 500, runs: 480 };
        assert_eq!(fitting(ReadAhead::Random, NOTHING, after), None);
        assert_eq!(fitting(ReadAhead::Random, after, after), None);
    }
}
