//! Scattered reads: any file pages, in any order, into the chunks of a sink.

use std::ops::Range;

use crate::error::{Interrupt, Result};
use crate::store::Store;
use crate::sys::span::Span;
use crate::units::FilePage;

/// Where the pages of a scattered read go, a chunk at a time.
///
/// Chunk `k` holds requests `k * chunk_pages ..`; request `i` of it belongs at
/// page `i - k * chunk_pages` of its buffer.
pub trait Sink<'m> {
    /// Pages that a chunk holds; at least one.
    fn chunk_pages(&self) -> usize;
    /// Chunks whose buffers may be handed out and not yet completed; at least one.
    fn chunks_in_flight(&self) -> usize;
    /// The buffer of a chunk, `chunk_pages` pages long. Called for chunk 0, 1,
    /// 2 … in order, at most `chunks_in_flight` ahead of [`complete`](Self::complete).
    fn buffer(&mut self, chunk: usize) -> Span<'m>;
    /// The content of these requests, all of one chunk, is in its buffer.
    /// Called in order. When a page of a chunk cannot be read, the pages before
    /// it are completed, if there are any, and then the error ends the read.
    ///
    /// # Errors
    /// Whatever keeps the sink from going on; it ends the read.
    fn complete(&mut self, requests: Range<usize>) -> Result<()>;
}

/// Reads `file_pages` into the chunks of `sink`.
pub(crate) fn scatter<'m>(
    store: &Store,
    file_pages: &[FilePage],
    sink: &mut dyn Sink<'m>,
    interrupt: &dyn Interrupt,
) -> Result<()> {
    let page_bytes = store.page_size().bytes();
    let chunk_pages = sink.chunk_pages();
    for (chunk, pages) in file_pages.chunks(chunk_pages).enumerate() {
        let first = chunk * chunk_pages;
        interrupt.check().map_err(|error| error.with_completed(first))?;
        let buffer = sink.buffer(chunk);
        for (slot, &page) in pages.iter().enumerate() {
            if let Err(error) = store.read_page(page, buffer.part(slot * page_bytes, page_bytes)) {
                if slot > 0 {
                    sink.complete(first..first + slot)?;
                }
                return Err(error.with_completed(first + slot));
            }
        }
        sink.complete(first..first + pages.len())?;
    }
    Ok(())
}

/// Reads pages one after another into `into`.
pub(crate) fn read_into(
    store: &Store,
    file_pages: &[FilePage],
    into: Span<'_>,
    interrupt: &dyn Interrupt,
) -> Result<()> {
    let page_bytes = store.page_size().bytes();
    let mut sink = Flat { into, page_bytes };
    scatter(store, file_pages, &mut sink, interrupt)
}

/// Memory that holds all pages of a read.
struct Flat<'m> {
    into: Span<'m>,
    page_bytes: usize,
}

/// Pages that are sorted and merged together where the memory does not ask for less.
const FLAT_CHUNK_PAGES: usize = 1024;
/// Chunks of flat memory that are read at once.
const FLAT_CHUNKS: usize = 8;

impl<'m> Sink<'m> for Flat<'m> {
    fn chunk_pages(&self) -> usize {
        FLAT_CHUNK_PAGES
    }

    fn chunks_in_flight(&self) -> usize {
        FLAT_CHUNKS
    }

    fn buffer(&mut self, chunk: usize) -> Span<'m> {
        let chunk_bytes = FLAT_CHUNK_PAGES * self.page_bytes;
        let start = chunk * chunk_bytes;
        self.into.part(start, chunk_bytes.min(self.into.len() - start))
    }

    fn complete(&mut self, _requests: Range<usize>) -> Result<()> {
        Ok(())
    }
}
