//! When to ask whether the caller wants a read to stop.

use std::time::{Duration, Instant};

use crate::error::{Interrupt, Result};

/// Asking may take a lock that others hold for milliseconds, so it is not done
/// more often than this.
const INTERVAL: Duration = Duration::from_millis(20);
/// Pages after which the clock is not consulted: about 2 ms of copying.
const PAGES: usize = 4096;

/// Asks an [`Interrupt`] now and then.
pub(crate) struct Pace<'i> {
    interrupt: &'i dyn Interrupt,
    asked: Instant,
    pages: usize,
}

impl<'i> Pace<'i> {
    pub(crate) fn new(interrupt: &'i dyn Interrupt) -> Self {
        Self { interrupt, asked: Instant::now(), pages: 0 }
    }

    /// What is asked.
    pub(crate) fn interrupt(&self) -> &'i dyn Interrupt {
        self.interrupt
    }

    /// Notes that `pages` more are done, and asks if it is time to.
    pub(crate) fn check(&mut self, pages: usize) -> Result<()> {
        self.pages += pages;
        if self.pages < PAGES && self.asked.elapsed() < INTERVAL {
            return Ok(());
        }
        self.interrupt.check()?;
        self.asked = Instant::now();
        self.pages = 0;
        Ok(())
    }
}
