//! The transfer of pages: copies and reads, several chunks at a time.

use std::collections::VecDeque;
use std::ops::Range;

use rustix::io::Errno;

use super::plan::{Maps, Plan, Preference};
use super::provided::scatter_provided;
use super::Sink;
use crate::error::{Error, Interrupt, Result};
use crate::io::{join, read_alone, transfer, Ended, Pace, Request, Segment, Transfer, Way};
use crate::store::last_change::Unchanged;
use crate::store::source::PIECE_PAGES;
use crate::store::Store;
use crate::sys::clock::coarse_ns;
use crate::sys::copy::Recovery;
use crate::sys::file::{self as sys_file, Parts};
use crate::sys::ring::{Direction, DEPTH};
use crate::sys::span::Span;
use crate::units::{FilePage, PageIndex, Run};

/// Bytes of an element of a cache: so few are read without a question.
const ELEMENT_BYTES: usize = 256 << 10;

/// Reads one page, by a single system call where that is enough.
pub(super) fn read_one(store: &Store, page: FilePage, into: Span<'_>) -> Result<()> {
    match store.read_page(page, into) {
        Err(Error::Io { errno: Errno::FAULT, .. }) => read_anew(store, page, into),
        outcome => outcome,
    }
}

/// Reads one page as it is, whatever becomes of the file meanwhile and wherever the memory is.
fn read_anew(store: &Store, page: FilePage, into: Span<'_>) -> Result<()> {
    let (fd, offset) = store.place_of(page);
    let len = store.expected_bytes(page);
    let (read, facts) = read_alone(fd, into.part(0, len), offset)
        .map_err(|errno| store.io_error("read", Some(page), errno))?;
    store.count().add_read(read);
    if len == 0 || read < len || facts.size_bytes < offset + len as u64 {
        return Err(store.truncated("read", page));
    }
    into.part(len, into.len() - len).clear();
    Ok(())
}

/// Reads `file_pages` into the chunks of `sink`.
///
/// # Errors
/// As [`Store::scatter`].
pub(crate) fn scatter(
    store: &Store,
    file_pages: &[FilePage],
    sink: &mut dyn Sink<'_>,
    preference: Preference,
    interrupt: &dyn Interrupt,
) -> Result<()> {
    if file_pages.is_empty() {
        return Ok(());
    }
    if store.is_provided() {
        return scatter_provided(store, file_pages, sink, interrupt);
    }
    let page_bytes = store.page_size().bytes();
    let chunk_pages = sink.chunk_pages();
    if preference == Preference::Speed && read_element(store, file_pages, sink)? {
        return Ok(());
    }
    let mut reads = PageReads {
        store,
        file_pages,
        sink,
        preference,
        pace: Pace::new(interrupt),
        maps: Maps::new(store),
        plan: Plan::default(),
        page_bytes,
        chunk_pages,
        chunks: VecDeque::new(),
        next_chunk: 0,
        completed: 0,
        failed_chunk: None,
        spare_absent: Vec::new(),
    };
    let outcome = transfer(&mut reads);
    outcome.map_err(|error| error.with_completed(reads.completed))
}

/// Reads a few pages that follow one another, into one chunk, by one system call: whether they
/// are in the page cache need not be asked then. False where they are not so, or cannot all
/// be read that way.
fn read_element(store: &Store, file_pages: &[FilePage], sink: &mut dyn Sink<'_>) -> Result<bool> {
    let count = file_pages.len();
    let bytes = count * store.page_size().bytes();
    let run = Run { first: file_pages[0], count: count as u64 };
    let follows = |(&page, index): (&FilePage, u64)| page == run.first.offset(index);
    let one = bytes <= ELEMENT_BYTES.max(store.page_size().bytes())
        && count <= sink.chunk_pages()
        && !store.direct()
        && file_pages.iter().zip(0..).all(follows);
    if !one || !store.read_run_unchanged(run, sink.buffer(0).part(0, bytes)) {
        return Ok(false);
    }
    sink.complete(0..count)?;
    Ok(true)
}

/// A chunk whose buffer was handed out.
struct Chunk<'m> {
    index: usize,
    requests: Range<usize>,
    buffer: Span<'m>,
    /// Pages to be read, sorted, each with its first byte in the buffer; those before `next`
    /// were.
    absent: Vec<Segment>,
    next: usize,
    in_flight: usize,
    /// When its reads began: a file that was changed later may have been cut for a while.
    began_ns: i64,
    /// (from, to): places that show the same page, read once.
    repeats: Vec<(usize, usize)>,
    /// The first request that failed, and how.
    failure: Option<(usize, Error)>,
}

impl Chunk<'_> {
    fn all_begun(&self) -> bool {
        self.next == self.absent.len()
    }

    fn is_done(&self) -> bool {
        self.all_begun() && self.in_flight == 0
    }

    /// Notes that a request has failed.
    fn note(&mut self, failure: Option<(usize, Error)>) {
        let known = self.failure.take().into_iter();
        self.failure = known.chain(failure).min_by_key(|(request, _)| *request);
    }
}

struct PageReads<'a, 'm> {
    store: &'a Store,
    file_pages: &'a [FilePage],
    sink: &'a mut dyn Sink<'m>,
    preference: Preference,
    pace: Pace<'a>,
    maps: Maps<'a>,
    plan: Plan,
    page_bytes: usize,
    chunk_pages: usize,
    /// The chunks handed out and not completed, in order.
    chunks: VecDeque<Chunk<'m>>,
    next_chunk: usize,
    /// Requests that the sink has.
    completed: usize,
    /// Nothing behind this chunk matters any more.
    failed_chunk: Option<usize>,
    spare_absent: Vec<Vec<Segment>>,
}

impl<'m> PageReads<'_, 'm> {
    /// Plans for whole chunks, as many as are asked about together.
    fn plan_next(&mut self) -> Result<()> {
        let start = self.plan.requests().end;
        let pages = (PIECE_PAGES / self.chunk_pages).max(1) * self.chunk_pages;
        let end = self.file_pages.len().min(start.saturating_add(pages));
        let (maps, pace) = (&mut self.maps, &mut self.pace);
        self.plan.make(maps, self.file_pages, start..end, self.preference, pace)
    }

    /// Hands out the next chunk, copies what is in the page cache, and sorts the rest.
    fn admit(&mut self) -> Result<()> {
        let index = self.next_chunk;
        let start = index * self.chunk_pages;
        let end = self.file_pages.len().min(start + self.chunk_pages);
        if start >= self.plan.requests().end {
            self.plan_next()?;
        }
        self.next_chunk += 1;
        let mut chunk = Chunk {
            index,
            requests: start..end,
            buffer: self.sink.buffer(index),
            absent: self.spare_absent.pop().unwrap_or_default(),
            next: 0,
            in_flight: 0,
            began_ns: coarse_ns(),
            repeats: Vec::new(),
            failure: None,
        };
        let copied = self.copy_cached(&mut chunk);
        chunk.absent.sort_unstable();
        if chunk.failure.is_some() {
            self.note_failure(index);
        }
        self.chunks.push_back(chunk);
        self.pace.check(copied)
    }

    /// Leaves a page to be read.
    fn want(&self, chunk: &mut Chunk<'m>, request: usize) {
        let page = self.file_pages[request];
        let index = self.store.parts().index_of(page);
        let part = &self.store.parts().all()[index];
        let len = self.store.expected_bytes(page);
        if len == 0 {
            return chunk.note(Some((request, self.store.truncated("read", page))));
        }
        chunk.absent.push(Segment {
            file: u32::try_from(index).expect("so many files cannot be open"),
            offset: part.offset_of(page, self.store.page_size()),
            place: (request - chunk.requests.start) * self.page_bytes,
            len: u32::try_from(len).expect("pages are smaller"),
        });
    }

    /// Copies what the plan says is in the page cache; what is not, or cannot
    /// be copied, is left to be read. Says how many pages were copied.
    fn copy_cached(&mut self, chunk: &mut Chunk<'m>) -> usize {
        let wanted = chunk.requests.clone().any(|request| self.plan.is_copied(request));
        let recovery = wanted.then(|| Recovery::begin().ok()).flatten();
        let Some(recovery) = recovery else {
            for request in chunk.requests.clone() {
                self.want(chunk, request);
            }
            return 0;
        };
        let trusted = self.trusted_parts(chunk);
        let is_trusted = |page| {
            let index = self.store.parts().index_of(page);
            trusted.binary_search_by_key(&index, |&(part, _)| part).is_ok()
        };
        let keep_cached = self.sink.reads_again();
        let mut copied = 0;
        // The request before, whose copy fetches the beginning of this one.
        let mut before: Option<(usize, Span<'_>)> = None;
        let copy = |chunk: &mut Chunk<'m>, (request, source): (usize, Span<'_>), next| {
            let place = (request - chunk.requests.start) * self.page_bytes;
            let into = chunk.buffer.part(place, self.page_bytes);
            match recovery.copy(into, source, next, keep_cached) {
                Ok(()) => 1,
                Err(_lost) => {
                    self.want(chunk, request);
                    0
                }
            }
        };
        for request in chunk.requests.clone() {
            let page = self.file_pages[request];
            let in_cache = self.plan.is_copied(request) && is_trusted(page);
            let source = in_cache.then(|| self.maps.source(page)).flatten();
            let Some(source) = source else {
                self.want(chunk, request);
                continue;
            };
            if let Some(before) = before.replace((request, source)) {
                copied += copy(chunk, before, Some(source));
            }
        }
        if let Some(last) = before {
            copied += copy(chunk, last, None);
        }
        drop(recovery);
        self.store.count().add_copied(copied * self.page_bytes);
        for (part, since) in trusted {
            self.recheck_copied(chunk, part, since);
        }
        copied
    }

    /// The files that pages of a chunk are to be copied from, in order, but for those that
    /// are changing.
    fn trusted_parts(&mut self, chunk: &Chunk<'_>) -> Vec<(usize, Unchanged)> {
        let all = self.store.parts();
        let copied = chunk.requests.clone().filter(|&request| self.plan.is_copied(request));
        let mut parts: Vec<usize> =
            copied.map(|request| all.index_of(self.file_pages[request])).collect();
        parts.dedup();
        parts.sort_unstable();
        parts.dedup();
        let trusted = |index: usize| {
            let (map, part) = (self.maps.of(index)?, &all.all()[index]);
            let look = || sys_file::facts(part.fd()).ok();
            Some((index, part.last_change.before(map.size_bytes(), look)?))
        };
        parts.into_iter().filter_map(trusted).collect()
    }

    /// Leaves to be read what was copied from a file that has changed meanwhile.
    fn recheck_copied(&mut self, chunk: &mut Chunk<'m>, index: usize, since: Unchanged) {
        let Some(map) = self.maps.of(index) else { return };
        map.note_copies();
        let parts = self.store.parts();
        let part = &parts.all()[index];
        let facts = sys_file::facts(part.fd()).ok();
        if part.last_change.after(since, map.size_bytes(), facts) {
            return;
        }
        for request in chunk.requests.clone() {
            if self.plan.is_copied(request) && parts.index_of(self.file_pages[request]) == index {
                self.want(chunk, request);
            }
        }
        chunk.absent.sort_unstable();
        chunk.absent.dedup();
    }

    /// Reads again what came of files that others have changed meanwhile.
    fn recheck_read(&self, chunk: &mut Chunk<'m>) {
        let mut failure = None;
        for of_file in chunk.absent.chunk_by(|one, other| one.file == other.file) {
            let part = &self.store.parts().all()[of_file[0].file as usize];
            let end = of_file.iter().map(Segment::end).max().unwrap_or(0);
            if !part.is_unchanged(end, chunk.began_ns) {
                failure = failure.or_else(|| self.read_anew(chunk, of_file));
            }
        }
        chunk.note(failure);
    }

    /// Reads pages one by one; which request is the first that fails, if one does.
    fn read_anew(&self, chunk: &Chunk<'m>, segments: &[Segment]) -> Option<(usize, Error)> {
        let read = |segment: &Segment| {
            let request = chunk.requests.start + segment.place / self.page_bytes;
            let into = chunk.buffer.part(segment.place, self.page_bytes);
            let error = read_anew(self.store, self.file_pages[request], into).err()?;
            Some((request, error))
        };
        segments.iter().filter_map(read).min_by_key(|(request, _)| *request)
    }

    fn note_failure(&mut self, chunk: usize) {
        self.failed_chunk = Some(self.failed_chunk.map_or(chunk, |first| first.min(chunk)));
    }

    /// Gives the sink the chunks at the front that are done, and ends with the
    /// error of one that failed.
    fn complete_chunks(&mut self) -> Result<()> {
        while self.chunks.front().is_some_and(Chunk::is_done) {
            let Some(mut chunk) = self.chunks.pop_front() else { break };
            self.recheck_read(&mut chunk);
            let page = |place| chunk.buffer.part(place, self.page_bytes);
            for &(from, to) in &chunk.repeats {
                page(to).copy_span(page(from));
            }
            // What the last page has behind the end of the file.
            for segment in chunk.absent.iter().filter(|last| (last.len as usize) < self.page_bytes)
            {
                let len = segment.len as usize;
                page(segment.place).part(len, self.page_bytes - len).clear();
            }
            let end = chunk.failure.as_ref().map_or(chunk.requests.end, |(request, _)| *request);
            if end > chunk.requests.start {
                self.sink.complete(chunk.requests.start..end)?;
                self.completed = end;
            }
            if let Some((_, error)) = chunk.failure {
                return Err(error);
            }
            chunk.absent.clear();
            self.spare_absent.push(chunk.absent);
        }
        Ok(())
    }
}

/// A request for pages that follow each other.
struct Merged {
    chunk: usize,
    /// Which of the chunk's absent pages they are, those of the same page included.
    absent: Range<usize>,
    needed_bytes: usize,
}

impl<'a, 'm> Transfer<'a, 'm> for PageReads<'a, 'm> {
    type Note = Merged;

    fn way(&self) -> Way<'a> {
        if self.store.memory_backed() {
            return Way::Caller;
        }
        let planned = self.plan.requests().end == self.file_pages.len();
        // What was planned to be copied may be read after all.
        let absent = self.chunks.iter().map(|chunk| chunk.absent.len()).sum();
        let wanted = if planned { self.plan.read_count.max(absent) } else { DEPTH };
        Way::Together(wanted, self.store.rings())
    }

    /// The next pages of the first chunk that has any to be read.
    fn next(
        &mut self,
        _in_flight: usize,
        parts: &mut Parts<'m>,
    ) -> Result<Option<Request<Merged>>> {
        let last = self.failed_chunk.unwrap_or(usize::MAX);
        let may_read = |chunk: &&mut Chunk<'m>| !chunk.all_begun() && chunk.index <= last;
        let Some(chunk) = self.chunks.iter_mut().find(may_read) else { return Ok(None) };
        let Chunk { buffer, absent, next, repeats, .. } = chunk;
        let memory = |segment: &Segment| buffer.part(segment.place, self.page_bytes);
        let repeat = |from: &Segment, to: &Segment| repeats.push((from.place, to.place));
        let count = join(&absent[*next..], memory, None, parts, repeat);
        let run = *next..*next + count;
        let (first, last) = (absent[run.start], absent[run.end - 1]);
        let needed_bytes = (last.end() - first.offset) as usize;
        chunk.next = run.end;
        chunk.in_flight += 1;
        let note = Merged { chunk: chunk.index, absent: run, needed_bytes };
        let (file, align) = self.store.parts().all()[first.file as usize].file(true);
        let (direction, offset_bytes) = (Direction::Read, first.offset);
        Ok(Some(Request { direction, file, offset_bytes, needed_bytes, align, note }))
    }

    fn may_unfold(&self) -> bool {
        self.failed_chunk.is_none()
            && self.next_chunk * self.chunk_pages < self.file_pages.len()
            && self.chunks.len() < self.sink.chunks_in_flight().max(1)
    }

    fn unfold(&mut self) -> Result<()> {
        self.admit()?;
        self.complete_chunks()
    }

    fn all_begun(&self) -> bool {
        self.next_chunk * self.chunk_pages >= self.file_pages.len()
            && self.chunks.iter().all(Chunk::all_begun)
    }

    fn end(&mut self, run: Merged, ended: Ended) -> Result<()> {
        let number = run.chunk - self.chunks[0].index;
        let failure = if ended.whole {
            self.store.count().add_read(run.needed_bytes);
            None
        } else {
            let chunk = &self.chunks[number];
            self.read_anew(chunk, &chunk.absent[run.absent])
        };
        let failed = failure.is_some();
        let chunk = &mut self.chunks[number];
        chunk.in_flight -= 1;
        chunk.note(failure);
        if failed {
            self.note_failure(run.chunk);
        }
        self.complete_chunks()
    }

    fn check(&mut self, _ended: usize) -> Result<()> {
        self.pace.check(0)
    }
}
