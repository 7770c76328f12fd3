//! Extents of a store, shown in slots: stretches of a window that are as long.

use super::{RemapOptions, Target, Window};
use crate::error::{Interrupt, Result};
use crate::room::room_for;
use crate::units::Selection;

impl Window {
    /// Shows each of some extents, `extent_pages` pages of the store, in the slot of as many
    /// pages that is named at the same place of `slots`. No thread reads these slots meanwhile,
    /// and what was placed there is lost.
    ///
    /// # Errors
    /// As [`remap`](Self::remap), whose pages these are.
    pub fn load_extents(
        &self,
        extents: &[i64],
        slots: &[i64],
        extent_pages: i64,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let (file_pages, at) = if let ([extent], [slot]) = (extents, slots) {
            let first = extent.saturating_mul(extent_pages);
            let pages = Selection::Range(first, first.saturating_add(extent_pages));
            (pages, Target::From(slot.saturating_mul(extent_pages)))
        } else {
            let file_pages = pages_of(extents, extent_pages)?;
            (Selection::List(file_pages), Target::List(pages_of(slots, extent_pages)?))
        };
        let options = RemapOptions {
            prot: None,
            nonblock: false,
            populate: true,
            discard: true,
            in_place: true,
        };
        self.remap(&file_pages, &at, options, interrupt).map(|_present| ())
    }
}

/// The pages of extents or of slots, one after another.
fn pages_of(numbers: &[i64], extent_pages: i64) -> Result<Vec<i64>> {
    let each = usize::try_from(extent_pages).unwrap_or(0);
    let mut pages = room_for("remap", numbers.len().saturating_mul(each))?;
    for number in numbers {
        let first = number.saturating_mul(extent_pages);
        pages.extend(first..first.saturating_add(extent_pages));
    }
    Ok(pages)
}
