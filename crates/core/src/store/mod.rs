//! Stores: numbered file pages of a file, of shared memory, or of several of these one after
//! another.
//!
//! A store consists of parts. Each part has a file's descriptors (shared with the store that it was
//! made from) and a read-only map of the whole file, from which cached pages are copied
//! (`source.rs`). A store owns idle rings. Its size is fixed when it is opened, and only
//! [`Store::refresh`] reads it again. Every method may be called from several threads at once.

mod concat;
mod counters;
mod durability;
mod file;
mod identity;
pub(crate) mod last_change;
mod memory;
mod now;
mod outgoing;
pub(crate) mod part;
mod prefetch;
mod provided;
mod provider;
mod resident;
pub(crate) mod source;
mod write;

use std::borrow::Cow;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;

use rustix::io::Errno;

use crate::error::{Error, Result, Uninterruptible};
use crate::sys::clock::coarse_ns;
use crate::sys::file as sys_file;
use crate::sys::fork_lock::ForkLock;
use crate::sys::mm::system_page_bytes;
use crate::sys::ring::RingPool;
use crate::sys::span::Span;
use crate::units::{FilePage, PageIndex, PageSize, Run};

pub(crate) use counters::Counters;
pub use counters::StoreCounters;
use durability::{Durability, Unsynced};
pub use identity::StoreIdentity;
pub(crate) use now::{Now, Place};
pub use outgoing::Outgoing;
use part::{File, OwnWrites, Part, Parts};
use provider::Provider;
pub use provider::ProviderOptions;
pub use source::SourceLimit;
use source::SourceMaps;

/// Where the pages of a store live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreKind {
    /// An ordinary file or a block device.
    File,
    /// Shared memory: a memfd or `/dev/shm`.
    Memory,
    /// Those of other stores, one after another.
    Concat,
    /// Nowhere: other processes provide them.
    Provided,
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

/// A numbered run of pages in files or in shared memory.
#[derive(Debug)]
pub struct Store {
    kind: StoreKind,
    page_size: PageSize,
    /// Whole pages each, but for the last one.
    parts: Arc<Parts>,
    /// The stores that the parts were taken from, if they were.
    members: Vec<Arc<Store>>,
    size_bytes: AtomicU64,
    closed: AtomicBool,
    /// What the parts' source maps have mapped, all together.
    mapped: Arc<SourceMaps>,
    rings: RingPool,
    /// Pages that are to be read ahead.
    prefetches: Arc<ForkLock<prefetch::Queue>>,
    /// Who provides the pages, where no file has them.
    provider: Option<Arc<Provider>>,
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
    /// A provider process would have to be asked, which a signal handler cannot.
    Provided,
}

impl fmt::Display for Unread {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // The text of an errno is allocated.
            Self::Failed(Errno::IO) => out.write_str("EIO"),
            Self::Failed(errno) => write!(out, "errno {}", errno.raw_os_error()),
            Self::Ended => out.write_str("the file has been truncated"),
            Self::Provided => out.write_str(
                "its content is provided by processes of the process that made the window",
            ),
        }
    }
}

impl Store {
    fn new(opened: Opened, page_size: PageSize) -> Result<Self> {
        check_size(opened.size_bytes)?;
        let file = File {
            memory_backed: sys_file::is_memory_backed(opened.fd.as_fd()).unwrap_or(false),
            path: opened.path,
            writable: opened.writable,
            fd: Arc::new(opened.fd),
            direct_fd: opened.direct_fd.map(Arc::new),
            durability: Durability::default(),
            own_writes: OwnWrites::default(),
        };
        let part = Part::new(FilePage(0), file.path.clone(), Arc::new(file));
        Ok(Self::over(opened.kind, vec![part], Vec::new(), opened.size_bytes, page_size))
    }

    fn over(
        kind: StoreKind,
        parts: Vec<Part>,
        members: Vec<Arc<Self>>,
        size_bytes: u64,
        page_size: PageSize,
    ) -> Self {
        Self {
            kind,
            page_size,
            parts: Arc::new(Parts::new(parts)),
            members,
            size_bytes: AtomicU64::new(size_bytes),
            closed: AtomicBool::new(false),
            mapped: Arc::default(),
            rings: RingPool::default(),
            prefetches: Arc::default(),
            provider: None,
            counters: Counters::default(),
        }
    }

    /// Where the pages are.
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

    /// The path that the store was opened by; a store of several files has none.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self.kind {
            StoreKind::Concat => None,
            StoreKind::File | StoreKind::Memory | StoreKind::Provided => {
                self.parts.last().name.as_deref()
            }
        }
    }

    /// What messages call the file that has a page.
    pub(crate) fn path_of(&self, page: FilePage) -> Option<PathBuf> {
        self.parts.of(page).name.clone()
    }

    /// The store in a message.
    #[must_use]
    pub fn describe(&self) -> String {
        match (self.kind, self.path()) {
            (StoreKind::Concat, _) => format!("a ConcatStore of {} files", self.parts.all().len()),
            (_, Some(path)) => path.display().to_string(),
            (StoreKind::Provided, None) => "a computed store".into(),
            (_, None) => "shared memory".into(),
        }
    }

    /// Whether the store may be written.
    #[must_use]
    pub fn writable(&self) -> bool {
        self.parts.all().iter().all(|part| part.file.writable)
    }

    /// What messages call a file that may only be read.
    pub(crate) fn read_only_path(&self) -> Option<PathBuf> {
        self.parts.all().iter().find(|part| !part.file.writable)?.name.clone()
    }

    /// Whether reads and writes go past the page cache, those of some file at least.
    #[must_use]
    pub fn direct(&self) -> bool {
        self.parts.all().iter().any(|part| part.file.direct_fd.is_some())
    }

    /// The file of a store that has one.
    fn only_part(&self) -> Option<&Part> {
        match self.parts.all() {
            [only] if self.provider.is_none() => Some(only),
            _ => None,
        }
    }

    /// The descriptor of a store of one file; valid while the store lives, closed or not.
    #[must_use]
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.only_part().map(Part::fd)
    }

    /// The same, through the page cache, for others to keep open.
    pub(crate) fn file(&self) -> Option<Arc<OwnedFd>> {
        self.only_part().map(|part| Arc::clone(&part.file.fd))
    }

    /// The same past the page cache, where the store is direct.
    pub(crate) fn direct_file(&self) -> Option<Arc<OwnedFd>> {
        self.only_part()?.file.direct_fd.clone()
    }

    /// The descriptor to map a page by, and its offset in that file.
    pub(crate) fn place_of(&self, page: FilePage) -> (BorrowedFd<'_>, u64) {
        let part = self.parts.of(page);
        (part.fd(), part.offset_of(page, self.page_size))
    }

    /// A run of pages, cut where one file ends and the next begins.
    pub(crate) fn cut(&self, run: Run<FilePage>) -> impl Iterator<Item = Run<FilePage>> + '_ {
        self.parts.cut(run)
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
    /// [`Error::Closed`] after [`close`](Self::close), also that of a store in the row.
    pub fn check_open(&self, operation: &'static str) -> Result<()> {
        if self.is_closed() {
            return Err(Error::Closed { operation, what: "store" });
        }
        for (index, member) in self.members.iter().enumerate() {
            member.check_open(operation).map_err(|_closed| Error::MemberClosed {
                operation,
                index,
                member: member.describe(),
            })?;
        }
        Ok(())
    }

    /// What was read so far, and how.
    #[must_use]
    pub fn counters(&self) -> StoreCounters {
        self.counters.read()
    }

    /// Bytes that the source maps may have mapped.
    pub(crate) fn source_limit_bytes(&self) -> u64 {
        self.mapped.limit_bytes()
    }

    /// Has the source maps keep no more than `bytes` of the files mapped, for all who use
    /// the store and as long as what is returned lives. What is beyond that is unmapped.
    #[must_use]
    pub(crate) fn limit_source_map(&self, bytes: u64) -> SourceLimit {
        let limit = self.mapped.limit(bytes);
        if self.mapped.is_beyond_limit() {
            // The maps are made again when they are wanted, without their page tables.
            self.parts.all().iter().for_each(|part| part.source.forget());
        }
        limit
    }

    /// Bytes of the files that the source maps have mapped, which count as memory of
    /// this process.
    pub(crate) fn source_mapped_bytes(&self) -> u64 {
        self.mapped.bytes()
    }

    /// Bytes of page tables that the source maps have.
    #[must_use]
    pub fn source_table_bytes(&self) -> u64 {
        self.mapped.table_bytes()
    }

    /// Reads one page with plain system calls; bytes past the end of the file
    /// read as zeros. Takes no lock and allocates only for an error, so a fault
    /// may be served by it.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Truncated`] when the file has lost the page.
    pub fn read_page(&self, page: FilePage, into: Span<'_>) -> Result<()> {
        if self.is_provided() {
            let take = &mut |_, content: Span<'_>| into.copy_span(content);
            return self.provide(&[page], take, &Uninterruptible);
        }
        let one = Run { first: page, count: 1 };
        self.read_run(one, into).map_err(|unread| match unread {
            Unread::Failed(errno) => self.io_error("read", Some(page), errno),
            Unread::Ended | Unread::Provided => self.truncated("read", page),
        })
    }

    /// The same for pages that follow one another, by one system call for each file, and
    /// again where a file has changed meanwhile: one that was cut and made as long again would
    /// have brought zeros, which a window would keep. Allocates nothing at all, so that a signal
    /// handler may call it.
    ///
    /// # Errors
    /// [`Unread`], which is not told of any one page.
    pub(crate) fn read_run(&self, run: Run<FilePage>, into: Span<'_>) -> Result<(), Unread> {
        let began_ns = coarse_ns();
        if self.read_pieces(run, into, sys_file::read_and_look)? >= began_ns {
            self.read_pieces(run, into, sys_file::read_unchanged)?;
        }
        Ok(())
    }

    /// Reads a run once; says whether all was read, of files that others did not change
    /// meanwhile.
    pub(crate) fn read_run_unchanged(&self, run: Run<FilePage>, into: Span<'_>) -> bool {
        let began_ns = coarse_ns();
        let changed_ns = self.read_pieces(run, into, sys_file::read_and_look);
        let own =
            |piece: Run<FilePage>| self.parts.of(piece.first).file.own_writes.any_since(began_ns);
        changed_ns.is_ok_and(|changed_ns| changed_ns < began_ns || self.cut(run).all(own))
    }

    /// Reads a run with `read`; says when a file of it changed last, by what it was after that.
    fn read_pieces(
        &self,
        run: Run<FilePage>,
        into: Span<'_>,
        read: sys_file::Read,
    ) -> Result<i64, Unread> {
        if self.is_provided() {
            return Err(Unread::Provided);
        }
        let (mut done, mut changed_ns) = (0, i64::MIN);
        for piece in self.cut(run) {
            let len = self.page_size.bytes_of(piece.count) as usize;
            changed_ns = changed_ns.max(self.read_piece(piece, into.part(done, len), read)?);
            done += len;
        }
        Ok(changed_ns)
    }

    /// The same for pages of one file.
    fn read_piece(
        &self,
        run: Run<FilePage>,
        into: Span<'_>,
        read: sys_file::Read,
    ) -> Result<i64, Unread> {
        let wanted = self.wanted_bytes(run, into);
        let (fd, offset) = self.place_of(run.first);
        let (count, facts) = read(fd, into.part(0, wanted), offset).map_err(Unread::Failed)?;
        self.check_piece(run, into, count, facts)
    }

    /// Bytes of the file within a run of its pages.
    fn wanted_bytes(&self, run: Run<FilePage>, into: Span<'_>) -> usize {
        let last = run.first.offset(run.count - 1);
        into.len() - self.page_size.bytes() + self.expected_bytes(last)
    }

    /// Ends the reading of a run of one file, of which `count` bytes came, and which is what
    /// `facts` say afterwards.
    fn check_piece(
        &self,
        run: Run<FilePage>,
        into: Span<'_>,
        count: usize,
        facts: sys_file::Facts,
    ) -> Result<i64, Unread> {
        let wanted = self.wanted_bytes(run, into);
        let last = run.first.offset(run.count - 1);
        let (_, offset) = self.place_of(run.first);
        self.counters.add_read(count);
        // A read beside a truncation may bring zeros for what is cut off, and a full count: the
        // kernel looks at the size before it copies, and shortens it before it clears. So the
        // size after a read tells.
        let is_cut = facts.size_bytes < offset + wanted as u64;
        if count < wanted || self.expected_bytes(last) == 0 || is_cut {
            return Err(Unread::Ended);
        }
        into.part(wanted, into.len() - wanted).clear();
        Ok(facts.changed_ns)
    }

    /// Makes what was written durable (`fsync`).
    ///
    /// # Errors
    /// [`Error::Io`] for the first file that failed; the others were synced. Every later call
    /// fails as well, until [`refresh`](Self::refresh).
    pub fn sync(&self) -> Result<()> {
        // Mappings of the file may have been written to.
        self.note_passing();
        self.sync_kept()
    }

    /// The same for somebody who still has what he has written. Later calls fail as well only
    /// where something else was written, since a sync that succeeded.
    ///
    /// # Errors
    /// As [`sync`](Self::sync).
    pub(crate) fn sync_kept(&self) -> Result<()> {
        // A file that may only be read has nothing of ours.
        let sync = |part: &Part| {
            let durability = &part.file.durability;
            durability.check().map_err(|unsynced| Self::unsynced(part, unsynced))?;
            let syncing = durability.begin();
            let outcome = sys_file::sync(part.fd());
            syncing.end(outcome).map_err(|unsynced| Self::unsynced(part, unsynced))
        };
        let alone = self.parts.all().len() == 1;
        let written = self.parts.all().iter().filter(|part| alone || part.file.writable);
        written.map(sync).fold(Ok(()), Result::and)
    }

    /// The same for what was written to shared mappings of the files, by `sync`.
    ///
    /// # Errors
    /// As [`sync`](Self::sync), for the first of the files.
    pub(crate) fn sync_mappings(&self, sync: impl FnOnce() -> Result<(), Errno>) -> Result<()> {
        self.note_passing();
        self.check_synced()?;
        let mut parts: Vec<&Part> = self.parts.all().iter().collect();
        // Each once, and by all callers in the same order.
        parts.sort_unstable_by_key(|part| Arc::as_ptr(&part.file));
        parts.dedup_by_key(|part| Arc::as_ptr(&part.file));
        let under_way: Vec<_> = parts.iter().map(|part| part.file.durability.begin()).collect();
        let outcome = sync();
        let ended = parts.into_iter().zip(under_way).map(|(part, syncing)| {
            syncing.end(outcome).map_err(|unsynced| Self::unsynced(part, unsynced))
        });
        ended.fold(Ok(()), Result::and)
    }

    /// Somebody is about to write, or has written, what he cannot write again.
    pub(crate) fn note_passing(&self) {
        self.parts.all().iter().for_each(|part| part.file.durability.note_passing());
    }

    /// How many syncs of the files have failed: what was written to any of them before the
    /// last one that did may be lost, whatever a later one says.
    pub(crate) fn failed_syncs(&self) -> u64 {
        self.parts.all().iter().map(|part| part.file.durability.failures()).sum()
    }

    /// # Errors
    /// Those of [`sync`](Self::sync) that are not acknowledged.
    pub(crate) fn check_synced(&self) -> Result<()> {
        let check = |part: &Part| {
            part.file.durability.check().map_err(|unsynced| Self::unsynced(part, unsynced))
        };
        self.parts.all().iter().try_for_each(check)
    }

    fn unsynced(part: &Part, unsynced: Unsynced) -> Error {
        let (errno, hint) = match unsynced {
            Unsynced::Failed(errno) => (errno, ""),
            Unsynced::Lost(errno) => (
                errno,
                "; what was written to it since the last sync that succeeded, pages that a \
                 window has evicted among it, may not be on the disk, and the kernel tells so \
                 once: write it again after store.refresh(), which lets syncs succeed again",
            ),
        };
        Error::system_with_hint("sync", errno, hint).of_file(part.name.as_ref())
    }

    /// Reads the file's size again. Reads that are under way end with the old one. Also lets
    /// [`sync`](Self::sync) succeed again after one that failed.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Argument`] when it has grown beyond 1 EiB, or when a
    /// file that others follow has another size than it had.
    pub fn refresh(&self) -> Result<()> {
        if let Some(provider) = &self.provider {
            provider.ahead.forget();
            return Ok(());
        }
        let size_bytes = self.refreshed_size()?;
        self.parts.all().iter().for_each(|part| part.file.durability.acknowledge());
        self.size_bytes.store(size_bytes, Ordering::Release);
        self.parts.all().iter().for_each(|part| part.source.forget());
        Ok(())
    }

    /// Bytes of the store in a part of it.
    fn part_bytes(&self, index: usize) -> u64 {
        let part = &self.parts.all()[index];
        let start = self.page_size.bytes_of(part.first.0);
        match self.parts.all().get(index + 1) {
            Some(next) => self.page_size.bytes_of(next.first.0) - start,
            None => self.size_bytes() - start,
        }
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
        let path =
            page.map_or_else(|| self.path().map(Path::to_path_buf), |page| self.path_of(page));
        let hint = space_hint(path.as_deref(), errno);
        let file_page = page.map(|page| page.0);
        Error::Io { operation, path, file_page, errno, completed: 0, hint }
    }

    /// A page that can be read and not mapped. Of shared memory that is full the kernel says
    /// only that the address is bad.
    pub(crate) fn unmappable(
        &self,
        operation: &'static str,
        page: Option<FilePage>,
        errno: Errno,
    ) -> Error {
        let path = page.and_then(|page| self.path_of(page));
        let full = path.is_some_and(|path| sys_file::free_bytes(&path) == Ok(0));
        let errno = if full && errno == Errno::FAULT { Errno::NOSPC } else { errno };
        self.io_error(operation, page, errno)
    }

    /// A failed system call that concerns a file as a whole.
    fn part_error(operation: &'static str, part: &Part, errno: Errno) -> Error {
        let path = part.name.clone();
        let hint = space_hint(path.as_deref(), errno);
        Error::Io { operation, path, file_page: None, errno, completed: 0, hint }
    }

    pub(crate) fn truncated(&self, operation: &'static str, page: FilePage) -> Error {
        let part = self.parts.of(page);
        let left = sys_file::facts(part.fd()).map_or(0, |facts| facts.size_bytes);
        let start = part.offset_of(page, self.page_size);
        let in_part = left > start && left < start + self.expected_bytes(page) as u64;
        let (path, file_page) = (part.name.clone(), page.0);
        Error::Truncated { operation, path, file_page, in_part, completed: 0 }
    }

    /// The files of the store.
    pub(crate) fn parts(&self) -> &Parts {
        &self.parts
    }

    /// No read waits for a device.
    pub(crate) fn memory_backed(&self) -> bool {
        self.parts.all().iter().all(|part| part.file.memory_backed)
    }

    pub(crate) fn count(&self) -> &Counters {
        &self.counters
    }

    pub(crate) fn rings(&self) -> &RingPool {
        &self.rings
    }
}

/// What to know where a file system has no space left: which one, and what is free by now.
fn space_hint(path: Option<&Path>, errno: Errno) -> Cow<'static, str> {
    let Some(path) = path.filter(|_| errno == Errno::NOSPC) else { return "".into() };
    let free = sys_file::free_bytes(path);
    let (Ok(mount), Ok(free)) = (sys_file::mount_point(path), free) else { return "".into() };
    let mount = mount.display();
    format!("; the file system at {mount} has {free} bytes free: make room there, and try again")
        .into()
}
