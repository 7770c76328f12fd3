//! How much of a file is in the page cache, if the kernel says so.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{Access, AtFlags};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::call::{enter, last_errno, Call};
use super::file::facts;

/// `cachestat` has this number on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct CachestatRange {
    offset_bytes: u64,
    len_bytes: u64,
}

/// What the page cache holds of a range, in system pages (`struct cachestat`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Cached {
    /// Pages there.
    pub cached: u64,
    /// Of these, changed.
    pub dirty: u64,
    /// Of these, being written.
    pub writeback: u64,
    /// Pages that were there and were dropped.
    pub evicted: u64,
    /// Of these, dropped not long ago.
    pub recently_evicted: u64,
}

/// `cachestat` (Linux 6.5).
///
/// # Errors
/// ENOSYS before 6.5; EPERM where the caller may not know (later 6.x).
pub fn cachestat(fd: BorrowedFd<'_>, offset_bytes: u64, len_bytes: u64) -> Result<Cached, Errno> {
    let range = CachestatRange { offset_bytes, len_bytes };
    let mut cached = Cached::default();
    enter(Call::Cachestat)?;
    // SAFETY: both structures are the kernel's and outlive the call.
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            fd.as_raw_fd(),
            std::ptr::from_ref(&range),
            std::ptr::from_mut(&mut cached),
            0,
        )
    };
    if result == 0 {
        Ok(cached)
    } else {
        Err(last_errno())
    }
}

/// Whether the kernel tells this process what the page cache holds of a file.
///
/// `mincore` does not refuse: it calls every page resident. It tells the truth
/// to the owner, to who may write the file, and to `CAP_FOWNER`; this asks the
/// same questions. `cachestat` answers EPERM on kernels that check there too.
///
/// # Errors
/// The kernel's own.
pub fn tells_residency(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    let facts = facts(fd)?;
    if facts.owner == rustix::process::geteuid().as_raw() {
        return Ok(true);
    }
    if cachestat(fd, 0, 1).err() == Some(Errno::PERM) {
        return Ok(false);
    }
    Ok(may_write(fd) || has_capability(CapabilitySet::FOWNER))
}

fn may_write(fd: BorrowedFd<'_>) -> bool {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::accessat(rustix::fs::CWD, path, Access::WRITE_OK, AtFlags::EACCESS).is_ok()
}

fn has_capability(wanted: CapabilitySet) -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(wanted))
}
