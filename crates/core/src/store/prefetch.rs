//! Starting reads that somebody will want later.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use rustix::io::Errno;

use super::Store;
use crate::error::Result;
use crate::sys::file as sys_file;
use crate::sys::thread::spawn_without_signals;
use crate::units::{FilePage, Pages};

/// Runs that are started by the caller; each is a system call of 1 to 20 µs.
const INLINE_RUNS: usize = 32;
/// Background threads that a store's prefetches may have at once.
const MAX_THREADS: u64 = 4;
/// Bytes asked for in one call: the kernel cuts what one call may start.
const MAX_RUN_BYTES: u64 = 2 << 20;

/// A stretch of the file: offset and length in bytes.
type Stretch = (u64, u64);

impl Store {
    /// Starts reading pages into the page cache and returns without waiting
    /// (`posix_fadvise(WILLNEED)` for each run of neighbours). A hint: the
    /// kernel may drop it, and shared memory has nothing to read.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io) where the first runs are refused.
    pub fn prefetch(&self, pages: &Pages<FilePage>) -> Result<()> {
        let stretches = self.stretches(pages);
        let fail = |errno| self.io_error("prefetch", None, errno);
        if stretches.len() > INLINE_RUNS && claim(&self.prefetches) {
            let prefetches = Arc::clone(&self.prefetches);
            let fd = sys_file::duplicate(self.fd());
            let started = fd.is_ok_and(|fd| spawn(fd, stretches.clone(), Arc::clone(&prefetches)));
            if started {
                return Ok(());
            }
            prefetches.fetch_sub(1, Ordering::AcqRel);
        }
        advise(self.fd(), &stretches).map_err(fail)
    }

    /// The pages in file order, neighbours joined, cut at the end of the file.
    fn stretches(&self, pages: &Pages<FilePage>) -> Vec<Stretch> {
        let mut sorted: Vec<u64> = pages.iter().map(|page| page.0).collect();
        sorted.sort_unstable();
        sorted.dedup();
        let mut stretches: Vec<Stretch> = Vec::new();
        for page in sorted {
            let bytes = self.expected_bytes(FilePage(page)) as u64;
            let start = self.page_size().bytes_of(page);
            match stretches.last_mut() {
                Some((from, len)) if *from + *len == start && *len + bytes <= MAX_RUN_BYTES => {
                    *len += bytes;
                }
                _ if bytes > 0 => stretches.push((start, bytes)),
                _ => {}
            }
        }
        stretches
    }
}

fn claim(prefetches: &AtomicU64) -> bool {
    let more = |running| (running < MAX_THREADS).then_some(running + 1);
    prefetches.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok()
}

/// Hands the stretches to a thread of their own, which owns its descriptor.
fn spawn(fd: OwnedFd, stretches: Vec<Stretch>, prefetches: Arc<AtomicU64>) -> bool {
    let thread = spawn_without_signals("fremap-prefetch", move || {
        // Nobody waits for a hint, so nobody is told that it was refused.
        let _refused = advise(fd.as_fd(), &stretches);
        prefetches.fetch_sub(1, Ordering::AcqRel);
    });
    thread.is_ok()
}

fn advise(fd: BorrowedFd<'_>, stretches: &[Stretch]) -> std::result::Result<(), Errno> {
    stretches.iter().try_for_each(|&(start, len)| sys_file::advise_willneed(fd, start, len))
}
