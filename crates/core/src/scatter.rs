//! Scattered reads: any file pages, in any order, into the chunks of a sink.
//!
//! Stores and windows both read this way. Pages that are in the page cache, in a populated part
//! of the source map, are copied from there. The others are sorted and merged within a chunk and
//! read together, with up to [`DEPTH`](crate::sys::ring::DEPTH) requests in flight across chunks,
//! so that the device is never idle. Chunks are completed in order.

mod flat;
mod plan;
mod provided;
mod transfer;

use std::ops::Range;

use crate::error::{Interrupt, Result};
use crate::room::collected;
use crate::store::Store;
use crate::sys::span::Span;
use crate::units::{FilePage, Pages};

pub(crate) use flat::read_into;
use plan::Preference;
use transfer::scatter;

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

impl Store {
    /// Reads pages into `into`, one after another.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Truncated`] or [`Error::Interrupted`], each with
    /// the number of pages from the front that are in `into`.
    pub fn read(
        &self,
        pages: &Pages<FilePage>,
        into: Span<'_>,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let wanted: Vec<FilePage> = collected("read", pages.iter())?;
        read_into(self, &wanted, into, interrupt)
    }

    /// Reads any pages in any order, started together, a chunk at a time ([`Sink`]).
    ///
    /// # Errors
    /// As [`read`](Self::read), and whatever `sink` returns.
    pub fn scatter(
        &self,
        file_pages: &[FilePage],
        sink: &mut dyn Sink<'_>,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        scatter(self, file_pages, sink, Preference::Speed, interrupt)
    }

    /// The same for pages that [`resident`](Self::resident) has just found in
    /// the page cache: they are copied from there even where a read would be
    /// cheaper, as a read may make the kernel read ahead. A page that was
    /// reclaimed meanwhile is read.
    ///
    /// # Errors
    /// As [`scatter`](Self::scatter).
    pub fn scatter_resident(
        &self,
        file_pages: &[FilePage],
        sink: &mut dyn Sink<'_>,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let outcome = scatter(self, file_pages, sink, Preference::NoDevice, interrupt);
        if self.source_limit_bytes() < u64::MAX {
            self.parts().all().iter().for_each(|part| part.source.unmap_pages());
        }
        outcome
    }
}
