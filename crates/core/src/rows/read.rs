//! The rows that are read: sorted, neighbours merged, all in flight together.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::{count, Rows, Wanted};
use crate::error::{Error, Result, RowLoss};
use crate::store::Pace;
use crate::sys::clock::coarse_ns;
use crate::sys::file::{self as sys_file, Facts, Parts};
use crate::sys::ring::{Completion, Direction, Inline, OpenFile, Queue, Submission, DEPTH};
use crate::sys::span::Span;

/// How long a wait for the device may keep the caller's interrupt waiting.
const WAIT: Duration = Duration::from_millis(50);
/// Bytes that are read by one request; a longer row is several.
const MAX_RUN_BYTES: usize = 1 << 20;
/// Rows of one request: the kernel takes 1024 separate buffers, and between two rows is one.
const MAX_RUN_ROWS: usize = 512;
/// Bytes between two rows that cost less to read than another request.
const GAP_BYTES: usize = 4096;
/// How often a request that ended with EAGAIN or EINTR is made again as it was.
const AGAIN_LIMIT: u8 = 8;

impl Rows {
    /// Reads rows into their places in `into`.
    pub(super) fn read(
        &self,
        mut wanted: Vec<Wanted>,
        into: Span<'_>,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        if !wanted.is_sorted() {
            wanted.sort_unstable();
        }
        count(&self.counters.rows_read, wanted.len() as u64);
        self.budget.note_reads(wanted.len() as u64);
        let mut gap = vec![0; GAP_BYTES];
        let gap = Span::of(&mut gap);
        let _reader = Reader::new(&self.readers);
        Transfer::new(self, &wanted, into, gap, pace).all()
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

/// A request for rows that follow each other, or for a part of one.
#[derive(Clone, Copy, Default)]
struct Run {
    /// The first of them in the list of those wanted, and how many.
    first: usize,
    rows: usize,
    /// The part of a row that is longer than a request.
    row_offset: usize,
    len: usize,
    again: u8,
}

fn is_short_of_descriptors(error: &Error) -> bool {
    matches!(error, Error::Row { loss: RowLoss::Io(Errno::MFILE | Errno::NFILE), .. })
}

struct Transfer<'a, 'p, 'm> {
    rows: &'a Rows,
    wanted: &'a [Wanted],
    into: Span<'m>,
    /// Where bytes between rows go, which nobody reads.
    gap: Span<'m>,
    pace: &'a mut Pace<'p>,
    /// What is read next.
    next: usize,
    row_offset: usize,
    /// The file that was last read from.
    current: Option<(u32, Arc<OwnedFd>)>,
    runs: Vec<Run>,
    free: Vec<u32>,
    spare_parts: Vec<Parts<'m>>,
    /// (from, to): places of the same row, which is read once.
    repeats: Vec<(u32, u32)>,
    failed: Option<Error>,
    /// When it began: a file that was changed later may have been cut for a while.
    began_ns: i64,
}

impl<'a, 'p, 'm> Transfer<'a, 'p, 'm> {
    fn new(
        rows: &'a Rows,
        wanted: &'a [Wanted],
        into: Span<'m>,
        gap: Span<'m>,
        pace: &'a mut Pace<'p>,
    ) -> Self {
        Self {
            rows,
            wanted,
            into,
            gap,
            pace,
            next: 0,
            row_offset: 0,
            current: None,
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
        let shard = self.wanted[0].shard;
        let in_memory = match &self.current {
            Some((_, file)) => self.rows.files.is_memory_backed(shard, file),
            None => false,
        };
        if in_memory || self.next == self.wanted.len() {
            self.run(&mut Inline::default(), first)?;
        } else {
            let (rows, wanted) = (self.rows, self.wanted.len());
            rows.rings.together(wanted, |queue| self.run(queue, first))?;
        }
        self.recheck()?;
        let row_bytes = self.rows.row_bytes;
        let place = |position: u32| self.into.part(position as usize * row_bytes, row_bytes);
        for &(from, to) in &self.repeats {
            place(to).copy_span(place(from));
        }
        Ok(())
    }

    /// Reads that this take may have in flight. Each keeps its file open: of more files than
    /// may be, all takes together have half as many as that.
    fn share(&self) -> usize {
        let open_limit = self.rows.files.open_limit();
        if self.rows.files.len() <= open_limit {
            return DEPTH;
        }
        let readers = self.rows.readers.load(Ordering::Relaxed).max(1);
        (open_limit / 2 / readers).clamp(1, DEPTH)
    }

    /// Whether all rows are in one file, whose size can be asked for once they are read.
    fn one_file(&self) -> bool {
        // They are sorted.
        self.wanted.first().map(|row| row.shard) == self.wanted.last().map(|row| row.shard)
    }

    /// Whether a file has not been changed while it was read, nor is cut before `end`.
    /// Beside a cut reads bring zeros, and a full count ([`sys_file::is_cut`]).
    fn is_unchanged(&self, file: BorrowedFd<'_>, end: u64) -> bool {
        sys_file::facts(file)
            .is_ok_and(|facts| facts.size_bytes >= end && facts.changed_ns < self.began_ns)
    }

    /// Reads all rows of a file that was changed meanwhile again, one by one.
    fn recheck(&mut self) -> Result<()> {
        let (true, Some((_, file))) = (self.one_file(), self.current.clone()) else {
            return Ok(());
        };
        let row_bytes = self.rows.row_bytes;
        let end = self.wanted.last().map_or(0, |row| row.bytes(row_bytes).end);
        if self.is_unchanged(file.as_fd(), end) {
            return Ok(());
        }
        let whole_row = Run { rows: 1, len: row_bytes, ..Run::default() };
        let file = OpenFile::Shared(file);
        for row in self.wanted {
            self.read_alone(&file, row, whole_row).map_err(|loss| self.loss(row, loss))?;
            self.pace.check(1)?;
        }
        Ok(())
    }

    fn run(
        &mut self,
        queue: &mut dyn Queue<'static, 'm>,
        first: Option<Submission<'static, 'm>>,
    ) -> Result<()> {
        let mut ended = Vec::with_capacity(DEPTH);
        if let Some(first) = first {
            queue.push(first);
        }
        loop {
            while self.failed.is_none() && queue.room() > 0 && queue.in_flight() < self.share() {
                match self.next_read() {
                    Ok(Some(read)) => queue.push(read),
                    Ok(None) => break,
                    // Reads in flight keep descriptors open: some are to be had once they end.
                    Err(error) if is_short_of_descriptors(&error) && queue.in_flight() > 0 => {
                        self.current = None;
                        break;
                    }
                    Err(error) => return Err(error),
                }
            }
            if queue.in_flight() == 0 {
                return self.failed.take().map_or(Ok(()), Err);
            }
            queue.wait(WAIT, &mut ended);
            for completion in ended.drain(..) {
                self.end_read(completion, queue);
            }
            self.pace.check(0)?;
        }
    }

    fn loss(&self, wanted: &Wanted, loss: RowLoss) -> Error {
        self.rows.files.shard(wanted.shard).loss(wanted.offset, self.rows.row_bytes, loss)
    }

    fn file_of(&mut self, wanted: &Wanted) -> Result<Arc<OwnedFd>> {
        if let Some((shard, file)) = &self.current {
            if *shard == wanted.shard {
                return Ok(Arc::clone(file));
            }
        }
        let file = self.rows.files.file(wanted.shard).map_err(|loss| self.loss(wanted, loss))?;
        self.current = Some((wanted.shard, Arc::clone(&file)));
        Ok(file)
    }

    /// The next request.
    fn next_read(&mut self) -> Result<Option<Submission<'static, 'm>>> {
        let Some(first) = self.wanted.get(self.next).copied() else { return Ok(None) };
        let file = self.file_of(&first)?;
        let id = self.free.pop().unwrap_or_else(|| {
            self.runs.push(Run::default());
            u32::try_from(self.runs.len() - 1).expect("as many as are in flight")
        });
        let mut parts = self.spare_parts.pop().unwrap_or_default();
        let offset_bytes = first.offset + self.row_offset as u64;
        let run = if self.rows.row_bytes > MAX_RUN_BYTES {
            self.part_of_row(&first, &mut parts)
        } else {
            self.run_of_rows(&first, &mut parts)
        };
        self.runs[id as usize] = run;
        let file = OpenFile::Shared(file);
        let direction = Direction::Read;
        Ok(Some(Submission { id, direction, file, offset_bytes, parts }))
    }

    /// The next part of a row that is longer than a request.
    fn part_of_row(&mut self, row: &Wanted, parts: &mut Parts<'m>) -> Run {
        let row_bytes = self.rows.row_bytes;
        let row_offset = self.row_offset;
        let len = MAX_RUN_BYTES.min(row_bytes - row_offset);
        parts.push(row.place(self.into, row_bytes).part(row_offset, len));
        let run = Run { first: self.next, rows: 1, row_offset, len, again: 0 };
        self.row_offset += len;
        if self.row_offset == row_bytes {
            self.row_offset = 0;
            self.next += 1;
            self.skip_repeats(row);
        }
        run
    }

    /// Rows from the next one on that lie so close that one request reads them all.
    fn run_of_rows(&mut self, first: &Wanted, parts: &mut Parts<'m>) -> Run {
        let row_bytes = self.rows.row_bytes;
        let start = self.next;
        let mut last = *first;
        let mut rows = 0;
        loop {
            parts.push(last.place(self.into, row_bytes));
            rows += 1;
            self.next += 1;
            self.skip_repeats(&last);
            let Some(&next) = self.wanted.get(self.next) else { break };
            let end = last.offset + row_bytes as u64;
            let len = next.offset.saturating_sub(first.offset) as usize + row_bytes;
            let joins = next.shard == first.shard
                && next.offset - end <= GAP_BYTES as u64
                && len <= MAX_RUN_BYTES
                && rows < MAX_RUN_ROWS;
            if !joins {
                break;
            }
            if next.offset > end {
                parts.push(self.gap.part(0, (next.offset - end) as usize));
            }
            last = next;
        }
        let len = (last.offset - first.offset) as usize + row_bytes;
        Run { first: start, rows: self.next - start, row_offset: 0, len, again: 0 }
    }

    /// Leaves out places of the row that was just added to a request.
    fn skip_repeats(&mut self, row: &Wanted) {
        while let Some(next) = self.wanted.get(self.next) {
            if (next.shard, next.offset) != (row.shard, row.offset) {
                return;
            }
            self.repeats.push((row.position, next.position));
            self.next += 1;
        }
    }

    /// Takes a read that has ended: good, to be made again, or to be made row by row,
    /// which goes on after a short count and finds the bad row.
    fn end_read(
        &mut self,
        completion: Completion<'static, 'm>,
        queue: &mut dyn Queue<'static, 'm>,
    ) {
        let Completion { submission: mut read, result } = completion;
        let one_file = self.one_file();
        let mut run = self.runs[read.id as usize];
        let end = read.offset_bytes + run.len as u64;
        match result {
            Ok(bytes)
                if bytes == run.len && (one_file || self.is_unchanged(read.file.as_fd(), end)) =>
            {
                count(&self.rows.counters.bytes_read, bytes as u64);
                count(&self.rows.counters.reads, 1);
            }
            Err(Errno::AGAIN | Errno::INTR) if run.again < AGAIN_LIMIT => {
                run.again += 1;
                self.runs[read.id as usize] = run;
                queue.push(read);
                return;
            }
            _ => {
                for wanted in &self.wanted[run.first..run.first + run.rows] {
                    if let Err(loss) = self.read_alone(&read.file, wanted, run) {
                        let error = self.loss(wanted, loss);
                        self.failed.get_or_insert(error);
                        break;
                    }
                }
            }
        }
        self.free.push(read.id);
        read.parts.clear();
        self.spare_parts.push(read.parts);
    }

    /// Reads one row, or the part of it that `run` is. Memory that the kernel cannot
    /// reach (a window's) is filled through a buffer.
    fn read_alone(&self, file: &OpenFile<'_>, wanted: &Wanted, run: Run) -> Result<(), RowLoss> {
        let row_bytes = self.rows.row_bytes;
        let len = run.len.min(row_bytes - run.row_offset);
        let into = wanted.place(self.into, row_bytes).part(run.row_offset, len);
        let offset = wanted.offset + run.row_offset as u64;
        let read = match sys_file::read_unchanged(file.as_fd(), into, offset) {
            Err(Errno::FAULT) => {
                let mut buffer = vec![0; len];
                let read = sys_file::read_unchanged(file.as_fd(), Span::of(&mut buffer), offset);
                into.copy_from(&buffer);
                read
            }
            read => read,
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
