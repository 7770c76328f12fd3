//! Long rows, and rows that follow one another: copied and read as contiguous parts of a file, not
//! row by row.

use std::ops::Range;

use super::maps::{chunks_of, Found, Maps};
use super::{Rows, PIECE_ROWS};
use crate::error::Result;
use crate::io::{Pace, Segment};
use crate::room::{collected, push};
use crate::store::source::{Query, SourceMap, CHUNK_BYTES};
use crate::sys::copy::Recovery;
use crate::sys::mm::system_page_bytes;
use crate::sys::span::Span;
use crate::sys::thread::major_faults;
use crate::units::Row;

/// The longest rows that are copied many at a time, each fetched while those before it are
/// copied. A longer one is fetched by its own copy as fast as memory gives it.
pub(super) const MAX_FETCHED_BYTES: usize = 2048;
/// Bytes that are copied before the thread's major faults are looked at, and the interrupt.
const STEP_BYTES: usize = 1 << 20;
/// The same while they may be cold.
const FIRST_STEP_BYTES: usize = 64 << 10;
/// Bytes that are asked about once some were not in the page cache.
const ASKED_BYTES: usize = 16 << 20;
/// Bytes that are copied, and then read, together.
const PIECE_BYTES: usize = 1 << 30;

/// Bytes of one shard, and where they go.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    shard: u32,
    offset: u64,
    len: usize,
    place: usize,
}

impl Rows {
    /// How many rows of a list are copied, and then read, together.
    pub(super) fn piece_rows(&self) -> usize {
        (PIECE_BYTES / self.row_bytes).clamp(1, PIECE_ROWS)
    }

    /// Takes rows that follow each other, a number of times.
    pub(super) fn take_ranges(
        &self,
        ranges: impl Iterator<Item = Range<u64>>,
        into: Span<'_>,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        let (mut wanted, mut stretches) = (Vec::new(), Vec::new());
        let (mut done, mut bytes) = (0, 0);
        for Range { start: mut row, end } in ranges {
            while row < end {
                let (number, offset) = self.locate(row);
                let most = ((PIECE_BYTES - bytes) / self.row_bytes).max(1) as u64;
                let stop = self.files.shard(number).rows().end.min(end).min(row + most);
                let len = (stop - row) as usize * self.row_bytes;
                let stretch = Stretch { shard: number, offset, len, place: done };
                push("take", &mut stretches, stretch)?;
                (row, done, bytes) = (stop, done + len, bytes + len);
                if bytes >= PIECE_BYTES || stretches.len() == PIECE_ROWS {
                    self.take_piece(&stretches, bytes, into, &mut wanted, pace)?;
                    stretches.clear();
                    bytes = 0;
                }
            }
        }
        self.take_piece(&stretches, bytes, into, &mut wanted, pace)
    }

    /// Takes stretches of so many bytes.
    fn take_piece(
        &self,
        stretches: &[Stretch],
        bytes: usize,
        into: Span<'_>,
        wanted: &mut Vec<Segment>,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        if self.files.len() == 1 {
            // Mapped at once, if that are enough.
            self.files.note_reads(0, stretches.len());
        }
        self.take_stretches(stretches, into, wanted, pace)?;
        self.read_rest(bytes / self.row_bytes, wanted, into, pace)
    }

    /// Copies long rows that are mapped, and adds the others to `wanted`.
    pub(super) fn copy_long(
        &self,
        ids: &[Row],
        into: Span<'_>,
        wanted: &mut Vec<Segment>,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        let stretch = |(position, row): (usize, &Row)| {
            let (shard, offset) = self.locate(row.0);
            Stretch { shard, offset, len: self.row_bytes, place: position * self.row_bytes }
        };
        let stretches: Vec<Stretch> = collected("take", ids.iter().enumerate().map(stretch))?;
        self.take_stretches(&stretches, into, wanted, pace)
    }

    /// Copies stretches as far as they are mapped, and adds the rest to `wanted`.
    fn take_stretches(
        &self,
        stretches: &[Stretch],
        into: Span<'_>,
        wanted: &mut Vec<Segment>,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        let want = |wanted: &mut Vec<Segment>, s: &Stretch| {
            self.want(wanted, s.shard, s.offset, s.len, s.place)
        };
        if self.direct {
            for stretch in stretches {
                want(wanted, stretch)?;
            }
            return Ok(());
        }
        let maps = Maps::of(self, stretches.len())?;
        let mut copier = Copier::new(self, into, wanted);
        let bytes: usize = stretches.iter().map(|stretch| stretch.len).sum();
        if bytes > FIRST_STEP_BYTES {
            copier.faults = Some(major_faults());
        }
        for stretch in stretches {
            copier.stretch(stretch, maps.find(self, stretch.shard), pace)?;
        }
        let Copier { touched, recovery, .. } = copier;
        drop(recovery);
        let changed = self.changed(&touched);
        if !changed.is_empty() {
            // Reading them says what is wrong, if something is.
            let is_of = |shard| changed.contains(&self.files.shard(shard).file_number());
            wanted.retain(|part| !is_of(part.file));
            for stretch in stretches.iter().filter(|stretch| is_of(stretch.shard)) {
                want(wanted, stretch)?;
            }
        }
        Ok(())
    }
}

struct Copier<'c, 'r> {
    rows: &'c Rows,
    into: Span<'c>,
    wanted: &'r mut Vec<Segment>,
    /// Had once there is something to copy from.
    recovery: Option<Recovery>,
    query: Query,
    /// The thread's major faults so far, where there is more than one step.
    faults: Option<u64>,
    /// Bytes that were copied since they were looked at, and how many may be.
    copied: usize,
    limit: usize,
    /// Bytes that are still to be asked about.
    asked: usize,
    touched: Vec<&'c Found>,
}

impl<'c, 'r> Copier<'c, 'r> {
    fn new(rows: &'c Rows, into: Span<'c>, wanted: &'r mut Vec<Segment>) -> Self {
        Self {
            rows,
            into,
            wanted,
            recovery: None,
            query: Query::default(),
            faults: None,
            copied: 0,
            limit: FIRST_STEP_BYTES,
            asked: 0,
            touched: Vec::new(),
        }
    }

    /// Copies one stretch, chunk by chunk.
    fn stretch(
        &mut self,
        stretch: &Stretch,
        found: Option<&'c Found>,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        let Stretch { shard, offset, len, place } = *stretch;
        if found.is_some() && self.recovery.is_none() {
            self.recovery = Recovery::begin().ok();
        }
        let Some(found) = found.filter(|_| self.recovery.is_some()) else {
            self.rows.files.note_reads(shard, (len / system_page_bytes()).max(1));
            return self.rows.want(self.wanted, shard, offset, len, place);
        };
        let bytes = offset..offset + len as u64;
        for chunk in chunks_of(&bytes) {
            let start = bytes.start.max((chunk * CHUNK_BYTES) as u64);
            let end = bytes.end.min(((chunk + 1) * CHUNK_BYTES) as u64);
            let mut at = start;
            while at < end && self.may_copy(&found.map, chunk, at..end) {
                let step = ((end - at) as usize).min(self.limit - self.copied);
                let to = self.into.part(place + (at - offset) as usize, step);
                if !self.copy(found, chunk, at, to) {
                    break;
                }
                at += step as u64;
                self.copied += step;
                if self.copied == self.limit {
                    self.note_faults();
                    pace.check(step / system_page_bytes())?;
                }
            }
            let left = (end - at) as usize;
            if left > 0 {
                // What was lost is read, which says why.
                self.rows.want(self.wanted, shard, at, left, place + (at - offset) as usize)?;
            }
        }
        Ok(())
    }

    /// Whether bytes of a chunk are mapped, and in the page cache as far as is known.
    fn may_copy(&mut self, map: &SourceMap, chunk: usize, bytes: Range<u64>) -> bool {
        if !map.note_use(chunk) && !self.rows.populate(map, chunk, &bytes, &mut self.query) {
            return false;
        }
        if self.asked == 0 {
            return true;
        }
        let start = bytes.start as usize & !(system_page_bytes() - 1);
        let len = bytes.end as usize - start;
        if map.is_resident(start, len, &mut self.query).is_ok_and(|here| here) {
            self.asked = self.asked.saturating_sub(len);
            return true;
        }
        self.asked = ASKED_BYTES;
        self.rows.budget.unmap(map, chunk);
        false
    }

    /// Copies a part of a chunk; whether all of it came.
    fn copy(&mut self, found: &'c Found, chunk: usize, at: u64, to: Span<'_>) -> bool {
        let Some(from) = found.map.bytes(at, to.len()) else { return false };
        let Some(recovery) = &self.recovery else { return false };
        if !found.touched.replace(true) {
            self.touched.push(found);
        }
        let (unmapped, budget) = (self.rows.budget.ended(), &self.rows.budget);
        let copied = recovery.copy_long(to, from).is_ok();
        // What the copy has mapped again of a chunk that was unmapped counts for nobody.
        if budget.begun() != unmapped && !found.map.is_populated(chunk) {
            budget.unmap(&found.map, chunk);
        }
        copied
    }

    /// Looks at the thread's major faults: after one, bytes are asked about.
    fn note_faults(&mut self) {
        self.copied = 0;
        let Some(faults) = self.faults.as_mut() else { return };
        if self.rows.note_major_faults(faults) {
            self.asked = ASKED_BYTES;
            self.limit = FIRST_STEP_BYTES;
        } else {
            self.limit = (2 * self.limit).min(STEP_BYTES);
        }
    }
}
