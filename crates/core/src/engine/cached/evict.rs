//! Making room in a full budget: what calls and faults evict, and what they wait for.

use super::budget::may_leave;
use super::cleaner::Cleaner;
use super::frame_pool::IsolatedFrames;
use super::frames::{Frames, Tracking};
use super::{Cached, SharedWindow, State};
use crate::error::{Error, Result, Uninterruptible};
use crate::memory::GiveBack;
use crate::plan::Members;
use crate::sys::mm::system_page_bytes;
use crate::table::Shown;
use crate::units::{Pages, WindowPage};

impl<F: Frames> SharedWindow<F> {
    /// Bytes that the source map of the store has mapped, and its page tables.
    fn source_bytes(&self) -> u64 {
        self.store.source_mapped_bytes() + self.store.source_table_bytes()
    }

    /// Evicts pages until `coming` more fit into the budget, but none of `keep`.
    pub fn make_room(
        &self,
        operation: &'static str,
        coming: u64,
        keep: Option<&Members>,
        isolated: &mut IsolatedFrames,
    ) -> Result<()> {
        loop {
            let source_bytes = self.source_bytes();
            let mut state = self.state.lock();
            let Some(victims) = state.choose_victims(coming, source_bytes, keep) else {
                return Ok(());
            };
            if victims.is_empty() {
                return self.no_room(operation, &state, coming).map_or(Ok(()), Err);
            }
            let fail = |errno| Error::system(operation, errno);
            if self.frames.tracking().is_none() {
                let evicted =
                    self.evict_locked(&mut state, victims.iter().copied(), Some(isolated));
                if evicted.is_err() {
                    state.take_back(&victims);
                }
                evicted.map_err(fail)?;
                continue;
            }
            drop(state);
            // Nobody waits for a page while it is written. What is written to it since is
            // written below, if there is any.
            let cleaned = self.clean(operation, &victims, &Uninterruptible);
            let mut state = self.state.lock();
            if cleaned.is_err() {
                state.take_back(&victims);
            }
            cleaned?;
            // Somebody else may hold one by now, whose it is.
            let is_free = |page: &WindowPage| {
                let entry = state.get(*page);
                entry.present() && !entry.held() && !entry.writing() && may_leave(entry).is_some()
            };
            let (victims, others): (Vec<_>, Vec<_>) =
                victims.iter().partition(|page| is_free(page));
            state.take_back(&others);
            for &page in &victims {
                state.hold(page);
            }
            drop(state);
            let saved = self.save(operation, isolated, &victims, false);
            let mut state = self.state.lock();
            let evicted = saved.and_then(|()| {
                self.evict_locked(&mut state, victims.iter().copied(), None).map_err(fail)
            });
            if evicted.is_err() {
                state.take_back(&victims);
            }
            drop(state);
            self.let_go(&victims);
            evicted?;
        }
    }

    /// Evicts pages until `coming` more fit into the budget, but only such as need not be
    /// written; says whether they fit. Has others be written where there are few.
    pub fn make_clean_room(
        &self,
        coming: u64,
        isolated: &mut IsolatedFrames,
        cleaner: &Cleaner,
    ) -> Result<bool> {
        let fail = |errno| Error::system("fault", errno);
        loop {
            let source_bytes = self.source_bytes();
            let mut state = self.state.lock();
            let Some(excess) = state.excess(coming, source_bytes) else { return Ok(true) };
            let mut few = false;
            let victims = state.choose_clean(excess, &mut few);
            let mut changed = Vec::new();
            let evicted = if self.frames.tracking() == Some(Tracking::Kernel) {
                for &page in &victims {
                    state.hold(page);
                }
                drop(state);
                let taken = self.take_out_clean("fault", isolated, &victims);
                state = self.state.lock();
                changed.extend(victims.iter().copied().filter(|&page| state.get(page).present()));
                let gone = victims.iter().copied().filter(|&page| !state.get(page).present());
                let gone: Vec<WindowPage> = gone.collect();
                let dropped = self.evict_locked(&mut state, gone.into_iter(), None).map_err(fail);
                taken.and(dropped)
            } else {
                // What is written to them is a fault, which waits for the lock.
                self.evict_locked(&mut state, victims.iter().copied(), None).map_err(fail)
            };
            if evicted.is_err() {
                state.take_back(&victims);
            } else {
                state.keep_changed(&changed);
            }
            drop(state);
            if self.frames.tracking() == Some(Tracking::Kernel) {
                self.let_go(&victims);
            }
            evicted?;
            if few || !changed.is_empty() {
                cleaner.ask();
            }
            if victims.is_empty() {
                return Ok(false);
            }
        }
    }

    fn no_room(&self, operation: &'static str, state: &State, coming: u64) -> Option<Error> {
        let why = "pages that are pinned, placed or being changed cannot be evicted";
        let present = state.table.counts().present + coming;
        state.over_budget(operation, present, self.source_bytes(), why)
    }
}

impl<F: Frames> GiveBack for SharedWindow<F> {
    fn give_back(&self) {
        // What cannot leave now (pinned, or not to be written) is asked for again, and the
        // error told, when this window next makes room.
        let _later = self.make_room("Window", 0, None, &mut IsolatedFrames::default());
    }
}

impl<F: Frames> Cached<F> {
    /// Fails, before any change, if `pages`, all present at once, are beyond the budget
    /// beside what may not leave.
    pub(super) fn check_budget(
        &self,
        operation: &'static str,
        pages: &Pages<WindowPage>,
    ) -> Result<()> {
        let state = self.shared.state.lock();
        let source_bytes = self.shared.source_bytes();
        let Some((_, allowed)) = state.allowed(source_bytes) else { return Ok(()) };
        let needed = self.pages_beside(&state, pages) + pages.len() as u64;
        if needed <= allowed {
            return Ok(());
        }
        let why = if operation == "remap" {
            "all of these pages would be present at once, beside those that are pinned or placed \
             (ask for fewer at a time, release pins, or pass populate=False)"
        } else {
            "all of these pages would be present at once, beside those that are pinned or placed \
             (ask for fewer at a time, or release pins)"
        };
        state.over_budget(operation, needed, source_bytes, why).map_or(Ok(()), Err)
    }

    /// Has pages of a call stay in the window until the guard is dropped, also where a fault
    /// of another thread looks for victims.
    pub(super) fn stay(
        &self,
        operation: &'static str,
        pages: &Pages<WindowPage>,
    ) -> Result<Staying<'_, F>> {
        let staying = self.kept(operation, pages)?;
        self.shared.state.lock().staying = staying;
        Ok(Staying(&self.shared))
    }

    /// Pages that the budget leaves for those of a call; None without a budget.
    pub(super) fn pages_left(&self, pages: &Pages<WindowPage>) -> Option<u64> {
        let state = self.shared.state.lock();
        let (_, allowed) = state.allowed(self.shared.source_bytes())?;
        Some(allowed.saturating_sub(self.pages_beside(&state, pages)))
    }

    /// Pages that stay in the window whatever comes, but for those of a call, and as many as the
    /// page tables take that it may add.
    fn pages_beside(&self, state: &State, pages: &Pages<WindowPage>) -> u64 {
        let counts = state.table.counts();
        let stays = |page: &WindowPage| {
            let entry = state.get(*page);
            entry.present() && (entry.pinned() || entry.shown() == Shown::Placed)
        };
        let staying = counts.pinned + counts.placed;
        let own = if staying == 0 { 0 } else { pages.iter().filter(stays).count() };
        let tables = state.page_tables.untouched().min(pages.len() as u64);
        let tables = self.page.count_of(tables * system_page_bytes() as u64);
        (staying + tables).saturating_sub(own as u64)
    }
}

/// Has the pages of a call stay in the window; see [`Cached::stay`].
#[derive(Debug)]
pub(super) struct Staying<'s, F: Frames>(&'s SharedWindow<F>);

impl<F: Frames> Drop for Staying<'_, F> {
    fn drop(&mut self) {
        // Freed without the lock, which a signal handler may want.
        let staying = self.0.state.lock().staying.take();
        drop(staying);
    }
}
