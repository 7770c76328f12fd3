//! Reading only what is in the page cache, for a thread that must not wait.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;

use super::{Store, Unread};
use crate::sys::clock::coarse_ns;
use crate::sys::file as sys_file;
use crate::sys::span::{system_page_bytes, Span};
use crate::units::{FilePage, Pages, Run};

/// What of the pages that were asked for could be read without waiting.
#[derive(Clone, Debug)]
pub(crate) enum Now {
    /// All of them.
    Read,
    /// Not all. The kernel reads the others by now, this place last.
    Absent(Place),
    /// Nobody tells without waiting.
    Unknown,
}

/// A byte of a file, to wait for it.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) file: Arc<OwnedFd>,
    pub(crate) offset_bytes: u64,
}

impl Store {
    /// Reads pages that follow one another if they are in the page cache; else has the kernel
    /// read them. Takes no lock, allocates nothing, and does not wait for a device, save where
    /// the kernel has to read which blocks of it a file has.
    ///
    /// # Errors
    /// As [`read_run`](Self::read_run).
    pub(crate) fn read_run_now(&self, run: Run<FilePage>, into: Span<'_>) -> Result<Now, Unread> {
        if self.is_provided() {
            return Ok(Now::Unknown);
        }
        let (began_ns, mut done) = (coarse_ns(), 0);
        for piece in self.cut(run) {
            let len = self.page_size.bytes_of(piece.count) as usize;
            match self.read_piece_now(piece, into.part(done, len), began_ns)? {
                Now::Read => done += len,
                other => return Ok(other),
            }
        }
        Ok(Now::Read)
    }

    /// Has the kernel begin to read pages that follow one another, as far as it can tell: whoever
    /// reads them then is told what is wrong.
    pub(crate) fn begin_reading(&self, run: Run<FilePage>) {
        for piece in self.cut(run) {
            let (fd, offset) = self.place_of(piece.first);
            let _hint = sys_file::advise_willneed(fd, offset, self.page_size.bytes_of(piece.count));
        }
    }

    fn read_piece_now(
        &self,
        run: Run<FilePage>,
        into: Span<'_>,
        began_ns: i64,
    ) -> Result<Now, Unread> {
        let part = self.parts.of(run.first);
        let read = |changed_ns| {
            // Cut meanwhile and made as long again it would have brought zeros.
            if changed_ns < began_ns {
                return Ok(Now::Read);
            }
            if !self.writable() {
                return Ok(Now::Unknown);
            }
            // A store that writes changes its file itself, so this is no rare case.
            let again: sys_file::Read = if part.file.memory_backed {
                sys_file::read_unchanged
            } else {
                sys_file::read_cached_unchanged
            };
            match self.read_piece(run, into, again) {
                Err(Unread::Failed(Errno::AGAIN | Errno::OPNOTSUPP)) => Ok(Now::Unknown),
                read => read.map(|_changed_ns| Now::Read),
            }
        };
        if part.file.memory_backed {
            return read(self.read_piece(run, into, sys_file::read_and_look)?);
        }
        let wanted = self.wanted_bytes(run, into);
        let (fd, offset) = self.place_of(run.first);
        let cached = match sys_file::read_cached_at(fd, into.part(0, wanted), offset) {
            Ok(cached) => cached,
            Err(Errno::OPNOTSUPP) => return Ok(Now::Unknown),
            Err(errno) => return Err(Unread::Failed(errno)),
        };
        if !cached.waits {
            let facts = sys_file::facts(fd).map_err(Unread::Failed)?;
            return read(self.check_piece(run, into, cached.bytes, facts)?);
        }
        let rest = wanted - cached.bytes;
        if rest > system_page_bytes() {
            // What the kernel has begun to read may end before the last of it. A hint: the read
            // that follows says what is wrong.
            let _hint = sys_file::advise_willneed(fd, offset + cached.bytes as u64, rest as u64);
        }
        let file = Arc::clone(&part.file.fd);
        Ok(Now::Absent(Place { file, offset_bytes: offset + wanted as u64 - 1 }))
    }

    /// Whether `pages`, in any order, are all in the page cache; has the kernel read those that
    /// are not.
    pub(crate) fn absent_now(&self, pages: &[FilePage]) -> Now {
        if self.is_provided() {
            return Now::Unknown;
        }
        if self.memory_backed() {
            return Now::Read;
        }
        let Ok(resident) = self.resident(&Pages::List(pages.to_vec())) else { return Now::Unknown };
        let absent = pages.iter().zip(resident).filter(|(_, here)| !here).map(|(&page, _)| page);
        let mut last = Now::Read;
        for page in absent {
            let part = self.parts.of(page);
            let (offset, bytes) = (part.offset_of(page, self.page_size), self.expected_bytes(page));
            let _hint = sys_file::advise_willneed(part.fd(), offset, bytes as u64);
            let offset_bytes = offset + bytes.max(1) as u64 - 1;
            last = Now::Absent(Place { file: Arc::clone(&part.file.fd), offset_bytes });
        }
        last
    }
}

impl Place {
    /// Waits until the byte is in the page cache, or cannot be.
    pub(crate) fn wait(&self) {
        let mut byte = [0];
        // Whoever reads the page then is told what is wrong.
        let _arrived = sys_file::read_at(self.file.as_fd(), Span::of(&mut byte), self.offset_bytes);
    }
}
