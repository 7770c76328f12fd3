//! Objects in shared memory that several processes write: their files, mappings and locks.

use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, FallocateFlags, CWD};
use rustix::io::Errno;

use super::call::{answered, enter, Call};
use super::clock::timespec;
use super::mm::{Access, Advice, Region};
use super::span::Span;

/// Bytes that are allocated by one call. A signal undoes all of the call it interrupts.
const ALLOCATED_BYTES: u64 = 16 << 20;

/// Gives a file without a name the name `path`, if nothing has it.
///
/// # Errors
/// EEXIST; ENOENT without `/proc`.
pub(crate) fn name_object(fd: BorrowedFd<'_>, path: &Path) -> Result<(), Errno> {
    let own = format!("/proc/self/fd/{}", fd.as_raw_fd());
    enter(Call::Open)?;
    rustix::fs::linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW)
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
    region: Region,
    fd: OwnedFd,
}

impl Mapping {
    /// Maps the first `len` bytes of an object, which has so many.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn new(fd: OwnedFd, len: usize) -> Result<Self, Errno> {
        Ok(Self { region: Region::file(fd.as_fd(), len, Access::Write)?, fd })
    }

    /// The descriptor.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The words from the front, or as many as are mapped.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the range is mapped while this is borrowed and aligned to pages; any bits are
        // a word, and an atomic may be changed by others at any time.
        unsafe {
            let count = self.region.len() / size_of::<AtomicU64>();
            std::slice::from_raw_parts(self.region.start().cast(), count)
        }
    }

    /// The first half of a word, for those that [`words`](Self::words) never touches.
    ///
    /// # Panics
    /// If it is not mapped.
    pub(crate) fn half_word(&self, at: usize) -> &AtomicU32 {
        let place = std::ptr::from_ref(&self.words()[at]).cast::<AtomicU32>();
        // SAFETY: within the mapping, which this borrows; any bits are a value.
        unsafe { &*place }
    }

    /// `len` bytes from `offset`, to be copied to and from: none of the words that are used as
    /// such.
    ///
    /// # Panics
    /// If they are not within the mapping.
    #[must_use]
    pub fn span(&self, offset: usize, len: usize) -> Span<'_> {
        self.region.span(offset, len)
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
        let _done = self.region.advise(0, len.min(self.region.len()), Advice::PopulateWrite);
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
            answered(libc::pthread_mutexattr_init(set))?;
            let shared = libc::pthread_mutexattr_setpshared(set, libc::PTHREAD_PROCESS_SHARED);
            let robust = libc::pthread_mutexattr_setrobust(set, libc::PTHREAD_MUTEX_ROBUST);
            let made = libc::pthread_mutex_init(self.mutex, set);
            libc::pthread_mutexattr_destroy(set);
            answered(shared).and(answered(robust)).and(answered(made))
        }
    }

    /// Takes the lock, within `timeout`.
    ///
    /// # Errors
    /// ETIMEDOUT; ENOTRECOVERABLE where somebody has let go of a broken one; EAGAIN.
    pub(crate) fn acquire(self, timeout: Duration) -> Result<RobustGuard<'m>, Errno> {
        // SAFETY: the mutex lies in the mapping, and was made by `begin`.
        let mut answer = unsafe { libc::pthread_mutex_trylock(self.mutex) };
        if answer == libc::EBUSY {
            if timeout.is_zero() {
                return Err(Errno::TIMEDOUT);
            }
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let until = timespec(now.saturating_add(timeout));
            // SAFETY: as above; the time outlives the call.
            answer = unsafe { libc::pthread_mutex_timedlock(self.mutex, &raw const until) };
        }
        let is_broken = answer == libc::EOWNERDEAD;
        if !is_broken {
            answered(answer)?;
        }
        Ok(RobustGuard { lock: self, is_broken })
    }
}

impl RobustGuard<'_> {
    /// Whether whoever had it has died with it: what it guards may be half changed.
    pub(crate) fn is_broken(&self) -> bool {
        self.is_broken
    }

    /// Says that what the broken lock guards is whole again.
    pub(crate) fn mend(&mut self) {
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

#[cfg(test)]
mod tests {
    use super::super::forked::dies_after;
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
