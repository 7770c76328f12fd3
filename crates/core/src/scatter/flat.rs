//! Reads into memory that has room for all pages, one after another.

use std::ops::Range;

use super::plan::Preference;
use super::transfer::{read_one, scatter};
use super::Sink;
use crate::error::{Error, Interrupt, Result};
use crate::store::Store;
use crate::sys::fault_ranges;
use crate::sys::mm::{system_page_bytes, Access, Region};
use crate::sys::span::Span;
use crate::units::FilePage;

/// Bytes of a chunk, within which pages are sorted and merged …
const CHUNK_BYTES: usize = 4 << 20;
/// … and the most pages of one.
const CHUNK_PAGES: usize = 1024;
/// Chunks that are read at once.
const CHUNKS_IN_FLIGHT: usize = 8;

fn chunk_pages(page_bytes: usize) -> usize {
    (CHUNK_BYTES / page_bytes).clamp(1, CHUNK_PAGES)
}

/// Reads pages one after another into `into`.
///
/// # Errors
/// As [`Store::read`].
pub(crate) fn read_into(
    store: &Store,
    file_pages: &[FilePage],
    into: Span<'_>,
    interrupt: &dyn Interrupt,
) -> Result<()> {
    let page_bytes = store.page_size().bytes();
    if into.len() != file_pages.len() * page_bytes {
        return Err(Error::Argument(format!(
            "read: {} pages of {page_bytes} bytes need {} bytes of memory, not {}",
            file_pages.len(),
            file_pages.len() * page_bytes,
            into.len(),
        )));
    }
    if file_pages.is_empty() {
        return Ok(());
    }
    if let ([only], false) = (file_pages, store.is_provided()) {
        return read_one(store, *only, into);
    }
    let aligned = into.start().align_offset(system_page_bytes()) == 0;
    if store.direct() && (!aligned || fault_ranges::has_part_of(into)) {
        return read_through_buffer(store, file_pages, into, interrupt);
    }
    let mut sink = Flat { into, page_bytes };
    scatter(store, file_pages, &mut sink, Preference::Speed, interrupt)
}

/// Memory that holds all pages of a read.
struct Flat<'m> {
    into: Span<'m>,
    page_bytes: usize,
}

impl<'m> Sink<'m> for Flat<'m> {
    fn chunk_pages(&self) -> usize {
        chunk_pages(self.page_bytes)
    }

    fn chunks_in_flight(&self) -> usize {
        CHUNKS_IN_FLIGHT
    }

    fn buffer(&mut self, chunk: usize) -> Span<'m> {
        let chunk_bytes = self.chunk_pages() * self.page_bytes;
        let start = chunk * chunk_bytes;
        self.into.part(start, chunk_bytes.min(self.into.len() - start))
    }

    fn complete(&mut self, _requests: Range<usize>) -> Result<()> {
        Ok(())
    }
}

/// `O_DIRECT` asks for aligned memory: what is not goes through a buffer that is. So does what
/// lies in a window: the device writes to pages that a flush may have protected meanwhile, and
/// the kernel does not note that as a store.
fn read_through_buffer(
    store: &Store,
    file_pages: &[FilePage],
    into: Span<'_>,
    interrupt: &dyn Interrupt,
) -> Result<()> {
    let page_bytes = store.page_size().bytes();
    let chunk_bytes = chunk_pages(page_bytes) * page_bytes;
    let buffer_len = chunk_bytes.saturating_mul(CHUNKS_IN_FLIGHT).min(into.len());
    let buffer = Region::anonymous(buffer_len, system_page_bytes(), Access::Write)
        .map_err(|errno| store.io_error("read", None, errno))?;
    let mut sink = Buffered { into, buffer: buffer.span(0, buffer_len), page_bytes, chunk_bytes };
    scatter(store, file_pages, &mut sink, Preference::Speed, interrupt)
}

struct Buffered<'m, 'i> {
    into: Span<'i>,
    buffer: Span<'m>,
    page_bytes: usize,
    chunk_bytes: usize,
}

impl<'m> Buffered<'m, '_> {
    /// The buffer is a ring of chunks, the last of a short one cut.
    fn chunk(&self, chunk: usize) -> Span<'m> {
        let start = (chunk % CHUNKS_IN_FLIGHT) * self.chunk_bytes;
        self.buffer.part(start, self.chunk_bytes.min(self.buffer.len() - start))
    }
}

impl<'m> Sink<'m> for Buffered<'m, '_> {
    fn chunk_pages(&self) -> usize {
        self.chunk_bytes / self.page_bytes
    }

    fn chunks_in_flight(&self) -> usize {
        CHUNKS_IN_FLIGHT
    }

    fn buffer(&mut self, chunk: usize) -> Span<'m> {
        self.chunk(chunk)
    }

    fn complete(&mut self, requests: Range<usize>) -> Result<()> {
        let chunk = self.chunk(requests.start / self.chunk_pages());
        let len = requests.len() * self.page_bytes;
        self.into.part(requests.start * self.page_bytes, len).copy_span(chunk.part(0, len));
        Ok(())
    }
}
