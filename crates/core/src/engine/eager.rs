//! Engine `eager`: plain anonymous memory that `remap` and `populate` load.
//!
//! It needs no kernel feature that a container refuses, and serves no faults: a page that was not
//! loaded is not accessible (SIGSEGV). With guard pages (Linux 6.13), such holes cost no mapping,
//! but eight bytes of page tables a page; before, each run of them is a mapping. New content is
//! copied over the old, so the caller must keep readers out meanwhile.
//!
//! The kernel does not report writes to plain memory. So a writable window keeps the hash of each
//! page as it was loaded (16 bytes), and hashes the present pages again when it is asked what has
//! changed: a quarter of a microsecond a page.

use std::sync::Arc;

use rustix::io::Errno;

use super::cached::{Before, Cached, Filled, Frames, Tracking, Userfault};
use super::{advise_ranges, mappings, memory_hint, FaultMode};
use crate::calibrate::Calibration;
use crate::error::{Error, Result};
use crate::memory;
use crate::store::Store;
use crate::sys::mm::{system_page_bytes, Access, Advice, OwnProcess, Region};
use crate::sys::span::Span;
use crate::sys::uffd::Partial;
use crate::table::Table;

/// The window's memory.
#[derive(Debug)]
pub struct EagerFrames {
    region: Region,
    process: Option<Arc<OwnProcess>>,
    /// Holes are guard pages; else they are mappings without access.
    guards: bool,
    locked: bool,
    writable: bool,
}

impl EagerFrames {
    fn new(bytes: usize, align: usize, locked: bool, writable: bool) -> Result<Self, Errno> {
        let region = Region::anonymous(bytes, align, Access::Write)?;
        // Locked memory takes no guard pages.
        let guards = !locked && region.advise(0, bytes, Advice::GuardInstall).is_ok();
        if !guards {
            region.protect(0, bytes, Access::None)?;
        }
        if locked {
            region.lock_on_fault(0, bytes)?;
        }
        Ok(Self { region, process: OwnProcess::of_process(), guards, locked, writable })
    }

    fn open(&self, offset: usize, len: usize) -> Result<(), Errno> {
        if self.guards {
            self.region.advise(offset, len, Advice::GuardRemove)
        } else {
            self.region.protect(offset, len, Access::Write)
        }
    }
}

impl Frames for EagerFrames {
    fn region(&self) -> &Region {
        &self.region
    }

    fn locked(&self) -> bool {
        self.locked
    }

    fn tracking(&self) -> Option<Tracking> {
        self.writable.then_some(Tracking::Content)
    }

    fn userfault(&self) -> Option<&dyn Userfault> {
        None
    }

    fn fill(
        &self,
        offset: usize,
        from: Span<'_>,
        _spare: Option<Span<'_>>,
        _before: Before,
        _track: bool,
    ) -> Result<Filled, Partial> {
        let stopped = |errno| Partial { done_bytes: 0, errno };
        self.open(offset, from.len()).map_err(stopped)?;
        self.region.span(offset, from.len()).copy_span(from);
        Ok(Filled::Copied)
    }

    fn drop_pages(&self, ranges: &[(usize, usize)]) -> Result<(), Errno> {
        self.deny(ranges)
    }

    fn deny(&self, ranges: &[(usize, usize)]) -> Result<(), Errno> {
        if self.guards {
            let (process, advice) = (self.process.as_deref(), Advice::GuardInstall);
            let each = |offset, len| self.region.advise(offset, len, advice);
            return advise_ranges(process, &self.region, ranges, advice, each);
        }
        // Each range can become a mapping of its own, and split another.
        mappings::reserve("evict", 2 * ranges.len() as u64).map_err(|_| Errno::NOMEM)?;
        ranges.iter().try_for_each(|&(offset, len)| {
            // First: nobody may see the zeros. A page that stays without access because
            // the second step fails is a hole, as the table has it by then.
            self.region.protect(offset, len, Access::None)?;
            self.region.drop_pages(offset, len, self.locked)
        })
    }

    fn allow(&self, _ranges: &[(usize, usize)]) -> Result<(), Errno> {
        // A page that may be touched and is absent is a hole all the same.
        Ok(())
    }
}

/// Fails for a window whose holes alone would take much of the memory there is: each
/// guard page is an entry of a page table, also where nothing is ever touched.
fn check_page_tables(window_bytes: u64) -> Result<()> {
    /// The part of the available memory that holes may take.
    const PART: u64 = 8;
    let wanted = window_bytes / system_page_bytes() as u64 * size_of::<u64>() as u64;
    let available = memory::available().map_err(|errno| Error::system("Window", errno))?;
    if wanted > available / PART {
        let reason = format!(
            "takes page tables for all of its pages from the start: {wanted} bytes for this window, \
             which is more than an eighth of the {available} that are available; use fewer pages, \
             or engine=\"paged\" or \"alias\""
        );
        return Err(Error::unsupported("Window", "eager", &reason));
    }
    Ok(())
}

/// A window that is to show what `table` says, none of it loaded yet.
pub fn open(
    store: Arc<Store>,
    table: Table,
    locked: bool,
    writable: bool,
    calibration: &Calibration,
) -> Result<Cached<EagerFrames>> {
    let page = store.page_size();
    let bytes = page.bytes_of(table.page_count()) as usize;
    check_page_tables(bytes as u64)?;
    let frames = EagerFrames::new(bytes, page.bytes(), locked, writable)
        .map_err(|errno| Error::system_with_hint("Window", errno, memory_hint(locked)))?;
    Cached::new(store, frames, table, None, FaultMode::Thread, calibration)
}
