//! The frames that a window has outside its memory, whoever uses them.
//!
//! ```text
//! a call loads     store ─read→ front of a chunk ─MOVE→ window
//!                  what was there: window ─MOVE→ the chunk's spare memory, the next front
//! a page is        window ─MOVE→ isolated ─write→ store, and then freed; a remap keeps such
//! replaced or      frames: they are free until it fills them and moves them in
//! evicted          (where the kernel alone notes writes)
//! a fault evicts   window ─MOVE→ free ─read─MOVE→ window, for the fault's own pages
//!                  (runs of pages of a window that is only read)
//! all else         dropped: the kernel has the frame, and content comes by COPY
//! ```
//!
//! Calls share one [`FramePool`], which the call lock guards; those who serve faults have
//! [`IsolatedFrames`] of their own. Memory that is only copied out of has no part in this: no
//! frame of it goes into a window.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use rustix::io::Errno;

use super::frames::{Filled, Frames, Tracking, Userfault};
use crate::error::{Error, Result};
use crate::sys::mm::{system_page_bytes, Access, Region, HUGE_PAGE_BYTES};
use crate::sys::span::Span;
use crate::sys::uffd::Partial;
use crate::sys::zeros::Zeros;
use crate::units::PageSize;

/// Chunks that may be read into at the same time: while the last reads of one
/// are awaited, the next ones keep the device busy.
const CHUNKS_IN_FLIGHT: usize = 4;
/// Bytes of a chunk that elements of a cache are read into.
const ELEMENT_BYTES: usize = 256 << 10;
/// Bytes of pages that are isolated together, unless a page is larger: they and their
/// copies stay in the processor's cache until they are compared.
const ISOLATED_BYTES: usize = 128 << 10;
/// Bytes of frames that a call keeps at most to use them again.
const KEPT_BYTES: usize = 256 << 20;
/// A run of fewer system pages is dropped and copied sooner than moved.
const LEAST_RUN: usize = 8;

/// Bytes that the frames of calls and of faults may take, in a window with chunks of
/// `chunk_pages` whose faults read up to `cluster_pages`.
pub(super) fn most_bytes(
    page: PageSize,
    chunk_pages: u64,
    cluster_pages: u64,
    tracking: Option<Tracking>,
) -> u64 {
    let isolated_bytes = if tracking == Some(Tracking::Kernel) {
        // Of calls and of faults, each with its copies.
        4 * page.bytes_of(1).max(ISOLATED_BYTES as u64)
    } else {
        0
    };
    // What faults read, and their free frames.
    let free_pages = if tracking.is_none() { cluster_pages } else { 0 };
    let chunks = 2 * CHUNKS_IN_FLIGHT as u64;
    let staging_pages = chunks * chunk_pages + cluster_pages + free_pages;
    let has_elements = tracking.is_none() && page.bytes_of(chunk_pages) > ELEMENT_BYTES as u64;
    let element_bytes = if has_elements { 2 * ELEMENT_BYTES as u64 } else { 0 };
    page.bytes_of(staging_pages) + isolated_bytes + element_bytes
}

/// The frames of a window's calls, one call at a time. Each part is made when it is first needed.
#[derive(Debug)]
pub(super) struct FramePool {
    page: PageSize,
    chunk_pages: usize,
    /// For calls that bring much, in huge pages where it can be.
    large: Option<Staging>,
    /// For those that bring an element of a cache. Calls that bring as much as the one before
    /// find its frames where they need them.
    small: Option<Staging>,
    isolated: IsolatedFrames,
    staging_bytes: Arc<AtomicU64>,
}

impl FramePool {
    pub(super) fn new(page: PageSize, chunk_pages: usize) -> Self {
        Self {
            page,
            chunk_pages,
            large: None,
            small: None,
            isolated: IsolatedFrames::default(),
            staging_bytes: Arc::default(),
        }
    }

    /// Pages of a chunk of a call that brings many.
    pub(super) fn chunk_pages(&self) -> usize {
        self.chunk_pages
    }

    /// Bytes that reading can make present, to be told without waiting for a call to end.
    pub(super) fn staging_bytes(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.staging_bytes)
    }

    /// Frames that were taken out of the window.
    pub(super) fn isolated(&mut self) -> &mut IsolatedFrames {
        &mut self.isolated
    }

    /// The chunks for a call that brings `count` pages, and the frames that it has taken out.
    pub(super) fn for_loading<F: Frames>(
        &mut self,
        frames: &F,
        count: usize,
    ) -> Result<(&Staging, &mut IsolatedFrames)> {
        let element_pages = ELEMENT_BYTES / self.page.bytes();
        let moves = frames.userfault().is_some() && frames.tracking().is_none();
        let is_element = moves && self.chunk_pages > element_pages && count <= element_pages;
        let (staging, chunk_pages) = if is_element {
            (&mut self.small, element_pages)
        } else {
            (&mut self.large, self.chunk_pages)
        };
        let staging = match staging {
            Some(staging) => staging,
            none => {
                let made = none.insert(Staging::new(frames, self.page, chunk_pages)?);
                // A call that brings an element uses one chunk.
                let chunks = if is_element { 1 } else { CHUNKS_IN_FLIGHT };
                let bytes = (chunks * made.chunk_bytes) as u64;
                self.staging_bytes.fetch_add(bytes, Ordering::Relaxed);
                made
            }
        };
        Ok((staging, &mut self.isolated))
    }
}

/// A part of the staging memory: where pages are read to, and spare memory of
/// the same size for the frames that come out of the window.
///
/// Invariant: spare memory is empty but while the chunk is being put into the window.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    front: usize,
    spare: Option<usize>,
    /// The front may have frames up to here.
    framed_bytes: usize,
}

/// Memory that content is read into before it goes into the window: a ring of chunks, by turns.
#[derive(Debug)]
pub(super) struct Staging {
    region: Region,
    chunk_pages: usize,
    chunk_bytes: usize,
    chunks: [Cell<Chunk>; CHUNKS_IN_FLIGHT],
}

impl Staging {
    fn new<F: Frames>(frames: &F, page: PageSize, chunk_pages: usize) -> Result<Self> {
        let chunk_bytes = chunk_pages * page.bytes();
        let total = 2 * CHUNKS_IN_FLIGHT * chunk_bytes;
        let align = chunk_bytes.next_power_of_two().clamp(system_page_bytes(), HUGE_PAGE_BYTES);
        let fail = |errno| Error::system("staging memory", errno);
        let mut region = Region::anonymous(total, align, Access::Write).map_err(fail)?;
        let adopt = |frames: &dyn Userfault| frames.adopt_staging(&mut region, chunk_bytes);
        let adopted = frames.userfault().map(adopt).transpose();
        let with_spare = adopted.map_err(fail)?.unwrap_or(false);
        let chunks = std::array::from_fn(|index| {
            let front = 2 * index * chunk_bytes;
            let spare = with_spare.then_some(front + chunk_bytes);
            Cell::new(Chunk { front, spare, framed_bytes: 0 })
        });
        Ok(Self { region, chunk_pages, chunk_bytes, chunks })
    }

    /// Chunks that may be under way together.
    pub(super) const CHUNKS: usize = CHUNKS_IN_FLIGHT;

    /// Pages of each.
    pub(super) fn chunk_pages(&self) -> usize {
        self.chunk_pages
    }

    /// Where the `number`-th chunk of a call is read to.
    pub(super) fn front(&self, number: usize) -> Span<'_> {
        self.region.span(self.chunk(number).get().front, self.chunk_bytes)
    }

    /// Where the frames go that it replaces.
    pub(super) fn spare(&self, number: usize) -> Option<Span<'_>> {
        let spare = self.chunk(number).get().spare?;
        Some(self.region.span(spare, self.chunk_bytes))
    }

    fn chunk(&self, number: usize) -> &Cell<Chunk> {
        &self.chunks[number % CHUNKS_IN_FLIGHT]
    }

    /// Whether pages are copied into the window, not moved.
    pub(super) fn copied_out(&self) -> bool {
        self.chunk(0).get().spare.is_none()
    }

    /// The same as [`front`](Self::front), for reading into its first `read_bytes`. They count
    /// as framed from now on, whether or not what is read ever goes into the window.
    pub(super) fn read_into(&self, number: usize, read_bytes: usize) -> Span<'_> {
        // Of a huge page there is all or nothing.
        let block =
            if self.chunk_bytes.is_multiple_of(HUGE_PAGE_BYTES) { HUGE_PAGE_BYTES } else { 1 };
        let chunk = self.chunk(number).get();
        let framed_bytes = chunk.framed_bytes.max(read_bytes.next_multiple_of(block));
        self.chunk(number).set(Chunk { framed_bytes, ..chunk });
        self.front(number)
    }

    /// After a chunk's first `used_bytes` went into the window: puts the frames that came out of
    /// it where the next chunk is read to. `all_moved`: none of those is left in front.
    pub(super) fn recycle<F: Frames>(
        &self,
        frames: &F,
        number: usize,
        used_bytes: usize,
        all_moved: bool,
    ) {
        if all_moved && self.exchange(number, used_bytes) {
            return;
        }
        let Chunk { front, spare: Some(spare), .. } = self.chunk(number).get() else { return };
        let front = self.region.span(front, used_bytes);
        let spare_frames = self.region.span(spare, used_bytes);
        let shift = |frames: &dyn Userfault| frames.shift(front, spare_frames);
        if all_moved && frames.userfault().is_some_and(shift) {
            return;
        }
        // Freeing them keeps the invariant of spare memory; if even that fails,
        // the next fill meets EEXIST and copies instead.
        let _freed = self.region.drop_pages(spare, used_bytes, frames.locked());
    }

    /// Has front and spare memory change places, if nothing is left in front once its first
    /// `used_bytes` have gone.
    fn exchange(&self, number: usize, used_bytes: usize) -> bool {
        let chunk = self.chunk(number).get();
        let Some(spare) = chunk.spare.filter(|_| used_bytes == chunk.framed_bytes) else {
            return false;
        };
        self.chunk(number).set(Chunk { front: spare, spare: Some(chunk.front), ..chunk });
        true
    }
}

/// Frames that have left the window, of one user at a time. Without memory for them, as it
/// begins, pages are dropped instead.
#[derive(Debug, Default)]
pub struct IsolatedFrames(Option<FrameStack>);

impl IsolatedFrames {
    /// Memory to isolate pages in, mapped now, so that a fault need not have it mapped.
    pub fn of_pages(frames: &dyn Userfault, page: PageSize) -> Result<Self, Errno> {
        let mut isolated = Self::default();
        isolated.ready(frames, page)?;
        Ok(isolated)
    }

    /// Memory for free frames of `page_count` pages of a window in which writes are not noticed.
    pub fn of_runs(frames: &dyn Userfault, page: PageSize, page_count: u64) -> Result<Self, Errno> {
        let bytes = page.bytes_of(page_count) as usize;
        Ok(Self(Some(FrameStack::new(frames, page, bytes, 0)?)))
    }

    /// The frames, in memory that pages can be isolated in.
    pub(super) fn ready(
        &mut self,
        frames: &dyn Userfault,
        page: PageSize,
    ) -> Result<&mut FrameStack, Errno> {
        match &mut self.0 {
            Some(stack) if !stack.fouled => {}
            none => {
                let kept = if frames.reuses() { KEPT_BYTES.min(frames.region().len()) } else { 0 };
                let kept_bytes = kept.next_multiple_of(page.bytes());
                let isolated_bytes = ISOLATED_BYTES.max(page.bytes());
                *none = Some(FrameStack::new(frames, page, kept_bytes, isolated_bytes)?);
            }
        }
        Ok(self.0.as_mut().expect("made above"))
    }

    /// The frames, if there is memory for them.
    pub fn made(&mut self) -> Option<&mut FrameStack> {
        self.0.as_mut().filter(|stack| !stack.fouled)
    }

    /// Takes what of a run of present pages there is room for, the run's front, to be free
    /// frames; says how many bytes. They are absent then.
    pub(super) fn take_run(&mut self, frames: &dyn Userfault, range: (usize, usize)) -> usize {
        self.0.as_mut().map_or(0, |stack| stack.take_run(frames, range))
    }

    /// Gives the kernel the frames that a call has kept.
    pub(super) fn free_kept(&mut self) {
        if let Some(stack) = self.made().filter(|stack| stack.free_bytes > 0) {
            stack.empty();
        }
    }
}

/// Frames that have left the window. The first `free_bytes` are *free*: nobody needs their
/// content, and there may be holes among those of runs. Above them pages are *isolated*, one
/// batch at a time; between two uses nothing is there.
#[derive(Debug)]
pub struct FrameStack {
    region: Region,
    page: PageSize,
    free_bytes: usize,
    /// Of the pages of a batch, made before the kernel was asked what was written to.
    copies: Zeros<u8>,
    locked: bool,
    /// It could not be emptied above the free frames.
    fouled: bool,
}

impl FrameStack {
    fn new(
        frames: &dyn Userfault,
        page: PageSize,
        kept_bytes: usize,
        isolated_bytes: usize,
    ) -> Result<Self, Errno> {
        let total = kept_bytes + isolated_bytes;
        let mut region = Region::anonymous(total, system_page_bytes(), Access::Write)?;
        frames.adopt_isolated(&mut region)?;
        let (copies, locked) = (Zeros::new(isolated_bytes)?, frames.locked());
        Ok(Self { region, page, free_bytes: 0, copies, locked, fouled: false })
    }

    /// Pages that can be isolated together.
    pub(super) fn page_count(&self) -> usize {
        self.copies.len() / self.page.bytes()
    }

    /// Where `count` pages of a batch are isolated, from the `slot`-th on.
    pub(super) fn contents(&self, slot: usize, count: usize) -> Span<'_> {
        let page_bytes = self.page.bytes();
        self.region.span(self.free_bytes + slot * page_bytes, count * page_bytes)
    }

    /// Where one is.
    pub(super) fn content(&self, slot: usize) -> Span<'_> {
        self.contents(slot, 1)
    }

    /// Copies what the `slot`-th page of a batch holds before it is isolated.
    pub(super) fn copy(&mut self, slot: usize, content: Span<'_>) {
        let page_bytes = self.page.bytes();
        content.copy_to(&mut self.copies[slot * page_bytes..][..page_bytes]);
    }

    /// Whether the isolated page holds something else than was copied.
    pub(super) fn differs(&self, slot: usize) -> bool {
        let page_bytes = self.page.bytes();
        !self.content(slot).holds(&self.copies[slot * page_bytes..][..page_bytes])
    }

    /// Has the first `count` isolated pages be free frames; says whether it has room for
    /// another batch then.
    pub(super) fn keep(&mut self, count: usize) -> bool {
        let bytes = count * self.page.bytes();
        let fits = self.free_bytes + bytes + self.copies.len() <= self.region.len();
        self.free_bytes += if fits { bytes } else { 0 };
        fits
    }

    /// Adds free frames of `len` bytes, which `move_out` moves to where it is told.
    pub(super) fn take(
        &mut self,
        len: usize,
        move_out: impl FnOnce(Span<'_>) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        if self.free_bytes + len > self.region.len() {
            return Err(Errno::NOMEM);
        }
        move_out(self.region.span(self.free_bytes, len))?;
        self.free_bytes += len;
        Ok(())
    }

    fn take_run(&mut self, frames: &dyn Userfault, (offset, len): (usize, usize)) -> usize {
        if self.fouled {
            self.empty_isolated();
        }
        let len = len.min(self.region.len() - self.free_bytes);
        if self.fouled || len < LEAST_RUN * system_page_bytes() {
            return 0;
        }
        let from = frames.region().span(offset, len);
        let shift = |to: Span<'_>| if frames.shift(to, from) { Ok(()) } else { Err(Errno::BUSY) };
        if self.take(len, shift).is_err() {
            self.empty_isolated();
            return 0;
        }
        len
    }

    /// The last `len` bytes of free frames, if there are as many.
    pub(super) fn last(&self, len: usize) -> Option<Span<'_>> {
        Some(self.region.span(self.free_bytes.checked_sub(len)?, len))
    }

    /// Memory for a run of `len` bytes, if free frames are there for most of it.
    pub fn memory_for_run(&self, len: usize) -> Option<Span<'_>> {
        let enough = len >= LEAST_RUN * system_page_bytes() && 2 * self.free_bytes > len;
        enough.then(|| self.region.span(self.free_bytes.saturating_sub(len), len))
    }

    /// Moves the last `len` bytes, all of which were filled, into absent pages of the window at
    /// `offset`.
    /// Fails with where it stopped: pages behind that are absent.
    pub fn put(
        &mut self,
        frames: &dyn Userfault,
        offset: usize,
        len: usize,
    ) -> Result<Filled, Partial> {
        self.free_bytes = self.free_bytes.saturating_sub(len);
        let filled = frames.move_frames(offset, self.region.span(self.free_bytes, len));
        if !matches!(filled, Ok(Filled::Moved)) {
            self.empty_isolated();
        }
        filled
    }

    /// Gives the kernel all frames.
    pub(super) fn empty(&mut self) {
        self.free_bytes = 0;
        self.empty_isolated();
    }

    /// Gives the kernel all frames that are not free ones.
    pub(super) fn empty_isolated(&mut self) {
        let (start, len) = (self.free_bytes, self.region.len() - self.free_bytes);
        self.fouled = self.region.drop_pages(start, len, self.locked).is_err();
    }
}

#[cfg(test)]
mod tests;
