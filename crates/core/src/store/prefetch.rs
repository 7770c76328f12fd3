//! Starting reads that somebody will want later.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use rustix::io::Errno;

use super::part::File;
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

/// A stretch of a file: its number in the store, offset and length in bytes.
type Stretch = (usize, u64, u64);

impl Store {
    /// Starts reading pages into the page cache and returns without waiting
    /// (`posix_fadvise(WILLNEED)` for each run of neighbours). A hint: the
    /// kernel may drop it, and shared memory has nothing to read.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io) where the first runs are refused.
    pub fn prefetch(&self, pages: &Pages<FilePage>) -> Result<()> {
        let stretches = self.stretches(pages);
        let files: Vec<Arc<File>> =
            self.parts.all().iter().map(|part| Arc::clone(&part.file)).collect();
        if stretches.len() > INLINE_RUNS && claim(&self.prefetches) {
            let prefetches = Arc::clone(&self.prefetches);
            if spawn(files.clone(), stretches.clone(), Arc::clone(&prefetches)) {
                return Ok(());
            }
            prefetches.fetch_sub(1, Ordering::AcqRel);
        }
        advise(&files, &stretches)
            .map_err(|(part, errno)| Self::part_error("prefetch", &self.parts.all()[part], errno))
    }

    /// The pages in file order, neighbours joined, cut at the end of the file.
    fn stretches(&self, pages: &Pages<FilePage>) -> Vec<Stretch> {
        let mut sorted: Vec<u64> = pages.iter().map(|page| page.0).collect();
        sorted.sort_unstable();
        sorted.dedup();
        let mut stretches: Vec<Stretch> = Vec::new();
        for page in sorted {
            let bytes = self.expected_bytes(FilePage(page)) as u64;
            let index = self.parts.index_of(FilePage(page));
            let start = self.parts.all()[index].offset_of(FilePage(page), self.page_size());
            match stretches.last_mut() {
                Some((part, from, len))
                    if (*part, *from + *len) == (index, start) && *len + bytes <= MAX_RUN_BYTES =>
                {
                    *len += bytes;
                }
                _ if bytes > 0 => stretches.push((index, start, bytes)),
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

/// Hands the stretches to a thread of their own, which keeps the files open.
fn spawn(files: Vec<Arc<File>>, stretches: Vec<Stretch>, prefetches: Arc<AtomicU64>) -> bool {
    let thread = spawn_without_signals("fremap-prefetch", move || {
        // Nobody waits for a hint, so nobody is told that it was refused.
        let _refused = advise(&files, &stretches);
        prefetches.fetch_sub(1, Ordering::AcqRel);
    });
    thread.is_ok()
}

/// Fails with the number of the file and the kernel's answer.
fn advise(files: &[Arc<File>], stretches: &[Stretch]) -> std::result::Result<(), (usize, Errno)> {
    stretches.iter().try_for_each(|&(part, start, len)| {
        let fd = files[part].fd.as_fd();
        sys_file::advise_willneed(fd, start, len).map_err(|errno| (part, errno))
    })
}
