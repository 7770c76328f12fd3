//! Changed pages on their way to the store.
//!
//! A page that was stored to is *dirty*. To be written it becomes *writing* and is
//! protected anew: what is stored to it from then on makes it dirty again. When the
//! store has its content it is clean, and when that failed it is dirty as before.
//!
//! Pages that a call is about to change are *held*: who stores to one waits until it has
//! changed, and so does who touches one that is absent. So no store falls between the
//! writing and the replacing, and nothing is loaded that the call loads itself. Nobody
//! is asked whether to stop while pages are held: the thread that waits for one may have
//! Python's lock, or be this one in a signal handler.

use std::sync::Mutex;
use std::time::Duration;

use rustix::io::Errno;
use xxhash_rust::xxh3::xxh3_128;

use super::frames::{Frames, Tracking};
use super::isolated::{free_kept, IsolatedFrames};
use super::state::Writing;
use super::{Cached, Shared, State, STEP_PAGES};
use crate::engine::lock;
use crate::error::{Error, Interrupt, Result, Uninterruptible};
use crate::plan;
use crate::stats::Counters;
use crate::store::Outgoing;
use crate::sys::lock::Guard;
use crate::sys::mm::{system_page_bytes, Access, Region};
use crate::table::Entry;
use crate::units::{FilePage, Pages, Prot, Run, WindowPage};

/// How long a wait for somebody else's writing may keep the caller's interrupt waiting.
const WAIT: Duration = Duration::from_millis(25);
/// Pages that are copied before they are written, where they have to be.
const COPIED_PAGES: usize = 256;

/// Pages that are about to change: who stores to them waits until this is dropped, and
/// who touches one that is absent. The isolated frames kept for them are freed then.
pub(super) struct Held<'s, F: Frames> {
    shared: &'s Shared<F>,
    isolated: &'s Mutex<Option<IsolatedFrames>>,
    pages: Vec<WindowPage>,
}

impl<F: Frames> Drop for Held<'_, F> {
    fn drop(&mut self) {
        free_kept(&self.shared.frames, &mut lock(self.isolated));
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
    /// Holds pages, if anybody may store to the window. Waits for others who hold them.
    pub(super) fn hold(
        &self,
        pages: impl Iterator<Item = WindowPage>,
        interrupt: &dyn Interrupt,
    ) -> Result<Held<'_, F>> {
        let (shared, isolated) = (&*self.shared, &self.isolated);
        if shared.frames.tracking().is_none() {
            return Ok(Held { shared, isolated, pages: Vec::new() });
        }
        let mut pages: Vec<WindowPage> = pages.collect();
        pages.sort_unstable();
        pages.dedup();
        let mut state = shared.settled_state(&pages, interrupt)?;
        for &page in &pages {
            // Also what the fault thread is reading for it is out of date by that.
            let entry = state.get(page);
            state.set(page, entry.hold());
        }
        Ok(Held { shared, isolated, pages })
    }

    /// The same, after which the store has what was stored to them. Where the kernel
    /// alone notes stores they are absent by then; `keep`: their frames stay isolated.
    /// `interrupt` is asked before anything is held, and not while it is.
    pub(super) fn save_and_hold(
        &self,
        operation: &'static str,
        pages: impl Iterator<Item = WindowPage>,
        keep: bool,
        interrupt: &dyn Interrupt,
    ) -> Result<Held<'_, F>> {
        let pages: Vec<WindowPage> = pages.collect();
        if matches!(self.shared.frames.tracking(), Some(Tracking::Kernel | Tracking::Faults)) {
            // Who holds a page while it is written would wait for a fault on it that has the
            // file locked. What is stored to it after this is written below, if there is any.
            let mut sorted = pages.clone();
            sorted.sort_unstable();
            sorted.dedup();
            self.shared.clean(operation, &sorted, interrupt)?;
        }
        let held = self.hold(pages.into_iter(), interrupt)?;
        // Locked by who has the turn alone.
        let mut isolated = lock(&self.isolated);
        self.shared.save(operation, &mut isolated, &held.pages, keep)?;
        Ok(held)
    }

    /// Fails, before any change, if a file page that may be written would be shown twice
    /// once `shown` (window page, file page, new protection) is done. Window pages are
    /// named once; `changes` says which are among them.
    pub(super) fn check_appearances(
        &self,
        operation: &'static str,
        shown: impl Iterator<Item = (WindowPage, FilePage, Prot)>,
        changes: impl Fn(WindowPage) -> bool,
    ) -> Result<()> {
        let state = self.shared.state.lock();
        let mut first = std::collections::HashMap::new();
        for (window_page, file_page, prot) in shown {
            let alias = |other: WindowPage| Error::Alias {
                operation,
                file_page: file_page.0,
                window_page: other.0.min(window_page.0),
                other_page: other.0.max(window_page.0),
            };
            let writable = prot == Prot::Write;
            if let Some((other, other_writable)) = first.insert(file_page, (window_page, writable))
            {
                if writable || other_writable {
                    return Err(alias(other));
                }
            }
            let elsewhere = state.table.appearances(file_page);
            for other in elsewhere.filter(|&other| other != window_page && !changes(other)) {
                if writable || state.get(other).prot() == Prot::Write {
                    return Err(alias(other));
                }
            }
        }
        Ok(())
    }

    /// Writes what was stored to `pages`, and makes it durable.
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
        for piece in self.shared.used_pieces(&pages) {
            let piece: Vec<WindowPage> = piece.iter().collect();
            let outcome = interrupt
                .check()
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

impl<F: Frames> Shared<F> {
    /// Pieces of at most [`STEP_PAGES`] that have all of `pages` which may have been stored
    /// to. A window that is large and little used is asked for little.
    pub(super) fn used_pieces(&self, pages: &Pages<WindowPage>) -> Vec<Pages<WindowPage>> {
        /// Pages that are looked through with the state locked.
        const LOCKED_PAGES: u64 = 1 << 24;
        match pages {
            Pages::List(list) => {
                list.chunks(STEP_PAGES).map(|piece| Pages::List(piece.to_vec())).collect()
            }
            Pages::Range(range) => {
                let mut used = Vec::new();
                let mut start = range.start;
                while start < range.end {
                    let end = range.end.min(start + LOCKED_PAGES);
                    let state = self.state.lock();
                    used.extend(state.table.used_ranges(start..end, STEP_PAGES as u64));
                    start = end;
                }
                used.into_iter().map(Pages::Range).collect()
            }
        }
    }

    /// Writes what was stored to `pages`, which are held and sorted.
    pub(super) fn save(
        &self,
        operation: &'static str,
        isolated: &mut Option<IsolatedFrames>,
        pages: &[WindowPage],
        keep: bool,
    ) -> Result<()> {
        match self.frames.tracking() {
            None => Ok(()),
            Some(Tracking::Kernel) => self.save_isolated(operation, isolated, pages, keep),
            Some(Tracking::Faults | Tracking::Content) => self.save_in_place(operation, pages),
        }
    }

    /// Writes pages from where they lie: who wants to store to them waits.
    fn save_in_place(&self, operation: &'static str, pages: &[WindowPage]) -> Result<()> {
        for pages in pages.chunks(STEP_PAGES) {
            let writing = self.mark_writing(operation, self.state.lock(), pages)?;
            self.store.note_passing();
            let written = self.write_pages(operation, &writing, &Uninterruptible);
            self.store.note_passing();
            self.state.lock().unsynced |= !writing.is_empty();
            self.end_writing(&writing, written.is_ok());
            written?;
        }
        Ok(())
    }

    /// Takes pages out of the window, and writes them from where they are then.
    fn save_isolated(
        &self,
        operation: &'static str,
        isolated: &mut Option<IsolatedFrames>,
        pages: &[WindowPage],
        keep: bool,
    ) -> Result<()> {
        let present: Vec<WindowPage> = {
            let state = self.state.lock();
            let of_file = |entry: Entry| entry.present() && entry.shown().file_page().is_some();
            pages.iter().copied().filter(|&page| of_file(state.get(page))).collect()
        };
        let present = self.without_lost(present);
        let present = present.map_err(|errno| Error::system(operation, errno))?;
        self.in_batches(operation, isolated, &present, |isolated, some| {
            self.take_out(operation, isolated, some, keep)
        })
    }

    /// The pages that the kernel still has; the others are absent from now on, or whoever
    /// touches them here would wait for himself.
    pub(super) fn without_lost(
        &self,
        mut pages: Vec<WindowPage>,
    ) -> Result<Vec<WindowPage>, Errno> {
        let mut lost = Vec::new();
        for run in plan::runs(pages.iter().copied()) {
            let (offset, len) = self.bytes(run);
            if self.frames.holds(offset, len)? {
                continue;
            }
            for page in run.pages() {
                let (offset, len) = self.bytes(Run { first: page, count: 1 });
                if !self.frames.holds(offset, len)? {
                    lost.push(page);
                }
            }
        }
        if lost.is_empty() {
            return Ok(pages);
        }
        let mut state = self.state.lock();
        for &page in &lost {
            let entry = state.get(page).finish_drop().hold();
            state.mark(page, entry);
        }
        pages.retain(|page| !lost.contains(page));
        Ok(pages)
    }

    /// The state, when nobody else writes any of `pages` or takes it out.
    fn settled_state(
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

    /// What has to be known to write a page; None for one that shows no file page.
    pub(super) fn writing(&self, state: &State, window_page: WindowPage) -> Option<Writing> {
        let file_page = state.get(window_page).shown().file_page()?;
        let file_bytes = state.file_bytes(file_page, self.store.page_size());
        Some(Writing { window_page, file_page, file_bytes })
    }

    /// Has the table know what was stored to these pages. `protect`: stores from now
    /// on are noticed anew.
    pub(super) fn note_stores(
        &self,
        state: &mut State,
        pages: &[WindowPage],
        protect: bool,
    ) -> Result<(), Errno> {
        let Some(Tracking::Content) = self.frames.tracking() else {
            return self.note_kernel_stores(state, pages, protect);
        };
        let mut content = vec![0; self.store.page_size().bytes()];
        for &page in pages {
            let entry = state.get(page);
            if entry.present() && !entry.dirty() && entry.shown().file_page().is_some() {
                self.content_of(page).copy_to(&mut content);
                if xxh3_128(&content) != state.hashes[page.0 as usize] {
                    state.mark(page, entry.note_write());
                }
            }
        }
        Ok(())
    }

    /// Has the table know what was stored to the window, where the kernel alone notes it. A
    /// page whose stores it does not tell counts as stored to.
    pub fn note_all_stores(&self, state: &mut State) {
        let present = state.table.present_pages();
        if self.note_kernel_stores(state, &present, false).is_err() {
            for page in present {
                let entry = state.get(page);
                if entry.shown().file_page().is_some() {
                    state.mark(page, entry.note_write());
                }
            }
        }
    }

    fn note_kernel_stores(
        &self,
        state: &mut State,
        pages: &[WindowPage],
        protect: bool,
    ) -> Result<(), Errno> {
        if self.frames.tracking() != Some(Tracking::Kernel) {
            return Ok(());
        }
        let mut stored = Vec::new();
        for run in plan::runs(pages.iter().copied()) {
            let (offset, len) = self.bytes(run);
            stored.clear();
            // What was told before it failed is protected anew, and told once only.
            let told = self.frames.stores(offset, len, protect, &mut stored);
            for &(at, len) in &stored {
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

    /// Marks what was stored to `pages` (each named once) as being written. Waits for
    /// others who write them.
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
        self.note_stores(&mut state, pages, true).map_err(fail)?;
        let mut writing = Vec::new();
        for &window_page in pages {
            if state.get(window_page).dirty() {
                writing.extend(self.writing(&state, window_page));
            }
        }
        let ranges = self.ranges(writing.iter().map(|page| page.window_page));
        self.frames.protect_from_stores(&ranges).map_err(fail)?;
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
        let mut content = vec![0; page_bytes];
        for writing in writing.chunks(COPIED_PAGES) {
            let memory = copies.span(0, len);
            let mut hashes = Vec::with_capacity(writing.len());
            for (index, page) in writing.iter().enumerate() {
                self.content_of(page.window_page).copy_to(&mut content);
                hashes.push(xxh3_128(&content));
                memory.part(index * page_bytes, page_bytes).copy_from(&content);
            }
            let outgoing: Vec<Outgoing<'_>> = writing
                .iter()
                .enumerate()
                .map(|(index, page)| page.outgoing(memory.part(index * page_bytes, page_bytes)))
                .collect();
            self.write_out(&outgoing, interrupt)?;
            let mut state = self.state.lock();
            for (page, hash) in writing.iter().zip(hashes) {
                state.hashes[page.window_page.0 as usize] = hash;
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

    /// Lets those store to pages again who wait for it.
    pub(super) fn let_go(&self, pages: &[WindowPage]) {
        if pages.is_empty() {
            return;
        }
        let mut state = self.state.lock();
        for &page in pages {
            let entry = state.get(page);
            if entry.held() {
                state.mark(page, entry.released());
            }
        }
        drop(state);
        self.state.notify_all();
        self.wake_all(pages);
    }

    /// Has those look again who wait for any of `pages`.
    fn wake_all(&self, pages: &[WindowPage]) {
        /// With more ranges than this one wake for the whole window costs less, even if
        /// it lets others look who have to wait on.
        const RANGES: usize = 16;
        let ranges = self.ranges(pages.iter().copied());
        if ranges.len() > RANGES {
            self.frames.wake(&[(0, self.frames.region().len())]);
        } else {
            self.frames.wake(&ranges);
        }
    }

    pub(super) fn ranges(
        &self,
        pages: impl IntoIterator<Item = WindowPage>,
    ) -> Vec<(usize, usize)> {
        plan::runs(pages).into_iter().map(|run| self.bytes(run)).collect()
    }
}
