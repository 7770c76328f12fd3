//! The bytes that are read: sorted, neighbours merged, all in flight together.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::blocks::{BlockPool, Blocks, MAX_BLOCK_BYTES};
use super::files::Opened;
use super::wanted::{Wanted, MAX_RUN_BYTES};
use super::{count, Rows};
use crate::error::{Error, Result, RowLoss};
use crate::io::Pace;
use crate::sys::clock::coarse_ns;
use crate::sys::file::{self as sys_file, Facts, Parts};
use crate::sys::mm::system_page_bytes;
use crate::sys::ring::{
    Advised, Completion, Direction, Inline, OpenFile, Queue, RingPool, Submission, DEPTH,
};
use crate::sys::span::Span;

/// How long a wait for the device may keep the caller's interrupt waiting.
const WAIT: Duration = Duration::from_millis(50);
/// Rows of one request: the kernel takes 1024 separate buffers, and between two rows is one.
const MAX_RUN_ROWS: usize = 512;
/// Bytes between two rows that cost less to read than another request.
const GAP_BYTES: usize = 4096;
/// How often a request that ended with EAGAIN or EINTR is made again as it was.
const AGAIN_LIMIT: u8 = 8;
/// Requests that are prepared before the device is told, while few are in flight: it would
/// idle meanwhile.
const EARLY: usize = 4;
/// The same once it is busy: each telling costs a system call.
const LATER: usize = 16;
/// Reads through the page cache that are so few that the kernel is asked to read each ahead,
/// and then waited for in their order. A ring wakes the thread for each page that comes, to
/// copy from it.
const FEW: usize = 64;
/// Requests in flight from which on a device is busy.
const BUSY: usize = 32;
/// Requests that a wait is for, while others are to follow.
const BUSY_WAIT: usize = 8;

/// The rings and blocks of all rows of the process: that of the last take is ready, whichever
/// rows it was of.
static RINGS: RingPool = RingPool::new();
static BLOCKS: BlockPool = BlockPool::new();

impl Rows {
    /// Reads what is wanted into its places in `into`.
    pub(super) fn read(
        &self,
        wanted: &mut [Wanted],
        into: Span<'_>,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        // By shard and offset first: the length is the same wherever that is.
        if !wanted.is_sorted_by_key(|row| (row.shard, row.offset, row.place)) {
            wanted.sort_unstable_by_key(|row| (row.shard, row.offset, row.place));
        }
        let bytes: u64 = wanted.iter().map(|row| u64::from(row.len)).sum();
        self.budget.note_reads(bytes.div_ceil(self.row_bytes as u64));
        let _reader = Reader::new(&self.readers);
        if !self.direct {
            let mut gap = [0; GAP_BYTES];
            return Transfer::new(self, wanted, into, Way::Cached(Span::of(&mut gap)), pace).all();
        }
        let longest = wanted.iter().map(|row| row.len as usize).max().unwrap_or(0);
        let blocks = BLOCKS.take(longest).map_err(|errno| Error::system("take", errno))?;
        let outcome = Transfer::new(self, wanted, into, Way::Direct(&blocks), pace).all();
        BLOCKS.give_back(blocks);
        outcome
    }
}

/// A take that reads, counted as long as this lives.
struct Reader<'r>(&'r AtomicUsize);

impl<'r> Reader<'r> {
    fn new(readers: &'r AtomicUsize) -> Self {
        readers.fetch_add(1, Ordering::Relaxed);
        Self(readers)
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How bytes come from the file to their places.
#[derive(Clone, Copy)]
enum Way<'m> {
    /// Straight; here go bytes between rows, which nobody reads.
    Cached(Span<'m>),
    /// Past the page cache, in whole blocks, from which they are copied.
    Direct(&'m Blocks),
}

/// What is wanted of one file.
struct Stretch {
    shard: u32,
    file: Arc<OwnedFd>,
    /// What offsets of direct reads are multiples of.
    align: u64,
    /// The first that is wanted of it, and the first behind, as far as was planned.
    first: usize,
    end: usize,
    in_flight: usize,
    /// Nothing more is to be planned.
    planned: bool,
}

/// A request for what follows each other in a file.
#[derive(Clone, Copy, Default)]
struct Run {
    stretch: usize,
    /// The first of what is wanted, and how many, those of the same bytes included.
    first: usize,
    rows: usize,
    /// What has to come of it: of the last block of a file there may be a part.
    needed_bytes: usize,
    again: u8,
}

fn is_short_of_descriptors(error: &Error) -> bool {
    matches!(error, Error::Row { loss: RowLoss::Io(Errno::MFILE | Errno::NFILE), .. })
}

struct Transfer<'a, 'p, 'm> {
    rows: &'a Rows,
    wanted: &'a [Wanted],
    into: Span<'m>,
    way: Way<'m>,
    pace: &'a mut Pace<'p>,
    /// What is read next.
    next: usize,
    /// The files read from; those of which all has come are closed for this take.
    stretches: Vec<Option<Stretch>>,
    runs: Vec<Run>,
    free: Vec<u32>,
    spare_parts: Vec<Parts<'m>>,
    /// What has the same bytes: each is read once.
    repeats: Vec<(Wanted, usize)>,
    failed: Option<Error>,
    /// When it began: a file that was changed later may have been cut for a while.
    began_ns: i64,
}

impl<'a, 'p, 'm> Transfer<'a, 'p, 'm> {
    fn new(
        rows: &'a Rows,
        wanted: &'a [Wanted],
        into: Span<'m>,
        way: Way<'m>,
        pace: &'a mut Pace<'p>,
    ) -> Self {
        Self {
            rows,
            wanted,
            into,
            way,
            pace,
            next: 0,
            stretches: Vec::new(),
            runs: Vec::new(),
            free: Vec::new(),
            spare_parts: Vec::new(),
            repeats: Vec::new(),
            failed: None,
            began_ns: coarse_ns(),
        }
    }

    fn all(&mut self) -> Result<()> {
        let first = self.next_read()?;
        let files = &self.rows.files;
        let stretch = self.stretches.last().and_then(Option::as_ref);
        let in_memory =
            stretch.is_some_and(|stretch| files.is_memory_backed(stretch.shard, &stretch.file));
        let advised =
            stretch.is_some_and(|stretch| files.reads_when_advised(stretch.shard, &stretch.file));
        let few = self.wanted.len() <= FEW && matches!(self.way, Way::Cached(_));
        if in_memory || self.next == self.wanted.len() {
            self.run(&mut Inline::default(), first)?;
        } else if few && advised {
            self.run(&mut Advised::new(FEW), first)?;
        } else {
            let wanted = self.wanted.len();
            RINGS.together(wanted, |queue| self.run(queue, first))?;
        }
        for &(from, to) in &self.repeats {
            self.into.part(to, from.len as usize).copy_span(from.memory_in(self.into));
            self.pace.check((from.len as usize / system_page_bytes()).max(1))?;
        }
        Ok(())
    }

    /// Reads that this take may have in flight. Each keeps its file open: of more files than
    /// may be, all takes together have half as many as that.
    fn depth(&self) -> usize {
        let most = match self.way {
            Way::Cached(_) => DEPTH,
            Way::Direct(blocks) => blocks.depth(),
        };
        let open_limit = self.rows.files.open_limit();
        if self.rows.files.len() <= open_limit {
            return most;
        }
        let readers = self.rows.readers.load(Ordering::Relaxed).max(1);
        (open_limit / 2 / readers).clamp(1, most)
    }

    fn run(
        &mut self,
        queue: &mut dyn Queue<'static, 'm>,
        first: Option<Submission<'static, 'm>>,
    ) -> Result<()> {
        let mut ended = Vec::with_capacity(self.wanted.len().min(DEPTH));
        if let Some(first) = first {
            queue.push(first);
        }
        let mut prepared = queue.in_flight();
        loop {
            while self.failed.is_none() && queue.room() > 0 && queue.in_flight() < self.depth() {
                match self.next_read() {
                    Ok(Some(read)) => queue.push(read),
                    Ok(None) => break,
                    // Reads in flight keep descriptors open: some are to be had once they end.
                    Err(error) if is_short_of_descriptors(&error) && queue.in_flight() > 0 => break,
                    Err(error) => return Err(error),
                }
                prepared += 1;
                if prepared >= if queue.in_flight() < BUSY { EARLY } else { LATER } {
                    queue.start();
                    prepared = 0;
                }
            }
            let in_flight = queue.in_flight();
            if in_flight == 0 {
                return self.failed.take().map_or(Ok(()), Err);
            }
            prepared = 0;
            let least = match in_flight {
                // Nothing to be done before the last has come.
                _ if self.next == self.wanted.len() => in_flight,
                BUSY.. => BUSY_WAIT,
                _ => 1,
            };
            queue.wait(least, WAIT, &mut ended);
            for completion in ended.drain(..) {
                self.end_read(completion, queue);
            }
            self.pace.check(0)?;
        }
    }

    fn loss(&self, shard: u32, offset: u64, loss: RowLoss) -> Error {
        self.rows.files.shard(shard).loss(offset, self.rows.row_bytes, loss)
    }

    /// The stretch that what is wanted next is in.
    fn stretch_of(&mut self, wanted: &Wanted) -> Result<usize> {
        if let Some(Some(last)) = self.stretches.last() {
            if last.shard == wanted.shard {
                return Ok(self.stretches.len() - 1);
            }
        }
        let Opened { file, align } = self
            .rows
            .files
            .file(wanted.shard)
            .map_err(|loss| self.loss(wanted.shard, wanted.offset, loss))?;
        self.stretches.push(Some(Stretch {
            shard: wanted.shard,
            file,
            align: u64::from(align),
            first: self.next,
            end: self.next,
            in_flight: 0,
            planned: false,
        }));
        Ok(self.stretches.len() - 1)
    }

    /// The next request.
    fn next_read(&mut self) -> Result<Option<Submission<'static, 'm>>> {
        let Some(first) = self.wanted.get(self.next).copied() else { return Ok(None) };
        let number = self.stretch_of(&first)?;
        let id = self.free.pop().unwrap_or_else(|| {
            self.runs.push(Run::default());
            u32::try_from(self.runs.len() - 1).expect("as many as are in flight")
        });
        let mut parts = self.spare_parts.pop().unwrap_or_default();
        let (start, next) = (self.next, self.next_behind(number, &first, id, &mut parts));
        let last_end = self.wanted[start..next].iter().map(Wanted::end).max().unwrap_or(0);
        self.next = next;
        let stretch = self.stretches[number].as_mut().expect("it was just looked at");
        stretch.end = next;
        stretch.in_flight += 1;
        stretch.planned = self.wanted.get(next).is_none_or(|behind| behind.shard != stretch.shard);
        let offset_bytes = match self.way {
            Way::Cached(_) => first.offset,
            Way::Direct(_) => first.offset / stretch.align * stretch.align,
        };
        self.runs[id as usize] = Run {
            stretch: number,
            first: start,
            rows: next - start,
            needed_bytes: (last_end - offset_bytes) as usize,
            again: 0,
        };
        let file = OpenFile::Shared(Arc::clone(&stretch.file));
        let direction = Direction::Read;
        Ok(Some(Submission { id, direction, file, offset_bytes, parts }))
    }

    /// Says where the bytes of a request go, from `first` on as many as lie so close that one
    /// request reads them all; the first that is not among them.
    fn next_behind(
        &mut self,
        stretch: usize,
        first: &Wanted,
        id: u32,
        parts: &mut Parts<'m>,
    ) -> usize {
        match self.way {
            Way::Cached(gap) => self.straight(first, gap, parts),
            Way::Direct(blocks) => {
                let align = self.stretches[stretch].as_ref().map_or(1, |stretch| stretch.align);
                self.in_blocks(first, blocks.of(id), align, parts)
            }
        }
    }

    fn straight(&mut self, first: &Wanted, gap: Span<'m>, parts: &mut Parts<'m>) -> usize {
        let mut last = *first;
        let mut rows = 0;
        let mut next = self.next;
        loop {
            parts.push(last.memory_in(self.into));
            rows += 1;
            next += 1;
            // Places of the same bytes.
            while let Some(same) = self.wanted.get(next) {
                if (same.shard, same.offset, same.len) != (last.shard, last.offset, last.len) {
                    break;
                }
                self.repeats.push((last, same.place));
                next += 1;
            }
            let Some(&behind) = self.wanted.get(next) else { break };
            let joins = behind.shard == first.shard
                && behind.offset >= last.end()
                && behind.offset - last.end() <= GAP_BYTES as u64
                && behind.end() - first.offset <= MAX_RUN_BYTES as u64
                && rows < MAX_RUN_ROWS;
            if !joins {
                break;
            }
            if behind.offset > last.end() {
                parts.push(gap.part(0, (behind.offset - last.end()) as usize));
            }
            last = behind;
        }
        next
    }

    /// Whole blocks, each of which is read once.
    fn in_blocks(
        &self,
        first: &Wanted,
        block: Span<'m>,
        align: u64,
        parts: &mut Parts<'m>,
    ) -> usize {
        let start = first.offset / align * align;
        let mut end = first.end().next_multiple_of(align);
        let joined = self.wanted[self.next + 1..].iter().take_while(|behind| {
            let joined = behind.end().next_multiple_of(align).max(end);
            let joins = behind.shard == first.shard
                && behind.offset <= end + GAP_BYTES as u64
                && joined - start <= MAX_BLOCK_BYTES as u64;
            if joins {
                end = joined;
            }
            joins
        });
        let rows = 1 + joined.count();
        parts.push(block.part(0, (end - start) as usize));
        self.next + rows
    }

    /// Takes a read that has ended: good, to be made again, or to be made row by row,
    /// which goes on after a short count and finds the bad row.
    fn end_read(
        &mut self,
        completion: Completion<'static, 'm>,
        queue: &mut dyn Queue<'static, 'm>,
    ) {
        let Completion { submission: mut read, result } = completion;
        let mut run = self.runs[read.id as usize];
        let wanted = run.first..run.first + run.rows;
        match result {
            Ok(bytes) if bytes >= run.needed_bytes => {
                count(&self.rows.counters.bytes_read, bytes as u64);
                count(&self.rows.counters.reads, 1);
                if let Way::Direct(blocks) = self.way {
                    let block = blocks.of(read.id);
                    for row in &self.wanted[wanted] {
                        let at = (row.offset - read.offset_bytes) as usize;
                        row.memory_in(self.into).copy_span(block.part(at, row.len as usize));
                    }
                }
            }
            Err(Errno::AGAIN | Errno::INTR) if run.again < AGAIN_LIMIT => {
                run.again += 1;
                self.runs[read.id as usize] = run;
                queue.push(read);
                return;
            }
            _ => self.read_anew(run.stretch, wanted),
        }
        self.free.push(read.id);
        read.parts.clear();
        self.spare_parts.push(read.parts);
        self.end_of_run(run.stretch);
    }

    /// Looks at a file once all of it has come: a read beside a truncation may bring zeros and a
    /// full count, so what came of a file that has changed is read again.
    fn end_of_run(&mut self, number: usize) {
        let Some(stretch) = self.stretches[number].as_mut() else { return };
        stretch.in_flight -= 1;
        if stretch.in_flight > 0 || !stretch.planned {
            return;
        }
        let wanted = stretch.first..stretch.end;
        let end = self.wanted[wanted.clone()].iter().map(Wanted::end).max().unwrap_or(0);
        let unchanged = sys_file::facts(stretch.file.as_fd())
            .is_ok_and(|facts| facts.size_bytes >= end && facts.changed_ns < self.began_ns);
        if !unchanged {
            self.read_anew(number, wanted);
        }
        // The last that is wanted is asked for its file when the next is planned.
        self.stretches[number] = None;
    }

    /// Reads what is wanted row by row, each until its file did not change meanwhile.
    fn read_anew(&mut self, number: usize, wanted: std::ops::Range<usize>) {
        let Some((file, align)) =
            self.stretches[number].as_ref().map(|s| (Arc::clone(&s.file), s.align))
        else {
            return;
        };
        for index in wanted {
            if self.failed.is_some() {
                return;
            }
            let row = self.wanted[index];
            let read = self.read_rows_of(&file, &row, align).and_then(|()| self.pace.check(1));
            self.failed = read.err();
        }
    }

    /// Reads each row of what is wanted by itself.
    fn read_rows_of(&self, file: &OwnedFd, wanted: &Wanted, align: u64) -> Result<()> {
        let shard = self.rows.files.shard(wanted.shard);
        let mut start = wanted.offset;
        while start < wanted.end() {
            let end = shard.row_end(start, self.rows.row_bytes).min(wanted.end());
            let place = wanted.place + (start - wanted.offset) as usize;
            let into = self.into.part(place, (end - start) as usize);
            self.read_alone(file, into, start, align)
                .map_err(|loss| self.loss(wanted.shard, start, loss))?;
            start = end;
        }
        Ok(())
    }

    /// Reads one row, or a part of it. Memory that the kernel cannot reach (a window's) is
    /// filled through a buffer.
    fn read_alone(
        &self,
        file: &OwnedFd,
        into: Span<'m>,
        offset: u64,
        align: u64,
    ) -> Result<(), RowLoss> {
        let len = into.len();
        let read = match self.way {
            Way::Direct(blocks) => {
                let start = offset / align * align;
                let before = (offset - start) as usize;
                let whole = (before + len).next_multiple_of(align as usize);
                let block = blocks.spare().part(0, whole);
                sys_file::read_blocks_unchanged(file.as_fd(), block, start).map(|(read, facts)| {
                    into.copy_span(block.part(before, len));
                    (read.saturating_sub(before).min(len), facts)
                })
            }
            Way::Cached(_) => match sys_file::read_unchanged(file.as_fd(), into, offset) {
                Err(Errno::FAULT) => {
                    let mut buffer = vec![0; len];
                    let read =
                        sys_file::read_unchanged(file.as_fd(), Span::of(&mut buffer), offset);
                    into.copy_from(&buffer);
                    read
                }
                read => read,
            },
        };
        let (read, Facts { size_bytes, .. }) = read.map_err(RowLoss::Io)?;
        count(&self.rows.counters.bytes_read, read as u64);
        count(&self.rows.counters.reads, 1);
        if read < len || size_bytes < offset + len as u64 {
            return Err(RowLoss::Truncated { size_bytes });
        }
        Ok(())
    }
}
