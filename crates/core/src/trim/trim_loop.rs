//! The trimmer's thread: when it looks, what it finds, and what it unmaps.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::advice::{fitting, Shape};
use super::policy::{Ledger, Marks};
use super::{state, Limit, ReadAhead, Trimmed, Watched, VERSION};
use crate::sys::cputime::{prefer_short_slices, BusyTimer, MappedBytes};
use crate::sys::lock::lock;
use crate::sys::mm::system_page_bytes;
use crate::sys::pagemap::PageMap;
use crate::sys::stderr_line::stderr_line;
use crate::sys::thread::process_major_faults;

/// What may be mapped in a microsecond, from the page cache, where nothing is known of it.
const BYTES_A_MICROSECOND: u64 = 64 << 10;
/// The trimmer looks so often at least, while pages are mapped, and at most.
const LONGEST: Duration = Duration::from_millis(20);
const SHORTEST: Duration = Duration::from_micros(200);
/// After this time without new pages the trimmer sleeps until the process is busy. It is longer
/// than a thread waits for a device.
const QUIET: Duration = Duration::from_millis(30);
/// Longest pause of a limit that cannot be kept because the kernel keeps the pages.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Blocks that are asked about at once where each page is an entry to be read.
const BLOCKS_A_PIECE: u32 = 512;

/// Faults that waited for a device before it is worth looking how windows are touched.
const LEAST_MAJOR_FAULTS: u64 = 16;

/// What one page of page-table entries maps.
fn block_bytes() -> usize {
    let page = system_page_bytes();
    page * (page / size_of::<u64>()).min(512)
}

/// A limit, and what its windows have mapped.
struct Group {
    limit: Arc<Limit>,
    ledger: Ledger,
    /// Until when it is left alone, and for how long the last time.
    paused: Option<Instant>,
    pause: Duration,
}

/// What the thread knows of one window.
struct Known {
    watched: Arc<Watched>,
    /// Of its limit, if it has one.
    group: Option<usize>,
    /// Where new pages were found the last time, where not all is asked about at once.
    cursor: u32,
    /// How it was mapped at the last look, and the read-ahead since.
    shape: Shape,
    advice: ReadAhead,
    blocks_trimmed: u64,
}

pub(super) struct TrimLoop {
    mapped: MappedBytes,
    pagemap: PageMap,
    timer: BusyTimer,
    /// The kernel reports ranges, and not only single pages.
    scans: bool,
    version: u64,
    groups: Vec<Group>,
    windows: HashMap<u64, Known>,
    /// What the process had mapped when the ledgers were right.
    base: u64,
    last: u64,
    looked: Instant,
    /// What was mapped in a microsecond lately, in bytes.
    rate: u64,
    /// When something new was found the last time.
    grew: Instant,
    complained: bool,
    /// Faults that waited for a device, at the last look at how windows are touched.
    major_faults: u64,
    /// When to look again.
    next_shapes: Instant,
}

impl TrimLoop {
    pub(super) fn new(mapped: MappedBytes, pagemap: PageMap) -> Self {
        prefer_short_slices();
        let scans = pagemap.scans();
        Self {
            mapped,
            pagemap,
            timer: BusyTimer::new(),
            scans,
            version: 0,
            groups: Vec::new(),
            windows: HashMap::new(),
            base: 0,
            last: 0,
            looked: Instant::now(),
            rate: BYTES_A_MICROSECOND,
            grew: Instant::now(),
            complained: false,
            major_faults: process_major_faults(),
            next_shapes: Instant::now(),
        }
    }

    pub(super) fn run(&mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::SeqCst) {
            self.follow();
            match self.look().and_then(|()| self.adapt()) {
                Ok(()) => self.complained = false,
                Err(errno) => self.complain(errno),
            }
            self.sleep();
        }
    }

    pub(super) fn wait_for_end(&self, stop: &AtomicBool) {
        while !stop.load(Ordering::SeqCst) {
            self.timer.wait(None);
        }
    }

    fn complain(&mut self, errno: Errno) {
        if !self.complained {
            stderr_line(format_args!(
                "windows cannot be kept to their budgets at the moment: {errno}"
            ));
        }
        self.complained = true;
    }

    /// Takes in which windows have come and gone.
    fn follow(&mut self) {
        let version = VERSION.load(Ordering::SeqCst);
        if version == self.version {
            return;
        }
        self.version = version;
        self.grew = Instant::now();
        let current: Vec<Arc<Watched>> = state().windows.clone();
        let groups = &mut self.groups;
        self.windows.retain(|&id, known| {
            let stays = current.iter().any(|watched| watched.id == id);
            if let (false, Some(group)) = (stays, known.group) {
                groups[group].ledger.forget(id);
            }
            stays
        });
        for watched in current {
            if !self.windows.contains_key(&watched.id) {
                let group = watched.limit.as_ref().map(|limit| self.group_of(limit));
                let known = Known {
                    group,
                    cursor: 0,
                    shape: Shape::default(),
                    advice: ReadAhead::Normal,
                    blocks_trimmed: 0,
                    watched: Arc::clone(&watched),
                };
                self.windows.insert(watched.id, known);
            }
        }
    }

    fn group_of(&mut self, limit: &Arc<Limit>) -> usize {
        let same = |group: &Group| Arc::ptr_eq(&group.limit, limit);
        if let Some(found) = self.groups.iter().position(same) {
            return found;
        }
        let page = system_page_bytes();
        let group = Group {
            limit: Arc::clone(limit),
            ledger: Ledger::new(page as u64, (block_bytes() / page) as u32),
            paused: None,
            pause: Duration::ZERO,
        };
        // One that nobody uses any more has its place taken.
        let unused = |group: &Group| Arc::strong_count(&group.limit) == 1;
        if let Some(free) = self.groups.iter().position(unused) {
            self.groups[free] = group;
            return free;
        }
        self.groups.push(group);
        self.groups.len() - 1
    }

    /// Looks how much is mapped, and has some of it unmapped where that is too much.
    fn look(&mut self) -> Result<(), Errno> {
        let mapped = self.mapped.now()?;
        if mapped > self.last {
            self.grew = Instant::now();
        }
        let elapsed = self.looked.elapsed().as_micros().max(1) as u64;
        let rate = mapped.saturating_sub(self.last) / elapsed;
        // Falls slowly: what was fast once may be so again.
        self.rate = rate.max(self.rate - self.rate / 16).max(BYTES_A_MICROSECOND);
        self.looked = Instant::now();
        self.last = mapped;
        // Where others unmap theirs, what is mapped falls while ours may grow: from here on
        // it is seen again.
        self.base = self.base.min(mapped);
        let growth = mapped - self.base;
        let due = |group: &Group| {
            let resident = group.ledger.resident_bytes();
            let may_be = resident + growth + growth / 256 * group.ledger.table_share();
            may_be > Marks::of(group.limit.bytes()).high
                && group.paused.is_none_or(|until| Instant::now() >= until)
        };
        if !self.groups.iter().any(due) {
            return Ok(());
        }
        self.account(growth)?;
        let mut freed = 0;
        for group in 0..self.groups.len() {
            freed += self.trim(group)?;
        }
        self.base = mapped.saturating_sub(freed);
        self.last = self.base;
        Ok(())
    }

    /// Asks in which blocks there are new pages.
    fn account(&mut self, growth: u64) -> Result<(), Errno> {
        let mut wanted = growth;
        for (&id, known) in &mut self.windows {
            let target = lock(&known.watched.target);
            let (Some(target), Some(group)) = (target.as_ref(), known.group) else { continue };
            let ledger = &mut self.groups[group].ledger;
            let layout = Layout::of(target.as_ref());
            if self.scans {
                for blocks in ledger.unfilled(id, layout.block_count) {
                    layout.observe(&self.pagemap, target.as_ref(), id, blocks, ledger)?;
                }
                continue;
            }
            // Entry by entry it takes long: from where pages came the last time, until there
            // are as many new ones as have come.
            for blocks in pieces(&ledger.unfilled(id, layout.block_count), known.cursor) {
                let before = ledger.of_window(id).0;
                let first = blocks.start;
                layout.observe(&self.pagemap, target.as_ref(), id, blocks, ledger)?;
                let found = ledger.of_window(id).0.saturating_sub(before);
                if found > 0 {
                    known.cursor = first;
                    wanted = wanted.saturating_sub(found);
                    if wanted == 0 {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// Has the oldest blocks of a limit's windows unmapped, if there is too much. Says how
    /// many bytes that were.
    fn trim(&mut self, group: usize) -> Result<u64, Errno> {
        let marks = Marks::of(self.groups[group].limit.bytes());
        let resident = self.groups[group].ledger.resident_bytes();
        if resident <= marks.high {
            return Ok(0);
        }
        let mut outcome = Ok(());
        let victims = self.groups[group].ledger.victims(resident - marks.low);
        for (id, blocks) in victims {
            let Some(known) = self.windows.get(&id) else { continue };
            let target = lock(&known.watched.target);
            let Some(target) = target.as_ref() else { continue };
            let layout = Layout::of(target.as_ref());
            let ranges: Vec<Range<usize>> =
                blocks.iter().map(|blocks| layout.bytes(blocks.clone())).collect();
            let given = target.give_back(&self.pagemap, &ranges);
            let ledger = &mut self.groups[group].ledger;
            if given.is_err() || target.keeps_some() {
                for blocks in blocks.clone() {
                    layout.observe(&self.pagemap, target.as_ref(), id, blocks, ledger)?;
                }
            }
            outcome = outcome.and(given);
            let count: u64 = blocks.iter().map(|blocks| u64::from(blocks.end - blocks.start)).sum();
            known.watched.blocks_trimmed.fetch_add(count, Ordering::Relaxed);
        }
        let group = &mut self.groups[group];
        let freed = resident.saturating_sub(group.ledger.resident_bytes());
        if freed < (resident - marks.low) / 16 {
            // The kernel keeps them: to ask again at once would be for nothing.
            group.pause = (group.pause * 2).clamp(Duration::from_millis(1), LONGEST_PAUSE);
            group.paused = Some(Instant::now() + group.pause);
        } else {
            group.pause = Duration::ZERO;
            group.paused = None;
        }
        outcome.map(|()| freed)
    }

    /// Has the read-ahead of windows follow how they are touched, where touches wait for a
    /// device.
    fn adapt(&mut self) -> Result<(), Errno> {
        let begin = Instant::now();
        if !self.scans || begin < self.next_shapes {
            return Ok(());
        }
        let faults = process_major_faults();
        if faults - self.major_faults < LEAST_MAJOR_FAULTS {
            return Ok(());
        }
        self.major_faults = faults;
        for known in self.windows.values_mut().filter(|known| known.watched.adapts) {
            let target = lock(&known.watched.target);
            let Some(target) = target.as_ref() else { continue };
            let mut shape = Shape::default();
            self.pagemap.file_pages(target.memory(), |_, len| {
                shape.pages += (len / system_page_bytes()) as u64;
                shape.runs += 1;
            })?;
            let trimmed = known.watched.blocks_trimmed.load(Ordering::Relaxed);
            // Where something was unmapped meanwhile, the two cannot be compared.
            if trimmed == known.blocks_trimmed {
                if let Some(advice) = fitting(known.advice, known.shape, shape) {
                    target.advise(advice)?;
                    known.advice = advice;
                }
            }
            known.blocks_trimmed = trimmed;
            known.shape = shape;
        }
        // No more than a twentieth of a processor.
        self.next_shapes = begin + (begin.elapsed() * 20).max(LONGEST);
        Ok(())
    }

    /// Waits: shortly while pages are mapped, until the process is busy else.
    fn sleep(&self) {
        let left = self.groups.iter().map(|group| {
            let high = Marks::of(group.limit.bytes()).high;
            high.saturating_sub(group.ledger.resident_bytes())
        });
        let left = left.min().unwrap_or(u64::MAX);
        let growth = self.last.saturating_sub(self.base);
        let pause = Duration::from_micros(left.saturating_sub(growth) / (2 * self.rate));
        let pause = pause.clamp(SHORTEST, LONGEST);
        if self.grew.elapsed() < QUIET {
            self.timer.wait(Some(pause));
        } else {
            self.timer.wait_busy(pause);
        }
    }
}

/// The pieces of ranges in which to look, beginning where `cursor` is.
fn pieces(ranges: &[Range<u32>], cursor: u32) -> Vec<Range<u32>> {
    let mut pieces: Vec<Range<u32>> = ranges
        .iter()
        .flat_map(|range| {
            let end = range.end;
            range
                .clone()
                .step_by(BLOCKS_A_PIECE as usize)
                .map(move |first| first..end.min(first + BLOCKS_A_PIECE))
        })
        .collect();
    let first = pieces.iter().position(|piece| piece.end > cursor).unwrap_or(0);
    pieces.rotate_left(first);
    pieces
}

/// How a window's memory lies in blocks.
struct Layout {
    /// Bytes of the first block that are before the window.
    head: usize,
    len: usize,
    block_count: u32,
}

impl Layout {
    fn of(target: &dyn Trimmed) -> Self {
        let memory = target.memory();
        let head = memory.start() as usize % block_bytes();
        let len = memory.len();
        Self { head, len, block_count: (head + len).div_ceil(block_bytes()) as u32 }
    }

    fn bytes(&self, blocks: Range<u32>) -> Range<usize> {
        let start = (blocks.start as usize * block_bytes()).saturating_sub(self.head);
        let end = (blocks.end as usize * block_bytes() - self.head).min(self.len);
        start..end
    }

    /// Enters into the ledger what is mapped in these blocks.
    fn observe(
        &self,
        pagemap: &PageMap,
        target: &dyn Trimmed,
        id: u64,
        blocks: Range<u32>,
        ledger: &mut Ledger,
    ) -> Result<(), Errno> {
        let bytes = self.bytes(blocks.clone());
        let mut found: Vec<(u32, u32)> = Vec::new();
        let page = system_page_bytes();
        pagemap.file_pages(target.memory().part(bytes.start, bytes.len()), |offset, len| {
            let mut at = self.head + bytes.start + offset;
            let end = at + len;
            while at < end {
                let block = at / block_bytes();
                let until = end.min((block + 1) * block_bytes());
                let pages = ((until - at) / page) as u32;
                match found.last_mut() {
                    Some((last, count)) if *last == block as u32 => *count += pages,
                    _ => found.push((block as u32, pages)),
                }
                at = until;
            }
        })?;
        ledger.observe(id, blocks, &found);
        Ok(())
    }
}
