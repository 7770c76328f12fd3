//! Loading pages: reads into staging memory, and from there into the window, chunk by chunk.

use std::ops::Range;

use rustix::io::Errno;

use super::dirty::content_hash;
use super::frame_pool::{FramePool, IsolatedFrames, Staging};
use super::frames::{Before, Filled, Frames, Tracking, Userfault};
use super::{Cached, State, STEP_PAGES};
use crate::engine::{mappings, Fill};
use crate::error::{Error, Interrupt, Result};
use crate::plan::Members;
use crate::room::collected;
use crate::scatter::Sink;
use crate::stats::Counters;
use crate::sys::span::Span;
use crate::table::Entry;
use crate::units::{FilePage, PageIndex, Prot, Run, WindowPage};

/// One page of a call: what it is to be, and whether content is brought for it now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) position: usize,
    pub(super) window_page: WindowPage,
    /// The word to be, absent.
    pub(super) entry: Entry,
    pub(super) load: bool,
}

/// What the steps of a call have in common.
#[derive(Clone, Copy)]
pub(super) struct Call<'c> {
    pub(super) operation: &'static str,
    pub(super) fill: Fill,
    /// Pages that may not leave while the call lasts, where there is a budget.
    pub(super) keep: Option<&'c Members>,
    pub(super) interrupt: &'c dyn Interrupt,
}

impl<F: Frames> Cached<F> {
    /// Brings the content of the steps that load and changes the others in their
    /// turn, so that what is completed is always a front part of the call.
    pub(super) fn carry_out(
        &self,
        call: &Call<'_>,
        pool: &mut FramePool,
        steps: &[Step],
        mask: &mut [bool],
    ) -> Result<()> {
        let loads = (0..steps.len()).filter(|&step| steps[step].load);
        let none_done =
            |error: Error| error.with_completed(steps.first().map_or(0, |step| step.position));
        let loads = collected(call.operation, loads).map_err(none_done)?;
        let mut next_step = 0;
        if !loads.is_empty() {
            let files = loads.iter().map(|&step| {
                steps[step].entry.shown().file_page().expect("loads have a file page")
            });
            let files: Vec<FilePage> = collected(call.operation, files).map_err(none_done)?;
            let loading = pool.for_loading(&self.shared.frames, loads.len());
            let (ring, isolated) = loading.map_err(none_done)?;
            let mut loader = Loader {
                cached: self,
                call: *call,
                ring,
                isolated,
                size_bytes: self.shared.store.size_bytes(),
                steps,
                loads: &loads,
                next_step: 0,
                reused: Vec::new(),
                mask,
            };
            let store = &self.shared.store;
            let result = match call.fill {
                Fill::Resident => store.scatter_resident(&files, &mut loader, call.interrupt),
                Fill::All | Fill::Nothing => store.scatter(&files, &mut loader, call.interrupt),
            };
            next_step = loader.next_step;
            if let Err(error) = result {
                let position = |step: &Step| step.position;
                let end = steps.last().map_or(0, |step| step.position + 1);
                return Err(error.with_completed(steps.get(next_step).map_or(end, position)));
            }
        }
        self.change_absent(call.operation, &steps[next_step..])
    }

    /// Carries out steps that bring nothing: their pages become absent.
    pub(super) fn change_absent(&self, operation: &'static str, steps: &[Step]) -> Result<()> {
        for steps in steps.chunks(STEP_PAGES) {
            let mut state = self.shared.state.lock();
            self.change_absent_locked(&mut state, steps).map_err(|errno| {
                let failed = mappings::failed(operation, errno, 2 * steps.len() as u64);
                failed.with_completed(steps[0].position)
            })?;
        }
        Ok(())
    }

    pub(super) fn change_absent_locked(
        &self,
        state: &mut State,
        steps: &[Step],
    ) -> Result<(), Errno> {
        let frames = &self.shared.frames;
        let (mut denied, mut allowed, mut dropped) = (Vec::new(), Vec::new(), Vec::new());
        for step in steps {
            let old = state.begin_drop(step.window_page);
            match (old.prot(), step.entry.prot()) {
                (Prot::None, Prot::None) => {}
                (_, Prot::None) => denied.push(step.window_page),
                (Prot::None, _) => allowed.push(step.window_page),
                _ if old.unreadable() => allowed.push(step.window_page),
                _ if old.occupied() => dropped.push(step.window_page),
                _ => {}
            }
        }
        frames.drop_pages(&self.ranges(dropped))?;
        frames.allow(&self.ranges(allowed))?;
        frames.deny(&self.ranges(denied))?;
        for step in steps {
            state.replace(step.window_page, step.entry);
        }
        Ok(())
    }

    /// Puts one run of staged pages, read when the store had `size_bytes`, into the
    /// window and into the table. In the frames of `isolated`, if that is given and it can be
    /// done: the pages are dirty then until they were [compared](Self::compare).
    /// Returns how it was done, or the pages done and why no more.
    pub(super) fn install(
        &self,
        state: &mut State,
        run: Run<WindowPage>,
        entry_of: impl Fn(u64) -> Entry,
        (from, size_bytes): (Span<'_>, u64),
        spare: Option<Span<'_>>,
        isolated: Option<&mut IsolatedFrames>,
    ) -> Result<Filled, (u64, Errno)> {
        let replaces = !state.table.any(run, |entry| !entry.present());
        let before = Before {
            present: state.table.any(run, Entry::occupied),
            unreadable: state.table.any(run, |e| e.unreadable() || e.prot() == Prot::None),
        };
        for page in run.pages() {
            _ = state.begin_drop(page);
        }
        let (offset, len) = self.bytes(run);
        let tracking = self.shared.frames.tracking();
        // The pages of a run are all of files, or all placed.
        let first = entry_of(0);
        let of_file = tracking.is_some() && first.shown().file_page().is_some();
        // Where writes are faults, those to pages that are only to be read are as well.
        let track = of_file || (tracking == Some(Tracking::Faults) && first.prot() == Prot::Read);
        // To others no write may be let through for a moment.
        let stored = run.pages().zip(0..).all(|(_, index)| entry_of(index).prot() == Prot::Write);
        let untouched = !before.unreadable && (replaces || !before.present);
        // Until they are compared nobody may write them back, nor evict them.
        let held = !state.table.any(run, |entry| !entry.held());
        let reused = isolated
            .filter(|_| of_file && stored && untouched && held)
            .and_then(|isolated| self.shared.fill_with_kept(isolated, run, from, replaces));
        let again = reused.is_some();
        let result =
            reused.unwrap_or_else(|| self.shared.frames.fill(offset, from, spare, before, track));
        let done = match &result {
            Ok(_) => run.count,
            Err(partial) => self.page.index_of(partial.done_bytes as u64),
        };
        let done_bytes = self.page.bytes_of(done) as usize;
        let notice = |frames: &dyn Userfault| frames.notice_writes(&[(offset, done_bytes)]);
        // It can lack memory for a moment.
        let noticed = self
            .shared
            .frames
            .userfault()
            .filter(|_| again)
            .is_some_and(|frames| notice(frames).or_else(|_| notice(frames)).is_ok());
        let hashed = of_file && tracking == Some(Tracking::Content);
        for index in 0..done {
            let page = run.first.offset(index);
            let entry = entry_of(index);
            if let (true, Some(file_page)) = (of_file, entry.shown().file_page()) {
                let file_bytes = self.shared.store.bytes_within(file_page, size_bytes);
                state.note_loaded(file_page, file_bytes, self.page);
                if hashed {
                    let page_bytes = self.page.bytes();
                    let content = from.part(index as usize * page_bytes, page_bytes);
                    state.note_hash(page, content_hash(content));
                }
            }
            // What reused frames show counts as written to until it was compared.
            let entry = entry.finish_load();
            state.replace(page, if again { entry.note_write() } else { entry });
        }
        Counters::add(&self.shared.counters.pages_loaded, done);
        let read = if first.shown().file_page().is_some() { done_bytes } else { 0 };
        Counters::add(&self.shared.counters.bytes_read, read as u64);
        match result {
            // Else they stay dirty, and are written for nothing.
            Ok(_) if again => Ok(if noticed { Filled::Reused } else { Filled::Copied }),
            Ok(filled) => {
                let moved = if filled == Filled::Moved { done } else { 0 };
                Counters::add(&self.shared.counters.pages_moved, moved);
                Ok(filled)
            }
            Err(partial) => {
                // Where a page was filled in part the table must not lie: the
                // rest goes, and a touch or the next call brings it again. What
                // may not be touched is forbidden again. The first error tells;
                // should these fail too, a touch is served by the table.
                let rest = self.page.bytes_of(done) as usize;
                let _gone = self.shared.frames.drop_pages(&[(offset + rest, len - rest)]);
                let forbidden = |page: &WindowPage| {
                    let entry = state.get(*page);
                    entry.prot() == Prot::None || entry.unreadable()
                };
                let pages = run.pages().skip(done as usize).filter(forbidden);
                let _denied = self.shared.frames.deny(&self.ranges(pages));
                Err((done, partial.errno))
            }
        }
    }
}

/// Puts chunks into the window as their reads complete.
struct Loader<'a, 'm, F> {
    cached: &'a Cached<F>,
    call: Call<'a>,
    ring: &'m Staging,
    isolated: &'a mut IsolatedFrames,
    /// What the store had when the reads began: it may have grown since.
    size_bytes: u64,
    steps: &'a [Step],
    /// The steps that load, by request of the reads.
    loads: &'a [usize],
    /// Steps before this one are completed.
    next_step: usize,
    /// What was put in by reused frames and is to be compared.
    reused: Vec<(Run<WindowPage>, Span<'m>)>,
    mask: &'a mut [bool],
}

impl<F: Frames> Loader<'_, '_, F> {
    /// The requests from `first` on, before `end`, whose steps and whose window
    /// pages follow one another.
    fn run(&self, first: usize, end: usize) -> Run<WindowPage> {
        let page_of = |request: usize| self.steps[self.loads[request]].window_page;
        let follows = |request: usize, run: Run<WindowPage>| {
            self.loads[request] == self.loads[request - 1] + 1 && page_of(request) == run.end()
        };
        let mut run = Run { first: page_of(first), count: 1 };
        while first + (run.count as usize) < end && follows(first + run.count as usize, run) {
            run.count += 1;
        }
        run
    }

    /// Changes the pages before step `end` for which nothing is read.
    fn change_absent_before(&mut self, state: &mut State, end: usize) -> Result<(), Errno> {
        let steps = &self.steps[self.next_step..end];
        for steps in steps.chunk_by(|left, right| left.load == right.load) {
            for absent in steps.chunks(STEP_PAGES).filter(|_| !steps[0].load) {
                self.cached.change_absent_locked(state, absent)?;
            }
        }
        self.next_step = end;
        Ok(())
    }

    /// Makes room in the budget for those pages of a chunk that are absent.
    fn make_room(&mut self, requests: &Range<usize>) -> Result<()> {
        if self.call.keep.is_none() {
            return Ok(());
        }
        let coming = {
            let state = self.cached.shared.state.lock();
            let absent = |request: &usize| {
                !state.get(self.steps[self.loads[*request]].window_page).present()
            };
            requests.clone().filter(absent).count() as u64
        };
        let Call { operation, keep, .. } = self.call;
        self.cached.shared.make_room(operation, coming, keep, self.isolated)
    }

    /// Finds out what was written to pages that were put in by reused frames, before writes
    /// to them were noticed: the others are clean. They are all held.
    fn compare(&mut self) {
        let shared = &self.cached.shared;
        for (run, from) in std::mem::take(&mut self.reused) {
            // Without the lock: a touch of a window may be a fault.
            let stored = shared.compare_moved(run, from);
            let mut state = shared.state.lock();
            for (page, stored) in run.pages().zip(stored) {
                let entry = state.get(page);
                // One that is not there any more was lost to somebody's `madvise`.
                let written = stored || !entry.present();
                let entry = if written { entry } else { entry.unnote_write() };
                state.mark(page, entry);
            }
        }
    }

    fn put_chunk(&mut self, requests: Range<usize>) -> Result<bool, Errno> {
        let cached = self.cached;
        let number = requests.start / self.ring.chunk_pages();
        let (front, spare) = (self.ring.front(number), self.ring.spare(number));
        let mut state = cached.shared.state.lock();
        let mut all_moved = true;
        let mut request = requests.start;
        while request < requests.end {
            let run = self.run(request, requests.end);
            self.change_absent_before(&mut state, self.loads[request])?;
            let slot = (request % self.ring.chunk_pages()) * cached.page.bytes();
            let (_, len) = cached.bytes(run);
            let from = front.part(slot, len);
            let spare = spare.map(|spare| spare.part(slot, len));
            let (steps, loads) = (self.steps, self.loads);
            let step_of = |index: u64| &steps[loads[request + index as usize]];
            let filled = cached.install(
                &mut state,
                run,
                |i| step_of(i).entry,
                (from, self.size_bytes),
                spare,
                Some(self.isolated),
            );
            if filled == Ok(Filled::Reused) {
                self.reused.push((run, from));
            }
            let done = match &filled {
                Ok(_) => run.count as usize,
                Err((done, _)) => *done as usize,
            };
            for request in request..request + done {
                self.mask[self.steps[self.loads[request]].position] = true;
            }
            if let Err((_, errno)) = filled {
                self.next_step = self.loads[request + done];
                return Err(errno);
            }
            all_moved &= filled == Ok(Filled::Moved);
            request += done;
            self.next_step = self.loads[request - 1] + 1;
        }
        Ok(all_moved)
    }
}

impl<'m, F: Frames> Sink<'m> for Loader<'_, 'm, F> {
    fn chunk_pages(&self) -> usize {
        self.ring.chunk_pages()
    }

    fn chunks_in_flight(&self) -> usize {
        Staging::CHUNKS
    }

    fn reads_again(&self) -> bool {
        self.ring.copied_out()
    }

    fn buffer(&mut self, chunk: usize) -> Span<'m> {
        let chunk_pages = self.ring.chunk_pages();
        let asked = chunk_pages.min(self.loads.len() - chunk * chunk_pages);
        self.ring.read_into(chunk, asked * self.cached.page.bytes())
    }

    fn complete(&mut self, requests: Range<usize>) -> Result<()> {
        let number = requests.start / self.ring.chunk_pages();
        let used = requests.len() * self.cached.page.bytes();
        self.make_room(&requests)?;
        let result = self.put_chunk(requests);
        self.compare();
        let moved = result == Ok(true);
        let frames = &self.cached.shared.frames;
        self.ring.recycle(frames, number, used, moved);
        result.map(|_| ()).map_err(|errno| Error::system(self.call.operation, errno))
    }
}
