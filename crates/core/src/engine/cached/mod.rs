//! Windows that show copies: the flow that `paged` and `eager` share.
//!
//! Pages are read into *staging* memory chunk by chunk, with many reads in flight. Each chunk is
//! then put into the window in one step, which is all that differs between the engines
//! ([`Frames`]).
//!
//! Two locks, always taken in this order:
//! 1. The call lock, held for a whole call: one call at a time changes the window. It
//!    owns the frame pool of calls. Nothing that serves a fault waits for it.
//! 2. *state*, held for one step (microseconds to a millisecond). It guards the table and the
//!    content of denied pages, and the kernel's page tables change together with them. Its holder
//!    touches no page of a window and no memory of a caller, so a fault cannot wait for this lock
//!    on the thread that holds it.
//!
//! Invariant: the table never calls a page present that the kernel does not have. So each step
//! first marks pages absent, then calls the kernel, and then marks what is present. If such a
//! call fails, the kernel may still have a page that is marked absent. This page is *stale*, and
//! the next step that needs it drops it.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use rustix::io::Errno;

mod access;
mod budget;
mod cleaner;
mod dirty;
mod evict;
mod frame_pool;
mod frames;
mod grown;
mod hold;
mod load;
mod page_tables;
mod pin;
mod reads;
mod remap;
mod state;
mod take_out;
mod write_back;

use budget::Budget;
pub use budget::{cluster_pages, Dimensions, Division};
pub use cleaner::Cleaner;
use frame_pool::FramePool;
pub use frame_pool::{FrameStack, IsolatedFrames};
pub use frames::{Before, Filled, Frames, Tracking, Userfault};
use load::{Call, Step};
pub use reads::{ReadIndex, MAX_READS};
pub use state::State;

use super::call_lock::CallLock;
use super::{placed_bytes, room_for, Engine, FaultMode, Fill, RemapOptions};
use crate::calibrate::Calibration;
use crate::error::{Error, Interrupt, Result, Uninterruptible};
use crate::memory::{self, Reservation};
use crate::plan::{self, Changes, Members};
use crate::room::{self, collected};
use crate::stats::{Counters, Stats};
use crate::store::Store;
use crate::sys::fault_ranges::Resolving;
use crate::sys::lock::Lock;
use crate::sys::mm::{system_page_bytes, Region};
use crate::sys::span::Span;
use crate::table::{Entry, Shown, Table};
use crate::units::{FilePage, PageIndex, PageSize, Pages, Prot, Run, WindowPage};

/// Pages looked at between two questions whether to stop.
const PIECE_PAGES: usize = 65_536;
/// Pages that one step changes while it holds the state.
const STEP_PAGES: usize = 4096;
/// Pages that are held together. No interrupt is looked for while they are.
const HELD_PAGES: usize = 4096;
/// Bytes of a chunk of staging memory that pages are copied out of.
const COPIED_CHUNK_BYTES: u64 = 256 << 10;
/// Calls that bring less than this are not checked against available memory.
const UNCHECKED_BYTES: u64 = 256 << 20;

/// What ends the serving of a window's faults when it is dropped.
pub type Serving = Box<dyn std::fmt::Debug + Send + Sync>;

/// What calls and the threads that serve faults share.
#[derive(Debug)]
pub struct SharedWindow<F> {
    /// Where content comes from.
    pub store: Arc<Store>,
    /// The window's memory.
    pub frames: F,
    /// The table; see the locks above. Who waits for it waits for pages that are being
    /// written, or that somebody holds or reads for.
    pub state: Lock<State>,
    evict_gap_pages: u64,
    /// Counters.
    pub counters: Counters,
    /// The memory of a window that fits into its budget whole.
    _reserved: Option<Reservation>,
}

/// An engine that shows copies.
#[derive(Debug)]
pub struct Cached<F> {
    /// Dropped first, with the next: nothing serves a window whose memory goes.
    serving: Option<Serving>,
    resolving: Option<Resolving>,
    shared: Arc<SharedWindow<F>>,
    page: PageSize,
    /// One call at a time, which has the frames outside the window.
    call: CallLock<FramePool>,
    /// Of the staging memory, which only the call under way may look at.
    staging_bytes: Arc<AtomicU64>,
}

impl<F: Frames> Cached<F> {
    /// A window of the store's pages as `table` says, all absent.
    pub fn new(
        store: Arc<Store>,
        frames: F,
        table: Table,
        budget: Option<(Reservation, Option<Division>)>,
        fault: FaultMode,
        calibration: &Calibration,
    ) -> Result<Self> {
        let page = store.page_size();
        let division = budget.as_ref().and_then(|(_, division)| *division);
        let chunk_pages = division.map_or_else(
            || Self::chunk_pages(page, &table, frames.tracking(), calibration),
            |division| division.chunk_pages,
        );
        let (budget, reserved) = match budget {
            Some((budget, Some(division))) => (Some(Budget::new(budget, division, &store)?), None),
            Some((budget, None)) => (None, Some(budget)),
            None => (None, None),
        };
        let mut state = State::new(table, frames.tracking(), page)?;
        state.budget = budget;
        let state = Lock::new(state);
        let state = match fault {
            FaultMode::Thread => state,
            FaultMode::Signal => state.held_without_signals(),
        };
        let shared = SharedWindow {
            store,
            frames,
            state,
            evict_gap_pages: calibration.evict_gap_pages,
            counters: Counters::default(),
            _reserved: reserved,
        };
        let shared = Arc::new(shared);
        if let Some(budget) = &shared.state.lock().budget {
            let owner: Weak<SharedWindow<F>> = Arc::downgrade(&shared);
            budget.reservation().given_back_by(owner);
        }
        let pool = FramePool::new(page, chunk_pages as usize);
        Ok(Self {
            serving: None,
            resolving: None,
            shared,
            page,
            staging_bytes: pool.staging_bytes(),
            call: CallLock::new(pool),
        })
    }

    /// Pages of a chunk of staging memory, where no budget divides it. Where writes are
    /// noticed pages are copied out of it, and are still in the processor's cache then.
    pub fn chunk_pages(
        page: PageSize,
        table: &Table,
        tracking: Option<Tracking>,
        calibration: &Calibration,
    ) -> u64 {
        let most = if tracking.is_some() { COPIED_CHUNK_BYTES } else { u64::MAX };
        let batch_bytes = (calibration.batch_pages * system_page_bytes() as u64).min(most);
        page.index_of(batch_bytes).clamp(1, table.page_count())
    }

    /// What the threads that serve faults work on.
    pub fn shared(&self) -> &Arc<SharedWindow<F>> {
        &self.shared
    }

    /// The same engine, its faults served as long as `serving` is there, or in the threads that
    /// have them.
    pub fn served_by(mut self, serving: Option<Serving>, resolving: Resolving) -> Self {
        self.serving = serving;
        self.resolving = Some(resolving);
        self
    }

    /// Pages that are looked at together: fewer where they are held meanwhile.
    fn piece_pages(&self) -> usize {
        if self.shared.frames.tracking().is_some() {
            HELD_PAGES
        } else {
            PIECE_PAGES
        }
    }

    fn bytes(&self, run: Run<WindowPage>) -> (usize, usize) {
        self.shared.bytes(run)
    }

    fn ranges(&self, pages: impl IntoIterator<Item = WindowPage>) -> Vec<(usize, usize)> {
        self.shared.ranges(pages)
    }

    /// Fails, before any change, if the pages to load cannot fit into memory.
    /// `loads`: whether an absent page with this word will be brought.
    fn check_memory(
        &self,
        operation: &'static str,
        pages: &Pages<WindowPage>,
        loads: impl Fn(Entry) -> bool,
    ) -> Result<()> {
        if self.page.bytes_of(pages.len() as u64) < UNCHECKED_BYTES {
            return Ok(());
        }
        let available = memory::available().map_err(|e| Error::system(operation, e))?;
        // Most calls fit whatever is present; the others are counted page by page.
        if self.page.bytes_of(pages.len() as u64) <= available {
            return Ok(());
        }
        let pages = plan::distinct(operation, pages)?;
        let mut wanted = 0;
        for piece in plan::pieces(pages.len(), STEP_PAGES) {
            let state = self.shared.state.lock();
            let entries = piece.map(|position| state.get(pages.at(position)));
            let absent = entries.filter(|entry| !entry.present() && loads(*entry)).count();
            wanted += self.page.bytes_of(absent as u64);
        }
        if wanted > available {
            return Err(Error::Memory { operation, wanted, available, completed: 0 });
        }
        Ok(())
    }

    /// The pages of a call, which it does not evict itself; None without a budget.
    fn kept(&self, operation: &'static str, pages: &Pages<WindowPage>) -> Result<Option<Members>> {
        let limited = self.shared.state.lock().budget.is_some();
        limited.then(|| plan::members(operation, pages)).transpose()
    }

    /// Who is asked whether to stop while pages are held: nobody, as asking may wait for
    /// a thread that waits for a page.
    fn while_held<'i>(&self, interrupt: &'i dyn Interrupt) -> &'i dyn Interrupt {
        if self.shared.frames.tracking().is_some() {
            &Uninterruptible
        } else {
            interrupt
        }
    }

    /// The same for pages that are to be written.
    fn check_protect(&self, pages: &Pages<WindowPage>) -> Result<()> {
        let shown: Vec<(WindowPage, FilePage, Prot)> = {
            let state = self.shared.state.lock();
            let file_page = |page| state.get(page).shown().file_page();
            let shown = pages.iter().filter_map(|page| Some((page, file_page(page)?)));
            collected("protect", shown.map(|(page, file)| (page, file, Prot::Write)))?
        };
        self.check_appearances("protect", shown.into_iter(), |_| false)
    }

    /// Steps that bring the absent pages of a piece which show a file page.
    fn populate_steps(
        &self,
        pages: &Pages<WindowPage>,
        piece: Range<usize>,
        mask: &mut [bool],
    ) -> Result<Vec<Step>> {
        let mut steps = room_for("populate", piece.len())?;
        let state = self.shared.state.lock();
        for position in piece {
            let window_page = pages.at(position);
            let entry = state.table.get(window_page);
            mask[position] = entry.present();
            Counters::add(&self.shared.counters.pages_hit, entry.present().into());
            let absent = !entry.present() && entry.prot() != Prot::None;
            if absent && entry.shown().file_page().is_some() {
                let entry = entry.finish_drop();
                steps.push(Step { position, window_page, entry, load: true });
            }
        }
        Ok(steps)
    }
}

impl<F: Frames> SharedWindow<F> {
    pub(super) fn bytes(&self, run: Run<WindowPage>) -> (usize, usize) {
        let page_size = self.store.page_size();
        (offset_of(page_size, run.first), offset_of(page_size, WindowPage(run.count)))
    }

    pub(super) fn content_of(&self, page: WindowPage) -> Span<'_> {
        let page_size = self.store.page_size();
        self.frames.region().span(offset_of(page_size, page), page_size.bytes())
    }

    pub(super) fn ranges(
        &self,
        pages: impl IntoIterator<Item = WindowPage>,
    ) -> Vec<(usize, usize)> {
        plan::runs(pages).map(|run| self.bytes(run)).collect()
    }

    /// Drops pages; what was written to them is written by now. `free` takes frames of runs.
    fn evict_locked(
        &self,
        state: &mut State,
        pages: impl Iterator<Item = WindowPage>,
        free: Option<&mut IsolatedFrames>,
    ) -> Result<(), Errno> {
        let (mut dropped, mut allowed, mut taken) = (Vec::new(), Vec::new(), 0);
        for page in pages {
            let old = state.begin_drop(page);
            if old.unreadable() {
                allowed.push(page);
            } else if old.occupied() {
                dropped.push(page);
            } else if old.shown() == Shown::Placed {
                state.replace(page, Entry::new(Shown::Nothing, old.prot()));
            } else {
                taken += u64::from(old.held());
                state.set(page, old.forget_denied());
            }
        }
        let table = &state.table;
        let absent = |page| table.get(page).loadable();
        let mut runs: Vec<_> = plan::runs(dropped.iter().copied()).collect();
        if let (Some(free), Some(frames)) = (free, self.frames.userfault()) {
            runs.retain_mut(|run| {
                let taken_bytes = free.take_run(frames, self.bytes(*run));
                let taken = self.store.page_size().index_of(taken_bytes as u64);
                *run = Run { first: run.first.offset(taken), count: run.count - taken };
                run.count > 0
            });
        }
        let runs = plan::join_runs(runs, self.evict_gap_pages, absent);
        let ranges: Vec<_> = runs.into_iter().map(|run| self.bytes(run)).collect();
        self.frames.drop_pages(&ranges)?;
        self.frames.allow(&self.ranges(allowed.iter().copied()))?;
        for &page in dropped.iter().chain(&allowed) {
            let entry = state.get(page);
            state.set(page, entry.finish_drop());
        }
        self.give_back_page_tables(state, &dropped);
        Counters::add(&self.counters.pages_evicted, dropped.len() as u64 + taken);
        Ok(())
    }
}

impl<F: Frames> Engine for Cached<F> {
    fn region(&self) -> &Region {
        self.shared.frames.region()
    }

    fn remap(
        &self,
        changes: &Changes,
        options: RemapOptions,
        interrupt: &dyn Interrupt,
    ) -> Result<Vec<bool>> {
        let mut pool = self.call.take(interrupt)?;
        let remapped = self.remap_pages(&mut pool, changes, options, interrupt);
        pool.isolated().free_kept();
        remapped
    }

    fn populate(
        &self,
        pages: &Pages<WindowPage>,
        fill: Fill,
        interrupt: &dyn Interrupt,
    ) -> Result<Vec<bool>> {
        let mut pool = self.call.take(interrupt)?;
        let keep = self.kept("populate", pages)?;
        if fill == Fill::All && keep.is_some() {
            self.check_budget("populate", &plan::distinct("populate", pages)?)?;
        } else if fill == Fill::All {
            let loads =
                |entry: Entry| entry.shown().file_page().is_some() && entry.prot() != Prot::None;
            self.check_memory("populate", pages, loads)?;
        }
        let mut room = self.pages_left(pages);
        let mut mask = room::mask("populate", pages.len(), interrupt)?;
        for piece in plan::pieces(pages.len(), self.piece_pages()) {
            let done = piece.start;
            let begin = || {
                interrupt.check()?;
                let loaded = piece.clone().map(|position| pages.at(position));
                let held = self.hold("populate", loaded, interrupt)?;
                let mut steps = self.populate_steps(pages, piece, &mut mask)?;
                if fill == Fill::Resident {
                    let files = steps.iter().filter_map(|step| step.entry.shown().file_page());
                    let files = Pages::List(collected("populate", files)?);
                    let mut resident = self.shared.store.resident(&files)?.into_iter();
                    steps.retain(|_| resident.next().unwrap_or(false));
                    leave_out(&mut room, &mut steps);
                    steps.retain(|step| step.load);
                }
                Ok((held, steps))
            };
            let (_held, steps) = begin().map_err(|error: Error| error.with_completed(done))?;
            let interrupt = self.while_held(interrupt);
            let call = Call { operation: "populate", fill, keep: keep.as_ref(), interrupt };
            self.carry_out(&call, &mut pool, &steps, &mut mask)?;
        }
        Ok(mask)
    }

    fn evict(
        &self,
        pages: &Pages<WindowPage>,
        discard: bool,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let mut pool = self.call.take(interrupt)?;
        plan::check_placed(&self.shared.state.lock().table, "evict", pages, discard)?;
        self.check_unpinned("evict", pages)?;
        let pages = plan::distinct("evict", pages)?;
        each_piece(pages.len(), self.piece_pages().min(STEP_PAGES), interrupt, |piece| {
            let evicted = piece.map(|position| pages.at(position));
            let _held =
                self.save_and_hold("evict", &mut pool, evicted.clone(), false, interrupt)?;
            let mut state = self.shared.state.lock();
            let evicted = self.shared.evict_locked(&mut state, evicted, None);
            evicted.map_err(|errno| Error::system("evict", errno))
        })
    }

    fn protect(
        &self,
        pages: &Pages<WindowPage>,
        prot: Prot,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let mut pool = self.call.take(interrupt)?;
        let pages = plan::distinct("protect", pages)?;
        if prot == Prot::Write {
            self.check_protect(&pages)?;
        }
        each_piece(pages.len(), STEP_PAGES, interrupt, |piece| {
            let chosen = piece.map(|position| pages.at(position));
            if prot == Prot::None {
                let _held =
                    self.save_and_hold("protect", &mut pool, chosen.clone(), false, interrupt)?;
                self.deny_pages(&mut pool, chosen)
            } else {
                let _held = self.hold("protect", chosen.clone(), interrupt)?;
                self.change_access(chosen.clone(), prot)?;
                self.give_access(&mut pool, chosen, prot, self.while_held(interrupt))
            }
        })
    }

    fn place(
        &self,
        pages: &Pages<WindowPage>,
        data: Option<&[u8]>,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let mut pool = self.call.take(interrupt)?;
        let Some(data) = data else {
            return self.place_shown(&mut pool, pages, interrupt);
        };
        let page_bytes = self.page.bytes();
        let mut position = 0;
        for run in plan::runs(pages.iter()) {
            for run in split_run(run, pool.chunk_pages() as u64) {
                let completed = |error: Error| error.with_completed(position);
                interrupt.check().map_err(completed)?;
                self.shared
                    .state
                    .lock()
                    .table
                    .reserve_moves("place", run.pages())
                    .map_err(completed)?;
                let _held = self
                    .save_and_hold("place", &mut pool, run.pages(), false, interrupt)
                    .map_err(completed)?;
                self.place_run(&mut pool, run, |index| {
                    placed_bytes(data, position + index, page_bytes)
                })?;
                position += run.count as usize;
            }
        }
        Ok(())
    }

    fn flush(&self, pages: &Pages<WindowPage>, interrupt: &dyn Interrupt) -> Result<()> {
        if self.shared.frames.tracking().is_none() {
            // A read-only window has nothing to write.
            return Ok(());
        }
        let _call = self.call.take(interrupt)?;
        self.flush_pages(pages, interrupt)
    }

    fn reload_grown(&self, had_bytes: u64, interrupt: &dyn Interrupt) -> Result<()> {
        Self::reload_grown(self, had_bytes, interrupt)
    }

    fn dirty(&self, pages: &Pages<WindowPage>, interrupt: &dyn Interrupt) -> Result<Vec<bool>> {
        let mut dirty = room::mask("dirty", pages.len(), interrupt)?;
        let mut looked_at = 0;
        for piece in self.shared.used_pieces("dirty", pages)? {
            interrupt.check()?;
            let mut state = self.shared.state.lock();
            let piece: Vec<WindowPage> = piece.iter().collect();
            let noted = self.shared.note_writes(&mut state, &piece, false);
            noted.map_err(|errno| Error::system("dirty", errno))?;
            for page in piece {
                // Of a range whole blocks are left out; of a list nothing is.
                let position = match pages {
                    Pages::Range(range) => (page.0 - range.start) as usize,
                    Pages::List(_) => looked_at,
                };
                dirty[position] = !state.get(page).clean();
                looked_at += 1;
            }
        }
        Ok(dirty)
    }

    fn whole_bytes(&self) -> Option<u64> {
        self.shared.state.lock().budget.as_ref().map(Budget::whole_bytes)
    }

    fn pin(&self, pages: &Pages<WindowPage>, interrupt: &dyn Interrupt) -> Result<()> {
        let _call = self.call.take(interrupt)?;
        self.pin_pages(pages, interrupt)
    }

    fn unpin(&self, pages: &Pages<WindowPage>) {
        self.unpin_pages(pages);
    }

    fn present(&self, pages: &Pages<WindowPage>, interrupt: &dyn Interrupt) -> Result<Vec<bool>> {
        let mut present = room_for("present", pages.len())?;
        self.entries(pages, interrupt, &mut |entry| present.push(entry.present()))?;
        Ok(present)
    }

    /// Faults are served in between, so it is not one moment of a window that changes.
    fn entries(
        &self,
        pages: &Pages<WindowPage>,
        interrupt: &dyn Interrupt,
        tell: &mut dyn FnMut(Entry),
    ) -> Result<()> {
        for piece in plan::pieces(pages.len(), STEP_PAGES) {
            interrupt.check()?;
            let state = self.shared.state.lock();
            piece.for_each(|position| tell(state.get(pages.at(position))));
        }
        Ok(())
    }

    fn stats(&self) -> Stats {
        let state = self.shared.state.lock();
        let counts = state.table.counts();
        Stats {
            present_pages: counts.present,
            placed_pages: counts.placed,
            denied_pages: counts.denied,
            dirty_pages: counts.dirty,
            pinned_pages: counts.pinned,
            page_table_bytes: state.page_tables.bytes(),
            budget_bytes: state.budget.as_ref().map_or(0, Budget::budget_bytes),
            table_bytes: state.table.bytes(),
            staging_bytes: self.staging_bytes.load(Ordering::Relaxed),
            pages_in: state.pages_in,
            pages_out: state.pages_out,
            ..Stats::of(&self.shared.counters)
        }
    }
}

/// Where a window page begins.
pub fn offset_of(page: PageSize, window_page: WindowPage) -> usize {
    page.bytes_of(window_page.0) as usize
}

/// Does `step` for a piece after the other. An error says what was done before its piece.
fn each_piece(
    len: usize,
    most: usize,
    interrupt: &dyn Interrupt,
    mut step: impl FnMut(Range<usize>) -> Result<()>,
) -> Result<()> {
    for piece in plan::pieces(len, most) {
        let done = piece.start;
        let outcome = interrupt.check().and_then(|()| step(piece));
        outcome.map_err(|error| error.with_completed(done))?;
    }
    Ok(())
}

fn split_run(run: Run<WindowPage>, max: u64) -> impl Iterator<Item = Run<WindowPage>> {
    (0..run.count)
        .step_by(max as usize)
        .map(move |start| Run { first: run.first.offset(start), count: max.min(run.count - start) })
}

/// Has steps bring nothing for which the budget has no room, which is counted down.
fn leave_out(room: &mut Option<u64>, steps: &mut [Step]) {
    let Some(room) = room else { return };
    for step in steps.iter_mut().filter(|step| step.load) {
        step.load = *room > 0;
        *room = room.saturating_sub(1);
    }
}
