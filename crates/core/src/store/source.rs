//! The source map: a read-only map of the whole file, from which cached pages are copied without
//! a system call for each.
//!
//! The map exists as long as the store. A chunk of [`CHUNK_BYTES`] is *populated* (its page table
//! is filled) once it has been read often enough to pay for that and all of it is in the page
//! cache. No byte is touched through the map unless `mincore` has said that it is resident:
//! touching a hole of shared memory would allocate it, and touching an absent page would be a
//! major fault. fremap asks about pages just before it copies them, and about rows (`rows`) when
//! it populates their chunk.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::Arc;

use rustix::io::Errno;

use crate::memory::mappings::FileMap;
use crate::room::collected;
use crate::sys::fork;
use crate::sys::fork_lock::ForkLock;
use crate::sys::lock::Lock;
use crate::sys::mm::{system_page_bytes, Access, Advice, Region, Sharing};
use crate::sys::probe::reclaims_page_tables;
use crate::sys::span::Span;
use crate::units::PageSize;

/// What one page-table page maps, and the unit in which the map is populated.
pub(crate) const CHUNK_BYTES: usize = 2 << 20;
/// Page reads from a chunk before it is populated. Populating costs as much as
/// 50 to 200 reads lose by going without (70 to 190 µs against 1 µs each). It is
/// done sooner, as the map serves the store to its end and whoever reads a
/// chunk so often at once will read it again.
pub(crate) const POPULATE_READS: usize = 16;
/// In a chunk's state: how many of its pages were read while it is not populated.
const READS: u16 = 0x07ff;
/// In a chunk's state: how often in a row it was asked for and found not whole in the
/// page cache, which costs 30 µs; each time it takes four times as many reads to ask again.
const MISSED: u16 = 0x1800;
const MISSED_ONCE: u16 = 0x0800;
/// The largest file that is mapped; beyond it pages are read by system calls.
const MAX_MAP_BYTES: u64 = 1 << 44;
/// Pages that are sorted and asked about together.
pub(crate) const PIECE_PAGES: usize = 1 << POSITION_BITS;
/// Bits of a [`key`] that say where in its piece a page is wanted.
const POSITION_BITS: u32 = 16;
/// Bytes of the map that one `mincore` call asks about at most.
const QUERY_BYTES: usize = 64 << 20;
/// A hole between wanted pages that costs less to ask about than another call:
/// in the system's pages, where the map is not populated.
const ABSENT_GAP_PAGES: usize = 16;
/// The same where it is populated.
const POPULATED_GAP_PAGES: usize = 1024;
/// In a chunk's state: its page table is filled.
const POPULATED: u16 = 0x8000;
/// In a chunk's state: it has a page table, which stays when pages are reclaimed.
const TABLE: u16 = 0x4000;
/// In the state of a populated chunk: it was copied from since [`SourceMap::take_use`].
const USED: u16 = 0x2000;

/// A page and where in its piece it is wanted, in one number that sorts by
/// page. Page numbers have 48 bits: a store ends at 1 EiB.
pub(crate) fn key(page: u64, position: usize) -> u64 {
    debug_assert!(position < PIECE_PAGES && page >> (u64::BITS - POSITION_BITS) == 0);
    page << POSITION_BITS | position as u64
}

/// The page of a [`key`].
pub(crate) fn page_of(key: u64) -> u64 {
    key >> POSITION_BITS
}

/// The position of a [`key`].
pub(crate) fn position_of(key: u64) -> usize {
    (key as usize) & (PIECE_PAGES - 1)
}

/// The most files of one store that are mapped: each is a kernel mapping, of which a
/// process has 65 530 for everything.
const MAX_MAPS: u64 = 4096;

/// What the source maps of a store have mapped, all together.
#[derive(Debug)]
pub(crate) struct SourceMaps {
    /// Maps that are alive.
    maps: AtomicU64,
    /// Bytes of populated chunks.
    bytes: AtomicU64,
    /// Page-table pages.
    tables: AtomicU64,
    /// What each window with a budget that is alive lets them map,
    limits: Lock<Vec<u64>>,
    /// and the least of that.
    limit_bytes: AtomicU64,
}

/// A limit of what the source maps of a store have mapped, until it is dropped.
#[derive(Debug)]
pub struct SourceLimit {
    mapped: Arc<SourceMaps>,
    bytes: u64,
}

impl Drop for SourceLimit {
    fn drop(&mut self) {
        self.mapped.change_limits(|limits| {
            if let Some(at) = limits.iter().position(|&bytes| bytes == self.bytes) {
                limits.swap_remove(at);
            }
        });
    }
}

impl Default for SourceMaps {
    fn default() -> Self {
        let none = || AtomicU64::new(0);
        let limits = Lock::new(Vec::new());
        Self { maps: none(), bytes: none(), tables: none(), limits, limit_bytes: u64::MAX.into() }
    }
}

impl SourceMaps {
    /// Has no more than `bytes` of the files mapped, as long as what is returned lives.
    pub(crate) fn limit(self: &Arc<Self>, bytes: u64) -> SourceLimit {
        self.change_limits(|limits| limits.push(bytes));
        SourceLimit { mapped: Arc::clone(self), bytes }
    }

    fn change_limits(&self, change: impl FnOnce(&mut Vec<u64>)) {
        // A child of fork finds the lock free.
        let no_fork = fork::exclude();
        let mut limits = self.limits.lock();
        change(&mut limits);
        let least = limits.iter().copied().min().unwrap_or(u64::MAX);
        self.limit_bytes.store(least, Ordering::Relaxed);
        drop(limits);
        drop(no_fork);
    }

    /// Whether more is mapped than may be.
    pub(crate) fn is_beyond_limit(&self) -> bool {
        self.bytes().saturating_add(self.table_bytes()) > self.limit_bytes()
    }

    pub(crate) fn limit_bytes(&self) -> u64 {
        self.limit_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of the files that the maps have mapped.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Bytes of page tables that populating the maps has cost.
    pub(crate) fn table_bytes(&self) -> u64 {
        self.tables.load(Ordering::Relaxed) * system_page_bytes() as u64
    }
}

/// A file's source map, made when it is first wanted and again after a refresh.
#[derive(Debug, Default)]
pub(crate) struct Source {
    map: ForkLock<Option<Arc<SourceMap>>>,
}

impl Source {
    /// The map of a file of `size_bytes` bytes; an error when the kernel makes none.
    pub(crate) fn map(
        &self,
        fd: BorrowedFd<'_>,
        size_bytes: u64,
        mapped: &Arc<SourceMaps>,
    ) -> Result<Arc<SourceMap>, Errno> {
        let made = self.map.lock();
        if let Some(map) = made.as_ref().filter(|map| map.size_bytes == size_bytes) {
            return Ok(Arc::clone(map));
        }
        drop(made);
        let map = Arc::new(SourceMap::new(fd, size_bytes, mapped)?);
        let mut slot = self.map.lock();
        if let Some(other) = slot.as_ref().filter(|map| map.size_bytes == size_bytes) {
            return Ok(Arc::clone(other));
        }
        *slot = Some(Arc::clone(&map));
        Ok(map)
    }

    /// Lets the map go; reads that are under way keep theirs until they end.
    pub(crate) fn forget(&self) {
        // Unmapped after the lock was let go of.
        let _map = self.map.lock().take();
    }

    /// Unmaps what was copied from it since it was last asked to.
    pub(crate) fn unmap_pages(&self) {
        let made = self.map.lock().clone();
        if let Some(map) = made.filter(|map| map.copied.swap(false, Ordering::Relaxed)) {
            map.unmap_pages();
        }
    }
}

/// The map of one file at one size.
#[derive(Debug)]
pub(crate) struct SourceMap {
    region: Region,
    size_bytes: u64,
    /// A chunk's state: [`POPULATED`], [`TABLE`], [`USED`], and while it is not populated
    /// [`READS`] and [`MISSED`].
    chunks: Vec<AtomicU16>,
    /// Pages were copied from it: some are mapped.
    copied: AtomicBool,
    /// What it has mapped counts here.
    mapped: Arc<SourceMaps>,
    _counted: FileMap,
}

impl Drop for SourceMap {
    fn drop(&mut self) {
        self.mapped.maps.fetch_sub(1, Ordering::Relaxed);
        for chunk in 0..self.chunks.len() {
            self.note_absent(chunk);
            let table = self.chunks[chunk].load(Ordering::Relaxed) & TABLE != 0;
            self.mapped.tables.fetch_sub(u64::from(table), Ordering::Relaxed);
        }
    }
}

impl SourceMap {
    /// Maps a file of `size_bytes` bytes.
    pub(crate) fn new(
        fd: BorrowedFd<'_>,
        size_bytes: u64,
        mapped: &Arc<SourceMaps>,
    ) -> Result<Self, Errno> {
        if size_bytes > MAX_MAP_BYTES {
            return Err(Errno::FBIG);
        }
        if mapped.maps.load(Ordering::Relaxed) >= MAX_MAPS {
            return Err(Errno::MFILE);
        }
        let counted = FileMap::claim().ok_or(Errno::NOMEM)?;
        let bytes = usize::try_from(size_bytes).map_err(|_| Errno::FBIG)?;
        let len = bytes.next_multiple_of(system_page_bytes());
        // Aligned, so that a chunk is a page table, which may go when the chunk is unmapped.
        let region = Region::anonymous(len, CHUNK_BYTES, Access::None)?;
        region.map_file(Sharing::Shared, 0, len, fd, 0, Access::Read)?;
        // Without this a fault through the map would read the neighbourhood from the device.
        region.advise(0, len, Advice::Random)?;
        let chunks = std::iter::repeat_with(|| AtomicU16::new(0)).take(len.div_ceil(CHUNK_BYTES));
        let chunks = collected("map", chunks).map_err(|_| Errno::NOMEM)?;
        mapped.maps.fetch_add(1, Ordering::Relaxed);
        let mapped = Arc::clone(mapped);
        Ok(Self {
            region,
            size_bytes,
            chunks,
            copied: AtomicBool::new(false),
            mapped,
            _counted: counted,
        })
    }

    /// The size of the file that the map was made for.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// All bytes of the map, the last page perhaps beyond the end of the file.
    pub(crate) fn whole(&self) -> Span<'_> {
        self.region.span(0, self.region.len())
    }

    /// The bytes at an offset of the file, if the map has that many there.
    pub(crate) fn bytes(&self, offset: u64, len: usize) -> Option<Span<'_>> {
        let offset = usize::try_from(offset).ok()?;
        (offset.checked_add(len)? <= self.region.len()).then(|| self.region.span(offset, len))
    }

    /// Whether the chunk that holds a byte of the file has its page tables filled.
    pub(crate) fn is_populated(&self, chunk: usize) -> bool {
        self.chunks.get(chunk).is_some_and(|state| state.load(Ordering::Relaxed) & POPULATED != 0)
    }

    /// Notes that a populated chunk is about to be copied from; says whether it is one.
    pub(crate) fn note_use(&self, chunk: usize) -> bool {
        let Some(state) = self.chunks.get(chunk) else { return false };
        let before = state.load(Ordering::Relaxed);
        if before & (POPULATED | USED) == POPULATED {
            // One that stops being populated here is nobody's to copy from soon anyway.
            state.fetch_or(USED, Ordering::Relaxed);
        }
        before & POPULATED != 0
    }

    /// Whether a chunk is populated, and known to be used since [`take_use`](Self::take_use).
    #[inline]
    pub(crate) fn is_in_use(&self, chunk: usize) -> bool {
        let ready = POPULATED | USED;
        self.chunks.get(chunk).is_some_and(|state| state.load(Ordering::Relaxed) & ready == ready)
    }

    /// Whether a populated chunk was copied from since this was last asked.
    pub(crate) fn take_use(&self, chunk: usize) -> bool {
        self.chunks[chunk].fetch_and(!USED, Ordering::Relaxed) & USED != 0
    }

    /// Counts page reads from a chunk that is not populated; says whether that
    /// makes [`POPULATE_READS`] since it was last said, or more where that was in vain.
    pub(crate) fn note_reads(&self, chunk: usize, reads: usize) -> bool {
        let Some(state) = self.chunks.get(chunk) else { return false };
        let before = state.load(Ordering::Relaxed);
        if before & POPULATED != 0 {
            return false;
        }
        let missed = u32::from((before & MISSED) / MISSED_ONCE);
        let total = usize::from(before & READS) + reads;
        let due = total >= POPULATE_READS << (2 * missed);
        let after = (before & (TABLE | MISSED)) | if due { 0 } else { total as u16 };
        // A count lost to another thread costs a later populate, nothing else.
        let _ = state.compare_exchange(before, after, Ordering::Relaxed, Ordering::Relaxed);
        due
    }

    /// Fills a chunk's page tables, if all of it is in the page cache. Asks about the
    /// page of the byte at `offset` first, which tells cheaply of a cold file.
    /// Whether it was not populated before; none where it is not now.
    pub(crate) fn populate_around(&self, offset: u64, query: &mut Query) -> Option<bool> {
        let page = offset as usize & !(system_page_bytes() - 1);
        let here = self.is_resident(page, 1, query).ok()?;
        here.then(|| self.populate(page / CHUNK_BYTES, query).ok().flatten()).flatten()
    }

    /// Fills a chunk's page tables, if all of it is in the page cache.
    fn populate(&self, chunk: usize, query: &mut Query) -> Result<Option<bool>, Errno> {
        let start = chunk * CHUNK_BYTES;
        let len = self.chunk_bytes(chunk);
        let resident = query.ask(self, start, len)?;
        if resident.iter().any(|page| page & 1 == 0) {
            let more =
                |state: u16| (state & (MISSED | POPULATED) < MISSED).then(|| state + MISSED_ONCE);
            let _missed =
                self.chunks[chunk].fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
            return Ok(None);
        }
        self.region.advise(start, len, Advice::PopulateRead)?;
        let before = self.chunks[chunk].swap(POPULATED | TABLE, Ordering::Relaxed);
        self.mapped.tables.fetch_add(u64::from(before & TABLE == 0), Ordering::Relaxed);
        if before & POPULATED == 0 {
            self.mapped.bytes.fetch_add(len as u64, Ordering::Relaxed);
        }
        self.copied.store(true, Ordering::Relaxed);
        Ok(Some(before & POPULATED == 0))
    }

    /// Notes that pages of a populated chunk were asked about and none is in
    /// the page cache: it was reclaimed, and is to earn its populating again.
    /// Says whether it was populated.
    pub(crate) fn note_absent(&self, chunk: usize) -> bool {
        let before = self.chunks[chunk].fetch_and(!POPULATED, Ordering::Relaxed);
        if before & POPULATED != 0 {
            self.mapped.bytes.fetch_sub(self.chunk_bytes(chunk) as u64, Ordering::Relaxed);
        }
        before & POPULATED != 0
    }

    /// How many chunks there are.
    pub(crate) fn chunk_count(&self) -> usize {
        self.chunks.len()
    }

    /// Unmaps a chunk, so that it does not count as this process's memory; says whether
    /// it was populated. Its pages stay in the page cache. Its page table goes where the
    /// kernel gives it back, and else is counted still.
    pub(crate) fn unmap_chunk(&self, chunk: usize) -> bool {
        let was_populated = self.note_absent(chunk);
        let (start, len) = (chunk * CHUNK_BYTES, self.chunk_bytes(chunk));
        // What the kernel refuses to drop stays mapped, and is dropped with the map.
        let dropped = self.region.advise(start, len, Advice::DontNeed);
        if dropped.is_ok() && len == CHUNK_BYTES && reclaims_page_tables() {
            let before = self.chunks[chunk].fetch_and(!TABLE, Ordering::Relaxed);
            self.mapped.tables.fetch_sub(u64::from(before & TABLE != 0), Ordering::Relaxed);
        }
        was_populated
    }

    /// Bytes of a chunk, which the last one has fewer of.
    fn chunk_bytes(&self, chunk: usize) -> usize {
        CHUNK_BYTES.min(self.region.len() - chunk * CHUNK_BYTES)
    }

    /// Whether a chunk may be populated by what the store's maps may have mapped.
    pub(crate) fn has_room(&self, chunk: usize) -> bool {
        let mapped = &self.mapped;
        let table = system_page_bytes() as u64;
        mapped.bytes() + mapped.table_bytes() + self.chunk_bytes(chunk) as u64 + table
            <= mapped.limit_bytes()
    }

    /// Notes that pages are about to be copied.
    pub(crate) fn note_copies(&self) {
        self.copied.store(true, Ordering::Relaxed);
    }

    /// Unmaps every page, so that none counts as this process's memory; they stay in
    /// the page cache. Copies that are under way fault them in again.
    pub(crate) fn unmap_pages(&self) {
        if self.region.advise(0, self.region.len(), Advice::DontNeed).is_ok() {
            for chunk in 0..self.chunks.len() {
                self.note_absent(chunk);
            }
        }
    }

    /// Whether every system page of a range is in the page cache.
    pub(crate) fn is_resident(
        &self,
        start: usize,
        len: usize,
        query: &mut Query,
    ) -> Result<bool, Errno> {
        Ok(query.ask(self, start, len)?.iter().all(|page| page & 1 == 1))
    }

    fn gap_bytes(&self, at: usize) -> usize {
        let pages = if self.is_populated(at / CHUNK_BYTES) {
            POPULATED_GAP_PAGES
        } else {
            ABSENT_GAP_PAGES
        };
        pages * system_page_bytes()
    }

    /// Asks which pages are resident, in as few calls as pay, and hands each
    /// answer to `answer` with its position. The [`key`]s rise; pages beyond the
    /// map are not resident.
    pub(crate) fn residency(
        &self,
        keys: &[u64],
        page_size: PageSize,
        query: &mut Query,
        mut answer: impl FnMut(usize, bool),
    ) -> Result<(), Errno> {
        let system = system_page_bytes();
        let range_of = |key: u64| {
            let start = usize::try_from(page_size.bytes_of(page_of(key))).unwrap_or(usize::MAX);
            start..start.saturating_add(page_size.bytes()).min(self.region.len())
        };
        let mut rest = keys;
        while let Some((&first, behind)) = rest.split_first() {
            let Range { start, mut end } = range_of(first);
            if start >= end || end - start > QUERY_BYTES {
                answer(position_of(first), self.is_large_resident(start, end, query)?);
                rest = behind;
                continue;
            }
            let joins = |&&key: &&u64| {
                let next = range_of(key);
                let joins = next.start < next.end
                    && next.start.saturating_sub(end) <= self.gap_bytes(next.start)
                    && next.end - start <= QUERY_BYTES;
                end = if joins { next.end } else { end };
                joins
            };
            let count = 1 + behind.iter().take_while(joins).count();
            let resident = query.ask(self, start, end - start)?;
            for &key in &rest[..count] {
                let page = range_of(key);
                let bits =
                    &resident[(page.start - start) / system..(page.end - start).div_ceil(system)];
                answer(position_of(key), bits.iter().all(|bit| bit & 1 == 1));
            }
            rest = &rest[count..];
        }
        Ok(())
    }

    /// A page so large that it takes several calls, or one beyond the map.
    fn is_large_resident(
        &self,
        start: usize,
        end: usize,
        query: &mut Query,
    ) -> Result<bool, Errno> {
        for from in (start..end).step_by(QUERY_BYTES) {
            if !self.is_resident(from, QUERY_BYTES.min(end - from), query)? {
                return Ok(false);
            }
        }
        Ok(start < end)
    }
}

/// The buffer of `mincore` calls, reused from one to the next.
#[derive(Debug, Default)]
pub(crate) struct Query {
    bits: Vec<u8>,
}

impl Query {
    fn ask(&mut self, map: &SourceMap, start: usize, len: usize) -> Result<&[u8], Errno> {
        let pages = len.div_ceil(system_page_bytes());
        self.bits.resize(self.bits.len().max(pages), 0);
        let bits = &mut self.bits[..pages];
        map.region.mincore(start, len, bits)?;
        Ok(bits)
    }
}
