//! Write-back: dirty pages on their way to the store.
//!
//! A page that was written to is *dirty*. During write-back it is *writing*, and protected again: a
//! write to it from then on makes it dirty again. When the store has its content it is clean; if
//! that failed, it is dirty as before.
//!
//! `dirty.rs` finds the pages; `hold.rs` keeps writers away while a call replaces them.

use rustix::io::Errno;

use super::dirty::content_hash;
use super::frame_pool::IsolatedFrames;
use super::frames::{Frames, Tracking};
use super::state::Writing;
use super::{Cached, SharedWindow, State, STEP_PAGES};
use crate::error::{Error, Interrupt, Result, Uninterruptible};
use crate::plan;
use crate::room::{collected, grow};
use crate::stats::Counters;
use crate::store::Outgoing;
use crate::sys::lock::Guard;
use crate::sys::mm::{system_page_bytes, Access, Region};
use crate::table::Entry;
use crate::units::{Pages, WindowPage};

/// Pages that are copied before they are written, where they have to be.
const COPIED_PAGES: usize = 256;

impl<F: Frames> Cached<F> {
    /// Writes dirty pages among `pages` back, and makes them durable.
    pub(super) fn flush_pages(
        &self,
        pages: &Pages<WindowPage>,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let named = |error: Error| error.with_operation("flush");
        self.shared.store.check_synced().map_err(named)?;
        let failed_syncs = self.shared.store.failed_syncs();
        let pages = plan::distinct("flush", pages)?;
        let mut written = Vec::new();
        for piece in self.shared.used_pieces("flush", &pages)? {
            let piece: Vec<WindowPage> = piece.iter().collect();
            let outcome = interrupt
                .check()
                .and_then(|()| grow("flush", &mut written, piece.len()))
                .and_then(|()| self.shared.begin_writing("flush", &piece, interrupt))
                .and_then(|writing| {
                    written.extend_from_slice(&writing);
                    self.shared.write_pages("flush", &writing, interrupt)
                });
            if let Err(error) = outcome {
                // What is not durable is written again by the next flush.
                self.shared.end_writing(&written, false);
                return Err(error.with_completed(0));
            }
        }
        let unsynced = std::mem::take(&mut self.shared.state.lock().unsynced);
        if written.is_empty() && !unsynced {
            return Ok(());
        }
        let synced = self.shared.store.sync_kept().map_err(named).and_then(|()| {
            // Somebody else's has failed since the pages were written, and was told of them.
            let others = self.shared.store.failed_syncs() != failed_syncs;
            if others {
                Err(Error::system("flush", Errno::IO))
            } else {
                Ok(())
            }
        });
        if synced.is_err() {
            self.shared.state.lock().unsynced = true;
        }
        self.shared.end_writing(&written, synced.is_ok());
        synced
    }
}

impl<F: Frames> SharedWindow<F> {
    /// Writes dirty pages among `pages` back, which are held and sorted.
    pub(super) fn save(
        &self,
        operation: &'static str,
        isolated: &mut IsolatedFrames,
        pages: &[WindowPage],
        keep: bool,
    ) -> Result<()> {
        match self.frames.tracking() {
            None => Ok(()),
            Some(Tracking::Kernel) => self.save_isolated(operation, isolated, pages, keep),
            Some(Tracking::Faults | Tracking::Content) => self.save_in_place(operation, pages),
        }
    }

    /// Writes pages back from where they lie: a thread that writes to them waits.
    fn save_in_place(&self, operation: &'static str, pages: &[WindowPage]) -> Result<()> {
        for pages in pages.chunks(STEP_PAGES) {
            let writing = self.mark_writing(operation, self.state.lock(), pages)?;
            self.write_marked(operation, &writing, &Uninterruptible)?;
        }
        Ok(())
    }

    /// Writes what was written to `pages` (sorted, each named once), which nobody holds and
    /// which stay where they are. If that fails they are dirty as before.
    pub(super) fn clean(
        &self,
        operation: &'static str,
        pages: &[WindowPage],
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let writing = self.begin_writing(operation, pages, interrupt)?;
        self.write_marked(operation, &writing, interrupt)
    }

    fn write_marked(
        &self,
        operation: &'static str,
        writing: &[Writing],
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        if writing.is_empty() {
            return Ok(());
        }
        let written = self.unsynced(|| self.write_pages(operation, writing, interrupt));
        self.end_writing(writing, written.is_ok());
        written
    }

    /// Writes to the store by `write`, and leaves it to the next flush to sync it. What was
    /// written is not called clean before that is noted.
    pub(super) fn unsynced(&self, write: impl FnOnce() -> Result<()>) -> Result<()> {
        self.store.note_passing();
        let written = write();
        self.store.note_passing();
        self.state.lock().unsynced = true;
        written
    }

    /// Takes pages out of the window, and writes them from where they are then.
    fn save_isolated(
        &self,
        operation: &'static str,
        isolated: &mut IsolatedFrames,
        pages: &[WindowPage],
        keep: bool,
    ) -> Result<()> {
        let present: Vec<WindowPage> = {
            let state = self.state.lock();
            let of_file = |entry: Entry| entry.present() && entry.shown().file_page().is_some();
            collected(operation, pages.iter().copied().filter(|&page| of_file(state.get(page))))?
        };
        let present = self.without_lost(present);
        let present = present.map_err(|errno| Error::system(operation, errno))?;
        self.take_out(operation, isolated, &present, keep)
    }

    /// The pages that the kernel still has; the others are absent from now on: this
    /// thread would wait for itself if it touched them.
    pub(super) fn without_lost(
        &self,
        mut pages: Vec<WindowPage>,
    ) -> Result<Vec<WindowPage>, Errno> {
        let mut lost = Vec::new();
        for run in plan::runs(pages.iter().copied()) {
            let (offset, len) = self.bytes(run);
            if self.userfault().has(self.frames.region().span(offset, len))? {
                continue;
            }
            for page in run.pages() {
                if !self.userfault().has(self.content_of(page))? {
                    lost.push(page);
                }
            }
        }
        if lost.is_empty() {
            return Ok(pages);
        }
        let mut state = self.state.lock();
        for &page in &lost {
            let entry = state.get(page).finish_drop();
            state.mark(page, entry);
        }
        pages.retain(|page| !lost.contains(page));
        Ok(pages)
    }

    /// What has to be known to write a page; None for one that shows no file page.
    pub(super) fn writing(&self, state: &State, window_page: WindowPage) -> Option<Writing> {
        let file_page = state.get(window_page).shown().file_page()?;
        let file_bytes = state.file_bytes(file_page, self.store.page_size());
        Some(Writing { window_page, file_page, file_bytes })
    }

    /// Marks the dirty pages among `pages` (each named once) as being written back. Waits for
    /// others that write them back.
    pub(super) fn begin_writing(
        &self,
        operation: &'static str,
        pages: &[WindowPage],
        interrupt: &dyn Interrupt,
    ) -> Result<Vec<Writing>> {
        self.mark_writing(operation, self.settled_state(pages, interrupt)?, pages)
    }

    fn mark_writing(
        &self,
        operation: &'static str,
        mut state: Guard<'_, State>,
        pages: &[WindowPage],
    ) -> Result<Vec<Writing>> {
        let fail = |errno| Error::system(operation, errno);
        self.note_writes(&mut state, pages, true).map_err(fail)?;
        let mut writing = Vec::new();
        for &window_page in pages {
            if state.get(window_page).dirty() {
                writing.extend(self.writing(&state, window_page));
            }
        }
        let ranges = self.ranges(writing.iter().map(|page| page.window_page));
        self.protect_from_writes(&ranges).map_err(fail)?;
        for page in &writing {
            let entry = state.get(page.window_page).begin_writeback();
            state.mark(page.window_page, entry);
        }
        Ok(writing)
    }

    /// Writes pages that are marked so, in the order of the file.
    pub(super) fn write_pages(
        &self,
        operation: &'static str,
        writing: &[Writing],
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let mut sorted = writing.to_vec();
        sorted.sort_unstable_by_key(|page| page.file_page);
        let named = |error: Error| error.with_operation(operation);
        if self.frames.tracking() == Some(Tracking::Content) {
            return self.write_copies(&sorted, interrupt).map_err(named);
        }
        let outgoing: Vec<Outgoing<'_>> =
            sorted.iter().map(|page| page.outgoing(self.content_of(page.window_page))).collect();
        self.write_out(&outgoing, interrupt).map_err(named)
    }

    /// Writes copies of pages, so that what is written is what the hash says.
    fn write_copies(&self, writing: &[Writing], interrupt: &dyn Interrupt) -> Result<()> {
        let page_bytes = self.store.page_size().bytes();
        let len = COPIED_PAGES.min(writing.len()) * page_bytes;
        if len == 0 {
            return Ok(());
        }
        // Aligned, as a direct store wants it.
        let copies = Region::anonymous(len, system_page_bytes(), Access::Write)
            .map_err(|errno| Error::system("flush", errno))?;
        for writing in writing.chunks(COPIED_PAGES) {
            let memory = copies.span(0, len);
            let mut hashes = Vec::with_capacity(writing.len());
            for (index, page) in writing.iter().enumerate() {
                let copy = memory.part(index * page_bytes, page_bytes);
                copy.copy_span(self.content_of(page.window_page));
                hashes.push(content_hash(copy));
            }
            let outgoing: Vec<Outgoing<'_>> = writing
                .iter()
                .enumerate()
                .map(|(index, page)| page.outgoing(memory.part(index * page_bytes, page_bytes)))
                .collect();
            self.write_out(&outgoing, interrupt)?;
            let mut state = self.state.lock();
            for (page, hash) in writing.iter().zip(hashes) {
                state.note_hash(page.window_page, hash);
            }
        }
        Ok(())
    }

    /// Writes pages, and counts those of a writing that succeeded.
    pub(super) fn write_out(
        &self,
        outgoing: &[Outgoing<'_>],
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        self.store.write_from(outgoing, interrupt)?;
        let bytes = self.store.page_size().bytes_of(outgoing.len() as u64);
        Counters::add(&self.counters.bytes_written, bytes);
        Ok(())
    }

    /// Ends the writing of pages: they are clean, or dirty as before.
    pub(super) fn end_writing(&self, writing: &[Writing], saved: bool) {
        let mut state = self.state.lock();
        for page in writing {
            let entry = state.get(page.window_page);
            if entry.writing() {
                state.mark(page.window_page, entry.finish_writeback(saved));
            }
        }
        drop(state);
        self.state.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::calibrate::Calibration;
    use crate::engine::eager;
    use crate::store::Store;
    use crate::table::{Origin, Table};
    use crate::units::{FilePage, Prot};

    /// That flush syncs before the write is done.
    #[test]
    fn a_flush_of_other_pages_during_a_write_leaves_its_sync_to_the_next() {
        let store = Arc::new(Store::memory(4 * 4096, Some(4096)).expect("a memfd"));
        let table = Table::new(4, Origin::Linear(FilePage(0)), Prot::Write);
        let table = table.and_then(Table::with_appearances).unwrap();
        let cached = eager::open(store, table, false, true, &Calibration::default()).unwrap();
        let others = Pages::Range(0..1);
        let flush = || cached.flush_pages(&others, &Uninterruptible);
        cached.shared.unsynced(flush).expect("nothing to write");
        assert!(cached.shared.state.lock().unsynced);
    }
}
