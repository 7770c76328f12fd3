//! Kernel mappings, of which a process has a limited number (`vm.max_map_count`).
//!
//! A call that will make many mappings reserves them first. If they would come too close to the
//! limit, the call fails before any change. Maps of files that only save system calls (source maps
//! of stores, and maps of rows) are counted as well ([`FileMap`]). They may take at most a quarter
//! of the limit; beyond that, the file is read instead.

use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::sys::fork_lock::ForkLock;
use crate::sys::pagemap;

/// Mappings that are left to the rest of the process.
const LEFT_TO_OTHERS: u64 = 1000;
/// So many more are had without counting, if the last count is fresh and the
/// limit is far.
const UNCOUNTED: u64 = 256;
/// Nearer to the limit than this, the process's mappings are counted again.
const RECOUNT_MARGIN: u64 = 8192;
/// How long a count is believed.
const FRESH: Duration = Duration::from_secs(1);

struct Counted {
    /// Mappings of the whole process.
    in_use: u64,
    at: Instant,
}

/// The last count, with what was reserved since. One caller at a time counts, perhaps one that
/// has a window's state, which a fork waits for: so nobody waits here for a fork to end.
static COUNTED: ForkLock<Option<Counted>> = ForkLock::new(None);
/// Maps of files, by their number in the process.
static FILE_MAPS: ForkLock<FileMaps> = ForkLock::new(FileMaps::new());

/// Fails, before any change, if `needed` more mappings would come too near to
/// the limit. Else they count as made until the next count.
///
/// # Errors
/// [`Error::MappingLimit`].
pub(crate) fn reserve(operation: &'static str, needed: u64) -> Result<()> {
    if needed == 0 {
        return Ok(());
    }
    let limit = pagemap::max_map_count();
    let fits = |in_use: u64, margin: u64| {
        in_use.saturating_add(needed).saturating_add(LEFT_TO_OTHERS + margin) <= limit
    };
    let mut last = COUNTED.lock();
    let known = last.as_ref().filter(|last| {
        needed <= UNCOUNTED && last.at.elapsed() < FRESH && fits(last.in_use, RECOUNT_MARGIN)
    });
    let (in_use, at) = match known {
        Some(last) => (last.in_use, last.at),
        None => (count(operation)?, Instant::now()),
    };
    if !fits(in_use, 0) {
        *last = Some(Counted { in_use, at });
        return Err(Error::MappingLimit { operation, needed, in_use, limit });
    }
    *last = Some(Counted { in_use: in_use + needed, at });
    Ok(())
}

/// The part of the limit that maps of files have.
const FILE_PART: u64 = 4;
/// Maps of files that are reserved together: counting the process's mappings takes 10 ms
/// where there are many.
const RESERVED_TOGETHER: u64 = 64;

/// What maps of files there are.
#[derive(Default)]
struct FileMaps {
    alive: u64,
    /// Reserved of the process's mappings.
    reserved: u64,
    refused_at: Option<Instant>,
}

impl FileMaps {
    const fn new() -> Self {
        Self { alive: 0, reserved: 0, refused_at: None }
    }

    /// Counts one more, if that may be. `limit` is the process's, and `reserve` takes so many
    /// of its mappings.
    fn claim(&mut self, limit: impl Fn() -> u64, reserve: impl Fn(u64) -> bool) -> bool {
        if self.alive < self.reserved {
            self.alive += 1;
            return true;
        }
        if self.refused_at.is_some_and(|at| at.elapsed() < FRESH) {
            return false;
        }
        let within = self.reserved + RESERVED_TOGETHER <= limit() / FILE_PART;
        if !(within && reserve(RESERVED_TOGETHER)) {
            self.refused_at = Some(Instant::now());
            return false;
        }
        self.refused_at = None;
        self.reserved += RESERVED_TOGETHER;
        self.alive += 1;
        true
    }

    fn release(&mut self) {
        // A child of fork may have lost count of its parent's.
        self.alive = self.alive.saturating_sub(1);
        // What is not used goes back, but for a batch that the next ones come from.
        self.reserved = self.reserved.min(self.alive + RESERVED_TOGETHER);
        self.refused_at = None;
    }
}

/// A mapping of a file, counted until this is dropped.
#[derive(Debug)]
pub(crate) struct FileMap(());

impl FileMap {
    /// Counts one more map of a file; none if the process should have no more.
    pub(crate) fn claim() -> Option<Self> {
        let mut maps = FILE_MAPS.lock();
        let reserve = |needed| reserve("map", needed).is_ok();
        maps.claim(pagemap::max_map_count, reserve).then(|| Self(()))
    }
}

impl Drop for FileMap {
    fn drop(&mut self) {
        FILE_MAPS.lock().release();
    }
}

fn count(operation: &'static str) -> Result<u64> {
    pagemap::process_mapping_count().map_err(|errno| Error::system(operation, errno))
}

/// The error for a change of access that failed with `errno`: where the process is at its
/// limit of mappings, ENOMEM says no more than that there was no memory.
pub(crate) fn failed(operation: &'static str, errno: Errno, needed: u64) -> Error {
    if errno == Errno::NOMEM {
        let error = refused(operation, needed);
        if let Error::MappingLimit { in_use, limit, .. } = &error {
            if in_use.saturating_add(needed).saturating_add(LEFT_TO_OTHERS) > *limit {
                return error;
            }
        }
    }
    Error::system(operation, errno)
}

/// The error for a mapping that the kernel refused although it was reserved.
pub(crate) fn refused(operation: &'static str, needed: u64) -> Error {
    let in_use = count(operation).unwrap_or(0);
    Error::MappingLimit { operation, needed, in_use, limit: pagemap::max_map_count() }
}

#[cfg(test)]
mod tests {
    use super::{FileMaps, RESERVED_TOGETHER};

    #[test]
    fn maps_of_files_have_a_quarter_of_the_limit() {
        let mut maps = FileMaps::new();
        let made = (0..1000).filter(|_| maps.claim(|| 2048, |_| true)).count();
        assert_eq!(made, 512);
        maps.release();
        assert!(maps.claim(|| 2048, |_| true));
        assert!(!maps.claim(|| 2048, |_| true));
    }

    #[test]
    fn maps_of_files_are_counted_among_the_process_s() {
        let mut maps = FileMaps::new();
        let left = std::cell::Cell::new(150);
        let reserve = |needed| {
            let fits = left.get() >= needed;
            left.set(left.get() - if fits { needed } else { 0 });
            fits
        };
        let made = (0..1000).filter(|_| maps.claim(|| 65_530, reserve)).count() as u64;
        assert_eq!(made, 2 * RESERVED_TOGETHER);
    }
}
