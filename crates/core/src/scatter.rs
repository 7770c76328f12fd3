//! Scattered reads: any file pages, in any order, into the chunks of a sink.
//!
//! The one mechanism under stores and windows. Pages that are in the page
//! cache, in a populated part of the source map, are copied from there; the
//! rest is sorted and merged within a chunk and read together, up to
//! [`DEPTH`](crate::sys::ring::DEPTH) requests in flight, across chunks, so that
//! the device never waits for us. Chunks are completed in order.

mod flat;
mod pace;
mod plan;
mod transfer;

use std::ops::Range;

use crate::error::Result;
use crate::sys::span::Span;

pub(crate) use flat::read_into;
pub(crate) use pace::Pace;
pub(crate) use plan::Preference;
pub(crate) use transfer::scatter;

/// Where the pages of a scattered read go, a chunk at a time.
///
/// Chunk `k` holds requests `k * chunk_pages ..`; request `i` of it belongs at
/// page `i - k * chunk_pages` of its buffer.
pub trait Sink<'m> {
    /// Pages that a chunk holds; at least one, and the same for the whole read.
    fn chunk_pages(&self) -> usize;
    /// Chunks whose buffers may be handed out and not yet completed; at least
    /// one. Together they should hold more pages than are read at once.
    fn chunks_in_flight(&self) -> usize;
    /// The buffer of a chunk, with room for all requests of it. Called for
    /// chunk 0, 1, 2 … in order, at most `chunks_in_flight` ahead of
    /// [`complete`](Self::complete).
    fn buffer(&mut self, chunk: usize) -> Span<'m>;
    /// Whether the content of a chunk is read again at once, so that it had better be
    /// in the processor's caches. Chunks should fit into them then.
    fn reads_again(&self) -> bool {
        false
    }
    /// The content of these requests, all of one chunk, is in its buffer.
    /// Called in order. When a page of a chunk cannot be read, the pages before
    /// it are completed, if there are any, and then the error ends the read.
    ///
    /// # Errors
    /// Whatever keeps the sink from going on; it ends the read.
    fn complete(&mut self, requests: Range<usize>) -> Result<()>;
}
