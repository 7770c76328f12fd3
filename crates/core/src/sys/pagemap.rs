//! What the kernel says about this process in `/proc`: mappings, present pages, memory.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::{ControlFlow, Range};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use linux_raw_sys::general::{
    page_region, pm_scan_arg, PAGE_IS_FILE, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_WRITTEN,
    PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING,
};
use rustix::io::Errno;

use super::call::{enter, errno_of, last_errno, Call};
use super::mm::{system_page_bytes, Region};
use super::per_process::PerProcess;
use super::span::Span;

/// `PAGEMAP_SCAN` (Linux 6.7).
const PAGEMAP_SCAN: libc::Ioctl = 0xC060_6610;
/// Ranges that one scan reports, at most.
const SCAN_RANGES: usize = 512;

/// Bit of a `/proc/self/pagemap` entry: the page is mapped.
const PRESENT: u64 = 1 << 63;
/// The same: the page is in swap, or is just being moved to another place in memory.
const SWAPPED: u64 = 1 << 62;
/// The same: the page is of a file or of shared memory, not the process's own.
const OF_FILE: u64 = 1 << 61;
/// Pages whose entries are read at once: what one page-table page maps.
const BATCH_PAGES: usize = 512;
/// The same where a few pages are asked about, perhaps on the short stack of a signal handler.
const FEW_PAGES: usize = 64;

/// Whether the kernel has the content of a page with this entry of `/proc/self/pagemap`.
///
/// A page that the kernel is moving (compaction) is not mapped for that moment; its entry
/// says "in swap", also for pages of files, which are never in swap through a mapping.
const fn has_content(entry: u64) -> bool {
    entry & (PRESENT | SWAPPED) != 0
}

fn addresses(line: &[u8]) -> Option<Range<u64>> {
    let text = std::str::from_utf8(line.split(|&byte| byte == b' ').next()?).ok()?;
    let (start, end) = text.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

/// Counts the kernel mappings of this process that `keep` accepts.
fn count_mappings(keep: impl Fn(Range<u64>) -> bool) -> Result<u64, Errno> {
    let maps = File::open("/proc/self/maps").map_err(|error| errno_of(&error))?;
    let mut count = 0;
    for line in BufReader::with_capacity(1 << 16, maps).split(b'\n') {
        let line = line.map_err(|error| errno_of(&error))?;
        count += u64::from(addresses(&line).is_some_and(&keep));
    }
    Ok(count)
}

/// Kernel mappings of the whole process (lines of `/proc/self/maps`).
///
/// # Errors
/// ENOENT where `/proc` is not mounted.
pub(crate) fn process_mapping_count() -> Result<u64, Errno> {
    count_mappings(|_| true)
}

/// Kernel mappings that lie in `region`.
///
/// # Errors
/// ENOENT where `/proc` is not mounted.
pub(crate) fn region_mapping_count(region: &Region) -> Result<u64, Errno> {
    let start = region.start() as u64;
    let end = start + region.len() as u64;
    count_mappings(|mapping| mapping.start < end && mapping.end > start)
}

/// This process's page map.
#[derive(Debug)]
pub struct PageMap(File);

impl PageMap {
    /// Opens this process's page map.
    ///
    /// # Errors
    /// ENOENT where `/proc` is not mounted.
    pub fn open() -> Result<Self, Errno> {
        File::open("/proc/self/pagemap").map(Self).map_err(|error| errno_of(&error))
    }

    /// The same, opened once for the process.
    pub(crate) fn of_process() -> Result<Arc<Self>, Errno> {
        static SHARED: PerProcess<PageMap> = PerProcess::new();
        SHARED.get(Self::open)
    }

    /// Whether the kernel has the content of all system pages of `span`, in memory or in
    /// swap.
    ///
    /// # Errors
    /// EIO.
    pub fn has(&self, span: Span<'_>) -> Result<bool, Errno> {
        let mut all = true;
        self.entries::<FEW_PAGES>(span, |_, entry| {
            all = has_content(entry);
            if all {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        })?;
        Ok(all)
    }

    /// Adds to `present`, which has room, a bool for each system page of a span: whether the
    /// kernel has its content, in memory or in swap.
    pub(crate) fn add_present(&self, span: Span<'_>, present: &mut Vec<bool>) -> Result<(), Errno> {
        self.entries::<BATCH_PAGES>(span, |_, entry| {
            present.push(has_content(entry));
            ControlFlow::Continue(())
        })
    }

    /// `PAGEMAP_SCAN` (6.7): in memory whose writes the kernel notes
    /// (`UFFD_FEATURE_WP_ASYNC`): adds the ranges of `span` (offset, length) to `stored`
    /// that were written to since they were write-protected. `protect`: protects them
    /// in the same step, so that no write falls between.
    ///
    /// # Errors
    /// EPERM for memory whose writes are not noted, ENOTTY on older kernels.
    pub fn stores(
        &self,
        span: Span<'_>,
        protect: bool,
        stored: &mut Vec<(usize, usize)>,
    ) -> Result<(), Errno> {
        let flags = PM_SCAN_CHECK_WPASYNC | if protect { PM_SCAN_WP_MATCHING } else { 0 };
        self.scan(span, flags, PAGE_IS_WRITTEN, |offset, len| stored.push((offset, len)))
    }

    /// Tells `found` of the ranges of `span` (offset, length) in which pages of files are
    /// mapped: by `PAGEMAP_SCAN` (6.7), which steps over what has no page tables, else by
    /// reading an entry for each page.
    ///
    /// # Errors
    /// EIO; ENOMEM.
    pub fn file_pages(
        &self,
        span: Span<'_>,
        mut found: impl FnMut(usize, usize),
    ) -> Result<(), Errno> {
        // "Swapped" are pages that the kernel is moving: those of files are in no swap.
        match self.scan(span, 0, PAGE_IS_FILE, &mut found) {
            Err(Errno::NOTTY | Errno::INVAL) => {}
            result => return result,
        }
        let page = system_page_bytes();
        let mut run = 0..0;
        self.entries::<BATCH_PAGES>(span, |index, entry| {
            if entry & OF_FILE != 0 && has_content(entry) {
                if run.end != index {
                    if !run.is_empty() {
                        found(run.start * page, run.len() * page);
                    }
                    run = index..index;
                }
                run.end = index + 1;
            }
            ControlFlow::Continue(())
        })?;
        if !run.is_empty() {
            found(run.start * page, run.len() * page);
        }
        Ok(())
    }

    /// Whether the kernel has `PAGEMAP_SCAN`.
    #[must_use]
    pub fn scans(&self) -> bool {
        // Of nothing, which a kernel that has it finds at once.
        self.scan_once(0..0, 0, PAGE_IS_PRESENT, &mut []).is_ok()
    }

    /// Tells `found` of the ranges of `span` (offset, length) that have content and are of a
    /// `category`.
    fn scan(
        &self,
        span: Span<'_>,
        flags: u32,
        category: u32,
        mut found: impl FnMut(usize, usize),
    ) -> Result<(), Errno> {
        let first = span.start() as u64;
        let (mut start, end) = (first, first + span.len() as u64);
        let mut ranges = [page_region { start: 0, end: 0, categories: 0 }; SCAN_RANGES];
        while start < end {
            let (count, reached) = self.scan_once(start..end, flags, category, &mut ranges)?;
            for range in &ranges[..count] {
                found((range.start - first) as usize, (range.end - range.start) as usize);
            }
            // A kernel that does not go on would be asked forever.
            start = if reached > start { reached } else { end };
        }
        Ok(())
    }

    /// One scan: how many ranges were found, and the address up to which it came.
    fn scan_once(
        &self,
        addresses: Range<u64>,
        flags: u32,
        category: u32,
        ranges: &mut [page_region],
    ) -> Result<(usize, u64), Errno> {
        enter(Call::PagemapScan)?;
        let mut argument = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags: flags.into(),
            start: addresses.start,
            end: addresses.end,
            walk_end: 0,
            vec: ranges.as_mut_ptr() as u64,
            vec_len: ranges.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: category.into(),
            category_anyof_mask: (PAGE_IS_PRESENT | PAGE_IS_SWAPPED).into(),
            return_mask: category.into(),
        };
        // SAFETY: the kernel's structure, which outlives the call, as its vector does; of the
        // addresses no more is changed than which writes the kernel notes.
        let found = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
        let found = usize::try_from(found).map_err(|_| last_errno())?;
        Ok((found, argument.walk_end))
    }

    /// Reads the entries of the system pages of `span`, which `look` is given by their number,
    /// until it has seen enough.
    fn entries<const BATCH: usize>(
        &self,
        span: Span<'_>,
        mut look: impl FnMut(usize, u64) -> ControlFlow<()>,
    ) -> Result<(), Errno> {
        let page_count = span.len().div_ceil(system_page_bytes());
        let first = span.start() as usize / system_page_bytes();
        let mut words = [[0; 8]; BATCH];
        for start in (0..page_count).step_by(BATCH) {
            let entries = &mut words[..BATCH.min(page_count - start)];
            let offset = (first + start) as u64 * 8;
            let read = self.0.read_exact_at(entries.as_flattened_mut(), offset);
            read.map_err(|error| errno_of(&error))?;
            for (index, entry) in (start..).zip(entries) {
                if look(index, u64::from_ne_bytes(*entry)).is_break() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

/// Bytes of page tables that this process has (`VmPTE`).
///
/// # Errors
/// ENOENT where `/proc` is not mounted.
pub(crate) fn page_table_bytes() -> Result<u64, Errno> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(|error| errno_of(&error))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmPTE:"));
    let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kilobytes.map(|kilobytes| kilobytes << 10).ok_or(Errno::INVAL)
}

/// `vm.max_map_count`: the kernel mappings that a process may have.
#[must_use]
pub fn max_map_count() -> u64 {
    /// What the kernel starts with.
    const DEFAULT: u64 = 65_530;
    std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(DEFAULT)
}
