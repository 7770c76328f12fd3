//! Pages that stay in the window, whatever its budget.

use std::ops::Range;

use super::frames::Frames;
use super::Cached;
use super::STEP_PAGES;
use crate::error::{Error, Interrupt, Result};
use crate::plan;
use crate::units::{Pages, WindowPage};

impl<F: Frames> Cached<F> {
    /// Pins pages, each named once, once more if they are pinned already; all or none.
    pub(super) fn pin_pages(
        &self,
        pages: &Pages<WindowPage>,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        self.check_budget("pin", pages)?;
        self.shared.state.lock().reserve_pins(pages.len())?;
        for piece in plan::pieces(pages.len(), STEP_PAGES) {
            if let Err(error) = interrupt.check() {
                self.change_pins(pages, 0..piece.start, false);
                return Err(error);
            }
            self.change_pins(pages, piece, true);
        }
        Ok(())
    }

    pub(super) fn unpin_pages(&self, pages: &Pages<WindowPage>) {
        plan::pieces(pages.len(), STEP_PAGES)
            .for_each(|piece| self.change_pins(pages, piece, false));
    }

    fn change_pins(&self, pages: &Pages<WindowPage>, positions: Range<usize>, pin: bool) {
        let mut state = self.shared.state.lock();
        positions.for_each(|position| state.change_pin(pages.at(position), pin));
    }

    /// Fails if a page is pinned.
    pub(super) fn check_unpinned(
        &self,
        operation: &'static str,
        pages: &Pages<WindowPage>,
    ) -> Result<()> {
        let state = self.shared.state.lock();
        if state.table.counts().pinned == 0 {
            return Ok(());
        }
        match pages.iter().find(|&page| state.get(page).pinned()) {
            Some(page) => Err(Error::Argument(format!(
                "{operation}: window page {} is pinned; leave the block of pin() first",
                page.0
            ))),
            None => Ok(()),
        }
    }
}
