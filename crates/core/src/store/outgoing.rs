//! Changed pages on their way to a store: neighbours are merged into runs, and the runs
//! of direct files are in flight together.
//!
//! A direct write waits for the device, so many overlap. What goes through the page
//! cache is a copy: one run after the other, which several at once do not hasten
//! (docs/decisions/011). It is written when the direct runs have ended: what is changed in
//! the page cache beside a direct write may keep the kernel from dropping what is out of date
//! there, which it then tells of as EIO.
//!
//! The kernel reads the memory of a write until it has ended, so no call returns before all
//! that it started has. The first run in the order of pages that fails is the one that is
//! told of; nothing behind it is started any more.

use std::ops::Range;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::io::Errno;

use super::write::completed_before;
use super::Store;
use crate::error::{Error, Interrupt, Result};
use crate::io::Pace;
use crate::sys::file::Parts;
use crate::sys::mm::system_page_bytes;
use crate::sys::ring::{Completion, Direction, Inline, OpenFile, Queue, Submission, DEPTH};
use crate::sys::span::Span;
use crate::units::FilePage;

/// Bytes of one write, unless a page is larger.
const MAX_RUN_BYTES: usize = 1 << 20;
/// Pages of one write: the kernel takes 1024 separate buffers.
const MAX_RUN_PAGES: usize = 256;
/// Bytes in flight from which on no run is begun: an interrupt waits for them.
const MAX_BYTES_IN_FLIGHT: usize = 8 << 20;
/// How long a wait for the device may keep the caller's interrupt waiting.
const WAIT: Duration = Duration::from_millis(50);
/// How often a write that ended with EAGAIN or EINTR, or got no further, is made again.
const AGAIN_LIMIT: u8 = 8;

/// A page to be written from memory that stays present.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'m> {
    /// The page of the store.
    pub page: FilePage,
    /// Its content, a page long. Of a direct store it begins with a page of memory.
    pub content: Span<'m>,
    /// Bytes of it that the file had when it was read.
    pub file_bytes: usize,
}

impl Store {
    /// Writes pages from memory that stays present, sorted by page and each named once.
    /// Neighbours are written together, and all that goes past the page cache is in flight
    /// together. Of each no more is written than the file had when the page was read, nor
    /// than it has now: pages that the file has lost are an error.
    ///
    /// # Errors
    /// As [`write`](Self::write), with the number of pages from the front that are known to
    /// be written. Of those behind them some may be, too.
    pub fn write_from(&self, pages: &[Outgoing<'_>], interrupt: &dyn Interrupt) -> Result<()> {
        debug_assert!(pages.windows(2).all(|pair| pair[0].page < pair[1].page), "sorted");
        let mut transfer = Transfer {
            store: self,
            pages,
            runs: runs_of(self, pages),
            pace: Pace::new(interrupt),
            way: Way::Direct,
            next: 0,
            bytes_in_flight: 0,
            failure: None,
            interrupted: None,
        };
        transfer.write_past_the_cache();
        transfer.write_through_the_cache();
        transfer.outcome()
    }
}

/// Neighbours in one file, which are written together.
#[derive(Debug)]
struct Run {
    /// Which of the pages they are.
    pages: Range<usize>,
    /// Bytes of them that the file had when they were read.
    len: usize,
    /// Bytes from the front that are written.
    written: usize,
    /// Where that ends which is being written.
    until: usize,
    /// How often a write got no further.
    again: u8,
}

fn runs_of(store: &Store, pages: &[Outgoing<'_>]) -> Vec<Run> {
    let page_bytes = store.page_size().bytes();
    let limit = (MAX_RUN_BYTES / page_bytes).clamp(1, MAX_RUN_PAGES);
    let mut runs = Vec::new();
    let mut start = 0;
    while start < pages.len() {
        let rest = &pages[start..];
        let end = store.parts().end(store.parts().index_of(rest[0].page));
        let follows = |pair: &[Outgoing<'_>]| {
            let [page, next] = [pair[0].page, pair[1].page];
            page.0 + 1 == next.0 && next < end && pair[0].file_bytes == page_bytes
        };
        let count = 1 + rest.windows(2).take(limit - 1).take_while(|pair| follows(pair)).count();
        let len = (count - 1) * page_bytes + rest[count - 1].file_bytes;
        runs.push(Run { pages: start..start + count, len, written: 0, until: 0, again: 0 });
        start += count;
    }
    runs
}

/// How bytes get to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Past the page cache, in whole pages of the system.
    Direct,
    /// Through it.
    Cached,
}

struct Transfer<'a, 'm> {
    store: &'a Store,
    pages: &'a [Outgoing<'m>],
    /// In the order of pages.
    runs: Vec<Run>,
    pace: Pace<'a>,
    /// How what is begun is written.
    way: Way,
    /// The run that is begun next.
    next: usize,
    bytes_in_flight: usize,
    /// The first run that could not be written, and why.
    failure: Option<(usize, Error)>,
    /// The caller wants it to stop.
    interrupted: Option<Error>,
}

impl<'a, 'm> Transfer<'a, 'm> {
    /// Of the runs of direct files what `O_DIRECT` can write.
    fn write_past_the_cache(&mut self) {
        let store = self.store;
        let is_direct = |run: &&Run| {
            let first = self.pages[run.pages.start].page;
            store.parts().of(first).file.direct_fd.is_some()
        };
        match self.runs.iter().filter(is_direct).count() {
            0 => {}
            1 => self.write(Way::Direct, &mut Inline::default()),
            _ if store.memory_backed() => self.write(Way::Direct, &mut Inline::default()),
            count => store.rings().together(count, |queue| self.write(Way::Direct, queue)),
        }
    }

    /// All else, and what a direct file has behind its last whole page of the system.
    fn write_through_the_cache(&mut self) {
        self.write(Way::Cached, &mut Inline::default());
    }

    fn outcome(self) -> Result<()> {
        if let Some(error) = self.interrupted {
            let unwritten = self.runs.iter().find(|run| run.written < run.len);
            let completed = unwritten.map_or(self.pages.len(), |run| run.pages.start);
            return Err(error.with_completed(completed));
        }
        let Some((number, error)) = self.failure else { return Ok(()) };
        let start = self.runs[number].pages.start;
        Err(completed_before(error, self.pages[start].page, start))
    }

    /// Writes what can be written in one way. Returns when nothing is in flight.
    fn write(&mut self, way: Way, queue: &mut dyn Queue<'a, 'm>) {
        (self.way, self.next) = (way, 0);
        let mut ended = Vec::with_capacity(DEPTH);
        loop {
            while queue.room() > 0 && self.bytes_in_flight < MAX_BYTES_IN_FLIGHT {
                let Some(number) = self.begin_next() else { break };
                self.push(number, queue);
            }
            if queue.in_flight() == 0 {
                return;
            }
            queue.wait(if queue.in_flight() > 32 { 8 } else { 1 }, WAIT, &mut ended);
            let count = ended.len();
            for completion in ended.drain(..) {
                self.end(completion, queue);
            }
            let more = queue.in_flight() > 0 || self.matters(self.next);
            if more && self.interrupted.is_none() {
                self.interrupted = self.pace.check(count).err();
            }
        }
    }

    /// Whether a run is worth going on with.
    fn matters(&self, number: usize) -> bool {
        let end = self.failure.as_ref().map_or(self.runs.len(), |(failed, _)| *failed);
        self.interrupted.is_none() && number < end
    }

    /// The next run of which there is something to write.
    fn begin_next(&mut self) -> Option<usize> {
        while self.matters(self.next) {
            let number = self.next;
            self.next += 1;
            match self.begin(number) {
                Err(error) => self.fail(number, error),
                Ok(()) if self.runs[number].written < self.runs[number].until => {
                    return Some(number);
                }
                Ok(()) => self.finish(number),
            }
        }
        None
    }

    /// Decides how much of a run is written, by how long the file is now.
    fn begin(&mut self, number: usize) -> Result<()> {
        let store = self.store;
        let run = &mut self.runs[number];
        let first = self.pages[run.pages.start].page;
        let direct = store.parts().of(first).file.direct_fd.is_some();
        run.until = run.written;
        if run.written == run.len || (self.way == Way::Direct && !direct) {
            return Ok(());
        }
        let left = store.size_now(first)?.saturating_sub(store.page_size().bytes_of(first.0));
        let len = run.len.min(usize::try_from(left).unwrap_or(usize::MAX));
        run.until = match self.way {
            Way::Direct => len - len % system_page_bytes(),
            Way::Cached => len,
        };
        Ok(())
    }

    /// Has the bytes of a run written that are to be and are not.
    fn push(&mut self, number: usize, queue: &mut dyn Queue<'a, 'm>) {
        let store = self.store;
        let run = &self.runs[number];
        let page_bytes = store.page_size().bytes();
        let mut parts = Parts::default();
        let mut at = run.written;
        while at < run.until {
            let within = at % page_bytes;
            let len = (page_bytes - within).min(run.until - at);
            let page = &self.pages[run.pages.start + at / page_bytes];
            parts.push(page.content.part(within, len));
            at += len;
        }
        let first = self.pages[run.pages.start].page;
        let part = store.parts().of(first);
        let fd = match (self.way, &part.file.direct_fd) {
            (Way::Direct, Some(direct)) => direct.as_fd(),
            _ => part.fd(),
        };
        self.bytes_in_flight += parts.bytes();
        queue.push(Submission {
            id: u32::try_from(number).expect("a window has fewer pages"),
            direction: Direction::Write,
            file: OpenFile::Borrowed(fd),
            offset_bytes: part.offset_of(first, store.page_size()) + run.written as u64,
            parts,
        });
    }

    /// Takes a write that has ended: good, or to be gone on with from where it stopped.
    fn end(&mut self, completion: Completion<'a, 'm>, queue: &mut dyn Queue<'a, 'm>) {
        let Completion { submission, result } = completion;
        self.bytes_in_flight -= submission.parts.bytes();
        let number = submission.id as usize;
        let result = match result {
            // The queue has failed, not the write. In a child of fork, where it always does,
            // the memory shows something else.
            Err(Errno::CANCELED) if !self.matters(number) => return,
            Err(Errno::CANCELED) => submission.carry_out(),
            result => result,
        };
        let stopped = match result {
            Ok(bytes) if self.advance(number, bytes) => None,
            // It takes no more, and does not say why.
            Ok(_) => Some(Errno::NOSPC),
            Err(errno @ (Errno::AGAIN | Errno::INTR)) => Some(errno),
            Err(errno) => return self.fail_with(number, errno),
        };
        let run = &mut self.runs[number];
        if let Some(errno) = stopped {
            run.again += 1;
            if run.again > AGAIN_LIMIT {
                return self.fail_with(number, errno);
            }
        }
        if run.written >= run.until {
            self.finish(number);
        } else if self.matters(number) {
            self.push(number, queue);
        }
    }

    /// Notes that so many bytes more of a run are written; says whether it got further. A
    /// direct write goes on from a whole page of the system.
    fn advance(&mut self, number: usize, bytes: usize) -> bool {
        let run = &mut self.runs[number];
        let mut end = run.written + bytes;
        if self.way == Way::Direct && end < run.until {
            end -= end % system_page_bytes();
        }
        let further = end - run.written;
        run.written = end;
        self.store.count().add_written(further);
        further > 0
    }

    /// Ends a run of which all is written that the file has: pages that it has lost are
    /// missing. Within the page that holds the end of the file nothing is.
    fn finish(&mut self, number: usize) {
        let (store, page_size) = (self.store, self.store.page_size());
        let run = &self.runs[number];
        if self.way == Way::Direct || run.until == run.len {
            return;
        }
        let pages = &self.pages[run.pages.clone()];
        let end = page_size.bytes_of(pages[0].page.0) + run.until as u64;
        let missing = FilePage(page_size.count_of(end));
        let lost = |outgoing: &&Outgoing<'_>| outgoing.page >= missing && outgoing.file_bytes > 0;
        if let Some(outgoing) = pages.iter().find(lost) {
            self.fail(number, store.truncated("write", outgoing.page));
        }
    }

    fn fail_with(&mut self, number: usize, errno: Errno) {
        let run = &self.runs[number];
        let page = &self.pages[run.pages.start + run.written / self.store.page_size().bytes()];
        self.fail(number, self.store.io_error("write", Some(page.page), errno));
    }

    fn fail(&mut self, number: usize, error: Error) {
        if self.failure.as_ref().is_none_or(|(first, _)| number < *first) {
            self.failure = Some((number, error));
        }
    }
}
