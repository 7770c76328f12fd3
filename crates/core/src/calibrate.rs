//! A short measurement of this machine: from which sizes on one way is cheaper than another.
//!
//! It takes tens of milliseconds. The caller keeps the result.

use std::hint::black_box;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::sys::file::{memory_file, temporary_file, write_parts_at, Parts};
use crate::sys::mm::{system_page_bytes, Access, Advice, Region, Sharing, HUGE_PAGE_BYTES};
use crate::sys::probe::check_kernel;
use crate::sys::span::Span;
use crate::sys::uffd::{Delivery, FaultScope, Stores, Uffd};

/// Numbers that depend on the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Calibration {
    /// Extents of at least so many system pages are cheaper to alias than to copy.
    pub alias_extent_pages: u64,
    /// Two runs to drop are one call if no more absent pages lie between them.
    pub evict_gap_pages: u64,
    /// System pages that are read together and then swapped in.
    pub batch_pages: u64,
}

impl Default for Calibration {
    /// What windows use on a machine that nobody measured: what common machines come to.
    fn default() -> Self {
        Self { alias_extent_pages: 32, evict_gap_pages: 512, batch_pages: 1024 }
    }
}

impl Calibration {
    /// The most system pages that are swapped in together.
    pub const MAX_BATCH_PAGES: u64 = 4096;

    /// Fails where a number is out of its limits.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub fn check(&self) -> Result<()> {
        if self.batch_pages == 0 || self.batch_pages > Self::MAX_BATCH_PAGES {
            return Err(Error::Argument(format!(
                "calibration: batch_pages is {}; it must be from 1 to {}",
                self.batch_pages,
                Self::MAX_BATCH_PAGES
            )));
        }
        Ok(())
    }
}

/// Rounds of each measurement; the fastest counts, as noise only adds.
const ROUNDS: usize = 2;
/// Pages of the memory that is measured on.
const PAGES: usize = 1024;
/// Pages of the file that is measured on: more than the processor's caches hold, as
/// what is copied is seldom there. A part of it for each round of each batch.
const FILE_PAGES: usize = 8 * PAGES;
/// Batches that are tried.
const BATCHES: [usize; 3] = [64, 512, 1024];

/// The fastest of some rounds.
fn fastest(mut round: impl FnMut() -> Result<(), Errno>) -> Result<Duration, Errno> {
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        round()?;
        best = best.min(start.elapsed());
    }
    Ok(best)
}

/// Nanoseconds for each of `count` things.
fn each(duration: Duration, count: u32) -> f64 {
    duration.as_secs_f64() * 1e9 / f64::from(count)
}

/// A count that a ratio of times comes to.
#[allow(clippy::cast_sign_loss)] // clamped to positive numbers
fn count(ratio: f64, max: u16) -> u64 {
    ratio.ceil().clamp(1.0, f64::from(max)) as u64
}

/// Memory that is present, of huge pages or of small ones.
fn present_memory(pages: usize, huge: bool) -> Result<Region, Errno> {
    let region = Region::anonymous(pages * system_page_bytes(), HUGE_PAGE_BYTES, Access::Write)?;
    // A kernel without huge pages refuses the advice and has none.
    let advice = if huge { Advice::HugePage } else { Advice::NoHugePage };
    let _advised = region.advise(0, region.len(), advice);
    region.span(0, region.len()).clear();
    Ok(region)
}

/// Absent pages over which one `MADV_DONTNEED` costs as much as a second call.
fn evict_gap_pages() -> Result<u64, Errno> {
    const CALLS: u32 = 256;
    /// Absent pages of a block whose page table is there.
    const ABSENT: u32 = 255;
    let page = system_page_bytes();
    let region = present_memory(PAGES / 2, false)?;
    let long = (ABSENT as usize + 1) * page;
    // The pages behind stay present, so that the page table does.
    region.advise(0, long, Advice::DontNeed)?;
    let drop_pages = |len: usize| {
        fastest(|| (0..CALLS).try_for_each(|_| region.advise(0, len, Advice::DontNeed)))
    };
    let call = each(drop_pages(page)?, CALLS);
    let absent = (each(drop_pages(long)?, CALLS) - call) / f64::from(ABSENT);
    Ok(count(call / absent.max(0.1), 512))
}

/// Time a page of copying into staging memory and swapping with a window, in
/// batches of `batch` pages, as engine `paged` does it.
fn copying_ns(
    uffd: &Uffd,
    source: &Region,
    parts: &mut impl Iterator<Item = usize>,
    batch: usize,
) -> Result<f64, Errno> {
    let page = system_page_bytes();
    let huge = (batch * page).is_multiple_of(HUGE_PAGE_BYTES);
    let window = present_memory(PAGES, huge)?;
    let staging = present_memory(PAGES, huge)?;
    let spare = Region::anonymous(PAGES * page, HUGE_PAGE_BYTES, Access::Write)?;
    uffd.register_missing(window.whole())?;
    uffd.register_move_target(spare.whole())?;
    uffd.register_move_target(staging.whole())?;
    let swap = || {
        let part = parts.next().unwrap_or(0) * PAGES * page;
        for first in (0..PAGES).step_by(batch) {
            let (offset, len) = (first * page, batch * page);
            let (window, spare) = (window.span(offset, len), spare.span(offset, len));
            let staging = staging.span(offset, len);
            staging.copy_span(source.span(part + offset, len));
            for (to, from) in [(spare, window), (window, staging), (staging, spare)] {
                uffd.move_present_pages(to, from).map_err(|partial| partial.errno)?;
            }
        }
        Ok(())
    };
    Ok(each(fastest(swap)?, PAGES as u32))
}

/// The time a page of the fastest batch, and the smallest that is within a
/// twentieth of it.
fn copying(source: &Region) -> Result<(f64, u64), Errno> {
    let uffd = Uffd::open(Stores::Fault, Delivery::Message, FaultScope::UserOnly)?;
    if !uffd.features().swap() {
        return Err(Errno::OPNOTSUPP);
    }
    let mut times = Vec::with_capacity(BATCHES.len());
    let mut parts = (0..FILE_PAGES / PAGES).cycle();
    for batch in BATCHES {
        times.push(copying_ns(&uffd, source, &mut parts, batch)?);
    }
    let best = times.iter().copied().fold(f64::INFINITY, f64::min);
    let chosen = times.iter().position(|&time| time <= best * 1.05).unwrap_or(0);
    Ok((best, BATCHES[chosen] as u64))
}

/// Pages from which on an extent is cheaper to alias than to copy, if `copy_ns`
/// is the price of copying one.
fn alias_extent_pages(file: impl AsFd, copy_ns: f64) -> Result<u64, Errno> {
    // Huge folios are mapped whole: what a long extent costs, which the price of a
    // mapping has to be weighed against.
    const EXTENT: usize = 512;
    let page = system_page_bytes();
    let window = Region::anonymous(PAGES * page, HUGE_PAGE_BYTES, Access::None)?;
    let map = |first: usize, from: usize, count: usize| {
        let len = count * page;
        let (start, offset) = (first * page, (from * page) as u64);
        window.map_file(Sharing::Shared, start, len, file.as_fd(), offset, Access::Read)?;
        window.advise(start, len, Advice::PopulateRead)
    };
    // Backwards, so that no two pages join into one mapping.
    let single = fastest(|| (0..64).try_for_each(|index| map(index, PAGES - 1 - index, 1)))?;
    let long = fastest(|| {
        (0..PAGES / EXTENT)
            .try_for_each(|index| map(index * EXTENT, PAGES - (index + 1) * EXTENT, EXTENT))
    })?;
    let call = each(single, 64);
    let page_ns = each(long, PAGES as u32);
    if copy_ns <= page_ns {
        return Ok(u64::from(u16::MAX));
    }
    Ok(count(call / (copy_ns - page_ns), u16::MAX))
}

/// Measures this machine.
///
/// # Errors
/// Where memory for it cannot be had, or the kernel is too old for windows. What else it
/// does not have keeps its default.
pub fn measure() -> Result<Calibration> {
    let fail = |errno| Error::system("calibrate", errno);
    check_kernel("calibrate")?;
    let evict_gap_pages = evict_gap_pages().map_err(fail)?;
    let mut calibration = Calibration { evict_gap_pages, ..Calibration::default() };
    let bytes = FILE_PAGES * system_page_bytes();
    // Files have larger folios than shared memory, which are far cheaper to map.
    let file = temporary_file(Path::new("/var/tmp"))
        .or_else(|_| temporary_file(&std::env::temp_dir()))
        .or_else(|_| memory_file("fremap-calibration"))
        .map_err(fail)?;
    let mut content = vec![1; bytes];
    let mut parts = Parts::default();
    parts.push(Span::of(&mut content));
    if write_parts_at(file.as_fd(), &parts, 0).map_err(fail)? < bytes {
        return Err(fail(Errno::NOSPC));
    }
    let source = Region::file(file.as_fd(), bytes, Access::Read).map_err(fail)?;
    source.advise(0, bytes, Advice::PopulateRead).map_err(fail)?;
    black_box(source.span(0, 1).to_vec());
    if let Ok((copy_ns, batch_pages)) = copying(&source) {
        calibration.batch_pages = batch_pages;
        calibration.alias_extent_pages = alias_extent_pages(&file, copy_ns).map_err(fail)?;
    }
    Ok(calibration)
}
