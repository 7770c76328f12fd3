//! Starting reads for pages that the program will need later.
//!
//! Asking the kernel for a run of pages takes 1 to 20 µs. The caller asks for a few runs itself.
//! More runs go to a queue of the store, which up to four threads work on.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::part::{Part, Parts};
use super::Store;
use crate::error::{Interrupt, Result, Uninterruptible};
use crate::room::room_for;
use crate::sys::file as sys_file;
use crate::sys::fork_lock::ForkLock;
use crate::sys::thread::spawn_without_signals;
use crate::units::{FilePage, PageIndex, PageSize, Pages, Run};

/// Calls that are made by the caller; each takes 1 to 20 µs.
const INLINE_CALLS: u64 = 32;
/// Background threads that a store's prefetches may have at once.
const MAX_THREADS: u32 = 4;
/// Requests that wait on their own; those beyond are joined with the last one.
const MAX_WAITING: usize = 64;
/// Bytes asked for in one call: the kernel cuts what one call may start.
const MAX_RUN_BYTES: u64 = 2 << 20;
/// Calls between two questions whether to stop, where the caller makes them.
const INTERRUPT_CALLS: usize = 256;

/// Runs of a store's pages, rising and apart from each other.
type Runs = Vec<Range<u64>>;

/// What waits to be asked for, and who asks.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: VecDeque<Runs>,
    threads: u32,
    /// The process that the threads are in: a child of fork has none of them.
    owner: u32,
}

impl Store {
    /// Starts reading pages into the page cache and returns without waiting
    /// (`posix_fadvise(WILLNEED)` for each run of neighbours). A hint: the
    /// kernel may drop it, and shared memory has nothing to read.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io) where the first runs are refused;
    /// [`Error::Memory`](crate::error::Error::Memory) where they cannot be noted.
    pub fn prefetch(&self, pages: &Pages<FilePage>) -> Result<()> {
        self.prefetch_until(pages, &Uninterruptible)
    }

    /// The same, where the caller can be interrupted.
    ///
    /// # Errors
    /// As [`prefetch`](Self::prefetch), and [`Error::Interrupted`](crate::error::Error::Interrupted).
    pub fn prefetch_until(&self, pages: &Pages<FilePage>, interrupt: &dyn Interrupt) -> Result<()> {
        let runs = runs_of(pages, interrupt)?;
        if let Some(provider) = &self.provider {
            provider.provide_ahead(&runs);
            return Ok(());
        }
        let calls = |run: &Range<u64>| {
            let bytes = self.page_size().bytes_of(run.end - run.start);
            bytes.div_ceil(MAX_RUN_BYTES)
        };
        let mut left = runs;
        if left.iter().map(calls).sum::<u64>() > INLINE_CALLS {
            match self.enqueue(left)? {
                None => return Ok(()),
                Some(refused) => left = refused,
            }
        }
        // Few, or no thread is to be had.
        let calls = left.iter().flat_map(|run| calls_of(&self.parts, run, self.page_size()));
        for (number, (part, start, len)) in calls.enumerate() {
            if number % INTERRUPT_CALLS == 0 {
                interrupt.check()?;
            }
            sys_file::advise_willneed(part.fd(), start, len)
                .map_err(|errno| Self::part_error("prefetch", part, errno))?;
        }
        Ok(())
    }

    /// Has threads ask for the runs; gives them back where none can be started.
    fn enqueue(&self, runs: Runs) -> Result<Option<Runs>> {
        let mut queue = self.prefetches.lock();
        let process = crate::sys::process::id();
        if queue.owner != process {
            *queue = Queue { owner: process, ..Queue::default() };
        }
        if queue.waiting.len() < MAX_WAITING {
            queue.waiting.push_back(runs);
        } else if let Some(last) = queue.waiting.back_mut() {
            *last = union(last, &runs)?;
        }
        if queue.threads < MAX_THREADS {
            let (prefetches, parts) = (Arc::clone(&self.prefetches), Arc::clone(&self.parts));
            let page_size = self.page_size();
            let serve = move || serve(&prefetches, &parts, page_size);
            if spawn_without_signals("fremap-prefetch", serve).is_ok() {
                queue.threads += 1;
            }
        }
        Ok(if queue.threads == 0 { queue.waiting.pop_back() } else { None })
    }
}

/// What a thread does: one request after another, until none waits.
fn serve(prefetches: &ForkLock<Queue>, parts: &Parts, page_size: PageSize) {
    loop {
        let next = {
            let mut queue = prefetches.lock();
            let next = queue.waiting.pop_front();
            queue.threads -= u32::from(next.is_none());
            next
        };
        let Some(runs) = next else { return };
        // Nobody waits for a hint, so nobody is told that it was refused.
        let mut calls = runs.iter().flat_map(|run| calls_of(parts, run, page_size));
        let _refused = calls
            .try_for_each(|(part, start, len)| sys_file::advise_willneed(part.fd(), start, len));
    }
}

/// What to ask for a run: the file, offset and length in bytes of each call.
fn calls_of<'p>(
    parts: &'p Parts,
    run: &Range<u64>,
    page_size: PageSize,
) -> impl Iterator<Item = (&'p Part, u64, u64)> {
    let run = Run { first: FilePage(run.start), count: run.end - run.start };
    parts.cut(run).flat_map(move |piece| {
        let part = parts.of(piece.first);
        let start = part.offset_of(piece.first, page_size);
        let end = start + page_size.bytes_of(piece.count);
        let starts = (start..end).step_by(MAX_RUN_BYTES as usize);
        starts.map(move |start| (part, start, MAX_RUN_BYTES.min(end - start)))
    })
}

/// The runs that a selection consists of.
fn runs_of(pages: &Pages<FilePage>, interrupt: &dyn Interrupt) -> Result<Runs> {
    let list = match pages {
        Pages::Range(range) => {
            let mut runs = room_for("prefetch", 1)?;
            runs.extend((!range.is_empty()).then(|| range.clone()));
            return Ok(runs);
        }
        Pages::List(list) => list,
    };
    let mut sorted: Vec<u64> = room_for("prefetch", list.len())?;
    sorted.extend(list.iter().map(|page| page.get()));
    interrupt.check()?;
    sorted.sort_unstable();
    interrupt.check()?;
    let apart = sorted.windows(2).filter(|pair| pair[1] - pair[0] > 1).count();
    let mut runs: Runs = room_for("prefetch", apart + 1)?;
    for page in sorted {
        append(&mut runs, page..page + 1);
    }
    Ok(runs)
}

/// Adds a run that begins no sooner than the last, joined to it where they meet.
fn append(runs: &mut Runs, run: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end >= run.start => last.end = last.end.max(run.end),
        _ => runs.push(run),
    }
}

/// The pages of both.
fn union(left: &[Range<u64>], right: &[Range<u64>]) -> Result<Runs> {
    let mut runs = room_for("prefetch", left.len() + right.len())?;
    let (mut left, mut right) = (left.iter().peekable(), right.iter().peekable());
    loop {
        let next = match (left.peek(), right.peek()) {
            (Some(one), Some(other)) if one.start <= other.start => left.next(),
            (_, Some(_)) => right.next(),
            (_, None) => left.next(),
        };
        let Some(run) = next else { return Ok(runs) };
        append(&mut runs, run.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(pages: &[u64]) -> Pages<FilePage> {
        Pages::List(pages.iter().copied().map(FilePage).collect())
    }

    #[test]
    fn neighbours_and_repeats_are_joined() {
        let runs = runs_of(&list(&[9, 3, 4, 3, 10, 20]), &Uninterruptible).expect("room");
        assert_eq!(runs, [3..5, 9..11, 20..21]);
        assert_eq!(runs_of(&Pages::Range(4..4), &Uninterruptible).expect("room"), []);
    }

    #[test]
    fn a_union_has_the_pages_of_both_once() {
        let both = union(&[0..4, 10..12, 30..31], &[2..6, 12..13, 20..21]).expect("room");
        assert_eq!(both, [0..6, 10..13, 20..21, 30..31]);
        assert_eq!(union(&[], &[1..2, 5..6]).expect("room"), [1..2, 5..6]);
    }

    #[test]
    fn requests_beyond_those_that_wait_are_joined_with_the_last() {
        let store = Store::memory(1 << 30, None).expect("memory");
        // As if each thread were at a long request: none is started, none takes what waits.
        let owner = crate::sys::process::id();
        *store.prefetches.lock() = Queue { threads: MAX_THREADS, owner, ..Queue::default() };
        // Too many runs for the caller to ask for, and none shared by two requests.
        let each = INLINE_CALLS + 8;
        let beyond = 6;
        for request in 0..MAX_WAITING as u64 + beyond {
            let pages: Vec<u64> = (0..each).map(|run| 2 * (request * each + run)).collect();
            store.prefetch(&list(&pages)).expect("noted");
        }
        let lens: Vec<usize> = store.prefetches.lock().waiting.iter().map(Vec::len).collect();
        let mut expected = vec![each as usize; MAX_WAITING - 1];
        expected.push(((1 + beyond) * each) as usize);
        assert_eq!(lens, expected);
        // The same once more adds nothing; its neighbours close the gaps.
        let first = 2 * (MAX_WAITING as u64 - 1) * each;
        let again: Vec<u64> = (0..each).map(|run| first + 2 * run).collect();
        store.prefetch(&list(&again)).expect("noted");
        assert_eq!(store.prefetches.lock().waiting.back().map(Vec::len), expected.last().copied());
        let gaps: Vec<u64> = again.iter().map(|page| page + 1).collect();
        store.prefetch(&list(&gaps)).expect("noted");
        let last = store.prefetches.lock().waiting.back().cloned().expect("waits");
        assert_eq!(last.len() as u64, beyond * each);
        assert_eq!(last[0], first..first + 2 * each + 1);
        // Whoever serves empties it, and is then no longer counted.
        serve(&store.prefetches, &store.parts, store.page_size());
        let queue = store.prefetches.lock();
        assert_eq!((queue.waiting.len(), queue.threads), (0, MAX_THREADS - 1));
    }
}
