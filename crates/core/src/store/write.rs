//! Writing pages to a store.
//!
//! The caller's data passes through a buffer of this crate. The reason is that the caller's memory
//! may lie in a window whose pages the kernel cannot load, so only user code may touch it. A
//! window's own pages, which are present, are written directly ([`Outgoing`](super::Outgoing)).

use super::{Store, StoreKind};
use crate::error::{Error, Interrupt, Result};
use crate::io::Segment;
use crate::sys::file as sys_file;
use crate::sys::mm::{system_page_bytes, Access, Region};
use crate::sys::span::Span;
use crate::units::{FilePage, Pages};

/// Bytes of the buffer, and of the longest single write.
const BUFFER_BYTES: usize = 1 << 20;
/// Bytes of pages apart that are copied before they are written through the page cache: they
/// stay in the processor's own.
const APART_BYTES: usize = 64 << 10;

impl Store {
    /// Writes pages, one after another in `data`. The file never becomes
    /// longer: of the last page only what is within the file is written, and
    /// pages that the file has lost meanwhile are an error. A direct store
    /// writes past the page cache, but for a last page that is not whole, which
    /// `O_DIRECT` cannot write.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a store opened for reading, [`Error::Argument`]
    /// for data of the wrong length, [`Error::Io`], [`Error::Truncated`] and
    /// [`Error::Interrupted`] with the number of pages from the front that are written.
    pub fn write(
        &self,
        pages: &Pages<FilePage>,
        data: Span<'_>,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        self.check_write(pages, data.len())?;
        if pages.is_empty() {
            return Ok(());
        }
        self.note_passing();
        let written = self.write_pieces(pages, data, interrupt);
        self.note_passing();
        written
    }

    /// Writes as many pieces together as the buffer holds. Past the page cache they are in flight
    /// together, so that each must be of other bytes than the others: those go there by rising
    /// pages.
    fn write_pieces(
        &self,
        pages: &Pages<FilePage>,
        data: Span<'_>,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let page_bytes = self.page_size().bytes();
        let piece_bytes = page_bytes.min(BUFFER_BYTES);
        let page_pieces = page_bytes / piece_bytes;
        let buffer_bytes = BUFFER_BYTES.min(data.len());
        let buffer = Region::anonymous(buffer_bytes, system_page_bytes(), Access::Write)
            .map_err(|errno| self.io_error("write", None, errno))?;
        let memory = |segment: &Segment| buffer.span(segment.place, segment.len as usize);
        let count = pages.len() * page_pieces;
        let (mut segments, mut start): (Vec<Segment>, usize) = (Vec::new(), 0);
        while start < count {
            segments.clear();
            for number in start..count.min(start + buffer_bytes / piece_bytes) {
                let (page, within) = (pages.at(number / page_pieces), number % page_pieces);
                let (offset, place) = ((within * piece_bytes) as u64, segments.len() * piece_bytes);
                let next = self.segment(page, offset, piece_bytes, place);
                let behind = |last: &Segment| (next.file, next.offset) > (last.file, last.offset);
                if self.direct() && !segments.last().is_none_or(behind) {
                    break;
                }
                let follows = |last: &Segment| (last.file, last.end()) == (next.file, next.offset);
                if !self.direct() && place >= APART_BYTES && !segments.last().is_some_and(follows) {
                    break;
                }
                memory(&next).copy_span(data.part(number * piece_bytes, piece_bytes));
                segments.push(next);
            }
            let checked = interrupt.check().map_err(|error| (0, error));
            checked
                .and_then(|()| self.write_segments(&segments, &memory, interrupt))
                .map_err(|(done, error)| error.with_completed((start + done) / page_pieces))?;
            start += segments.len();
        }
        Ok(())
    }

    fn check_write(&self, pages: &Pages<FilePage>, data_bytes: usize) -> Result<()> {
        if !self.writable() {
            let file = self.read_only_path().filter(|_| self.kind() == StoreKind::Concat);
            let named = file.map_or("the store".into(), |path| path.display().to_string());
            let reason = format!("{named} was opened for reading; open it with mode \"r+\"");
            return Err(Error::Unsupported { operation: "write", reason });
        }
        if data_bytes != pages.len() * self.page_size().bytes() {
            return Err(Error::Argument(format!(
                "write: {} pages of {} bytes need {} bytes of data, not {data_bytes}",
                pages.len(),
                self.page_size().bytes(),
                pages.len() * self.page_size().bytes(),
            )));
        }
        Ok(())
    }

    /// Where one of the files ends for a write: where it ended when it was opened, or where it
    /// ends now, if that is less.
    pub(super) fn size_now(&self, index: usize) -> Result<u64> {
        let part = &self.parts.all()[index];
        let facts =
            sys_file::facts(part.fd()).map_err(|errno| Self::part_error("write", part, errno))?;
        Ok(facts.size_bytes.min(self.part_bytes(index)))
    }
}
