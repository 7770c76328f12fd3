//! Whether to poll for the next fault before sleeping (docs/decisions/013).

use std::time::{Duration, Instant};

use rustix::io::Errno;

/// How long the thread looks for the next fault before it sleeps: to be woken can take it
/// several times as long as to serve one.
const LOOK: Duration = Duration::from_micros(50);
/// Waits without looking, at most, after nothing had come in that time.
const MOST_SKIPPED: u32 = 255;

/// Whether it is worth looking for the next fault, by how soon the last ones came.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// Waits that are left without looking.
    skips: u32,
    /// How many they were the last time.
    skipped: u32,
}

impl Watch {
    /// Looks until something is found or it is time to sleep, if it is worth it.
    pub(super) fn look(&mut self, found: impl FnMut() -> Result<bool, Errno>) -> Result<(), Errno> {
        let mut found = found;
        if !self.looks() {
            return Ok(());
        }
        let begin = Instant::now();
        while begin.elapsed() < LOOK {
            if found()? {
                self.found();
                return Ok(());
            }
            // Who is about to touch a page may need this processor.
            std::thread::yield_now();
        }
        self.missed();
        Ok(())
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

    /// Nothing did: it looks half as often.
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
        let mut watch = Watch::default();
        for _ in 0..100 {
            assert!(watch.looks());
            watch.found();
        }
        for skipped in [1, 3, 7, 15, 31, 63, 127, 255, 255] {
            assert!(watch.looks());
            watch.missed();
            for _ in 0..skipped {
                assert!(!watch.looks());
            }
        }
        assert!(watch.looks());
        watch.found();
        assert!(watch.looks());
        watch.missed();
        assert!(!watch.looks());
        assert!(watch.looks());
    }
}
