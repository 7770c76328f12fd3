//! Objects in shared memory that several processes write: their files, mappings and locks.

use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, CWD};
use rustix::io::Errno;

use super::call::{enter, last_errno, Call};
use super::span::Span;

/// Bytes that are allocated by one call. A signal undoes all of the call it interrupts.
const ALLOCATED_BYTES: u64 = 16 << 20;

/// Facts about an object's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectFacts {
    /// An ordinary file.
    pub is_file: bool,
    /// Its owner.
    pub owner: u32,
    /// Other users than its owner may open it.
    pub open_to_others: bool,
    /// Bytes.
    pub size_bytes: u64,
    /// Which file it is, of all on this machine.
    pub identity: (u64, u64),
}

fn facts_of(stat: &rustix::fs::Stat) -> ObjectFacts {
    ObjectFacts {
        is_file: FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile,
        owner: stat.st_uid,
        open_to_others: stat.st_mode & 0o077 != 0,
        size_bytes: u64::try_from(stat.st_size).unwrap_or(0),
        identity: (stat.st_dev, stat.st_ino),
    }
}

/// Opens an object for reading and writing. `O_NOFOLLOW`: where everybody may make names, a
/// symbolic link could be anybody's.
///
/// # Errors
/// ENOENT, EACCES; ELOOP for a symbolic link.
pub fn open_object(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    enter(Call::Open)?;
    rustix::fs::open(path, flags, Mode::empty())
}

/// `fstat`.
///
/// # Errors
/// The kernel's own.
pub fn object_facts(fd: BorrowedFd<'_>) -> Result<ObjectFacts, Errno> {
    enter(Call::Stat)?;
    rustix::fs::fstat(fd).map(|stat| facts_of(&stat))
}

/// The same for whatever has a name now, a symbolic link itself.
///
/// # Errors
/// ENOENT, EACCES.
pub fn named_facts(path: &Path) -> Result<ObjectFacts, Errno> {
    enter(Call::Stat)?;
    rustix::fs::lstat(path).map(|stat| facts_of(&stat))
}

/// Gives a file without a name the name `path`, if nothing has it.
///
/// # Errors
/// EEXIST; ENOENT without `/proc`.
pub fn name_object(fd: BorrowedFd<'_>, path: &Path) -> Result<(), Errno> {
    let own = format!("/proc/self/fd/{}", fd.as_raw_fd());
    enter(Call::Open)?;
    rustix::fs::linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW)
}

/// `unlink`.
///
/// # Errors
/// ENOENT, EACCES, EPERM.
pub fn unlink(path: &Path) -> Result<(), Errno> {
    enter(Call::Open)?;
    rustix::fs::unlink(path)
}

/// Allocates the memory of a part of an object (`fallocate`), so that no touch of it can fail.
///
/// # Errors
/// ENOSPC, ENOMEM.
pub fn allocate(fd: BorrowedFd<'_>, offset: u64, bytes: u64) -> Result<(), Errno> {
    let mut done = 0;
    while done < bytes {
        let part = ALLOCATED_BYTES.min(bytes - done);
        enter(Call::Allocate)?;
        match rustix::fs::fallocate(fd, FallocateFlags::empty(), offset + done, part) {
            Ok(()) => done += part,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Gives the memory of a part of an object back; it is zeros afterwards.
///
/// # Errors
/// The kernel's own.
pub fn free(fd: BorrowedFd<'_>, offset: u64, bytes: u64) -> Result<(), Errno> {
    enter(Call::Allocate)?;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::io::retry_on_intr(|| rustix::fs::fallocate(fd, flags, offset, bytes))
}

/// An object, mapped to be read and written, and shared with children of fork.
///
/// What lies in it is reached as atomic words, as raw bytes, or as a lock; which of the three
/// a part is, is up to the caller and the same for as long as anybody maps the object.
#[derive(Debug)]
pub struct Mapping {
    start: *mut u8,
    len: usize,
    fd: OwnedFd,
}

// SAFETY: an address range; its content is reached by atomics, raw copies and a lock that is
// made for several processes.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of an object, which has so many.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn new(fd: OwnedFd, len: usize) -> Result<Self, Errno> {
        enter(Call::Mmap)?;
        // SAFETY: no address is given, so no mapping of anybody's is replaced.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(last_errno());
        }
        Ok(Self { start: start.cast(), len, fd })
    }

    /// The descriptor.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The words from the front, or as many as are mapped.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the range is mapped while this is borrowed and aligned to pages; any bits are
        // a word, and an atomic may be changed by others at any time.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.len / size_of::<AtomicU64>()) }
    }

    /// The first half of a word, for those that [`words`](Self::words) never touches.
    ///
    /// # Panics
    /// If it is not mapped.
    #[must_use]
    pub fn half_word(&self, at: usize) -> &AtomicU32 {
        let place = std::ptr::from_ref(&self.words()[at]).cast::<AtomicU32>();
        // SAFETY: within the mapping, which this borrows; any bits are a value.
        unsafe { &*place }
    }

    /// `len` bytes from `offset`, to be copied to and from.
    ///
    /// # Panics
    /// If they are not within the mapping.
    #[must_use]
    pub fn span(&self, offset: usize, len: usize) -> Span<'_> {
        // SAFETY: the range is mapped while this is borrowed. The words that `words` refers to
        // are atomics, and the caller keeps the two apart.
        unsafe { Span::new(self.start, self.len) }.part(offset, len)
    }

    /// The lock at `offset`, which [`RobustLock::begin`] has made there.
    ///
    /// # Panics
    /// If it would not lie within the mapping.
    #[must_use]
    pub fn lock(&self, offset: usize) -> RobustLock<'_> {
        let place = self.span(offset, RobustLock::BYTES);
        assert!(offset.is_multiple_of(align_of::<libc::pthread_mutex_t>()), "not aligned");
        RobustLock { mutex: place.start().cast(), mapping: PhantomData }
    }

    /// Makes the page tables of the first `len` bytes ahead, so that touches of them do not
    /// fault while a lock is held. The memory is there; where the kernel cannot (before Linux
    /// 5.14), they do.
    pub fn populate(&self, len: usize) {
        const MADV_POPULATE_WRITE: i32 = 23;
        // SAFETY: the range is mapped, and its content stays.
        let _done =
            unsafe { libc::madvise(self.start.cast(), len.min(self.len), MADV_POPULATE_WRITE) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` and unmapped nowhere else; borrows of it have ended.
        unsafe {
            libc::munmap(self.start.cast(), self.len);
        }
    }
}

/// A lock of several processes, which the kernel takes back from one that dies (a robust mutex
/// of POSIX, by the kernel's list of robust futexes).
#[derive(Debug)]
pub struct RobustLock<'m> {
    mutex: *mut libc::pthread_mutex_t,
    mapping: PhantomData<&'m Mapping>,
}

/// A lock that this thread has; dropped, it is let go of.
#[derive(Debug)]
pub struct RobustGuard<'m> {
    lock: RobustLock<'m>,
    is_broken: bool,
}

fn checked(answer: i32) -> Result<(), Errno> {
    if answer == 0 {
        Ok(())
    } else {
        Err(Errno::from_raw_os_error(answer))
    }
}

impl<'m> RobustLock<'m> {
    /// What it takes of the object.
    pub const BYTES: usize = size_of::<libc::pthread_mutex_t>();
    /// C libraries lay it out differently: the same number for those that agree.
    pub const LAYOUT: u64 = (cfg!(target_env = "musl") as u64) << 32 | Self::BYTES as u64;

    /// Makes a free lock, where nobody uses one yet.
    ///
    /// # Errors
    /// ENOTSUP.
    pub fn begin(&self) -> Result<(), Errno> {
        // SAFETY: zeros are room for attributes, which `init` makes valid.
        let mut attributes = unsafe { std::mem::zeroed::<libc::pthread_mutexattr_t>() };
        let set = &raw mut attributes;
        // SAFETY: the attributes live until they are destroyed; the mutex lies in the mapping,
        // and the caller vouches that nobody uses it.
        unsafe {
            checked(libc::pthread_mutexattr_init(set))?;
            let shared = libc::pthread_mutexattr_setpshared(set, libc::PTHREAD_PROCESS_SHARED);
            let robust = libc::pthread_mutexattr_setrobust(set, libc::PTHREAD_MUTEX_ROBUST);
            let made = libc::pthread_mutex_init(self.mutex, set);
            libc::pthread_mutexattr_destroy(set);
            checked(shared).and(checked(robust)).and(checked(made))
        }
    }

    /// Takes the lock, within `timeout`.
    ///
    /// # Errors
    /// ETIMEDOUT; ENOTRECOVERABLE where somebody has let go of a broken one; EAGAIN.
    pub fn acquire(self, timeout: Duration) -> Result<RobustGuard<'m>, Errno> {
        // SAFETY: the mutex lies in the mapping, and was made by `begin`.
        let mut answer = unsafe { libc::pthread_mutex_trylock(self.mutex) };
        if answer == libc::EBUSY {
            if timeout.is_zero() {
                return Err(Errno::TIMEDOUT);
            }
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let until = now.saturating_add(timeout);
            let until = libc::timespec {
                tv_sec: libc::time_t::try_from(until.as_secs()).unwrap_or(libc::time_t::MAX),
                tv_nsec: until.subsec_nanos().into(),
            };
            // SAFETY: as above; the time outlives the call.
            answer = unsafe { libc::pthread_mutex_timedlock(self.mutex, &raw const until) };
        }
        let is_broken = answer == libc::EOWNERDEAD;
        if !is_broken {
            checked(answer)?;
        }
        Ok(RobustGuard { lock: self, is_broken })
    }
}

impl RobustGuard<'_> {
    /// Whether whoever had it has died with it: what it guards may be half changed.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.is_broken
    }

    /// Says that what the broken lock guards is whole again.
    pub fn mend(&mut self) {
        // SAFETY: the mutex lies in the mapping, and this thread has it; refused if it is not
        // broken.
        let _mended = unsafe { libc::pthread_mutex_consistent(self.lock.mutex) };
        self.is_broken = false;
    }
}

impl Drop for RobustGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: as above; refused if the lock is not this thread's.
        let _released = unsafe { libc::pthread_mutex_unlock(self.lock.mutex) };
    }
}

/// Runs `body` in a child of fork that then ends at once, as if it were killed there.
#[cfg(test)]
pub(crate) fn dies_after(body: impl FnOnce()) {
    // SAFETY: the child does what `body` does, and ends without running anything else; its
    // alarm ends it should it hang.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::alarm(10);
            // A panic that ended only this thread would count as an end like any other.
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            libc::_exit(i32::from(outcome.is_err()));
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        assert_eq!(status, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::file::{memory_file, truncate};

    fn mapping() -> Mapping {
        let fd = memory_file("test").unwrap();
        truncate(fd.as_fd(), 4096).unwrap();
        Mapping::new(fd, 4096).unwrap()
    }

    #[test]
    fn a_lock_is_taken_back_from_a_process_that_dies() {
        let mapping = mapping();
        mapping.lock(64).begin().unwrap();
        let (soon, moment) = (Duration::from_secs(10), Duration::from_millis(1));
        let taken = |timeout| mapping.lock(64).acquire(timeout);
        let dies_with_it = |was_broken| {
            dies_after(|| {
                let guard = taken(soon).unwrap();
                assert_eq!(guard.is_broken(), was_broken);
                std::mem::forget(guard);
            });
        };
        let guard = taken(soon).unwrap();
        assert!(!guard.is_broken());
        dies_after(|| assert_eq!(taken(moment).unwrap_err(), Errno::TIMEDOUT));
        drop(guard);
        dies_with_it(false);
        // Whoever mends it may die as well.
        dies_with_it(true);
        let mut guard = taken(soon).unwrap();
        assert!(guard.is_broken());
        guard.mend();
        drop(guard);
        assert!(!taken(soon).unwrap().is_broken());
    }
}
