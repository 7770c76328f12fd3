//! Memory mappings: reserving, mapping, protecting, advising, asking what is resident.

use std::ffi::c_void;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::null_mut;
use std::sync::Arc;

use linux_raw_sys::general::{MADV_GUARD_INSTALL, MADV_GUARD_REMOVE};
use rustix::io::Errno;
use rustix::mm::{mremap_fixed, MremapFlags};

use super::call::{check, enter, last_errno, Call};
use super::children::{handle_forks, Kept};
use super::fault_ranges::{Explain, Explaining, Resolve, Resolving};
use super::file::Parts;
use super::per_process::PerProcess;
pub use super::span::system_page_bytes;
use super::span::Span;

/// What one entry of the upper page table maps, and the size of a huge page.
pub const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Whether the kernel has `MADV_POPULATE_READ` (5.14). Of no bytes at all, it says EINVAL
/// only where it has not.
pub(crate) fn has_populate_read() -> bool {
    if enter(Call::ProbePopulate).is_err() {
        return false;
    }
    // SAFETY: no memory is named.
    unsafe { libc::madvise(null_mut(), 0, libc::MADV_POPULATE_READ) == 0 }
}

/// What a mapping allows the process to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Access {
    /// `PROT_NONE`
    None = libc::PROT_NONE,
    /// `PROT_READ`
    Read = libc::PROT_READ,
    /// `PROT_READ | PROT_WRITE`
    Write = libc::PROT_READ | libc::PROT_WRITE,
}

/// Whether other mappings of a file see what is written to this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Sharing {
    /// `MAP_SHARED`: every process that maps or reads the file sees it.
    Shared = libc::MAP_SHARED,
    /// `MAP_PRIVATE`: the mapping alone, which gets pages of its own by being written.
    Private = libc::MAP_PRIVATE,
}

/// What to tell the kernel of a range ([`Region::advise`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Advice {
    /// `MADV_RANDOM`: no read-ahead around a fault.
    Random = libc::MADV_RANDOM,
    /// `MADV_NORMAL`: read-ahead as the kernel sees fit.
    Normal = libc::MADV_NORMAL,
    /// `MADV_SEQUENTIAL`: read far ahead.
    Sequential = libc::MADV_SEQUENTIAL,
    /// `MADV_PAGEOUT` (5.4): write back and drop what can be read again; loses nothing.
    PageOut = libc::MADV_PAGEOUT,
    /// `MADV_DONTNEED`: drop the pages; private ones lose their content.
    DontNeed = libc::MADV_DONTNEED,
    /// `MADV_DONTNEED_LOCKED` (5.18): the same for locked memory.
    DontNeedLocked = libc::MADV_DONTNEED_LOCKED,
    /// `MADV_DONTFORK`: children do not inherit the range.
    DontFork = libc::MADV_DONTFORK,
    /// `MADV_HUGEPAGE`
    HugePage = libc::MADV_HUGEPAGE,
    /// `MADV_NOHUGEPAGE`
    NoHugePage = libc::MADV_NOHUGEPAGE,
    /// `MADV_POPULATE_READ` (5.14): make present, as by reading.
    PopulateRead = libc::MADV_POPULATE_READ,
    /// `MADV_POPULATE_WRITE` (5.14): make present and writable.
    PopulateWrite = libc::MADV_POPULATE_WRITE,
    /// `MADV_GUARD_INSTALL` (6.13): drop, and make a touch SIGSEGV.
    GuardInstall = MADV_GUARD_INSTALL.cast_signed(),
    /// `MADV_GUARD_REMOVE` (6.13)
    GuardRemove = MADV_GUARD_REMOVE.cast_signed(),
}

/// A range of virtual memory that this process mapped; unmapped when dropped.
#[derive(Debug)]
pub struct Region {
    start: *mut u8,
    len: usize,
    /// Where children do not inherit it.
    kept: Option<Kept>,
    /// Its owner unmaps it, not this region.
    adopted: bool,
}

// SAFETY: a region is an address range; the kernel orders changes to it, and
// its bytes are reached by raw copies only.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Drop for Region {
    fn drop(&mut self) {
        if self.kept.as_ref().is_some_and(|kept| !kept.is_own()) {
            // A child of fork keeps what is there instead.
            return;
        }
        if self.adopted {
            return;
        }
        // First: a moment after it is unmapped, the range may be somebody else's.
        self.kept = None;
        // SAFETY: the range was mapped by this region's constructor and is
        // unmapped nowhere else; spans into it cannot outlive it.
        unsafe {
            libc::munmap(self.start.cast::<c_void>(), self.len);
        }
    }
}

impl Region {
    /// Private anonymous memory that is not backed until touched, aligned to
    /// `align` (a power of two), without reserving swap, and not locked, also
    /// where `mlockall(MCL_FUTURE)` locks and fills what others map.
    ///
    /// # Errors
    /// ENOMEM when there is no such address range.
    pub fn anonymous(len: usize, align: usize, access: Access) -> Result<Self, Errno> {
        let slack = align.saturating_sub(system_page_bytes());
        let total = len.checked_add(slack).ok_or(Errno::NOMEM)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: no address is given, so no mapping of anybody's is replaced.
        let start = unsafe { map(null_mut(), total, Access::None, flags, -1, 0) }?;
        let head = start.align_offset(align);
        let trim = |from: usize, bytes: usize| {
            if bytes > 0 {
                // SAFETY: a part of the mapping made above that nobody uses.
                unsafe { libc::munmap(start.wrapping_add(from).cast::<c_void>(), bytes) };
            }
        };
        trim(0, head);
        trim(head + len, total - head - len);
        let region = Self { start: start.wrapping_add(head), len, kept: None, adopted: false };
        region.unlock(0, len)?;
        if access != Access::None {
            region.protect(0, len, access)?;
        }
        Ok(region)
    }

    /// A shared mapping of the front of a file, not populated.
    ///
    /// # Errors
    /// ENODEV for a file that cannot be mapped, ENOMEM without address space.
    pub fn file(fd: BorrowedFd<'_>, len: usize, access: Access) -> Result<Self, Errno> {
        // SAFETY: no address is given, so no mapping of anybody's is replaced.
        let start = unsafe { map(null_mut(), len, access, libc::MAP_SHARED, fd.as_raw_fd(), 0) }?;
        Ok(Self { start, len, kept: None, adopted: false })
    }

    /// A range that its owner has mapped, and unmaps; aligned to system pages.
    ///
    /// # Safety
    /// The range stays mapped as long as the region is there, nobody else changes its
    /// mappings, and no Rust reference into it is made.
    ///
    /// # Errors
    /// EINVAL for a range that is not aligned, or empty.
    pub unsafe fn adopted(start: *mut u8, len: usize) -> Result<Self, Errno> {
        let page = system_page_bytes();
        if len == 0 || !start.addr().is_multiple_of(page) || !len.is_multiple_of(page) {
            return Err(Errno::INVAL);
        }
        Ok(Self { start, len, kept: None, adopted: true })
    }

    /// Keeps the range from children of `fork` (`MADV_DONTFORK`, 2.6.16), which
    /// get SIGSEGV there instead of pages that nobody would fill, and never
    /// anything else.
    ///
    /// # Errors
    /// EINVAL for a mapping that does not take it.
    pub(crate) fn keep_from_children(&mut self) -> Result<(), Errno> {
        let kept = Kept::new(self.start.cast(), self.len)?;
        self.advise(0, self.len, Advice::DontFork)?;
        self.kept = Some(kept);
        Ok(())
    }

    /// Has `resolver` resolve the faults of the range in the threads that have them: here
    /// those that are signals, and in children of fork all of them. The range is kept from
    /// children.
    ///
    /// # Panics
    /// If it is not.
    pub(crate) fn resolved_by(&self, resolver: Arc<dyn Resolve>) -> Resolving {
        let kept = self.kept.as_ref().expect("a range that is kept from children");
        Resolving::new(kept.range(), resolver)
    }

    /// Has `explainer` say why a touch of the range is SIGBUS. It has to live no longer than the
    /// range.
    ///
    /// # Errors
    /// ENOMEM when a fork cannot be prepared for.
    pub(crate) fn explained_by(&self, explainer: Arc<dyn Explain>) -> Result<Explaining, Errno> {
        handle_forks()?;
        // Where another handler of SIGBUS has to be the first, it says what it says.
        let _hint = super::signal::ensure();
        Ok(Explaining::new(self.start.cast(), self.len, explainer))
    }

    /// Whether this process made the range; a child of fork did not.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.kept.as_ref().is_none_or(Kept::is_own)
    }

    /// Whether this process can read the range: a child of fork has one that is kept from
    /// it if somebody [resolves](Self::resolved_by) its faults.
    pub(crate) fn is_here(&self) -> bool {
        self.kept.as_ref().is_none_or(|kept| kept.is_own() || kept.range().is_in_child())
    }

    /// The first address.
    #[must_use]
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// The number of bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the region has no byte; never, as the kernel maps none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of the region.
    #[must_use]
    pub fn whole(&self) -> Span<'_> {
        self.span(0, self.len)
    }

    /// `len` bytes from `offset`.
    ///
    /// # Panics
    /// If they are not within the region.
    #[must_use]
    pub fn span(&self, offset: usize, len: usize) -> Span<'_> {
        // SAFETY: the region stays mapped while it is borrowed, and nothing
        // forms references into it.
        unsafe { Span::new(self.start, self.len) }.part(offset, len)
    }

    fn address(&self, offset: usize, len: usize) -> *mut c_void {
        self.span(offset, len).start().cast()
    }

    /// Shows a file from `file_offset` at `offset`, in place of what is there
    /// (`mmap` with `MAP_FIXED`): other threads see the old or the new, never neither.
    ///
    /// # Errors
    /// ENOMEM at the limit of mappings; the old mapping may then be gone.
    pub fn map_file(
        &self,
        sharing: Sharing,
        offset: usize,
        len: usize,
        fd: BorrowedFd<'_>,
        file_offset: u64,
        access: Access,
    ) -> Result<(), Errno> {
        let (address, flags) = (self.address(offset, len), sharing as i32 | libc::MAP_FIXED);
        // SAFETY: the range lies within this region, so only its own mapping is replaced.
        unsafe { map(address, len, access, flags, fd.as_raw_fd(), file_offset) }.map(|_start| ())
    }

    /// Puts a part back to untouched anonymous memory.
    ///
    /// # Errors
    /// ENOMEM at the limit of mappings.
    pub(crate) fn map_anonymous(
        &self,
        offset: usize,
        len: usize,
        access: Access,
    ) -> Result<(), Errno> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: the range lies within this region, so only its own mapping is replaced.
        unsafe { map(self.address(offset, len), len, access, flags, -1, 0) }.map(|_start| ())
    }

    /// Moves another region's pages over a part of this one (`mremap` with
    /// `MREMAP_FIXED`); the other region is used up.
    ///
    /// # Errors
    /// ENOMEM at the limit of mappings.
    ///
    /// # Panics
    /// If the other region is kept from children, as its addresses would not be.
    pub(crate) fn move_in(&self, offset: usize, other: Region) -> Result<(), Errno> {
        assert!(other.kept.is_none(), "moved memory goes to children");
        enter(Call::Mremap)?;
        // SAFETY: the target lies within this region; the source is owned here
        // and forgotten below, as its addresses are no longer mapped.
        unsafe {
            let (from, to) = (other.start.cast(), self.address(offset, other.len));
            mremap_fixed(from, other.len, other.len, MremapFlags::MAYMOVE, to)?;
        }
        std::mem::forget(other);
        Ok(())
    }

    /// `mprotect`.
    ///
    /// # Errors
    /// ENOMEM at the limit of mappings, EACCES where the file is read-only.
    pub fn protect(&self, offset: usize, len: usize, access: Access) -> Result<(), Errno> {
        enter(Call::Mprotect)?;
        // SAFETY: the range lies within this region.
        check(unsafe { libc::mprotect(self.address(offset, len), len, access as i32) })
    }

    /// `madvise`.
    ///
    /// # Errors
    /// EINVAL for advice that this kernel does not know or the range does not
    /// take; EFAULT, EIO or ENOMEM when populating meets a page that cannot be read.
    pub(crate) fn advise(&self, offset: usize, len: usize, advice: Advice) -> Result<(), Errno> {
        enter(Call::Madvise)?;
        // SAFETY: the range lies within this region; what dropping pages does
        // to their content is the caller's wish and no memory of Rust's.
        check(unsafe { libc::madvise(self.address(offset, len), len, advice as i32) })
    }

    /// Drops pages (`MADV_DONTNEED`); those of private memory lose their content. `locked`:
    /// they are locked, or may be, and what comes in their place is locked again.
    ///
    /// # Errors
    /// As [`advise`](Self::advise). Before Linux 5.18, of locked memory also ENOMEM at the
    /// limit of mappings; the pages may be gone then, and the range is not locked.
    pub(crate) fn drop_pages(&self, offset: usize, len: usize, locked: bool) -> Result<(), Errno> {
        if !locked {
            return self.advise(offset, len, Advice::DontNeed);
        }
        match self.advise(offset, len, Advice::DontNeedLocked) {
            // Linux has the advice from 5.18 on.
            Err(Errno::INVAL) => {}
            answer => return answer,
        }
        self.unlock(offset, len)?;
        let dropped = self.advise(offset, len, Advice::DontNeed);
        let locked = self.lock_on_fault(offset, len);
        dropped.and(locked)
    }

    /// `mincore`: bit 0 of each byte says whether that system page's content is
    /// in the page cache.
    ///
    /// # Errors
    /// EAGAIN when the kernel is out of memory for the moment.
    ///
    /// # Panics
    /// If `resident` does not have one byte for each system page of the range.
    pub fn mincore(&self, offset: usize, len: usize, resident: &mut [u8]) -> Result<(), Errno> {
        assert!(resident.len() >= len.div_ceil(system_page_bytes()), "one byte a system page");
        enter(Call::Mincore)?;
        // SAFETY: the range lies within this region, and the vector is as long
        // as the kernel will write (asserted).
        check(unsafe { libc::mincore(self.address(offset, len), len, resident.as_mut_ptr()) })
    }

    /// `msync(MS_SYNC)`.
    ///
    /// # Errors
    /// EIO when the pages cannot be written.
    pub fn sync(&self, offset: usize, len: usize) -> Result<(), Errno> {
        enter(Call::Msync)?;
        // SAFETY: the range lies within this region.
        check(unsafe { libc::msync(self.address(offset, len), len, libc::MS_SYNC) })
    }

    /// Locks pages as they become present (`mlock2` with `MLOCK_ONFAULT`, 4.4).
    ///
    /// # Errors
    /// ENOMEM or EPERM beyond `RLIMIT_MEMLOCK`.
    pub(crate) fn lock_on_fault(&self, offset: usize, len: usize) -> Result<(), Errno> {
        enter(Call::Mlock)?;
        // SAFETY: the range lies within this region, which is mapped.
        check(unsafe { libc::mlock2(self.address(offset, len), len, libc::MLOCK_ONFAULT) })
    }

    /// `munlock`; nothing that is not locked changes.
    fn unlock(&self, offset: usize, len: usize) -> Result<(), Errno> {
        enter(Call::Mlock)?;
        // SAFETY: the range lies within this region, which is mapped.
        check(unsafe { libc::munlock(self.address(offset, len), len) })
    }
}

/// `mmap`, without reserving swap.
///
/// # Safety
/// What is mapped at `address` is the caller's to replace, if `flags` say so.
unsafe fn map(
    address: *mut c_void,
    len: usize,
    access: Access,
    flags: i32,
    fd: i32,
    file_offset: u64,
) -> Result<*mut u8, Errno> {
    enter(Call::Mmap)?;
    let file_offset = libc::off_t::try_from(file_offset).map_err(|_| Errno::OVERFLOW)?;
    let flags = flags | libc::MAP_NORESERVE;
    // SAFETY: as the caller promises.
    let start = unsafe { libc::mmap(address, len, access as i32, flags, fd, file_offset) };
    if start == libc::MAP_FAILED {
        return Err(last_errno());
    }
    Ok(start.cast())
}

/// Whether a system page of anonymous memory is present (`mincore`).
///
/// # Errors
/// ENOMEM where nothing is mapped.
pub(crate) fn is_present(page: Span<'_>) -> Result<bool, Errno> {
    let mut present = 0_u8;
    enter(Call::Mincore)?;
    // SAFETY: the span is mapped by its promise; one byte is written for its page.
    check(unsafe {
        libc::mincore(page.start().cast(), page.len().min(system_page_bytes()), &raw mut present)
    })?;
    Ok(present & 1 == 1)
}

/// This process, to give advice on many ranges in one call (`process_madvise`).
#[derive(Debug)]
pub struct OwnProcess(OwnedFd);

impl OwnProcess {
    /// Ranges of one call: the kernel's limit (`UIO_MAXIOV`).
    pub const MAX_RANGES: usize = 1024;

    /// This process, open once for all who ask, if the kernel lets a process give itself all
    /// advice (6.13; before, only what does not lose content).
    pub(crate) fn of_process() -> Option<Arc<Self>> {
        static SHARED: PerProcess<OwnProcess> = PerProcess::new();
        SHARED.get(Self::try_open).ok()
    }

    /// Opens this process.
    ///
    /// # Errors
    /// EINVAL from kernels that do not let it, EPERM from a filter.
    pub(crate) fn try_open() -> Result<Self, Errno> {
        let process = rustix::process::getpid();
        let fd = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty())?;
        let own = Self(fd);
        let probe = Region::anonymous(system_page_bytes(), system_page_bytes(), Access::Read)?;
        own.advise(&probe, &[(0, probe.len())], Advice::DontNeed)?;
        Ok(own)
    }

    /// Gives advice on ranges (offset, length) of `region`.
    ///
    /// # Errors
    /// As [`Region::advise`].
    pub(crate) fn advise(
        &self,
        region: &Region,
        ranges: &[(usize, usize)],
        advice: Advice,
    ) -> Result<(), Errno> {
        for batch in ranges.chunks(Self::MAX_RANGES) {
            let mut parts = Parts::default();
            for &(offset, len) in batch {
                parts.push(region.span(offset, len));
            }
            while !parts.vector().is_empty() {
                enter(Call::ProcessMadvise)?;
                let vector = parts.vector();
                // SAFETY: every range lies within `region`; the vectors are valid
                // for the call.
                let done = unsafe {
                    libc::syscall(
                        libc::SYS_process_madvise,
                        self.0.as_raw_fd(),
                        vector.as_ptr(),
                        vector.len(),
                        advice as i32,
                        0,
                    )
                };
                match usize::try_from(done).map_err(|_| last_errno())? {
                    0 => return Err(Errno::AGAIN),
                    done => parts.skip(done),
                }
            }
        }
        Ok(())
    }
}

/// `remap_file_pages(2)`, which Linux 4.0 and later emulate with one mapping a piece.
///
/// # Errors
/// The kernel's own.
pub fn remap_file_pages(
    memory: Span<'_>,
    prot: i32,
    page_offset: usize,
    flags: i32,
) -> Result<(), Errno> {
    enter(Call::RemapFilePages)?;
    // SAFETY: the call changes which pages of its own file a shared mapping
    // shows, and fails on anything else; bytes stay mapped.
    check(unsafe {
        libc::remap_file_pages(memory.start().cast(), memory.len(), prot, page_offset, flags)
    })
}
