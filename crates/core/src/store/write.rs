//! Writing pages to a store.
//!
//! What a caller gives passes through a buffer of this crate's: the caller's memory
//! may lie in a window whose pages the kernel cannot bring, so only user code
//! touches it. A window's own pages, which are present, are written from where they lie
//! ([`Outgoing`](super::Outgoing)).

use std::os::fd::AsFd;

use super::{Store, StoreKind};
use crate::error::{Error, Interrupt, Result};
use crate::sys::file as sys_file;
use crate::sys::mm::{system_page_bytes, Access, Region};
use crate::sys::span::Span;
use crate::units::{FilePage, Pages};

/// Bytes of the buffer, and of the longest single write.
const BUFFER_BYTES: usize = 1 << 20;

/// A stretch of one write, all in one file: where it starts in the store and in the
/// caller's data, and how long it is.
#[derive(Clone, Copy)]
struct Stretch {
    store_offset: u64,
    data_offset: usize,
    len: usize,
}

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
        let written = self.write_runs(pages, data, interrupt);
        self.note_passing();
        written
    }

    fn write_runs(
        &self,
        pages: &Pages<FilePage>,
        data: Span<'_>,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let page_bytes = self.page_size().bytes();
        let buffer_len = BUFFER_BYTES.min(data.len());
        let buffer = Region::anonymous(buffer_len, system_page_bytes(), Access::Write)
            .map_err(|errno| self.io_error("write", None, errno))?;
        let mut position = 0;
        while position < pages.len() {
            let first = pages.at(position);
            let count = run_at(pages, position, self.parts.end(self.parts.index_of(first)));
            let mut done = 0;
            let run_bytes = count * page_bytes;
            while done < run_bytes {
                let completed = position + done / page_bytes;
                interrupt.check().map_err(|error| error.with_completed(completed))?;
                let stretch = Stretch {
                    store_offset: self.page_size().bytes_of(first.0) + done as u64,
                    data_offset: position * page_bytes + done,
                    len: buffer_len.min(run_bytes - done),
                };
                // Asked before each, so that a file cut meanwhile stays cut.
                let file_bytes =
                    self.size_now(first).map_err(|error| error.with_completed(completed))?;
                self.write_stretch(stretch, data, &buffer, file_bytes)
                    .map_err(|error| completed_before(error, first, position))?;
                done += stretch.len;
            }
            position += count;
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

    /// Where in the store the file of a page ends for a write: where it ended when it
    /// was opened, or where it ends now, if that is less.
    pub(super) fn size_now(&self, page: FilePage) -> Result<u64> {
        let index = self.parts.index_of(page);
        let part = &self.parts.all()[index];
        let facts =
            sys_file::facts(part.fd()).map_err(|errno| Self::part_error("write", part, errno))?;
        let start = self.page_size().bytes_of(part.first.0);
        Ok(start + facts.size_bytes.min(self.part_bytes(index)))
    }

    fn write_stretch(
        &self,
        stretch: Stretch,
        data: Span<'_>,
        buffer: &Region,
        file_bytes: u64,
    ) -> Result<()> {
        let left = file_bytes.saturating_sub(stretch.store_offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(stretch.len);
        let page_of = |offset: u64| FilePage(self.page_size().index_of(offset));
        buffer.span(0, len).copy_span(data.part(stretch.data_offset, len));
        let file = &self.parts.of(page_of(stretch.store_offset)).file;
        let whole = match &file.direct_fd {
            Some(direct) => {
                let whole = len - len % system_page_bytes();
                self.write_buffer(direct.as_fd(), buffer.span(0, whole), stretch.store_offset)?;
                whole
            }
            None => 0,
        };
        let rest = buffer.span(whole, len - whole);
        self.write_buffer(file.fd.as_fd(), rest, stretch.store_offset + whole as u64)?;
        // Within the page that holds the end of the file nothing is missing.
        let end = stretch.store_offset + stretch.len as u64;
        let missing = self.page_size().bytes_of(self.page_size().count_of(file_bytes));
        if end > missing {
            return Err(self.truncated("write", page_of(missing.max(stretch.store_offset))));
        }
        Ok(())
    }

    fn write_buffer(
        &self,
        fd: std::os::fd::BorrowedFd<'_>,
        bytes: Span<'_>,
        offset: u64,
    ) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let at = |done: usize| FilePage(self.page_size().index_of(offset + done as u64));
        let part = self.parts.of(at(0));
        let file_offset = offset - self.page_size().bytes_of(part.first.0);
        let done = sys_file::write_at(fd, bytes, file_offset)
            .map_err(|(errno, done)| self.io_error("write", Some(at(done)), errno))?;
        self.count().add_written(done);
        if done < bytes.len() {
            return Err(self.io_error("write", Some(at(done)), rustix::io::Errno::NOSPC));
        }
        Ok(())
    }
}

/// How many pages from `position` follow each other in the file that ends before `end`.
fn run_at(pages: &Pages<FilePage>, position: usize, end: FilePage) -> usize {
    let first = pages.at(position).0;
    let follows = |next: usize| pages.at(next).0 == first + (next - position) as u64;
    (position + 1..pages.len()).take_while(|&next| follows(next) && pages.at(next) < end).count()
        + 1
}

/// Counts the whole pages written before an error in the run that starts with
/// `first` at `position`.
pub(super) fn completed_before(error: Error, first: FilePage, position: usize) -> Error {
    let failed = match &error {
        Error::Io { file_page: Some(page), .. } | Error::Truncated { file_page: page, .. } => *page,
        _ => first.0,
    };
    let within = usize::try_from(failed.saturating_sub(first.0)).unwrap_or(0);
    error.with_completed(position + within)
}
