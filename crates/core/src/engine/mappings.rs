//! Kernel mappings, of which a process has a limited number (`vm.max_map_count`).
//!
//! Who is about to make many reserves them first: what would come too near to
//! the limit is refused before any change.

use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::sys::fork_lock::ForkLock;
use crate::sys::pagemap;

/// Mappings that are left to the rest of the process.
const LEFT_TO_OTHERS: u64 = 1000;
/// So many more are had without counting, if the last count is fresh and the
/// limit is far.
const UNCOUNTED: u64 = 256;
/// Nearer to the limit than this, the process's mappings are counted anew.
const RECOUNT_MARGIN: u64 = 8192;
/// How long a count is believed.
const FRESH: Duration = Duration::from_secs(1);

struct Counted {
    /// Mappings of the whole process.
    in_use: u64,
    at: Instant,
}

/// The last count, with what was reserved since. One caller at a time counts.
static COUNTED: ForkLock<Option<Counted>> = ForkLock::new(None);

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

fn count(operation: &'static str) -> Result<u64> {
    pagemap::process_mapping_count().map_err(|errno| Error::system(operation, errno))
}

/// The error for a mapping that the kernel refused although it was reserved.
pub(crate) fn refused(operation: &'static str, needed: u64) -> Error {
    let in_use = count(operation).unwrap_or(0);
    Error::MappingLimit { operation, needed, in_use, limit: pagemap::max_map_count() }
}
