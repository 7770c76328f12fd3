//! Windows that show copies: the flow that `paged` and `eager` share.
//!
//! Content is read into *staging* memory chunk by chunk, many reads in flight,
//! and each chunk is then put into the window in one step. The engines differ in
//! that step alone ([`Frames`]).
//!
//! Two locks, always taken in this order:
//! 1. *control*, held for a whole call: one call at a time changes the window.
//!    It owns the staging memory. Nothing that serves a fault waits for it.
//! 2. *state*, held for one step (microseconds to a millisecond): the table, the
//!    shelf, and what the kernel shows change together under it. No page of a
//!    window and no memory of a caller is touched while it is held, so no fault
//!    can wait for it on the thread that holds it.
//!
//! Invariant: the table may call a page absent that the kernel still shows, but
//! never present one that it does not. So each step first marks pages absent,
//! then calls the kernel, then marks what it shows.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::{lock, placed_bytes, Engine, EngineKind, Fill, RemapOptions};
use crate::error::{Error, Interrupt, Result};
use crate::fault::FaultThread;
use crate::plan::{self, Changes};
use crate::scatter::Sink;
use crate::stats::{Counters, Stats};
use crate::store::Store;
use crate::sys::mm::{system_page_bytes, Access, Advice, Region};
use crate::sys::pagemap;
use crate::sys::span::Span;
use crate::sys::uffd::Partial;
use crate::table::{Entry, Shown, Table};
use crate::units::{FilePage, PageIndex, PageSize, Pages, Prot, Run, WindowPage};
use crate::window::Calibration;

/// Chunks that may be read into at the same time: while the last reads of one
/// are awaited, the next ones keep the device busy.
const CHUNKS_IN_FLIGHT: usize = 4;
/// Pages looked at between two questions whether to stop.
const PIECE_PAGES: usize = 65_536;
/// Pages that one step changes while it holds the state.
const STEP_PAGES: usize = 4096;
/// Calls that bring less than this are not checked against available memory.
const UNCHECKED_BYTES: u64 = 256 << 20;

/// What is in a range of the window before it is filled.
#[derive(Clone, Copy, Debug)]
pub struct Before {
    /// A page of it may be present.
    pub present: bool,
    /// A page of it is set to SIGBUS.
    pub unreadable: bool,
}

/// How a range was filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// The staging frames are in the window now, and those that were in the
    /// window in the spare memory.
    Moved,
    /// The staging memory still has its frames.
    Copied,
}

/// How pages get into the window's memory and out of it. Ranges are (offset,
/// length) in bytes. Each function is called with the state locked.
pub trait Frames: Send + Sync + std::fmt::Debug {
    /// The engine.
    const KIND: EngineKind;
    /// Whether an absent page is brought by a touch.
    const LAZY: bool;

    /// The window's memory.
    fn region(&self) -> &Region;

    /// Prepares staging memory, and says whether [`fill`](Self::fill) wants
    /// spare memory of the same size.
    ///
    /// # Errors
    /// The kernel's.
    fn adopt_staging(&self, staging: &mut Region) -> Result<bool, Errno>;

    /// Whether the window's and staging memory are locked.
    fn locked(&self) -> bool;

    /// Shows `from` at `offset` in place of what is there.
    ///
    /// # Errors
    /// Where it stopped; pages behind that are absent.
    fn fill(
        &self,
        offset: usize,
        from: Span<'_>,
        spare: Option<Span<'_>>,
        before: Before,
    ) -> Result<Filled, Partial>;

    /// Makes pages absent.
    ///
    /// # Errors
    /// The kernel's; some pages may be absent then.
    fn drop_pages(&self, ranges: &[(usize, usize)]) -> Result<(), Errno>;

    /// Makes pages absent and a touch of them a signal.
    ///
    /// # Errors
    /// The kernel's; some pages may be absent then.
    fn deny(&self, ranges: &[(usize, usize)]) -> Result<(), Errno>;

    /// Takes back [`deny`](Self::deny): pages are absent.
    ///
    /// # Errors
    /// The kernel's.
    fn allow(&self, ranges: &[(usize, usize)]) -> Result<(), Errno>;

    /// Moves frames that came out of the window from `back` to where the next
    /// chunk is read to; says whether it could.
    fn give_back(&self, front: Span<'_>, back: Span<'_>) -> bool;

    /// `MADV_DONTNEED`, or what does it in locked memory.
    fn dont_need(&self) -> Advice {
        if self.locked() {
            Advice::DontNeedLocked
        } else {
            Advice::DontNeed
        }
    }
}

/// The table and the content that is kept outside the window.
#[derive(Debug)]
pub struct State {
    /// What each page shows.
    pub table: Table,
    /// Content of placed pages to which access was taken away.
    shelf: HashMap<WindowPage, Vec<u8>>,
}

/// What calls and the fault thread share.
#[derive(Debug)]
pub struct Shared<F> {
    /// Where content comes from.
    pub store: Arc<Store>,
    /// The window's memory.
    pub frames: F,
    /// The table; see the locks above.
    pub state: Mutex<State>,
    /// Counters.
    pub counters: Counters,
}

/// Memory that content is read into before it goes into the window: a ring of
/// chunks, each with spare memory for the frames that come out of the window.
///
/// Invariant: spare memory is empty but while a chunk is being put into the window.
#[derive(Debug)]
struct Staging {
    region: Region,
    chunk_pages: usize,
    /// Offsets of (chunk, its spare memory); they change places as frames do.
    chunks: Vec<(usize, Option<usize>)>,
}

impl Staging {
    fn new<F: Frames>(frames: &F, page: PageSize, chunk_pages: usize) -> Result<Self> {
        let operation = "staging memory";
        let chunk_bytes = chunk_pages * page.bytes();
        let total = 2 * CHUNKS_IN_FLIGHT * chunk_bytes;
        let align = chunk_bytes.next_power_of_two().clamp(system_page_bytes(), 2 << 20);
        let fail = |errno| Error::system(operation, errno);
        let mut region = Region::anonymous(total, align, Access::Write).map_err(fail)?;
        let spare = frames.adopt_staging(&mut region).map_err(fail)?;
        let chunks = (0..CHUNKS_IN_FLIGHT)
            .map(|chunk| {
                let offset = 2 * chunk * chunk_bytes;
                (offset, spare.then_some(offset + chunk_bytes))
            })
            .collect();
        Ok(Self { region, chunk_pages, chunks })
    }

    fn bytes(&self) -> u64 {
        let with_spare = self.chunks.first().is_some_and(|(_, spare)| spare.is_some());
        (self.region.len() / if with_spare { 1 } else { 2 }) as u64
    }
}

/// One page of a call: what it is to be, and whether content is brought for it now.
#[derive(Clone, Copy, Debug)]
struct Step {
    position: usize,
    window_page: WindowPage,
    /// The word to be, absent.
    entry: Entry,
    load: bool,
}

/// An engine that shows copies.
#[derive(Debug)]
pub struct Cached<F> {
    /// Dropped first: nothing serves a window whose memory goes.
    fault_thread: Option<FaultThread>,
    shared: Arc<Shared<F>>,
    page: PageSize,
    chunk_pages: usize,
    evict_gap_pages: u64,
    /// The staging memory, made when it is first needed; held for a whole call.
    control: Mutex<Option<Staging>>,
    /// Its size, to be told without waiting for a call to end.
    staging_bytes: AtomicU64,
}

impl<F: Frames> Cached<F> {
    /// A window of the store's pages as `table` says, all absent.
    pub fn new(
        store: Arc<Store>,
        frames: F,
        table: Table,
        calibration: &Calibration,
    ) -> Self {
        let page = store.page_size();
        let batch_bytes = calibration.batch_pages * system_page_bytes() as u64;
        let chunk_pages = page.index_of(batch_bytes).clamp(1, table.page_count());
        let state = State { table, shelf: HashMap::new() };
        let shared = Shared {
            store,
            frames,
            state: Mutex::new(state),
            counters: Counters::default(),
        };
        Self {
            fault_thread: None,
            shared: Arc::new(shared),
            page,
            chunk_pages: chunk_pages as usize,
            evict_gap_pages: calibration.evict_gap_pages,
            control: Mutex::new(None),
            staging_bytes: 0.into(),
        }
    }

    /// What a fault thread works on.
    pub fn shared(&self) -> &Arc<Shared<F>> {
        &self.shared
    }

    /// The same engine, its faults served by `thread` as long as it lives.
    #[must_use]
    pub fn served_by(mut self, thread: FaultThread) -> Self {
        self.fault_thread = Some(thread);
        self
    }

    fn bytes(&self, run: Run<WindowPage>) -> (usize, usize) {
        (offset_of(self.page, run.first), offset_of(self.page, WindowPage(run.count)))
    }

    fn ranges(&self, pages: impl IntoIterator<Item = WindowPage>) -> Vec<(usize, usize)> {
        plan::runs(pages).into_iter().map(|run| self.bytes(run)).collect()
    }

    /// Fails, before any change, if a page has content that would be lost.
    fn check_placed(
        &self,
        operation: &'static str,
        pages: &Pages<WindowPage>,
        discard: bool,
    ) -> Result<()> {
        let state = lock(&self.shared.state);
        if discard || state.table.counts().placed == 0 {
            return Ok(());
        }
        let placed = |page: &WindowPage| state.table.get(*page).shown() == Shown::Placed;
        match pages.iter().find(placed) {
            Some(page) => Err(Error::Placed { operation, window_page: page.0 }),
            None => Ok(()),
        }
    }

    /// Fails, before any change, if the absent ones of `pages` cannot fit in memory.
    fn check_memory(&self, operation: &'static str, pages: &Pages<WindowPage>) -> Result<()> {
        if self.page.bytes_of(pages.len() as u64) < UNCHECKED_BYTES {
            return Ok(());
        }
        let state = lock(&self.shared.state);
        let absent = pages.iter().filter(|page| !state.table.get(*page).present()).count();
        drop(state);
        let wanted = self.page.bytes_of(absent as u64);
        let available = pagemap::available_bytes().map_err(|e| Error::system(operation, e))?;
        if wanted > available {
            return Err(Error::Memory { operation, wanted, available });
        }
        Ok(())
    }

    fn remap_steps(
        &self,
        changes: &Changes,
        options: RemapOptions,
        piece: Range<usize>,
        resident: Option<Vec<bool>>,
        mask: &mut [bool],
    ) -> Vec<Step> {
        let state = lock(&self.shared.state);
        let mut steps = Vec::with_capacity(piece.len());
        for position in piece.clone() {
            let (window_page, file_page) = changes.pair(position);
            let old = state.table.get(window_page);
            let prot = options.prot.unwrap_or(old.prot());
            let entry = Entry::new(Shown::File(file_page), prot);
            let same = old.shown() == entry.shown() && old.prot() == prot;
            if same && (old.present() || prot == Prot::None) {
                mask[position] = old.present();
                continue;
            }
            let wanted = match (&resident, options.fill) {
                (Some(resident), _) => resident[position - piece.start],
                (None, fill) => fill == Fill::All,
            };
            let load = wanted && prot != Prot::None;
            steps.push(Step { position, window_page, entry, load });
        }
        steps
    }

    /// Steps that bring the absent pages of a piece which show a file page.
    fn populate_steps(
        &self,
        pages: &Pages<WindowPage>,
        piece: Range<usize>,
        mask: &mut [bool],
    ) -> Vec<Step> {
        let state = lock(&self.shared.state);
        let mut steps = Vec::new();
        for position in piece {
            let window_page = pages.at(position);
            let entry = state.table.get(window_page);
            mask[position] = entry.present();
            let absent = !entry.present() && entry.prot() != Prot::None;
            if absent && entry.shown().file_page().is_some() {
                let entry = entry.with_present(false);
                steps.push(Step { position, window_page, entry, load: true });
            }
        }
        steps
    }

    /// Brings the content of the steps that load and changes the others in their
    /// turn, so that what is completed is always a front part of the call.
    fn carry_out(
        &self,
        control: &mut Option<Staging>,
        steps: &[Step],
        mask: &mut [bool],
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let loads: Vec<usize> = (0..steps.len()).filter(|&step| steps[step].load).collect();
        let mut next_step = 0;
        if !loads.is_empty() {
            let files: Vec<FilePage> = loads
                .iter()
                .map(|&step| steps[step].entry.shown().file_page().expect("loads have a file page"))
                .collect();
            let staging = self.staging(control)?;
            let Staging { region, chunk_pages, chunks } = staging;
            let mut loader = Loader {
                cached: self,
                region,
                chunk_pages: *chunk_pages,
                chunks,
                steps,
                loads: &loads,
                next_step: 0,
                mask,
            };
            let result = self.shared.store.scatter(&files, &mut loader, interrupt);
            next_step = loader.next_step;
            if let Err(error) = result {
                let position = |step: &Step| step.position;
                let end = steps.last().map_or(0, |step| step.position + 1);
                return Err(error.with_completed(steps.get(next_step).map_or(end, position)));
            }
        }
        self.change_absent(&steps[next_step..])
    }

    fn staging<'a>(&self, control: &'a mut Option<Staging>) -> Result<&'a mut Staging> {
        if control.is_none() {
            let staging = Staging::new(&self.shared.frames, self.page, self.chunk_pages)?;
            self.staging_bytes.store(staging.bytes(), Ordering::Relaxed);
            *control = Some(staging);
        }
        Ok(control.as_mut().expect("made above"))
    }

    /// Carries out steps that bring nothing: their pages become absent.
    fn change_absent(&self, steps: &[Step]) -> Result<()> {
        for steps in steps.chunks(STEP_PAGES) {
            let mut state = lock(&self.shared.state);
            self.change_absent_locked(&mut state, steps)
                .map_err(|errno| Error::system("remap", errno))?;
        }
        Ok(())
    }

    fn change_absent_locked(&self, state: &mut State, steps: &[Step]) -> Result<(), Errno> {
        let frames = &self.shared.frames;
        let (mut denied, mut allowed, mut dropped) = (Vec::new(), Vec::new(), Vec::new());
        for step in steps {
            let old = state.table.update(step.window_page, without_content);
            match (old.prot(), step.entry.prot()) {
                (Prot::None, Prot::None) => {}
                (_, Prot::None) => denied.push(step.window_page),
                (Prot::None, _) => allowed.push(step.window_page),
                _ if old.present() || old.unreadable() => dropped.push(step.window_page),
                _ => {}
            }
        }
        frames.drop_pages(&self.ranges(dropped))?;
        frames.deny(&self.ranges(denied))?;
        frames.allow(&self.ranges(allowed))?;
        for step in steps {
            state.shelf.remove(&step.window_page);
            state.table.set(step.window_page, step.entry);
        }
        Ok(())
    }

    /// Puts one run of staged pages into the window and into the table.
    /// Returns how it was done, or the pages done and why no more.
    fn install(
        &self,
        state: &mut State,
        run: Run<WindowPage>,
        entry_of: impl Fn(u64) -> Entry,
        from: Span<'_>,
        spare: Option<Span<'_>>,
    ) -> Result<Filled, (u64, Errno)> {
        let before = Before {
            present: state.table.any(run, Entry::present),
            unreadable: state.table.any(run, |e| e.unreadable() || e.prot() == Prot::None),
        };
        for page in run.pages() {
            state.table.update(page, without_content);
        }
        let (offset, _) = self.bytes(run);
        let result = self.shared.frames.fill(offset, from, spare, before);
        let done = match &result {
            Ok(_) => run.count,
            Err(partial) => self.page.index_of(partial.done_bytes as u64),
        };
        for index in 0..done {
            let page = run.first.offset(index);
            state.shelf.remove(&page);
            state.table.set(page, entry_of(index).with_present(true));
        }
        Counters::add(&self.shared.counters.pages_loaded, done);
        match result {
            Ok(filled) => {
                let moved = if filled == Filled::Moved { done } else { 0 };
                Counters::add(&self.shared.counters.pages_moved, moved);
                Ok(filled)
            }
            Err(partial) => Err((done, partial.errno)),
        }
    }

    /// Puts the frames that came out of the window where the next chunk is read to.
    fn recycle(
        &self,
        region: &Region,
        chunk: &mut (usize, Option<usize>),
        used_bytes: usize,
        chunk_bytes: usize,
        all_moved: bool,
    ) {
        let Some(spare) = chunk.1 else { return };
        if all_moved && used_bytes == chunk_bytes {
            *chunk = (spare, Some(chunk.0));
            return;
        }
        let front = region.span(chunk.0, used_bytes);
        let back = region.span(spare, used_bytes);
        if all_moved && self.shared.frames.give_back(front, back) {
            return;
        }
        // Freeing them keeps the invariant of spare memory; if even that fails,
        // the next fill meets EEXIST and copies instead.
        let _freed = region.advise(spare, used_bytes, self.shared.frames.dont_need());
    }

    fn evict_locked(
        &self,
        state: &mut State,
        pages: impl Iterator<Item = WindowPage>,
    ) -> Result<(), Errno> {
        let mut there = Vec::new();
        for page in pages {
            let old = state.table.get(page);
            if old.present() || old.unreadable() {
                there.push(page);
            }
            if old.shown() == Shown::Placed {
                state.shelf.remove(&page);
                state.table.set(page, Entry::new(Shown::Nothing, old.prot()));
            } else if old.present() {
                state.table.set(page, old.with_present(false));
            } else if old.withheld() {
                state.table.set(page, old.with_withheld(false));
            }
        }
        let table = &state.table;
        let absent = |page| {
            let entry: Entry = table.get(page);
            !entry.present() && !entry.unreadable() && entry.prot() != Prot::None
        };
        let runs = plan::join_runs(plan::runs(there.iter().copied()), self.evict_gap_pages, absent);
        let ranges: Vec<_> = runs.into_iter().map(|run| self.bytes(run)).collect();
        self.shared.frames.drop_pages(&ranges)?;
        for &page in &there {
            state.table.update(page, |entry| entry.with_present(false));
        }
        Counters::add(&self.shared.counters.pages_evicted, there.len() as u64);
        Ok(())
    }

    fn withhold(&self, pages: impl Iterator<Item = WindowPage>) -> Result<()> {
        let mut state = lock(&self.shared.state);
        let state = &mut *state;
        let mut changed = Vec::new();
        for page in pages {
            let old = state.table.get(page);
            if old.prot() == Prot::None || changed.last() == Some(&(page, old)) {
                continue;
            }
            if old.shown() == Shown::Placed {
                let content = self.shared.frames.region();
                let content = content.span(offset_of(self.page, page), self.page.bytes()).to_vec();
                state.shelf.insert(page, content);
            }
            changed.push((page, old));
        }
        for (page, _) in &changed {
            state.table.update(*page, |entry| entry.with_present(false));
        }
        let ranges = self.ranges(changed.iter().map(|(page, _)| *page));
        let denied = self.shared.frames.deny(&ranges);
        for (page, old) in changed {
            // What is on the shelf stays there, also where the kernel refused.
            if denied.is_ok() || old.shown() == Shown::Placed {
                let entry = old.with_present(false).with_prot(Prot::None);
                state.table.set(page, entry.with_withheld(old.present()));
            }
        }
        denied.map_err(|errno| Error::system("protect", errno))
    }

    fn give_access(
        &self,
        control: &mut Option<Staging>,
        pages: impl Iterator<Item = WindowPage>,
        prot: Prot,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let mut loads = Vec::new();
        let mut shelved = Vec::new();
        {
            let mut state = lock(&self.shared.state);
            let mut allowed = Vec::new();
            for (position, window_page) in pages.enumerate() {
                let old = state.table.get(window_page);
                if old.prot() != Prot::None {
                    continue;
                }
                let entry = old.with_present(false).with_prot(prot);
                if old.shown() == Shown::Placed {
                    shelved.push((window_page, entry));
                } else if old.withheld() && !F::LAZY {
                    loads.push(Step { position, window_page, entry, load: true });
                } else if allowed.last() != Some(&(window_page, entry)) {
                    allowed.push((window_page, entry));
                }
            }
            let ranges = self.ranges(allowed.iter().map(|(page, _)| *page));
            let allow = self.shared.frames.allow(&ranges);
            allow.map_err(|errno| Error::system("protect", errno))?;
            for (page, entry) in allowed {
                state.table.set(page, entry);
            }
        }
        for (page, entry) in shelved {
            self.unshelve(control, page, entry)?;
        }
        let mut mask = vec![false; loads.last().map_or(0, |step| step.position + 1)];
        self.carry_out(control, &loads, &mut mask, interrupt)
    }

    /// Puts the content of a placed page back into the window.
    fn unshelve(
        &self,
        control: &mut Option<Staging>,
        page: WindowPage,
        entry: Entry,
    ) -> Result<()> {
        let Some(content) = lock(&self.shared.state).shelf.get(&page).cloned() else {
            return Ok(());
        };
        self.put(control, Run { first: page, count: 1 }, |_| entry, |_| &content)
            .map_err(|errno| Error::system("protect", errno))
    }

    /// Puts bytes into the window by way of the staging memory. `run` is no
    /// longer than a chunk.
    fn put<'d>(
        &self,
        control: &mut Option<Staging>,
        run: Run<WindowPage>,
        entry_of: impl Fn(u64) -> Entry,
        content_of: impl Fn(u64) -> &'d [u8],
    ) -> Result<(), Errno> {
        let staging = self.staging(control).map_err(|error| match error {
            Error::Io { errno, .. } => errno,
            _ => Errno::NOMEM,
        })?;
        let chunk_bytes = staging.chunk_pages * self.page.bytes();
        let chunk = &mut staging.chunks[0];
        let (_, used) = self.bytes(run);
        let from = staging.region.span(chunk.0, used);
        for index in 0..run.count {
            let slot = offset_of(self.page, WindowPage(index));
            from.part(slot, self.page.bytes()).copy_from(content_of(index));
        }
        let spare = chunk.1.map(|spare| staging.region.span(spare, used));
        let mut state = lock(&self.shared.state);
        let filled = self.install(&mut state, run, entry_of, from, spare);
        drop(state);
        let moved = filled.as_ref().is_ok_and(|filled| *filled == Filled::Moved);
        self.recycle(&staging.region, chunk, used, chunk_bytes, moved);
        filled.map(|_| ()).map_err(|(_, errno)| errno)
    }

    fn place_run<'d>(
        &self,
        control: &mut Option<Staging>,
        run: Run<WindowPage>,
        content_of: impl Fn(usize) -> &'d [u8],
    ) -> Result<()> {
        let prots: Vec<Prot> = {
            let state = lock(&self.shared.state);
            run.pages().map(|page| state.table.get(page).prot()).collect()
        };
        let pages = run.pages().zip(0..);
        let open = pages.clone().filter(|&(_, index)| prots[index] != Prot::None);
        for piece in plan::runs(open.map(|(page, _)| page)) {
            let first = (piece.first.0 - run.first.0) as usize;
            let entry_of = |index| Entry::new(Shown::Placed, prots[first + index as usize]);
            self.put(control, piece, entry_of, |index| content_of(first + index as usize))
                .map_err(|errno| Error::system("place", errno))?;
        }
        let mut state = lock(&self.shared.state);
        for (page, index) in pages.filter(|&(_, index)| prots[index] == Prot::None) {
            state.shelf.insert(page, content_of(index).to_vec());
            state.table.set(page, Entry::new(Shown::Placed, Prot::None));
        }
        Ok(())
    }

    /// Makes what pages show their own: brings what is absent, then cuts the tie
    /// to the file.
    fn place_shown(
        &self,
        control: &mut Option<Staging>,
        pages: &Pages<WindowPage>,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let nothing = |page: &WindowPage| {
            lock(&self.shared.state).table.get(*page).shown() == Shown::Nothing
        };
        if let Some(page) = pages.iter().find(nothing) {
            return Err(Error::Argument(format!(
                "place: window page {} shows nothing, so there is no content to keep; pass data",
                page.0
            )));
        }
        let mut mask = vec![false; pages.len()];
        for piece in pieces(pages.len()) {
            let steps = self.populate_steps(pages, piece.clone(), &mut mask);
            self.carry_out(control, &steps, &mut mask, interrupt)?;
            for position in piece {
                self.cut_tie(pages.at(position)).map_err(|e| e.with_completed(position))?;
            }
        }
        Ok(())
    }

    fn cut_tie(&self, page: WindowPage) -> Result<()> {
        let entry = lock(&self.shared.state).table.get(page);
        let Shown::File(file_page) = entry.shown() else { return Ok(()) };
        let placed = Entry::new(Shown::Placed, entry.prot());
        if entry.prot() == Prot::None {
            let mut content = vec![0; self.page.bytes()];
            self.shared.store.read_page(file_page, Span::of(&mut content))?;
            let mut state = lock(&self.shared.state);
            state.shelf.insert(page, content);
            state.table.set(page, placed);
        } else {
            lock(&self.shared.state).table.set(page, placed.with_present(true));
        }
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
        let mut control = lock(&self.control);
        self.check_placed("remap", changes.window_pages(), options.discard)?;
        if options.fill == Fill::All {
            self.check_memory("remap", changes.window_pages())?;
        }
        let mut mask = vec![false; changes.len()];
        for piece in pieces(changes.len()) {
            let completed = |error: Error, done| error.with_completed(piece.start + done);
            interrupt.check().map_err(|error| completed(error, 0))?;
            let resident = match options.fill {
                Fill::Resident => {
                    let files = piece.clone().map(|position| changes.pair(position).1).collect();
                    Some(self.shared.store.resident(&Pages::List(files))?)
                }
                Fill::All | Fill::Nothing => None,
            };
            let steps = self.remap_steps(changes, options, piece.clone(), resident, &mut mask);
            self.carry_out(&mut control, &steps, &mut mask, interrupt)?;
        }
        Ok(mask)
    }

    fn populate(
        &self,
        pages: &Pages<WindowPage>,
        fill: Fill,
        interrupt: &dyn Interrupt,
    ) -> Result<Vec<bool>> {
        let mut control = lock(&self.control);
        if fill == Fill::All {
            self.check_memory("populate", pages)?;
        }
        let mut mask = vec![false; pages.len()];
        for piece in pieces(pages.len()) {
            interrupt.check().map_err(|error| error.with_completed(piece.start))?;
            let mut steps = self.populate_steps(pages, piece, &mut mask);
            if fill == Fill::Resident {
                let files = steps.iter().filter_map(|step| step.entry.shown().file_page());
                let resident = self.shared.store.resident(&Pages::List(files.collect()))?;
                let mut resident = resident.into_iter();
                steps.retain(|_| resident.next().unwrap_or(false));
            }
            self.carry_out(&mut control, &steps, &mut mask, interrupt)?;
        }
        Ok(mask)
    }

    fn evict(&self, pages: &Pages<WindowPage>, discard: bool) -> Result<()> {
        let _control = lock(&self.control);
        self.check_placed("evict", pages, discard)?;
        for piece in pieces_of(pages.len(), STEP_PAGES) {
            let mut state = lock(&self.shared.state);
            self.evict_locked(&mut state, piece.map(|position| pages.at(position)))
                .map_err(|errno| Error::system("evict", errno))?;
        }
        Ok(())
    }

    fn protect(
        &self,
        pages: &Pages<WindowPage>,
        prot: Prot,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let mut control = lock(&self.control);
        for piece in pieces_of(pages.len(), STEP_PAGES) {
            interrupt.check().map_err(|error| error.with_completed(piece.start))?;
            let chosen = piece.map(|position| pages.at(position));
            if prot == Prot::None {
                self.withhold(chosen)?;
            } else {
                self.give_access(&mut control, chosen, prot, interrupt)?;
            }
        }
        Ok(())
    }

    fn place(
        &self,
        pages: &Pages<WindowPage>,
        data: Option<&[u8]>,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let mut control = lock(&self.control);
        let Some(data) = data else {
            return self.place_shown(&mut control, pages, interrupt);
        };
        let page_bytes = self.page.bytes();
        let mut position = 0;
        for run in plan::runs(pages.iter()) {
            for run in split_run(run, self.chunk_pages as u64) {
                interrupt.check().map_err(|error| error.with_completed(position))?;
                self.place_run(&mut control, run, |index| {
                    placed_bytes(data, position + index, page_bytes)
                })?;
                position += run.count as usize;
            }
        }
        Ok(())
    }

    fn flush(&self, _pages: &Pages<WindowPage>) -> Result<()> {
        // A read-only window has nothing to write.
        Ok(())
    }

    fn present(&self) -> Result<Vec<bool>> {
        Ok(lock(&self.shared.state).table.entries().map(Entry::present).collect())
    }

    fn entries(&self) -> Vec<Entry> {
        lock(&self.shared.state).table.entries().collect()
    }

    fn stats(&self) -> Stats {
        let state = lock(&self.shared.state);
        let counts = state.table.counts();
        Stats {
            present_pages: counts.present,
            placed_pages: counts.placed,
            denied_pages: counts.denied,
            table_bytes: state.table.bytes(),
            staging_bytes: self.staging_bytes.load(Ordering::Relaxed),
            ..Stats::of(&self.shared.counters)
        }
    }
}

/// Puts chunks into the window as their reads complete.
struct Loader<'a, 'm, F> {
    cached: &'a Cached<F>,
    region: &'m Region,
    chunk_pages: usize,
    chunks: &'a mut Vec<(usize, Option<usize>)>,
    steps: &'a [Step],
    /// The steps that load, by request of the reads.
    loads: &'a [usize],
    /// Steps before this one are completed.
    next_step: usize,
    mask: &'a mut [bool],
}

impl<F: Frames> Loader<'_, '_, F> {
    fn chunk_bytes(&self) -> usize {
        self.chunk_pages * self.cached.page.bytes()
    }

    /// The requests from `first` on, before `end`, whose window pages follow one another.
    fn run(&self, first: usize, end: usize) -> Run<WindowPage> {
        let page_of = |request: usize| self.steps[self.loads[request]].window_page;
        let mut run = Run { first: page_of(first), count: 1 };
        while first + (run.count as usize) < end
            && page_of(first + run.count as usize) == run.end()
        {
            run.count += 1;
        }
        run
    }

    /// Changes the pages before step `end` for which nothing is read.
    fn change_absent_before(&mut self, state: &mut State, end: usize) -> Result<(), Errno> {
        let steps = &self.steps[self.next_step..end];
        let absent: Vec<Step> = steps.iter().filter(|step| !step.load).copied().collect();
        if !absent.is_empty() {
            self.cached.change_absent_locked(state, &absent)?;
        }
        self.next_step = end;
        Ok(())
    }

    fn put_chunk(&mut self, requests: Range<usize>) -> Result<bool, Errno> {
        let cached = self.cached;
        let (front, back) = self.chunks[(requests.start / self.chunk_pages) % self.chunks.len()];
        let mut state = lock(&cached.shared.state);
        let mut all_moved = true;
        let mut request = requests.start;
        while request < requests.end {
            let run = self.run(request, requests.end);
            self.change_absent_before(&mut state, self.loads[request])?;
            let slot = (request % self.chunk_pages) * cached.page.bytes();
            let (_, len) = cached.bytes(run);
            let from = self.region.span(front + slot, len);
            let spare = back.map(|back| self.region.span(back + slot, len));
            let step_of = |index: u64| &self.steps[self.loads[request + index as usize]];
            let filled = cached.install(&mut state, run, |i| step_of(i).entry, from, spare);
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
        self.chunk_pages
    }

    fn chunks_in_flight(&self) -> usize {
        self.chunks.len()
    }

    fn buffer(&mut self, chunk: usize) -> Span<'m> {
        let (front, _) = self.chunks[chunk % self.chunks.len()];
        self.region.span(front, self.chunk_bytes())
    }

    fn complete(&mut self, requests: Range<usize>) -> Result<()> {
        let index = (requests.start / self.chunk_pages) % self.chunks.len();
        let used = requests.len() * self.cached.page.bytes();
        let chunk_bytes = self.chunk_bytes();
        let result = self.put_chunk(requests);
        let moved = result == Ok(true);
        self.cached.recycle(self.region, &mut self.chunks[index], used, chunk_bytes, moved);
        result.map(|_| ()).map_err(|errno| Error::system("remap", errno))
    }
}

/// The word of a page whose content is about to go: what is placed and not on
/// the shelf is lost with it.
fn without_content(entry: Entry) -> Entry {
    if !entry.present() {
        entry
    } else if entry.shown() == Shown::Placed {
        Entry::new(Shown::Nothing, entry.prot())
    } else {
        entry.with_present(false)
    }
}

/// Where a window page begins.
#[must_use]
pub fn offset_of(page: PageSize, window_page: WindowPage) -> usize {
    page.bytes_of(window_page.0) as usize
}

fn pieces(len: usize) -> impl Iterator<Item = Range<usize>> {
    pieces_of(len, PIECE_PAGES)
}

fn pieces_of(len: usize, piece: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(piece).map(move |start| start..len.min(start + piece))
}

fn split_run(run: Run<WindowPage>, max: u64) -> impl Iterator<Item = Run<WindowPage>> {
    (0..run.count).step_by(max as usize).map(move |start| Run {
        first: run.first.offset(start),
        count: max.min(run.count - start),
    })
}
