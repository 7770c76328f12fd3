//! Isolating pages: moving them out of a window whose writes only the kernel notes.
//!
//! In such a window, nothing keeps a thread from writing to a page between the question whether
//! it is dirty and its eviction. So pages are *moved* out, to memory that no other thread knows,
//! which fixes their content. Dirty pages are written from there. A page that the kernel called
//! clean may have been written to before it was moved. To detect that, it is compared with a copy
//! that was made before the question.
//!
//! A remap reuses the frames that it has moved out for its new pages, because freeing and
//! allocating a frame costs three times as much. Writes between moving them in and protecting
//! them go unnoticed, so the pages are then compared with what was moved in.

use rustix::io::Errno;

use super::frame_pool::{FrameStack, IsolatedFrames};
use super::frames::{Filled, Frames, Userfault};
use super::state::Writing;
use super::{offset_of, SharedWindow, State};
use crate::error::{Error, Result, Uninterruptible};
use crate::plan;
use crate::room::room_for;
use crate::store::Outgoing;
use crate::sys::span::Span;
use crate::sys::stderr_line::stderr_line;
use crate::sys::uffd::Partial;
use crate::units::{Run, WindowPage};

/// A page that is taken out, its slot among the isolated frames, and whether it has to be written.
#[derive(Clone, Copy, Debug)]
struct Taken {
    page: Writing,
    slot: usize,
    dirty: bool,
}

impl<F: Frames> SharedWindow<F> {
    /// The memory's userfaultfd, in a window whose pages are isolated.
    pub(super) fn userfault(&self) -> &dyn Userfault {
        self.frames.userfault().expect("the kernel notes writes under a userfaultfd alone")
    }

    /// Takes pages out of the window and writes the dirty ones back. `pages` are sorted,
    /// present, show file pages and are held. Afterwards they are absent and held; if writing
    /// fails, the dirty ones of a batch are back. `keep`: their frames are kept to be used again.
    pub(super) fn take_out(
        &self,
        operation: &'static str,
        isolated: &mut IsolatedFrames,
        pages: &[WindowPage],
        keep: bool,
    ) -> Result<()> {
        self.in_batches(operation, isolated, pages, |stack, some| {
            self.take_out_batch(operation, stack, some, keep)
        })
    }

    fn take_out_batch(
        &self,
        operation: &'static str,
        stack: &mut FrameStack,
        pages: &[WindowPage],
        keep: bool,
    ) -> Result<()> {
        for (slot, &page) in pages.iter().enumerate() {
            stack.copy(slot, self.content_of(page));
        }
        let moved = self.isolate(stack, pages);
        let outcome = moved.map_err(|errno| Error::system(operation, errno)).and_then(|taken| {
            let written = self.write_taken(stack, &taken);
            if written.is_err() {
                self.bring_back(stack, taken.iter().filter(|taken| taken.dirty));
            }
            written.map_err(|error| error.with_operation(operation))
        });
        let kept = keep && outcome.is_ok() && stack.keep(pages.len());
        if !kept {
            stack.empty_isolated();
        }
        outcome
    }

    /// Takes clean pages out of the window. `pages` are sorted, and held.
    /// Afterwards they are absent and held, but for those that were changed, which are back.
    /// If it fails, all are back.
    pub(super) fn take_out_clean(
        &self,
        operation: &'static str,
        isolated: &mut IsolatedFrames,
        pages: &[WindowPage],
    ) -> Result<()> {
        let lost = self.without_lost(pages.to_vec());
        let pages = lost.map_err(|errno| Error::system(operation, errno))?;
        self.in_batches(operation, isolated, &pages, |stack, some| {
            for (slot, &page) in some.iter().enumerate() {
                stack.copy(slot, self.content_of(page));
            }
            let taken = self.isolate(stack, some);
            if let Ok(taken) = &taken {
                self.bring_back(stack, taken.iter().filter(|taken| taken.dirty));
            }
            stack.empty();
            taken.map(|_| ()).map_err(|errno| Error::system(operation, errno))
        })
    }

    /// Hands pages to `take`, as many at a time as can be isolated.
    fn in_batches(
        &self,
        operation: &'static str,
        isolated: &mut IsolatedFrames,
        pages: &[WindowPage],
        mut take: impl FnMut(&mut FrameStack, &[WindowPage]) -> Result<()>,
    ) -> Result<()> {
        let mut rest = pages;
        while !rest.is_empty() {
            let stack = isolated.ready(self.userfault(), self.store.page_size());
            let stack = stack.map_err(|errno| Error::system(operation, errno))?;
            let (some, behind) = rest.split_at(rest.len().min(stack.page_count()));
            rest = behind;
            take(stack, some)?;
        }
        Ok(())
    }

    fn isolate(&self, stack: &mut FrameStack, pages: &[WindowPage]) -> Result<Vec<Taken>, Errno> {
        let mut state = self.state.lock();
        self.note_writes(&mut state, pages, false)?;
        let mut slot = 0;
        for run in plan::runs(pages.iter().copied()) {
            let (offset, len) = self.bytes(run);
            let to = stack.contents(slot, run.count as usize);
            debug_assert_eq!(to.len(), len);
            if let Err(errno) = self.userfault().move_out(offset, to) {
                // What came out before goes back where it was, and is taken for dirty.
                let all = self.taken(&state, pages, |_, _| true);
                drop(state);
                self.bring_back(stack, all.iter());
                return Err(errno);
            }
            slot += run.count as usize;
        }
        let taken = self.taken(&state, pages, |slot, dirty| dirty || stack.differs(slot));
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

    fn write_taken(&self, stack: &FrameStack, taken: &[Taken]) -> Result<()> {
        let mut dirty: Vec<&Taken> = taken.iter().filter(|taken| taken.dirty).collect();
        if dirty.is_empty() {
            return Ok(());
        }
        dirty.sort_unstable_by_key(|taken| taken.page.file_page);
        let outgoing = |taken: &&Taken| taken.page.outgoing(stack.content(taken.slot));
        let outgoing: Vec<Outgoing<'_>> = dirty.iter().map(outgoing).collect();
        self.unsynced(|| self.write_out(&outgoing, &Uninterruptible))
    }

    /// Puts pages back into the window, dirty; they are held still.
    fn bring_back<'t>(&self, stack: &FrameStack, taken: impl Iterator<Item = &'t Taken>) {
        for taken in taken {
            let window_page = taken.page.window_page;
            let offset = offset_of(self.store.page_size(), window_page);
            let mut state = self.state.lock();
            match self.userfault().move_back(offset, stack.content(taken.slot)) {
                Ok(()) => {
                    let entry = state.get(window_page).finish_drop().finish_load().note_write();
                    state.mark(window_page, entry);
                }
                Err(errno) => {
                    drop(state);
                    stderr_line(format_args!(
                        "window page {}: changes are lost, because the page could neither be \
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
        operation: &'static str,
        isolated: &mut IsolatedFrames,
        pages: &[WindowPage],
    ) -> Result<()> {
        self.state.lock().reserve_denied(operation, pages.len())?;
        for (done, &page) in pages.iter().enumerate() {
            let kept = self.keep_one_denied(operation, isolated, page);
            if kept.is_err() {
                self.put_back_denied(isolated, &pages[..done]);
                return kept;
            }
        }
        Ok(())
    }

    fn keep_one_denied(
        &self,
        operation: &'static str,
        isolated: &mut IsolatedFrames,
        page: WindowPage,
    ) -> Result<()> {
        let fail = |errno| Error::system(operation, errno);
        let stack = isolated.ready(self.userfault(), self.store.page_size()).map_err(fail)?;
        let content = stack.content(0);
        // Before the page is gone, when nothing may be refused any more.
        let mut bytes = room_for(operation, content.len())?;
        let (offset, _) = self.bytes(Run { first: page, count: 1 });
        let mut state = self.state.lock();
        if !state.get(page).present() {
            // Its content is with the table already, or was dropped by somebody's `madvise`.
            return Ok(());
        }
        if let Err(errno) = self.userfault().move_out(offset, content) {
            // A part of a page that is larger than the system's may have come out. What cannot go
            // back must not be taken for the next page's.
            let back = self.userfault().move_back(offset, content);
            stack.empty_isolated();
            return back.and(Err(errno)).map_err(fail);
        }
        bytes.resize(content.len(), 0);
        content.copy_to(&mut bytes);
        state.keep_denied(page, bytes);
        let entry = state.get(page).finish_drop();
        state.mark(page, entry);
        drop(state);
        stack.empty_isolated();
        Ok(())
    }

    /// Shows placed pages again whose content was put with the table.
    fn put_back_denied(&self, isolated: &mut IsolatedFrames, pages: &[WindowPage]) {
        for &page in pages {
            let Ok(stack) = isolated.ready(self.userfault(), self.store.page_size()) else {
                // The content stays with the table, and comes back when access is taken and given.
                return;
            };
            let (offset, _) = self.bytes(Run { first: page, count: 1 });
            let mut state = self.state.lock();
            let Some(bytes) = state.denied_content(page) else { continue };
            let content = stack.content(0);
            content.copy_from(bytes);
            if self.userfault().move_back(offset, content).is_ok() {
                state.forget_denied(page);
                let entry = state.get(page).finish_load();
                state.mark(page, entry);
            }
            drop(state);
            stack.empty_isolated();
        }
    }

    /// Fills a run with `from` in frames that were kept, or, if it is all present
    /// (`replaces`) and nobody can write to it, in its own. Writes to it in the meantime go
    /// unnoticed: the caller marks it dirty, and [compares](Self::compare_moved) before it
    /// lets go. None where it cannot be done so, and the run is to be filled otherwise.
    pub(super) fn fill_with_kept(
        &self,
        isolated: &mut IsolatedFrames,
        run: Run<WindowPage>,
        from: Span<'_>,
        replaces: bool,
    ) -> Option<Result<Filled, Partial>> {
        let userfault = self.frames.userfault()?;
        let stack = if replaces {
            isolated.ready(userfault, self.store.page_size()).ok()?
        } else {
            isolated.made()?
        };
        let (offset, len) = self.bytes(run);
        if replaces && stack.take(len, |to| userfault.move_out(offset, to)).is_err() {
            stack.empty_isolated();
            return None;
        }
        stack.last(len)?.copy_span(from);
        Some(stack.put(userfault, offset, len))
    }

    /// Which pages of a run that was filled with `from` hold something else by now.
    pub(super) fn compare_moved(&self, run: Run<WindowPage>, from: Span<'_>) -> Vec<bool> {
        let page_bytes = self.store.page_size().bytes();
        let moved = (0..).step_by(page_bytes).map(|at| from.part(at, page_bytes));
        run.pages().zip(moved).map(|(page, moved)| !self.content_of(page).equals(moved)).collect()
    }
}
