//! Pages that stay in the window, whatever its budget.

use super::frames::Frames;
use super::Cached;
use crate::error::{Error, Result};
use crate::plan;
use crate::units::{Pages, WindowPage};

impl<F: Frames> Cached<F> {
    /// Pins pages, once more if they are pinned already.
    pub(super) fn pin_pages(&self, pages: &Pages<WindowPage>) -> Result<()> {
        let pages = plan::distinct(pages);
        self.check_budget("pin", &pages)?;
        let mut state = self.shared.state.lock();
        pages.iter().for_each(|page| state.change_pin(page, true));
        Ok(())
    }

    pub(super) fn unpin_pages(&self, pages: &Pages<WindowPage>) {
        let pages = plan::distinct(pages);
        let mut state = self.shared.state.lock();
        pages.iter().for_each(|page| state.change_pin(page, false));
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
