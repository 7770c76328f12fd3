//! Files: opening, sizes, reads and writes at an offset.
//!
//! Reads and writes retry EINTR and continue after a short count, so a short result always means
//! the end of the file.

use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{makedev, statx, AtFlags, FileType, MemfdFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use super::call::{check, enter, enter_for, last_errno, Call};
use super::clock::nanoseconds;
use super::span::Span;

/// The most that one `read` or `write` moves: the kernel stops there anyway.
const MAX_CALL_BYTES: usize = 0x7fff_f000;
/// How often EAGAIN is answered by trying again.
const AGAIN_LIMIT: usize = 16;
/// `f_type` of tmpfs, which also backs memfd and `/dev/shm`.
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// `BLKGETSIZE64` where `_IOR` is the generic one (x86, ARM, RISC-V).
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272_u32 as libc::Ioctl;

/// What a descriptor refers to.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Bytes in it now.
    pub size_bytes: u64,
    /// Regular file, device, directory, …
    pub file_type: FileType,
    /// The owner.
    pub owner: u32,
    /// Who may do what.
    pub mode: Mode,
    /// Which file it is, of all on this machine: the device and the number on it.
    pub identity: (u64, u64),
    /// When it was changed last (ctime), in nanoseconds.
    pub changed_ns: i64,
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenFlags {
    /// For reading and writing.
    pub writable: bool,
    /// Made if it is not there.
    pub create: bool,
    /// Past the page cache.
    pub direct: bool,
}

impl OpenFlags {
    fn bits(self) -> OFlags {
        let mut bits = OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        bits |= if self.writable { OFlags::RDWR } else { OFlags::RDONLY };
        if self.create {
            bits |= OFlags::CREATE;
        }
        if self.direct {
            bits |= OFlags::DIRECT;
        }
        bits
    }
}

/// `open`. `O_NONBLOCK` keeps a pipe that is opened by mistake from blocking;
/// it means nothing to files and devices.
///
/// # Errors
/// The kernel's own.
pub fn open(path: &Path, flags: OpenFlags) -> Result<OwnedFd, Errno> {
    let open_once = || {
        enter(Call::Open)?;
        rustix::fs::open(path, flags.bits(), Mode::from_raw_mode(0o666))
    };
    rustix::io::retry_on_intr(open_once)
}

/// Opens again what a descriptor shows, with an offset and flags of its own.
///
/// # Errors
/// EINVAL when the file system does not do `direct`; ENOENT without `/proc`.
pub(crate) fn reopen(fd: BorrowedFd<'_>, writable: bool, direct: bool) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    open(Path::new(&path), OpenFlags { writable, create: false, direct })
}

/// Another descriptor of the same open file.
///
/// # Errors
/// EMFILE at the limit of descriptors.
pub fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    enter(Call::Open)?;
    rustix::io::fcntl_dupfd_cloexec(fd, 0)
}

/// How the descriptor was opened.
pub(crate) fn opened_with(fd: BorrowedFd<'_>) -> Result<OFlags, Errno> {
    rustix::fs::fcntl_getfl(fd)
}

/// An anonymous file in memory (`memfd_create`, Linux 3.17).
///
/// # Errors
/// ENOMEM, EMFILE.
pub(crate) fn memory_file(name: &str) -> Result<OwnedFd, Errno> {
    enter(Call::Open)?;
    rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)
}

/// Opens a file in `/dev/shm` for reading and writing; `create` makes it and fails if it is there.
/// `O_NOFOLLOW`: where everybody may make names, a symbolic link could be anybody's.
///
/// # Errors
/// ENOENT, EEXIST, EACCES; ELOOP for a symbolic link.
pub(crate) fn open_shared(path: &Path, create: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    if create {
        flags |= OFlags::CREATE | OFlags::EXCL;
    }
    enter(Call::Open)?;
    rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
}

/// `unlink`.
///
/// # Errors
/// ENOENT, EACCES, EPERM.
pub(crate) fn unlink(path: &Path) -> Result<(), Errno> {
    enter(Call::Open)?;
    rustix::fs::unlink(path)
}

/// `fstat`, and the size of a block device, which `fstat` does not know.
///
/// # Errors
/// The kernel's own.
pub fn facts(fd: BorrowedFd<'_>) -> Result<Facts, Errno> {
    enter(Call::Stat)?;
    let stat = rustix::fs::fstat(fd)?;
    let mut facts = facts_of(&stat);
    if facts.file_type == FileType::BlockDevice {
        facts.size_bytes = device_bytes(fd)?;
    }
    Ok(facts)
}

/// What has a name now, a symbolic link itself (`lstat`).
///
/// # Errors
/// ENOENT, EACCES.
pub(crate) fn named_facts(path: &Path) -> Result<Facts, Errno> {
    enter(Call::Stat)?;
    rustix::fs::lstat(path).map(|stat| facts_of(&stat))
}

/// How often a read is made again because the file has changed meanwhile.
const CHANGED_LIMIT: usize = 16;

/// A way to read a file at an offset: how many bytes came, and what the file is afterwards.
pub type Read = fn(BorrowedFd<'_>, Span<'_>, u64) -> Result<(usize, Facts), Errno>;

/// `pread` as [`read_at`] does it, and what the file is afterwards.
pub(crate) fn read_and_look(
    fd: BorrowedFd<'_>,
    into: Span<'_>,
    offset: u64,
) -> Result<(usize, Facts), Errno> {
    let count = read_at(fd, into, offset)?;
    Ok((count, facts(fd)?))
}

/// `pread` as [`read_at`] does it, and what the file is afterwards; made again if the file
/// changed meanwhile. One that was cut and made as long again beside the read would have
/// brought zeros, and its size does not tell.
pub(crate) fn read_unchanged(
    fd: BorrowedFd<'_>,
    into: Span<'_>,
    offset: u64,
) -> Result<(usize, Facts), Errno> {
    unchanged(fd, || read_at(fd, into, offset))
}

/// The same past the page cache, of whole blocks: in one `pread`, as what would go on after a
/// short count is not aligned.
pub(crate) fn read_blocks_unchanged(
    fd: BorrowedFd<'_>,
    into: Span<'_>,
    offset: u64,
) -> Result<(usize, Facts), Errno> {
    let mut again = 0;
    unchanged(fd, || loop {
        enter(Call::Read)?;
        let offset = file_offset(offset)?;
        // SAFETY: a span is mapped and writable, and nothing refers into it.
        let read = unsafe { libc::pread(fd.as_raw_fd(), into.start().cast(), into.len(), offset) };
        match moved(read) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if again < AGAIN_LIMIT => again += 1,
            outcome => return outcome,
        }
    })
}

/// The same of what is in the page cache: waits for no device.
///
/// # Errors
/// The kernel's own; EAGAIN where some of it is not there.
pub(crate) fn read_cached_unchanged(
    fd: BorrowedFd<'_>,
    into: Span<'_>,
    offset: u64,
) -> Result<(usize, Facts), Errno> {
    unchanged(fd, || match read_cached_at(fd, into, offset)? {
        CachedRead { waits: true, .. } => Err(Errno::AGAIN),
        cached => Ok(cached.bytes),
    })
}

fn unchanged(
    fd: BorrowedFd<'_>,
    mut read: impl FnMut() -> Result<usize, Errno>,
) -> Result<(usize, Facts), Errno> {
    let mut before = facts(fd)?;
    let mut made = 0;
    loop {
        let count = read()?;
        let after = facts(fd)?;
        made += 1;
        if after.changed_ns == before.changed_ns || made == CHANGED_LIMIT {
            return Ok((count, after));
        }
        before = after;
    }
}

/// What offsets and lengths of direct reads, and the addresses that they go to, are multiples
/// of: what the kernel says (`STATX_DIOALIGN`, 6.1), or 4096, which every device takes. None
/// where the file cannot be read past the page cache.
pub(crate) fn direct_alignment(fd: BorrowedFd<'_>) -> Option<u32> {
    const ANY: u32 = 4096;
    let told = statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    let told = told.filter(|told| told.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
    let Some(told) = told else { return Some(ANY) };
    let align = told.stx_dio_offset_align.max(told.stx_dio_mem_align);
    (told.stx_dio_offset_align != 0).then_some(align)
}

/// The same for a path, which need not be opened, and when the file was made, in nanoseconds
/// (`statx`, 4.11); 0 where that is not told. The number of a file that is gone is given to
/// another one at once; its birth is not. Of a block device the size is 0.
pub(crate) fn path_facts(path: &Path) -> Result<(Facts, u64), Errno> {
    born(rustix::fs::CWD, path, AtFlags::empty(), || rustix::fs::stat(path))
}

/// The same of a file that is open.
pub(crate) fn born_facts(fd: BorrowedFd<'_>) -> Result<(Facts, u64), Errno> {
    born(fd, Path::new(""), AtFlags::EMPTY_PATH, || rustix::fs::fstat(fd))
}

fn born(
    at: BorrowedFd<'_>,
    path: &Path,
    flags: AtFlags,
    plain: impl FnOnce() -> Result<rustix::fs::Stat, Errno>,
) -> Result<(Facts, u64), Errno> {
    enter(Call::Stat)?;
    let told = match statx(at, path, flags, StatxFlags::BASIC_STATS | StatxFlags::BTIME) {
        // Older, or a filter that does not know it.
        Err(Errno::NOSYS | Errno::PERM) => return plain().map(|stat| (facts_of(&stat), 0)),
        told => told?,
    };
    let facts = Facts {
        size_bytes: told.stx_size,
        file_type: FileType::from_raw_mode(told.stx_mode.into()),
        owner: told.stx_uid,
        mode: Mode::from_raw_mode(told.stx_mode.into()),
        identity: (makedev(told.stx_dev_major, told.stx_dev_minor), told.stx_ino),
        changed_ns: nanoseconds(told.stx_ctime.tv_sec, told.stx_ctime.tv_nsec.into()),
    };
    let is_told = told.stx_mask & StatxFlags::BTIME.bits() != 0;
    let birth = nanoseconds(told.stx_btime.tv_sec, told.stx_btime.tv_nsec.into());
    Ok((facts, if is_told { u64::try_from(birth).unwrap_or(0) } else { 0 }))
}

fn facts_of(stat: &rustix::fs::Stat) -> Facts {
    Facts {
        size_bytes: u64::try_from(stat.st_size).unwrap_or(0),
        file_type: FileType::from_raw_mode(stat.st_mode),
        owner: stat.st_uid,
        mode: Mode::from_raw_mode(stat.st_mode),
        identity: (stat.st_dev, stat.st_ino),
        changed_ns: nanoseconds(stat.st_ctime, i64::try_from(stat.st_ctime_nsec).unwrap_or(0)),
    }
}

/// Bytes that are free in the file system of a path; one without a limit says `u64::MAX`.
///
/// # Errors
/// ENOENT, EACCES.
pub(crate) fn free_bytes(path: &Path) -> Result<u64, Errno> {
    rustix::fs::statvfs(path).map(|facts| free_in(&facts))
}

/// The same of an open file. May be called in a signal handler.
pub(crate) fn free_bytes_beside(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    rustix::fs::fstatvfs(fd).map(|facts| free_in(&facts))
}

fn free_in(facts: &rustix::fs::StatVfs) -> u64 {
    // A tmpfs without a size has no blocks.
    let limited = facts.f_blocks > 0;
    if limited {
        facts.f_bavail.saturating_mul(facts.f_frsize)
    } else {
        u64::MAX
    }
}

/// Where the file system of an absolute path is mounted.
///
/// # Errors
/// ENOENT, EACCES.
pub(crate) fn mount_point(path: &Path) -> Result<PathBuf, Errno> {
    let device = |path: &Path| rustix::fs::stat(path).map(|facts| facts.st_dev);
    let own = device(path)?;
    let within = path.ancestors().take_while(|path| device(path) == Ok(own)).last();
    Ok(within.unwrap_or(path).to_path_buf())
}

/// Descriptors that this process may have open (the soft `RLIMIT_NOFILE`).
pub(crate) fn descriptor_limit() -> u64 {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// A file without a name in a directory, gone once it is closed (`O_TMPFILE`, Linux 3.11).
///
/// # Errors
/// EOPNOTSUPP where the file system has none; ENOENT, EACCES.
pub(crate) fn temporary_file(directory: &std::path::Path) -> Result<OwnedFd, Errno> {
    enter(Call::Open)?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR)
}

/// Bytes of a block device. Not by `lseek`, which would move an offset that
/// the caller's descriptor shares.
fn device_bytes(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    let mut bytes = 0_u64;
    // SAFETY: this request writes one u64, to a variable that outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETSIZE64, std::ptr::from_mut(&mut bytes)) })?;
    Ok(bytes)
}

/// Whether the file lives in memory (tmpfs), so that reading it never waits for a device.
pub(crate) fn is_memory_backed(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(file_system(fd)? == TMPFS_MAGIC)
}

/// `f_type` of the file system that has a file.
fn file_system(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    enter(Call::Stat)?;
    Ok(rustix::fs::fstatfs(fd)?.f_type.cast_unsigned())
}

/// Whether `posix_fadvise(WILLNEED)` makes the file system read ahead at once. Others may take
/// it for a hint that they do not follow.
pub(crate) fn reads_when_advised(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    /// `f_type` of ext4 (and its forerunners), XFS, Btrfs and F2FS.
    const THAT_DO: [u64; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010];
    Ok(THAT_DO.contains(&file_system(fd)?))
}

/// `ftruncate`.
///
/// # Errors
/// EFBIG, ENOSPC, EINVAL for what has no size.
pub fn truncate(fd: BorrowedFd<'_>, size_bytes: u64) -> Result<(), Errno> {
    let truncate_once = || {
        enter(Call::Truncate)?;
        rustix::fs::ftruncate(fd, size_bytes)
    };
    rustix::io::retry_on_intr(truncate_once)
}

/// `fsync`.
///
/// # Errors
/// EIO, ENOSPC, EDQUOT when pages could not be written.
pub fn sync(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    enter(Call::Sync)?;
    rustix::fs::fsync(fd)
}

/// `posix_fadvise(POSIX_FADV_WILLNEED)`: starts reading into the page cache.
///
/// # Errors
/// ESPIPE, EINVAL.
pub(crate) fn advise_willneed(
    fd: BorrowedFd<'_>,
    offset_bytes: u64,
    bytes: u64,
) -> Result<(), Errno> {
    let Some(bytes) = std::num::NonZeroU64::new(bytes) else { return Ok(()) };
    enter(Call::Advise)?;
    rustix::fs::fadvise(fd, offset_bytes, Some(bytes), rustix::fs::Advice::WillNeed)
}

/// Repeats `step` (which moves bytes from position `done` on) until `len`
/// bytes are moved or it moves none.
fn continued(
    len: usize,
    mut step: impl FnMut(usize) -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    let mut done = 0;
    let mut again = 0;
    while done < len {
        match step(done) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if again < AGAIN_LIMIT => again += 1,
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}

fn moved(result: isize) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| last_errno())
}

fn file_offset(offset_bytes: u64) -> Result<libc::off_t, Errno> {
    libc::off_t::try_from(offset_bytes).map_err(|_| Errno::INVAL)
}

/// `pread` until `into` is full or the file ends; says how many bytes came.
///
/// # Errors
/// EIO; EFAULT where the kernel cannot reach `into`.
pub(crate) fn read_at(
    fd: BorrowedFd<'_>,
    into: Span<'_>,
    offset_bytes: u64,
) -> Result<usize, Errno> {
    continued(into.len(), |done| {
        let rest = into.part(done, (into.len() - done).min(MAX_CALL_BYTES));
        let offset = file_offset(offset_bytes + done as u64)?;
        enter(Call::Read)?;
        // SAFETY: a span is mapped and writable, and nothing refers into it.
        moved(unsafe { libc::pread(fd.as_raw_fd(), rest.start().cast(), rest.len(), offset) })
    })
}

/// Reads what of `into` can be read without waiting for a device (`preadv2` with `RWF_NOWAIT`,
/// 4.14): up to the end of the file, or to the first byte that is not in the page cache, which
/// the kernel begins to read.
///
/// # Errors
/// EOPNOTSUPP where the file system does not tell; as [`read_at`].
pub(crate) fn read_cached_at(
    fd: BorrowedFd<'_>,
    into: Span<'_>,
    offset_bytes: u64,
) -> Result<CachedRead, Errno> {
    let mut done = 0;
    while done < into.len() {
        let rest = into.part(done, (into.len() - done).min(MAX_CALL_BYTES));
        let offset = file_offset(offset_bytes + done as u64)?;
        enter(Call::Read)?;
        let vector = libc::iovec { iov_base: rest.start().cast(), iov_len: rest.len() };
        // SAFETY: a span is mapped and writable, and nothing refers into it. The offset is one
        // register of 64 bits, and its upper half none.
        let read = unsafe {
            let (fd, vector) = (fd.as_raw_fd(), &raw const vector);
            libc::syscall(libc::SYS_preadv2, fd, vector, 1, offset, 0, libc::RWF_NOWAIT)
        };
        match usize::try_from(read).map_err(|_| last_errno()) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(CachedRead { bytes: done, waits: true }),
            Err(errno) => return Err(errno),
        }
    }
    Ok(CachedRead { bytes: done, waits: false })
}

/// What [`read_cached_at`] has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedRead {
    /// Bytes from the front.
    pub bytes: usize,
    /// The byte behind them is in the file, but not in the page cache.
    pub waits: bool,
}

/// One `preadv`: may stop short anywhere.
///
/// # Errors
/// As [`read_at`]; EINTR.
pub(crate) fn read_parts_at(
    fd: BorrowedFd<'_>,
    parts: &Parts<'_>,
    offset_bytes: u64,
) -> Result<usize, Errno> {
    let offset = file_offset(offset_bytes)?;
    let count = i32::try_from(parts.vector.len()).map_err(|_| Errno::INVAL)?;
    enter(Call::Read)?;
    // SAFETY: every part came from a span that is mapped and writable.
    moved(unsafe { libc::preadv(fd.as_raw_fd(), parts.vector.as_ptr(), count, offset) })
}

/// One `pwritev`: may stop short anywhere.
///
/// # Errors
/// EIO, ENOSPC, EINTR, EBADF for a read-only descriptor.
pub(crate) fn write_parts_at(
    fd: BorrowedFd<'_>,
    parts: &Parts<'_>,
    offset_bytes: u64,
) -> Result<usize, Errno> {
    let offset = file_offset(offset_bytes)?;
    let bytes = parts.bytes();
    let most = enter_for(Call::Write, bytes)?;
    let front = (most < bytes).then(|| {
        let mut front = parts.clone();
        front.truncate(most);
        front
    });
    let parts = front.as_ref().unwrap_or(parts);
    let count = i32::try_from(parts.vector.len()).map_err(|_| Errno::INVAL)?;
    // SAFETY: every part came from a span that is mapped and readable.
    moved(unsafe { libc::pwritev(fd.as_raw_fd(), parts.vector.as_ptr(), count, offset) })
}

/// `pwritev` until all of `bytes` is written.
///
/// # Errors
/// EIO, ENOSPC, EBADF for a read-only descriptor.
pub(crate) fn write_at(
    fd: BorrowedFd<'_>,
    bytes: Span<'_>,
    offset_bytes: u64,
) -> Result<(), Errno> {
    continued(bytes.len(), |done| {
        let mut rest = Parts::default();
        rest.push(bytes.part(done, bytes.len() - done));
        write_parts_at(fd, &rest, offset_bytes + done as u64)
    })
    .map(|_all| ())
}

/// Where the bytes of one read go, or those of one write come from: spans one after
/// another, neighbours joined.
#[derive(Clone, Debug, Default)]
pub struct Parts<'m> {
    vector: Vec<libc::iovec>,
    owner: PhantomData<Span<'m>>,
}

// SAFETY: as for spans: address ranges, whose meaning is the same on every thread.
unsafe impl Send for Parts<'_> {}

impl<'m> Parts<'m> {
    /// Adds a span behind the others.
    pub fn push(&mut self, span: Span<'m>) {
        if let Some(last) = self.vector.last_mut() {
            if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == span.start() {
                last.iov_len += span.len();
                return;
            }
        }
        self.vector.push(libc::iovec { iov_base: span.start().cast(), iov_len: span.len() });
    }

    /// Forgets the spans and keeps the memory of the list.
    pub fn clear(&mut self) {
        self.vector.clear();
    }

    /// Bytes of all of them.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.vector.iter().map(|part| part.iov_len).sum()
    }

    /// Takes the first `bytes` away.
    pub fn skip(&mut self, bytes: usize) {
        let mut left = bytes;
        self.vector.retain_mut(|part| {
            let taken = part.iov_len.min(left);
            left -= taken;
            part.iov_base = part.iov_base.wrapping_byte_add(taken);
            part.iov_len -= taken;
            part.iov_len > 0
        });
    }

    /// Takes away all but the first `bytes`.
    pub fn truncate(&mut self, bytes: usize) {
        let mut left = bytes;
        self.vector.retain_mut(|part| {
            part.iov_len = part.iov_len.min(left);
            left -= part.iov_len;
            part.iov_len > 0
        });
    }

    /// The list as the kernel wants it.
    pub(crate) fn vector(&self) -> &[libc::iovec] {
        &self.vector
    }
}

/// The path that the kernel knows for a descriptor, for messages.
pub(crate) fn known_path(fd: BorrowedFd<'_>) -> Option<std::path::PathBuf> {
    let path = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
    path.is_absolute().then_some(path)
}
