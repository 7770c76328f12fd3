//! Taking pages out of a window whose stores the kernel only notes.
//!
//! Nothing there keeps a thread from storing to a page between the question what was
//! stored and the dropping of the page. So pages are *moved* out, to memory that
//! nobody else knows: what they hold then is what they held last. Dirty ones are written
//! from there. A page that was clean when the kernel was asked can have been stored to
//! before it was moved; that shows, as it differs from a copy made before the question.
//!
//! A remap keeps the frames that it has taken out, and fills and moves them in again for
//! its new pages: a frame that is freed and had anew costs three times as much. Stores
//! between the moving in and the protecting go unnoticed, so what is in the window then is
//! compared with what was moved in.

use rustix::io::Errno;

use super::frames::{Filled, Frames, Userfault};
use super::state::Writing;
use super::{offset_of, Shared, State, ISOLATED_BYTES};
use crate::error::{Error, Result, Uninterruptible};
use crate::plan;
use crate::store::Outgoing;
use crate::sys::mm::{system_page_bytes, Access, Region};
use crate::sys::span::Span;
use crate::sys::stderr_line::stderr_line;
use crate::sys::uffd::Partial;
use crate::sys::zeros::Zeros;
use crate::units::{PageSize, Run, WindowPage};

/// Bytes of frames that a call keeps at most to use them again.
const KEPT_BYTES: usize = 256 << 20;

/// Memory that pages are moved out to, and copies of them. The first `kept` pages of it
/// have frames, which a call uses again; the rest is empty between two uses, and all of it
/// between two calls.
#[derive(Debug)]
struct IsolatedFrames {
    region: Region,
    copies: Zeros<u8>,
    page: PageSize,
    locked: bool,
    kept: usize,
    /// It could not be emptied, and is not to be used again.
    fouled: bool,
}

/// The memory that one thread at a time moves pages out to: mapped when it is first needed,
/// and again after it could not be emptied.
#[derive(Debug, Default)]
pub struct Isolation(Option<IsolatedFrames>);

impl Isolation {
    /// The same with its memory, so that a fault need not have it mapped.
    ///
    /// # Errors
    /// ENOMEM; the kernel's.
    pub fn prepared(frames: &dyn Userfault, page: PageSize) -> Result<Self, Errno> {
        let mut isolation = Self::default();
        isolation.ready(frames, page)?;
        Ok(isolation)
    }

    fn ready(
        &mut self,
        frames: &dyn Userfault,
        page: PageSize,
    ) -> Result<&mut IsolatedFrames, Errno> {
        if self.0.as_ref().is_none_or(|frames| frames.fouled) {
            self.0 = Some(IsolatedFrames::new(frames, page)?);
        }
        Ok(self.0.as_mut().expect("made above"))
    }

    fn made(&mut self) -> Option<&mut IsolatedFrames> {
        self.0.as_mut().filter(|frames| !frames.fouled)
    }

    /// Frees the frames that a call has kept.
    pub(super) fn free_kept(&mut self) {
        if let Some(frames) = self.made().filter(|frames| frames.kept > 0) {
            frames.empty(false);
        }
    }
}

/// A page that is taken out, its slot among the isolated frames, and whether it has to be written.
#[derive(Clone, Copy, Debug)]
struct Taken {
    page: Writing,
    slot: usize,
    dirty: bool,
}

impl IsolatedFrames {
    /// Memory for the pages of `frames`.
    ///
    /// # Errors
    /// ENOMEM; the kernel's.
    fn new(frames: &dyn Userfault, page: PageSize) -> Result<Self, Errno> {
        let bytes = ISOLATED_BYTES.max(page.bytes());
        let kept = if frames.reuses() { KEPT_BYTES.min(frames.region().len()) } else { 0 };
        let kept = kept.next_multiple_of(page.bytes());
        let total = bytes + kept;
        let mut region = Region::anonymous(total, system_page_bytes(), Access::Write)?;
        frames.adopt_isolated(&mut region)?;
        let (copies, locked) = (Zeros::new(bytes)?, frames.locked());
        Ok(Self { region, copies, page, locked, kept: 0, fouled: false })
    }

    /// Pages that can be taken out together.
    fn page_count(&self) -> usize {
        self.copies.len() / self.page.bytes()
    }

    fn pages(&self, first: usize, count: usize) -> Span<'_> {
        self.region.span(first * self.page.bytes(), count * self.page.bytes())
    }

    /// What was taken out last, and is not kept yet.
    fn content(&self, slot: usize) -> Span<'_> {
        self.pages(self.kept + slot, 1)
    }

    /// Keeps the frames of `count` pages that were taken out last; says whether it has room.
    fn keep(&mut self, count: usize) -> bool {
        let fits = self.kept + count + self.page_count() <= self.region.len() / self.page.bytes();
        self.kept += if fits { count } else { 0 };
        fits
    }

    /// Keeps `count` frames that `move_out` moves to where it is told.
    fn take(
        &mut self,
        count: usize,
        move_out: impl FnOnce(Span<'_>) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        if self.kept + count > self.region.len() / self.page.bytes() {
            return Err(Errno::NOMEM);
        }
        move_out(self.pages(self.kept, count))?;
        self.kept += count;
        Ok(())
    }

    /// The frames of `count` pages that were kept last, if there are as many.
    fn last_kept(&self, count: usize) -> Option<Span<'_>> {
        Some(self.pages(self.kept.checked_sub(count)?, count))
    }

    /// Frees all frames but those that are kept, or those as well.
    fn empty(&mut self, kept: bool) {
        self.kept = if kept { self.kept } else { 0 };
        let start = self.kept * self.page.bytes();
        let emptied = self.region.drop_pages(start, self.region.len() - start, self.locked);
        self.fouled |= emptied.is_err();
    }

    fn copy(&mut self, slot: usize) -> &mut [u8] {
        let page_bytes = self.page.bytes();
        &mut self.copies[slot * page_bytes..][..page_bytes]
    }
}

impl<F: Frames> Shared<F> {
    /// The memory's userfaultfd, in a window whose pages are isolated.
    pub(super) fn userfault(&self) -> &dyn Userfault {
        self.frames.userfault().expect("the kernel notes writes under a userfaultfd alone")
    }

    /// Takes pages out of the window and writes the dirty ones back. `pages` are sorted,
    /// present, show file pages and are held. Afterwards they are absent and held; if writing
    /// fails, the dirty ones of a batch are back. `keep`: their frames are kept to be used again.
    ///
    /// # Errors
    /// I/O; the kernel's.
    pub(super) fn take_out(
        &self,
        operation: &'static str,
        isolation: &mut Isolation,
        pages: &[WindowPage],
        keep: bool,
    ) -> Result<()> {
        self.in_batches(operation, isolation, pages, |isolated, some| {
            self.take_out_batch(operation, isolated, some, keep)
        })
    }

    fn take_out_batch(
        &self,
        operation: &'static str,
        isolated: &mut IsolatedFrames,
        pages: &[WindowPage],
        keep: bool,
    ) -> Result<()> {
        for (slot, &page) in pages.iter().enumerate() {
            self.content_of(page).copy_to(isolated.copy(slot));
        }
        let moved = self.isolate(isolated, pages);
        let outcome = moved.map_err(|errno| Error::system(operation, errno)).and_then(|taken| {
            let written = self.write_taken(isolated, &taken);
            if written.is_err() {
                self.bring_back(isolated, taken.iter().filter(|taken| taken.dirty));
            }
            written.map_err(|error| error.with_operation(operation))
        });
        let kept = keep && outcome.is_ok() && isolated.keep(pages.len());
        if !kept {
            isolated.empty(true);
        }
        outcome
    }

    /// Takes clean pages out of the window. `pages` are sorted, and held.
    /// Afterwards they are absent and held, but for those that were changed, which are back.
    ///
    /// # Errors
    /// The kernel's: all are back.
    pub(super) fn take_out_clean(
        &self,
        operation: &'static str,
        isolation: &mut Isolation,
        pages: &[WindowPage],
    ) -> Result<()> {
        let lost = self.without_lost(pages.to_vec());
        let pages = lost.map_err(|errno| Error::system(operation, errno))?;
        self.in_batches(operation, isolation, &pages, |isolated, some| {
            for (slot, &page) in some.iter().enumerate() {
                self.content_of(page).copy_to(isolated.copy(slot));
            }
            let taken = self.isolate(isolated, some);
            if let Ok(taken) = &taken {
                self.bring_back(isolated, taken.iter().filter(|taken| taken.dirty));
            }
            isolated.empty(false);
            taken.map(|_| ()).map_err(|errno| Error::system(operation, errno))
        })
    }

    /// Hands pages to `take`, as many at a time as can be isolated.
    fn in_batches(
        &self,
        operation: &'static str,
        isolation: &mut Isolation,
        pages: &[WindowPage],
        mut take: impl FnMut(&mut IsolatedFrames, &[WindowPage]) -> Result<()>,
    ) -> Result<()> {
        let mut rest = pages;
        while !rest.is_empty() {
            let isolated = isolation.ready(self.userfault(), self.store.page_size());
            let isolated = isolated.map_err(|errno| Error::system(operation, errno))?;
            let (some, behind) = rest.split_at(rest.len().min(isolated.page_count()));
            rest = behind;
            take(isolated, some)?;
        }
        Ok(())
    }

    fn isolate(
        &self,
        isolated: &mut IsolatedFrames,
        pages: &[WindowPage],
    ) -> Result<Vec<Taken>, Errno> {
        let page_size = self.store.page_size();
        let mut state = self.state.lock();
        self.note_writes(&mut state, pages, false)?;
        let mut slot = 0;
        for run in plan::runs(pages.iter().copied()) {
            let (offset, len) = self.bytes(run);
            let to = isolated.pages(isolated.kept + slot, run.count as usize);
            debug_assert_eq!(to.len(), len);
            if let Err(errno) = self.userfault().move_out(offset, to) {
                // What came out before goes back where it was, and is taken for dirty.
                let all = self.taken(&state, pages, |_, _| true);
                drop(state);
                self.bring_back(isolated, all.iter());
                return Err(errno);
            }
            slot += run.count as usize;
        }
        let taken = self.taken(&state, pages, |slot, dirty| {
            let copy = &isolated.copies[slot * page_size.bytes()..][..page_size.bytes()];
            dirty || !isolated.content(slot).holds(copy)
        });
        for &page in pages {
            let entry = state.get(page).finish_drop();
            state.mark(page, entry);
        }
        Ok(taken)
    }

    /// Pages with their places; `is_dirty` is told the place and what the table says.
    fn taken(
        &self,
        state: &State,
        pages: &[WindowPage],
        mut is_dirty: impl FnMut(usize, bool) -> bool,
    ) -> Vec<Taken> {
        let place = |(slot, &window_page): (usize, &WindowPage)| {
            let page = self.writing(state, window_page)?;
            let dirty = is_dirty(slot, state.get(window_page).dirty());
            Some(Taken { page, slot, dirty })
        };
        pages.iter().enumerate().filter_map(place).collect()
    }

    fn write_taken(&self, isolated: &IsolatedFrames, taken: &[Taken]) -> Result<()> {
        let mut dirty: Vec<&Taken> = taken.iter().filter(|taken| taken.dirty).collect();
        if dirty.is_empty() {
            return Ok(());
        }
        dirty.sort_unstable_by_key(|taken| taken.page.file_page);
        let outgoing = |taken: &&Taken| taken.page.outgoing(isolated.content(taken.slot));
        let outgoing: Vec<Outgoing<'_>> = dirty.iter().map(outgoing).collect();
        self.state.lock().unsynced = true;
        self.store.note_passing();
        let written = self.write_out(&outgoing, &Uninterruptible);
        self.store.note_passing();
        written
    }

    /// Puts pages back into the window, dirty; they are held still.
    fn bring_back<'t>(&self, isolated: &IsolatedFrames, taken: impl Iterator<Item = &'t Taken>) {
        for taken in taken {
            let window_page = taken.page.window_page;
            let offset = offset_of(self.store.page_size(), window_page);
            let mut state = self.state.lock();
            match self.userfault().move_back(offset, isolated.content(taken.slot)) {
                Ok(()) => {
                    let entry = state.get(window_page).finish_drop().finish_load().note_write();
                    state.mark(window_page, entry);
                }
                Err(errno) => {
                    drop(state);
                    stderr_line(format_args!(
                        "window page {}: what was stored to it is lost, as it could neither be \
                         written nor put back ({errno})",
                        window_page.0
                    ));
                }
            }
        }
    }

    /// Takes placed pages, which are held, out of the window and puts their content with the
    /// table: what they hold then is what they held last. If one cannot be taken, all are back.
    pub(super) fn keep_denied(
        &self,
        isolation: &mut Isolation,
        pages: &[WindowPage],
    ) -> Result<(), Errno> {
        for (done, &page) in pages.iter().enumerate() {
            let kept = self.keep_one_denied(isolation, page);
            if kept.is_err() {
                self.put_back_denied(isolation, &pages[..done]);
                return kept;
            }
        }
        Ok(())
    }

    fn keep_one_denied(&self, isolation: &mut Isolation, page: WindowPage) -> Result<(), Errno> {
        let isolated = isolation.ready(self.userfault(), self.store.page_size())?;
        let (offset, _) = self.bytes(Run { first: page, count: 1 });
        let mut state = self.state.lock();
        if !state.get(page).present() {
            // Its content is with the table already, or was dropped by somebody's `madvise`.
            return Ok(());
        }
        let content = isolated.content(0);
        if let Err(errno) = self.userfault().move_out(offset, content) {
            // A part of a page that is larger than the system's may have come out.
            return self.userfault().move_back(offset, content).and(Err(errno));
        }
        state.denied_content.insert(page, content.to_vec());
        let entry = state.get(page).finish_drop();
        state.mark(page, entry);
        drop(state);
        isolated.empty(true);
        Ok(())
    }

    /// Shows placed pages again whose content was put with the table.
    fn put_back_denied(&self, isolation: &mut Isolation, pages: &[WindowPage]) {
        for &page in pages {
            let Ok(isolated) = isolation.ready(self.userfault(), self.store.page_size()) else {
                // The content stays with the table, and comes back when access is taken and given.
                return;
            };
            let (offset, _) = self.bytes(Run { first: page, count: 1 });
            let mut state = self.state.lock();
            let Some(bytes) = state.denied_content.get(&page) else { continue };
            let content = isolated.content(0);
            content.copy_from(bytes);
            if self.userfault().move_back(offset, content).is_ok() {
                state.denied_content.remove(&page);
                let entry = state.get(page).finish_load();
                state.mark(page, entry);
            }
            drop(state);
            isolated.empty(true);
        }
    }

    /// Fills a run with `from` in frames that were kept, or, if it is all present
    /// (`replaces`) and nobody can store to it, in its own. Stores to it in the meantime go
    /// unnoticed: the caller marks it dirty, and [compares](Self::compare_moved) before it
    /// lets go. None where it cannot be done so, and the run is to be filled otherwise.
    pub(super) fn fill_with_kept(
        &self,
        isolation: &mut Isolation,
        run: Run<WindowPage>,
        from: Span<'_>,
        replaces: bool,
    ) -> Option<Result<Filled, Partial>> {
        let userfault = self.frames.userfault()?;
        let isolated = if replaces {
            isolation.ready(userfault, self.store.page_size()).ok()?
        } else {
            isolation.made()?
        };
        let (count, (offset, _)) = (run.count as usize, self.bytes(run));
        let mut filled = None;
        let move_out = |to: Span<'_>| userfault.move_out(offset, to);
        let taken = !replaces || isolated.take(count, move_out).is_ok();
        if let (true, Some(frames)) = (taken, isolated.last_kept(count)) {
            frames.copy_span(from);
            filled = Some(userfault.move_frames(offset, frames));
            isolated.kept -= count;
        }
        let clean = matches!(filled, Some(Ok(Filled::Moved))) || (filled.is_none() && !replaces);
        if !clean {
            isolated.empty(true);
        }
        filled
    }

    /// Which pages of a run that was filled with `from` hold something else by now.
    pub(super) fn compare_moved(&self, run: Run<WindowPage>, from: Span<'_>) -> Vec<bool> {
        let page_bytes = self.store.page_size().bytes();
        let moved = (0..).step_by(page_bytes).map(|at| from.part(at, page_bytes));
        run.pages().zip(moved).map(|(page, moved)| !self.content_of(page).equals(moved)).collect()
    }
}
