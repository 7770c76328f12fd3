//! Files that have become longer, within a page that a window shows.
//!
//! If a file ends within a page, fremap writes back only the bytes that the file had when the
//! page was loaded: the rest does not belong to the window. Once the store knows that the file is
//! longer, such a page is written back up to the old end, and loaded again.

use super::frames::Frames;
use super::load::{Call, Step};
use super::{Cached, State};
use crate::engine::Fill;
use crate::error::{Interrupt, Result};
use crate::room::collected;
use crate::units::{FilePage, Pages, WindowPage};

impl<F: Frames> Cached<F> {
    /// Loads pages again of which the file has more than when they were loaded, and nothing
    /// else. `had_bytes`: what it had before; a page that is being loaded may not be noted yet.
    pub(super) fn reload_grown(&self, had_bytes: u64, interrupt: &dyn Interrupt) -> Result<()> {
        const OPERATION: &str = "refresh";
        if self.shared.frames.tracking().is_none() {
            return Ok(());
        }
        let mut pool = self.call.take(interrupt)?;
        let store = &self.shared.store;
        let has_grown = |state: &State, page: FilePage| {
            store.expected_bytes(page) > state.file_bytes(page, self.page)
        };
        let pages: Vec<WindowPage> = {
            let state = self.shared.state.lock();
            let cut = state.cut_pages().filter(|&page| has_grown(&state, page));
            let ended = FilePage(self.page.index_of(had_bytes));
            let grown = cut.chain([ended]).flat_map(|page| state.table.appearances(page));
            collected(OPERATION, grown)?
        };
        if pages.is_empty() {
            return Ok(());
        }
        // Also what is being read for them is out of date by that.
        let held = self.hold(OPERATION, pages.into_iter(), interrupt)?;
        let steps: Vec<Step> = {
            let state = self.shared.state.lock();
            let is_grown = |&page: &WindowPage| {
                let entry = state.get(page);
                let file_page = entry.shown().file_page();
                entry.present() && file_page.is_some_and(|page| has_grown(&state, page))
            };
            let pages = held.pages().iter().copied().filter(is_grown).enumerate();
            let entry = |page| state.get(page).finish_drop();
            let steps = pages.map(|(position, window_page)| Step {
                position,
                window_page,
                entry: entry(window_page),
                load: true,
            });
            collected(OPERATION, steps)?
        };
        let pages = collected(OPERATION, steps.iter().map(|step| step.window_page))?;
        self.shared.save(OPERATION, pool.isolated(), &pages, false)?;
        let keep = self.kept(OPERATION, &Pages::List(pages))?;
        let interrupt = self.while_held(interrupt);
        let call = Call { operation: OPERATION, fill: Fill::All, keep: keep.as_ref(), interrupt };
        let mut mask = collected(OPERATION, steps.iter().map(|_| false))?;
        self.carry_out(&call, &mut pool, &steps, &mut mask)
    }
}
