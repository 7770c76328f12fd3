//! Holding pages that a call is about to change.
//!
//! A thread that writes to a held page, or touches a held page that is absent, waits until the call
//! has changed it. So no write is lost between the write-back of a page and its replacement, and no
//! fault loads a page that the call loads itself. No call looks for an interrupt while it holds
//! pages: the thread that waits for one may have the GIL, or be this thread in a signal handler.

use std::time::Duration;

use super::frame_pool::FramePool;
use super::frames::{Frames, Tracking};
use super::{Cached, SharedWindow, State, STEP_PAGES};
use crate::error::{Interrupt, Result};
use crate::plan;
use crate::room::collected;
use crate::sys::lock::Guard;
use crate::table::Entry;
use crate::units::WindowPage;

/// How long a wait for a write-back may keep the caller's interrupt waiting.
const WAIT: Duration = Duration::from_millis(25);

/// Pages that a call is about to change, until this is dropped.
pub(super) struct Held<'s, F: Frames> {
    shared: &'s SharedWindow<F>,
    pages: Vec<WindowPage>,
}

impl<F: Frames> Drop for Held<'_, F> {
    fn drop(&mut self) {
        self.shared.let_go(&self.pages);
    }
}

impl<F: Frames> Held<'_, F> {
    /// The pages, sorted, each once.
    pub(super) fn pages(&self) -> &[WindowPage] {
        &self.pages
    }
}

impl<F: Frames> Cached<F> {
    /// Holds pages, if anybody may write to the window. Waits for others that hold them.
    pub(super) fn hold(
        &self,
        operation: &'static str,
        pages: impl Iterator<Item = WindowPage>,
        interrupt: &dyn Interrupt,
    ) -> Result<Held<'_, F>> {
        let shared = &*self.shared;
        if shared.frames.tracking().is_none() {
            return Ok(Held { shared, pages: Vec::new() });
        }
        let mut pages = collected(operation, pages)?;
        pages.sort_unstable();
        pages.dedup();
        let mut state = shared.settled_state(&pages, interrupt)?;
        for &page in &pages {
            state.hold(page);
        }
        Ok(Held { shared, pages })
    }

    /// The same, and writes the dirty ones back. Where the kernel alone notes writes they are
    /// absent by then; `keep`: their frames are free ones of the pool.
    /// `interrupt` is asked before anything is held, and not while it is.
    pub(super) fn save_and_hold(
        &self,
        operation: &'static str,
        pool: &mut FramePool,
        pages: impl Iterator<Item = WindowPage>,
        keep: bool,
        interrupt: &dyn Interrupt,
    ) -> Result<Held<'_, F>> {
        let mut pages = collected(operation, pages)?;
        if matches!(self.shared.frames.tracking(), Some(Tracking::Kernel | Tracking::Faults)) {
            // Who holds a page while it is written would wait for a fault on it that has the
            // file locked. What is written to it after this is written below, if there is any.
            pages.sort_unstable();
            pages.dedup();
            for pages in pages.chunks(STEP_PAGES) {
                self.shared.clean(operation, pages, interrupt)?;
            }
        }
        let held = self.hold(operation, pages.into_iter(), interrupt)?;
        self.shared.save(operation, pool.isolated(), &held.pages, keep)?;
        Ok(held)
    }
}

impl<F: Frames> SharedWindow<F> {
    /// The state, when nobody else writes any of `pages` back or holds it.
    pub(super) fn settled_state(
        &self,
        pages: &[WindowPage],
        interrupt: &dyn Interrupt,
    ) -> Result<Guard<'_, State>> {
        let busy = |state: &State| {
            let busy = |entry: Entry| entry.writing() || entry.held();
            pages.iter().any(|&page| busy(state.get(page)))
        };
        let mut state = self.state.lock();
        while busy(&state) {
            // Not with the lock held: asking Python can take long.
            drop(state);
            interrupt.check()?;
            state = self.state.lock();
            if busy(&state) {
                state = self.state.wait(state, Some(WAIT));
            }
        }
        Ok(state)
    }

    /// Ends the hold of pages, which the caller has: threads that wait for them go on.
    pub(super) fn let_go(&self, pages: &[WindowPage]) {
        if pages.is_empty() {
            return;
        }
        let mut state = self.state.lock();
        for &page in pages {
            state.release(page);
        }
        drop(state);
        self.state.notify_all();
        self.wake_all(pages);
    }

    /// Wakes the threads that wait for any of `pages`, to look again.
    fn wake_all(&self, pages: &[WindowPage]) {
        /// With more ranges than this one wake for the whole window costs less, even if
        /// it lets others look who have to wait on.
        const RANGES: usize = 16;
        let Some(frames) = self.frames.userfault() else { return };
        let runs = || plan::runs(pages.iter().copied());
        if runs().nth(RANGES).is_some() {
            frames.wake(&[(0, self.frames.region().len())]);
        } else {
            runs().for_each(|run| frames.wake(&[self.bytes(run)]));
        }
    }
}
