//! Pages that are kept in a window for a while.

use std::sync::{Arc, Weak};

use super::Window;
use crate::engine::Fill;
use crate::error::{Interrupt, Result};
use crate::plan;
use crate::units::{Pages, Selection, WindowPage};

/// Pages that stay in their window until this is dropped.
#[derive(Debug)]
pub struct Pin {
    window: Weak<Window>,
    pages: Pages<WindowPage>,
}

impl Window {
    /// Makes pages present and keeps them so until the pin is dropped.
    ///
    /// # Errors
    /// Pages outside; more than the budget; I/O, after which nothing more is pinned.
    pub fn pin(self: &Arc<Self>, pages: &Selection, interrupt: &dyn Interrupt) -> Result<Pin> {
        let pages = plan::distinct("pin", &self.select("pin", pages)?)?;
        self.check_faults("pin")?;
        self.engine.pin(&pages, interrupt)?;
        let pin = Pin { window: Arc::downgrade(self), pages };
        self.engine.populate(&pin.pages, Fill::All, interrupt)?;
        Ok(pin)
    }
}

impl Pin {
    /// How many pages it keeps.
    #[must_use]
    pub fn page_count(&self) -> usize {
        self.pages.len()
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if let Some(window) = self.window.upgrade() {
            window.engine.unpin(&self.pages);
        }
    }
}
