//! Changing which pages a window shows.

use std::collections::HashMap;
use std::ops::Range;

use super::frame_pool::FramePool;
use super::frames::Frames;
use super::load::{Call, Step};
use super::{leave_out, Cached};
use crate::engine::{room_for, Fill, RemapOptions};
use crate::error::{Error, Interrupt, Result};
use crate::plan::{self, Changes};
use crate::room::{self, check_growth, collected, no_room, push};
use crate::stats::Counters;
use crate::store::Now;
use crate::sys::ring::DEPTH;
use crate::table::{Entry, Shown};
use crate::units::{FilePage, PageIndex, Pages, Prot, Run, WindowPage};

/// Bytes that are read into present pages between two questions whether to stop.
const OVERWRITTEN_BYTES: u64 = 1 << 20;

/// Bytes behind a run that the kernel is reading while the run is awaited.
const AHEAD_BYTES: u64 = 16 << 20;
/// Runs of them: beyond what a device queues, beginning to read waits as reading does.
const AHEAD_RUNS: usize = DEPTH;

/// The file pages of the steps at the front whose pages follow one another in the file and in
/// the window, `most` of them; None where there is no step.
fn file_run(steps: &[Step], most: u64) -> Option<Run<FilePage>> {
    let file_page = |step: &Step| step.entry.shown().file_page();
    let begin = steps.first()?;
    let first = file_page(begin)?;
    let follows = |(step, index): &(&Step, u64)| {
        step.window_page == begin.window_page.offset(*index)
            && file_page(step) == Some(first.offset(*index))
    };
    let count = steps.iter().zip(0..most).take_while(follows).count() as u64;
    Some(Run { first, count })
}

impl<F: Frames> Cached<F> {
    /// Shows other file pages. Frames that it has isolated and not used stay in `pool`.
    pub(super) fn remap_pages(
        &self,
        pool: &mut FramePool,
        changes: &Changes,
        options: RemapOptions,
        interrupt: &dyn Interrupt,
    ) -> Result<Vec<bool>> {
        let replaced = changes.window_pages();
        plan::check_placed(&self.shared.state.lock().table, "remap", replaced, options.discard)?;
        let moves = self.check_remap(changes, options.prot)?;
        let keep = self.kept("remap", changes.window_pages())?;
        if options.fill == Fill::All && keep.is_some() {
            self.check_budget("remap", changes.window_pages())?;
        } else if options.fill == Fill::All {
            let prot = options.prot;
            let loads = |entry: Entry| prot.unwrap_or(entry.prot()) != Prot::None;
            self.check_memory("remap", changes.window_pages(), loads)?;
        }
        let mut room = self.pages_left(changes.window_pages());
        let mut mask = room::mask("remap", changes.len(), interrupt)?;
        let loads = options.fill != Fill::Nothing;
        let piece_pages = if moves { changes.len() } else { self.piece_pages() };
        for piece in plan::pieces(changes.len(), piece_pages) {
            let mut begin = || {
                pool.isolated().free_kept();
                interrupt.check()?;
                let replaced = self.replaced_pages(changes, options.prot, piece.clone())?;
                if moves {
                    // All at once: what is done with as many pages below has no other bound.
                    drop(room_for::<[u64; 8]>("remap", piece.len())?);
                }
                self.reserve_moves("remap", changes.window_pages(), piece.clone())?;
                let replaced = replaced.into_iter();
                let held = self.save_and_hold("remap", pool, replaced, loads, interrupt)?;
                let mut steps = self.remap_steps(changes, options, piece.clone(), &mut mask)?;
                if options.fill == Fill::Resident {
                    leave_out(&mut room, &mut steps);
                }
                Ok((held, steps))
            };
            let (_held, steps) =
                begin().map_err(|error: Error| error.with_completed(piece.start))?;
            let interrupt = self.while_held(interrupt);
            let keep = keep.as_ref();
            let call = Call { operation: "remap", fill: options.fill, keep, interrupt };
            let done = if options.in_place { self.overwrite(&call, &steps, &mut mask)? } else { 0 };
            self.carry_out(&call, pool, &steps[done..], &mut mask)
                .inspect_err(|_| self.forget_repeats(changes, piece.clone()))?;
        }
        Ok(mask)
    }

    /// Reads what steps bring into the frames that the window has, as no thread looks there:
    /// one system call a run of the file. From the first run on of which it cannot tell that it is
    /// in the page cache, the kernel reads those behind a run while it is awaited. Does as many
    /// steps from the front as it can, says how many, and leaves the others as they were.
    ///
    /// Only where writes are not noticed, all pages of the steps are present and of files, none
    /// is pinned, and reads go through the page cache.
    fn overwrite(&self, call: &Call<'_>, steps: &[Step], mask: &mut [bool]) -> Result<usize> {
        let shared = &self.shared;
        let store = &shared.store;
        if shared.frames.tracking().is_some() || store.direct() || store.is_provided() {
            return Ok(0);
        }
        // A fault of another thread must not evict what is read into.
        let _staying = match call.keep {
            Some(_) => {
                let pages = steps.iter().map(|step| step.window_page).collect();
                Some(self.stay(call.operation, &Pages::List(pages))?)
            }
            None => None,
        };
        let state = shared.state.lock();
        let present = |step: &Step| {
            let old = state.get(step.window_page);
            // What is lost if reading fails stays as it is until it has not failed.
            let may_go = !old.pinned() && old.shown() != Shown::Placed;
            step.load && old.present() && may_go && old.prot() == step.entry.prot()
        };
        if !steps.iter().all(present) {
            return Ok(0);
        }
        drop(state);
        let most = self.page.index_of(OVERWRITTEN_BYTES).max(1);
        let mut done = 0;
        // Once a run may have to be awaited: the steps that are done or being read, and how many
        // runs the latter are.
        let mut ahead: Option<(usize, usize)> = None;
        while let Some(run) = file_run(&steps[done..], most) {
            call.interrupt.check().map_err(|error| error.with_completed(steps[done].position))?;
            let count = run.count as usize;
            let window_run = Run { first: steps[done].window_page, count: run.count };
            let (offset, len) = shared.bytes(window_run);
            let into = shared.frames.region().span(offset, len);
            let several = count < steps.len() && ahead.is_none();
            let now = several.then(|| store.read_run_now(run, into));
            if let Some(Ok(Now::Absent(_) | Now::Unknown)) = now {
                ahead = Some((done + count, 0));
            }
            if let Some((begun, runs)) = &mut ahead {
                let most_begun = done + count + self.page.index_of(AHEAD_BYTES) as usize;
                while *begun < most_begun && *runs < AHEAD_RUNS {
                    let Some(next) = file_run(&steps[*begun..], most) else { break };
                    store.begin_reading(next);
                    *begun += next.count as usize;
                    *runs += 1;
                }
                // The first of them is awaited next.
                *runs = runs.saturating_sub(1);
            }
            let read = matches!(now, Some(Ok(Now::Read))) || store.read_run_unchanged(run, into);
            let mut state = shared.state.lock();
            for step in &steps[done..done + count] {
                _ = state.begin_drop(step.window_page);
            }
            if !read {
                // What is torn goes. A touch brings what the page showed before; the caller
                // finds out what is wrong, page by page.
                let ranges = shared.ranges(window_run.pages());
                let dropped = shared.frames.drop_pages(&ranges);
                for page in window_run.pages().filter(|_| dropped.is_ok()) {
                    let entry = state.get(page).finish_drop();
                    state.set(page, entry);
                }
                return Ok(done);
            }
            for step in &steps[done..done + count] {
                state.replace(step.window_page, step.entry.finish_load());
                mask[step.position] = true;
            }
            Counters::add(&shared.counters.pages_loaded, run.count);
            Counters::add(&shared.counters.bytes_read, len as u64);
            done += count;
        }
        Ok(done)
    }

    /// Fails, before any change, if a remap would show a page twice that may be written.
    /// Says whether it moves pages within the window, so that it has to be done at once.
    fn check_remap(&self, changes: &Changes, prot: Option<Prot>) -> Result<bool> {
        if self.shared.frames.tracking().is_none() {
            return Ok(false);
        }
        let replaced = plan::members("remap", changes.window_pages())?;
        let prots: Vec<Prot> = {
            let mut prots = room_for("remap", changes.len())?;
            let state = self.shared.state.lock();
            let of = |page| prot.unwrap_or_else(|| state.get(page).prot());
            prots.extend(changes.window_pages().iter().map(of));
            prots
        };
        let shown = (0..changes.len()).map(|position| {
            let (window_page, file_page) = changes.pair(position);
            (window_page, file_page, prots[position])
        });
        self.check_appearances("remap", shown, |page| replaced.contains(page))?;
        let state = self.shared.state.lock();
        let moves = |position| {
            let (window_page, file_page) = changes.pair(position);
            state.table.appearances(file_page).any(|other| other != window_page)
        };
        Ok((0..changes.len()).any(moves))
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
        let mut first = HashMap::new();
        for (window_page, file_page, prot) in shown {
            if first.len() == first.capacity() {
                check_growth::<[u64; 3]>(operation, (first.len(), 0), 1)?;
                let grown = first.try_reserve(1);
                grown.map_err(|_| no_room::<[u64; 3]>(operation, first.len() + 1))?;
            }
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

    /// After a remap that failed: what it did not reach and is shown elsewhere by now, and
    /// may be written in either place, shows nothing any more. The pages are held.
    fn forget_repeats(&self, changes: &Changes, piece: Range<usize>) {
        if self.shared.frames.tracking().is_none() {
            return;
        }
        let mut state = self.shared.state.lock();
        for position in piece {
            let (window_page, wanted) = changes.pair(position);
            let entry = state.get(window_page);
            let Shown::File(shown) = entry.shown() else { continue };
            let twice = state.table.appearances(shown).any(|other| {
                let write = [entry.prot(), state.get(other).prot()].contains(&Prot::Write);
                other != window_page && write
            });
            if shown != wanted && twice {
                _ = state.begin_drop(window_page);
                // Should the kernel refuse, the page is stale, and is dropped when touched.
                let _dropped = self.shared.frames.drop_pages(&self.ranges([window_page]));
                let nothing = Entry::new(Shown::Nothing, entry.prot());
                state.set(window_page, nothing);
            }
        }
    }

    /// The pages whose content has to be in the store before a piece of a remap reads
    /// from it: those that it replaces, and those that show what it is to show.
    fn replaced_pages(
        &self,
        changes: &Changes,
        prot: Option<Prot>,
        piece: Range<usize>,
    ) -> Result<Vec<WindowPage>> {
        if self.shared.frames.tracking().is_none() {
            return Ok(Vec::new());
        }
        let mut pages = room_for("remap", piece.len())?;
        let state = self.shared.state.lock();
        for position in piece {
            let (window_page, file_page) = changes.pair(position);
            let entry = state.get(window_page);
            let same = entry.shown() == Shown::File(file_page)
                && prot.is_none_or(|prot| prot == entry.prot());
            // A page that is there and as it is to be stays.
            if !(same && entry.present()) {
                push("remap", &mut pages, window_page)?;
                for page in state.table.appearances(file_page) {
                    push("remap", &mut pages, page)?;
                }
            }
        }
        pages.sort_unstable();
        pages.dedup();
        Ok(pages)
    }

    /// Makes sure that the table has room to note that a piece of `pages` shows something else.
    pub(super) fn reserve_moves(
        &self,
        operation: &'static str,
        pages: &Pages<WindowPage>,
        piece: Range<usize>,
    ) -> Result<()> {
        let moved = piece.map(|position| pages.at(position));
        self.shared.state.lock().table.reserve_moves(operation, moved)
    }

    fn remap_steps(
        &self,
        changes: &Changes,
        options: RemapOptions,
        piece: Range<usize>,
        mask: &mut [bool],
    ) -> Result<Vec<Step>> {
        let mut steps = room_for("remap", piece.len())?;
        let resident = match options.fill {
            Fill::Resident => {
                let files = piece.clone().map(|position| changes.pair(position).1);
                let files = Pages::List(collected("remap", files)?);
                Some(self.shared.store.resident(&files)?)
            }
            Fill::All | Fill::Nothing => None,
        };
        let state = self.shared.state.lock();
        for position in piece.clone() {
            let (window_page, file_page) = changes.pair(position);
            let old = state.table.get(window_page);
            let prot = options.prot.unwrap_or(old.prot());
            let entry = Entry::new(Shown::File(file_page), prot);
            let same = old.shown() == entry.shown() && old.prot() == prot;
            if same && (old.present() || prot == Prot::None) {
                mask[position] = old.present();
                Counters::add(&self.shared.counters.pages_hit, old.present().into());
                continue;
            }
            let wanted = match &resident {
                Some(resident) => resident[position - piece.start],
                None => options.fill == Fill::All,
            };
            let load = wanted && prot != Prot::None;
            steps.push(Step { position, window_page, entry, load });
        }
        Ok(steps)
    }
}
