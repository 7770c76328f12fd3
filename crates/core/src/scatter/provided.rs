//! Reads of pages from a provider.

use super::Sink;
use crate::error::{Error, Interrupt, Result};
use crate::store::Store;
use crate::sys::span::Span;
use crate::units::FilePage;

/// Has the store's provider bring `file_pages` into the chunks of `sink`, as many chunks at a
/// time as the sink has buffers for.
///
/// # Errors
/// As [`Store::scatter`].
pub(super) fn scatter_provided(
    store: &Store,
    file_pages: &[FilePage],
    sink: &mut dyn Sink<'_>,
    interrupt: &dyn Interrupt,
) -> Result<()> {
    let (page_bytes, chunk_pages) = (store.page_size().bytes(), sink.chunk_pages());
    let together = chunk_pages.saturating_mul(sink.chunks_in_flight().max(1));
    for (number, wanted) in file_pages.chunks(together).enumerate() {
        let start = number * together;
        let first_chunk = start / chunk_pages;
        let chunks = first_chunk..first_chunk + wanted.len().div_ceil(chunk_pages);
        let buffers: Vec<_> = chunks.map(|chunk| sink.buffer(chunk)).collect();
        let mut take = |position: usize, content: Span<'_>| {
            let at = position % chunk_pages * page_bytes;
            buffers[position / chunk_pages].part(at, page_bytes).copy_span(content);
        };
        let outcome = store.provide(wanted, &mut take, interrupt);
        let done = outcome.as_ref().map_or_else(Error::completed, |()| wanted.len());
        for requests in (0..done).step_by(chunk_pages) {
            sink.complete(start + requests..start + done.min(requests + chunk_pages))?;
        }
        outcome.map_err(|error| error.with_completed(start + done))?;
    }
    Ok(())
}
