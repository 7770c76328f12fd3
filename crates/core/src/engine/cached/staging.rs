//! Memory that content is read into before it goes into the window.

use super::frames::{Frames, Userfault};
use crate::error::{Error, Result};
use crate::sys::mm::{system_page_bytes, Access, Region};
use crate::sys::span::Span;
use crate::units::PageSize;

/// Chunks that may be read into at the same time: while the last reads of one
/// are awaited, the next ones keep the device busy.
pub const CHUNKS_IN_FLIGHT: usize = 4;
/// A huge page.
const BLOCK_BYTES: usize = 2 << 20;

/// A part of the staging memory: where pages are read to, and spare memory of
/// the same size for the frames that come out of the window.
///
/// Invariant: spare memory is empty but while the chunk is being put into the window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    front: usize,
    spare: Option<usize>,
    /// The front may have frames up to here.
    framed_bytes: usize,
}

/// The staging memory of a window: one for calls that bring much, in huge pages where it can be,
/// and one for those that bring an element of a cache. Each is made when it is first needed.
/// Calls that bring as much as the one before find its frames where they need them.
#[derive(Debug, Default)]
pub(super) struct StagingMemory {
    large: Option<Staging>,
    small: Option<Staging>,
}

/// Bytes of a chunk that elements are read into.
pub(super) const ELEMENT_BYTES: usize = 256 << 10;

impl StagingMemory {
    /// The memory for a call that brings `count` pages, in chunks of `chunk_pages` if it is
    /// not an element.
    pub(super) fn ready<F: Frames>(
        &mut self,
        frames: &F,
        page: PageSize,
        chunk_pages: usize,
        count: usize,
    ) -> Result<&mut Staging> {
        let element_pages = ELEMENT_BYTES / page.bytes();
        let moves = frames.userfault().is_some() && frames.tracking().is_none();
        let larger = chunk_pages > element_pages;
        let (memory, chunk_pages) = if moves && larger && count <= element_pages {
            (&mut self.small, element_pages)
        } else {
            (&mut self.large, chunk_pages)
        };
        match memory {
            Some(staging) => Ok(staging),
            none => Ok(none.insert(Staging::new(frames, page, chunk_pages)?)),
        }
    }

    /// Bytes that reading can make present.
    pub(super) fn bytes(&self) -> u64 {
        // A call that brings an element uses one chunk.
        let small = if self.small.is_some() { ELEMENT_BYTES as u64 } else { 0 };
        self.large.as_ref().map_or(0, Staging::bytes) + small
    }
}

/// Whether a chunk of so many bytes consists of huge pages.
fn is_huge(chunk_bytes: usize) -> bool {
    chunk_bytes.is_multiple_of(BLOCK_BYTES)
}

/// A ring of chunks.
#[derive(Debug)]
pub(super) struct Staging {
    region: Region,
    chunk_pages: usize,
    chunk_bytes: usize,
    chunks: [Chunk; CHUNKS_IN_FLIGHT],
}

impl Staging {
    pub(super) fn new<F: Frames>(frames: &F, page: PageSize, chunk_pages: usize) -> Result<Self> {
        let chunk_bytes = chunk_pages * page.bytes();
        let total = 2 * CHUNKS_IN_FLIGHT * chunk_bytes;
        let align = chunk_bytes.next_power_of_two().clamp(system_page_bytes(), 2 << 20);
        let fail = |errno| Error::system("staging memory", errno);
        let mut region = Region::anonymous(total, align, Access::Write).map_err(fail)?;
        let adopt = |frames: &dyn Userfault| frames.adopt_staging(&mut region, chunk_bytes);
        let adopted = frames.userfault().map(adopt).transpose();
        let with_spare = adopted.map_err(fail)?.unwrap_or(false);
        let chunks = std::array::from_fn(|index| {
            let front = 2 * index * chunk_bytes;
            Chunk { front, spare: with_spare.then_some(front + chunk_bytes), framed_bytes: 0 }
        });
        Ok(Self { region, chunk_pages, chunk_bytes, chunks })
    }

    /// Bytes that reading can make present.
    pub(super) fn bytes(&self) -> u64 {
        (CHUNKS_IN_FLIGHT * self.chunk_bytes) as u64
    }

    /// The memory, and the ring over it.
    pub(super) fn parts(&mut self) -> (&Region, Ring<'_>) {
        let ring = Ring {
            chunk_pages: self.chunk_pages,
            chunk_bytes: self.chunk_bytes,
            chunks: &mut self.chunks,
        };
        (&self.region, ring)
    }
}

/// The chunks of a [`Staging`] memory, by turns.
#[derive(Debug)]
pub(super) struct Ring<'a> {
    pub(super) chunk_pages: usize,
    chunk_bytes: usize,
    chunks: &'a mut [Chunk; CHUNKS_IN_FLIGHT],
}

impl Ring<'_> {
    /// Chunks that may be under way together.
    pub(super) const CHUNKS: usize = CHUNKS_IN_FLIGHT;

    /// Where the `number`-th chunk of a call is read to.
    pub(super) fn front<'m>(&self, region: &'m Region, number: usize) -> Span<'m> {
        region.span(self.chunks[number % CHUNKS_IN_FLIGHT].front, self.chunk_bytes)
    }

    /// Where the frames go that it replaces.
    pub(super) fn spare<'m>(&self, region: &'m Region, number: usize) -> Option<Span<'m>> {
        let spare = self.chunks[number % CHUNKS_IN_FLIGHT].spare?;
        Some(region.span(spare, self.chunk_bytes))
    }

    /// Whether pages are copied into the window, not moved.
    pub(super) fn copied_out(&self) -> bool {
        self.chunks[0].spare.is_none()
    }

    /// After a chunk's first `used_bytes` of the `read_bytes` that reading may have filled went
    /// into the window: puts the frames that came out of it where the next chunk is read to.
    /// `all_moved`: none of those is left in front.
    pub(super) fn recycle<F: Frames>(
        &mut self,
        frames: &F,
        region: &Region,
        number: usize,
        (used_bytes, read_bytes): (usize, usize),
        all_moved: bool,
    ) {
        let chunk = &mut self.chunks[number % CHUNKS_IN_FLIGHT];
        let Some(spare) = chunk.spare else { return };
        // Of a huge page there is all or nothing.
        let block = if is_huge(self.chunk_bytes) { BLOCK_BYTES } else { 1 };
        chunk.framed_bytes = chunk.framed_bytes.max(read_bytes.next_multiple_of(block));
        if all_moved && used_bytes == chunk.framed_bytes {
            // Nothing is left in front, so the two are exchanged.
            *chunk = Chunk { front: spare, spare: Some(chunk.front), ..*chunk };
            return;
        }
        let front = region.span(chunk.front, used_bytes);
        let spare_frames = region.span(spare, used_bytes);
        let shift = |frames: &dyn Userfault| frames.shift(front, spare_frames);
        if all_moved && frames.userfault().is_some_and(shift) {
            return;
        }
        // Freeing them keeps the invariant of spare memory; if even that fails,
        // the next fill meets EEXIST and copies instead.
        let _freed = region.drop_pages(spare, used_bytes, frames.locked());
    }
}
