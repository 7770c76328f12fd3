//! Denying and allowing access to pages, and pages with content of their own.

use super::frame_pool::FramePool;
use super::frames::{Filled, Frames, Tracking};
use super::load::{Call, Step};
use super::{offset_of, Cached, State};
use crate::engine::{content_of, mappings, Fill};
use crate::error::{Error, Interrupt, Result};
use crate::plan;
use crate::room::{self, collected, copied, room_for};
use crate::table::{Entry, Residency, Shown};
use crate::units::{Pages, Prot, Run, WindowPage};

impl<F: Frames> Cached<F> {
    pub(super) fn deny_pages(
        &self,
        pool: &mut FramePool,
        pages: impl Iterator<Item = WindowPage>,
    ) -> Result<()> {
        // Calls change the table one at a time, so what is copied here, where a
        // fault could be served, is still so below.
        let entries: Vec<_> = {
            let state = self.shared.state.lock();
            let entry_of = |page| (page, state.get(page));
            pages.map(entry_of).filter(|(_, entry)| entry.prot() != Prot::None).collect()
        };
        let region = self.shared.frames.region();
        let content =
            |page| copied("protect", region.span(offset_of(self.page, page), self.page.bytes()));
        let placed = entries.iter().filter(|(_, entry)| entry.shown() == Shown::Placed);
        if self.shared.frames.tracking() == Some(Tracking::Kernel) {
            // Nothing keeps a thread from writing to a page but that it is gone.
            let pages = collected("protect", placed.clone().map(|(page, _)| *page))?;
            self.shared.keep_denied("protect", pool.isolated(), &pages)?;
        }
        // Who writes to a placed page from now on waits, where writes are faults.
        let ranges = self.ranges(placed.clone().map(|(page, _)| *page));
        let protected = self.shared.protect_from_writes(&ranges);
        protected.map_err(|errno| Error::system("protect", errno))?;
        let present = |state: &State, page| state.get(page).present();
        let placed: Vec<WindowPage> = {
            let state = self.shared.state.lock();
            placed.map(|(page, _)| *page).filter(|&page| present(&state, page)).collect()
        };
        let mut kept = room_for("protect", placed.len())?;
        for page in placed {
            kept.push((page, content(page)?));
        }
        let mut state = self.shared.state.lock();
        state.reserve_denied("protect", kept.len())?;
        for (page, content) in kept {
            state.keep_denied(page, content);
        }
        let changed: Vec<_> =
            entries.into_iter().map(|(page, _)| (page, state.get(page))).collect();
        for (page, old) in &changed {
            let left = if old.present() { old.begin_drop() } else { *old };
            state.set(*page, left);
        }
        let ranges = self.ranges(changed.iter().map(|(page, _)| *page));
        let denied = self.shared.frames.deny(&ranges);
        for (page, old) in changed {
            // What was kept stays kept, also where the kernel refused.
            if denied.is_ok() || old.shown() == Shown::Placed {
                state.set(page, old.deny());
            }
        }
        denied.map_err(|errno| mappings::failed("protect", errno, 2 * ranges.len() as u64))
    }

    /// Lets pages that may be touched be written to, or not any more.
    pub(super) fn change_access(
        &self,
        pages: impl Iterator<Item = WindowPage>,
        prot: Prot,
    ) -> Result<()> {
        let mut state = self.shared.state.lock();
        let differs =
            |&(_, entry): &(WindowPage, Entry)| entry.prot() != Prot::None && entry.prot() != prot;
        let changed: Vec<(WindowPage, Entry)> =
            pages.map(|page| (page, state.get(page))).filter(differs).collect();
        if prot == Prot::Read {
            let present = changed.iter().filter(|(_, entry)| entry.present());
            let ranges = self.ranges(present.map(|(page, _)| *page));
            let protected = self.shared.protect_from_writes(&ranges);
            protected.map_err(|errno| Error::system("protect", errno))?;
        }
        for (page, entry) in changed {
            // What was written before still has to be saved.
            state.mark(page, entry.with_prot(prot));
        }
        Ok(())
    }

    pub(super) fn give_access(
        &self,
        pool: &mut FramePool,
        pages: impl Iterator<Item = WindowPage>,
        prot: Prot,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let mut loads = Vec::new();
        let mut kept = Vec::new();
        {
            let mut state = self.shared.state.lock();
            let mut allowed = Vec::new();
            for (position, window_page) in pages.enumerate() {
                let old = state.get(window_page);
                if old.prot() != Prot::None {
                    continue;
                }
                let entry = old.allow(prot);
                if old.shown() == Shown::Placed {
                    kept.push((window_page, entry));
                } else if self.comes_back(old) {
                    loads.push(Step { position, window_page, entry, load: true });
                } else {
                    allowed.push((window_page, entry));
                }
            }
            let ranges = self.ranges(allowed.iter().map(|(page, _)| *page));
            let allow = self.shared.frames.allow(&ranges);
            allow.map_err(|errno| Error::system("protect", errno))?;
            for (page, entry) in allowed {
                state.set(page, entry);
            }
        }
        for (page, entry) in kept {
            self.show_kept(pool, page, entry)?;
        }
        let mut mask = vec![false; loads.last().map_or(0, |step| step.position + 1)];
        let call = Call { operation: "protect", fill: Fill::All, keep: None, interrupt };
        self.carry_out(&call, pool, &loads, &mut mask)
    }

    /// Whether giving access to a page brings its content at once: nobody else
    /// would, or the window is locked.
    fn comes_back(&self, old: Entry) -> bool {
        let locked = self.shared.frames.locked() && old.shown().file_page().is_some();
        locked || (old.residency() == Residency::Denied && self.shared.frames.userfault().is_none())
    }

    /// Puts the content of a placed page back into the window.
    fn show_kept(&self, pool: &mut FramePool, page: WindowPage, entry: Entry) -> Result<()> {
        let content = match self.shared.state.lock().denied_content(page) {
            Some(content) => collected("protect", content.iter().copied())?,
            None => return Ok(()),
        };
        self.put("protect", pool, Run { first: page, count: 1 }, |_| entry, |_| &content)
    }

    /// Puts bytes into the window by way of the staging memory. `run` is no
    /// longer than a chunk.
    fn put<'d>(
        &self,
        operation: &'static str,
        pool: &mut FramePool,
        run: Run<WindowPage>,
        entry_of: impl Fn(u64) -> Entry,
        content_of: impl Fn(u64) -> &'d [u8],
    ) -> Result<()> {
        let (ring, _) = pool.for_loading(&self.shared.frames, run.count as usize)?;
        let (_, used) = self.bytes(run);
        let from = ring.read_into(0, used).part(0, used);
        for index in 0..run.count {
            let slot = offset_of(self.page, WindowPage(index));
            from.part(slot, self.page.bytes()).copy_from(content_of(index));
        }
        let spare = ring.spare(0).map(|spare| spare.part(0, used));
        let mut state = self.shared.state.lock();
        let from = (from, self.shared.store.size_bytes());
        let filled = self.install(&mut state, run, entry_of, from, spare, None);
        drop(state);
        let moved = filled.as_ref().is_ok_and(|filled| *filled == Filled::Moved);
        ring.recycle(&self.shared.frames, 0, used, moved);
        filled.map(|_| ()).map_err(|(_, errno)| Error::system(operation, errno))
    }

    pub(super) fn place_run<'d>(
        &self,
        pool: &mut FramePool,
        run: Run<WindowPage>,
        content_of: impl Fn(usize) -> &'d [u8],
    ) -> Result<()> {
        let prots: Vec<Prot> = {
            let state = self.shared.state.lock();
            run.pages().map(|page| state.get(page).prot()).collect()
        };
        let pages = run.pages().zip(0..);
        let open = pages.clone().filter(|&(_, index)| prots[index] != Prot::None);
        for piece in plan::runs(open.map(|(page, _)| page)) {
            let first = (piece.first.0 - run.first.0) as usize;
            let entry_of = |index| Entry::new(Shown::Placed, prots[first + index as usize]);
            let content_of = |index| content_of(first + index as usize);
            let old = self.placed_content(piece)?;
            self.put("place", pool, piece, entry_of, content_of).inspect_err(|_| {
                // What was placed before is not lost to a call that fails.
                for (page, content) in &old {
                    let one = Run { first: *page, count: 1 };
                    let prot = prots[(page.0 - run.first.0) as usize];
                    let entry_of = |_| Entry::new(Shown::Placed, prot);
                    let _kept = self.put("place", pool, one, entry_of, |_| content);
                }
            })?;
        }
        let mut state = self.shared.state.lock();
        for (page, index) in pages.filter(|&(_, index)| prots[index] == Prot::None) {
            let content = collected("place", content_of(index).iter().copied())?;
            state.reserve_denied("place", 1)?;
            state.keep_denied(page, content);
            state.set(page, Entry::new(Shown::Placed, Prot::None));
        }
        Ok(())
    }

    /// Content of the pages of a run that are placed already.
    fn placed_content(&self, run: Run<WindowPage>) -> Result<Vec<(WindowPage, Vec<u8>)>> {
        let placed: Vec<WindowPage> = {
            let state = self.shared.state.lock();
            run.pages().filter(|page| state.get(*page).shown() == Shown::Placed).collect()
        };
        let region = self.shared.frames.region();
        let content = |page| region.span(offset_of(self.page, page), self.page.bytes());
        placed.into_iter().map(|page| Ok((page, copied("place", content(page))?))).collect()
    }

    /// Makes what pages show their own: brings what is absent, then cuts the tie
    /// to the file.
    pub(super) fn place_shown(
        &self,
        pool: &mut FramePool,
        pages: &Pages<WindowPage>,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        plan::check_shown(&self.shared.state.lock().table, pages)?;
        let keep = self.kept("place", pages)?;
        self.check_budget("place", pages)?;
        // What is loaded here is made the page's own below. Evicted in between it would be a
        // page that nobody can bring again.
        let _staying = self.stay("place", pages)?;
        let mut mask = room::mask("place", pages.len(), interrupt)?;
        for piece in plan::pieces(pages.len(), self.piece_pages()) {
            let placed = piece.clone().map(|position| pages.at(position));
            self.reserve_moves("place", pages, piece.clone())
                .map_err(|error| error.with_completed(piece.start))?;
            let held = self.save_and_hold("place", pool, placed, false, interrupt);
            let _held = held.map_err(|error| error.with_completed(piece.start))?;
            let interrupt = self.while_held(interrupt);
            if self.shared.frames.tracking() == Some(Tracking::Kernel) {
                self.place_saved(pool, pages, piece)?;
                continue;
            }
            let steps = self.populate_steps(pages, piece.clone(), &mut mask)?;
            let call = Call { operation: "place", fill: Fill::All, keep: keep.as_ref(), interrupt };
            self.carry_out(&call, pool, &steps, &mut mask)?;
            for position in piece {
                self.cut_tie(pages.at(position)).map_err(|e| e.with_completed(position))?;
            }
        }
        Ok(())
    }

    /// Makes pages their own that were taken out of the window, and that the store has.
    fn place_saved(
        &self,
        pool: &mut FramePool,
        pages: &Pages<WindowPage>,
        piece: std::ops::Range<usize>,
    ) -> Result<()> {
        for position in piece {
            let page = pages.at(position);
            let shown = self.shared.state.lock().get(page).shown();
            let Shown::File(file_page) = shown else { continue };
            let run = Run { first: page, count: 1 };
            content_of(&self.shared.store, "place", file_page)
                .and_then(|content| self.place_run(pool, run, |_| &content))
                .map_err(|error| error.with_operation("place").with_completed(position))?;
        }
        Ok(())
    }

    fn cut_tie(&self, page: WindowPage) -> Result<()> {
        let entry = self.shared.state.lock().get(page);
        let Shown::File(file_page) = entry.shown() else { return Ok(()) };
        let placed = Entry::new(Shown::Placed, entry.prot());
        if entry.prot() == Prot::None {
            let content = content_of(&self.shared.store, "place", file_page)?;
            let mut state = self.shared.state.lock();
            state.reserve_denied("place", 1)?;
            state.keep_denied(page, content);
            state.set(page, placed);
        } else {
            self.shared.state.lock().set(page, placed.finish_load());
        }
        Ok(())
    }
}
