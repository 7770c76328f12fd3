//! Whether to poll before sleeping: for the next fault, and for a page to arrive
//! (docs/decisions/013).

use std::time::{Duration, Instant};

use rustix::io::Errno;

/// Waits without looking, at most, after nothing had come in time.
const MOST_SKIPPED: u32 = 255;

/// Whether it is worth looking for what comes next, by how soon the last ones came.
#[derive(Debug)]
pub(super) struct Polling {
    /// How long the thread looks before it sleeps.
    most: Duration,
    /// Waits that are left without looking.
    skips: u32,
    /// How many they were the last time.
    skipped: u32,
}

impl Polling {
    pub(super) fn new(most: Duration) -> Self {
        Self { most, skips: 0, skipped: 0 }
    }

    /// Looks until something is found or it is time to sleep, if it is worth it. Returns whether
    /// something was found.
    pub(super) fn look(
        &mut self,
        mut found: impl FnMut() -> Result<bool, Errno>,
    ) -> Result<bool, Errno> {
        if !self.looks() {
            return Ok(false);
        }
        let begin = Instant::now();
        loop {
            let found = found()?;
            // Also when it was found too late: another thread needs this processor, and one that
            // wakes from sleep gets it back sooner than one that yields.
            if begin.elapsed() >= self.most {
                self.missed();
                return Ok(found);
            }
            if found {
                self.found();
                return Ok(true);
            }
            std::thread::yield_now();
        }
    }

    /// Whether to look in this wait.
    fn looks(&mut self) -> bool {
        let skips = self.skips > 0;
        self.skips -= u32::from(skips);
        !skips
    }

    /// Something came while the thread looked.
    fn found(&mut self) {
        self.skipped = 0;
    }

    /// Nothing did in time: it looks half as often.
    fn missed(&mut self) {
        self.skipped = (2 * self.skipped + 1).min(MOST_SKIPPED);
        self.skips = self.skipped;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thread_looks_while_faults_come_soon_and_seldom_where_they_do_not() {
        let mut polling = Polling::new(Duration::from_micros(50));
        for _ in 0..100 {
            assert!(polling.looks());
            polling.found();
        }
        for skipped in [1, 3, 7, 15, 31, 63, 127, 255, 255] {
            assert!(polling.looks());
            polling.missed();
            for _ in 0..skipped {
                assert!(!polling.looks());
            }
        }
        assert!(polling.looks());
        polling.found();
        assert!(polling.looks());
        polling.missed();
        assert!(!polling.looks());
        assert!(polling.looks());
    }

    #[test]
    fn what_was_found_too_late_is_returned_but_counts_as_missed() {
        let mut late = Polling::new(Duration::ZERO);
        assert_eq!(late.look(|| Ok(true)), Ok(true));
        assert_eq!(late.look(|| unreachable!("it skips this wait")), Ok(false));
        let mut soon = Polling::new(Duration::MAX);
        let mut looks = 0;
        for _ in 0..2 {
            let found = soon.look(|| {
                looks += 1;
                Ok(looks % 3 == 0)
            });
            assert_eq!(found, Ok(true));
        }
        assert_eq!(looks, 6);
        assert_eq!(soon.look(|| Err(Errno::BADF)), Err(Errno::BADF));
    }
}
