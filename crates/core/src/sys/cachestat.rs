//! How much of a file is in the page cache, if the kernel says so.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use linux_raw_sys::general::{cachestat, cachestat_range};
use rustix::fs::{Access, AtFlags};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::call::{enter, last_errno, Call};
use super::file::facts;

/// `cachestat` has this number on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;

/// How many system pages of a range the page cache has (`cachestat`, Linux 6.5).
///
/// # Errors
/// ENOSYS before 6.5; EPERM where the caller may not know (later 6.x).
pub fn cached_pages(fd: BorrowedFd<'_>, offset_bytes: u64, bytes: u64) -> Result<u64, Errno> {
    let range = cachestat_range { off: offset_bytes, len: bytes };
    let mut found = MaybeUninit::<cachestat>::uninit();
    enter(Call::Cachestat)?;
    // SAFETY: both structures are the kernel's and outlive the call, which fills the second one
    // where it does not fail.
    unsafe {
        let (range, to) = (&raw const range, found.as_mut_ptr());
        match libc::syscall(SYS_CACHESTAT, fd.as_raw_fd(), range, to, 0) {
            0 => Ok(found.assume_init().nr_cache),
            _ => Err(last_errno()),
        }
    }
}

/// Whether the kernel tells this process what the page cache holds of a file.
///
/// `mincore` does not refuse: it calls every page resident. It tells the truth
/// to the owner, to who may write the file, and to `CAP_FOWNER`; this asks the
/// same questions. `cachestat` answers EPERM on kernels that check there too.
pub(crate) fn tells_residency(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    let facts = facts(fd)?;
    if facts.owner == rustix::process::geteuid().as_raw() {
        return Ok(true);
    }
    if cached_pages(fd, 0, 1).err() == Some(Errno::PERM) {
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
