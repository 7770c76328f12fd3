//! What the kernel says about this process in `/proc`: mappings, present pages, memory.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::io::Errno;

use super::call::{enter, last_errno, Call};
use super::mm::{system_page_bytes, Region};
use super::per_process::PerProcess;
use super::span::Span;

/// `PAGEMAP_SCAN` (Linux 6.7).
const PAGEMAP_SCAN: libc::Ioctl = 0xC060_6610;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// Entries that are read at once to see that all are there.
const MOST_ENTRIES: usize = 64;
/// Ranges that one scan reports, at most.
const SCAN_RANGES: usize = 512;

/// Bit of a `/proc/self/pagemap` entry: the page is mapped.
const PRESENT: u64 = 1 << 63;
/// The same: the page is in swap, or is just being moved to another place in memory.
const SWAPPED: u64 = 1 << 62;
/// The same: the page is of a file or of shared memory, not the process's own.
const OF_FILE: u64 = 1 << 61;
/// Pages whose entries are read at once.
const BATCH_PAGES: usize = 65_536;

/// Whether the kernel has the content of a page with this entry of `/proc/self/pagemap`.
///
/// A page that the kernel is moving (compaction) is not mapped for that moment; its entry
/// says "in swap", also for pages of files, which are never in swap through a mapping.
const fn has_content(entry: u64) -> bool {
    entry & (PRESENT | SWAPPED) != 0
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

fn addresses(line: &[u8]) -> Option<Range<u64>> {
    let text = std::str::from_utf8(line.split(|&byte| byte == b' ').next()?).ok()?;
    let (start, end) = text.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

/// Counts the kernel mappings of this process that `keep` accepts.
fn count_mappings(keep: impl Fn(Range<u64>) -> bool) -> Result<u64, Errno> {
    let maps = File::open("/proc/self/maps").map_err(|error| errno(&error))?;
    let mut count = 0;
    for line in BufReader::with_capacity(1 << 16, maps).split(b'\n') {
        let line = line.map_err(|error| errno(&error))?;
        count += u64::from(addresses(&line).is_some_and(&keep));
    }
    Ok(count)
}

/// Kernel mappings of the whole process (lines of `/proc/self/maps`).
///
/// # Errors
/// ENOENT where `/proc` is not mounted.
pub fn process_mapping_count() -> Result<u64, Errno> {
    count_mappings(|_| true)
}

/// Kernel mappings that lie in `region`.
///
/// # Errors
/// ENOENT where `/proc` is not mounted.
pub fn region_mapping_count(region: &Region) -> Result<u64, Errno> {
    let start = region.start() as u64;
    let end = start + region.len() as u64;
    count_mappings(|mapping| mapping.start < end && mapping.end > start)
}

/// `struct pm_scan_arg`
#[repr(C)]
#[derive(Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
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
        File::open("/proc/self/pagemap").map(Self).map_err(|error| errno(&error))
    }

    /// The same, opened once for the process.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn of_process() -> Result<Arc<Self>, Errno> {
        static SHARED: PerProcess<PageMap> = PerProcess::new();
        SHARED.get(Self::open)
    }

    /// Whether the kernel has the content of all system pages of `span`, in memory or in
    /// swap.
    ///
    /// # Errors
    /// EIO.
    pub fn has(&self, span: Span<'_>) -> Result<bool, Errno> {
        let mut bytes = [0; MOST_ENTRIES * 8];
        for start in (0..span.len()).step_by(MOST_ENTRIES * system_page_bytes()) {
            let count = (span.len() - start).div_ceil(system_page_bytes()).min(MOST_ENTRIES);
            let first = (span.start() as usize + start) / system_page_bytes();
            let bytes = &mut bytes[..count * 8];
            self.0.read_exact_at(bytes, first as u64 * 8).map_err(|error| errno(&error))?;
            let (entries, _) = bytes.as_chunks::<8>();
            if !entries.iter().all(|entry| has_content(u64::from_ne_bytes(*entry))) {
                return Ok(false);
            }
        }
        Ok(true)
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
        let first = span.start() as u64;
        let end = first + span.len() as u64;
        let mut ranges = [PageRegion::default(); SCAN_RANGES];
        let mut start = first;
        while start < end {
            enter(Call::PagemapScan)?;
            let mut argument = ScanArgument {
                size: size_of::<ScanArgument>() as u64,
                flags: PM_SCAN_CHECK_WPASYNC | if protect { PM_SCAN_WP_MATCHING } else { 0 },
                start,
                end,
                vec: ranges.as_mut_ptr() as u64,
                vec_len: SCAN_RANGES as u64,
                category_mask: PAGE_IS_WRITTEN,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: PAGE_IS_WRITTEN,
                ..ScanArgument::default()
            };
            // SAFETY: the argument has the layout of struct pm_scan_arg, and its
            // vector that of as many struct page_region; the range is a span's.
            let found = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
            let found = usize::try_from(found).map_err(|_| last_errno())?;
            stored.extend(
                ranges[..found].iter().map(|range| {
                    ((range.start - first) as usize, (range.end - range.start) as usize)
                }),
            );
            // A kernel that does not go on would be asked forever.
            start = if argument.walk_end > start { argument.walk_end } else { end };
        }
        Ok(())
    }
}

impl PageMap {
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
        match self.scan_file_pages(span, &mut found) {
            Err(Errno::NOTTY | Errno::INVAL) => self.read_file_pages(span, &mut found),
            result => result,
        }
    }

    /// Whether the kernel has `PAGEMAP_SCAN`.
    #[must_use]
    pub fn scans(&self) -> bool {
        // Of nothing, which a kernel that has it finds at once.
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            category_mask: PAGE_IS_PRESENT,
            return_mask: PAGE_IS_PRESENT,
            ..ScanArgument::default()
        };
        // SAFETY: the argument has the layout of struct pm_scan_arg; its range and its vector
        // are empty.
        enter(Call::PagemapScan).is_ok()
            && unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) } >= 0
    }

    fn scan_file_pages(
        &self,
        span: Span<'_>,
        found: &mut impl FnMut(usize, usize),
    ) -> Result<(), Errno> {
        let first = span.start() as u64;
        let end = first + span.len() as u64;
        let mut ranges = [PageRegion::default(); SCAN_RANGES];
        let mut start = first;
        while start < end {
            enter(Call::PagemapScan)?;
            let mut argument = ScanArgument {
                size: size_of::<ScanArgument>() as u64,
                start,
                end,
                vec: ranges.as_mut_ptr() as u64,
                vec_len: SCAN_RANGES as u64,
                // "Swapped" are pages that the kernel is moving: those of files are in no swap.
                category_mask: PAGE_IS_FILE,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: PAGE_IS_FILE,
                ..ScanArgument::default()
            };
            // SAFETY: the argument has the layout of struct pm_scan_arg, and its
            // vector that of as many struct page_region; the range is a span's.
            let count = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
            let count = usize::try_from(count).map_err(|_| last_errno())?;
            for range in &ranges[..count] {
                found((range.start - first) as usize, (range.end - range.start) as usize);
            }
            // A kernel that does not go on would be asked forever.
            start = if argument.walk_end > start { argument.walk_end } else { end };
        }
        Ok(())
    }

    /// Adds to `present`, which has room, a bool for each system page of a span: whether the
    /// kernel has its content, in memory or in swap.
    ///
    /// # Errors
    /// The kernel's.
    pub fn add_present(&self, span: Span<'_>, present: &mut Vec<bool>) -> Result<(), Errno> {
        let page_count = span.len() / system_page_bytes();
        let first = span.start() as usize / system_page_bytes();
        let mut bytes = vec![0; BATCH_PAGES.min(page_count) * 8];
        for start in (0..page_count).step_by(BATCH_PAGES) {
            let bytes = &mut bytes[..BATCH_PAGES.min(page_count - start) * 8];
            let offset = (first + start) as u64 * 8;
            self.0.read_exact_at(bytes, offset).map_err(|error| errno(&error))?;
            let (entries, _) = bytes.as_chunks::<8>();
            present.extend(entries.iter().map(|entry| has_content(u64::from_ne_bytes(*entry))));
        }
        Ok(())
    }

    fn read_file_pages(
        &self,
        span: Span<'_>,
        found: &mut impl FnMut(usize, usize),
    ) -> Result<(), Errno> {
        let page = system_page_bytes();
        let first = span.start() as usize / page;
        let page_count = span.len() / page;
        let mut bytes = vec![0; BATCH_PAGES.min(page_count) * 8];
        let mut run = 0..0;
        for start in (0..page_count).step_by(BATCH_PAGES) {
            let count = BATCH_PAGES.min(page_count - start);
            let bytes = &mut bytes[..count * 8];
            let offset = (first + start) as u64 * 8;
            self.0.read_exact_at(bytes, offset).map_err(|error| errno(&error))?;
            let (entries, _) = bytes.as_chunks::<8>();
            for (index, entry) in (start..).zip(entries) {
                let entry = u64::from_ne_bytes(*entry);
                if entry & OF_FILE == 0 || !has_content(entry) {
                    continue;
                }
                if run.end != index {
                    if !run.is_empty() {
                        found(run.start * page, run.len() * page);
                    }
                    run = index..index;
                }
                run.end = index + 1;
            }
        }
        if !run.is_empty() {
            found(run.start * page, run.len() * page);
        }
        Ok(())
    }
}

/// Bytes of page tables that this process has (`VmPTE`).
///
/// # Errors
/// ENOENT where `/proc` is not mounted.
pub fn page_table_bytes() -> Result<u64, Errno> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(|error| errno(&error))?;
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
