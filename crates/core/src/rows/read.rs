//! Rows that are read: sorted, neighbours merged, all in flight together.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;

use super::blocks::{BlockPool, Blocks, MAX_BLOCK_BYTES};
use super::files::{Files, Opened};
use super::{count, Rows};
use crate::error::{Error, Result, RowLoss};
use crate::io::{
    is_unchanged, join, read_alone, transfer, Ended, Pace, Request, Segment, Share, Transfer, Way,
    MAX_FLIGHT_BYTES,
};
use crate::sys::clock::coarse_ns;
use crate::sys::file::{self as sys_file, Parts};
use crate::sys::mm::system_page_bytes;
use crate::sys::ring::{Direction, RingPool, DEPTH};
use crate::sys::span::Span;

/// Bytes between two rows that cost less to read than another request.
const GAP_BYTES: usize = 4096;
/// Reads through the page cache that are so few that the kernel is asked to read each ahead,
/// and then waited for in their order. A ring wakes the thread for each page that comes, to
/// copy from it.
const FEW: usize = 64;

/// The rings and blocks of all rows of the process: that of the last take is ready, whichever
/// rows it was of.
static RINGS: RingPool = RingPool::new();
static BLOCKS: BlockPool = BlockPool::new();

impl Rows {
    /// Reads what is wanted into its places in `into`.
    pub(super) fn read(
        &self,
        wanted: &mut [Segment],
        into: Span<'_>,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        if !wanted.is_sorted() {
            wanted.sort_unstable();
        }
        if self.files.are_provided() {
            let filed = self.provide(wanted, into, pace)?;
            return self.read_files(&filed, into, pace);
        }
        self.read_files(wanted, into, pace)
    }

    /// The same of files, sorted.
    fn read_files(&self, wanted: &[Segment], into: Span<'_>, pace: &mut Pace<'_>) -> Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        let bytes: u64 = wanted.iter().map(|row| u64::from(row.len)).sum();
        self.budget.note_reads(bytes.div_ceil(self.row_bytes as u64));
        if !self.direct {
            let mut gap = [0; GAP_BYTES];
            return self.read_by(wanted, into, Memory::Straight(Span::of(&mut gap)), pace);
        }
        let longest = wanted.iter().map(|row| row.len as usize).max().unwrap_or(0);
        let blocks = BLOCKS.take(longest).map_err(|errno| Error::system("take", errno))?;
        let outcome = self.read_by(wanted, into, Memory::Blocks(&blocks), pace);
        BLOCKS.give_back(blocks);
        outcome
    }

    /// The same, by way of some memory. Reads in flight keep their files open: of more files than
    /// may be, all takes together have half as many in flight as that.
    fn read_by<'m>(
        &self,
        wanted: &[Segment],
        into: Span<'m>,
        memory: Memory<'m>,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        let many_files = self.files.len() > self.files.open_limit();
        let mut reads = RowReads {
            rows: self,
            wanted,
            into,
            memory,
            free_blocks: (0..DEPTH as u32).collect(),
            share: many_files.then(|| self.in_flight.share(DEPTH)),
            pace,
            next: 0,
            stretches: Vec::new(),
            repeats: Vec::new(),
            failed: None,
            began_ns: coarse_ns(),
        };
        transfer(&mut reads)?;
        reads.end_all()
    }
}

/// Where bytes go first.
#[derive(Clone, Copy)]
enum Memory<'m> {
    /// Straight to their places; here go bytes between rows, which nobody reads.
    Straight(Span<'m>),
    /// Past the page cache, to whole blocks, from which they are copied.
    Blocks(&'m Blocks),
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
struct Merged {
    stretch: usize,
    /// Which of the wanted it is for, those of the same bytes included.
    wanted: Range<usize>,
    /// Where it begins in the file, and the number of its block, if it has one.
    offset: u64,
    block: Option<u32>,
}

fn is_short_of_descriptors(error: &Error) -> bool {
    matches!(error, Error::Row { loss: RowLoss::Io(Errno::MFILE | Errno::NFILE), .. })
}

struct RowReads<'a, 'p, 'm> {
    rows: &'a Rows,
    wanted: &'a [Segment],
    into: Span<'m>,
    memory: Memory<'m>,
    /// Those of the memory that no read in flight has.
    free_blocks: Vec<u32>,
    /// What may be in flight where the files are too many to be open.
    share: Option<Share<'a>>,
    pace: &'a mut Pace<'p>,
    /// The first that was not planned.
    next: usize,
    /// Those of which all has come are closed for this take.
    stretches: Vec<Option<Stretch>>,
    /// What has the same bytes: each is read once.
    repeats: Vec<(Segment, usize)>,
    failed: Option<Error>,
    /// When it began: a file that was changed later may have been cut for a while.
    began_ns: i64,
}

impl<'m> RowReads<'_, '_, 'm> {
    /// What is left to be done once all reads have ended.
    fn end_all(&mut self) -> Result<()> {
        self.failed.take().map_or(Ok(()), Err)?;
        for &(from, to) in &self.repeats {
            self.into.part(to, from.len as usize).copy_span(self.place_of(&from));
            self.pace.check((from.len as usize / system_page_bytes()).max(1))?;
        }
        Ok(())
    }

    fn place_of(&self, segment: &Segment) -> Span<'m> {
        self.into.part(segment.place, segment.len as usize)
    }

    fn loss(&self, shard: u32, offset: u64, loss: RowLoss) -> Error {
        self.rows.files.shard(shard).loss(offset, self.rows.row_bytes, loss)
    }

    /// The stretch that what is wanted next is in.
    fn stretch_of(&mut self, wanted: &Segment) -> Result<usize> {
        if let Some(Some(last)) = self.stretches.last() {
            if last.shard == wanted.file {
                return Ok(self.stretches.len() - 1);
            }
        }
        let Opened { file, align } = self
            .rows
            .files
            .file(wanted.file)
            .map_err(|loss| self.loss(wanted.file, wanted.offset, loss))?;
        self.stretches.push(Some(Stretch {
            shard: wanted.file,
            file,
            align: u64::from(align),
            first: self.next,
            end: self.next,
            in_flight: 0,
            planned: false,
        }));
        Ok(self.stretches.len() - 1)
    }

    /// Whole blocks, each of which is read once: how many of the wanted they have, and how long
    /// they are.
    fn blocks_at(wanted: &[Segment], align: u64) -> (usize, usize) {
        let first = &wanted[0];
        let start = first.offset / align * align;
        let mut end = first.end().next_multiple_of(align);
        let joined = wanted[1..].iter().take_while(|next| {
            let joined = next.end().next_multiple_of(align).max(end);
            let joins = next.file == first.file
                && next.offset <= end + GAP_BYTES as u64
                && joined - start <= MAX_BLOCK_BYTES as u64;
            if joins {
                end = joined;
            }
            joins
        });
        (1 + joined.count(), (end - start) as usize)
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
        let end = self.wanted[wanted.clone()].iter().map(Segment::end).max().unwrap_or(0);
        if !is_unchanged(stretch.file.as_fd(), end, self.began_ns) {
            self.read_anew(number, wanted);
        }
        // The last that is wanted is asked for its file when the next is planned.
        self.stretches[number] = None;
    }

    /// Reads what is wanted row by row, each until its file did not change meanwhile.
    fn read_anew(&mut self, number: usize, wanted: Range<usize>) {
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

    /// Reads what is wanted by itself; where that fails each row of it, to find the bad one.
    fn read_rows_of(&self, file: &OwnedFd, wanted: &Segment, align: u64) -> Result<()> {
        let shard = self.rows.files.shard(wanted.file);
        let mut start = match self.read_part(file, self.place_of(wanted), wanted.offset, align) {
            Ok(()) => return Ok(()),
            Err(RowLoss::Truncated { size_bytes }) => {
                shard.row_start(size_bytes, self.rows.row_bytes).max(wanted.offset)
            }
            Err(_) => wanted.offset,
        };
        while start < wanted.end() {
            let end = shard.row_end(start, self.rows.row_bytes).min(wanted.end());
            let place = wanted.place + (start - wanted.offset) as usize;
            let into = self.into.part(place, (end - start) as usize);
            self.read_part(file, into, start, align)
                .map_err(|loss| self.loss(wanted.file, start, loss))?;
            start = end;
        }
        Ok(())
    }

    /// Reads one row, or a part of it.
    fn read_part(
        &self,
        file: &OwnedFd,
        into: Span<'m>,
        offset: u64,
        align: u64,
    ) -> Result<(), RowLoss> {
        let len = into.len();
        let read = match self.memory {
            Memory::Blocks(blocks) => {
                let start = offset / align * align;
                let before = (offset - start) as usize;
                let whole = (before + len).next_multiple_of(align as usize);
                let block = blocks.spare().part(0, whole);
                sys_file::read_blocks_unchanged(file.as_fd(), block, start).map(|(read, facts)| {
                    into.copy_span(block.part(before, len));
                    (read.saturating_sub(before).min(len), facts)
                })
            }
            Memory::Straight(_) => read_alone(file.as_fd(), into, offset),
        };
        let (read, facts) = read.map_err(RowLoss::Io)?;
        count(&self.rows.counters.bytes_read, read as u64);
        count(&self.rows.counters.reads, 1);
        if read < len || facts.size_bytes < offset + len as u64 {
            return Err(RowLoss::Truncated { size_bytes: facts.size_bytes });
        }
        Ok(())
    }
}

impl<'m> Transfer<'static, 'm> for RowReads<'_, '_, 'm> {
    type Note = Merged;
    /// A file may have to be opened.
    const SLOW_TO_PREPARE: bool = true;
    const USED_TOGETHER: bool = true;

    fn way(&self) -> Way<'static> {
        let files = &self.rows.files;
        let stretch = self.stretches.last().and_then(Option::as_ref);
        let is = |what: fn(&Files, u32, &Arc<OwnedFd>) -> bool| {
            stretch.is_some_and(|stretch| what(files, stretch.shard, &stretch.file))
        };
        let few = self.wanted.len() <= FEW && matches!(self.memory, Memory::Straight(_));
        if is(Files::is_memory_backed) {
            Way::Caller
        } else if few && is(Files::reads_when_advised) {
            Way::Advised(FEW)
        } else {
            Way::Together(self.wanted.len(), &RINGS)
        }
    }

    fn may_begin(&self, in_flight: usize, bytes_in_flight: usize) -> bool {
        let direct = matches!(self.memory, Memory::Blocks(_));
        !(direct && bytes_in_flight >= MAX_FLIGHT_BYTES)
            && self.share.as_ref().is_none_or(|share| in_flight < share.limit())
    }

    fn next(&mut self, in_flight: usize, parts: &mut Parts<'m>) -> Result<Option<Request<Merged>>> {
        if self.all_begun() {
            return Ok(None);
        }
        let (start, first) = (self.next, self.wanted[self.next]);
        let number = match self.stretch_of(&first) {
            // Reads in flight keep descriptors open: some are to be had once they end.
            Err(error) if is_short_of_descriptors(&error) && in_flight > 0 => return Ok(None),
            number => number?,
        };
        let rest = &self.wanted[start..];
        let align = self.stretches[number].as_ref().map_or(1, |stretch| stretch.align);
        let (into, repeats) = (self.into, &mut self.repeats);
        let (joined, offset, block) = match self.memory {
            Memory::Straight(gap) => {
                let memory = |segment: &Segment| into.part(segment.place, segment.len as usize);
                let repeat = |from: &Segment, to: &Segment| repeats.push((*from, to.place));
                (join(rest, memory, Some(gap), parts, repeat), first.offset, None)
            }
            Memory::Blocks(blocks) => {
                let (joined, len) = Self::blocks_at(rest, align);
                let block = self.free_blocks.pop().expect("one for each in flight");
                parts.push(blocks.of(block).part(0, len));
                (joined, first.offset / align * align, Some(block))
            }
        };
        self.next += joined;
        let last_end = rest[..joined].iter().map(Segment::end).max().unwrap_or(0);
        let stretch = self.stretches[number].as_mut().expect("it was just looked at");
        stretch.end = self.next;
        stretch.in_flight += 1;
        stretch.planned =
            self.wanted.get(self.next).is_none_or(|behind| behind.file != stretch.shard);
        Ok(Some(Request {
            direction: Direction::Read,
            file: Arc::clone(&stretch.file),
            offset_bytes: offset,
            needed_bytes: (last_end - offset) as usize,
            align: align as usize,
            note: Merged { stretch: number, wanted: start..self.next, offset, block },
        }))
    }

    fn all_begun(&self) -> bool {
        self.next == self.wanted.len() || self.failed.is_some()
    }

    /// Good, or to be read row by row, which finds the bad row.
    fn end(&mut self, merged: Merged, ended: Ended) -> Result<()> {
        if ended.whole {
            count(&self.rows.counters.bytes_read, ended.moved_bytes as u64);
            count(&self.rows.counters.reads, 1);
            if let (Memory::Blocks(blocks), Some(number)) = (self.memory, merged.block) {
                let block = blocks.of(number);
                for row in &self.wanted[merged.wanted] {
                    let at = (row.offset - merged.offset) as usize;
                    self.place_of(row).copy_span(block.part(at, row.len as usize));
                }
            }
        } else {
            self.read_anew(merged.stretch, merged.wanted);
        }
        self.free_blocks.extend(merged.block);
        self.end_of_run(merged.stretch);
        Ok(())
    }

    fn check(&mut self, _ended: usize) -> Result<()> {
        self.pace.check(0)
    }
}
