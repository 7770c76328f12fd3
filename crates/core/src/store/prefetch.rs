//! Starting reads for pages that the program will need later.
//!
//! Asking the kernel for a run of pages takes 1 to 20 µs. The caller asks for a few runs itself.
//! More runs go to a queue of the store, which up to four threads work on.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::part::File;
use super::Store;
use crate::error::{Interrupt, Result, Uninterruptible};
use crate::room::room_for;
use crate::sys::file as sys_file;
use crate::sys::fork_lock::ForkLock;
use crate::sys::thread::spawn_without_signals;
use crate::units::{FilePage, PageIndex, PageSize, Pages};

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

/// The files that runs are in, as they were when the call was made.
#[derive(Clone, Debug)]
struct Files(Arc<[Place]>);

#[derive(Debug)]
struct Place {
    file: Arc<File>,
    first_page: u64,
    /// Bytes of the store in it.
    bytes: u64,
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
        if self.is_provided() {
            self.provide_ahead(&runs);
            return Ok(());
        }
        let calls = |run: &Range<u64>| {
            let bytes = self.page_size().bytes_of(run.end - run.start);
            bytes.div_ceil(MAX_RUN_BYTES)
        };
        let files = self.files()?;
        let mut left = runs;
        if left.iter().map(calls).sum::<u64>() > INLINE_CALLS {
            match self.enqueue(left, &files)? {
                None => return Ok(()),
                Some(refused) => left = refused,
            }
        }
        // Few, or no thread is to be had.
        let mut asked = 0;
        for run in &left {
            for (part, start, len) in files.stretches(run, self.page_size()) {
                if asked % INTERRUPT_CALLS == 0 {
                    interrupt.check()?;
                }
                asked += 1;
                files.ask(part, start, len).map_err(|errno| {
                    Self::part_error("prefetch", &self.parts.all()[part], errno)
                })?;
            }
        }
        Ok(())
    }

    /// The files, for threads to keep open.
    fn files(&self) -> Result<Files> {
        let mut files = room_for("prefetch", self.parts.all().len())?;
        files.extend(self.parts.all().iter().enumerate().map(|(index, part)| Place {
            file: Arc::clone(&part.file),
            first_page: part.first.0,
            bytes: self.part_bytes(index),
        }));
        Ok(Files(files.into()))
    }

    /// Has threads ask for the runs; gives them back where none can be started.
    fn enqueue(&self, runs: Runs, files: &Files) -> Result<Option<Runs>> {
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
            let (prefetches, files, page) =
                (Arc::clone(&self.prefetches), files.clone(), self.page_size());
            let serve = move || serve(&prefetches, &files, page);
            if spawn_without_signals("fremap-prefetch", serve).is_ok() {
                queue.threads += 1;
            }
        }
        Ok(if queue.threads == 0 { queue.waiting.pop_back() } else { None })
    }
}

/// What a thread does: one request after another, until none waits.
fn serve(prefetches: &ForkLock<Queue>, files: &Files, page: PageSize) {
    loop {
        let next = {
            let mut queue = prefetches.lock();
            let next = queue.waiting.pop_front();
            queue.threads -= u32::from(next.is_none());
            next
        };
        let Some(runs) = next else { return };
        // Nobody waits for a hint, so nobody is told that it was refused.
        let _refused = runs.iter().try_for_each(|run| {
            files
                .stretches(run, page)
                .try_for_each(|(part, start, len)| files.ask(part, start, len))
        });
    }
}

impl Files {
    /// A run as pieces to be asked for: the number of the file, offset and length in bytes.
    fn stretches(
        &self,
        run: &Range<u64>,
        page: PageSize,
    ) -> impl Iterator<Item = (usize, u64, u64)> + '_ {
        let run = run.clone();
        let first = self.0.partition_point(|place| place.first_page <= run.start).max(1) - 1;
        let places = self.0.iter().enumerate().skip(first);
        let within = places.take_while({
            let end = run.end;
            move |(_, place)| place.first_page < end
        });
        within.flat_map(move |(part, place)| {
            let start = page.bytes_of(run.start.saturating_sub(place.first_page));
            let end = page.bytes_of(run.end - place.first_page).min(place.bytes);
            let starts = (start..end).step_by(MAX_RUN_BYTES as usize);
            starts.map(move |start| (part, start, MAX_RUN_BYTES.min(end - start)))
        })
    }

    fn ask(&self, part: usize, start: u64, len: u64) -> std::result::Result<(), Errno> {
        sys_file::advise_willneed(self.0[part].file.fd.as_fd(), start, len)
    }
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
        serve(&store.prefetches, &store.files().expect("files"), store.page_size());
        let queue = store.prefetches.lock();
        assert_eq!((queue.waiting.len(), queue.threads), (0, MAX_THREADS - 1));
    }
}
