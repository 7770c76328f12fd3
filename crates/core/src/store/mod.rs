//! Stores: a numbered run of file pages, in a file or in shared memory.
//!
//! A store owns its descriptors, a read-only map of the whole file from which
//! cached pages are copied (`source.rs`), and idle rings. Its size is fixed when
//! it is opened and read again only by [`Store::refresh`]. Every method may be
//! called from several threads at once.

mod counters;
mod file;
mod memory;
mod prefetch;
mod resident;
pub(crate) mod source;
mod write;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;

use rustix::io::Errno;

use crate::error::{Error, Interrupt, Result};
use crate::scatter::{self, Preference, Sink};
use crate::sys::file as sys_file;
use crate::sys::mm::system_page_bytes;
use crate::sys::ring::RingPool;
use crate::sys::span::Span;
use crate::units::{FilePage, PageIndex, PageSize, Pages, Run};

pub(crate) use counters::Counters;
pub use counters::StoreCounters;
use source::Source;
pub use write::Outgoing;

/// Where the pages of a store live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreKind {
    /// An ordinary file or a block device.
    File,
    /// Shared memory: a memfd or `/dev/shm`.
    Memory,
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// `r`: must exist, only read.
    Read,
    /// `r+`: must exist, read and written.
    ReadWrite,
    /// `w+`: made or emptied, then of this size.
    Create {
        /// Bytes that the new file has, all zero.
        size_bytes: u64,
    },
}

/// A numbered run of pages in a file or in shared memory.
#[derive(Debug)]
pub struct Store {
    kind: StoreKind,
    page_size: PageSize,
    path: Option<PathBuf>,
    writable: bool,
    /// Through the page cache. What is mapped, written, synced and asked about.
    fd: Arc<OwnedFd>,
    /// The same file past the page cache, for a direct store's reads and writes.
    direct_fd: Option<Arc<OwnedFd>>,
    size_bytes: AtomicU64,
    closed: AtomicBool,
    /// The file system keeps the file in memory: reads never wait for a device.
    memory_backed: bool,
    source: Source,
    rings: RingPool,
    prefetches: Arc<AtomicU64>,
    counters: Counters,
}

/// What a constructor found out about a file.
struct Opened {
    kind: StoreKind,
    path: Option<PathBuf>,
    writable: bool,
    fd: OwnedFd,
    direct_fd: Option<OwnedFd>,
    size_bytes: u64,
}

/// The largest file: page numbers then fit 48 bits, which sorting relies on.
const MAX_FILE_BYTES: u64 = 1 << 60;

/// Refuses a file that is too large to number.
fn check_size(size_bytes: u64) -> Result<()> {
    if size_bytes > MAX_FILE_BYTES {
        return Err(Error::Argument(format!(
            "the file has {size_bytes} bytes; stores end at {MAX_FILE_BYTES} (1 EiB)"
        )));
    }
    Ok(())
}

/// The page size that was asked for, or the system's.
fn checked_page_size(page_bytes: Option<u64>) -> Result<PageSize> {
    let system = system_page_bytes() as u64;
    PageSize::new(page_bytes.unwrap_or(system), system)
}

/// Why pages could not be read, where nothing may be allocated to say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unread {
    /// What the kernel said.
    Failed(Errno),
    /// The file ends before them.
    Ended,
}

impl fmt::Display for Unread {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // The text of an errno is allocated.
            Self::Failed(Errno::IO) => out.write_str("EIO"),
            Self::Failed(errno) => write!(out, "errno {}", errno.raw_os_error()),
            Self::Ended => out.write_str("the file has been cut short"),
        }
    }
}

impl Store {
    fn new(opened: Opened, page_size: PageSize) -> Result<Self> {
        check_size(opened.size_bytes)?;
        let memory_backed = sys_file::is_memory_backed(opened.fd.as_fd()).unwrap_or(false);
        Ok(Self {
            kind: opened.kind,
            page_size,
            path: opened.path,
            writable: opened.writable,
            fd: Arc::new(opened.fd),
            direct_fd: opened.direct_fd.map(Arc::new),
            size_bytes: AtomicU64::new(opened.size_bytes),
            closed: AtomicBool::new(false),
            memory_backed,
            source: Source::default(),
            rings: RingPool::default(),
            prefetches: Arc::default(),
            counters: Counters::default(),
        })
    }

    /// Whether the pages are in a file or in shared memory.
    #[must_use]
    pub fn kind(&self) -> StoreKind {
        self.kind
    }

    /// The size of a page.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The number of pages, the last perhaps in part.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        self.page_size.count_of(self.size_bytes())
    }

    /// Bytes of the file when it was opened or last refreshed.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// The path that the store was opened by.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Whether the store may be written.
    #[must_use]
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// Whether reads and writes go past the page cache.
    #[must_use]
    pub fn direct(&self) -> bool {
        self.direct_fd.is_some()
    }

    /// The descriptor, for mapping; valid while the store lives, closed or not.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Refuses later calls of the store's user: who calls on a user's behalf
    /// asks [`check_open`](Self::check_open) first. Windows on the store hold
    /// it and go on, so the other methods do not ask.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Whether [`close`](Self::close) was called.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// # Errors
    /// [`Error::Closed`] after [`close`](Self::close).
    pub fn check_open(&self, operation: &'static str) -> Result<()> {
        if self.is_closed() {
            return Err(Error::Closed { operation, what: "store" });
        }
        Ok(())
    }

    /// What was read so far, and how.
    #[must_use]
    pub fn counters(&self) -> StoreCounters {
        self.counters.read()
    }

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
        let wanted: Vec<FilePage> = pages.iter().collect();
        scatter::read_into(self, &wanted, into, interrupt)
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
        scatter::scatter(self, file_pages, sink, Preference::Speed, interrupt)
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
        let outcome = scatter::scatter(self, file_pages, sink, Preference::NoDevice, interrupt);
        self.source.keep_to_limit();
        outcome
    }

    /// Bytes that the source map may have mapped.
    pub(crate) fn source_limit_bytes(&self) -> u64 {
        self.source.limit_bytes()
    }

    /// Has the source map keep no more than `bytes` of the file mapped, from now on and
    /// for all who use the store.
    pub fn limit_source_map(&self, bytes: u64) {
        self.source.limit(bytes);
    }

    /// Bytes of the file that the source map has mapped, which count as memory of this
    /// process.
    #[must_use]
    pub fn source_mapped_bytes(&self) -> u64 {
        self.source.mapped_bytes()
    }

    /// Bytes of page tables that the source map has.
    #[must_use]
    pub fn source_table_bytes(&self) -> u64 {
        self.source.table_bytes()
    }

    /// Reads one page with plain system calls; bytes past the end of the file
    /// read as zeros. Takes no lock and allocates only for an error, so a fault
    /// may be served by it.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Truncated`] when the file has lost the page.
    pub fn read_page(&self, page: FilePage, into: Span<'_>) -> Result<()> {
        let one = Run { first: page, count: 1 };
        self.read_run(one, into).map_err(|unread| match unread {
            Unread::Failed(errno) => self.io_error("read", Some(page), errno),
            Unread::Ended => self.truncated("read", page),
        })
    }

    /// The same for pages that follow one another, by one system call. Allocates nothing
    /// at all, so that a signal handler may call it.
    ///
    /// # Errors
    /// [`Unread`], which is not told of any one page.
    pub(crate) fn read_run(&self, run: Run<FilePage>, into: Span<'_>) -> Result<(), Unread> {
        let last = run.first.offset(run.count - 1);
        let wanted = into.len() - self.page_size.bytes() + self.expected_bytes(last);
        let offset = self.page_size.bytes_of(run.first.0);
        let read =
            sys_file::read_at(self.fd(), into.part(0, wanted), offset).map_err(Unread::Failed)?;
        self.counters.add_read(read);
        if read < wanted || self.expected_bytes(last) == 0 {
            return Err(Unread::Ended);
        }
        into.part(wanted, into.len() - wanted).clear();
        Ok(())
    }

    /// Makes what was written durable (`fsync`).
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&self) -> Result<()> {
        sys_file::sync(self.fd()).map_err(|errno| self.io_error("sync", None, errno))
    }

    /// Reads the file's size again. Reads that are under way end with the old one.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Argument`] when it has grown beyond 1 EiB.
    pub fn refresh(&self) -> Result<()> {
        let facts =
            sys_file::facts(self.fd()).map_err(|errno| self.io_error("refresh", None, errno))?;
        check_size(facts.size_bytes)?;
        self.size_bytes.store(facts.size_bytes, Ordering::Release);
        self.source.forget();
        Ok(())
    }

    /// Bytes of the file within a page: a page of it, less for the last one,
    /// none beyond the end.
    pub(crate) fn expected_bytes(&self, page: FilePage) -> usize {
        self.bytes_within(page, self.size_bytes())
    }

    /// The same for a file of `size_bytes`, if that is less than it has.
    pub(crate) fn bytes_within(&self, page: FilePage, size_bytes: u64) -> usize {
        let start = self.page_size.bytes_of(page.0);
        let rest = size_bytes.min(self.size_bytes()).saturating_sub(start);
        usize::try_from(rest).unwrap_or(usize::MAX).min(self.page_size.bytes())
    }

    pub(crate) fn io_error(
        &self,
        operation: &'static str,
        page: Option<FilePage>,
        errno: Errno,
    ) -> Error {
        Error::Io {
            operation,
            path: self.path.clone(),
            file_page: page.map(|page| page.0),
            errno,
            completed: 0,
            hint: "",
        }
    }

    pub(crate) fn truncated(&self, operation: &'static str, page: FilePage) -> Error {
        Error::Truncated { operation, path: self.path.clone(), file_page: page.0, completed: 0 }
    }

    /// The descriptor that reads go through.
    pub(crate) fn read_file(&self) -> &Arc<OwnedFd> {
        self.direct_fd.as_ref().unwrap_or(&self.fd)
    }

    /// The descriptor that goes through the page cache, for others to read through.
    pub(crate) fn file(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    pub(crate) fn memory_backed(&self) -> bool {
        self.memory_backed
    }

    pub(crate) fn count(&self) -> &Counters {
        &self.counters
    }

    pub(crate) fn rings(&self) -> &RingPool {
        &self.rings
    }
}
