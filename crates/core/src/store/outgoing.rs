//! Pages on their way to a store: neighbours are merged into runs, and the runs of direct files
//! are in flight together.
//!
//! A direct write waits for the device, so many of them overlap. A write through the page cache
//! is a copy, and several at once are not faster, so they are made one after the other
//! (docs/decisions/011), after the direct writes have ended. The reason for this order: if a page
//! in the page cache changes during a direct write to its neighbours, the kernel may be unable to
//! drop outdated pages, and then reports EIO.
//!
//! The kernel reads the memory of a write until it has ended, so no call returns before
//! everything that it started has ended. The error is that of the first failed run in page order;
//! runs after it are not started.

use std::ops::Range;

use rustix::io::Errno;

use super::part::Part;
use super::Store;
use crate::error::{Error, Interrupt, Result};
use crate::io::{
    transfer, Ended, Pace, Request, Segment, Transfer, Way, MAX_FLIGHT_BYTES, MAX_REQUEST_BYTES,
};
use crate::room::{collected, push};
use crate::sys::file::Parts;
use crate::sys::mm::system_page_bytes;
use crate::sys::ring::Direction;
use crate::sys::span::Span;
use crate::units::{FilePage, PageIndex};

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
        let segment = |(place, outgoing): (usize, &Outgoing<'_>)| {
            self.segment(outgoing.page, 0, outgoing.file_bytes, place)
        };
        let segments = collected("write", pages.iter().enumerate().map(segment))?;
        let memory = |segment: &Segment| pages[segment.place].content.part(0, segment.len as usize);
        self.write_segments(&segments, &memory, interrupt)
            .map_err(|(completed, error)| error.with_completed(completed))
    }

    /// `len` bytes of a page, which begin `within` it, and what the caller calls their memory.
    pub(super) fn segment(&self, page: FilePage, within: u64, len: usize, place: usize) -> Segment {
        let index = self.parts.index_of(page);
        let offset = self.parts.all()[index].offset_of(page, self.page_size()) + within;
        let file = u32::try_from(index).expect("so many files cannot be open");
        Segment { file, offset, place, len: u32::try_from(len).expect("pages are smaller") }
    }

    /// Writes segments of the store's files as far as these reach now.
    ///
    /// # Errors
    /// As [`write_from`](Self::write_from), beside the number of segments from the front that
    /// are known to be written.
    pub(super) fn write_segments<'m>(
        &self,
        segments: &[Segment],
        memory: &dyn Fn(&Segment) -> Span<'m>,
        interrupt: &dyn Interrupt,
    ) -> Result<(), (usize, Error)> {
        let mut writes = Writes {
            store: self,
            segments,
            memory,
            runs: runs_of(segments).map_err(|error| (0, error))?,
            pace: Pace::new(interrupt),
            past_cache: true,
            next: 0,
            failure: None,
            interrupted: None,
        };
        self.note_own_writes(segments);
        let mut outcome = transfer(&mut writes);
        // All else, and what a direct file has behind its last whole page of the system.
        (writes.past_cache, writes.next) = (false, 0);
        outcome = outcome.and_then(|()| transfer(&mut writes));
        self.note_own_writes(segments);
        writes.completed(outcome)
    }

    fn note_own_writes(&self, segments: &[Segment]) {
        for of_file in segments.chunk_by(|one, other| one.file == other.file) {
            self.parts.all()[of_file[0].file as usize].file.own_writes.note();
        }
    }
}

/// Neighbours in one file, which are written together.
#[derive(Debug)]
struct Run {
    /// Which of the segments they are.
    segments: Range<usize>,
    /// Bytes of them.
    len: usize,
    /// Bytes from the front that are written.
    written: usize,
    /// Where that ends which is being written.
    until: usize,
}

fn runs_of(segments: &[Segment]) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    let mut start = 0;
    while let Some(first) = segments.get(start) {
        let follows = |pair: &&[Segment]| {
            pair[1].file == first.file
                && pair[1].offset == pair[0].end()
                && pair[1].end() - first.offset <= MAX_REQUEST_BYTES as u64
        };
        let count = 1 + segments[start..].windows(2).take_while(follows).count();
        let len = (segments[start + count - 1].end() - first.offset) as usize;
        let segments = start..start + count;
        push("write", &mut runs, Run { segments, len, written: 0, until: 0 })?;
        start += count;
    }
    Ok(runs)
}

struct Writes<'a, 'm> {
    store: &'a Store,
    segments: &'a [Segment],
    memory: &'a dyn Fn(&Segment) -> Span<'m>,
    /// In the order of segments.
    runs: Vec<Run>,
    pace: Pace<'a>,
    /// Of direct files what `O_DIRECT` can write, whole pages of the system; otherwise what is
    /// left.
    past_cache: bool,
    /// The run that is begun next.
    next: usize,
    /// The first run that could not be written, from which segment on, and why.
    failure: Option<(usize, usize, Error)>,
    /// The caller wants it to stop.
    interrupted: Option<Error>,
}

impl<'a, 'm> Writes<'a, 'm> {
    /// What has come of it, and of how many segments from the front.
    fn completed(self, outcome: Result<()>) -> Result<(), (usize, Error)> {
        let unwritten = self.runs.iter().find(|run| run.written < run.len);
        let written = unwritten.map_or(self.segments.len(), |run| run.segments.start);
        match (outcome.err().or(self.interrupted), self.failure) {
            (Some(error), _) => Err((written, error)),
            (None, Some((_, segment, error))) => Err((segment, error)),
            (None, None) => Ok(()),
        }
    }

    fn part_of(&self, run: &Run) -> &'a Part {
        &self.store.parts().all()[self.segments[run.segments.start].file as usize]
    }

    /// The store's page that has a byte of a segment.
    fn page_at(&self, segment: &Segment, offset: u64) -> FilePage {
        let first = self.store.parts().all()[segment.file as usize].first;
        first.offset(self.store.page_size().index_of(offset))
    }

    /// Decides how much of a run is written, by how long the file is now.
    fn begin(&mut self, number: usize) -> Result<()> {
        let run = &self.runs[number];
        let direct = self.part_of(run).file.direct_fd.is_some();
        let mut until = run.written;
        if run.written < run.len && (direct || !self.past_cache) {
            let first = &self.segments[run.segments.start];
            let left = self.store.size_now(first.file as usize)?.saturating_sub(first.offset);
            let len = run.len.min(usize::try_from(left).unwrap_or(usize::MAX));
            until = if self.past_cache { len - len % system_page_bytes() } else { len };
        }
        self.runs[number].until = until;
        Ok(())
    }

    /// The bytes of a run that are to be written and are not.
    fn request(&self, number: usize, parts: &mut Parts<'m>) -> Request<usize> {
        let run = &self.runs[number];
        for segment in &self.segments[run.segments.clone()] {
            parts.push((self.memory)(segment));
        }
        parts.truncate(run.until);
        parts.skip(run.written);
        let (file, align) = self.part_of(run).file(self.past_cache);
        Request {
            direction: Direction::Write,
            file,
            offset_bytes: self.segments[run.segments.start].offset + run.written as u64,
            needed_bytes: run.until - run.written,
            align,
            note: number,
        }
    }

    /// Ends a run of which all is written that the file has: pages that it has lost are
    /// missing. Within the page that holds the end of the file nothing is.
    fn finish(&mut self, number: usize) {
        let run = &self.runs[number];
        if self.past_cache || run.until == run.len {
            return;
        }
        let (start, page_size) = (run.segments.start, self.store.page_size());
        let end = self.segments[start].offset + run.until as u64;
        let missing = page_size.bytes_of(page_size.count_of(end));
        let mut segments = self.segments[run.segments.clone()].iter();
        if let Some(lost) = segments.position(|lost| lost.end() > missing && lost.len > 0) {
            let segment = &self.segments[start + lost];
            let page = self.page_at(segment, segment.offset);
            self.fail(number, start + lost, self.store.truncated("write", page));
        }
    }

    fn fail_with(&mut self, number: usize, errno: Errno) {
        let run = &self.runs[number];
        let at = self.segments[run.segments.start].offset + run.written as u64;
        let within = self.segments[run.segments.clone()].partition_point(|other| other.end() <= at);
        let failed = run.segments.start + within;
        let page = self.page_at(&self.segments[failed], at);
        self.fail(number, failed, self.store.io_error("write", Some(page), errno));
    }

    fn fail(&mut self, number: usize, segment: usize, error: Error) {
        if self.failure.as_ref().is_none_or(|(first, _, _)| number < *first) {
            self.failure = Some((number, segment, error));
        }
    }
}

impl<'a, 'm> Transfer<'a, 'm> for Writes<'a, 'm> {
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
                Err(error) => self.fail(number, self.runs[number].segments.start, error),
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
        let end = self.failure.as_ref().map_or(self.runs.len(), |(failed, _, _)| *failed);
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
