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

use rustix::io::Errno;

use super::write::completed_before;
use super::Store;
use crate::error::{Error, Interrupt, Result};
use crate::io::{
    transfer, Ended, Pace, Request, Transfer, Way, MAX_FLIGHT_BYTES, MAX_REQUEST_BYTES,
};
use crate::sys::file::Parts;
use crate::sys::mm::system_page_bytes;
use crate::sys::ring::Direction;
use crate::sys::span::Span;
use crate::units::FilePage;

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
        let mut writes = PageWrites {
            store: self,
            pages,
            runs: runs_of(self, pages),
            pace: Pace::new(interrupt),
            past_cache: true,
            next: 0,
            failure: None,
            interrupted: None,
        };
        transfer(&mut writes)?;
        // All else, and what a direct file has behind its last whole page of the system.
        (writes.past_cache, writes.next) = (false, 0);
        transfer(&mut writes)?;
        writes.outcome()
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
}

fn runs_of(store: &Store, pages: &[Outgoing<'_>]) -> Vec<Run> {
    let page_bytes = store.page_size().bytes();
    let limit = (MAX_REQUEST_BYTES / page_bytes).max(1);
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
        runs.push(Run { pages: start..start + count, len, written: 0, until: 0 });
        start += count;
    }
    runs
}

struct PageWrites<'a, 'm> {
    store: &'a Store,
    pages: &'a [Outgoing<'m>],
    /// In the order of pages.
    runs: Vec<Run>,
    pace: Pace<'a>,
    /// Of direct files what `O_DIRECT` can write, whole pages of the system; otherwise what is
    /// left.
    past_cache: bool,
    /// The run that is begun next.
    next: usize,
    /// The first run that could not be written, and why.
    failure: Option<(usize, Error)>,
    /// The caller wants it to stop.
    interrupted: Option<Error>,
}

impl<'m> PageWrites<'_, 'm> {
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

    /// Decides how much of a run is written, by how long the file is now.
    fn begin(&mut self, number: usize) -> Result<()> {
        let store = self.store;
        let run = &mut self.runs[number];
        let first = self.pages[run.pages.start].page;
        let direct = store.parts().of(first).file.direct_fd.is_some();
        run.until = run.written;
        if run.written == run.len || (self.past_cache && !direct) {
            return Ok(());
        }
        let left = store.size_now(first)?.saturating_sub(store.page_size().bytes_of(first.0));
        let len = run.len.min(usize::try_from(left).unwrap_or(usize::MAX));
        run.until = if self.past_cache { len - len % system_page_bytes() } else { len };
        Ok(())
    }

    /// The bytes of a run that are to be written and are not.
    fn request(&self, number: usize, parts: &mut Parts<'m>) -> Request<usize> {
        let run = &self.runs[number];
        for page in &self.pages[run.pages.clone()] {
            parts.push(page.content.part(0, page.file_bytes));
        }
        parts.truncate(run.until);
        parts.skip(run.written);
        let first = self.pages[run.pages.start].page;
        let part = self.store.parts().of(first);
        let (file, align) = part.file(self.past_cache);
        Request {
            direction: Direction::Write,
            file,
            offset_bytes: part.offset_of(first, self.store.page_size()) + run.written as u64,
            needed_bytes: run.until - run.written,
            align,
            note: number,
        }
    }

    /// Ends a run of which all is written that the file has: pages that it has lost are
    /// missing. Within the page that holds the end of the file nothing is.
    fn finish(&mut self, number: usize) {
        let (store, page_size) = (self.store, self.store.page_size());
        let run = &self.runs[number];
        if self.past_cache || run.until == run.len {
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

impl<'a, 'm> Transfer<'a, 'm> for PageWrites<'a, 'm> {
    /// The number of the run.
    type Note = usize;

    fn way(&self) -> Way<'a> {
        if self.past_cache && !self.store.memory_backed() {
            Way::Together(self.runs.len(), self.store.rings())
        } else {
            Way::Caller
        }
    }

    fn may_begin(&self, _in_flight: usize, bytes_in_flight: usize) -> bool {
        bytes_in_flight < MAX_FLIGHT_BYTES
    }

    /// The next run of which there is something to write.
    fn next(&mut self, _in_flight: usize, parts: &mut Parts<'m>) -> Result<Option<Request<usize>>> {
        while !self.all_begun() {
            let number = self.next;
            self.next += 1;
            match self.begin(number) {
                Err(error) => self.fail(number, error),
                Ok(()) if self.runs[number].written < self.runs[number].until => {
                    return Ok(Some(self.request(number, parts)));
                }
                Ok(()) => self.finish(number),
            }
        }
        Ok(None)
    }

    fn all_begun(&self) -> bool {
        !self.matters(&self.next)
    }

    fn matters(&self, number: &usize) -> bool {
        let end = self.failure.as_ref().map_or(self.runs.len(), |(failed, _)| *failed);
        self.interrupted.is_none() && *number < end
    }

    fn end(&mut self, number: usize, ended: Ended) -> Result<()> {
        self.store.count().add_written(ended.moved_bytes);
        self.runs[number].written += ended.moved_bytes;
        match ended.error {
            Some(errno) => self.fail_with(number, errno),
            None if ended.whole => self.finish(number),
            None => {}
        }
        Ok(())
    }

    /// What is in flight is waited for, so that it is known how far it came.
    fn check(&mut self, ended: usize) -> Result<()> {
        if self.interrupted.is_none() {
            self.interrupted = self.pace.check(ended).err();
        }
        Ok(())
    }
}
