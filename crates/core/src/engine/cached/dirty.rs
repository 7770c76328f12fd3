//! Finding dirty pages. How a write to a window's memory is noticed depends on the kernel, and on
//! `tracking=` of the caller:
//!
//! | [`Tracking`] | in Python | what notices a write | what finds the dirty pages here |
//! |---|---|---|---|
//! | `Faults` (Linux 5.7) | `"sync"` | a fault at the first write | nothing: `allow_write` in `paged/serve.rs` has marked them |
//! | `Kernel` (Linux 6.7) | `"async"` | a bit in the page table | `note_scanned`: one `PAGEMAP_SCAN` a run |
//! | `Content` | engine `eager` | nothing | `note_compared`: the hash of each page |

use rustix::io::Errno;
use xxhash_rust::xxh3::Xxh3;

use super::frames::{Frames, Tracking};
use super::{SharedWindow, State, STEP_PAGES};
use crate::error::Result;
use crate::plan;
use crate::room::{collected, push, room_for};
use crate::sys::span::Span;
use crate::units::{Pages, WindowPage};

/// The hash of what a span holds. Others may write to it meanwhile: a piece is copied first.
pub(super) fn content_hash(content: Span<'_>) -> u128 {
    const PIECE_BYTES: usize = 4096;
    let mut hasher = Xxh3::new();
    let mut copy = [0; PIECE_BYTES];
    for at in (0..content.len()).step_by(PIECE_BYTES) {
        let copy = &mut copy[..PIECE_BYTES.min(content.len() - at)];
        content.part(at, copy.len()).copy_to(copy);
        hasher.update(copy);
    }
    hasher.digest128()
}

impl<F: Frames> SharedWindow<F> {
    /// Pieces of at most [`STEP_PAGES`] that have all of `pages` which may have been written
    /// to. A window that is large and little used is asked for little.
    pub(super) fn used_pieces(
        &self,
        operation: &'static str,
        pages: &Pages<WindowPage>,
    ) -> Result<Vec<Pages<WindowPage>>> {
        /// Pages that are looked through with the state locked.
        const LOCKED_PAGES: u64 = 1 << 24;
        match pages {
            Pages::List(list) => {
                let mut pieces = room_for(operation, list.len().div_ceil(STEP_PAGES))?;
                for piece in list.chunks(STEP_PAGES) {
                    pieces.push(Pages::List(collected(operation, piece.iter().copied())?));
                }
                Ok(pieces)
            }
            Pages::Range(range) => {
                let mut used = Vec::new();
                let mut start = range.start;
                while start < range.end {
                    let end = range.end.min(start + LOCKED_PAGES);
                    let state = self.state.lock();
                    let most = STEP_PAGES as u64;
                    for piece in state.table.used_ranges(operation, start..end, most)? {
                        push(operation, &mut used, Pages::Range(piece))?;
                    }
                    start = end;
                }
                Ok(used)
            }
        }
    }

    /// Marks the pages in the table that were written to. With `protect`, the next write to
    /// each is noticed again.
    pub(super) fn note_writes(
        &self,
        state: &mut State,
        pages: &[WindowPage],
        protect: bool,
    ) -> Result<(), Errno> {
        match self.frames.tracking() {
            // The fault that let a write through has noted it.
            None | Some(Tracking::Faults) => Ok(()),
            Some(Tracking::Kernel) => self.note_scanned(state, pages, protect),
            Some(Tracking::Content) => {
                self.note_compared(state, pages);
                Ok(())
            }
        }
    }

    /// Compares the hash of each page's content with what was loaded.
    fn note_compared(&self, state: &mut State, pages: &[WindowPage]) {
        for &page in pages {
            let entry = state.get(page);
            let known = entry.present() && !entry.dirty() && entry.shown().file_page().is_some();
            if known && content_hash(self.content_of(page)) != state.hash(page) {
                state.mark(page, entry.note_write());
            }
        }
    }

    /// Protects pages, so that the next write to each is a fault, where faults note writes.
    pub(super) fn protect_from_writes(&self, ranges: &[(usize, usize)]) -> Result<(), Errno> {
        match (self.frames.tracking(), self.frames.userfault()) {
            (Some(Tracking::Faults), Some(frames)) => frames.notice_writes(ranges),
            _ => Ok(()),
        }
    }

    /// Marks all pages of the window in the table that were written to, if only the kernel
    /// knows of them. If it does not say whether a page was, the page counts as written to.
    pub fn note_all_writes(&self, state: &mut State) {
        if self.frames.tracking() != Some(Tracking::Kernel) {
            return;
        }
        let mut present = Vec::with_capacity(STEP_PAGES);
        let mut from = Some(WindowPage(0));
        while let Some(start) = from {
            present.clear();
            from = state.table.present_pages(start, &mut present);
            if self.note_scanned(state, &present, false).is_err() {
                for &page in &present {
                    let entry = state.get(page);
                    if entry.shown().file_page().is_some() {
                        state.mark(page, entry.note_write());
                    }
                }
            }
        }
    }

    /// Asks the kernel which pages were written to (`PAGEMAP_SCAN`).
    fn note_scanned(
        &self,
        state: &mut State,
        pages: &[WindowPage],
        protect: bool,
    ) -> Result<(), Errno> {
        let mut written = Vec::new();
        for run in plan::runs(pages.iter().copied()) {
            let (offset, len) = self.bytes(run);
            written.clear();
            // What was told before it failed is protected again, and told once only.
            let told = self.userfault().written(offset, len, protect, &mut written);
            for &(at, len) in &written {
                let first = self.store.page_size().index_of((offset + at) as u64);
                let end = self.store.page_size().count_of((offset + at + len) as u64);
                for page in (first..end).map(WindowPage) {
                    let entry = state.get(page);
                    if entry.present() && entry.shown().file_page().is_some() {
                        state.mark(page, entry.note_write());
                    }
                }
            }
            told?;
        }
        Ok(())
    }
}
