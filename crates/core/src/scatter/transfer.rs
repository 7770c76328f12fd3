//! The transfer of pages: copies and reads, several chunks at a time.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use rustix::io::Errno;

use super::plan::{Maps, Plan, Preference};
use super::provided::scatter_provided;
use super::Sink;
use crate::error::{Error, Interrupt, Result};
use crate::store::last_change::Unchanged;
use crate::store::source::PIECE_PAGES;
use crate::store::{Pace, Store};
use crate::sys::clock::coarse_ns;
use crate::sys::copy::Recovery;
use crate::sys::file::{self as sys_file, Facts, Parts};
use crate::sys::mm::{system_page_bytes, Access, Region};
use crate::sys::ring::{Completion, Direction, Inline, OpenFile, Queue, Submission, DEPTH};
use crate::sys::span::Span;
use crate::units::{FilePage, PageIndex, Run};

/// How long a wait for the device may keep the caller's interrupt waiting.
const WAIT: Duration = Duration::from_millis(50);
/// Bytes that are read by one request, unless a page is larger.
const MAX_RUN_BYTES: usize = 1 << 20;
/// Pages of one request: the kernel takes 1024 separate buffers.
const MAX_RUN_PAGES: usize = 256;
/// Bytes of an element of a cache: so few are read without a question.
const ELEMENT_BYTES: usize = 256 << 10;
/// How often a request that ended with EAGAIN or EINTR is made again as it was.
const AGAIN_LIMIT: u8 = 8;

/// Pages of one request.
fn run_limit(page_bytes: usize) -> usize {
    (MAX_RUN_BYTES / page_bytes).clamp(1, MAX_RUN_PAGES)
}

/// Reads one page. Memory that the kernel cannot reach (a window's) is filled
/// through a buffer.
pub(super) fn read_one(store: &Store, page: FilePage, into: Span<'_>) -> Result<()> {
    match store.read_page(page, into) {
        Err(Error::Io { errno: Errno::FAULT, .. }) => {
            let buffer = Region::anonymous(into.len(), system_page_bytes(), Access::Write)
                .map_err(|errno| store.io_error("read", Some(page), errno))?;
            let bytes = buffer.span(0, into.len());
            store.read_page(page, bytes)?;
            into.copy_span(bytes);
            Ok(())
        }
        outcome => outcome,
    }
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
    let mut transfer = Transfer {
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
        requests: Vec::new(),
        free: Vec::new(),
        spare_absent: Vec::new(),
        spare_parts: Vec::new(),
    };
    transfer.all().map_err(|error| {
        let completed = transfer.completed;
        error.with_completed(completed)
    })
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

/// A page that is to be read, and its place in its chunk.
type Absent = (FilePage, u32);

/// A chunk whose buffer was handed out.
struct Chunk<'m> {
    index: usize,
    requests: Range<usize>,
    buffer: Span<'m>,
    /// Pages to be read, sorted; those before `next` were.
    absent: Vec<Absent>,
    next: usize,
    in_flight: usize,
    /// When its reads began: a file that was changed later may have been cut for a while.
    began_ns: i64,
    /// (from, to): places that show the same page, read once.
    repeats: Vec<(u32, u32)>,
    /// The first request that failed, and how.
    failure: Option<(usize, Error)>,
}

impl Chunk<'_> {
    fn is_done(&self) -> bool {
        self.next == self.absent.len() && self.in_flight == 0
    }

    fn fail(&mut self, place: u32, error: Error) {
        let request = self.requests.start + place as usize;
        if self.failure.as_ref().is_none_or(|(first, _)| request < *first) {
            self.failure = Some((request, error));
        }
    }
}

/// A request for a run of file pages, each with a place in the chunk.
#[derive(Default)]
struct Request {
    chunk: usize,
    first: u64,
    places: Vec<u32>,
    again: u8,
}

struct Transfer<'a, 'm> {
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
    requests: Vec<Request>,
    free: Vec<u32>,
    spare_absent: Vec<Vec<Absent>>,
    spare_parts: Vec<Parts<'m>>,
}

impl<'a, 'm> Transfer<'a, 'm> {
    /// Everything. Copies alone need no queue; once there is something to read
    /// together, one queue serves to the end.
    fn all(&mut self) -> Result<()> {
        while self.completed < self.file_pages.len() {
            self.plan_next()?;
            let limit = run_limit(self.page_bytes);
            let one = self.plan.is_one_run(self.store.parts(), self.file_pages, limit);
            if one || self.store.memory_backed() {
                let until = self.plan.requests().end;
                self.run(&mut Inline::default(), until)?;
            } else {
                let (store, wanted) = (self.store, self.plan.read_count);
                let until = self.file_pages.len();
                return store.rings().together(wanted, |queue| self.run(queue, until));
            }
        }
        Ok(())
    }

    /// Plans for whole chunks, as many as are asked about together.
    fn plan_next(&mut self) -> Result<()> {
        let start = self.plan.requests().end;
        let pages = (PIECE_PAGES / self.chunk_pages).max(1) * self.chunk_pages;
        let end = self.file_pages.len().min(start.saturating_add(pages));
        let (maps, pace) = (&mut self.maps, &mut self.pace);
        self.plan.make(maps, self.file_pages, start..end, self.preference, pace)
    }

    /// Goes on until the sink has all requests before `until`.
    fn run(&mut self, queue: &mut dyn Queue<'a, 'm>, until: usize) -> Result<()> {
        let mut ended = Vec::with_capacity(DEPTH);
        while self.completed < until {
            self.fill(queue, until)?;
            self.complete_chunks()?;
            if queue.in_flight() > 0 {
                queue.wait(WAIT, &mut ended);
                for completion in ended.drain(..) {
                    self.end_read(completion, queue);
                }
                self.complete_chunks()?;
            }
            self.pace.check(0)?;
        }
        Ok(())
    }

    /// Starts reads while there is room, and hands out chunks while there may be more.
    fn fill(&mut self, queue: &mut dyn Queue<'a, 'm>, until: usize) -> Result<()> {
        loop {
            while queue.room() > 0 {
                let Some(read) = self.next_read() else { break };
                queue.push(read);
            }
            if queue.room() == 0 || !self.may_admit(until) {
                return Ok(());
            }
            // The device works while we copy.
            queue.start();
            self.admit()?;
            self.complete_chunks()?;
        }
    }

    fn may_admit(&self, until: usize) -> bool {
        self.failed_chunk.is_none()
            && self.next_chunk * self.chunk_pages < until
            && self.chunks.len() < self.sink.chunks_in_flight().max(1)
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

    /// Copies what the plan says is in the page cache; what is not, or cannot
    /// be copied, is left to be read. Says how many pages were copied.
    fn copy_cached(&mut self, chunk: &mut Chunk<'m>) -> usize {
        let wanted = chunk.requests.clone().any(|request| self.plan.is_copied(request));
        let recovery = wanted.then(|| Recovery::begin().ok()).flatten();
        let Some(recovery) = recovery else {
            let places = 0_u32..;
            let pages = self.file_pages[chunk.requests.clone()].iter().copied();
            chunk.absent.extend(pages.zip(places));
            return 0;
        };
        let trusted = self.trusted_parts(chunk);
        let is_trusted = |page| {
            let index = self.store.parts().index_of(page);
            trusted.binary_search_by_key(&index, |&(part, _)| part).is_ok()
        };
        let keep_cached = self.sink.reads_again();
        let mut copied = 0;
        // The page before, whose copy fetches the beginning of this one.
        let mut before: Option<(u32, FilePage, Span<'_>)> = None;
        let copy =
            |chunk: &mut Chunk<'m>, (place, page, source): (u32, FilePage, Span<'_>), next| {
                let into = chunk.buffer.part(place as usize * self.page_bytes, self.page_bytes);
                match recovery.copy(into, source, next, keep_cached) {
                    Ok(()) => 1,
                    Err(_lost) => {
                        chunk.absent.push((page, place));
                        0
                    }
                }
            };
        for (request, place) in chunk.requests.clone().zip(0_u32..) {
            let page = self.file_pages[request];
            let in_cache = self.plan.is_copied(request) && is_trusted(page);
            let source = in_cache.then(|| self.maps.source(page)).flatten();
            let Some(source) = source else {
                chunk.absent.push((page, place));
                continue;
            };
            if let Some(before) = before.replace((place, page, source)) {
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
        for (request, place) in chunk.requests.clone().zip(0_u32..) {
            let page = self.file_pages[request];
            if self.plan.is_copied(request) && parts.index_of(page) == index {
                chunk.absent.push((page, place));
            }
        }
        chunk.absent.sort_unstable();
        chunk.absent.dedup();
    }

    /// The same for what was read by system calls (a read beside a truncation brings zeros and a full count). A store that
    /// writes changes its file itself, for which nothing is read a second time.
    fn recheck_read(&self, chunk: &mut Chunk<'m>) {
        let (parts, page_size) = (self.store.parts(), self.store.page_size());
        // They are sorted, so those of a part follow each other.
        let mut current: Option<(usize, Option<Facts>)> = None;
        for number in 0..chunk.absent.len() {
            let (page, place) = chunk.absent[number];
            let index = parts.index_of(page);
            let part = &parts.all()[index];
            let facts = match current {
                Some((same, facts)) if same == index => facts,
                _ => sys_file::facts(part.fd()).ok(),
            };
            current = Some((index, facts));
            // The size of an open file is always told.
            let Some(facts) = facts else { continue };
            let offset = part.offset_of(page, page_size);
            let len = self.store.expected_bytes(page);
            let end = offset + len as u64;
            if end > facts.size_bytes {
                chunk.fail(place, self.store.truncated("read", page));
            } else if facts.changed_ns >= chunk.began_ns && !part.file.writable {
                let into = chunk.buffer.part(place as usize * self.page_bytes, len);
                let whole = sys_file::read_unchanged(part.fd(), into, offset)
                    .is_ok_and(|(read, facts)| read == len && facts.size_bytes >= end);
                if !whole {
                    // Says why, or reads into memory that the kernel cannot reach.
                    let into = chunk.buffer.part(place as usize * self.page_bytes, self.page_bytes);
                    if let Err(error) = read_one(self.store, page, into) {
                        chunk.fail(place, error);
                    }
                }
            }
        }
    }

    /// The next run of neighbours to be read, of the first chunk that has one.
    fn next_read(&mut self) -> Option<Submission<'a, 'm>> {
        let last = self.failed_chunk.unwrap_or(usize::MAX);
        let chunk = self
            .chunks
            .iter_mut()
            .find(|chunk| chunk.next < chunk.absent.len() && chunk.index <= last)?;
        let id = self.free.pop().unwrap_or_else(|| {
            self.requests.push(Request::default());
            u32::try_from(self.requests.len() - 1).expect("as many as are in flight")
        });
        let mut parts = self.spare_parts.pop().unwrap_or_default();
        let request = &mut self.requests[id as usize];
        let limit = run_limit(self.page_bytes);
        let (first, _) = chunk.absent[chunk.next];
        let store = self.store;
        let index = store.parts().index_of(first);
        let end = store.parts().end(index);
        request.chunk = chunk.index;
        request.first = first.0;
        request.again = 0;
        request.places.clear();
        while let Some(&(page, place)) = chunk.absent.get(chunk.next) {
            let count = request.places.len() as u64;
            if count > 0 && page.0 == first.0 + count - 1 {
                chunk.repeats.push((request.places[request.places.len() - 1], place));
            } else if page.0 == first.0 + count && count < limit as u64 && page < end {
                request.places.push(place);
                parts.push(chunk.buffer.part(place as usize * self.page_bytes, self.page_bytes));
            } else {
                break;
            }
            chunk.next += 1;
        }
        chunk.in_flight += 1;
        let part = &store.parts().all()[index];
        let offset_bytes = part.offset_of(first, store.page_size());
        let file = OpenFile::Borrowed(part.read_fd());
        Some(Submission { id, direction: Direction::Read, file, offset_bytes, parts })
    }

    /// Takes a read that has ended: good, to be made again, or to be made page
    /// by page, which goes on after a short count and finds the bad page.
    fn end_read(&mut self, completion: Completion<'a, 'm>, queue: &mut dyn Queue<'a, 'm>) {
        let Completion { submission: mut read, result } = completion;
        let request = &mut self.requests[read.id as usize];
        let count = request.places.len();
        let last = FilePage(request.first + count as u64 - 1);
        let last_bytes = self.store.expected_bytes(last);
        let wanted = (count - 1) * self.page_bytes + last_bytes;
        let front = self.chunks[0].index;
        let chunk = &mut self.chunks[request.chunk - front];
        match result {
            Ok(bytes) if bytes >= wanted && last_bytes > 0 => {
                let place = request.places[count - 1] as usize;
                let tail = chunk.buffer.part(place * self.page_bytes, self.page_bytes);
                tail.part(last_bytes, self.page_bytes - last_bytes).clear();
                self.store.count().add_read(wanted);
            }
            Err(Errno::AGAIN | Errno::INTR) if request.again < AGAIN_LIMIT => {
                request.again += 1;
                queue.push(read);
                return;
            }
            _ => {
                for (page, &place) in (request.first..).zip(&request.places) {
                    let into = chunk.buffer.part(place as usize * self.page_bytes, self.page_bytes);
                    if let Err(error) = read_one(self.store, FilePage(page), into) {
                        chunk.fail(place, error);
                    }
                }
            }
        }
        chunk.in_flight -= 1;
        let (index, failed) = (chunk.index, chunk.failure.is_some());
        self.free.push(read.id);
        read.parts.clear();
        self.spare_parts.push(read.parts);
        if failed {
            self.note_failure(index);
        }
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
            for &(from, to) in &chunk.repeats {
                let page = |place: u32| {
                    chunk.buffer.part(place as usize * self.page_bytes, self.page_bytes)
                };
                page(to).copy_span(page(from));
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
