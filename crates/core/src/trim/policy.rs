//! Which blocks to unmap when windows have more of their files mapped than they may: pure.
//!
//! A *block* is what one page of page-table entries maps (2 MiB with pages of 4 KiB). The kernel
//! does not say which pages were used, so blocks are unmapped in the order in which they were
//! mapped. A block is *hot* if it is mapped again before as many other blocks were unmapped as
//! there are. Hot blocks are unmapped last, as long as the others are at least a quarter.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;

/// Names a window in the ledger.
pub(super) type WindowId = u64;

/// Cold blocks are unmapped first while they have at least one in so many pages.
const COLD_SHARE: u64 = 4;

#[derive(Clone, Copy, Debug)]
struct Block {
    pages: u32,
    /// Which of the entries in the queues is the block's.
    stamp: u64,
    hot: bool,
}

/// What is known of one window's blocks.
#[derive(Debug, Default)]
struct Blocks {
    present: BTreeMap<u32, Block>,
    /// How many blocks had left when this one did.
    left: HashMap<u32, u64>,
    pages: u64,
}

#[derive(Clone, Copy, Debug)]
struct Queued {
    window: WindowId,
    block: u32,
    stamp: u64,
}

/// The blocks of all windows that share a limit.
#[derive(Debug)]
pub(super) struct Ledger {
    page_bytes: u64,
    pages_a_block: u32,
    windows: HashMap<WindowId, Blocks>,
    cold: VecDeque<Queued>,
    hot: VecDeque<Queued>,
    stamps: u64,
    /// Blocks that have left.
    departures: u64,
    /// Ghosts, oldest first, to be forgotten.
    ghosts: VecDeque<(WindowId, u32, u64)>,
    blocks: u64,
    pages: u64,
    hot_pages: u64,
}

impl Ledger {
    pub(super) fn new(page_bytes: u64, pages_a_block: u32) -> Self {
        Self {
            page_bytes,
            pages_a_block,
            windows: HashMap::new(),
            cold: VecDeque::new(),
            hot: VecDeque::new(),
            stamps: 0,
            departures: 0,
            ghosts: VecDeque::new(),
            blocks: 0,
            pages: 0,
            hot_pages: 0,
        }
    }

    /// Bytes of the pages that are mapped, and of their page tables.
    pub(super) fn resident_bytes(&self) -> u64 {
        (self.pages + self.blocks) * self.page_bytes
    }

    /// The same for one window: pages, and page tables.
    pub(super) fn of_window(&self, window: WindowId) -> (u64, u64) {
        self.windows.get(&window).map_or((0, 0), |blocks| {
            let tables = blocks.present.len() as u64;
            (blocks.pages * self.page_bytes, tables * self.page_bytes)
        })
    }

    /// Bytes that come with each mapped byte for page tables, in 256ths.
    pub(super) fn table_share(&self) -> u64 {
        (self.blocks * 256).checked_div(self.pages).unwrap_or(1).clamp(1, 256)
    }

    /// The blocks in which more pages may have come: all but those that are full.
    pub(super) fn unfilled(&self, window: WindowId, block_count: u32) -> Vec<Range<u32>> {
        let mut ranges = Vec::new();
        let mut next = 0;
        if let Some(blocks) = self.windows.get(&window) {
            let full = blocks.present.iter().filter(|(_, one)| one.pages >= self.pages_a_block);
            for (&block, _) in full {
                if block > next {
                    ranges.push(next..block);
                }
                next = block + 1;
            }
        }
        if next < block_count {
            ranges.push(next..block_count);
        }
        ranges
    }

    /// The blocks of `scanned` have so many pages as `found` says, in order; the rest none.
    pub(super) fn observe(&mut self, window: WindowId, scanned: Range<u32>, found: &[(u32, u32)]) {
        let blocks = self.windows.entry(window).or_default();
        let mut emptied: Vec<u32> =
            blocks.present.range(scanned).map(|(&block, _)| block).collect();
        emptied.retain(|block| found.binary_search_by_key(block, |&(block, _)| block).is_err());
        for block in emptied {
            // Its page table is there all the same.
            Self::set(&mut self.pages, &mut self.hot_pages, blocks, block, 0);
        }
        for &(block, pages) in found {
            if blocks.present.contains_key(&block) {
                Self::set(&mut self.pages, &mut self.hot_pages, blocks, block, pages);
                continue;
            }
            let hot = blocks
                .left
                .remove(&block)
                .is_some_and(|then| self.departures - then <= self.blocks.max(1));
            self.stamps += 1;
            let stamp = self.stamps;
            blocks.present.insert(block, Block { pages: 0, stamp, hot });
            Self::set(&mut self.pages, &mut self.hot_pages, blocks, block, pages);
            self.blocks += 1;
            let queue = if hot { &mut self.hot } else { &mut self.cold };
            queue.push_back(Queued { window, block, stamp });
        }
    }

    fn set(all: &mut u64, hot: &mut u64, blocks: &mut Blocks, block: u32, pages: u32) {
        let Some(known) = blocks.present.get_mut(&block) else { return };
        let (before, now) = (u64::from(known.pages), u64::from(pages));
        known.pages = pages;
        blocks.pages = blocks.pages + now - before;
        *all = *all + now - before;
        if known.hot {
            *hot = *hot + now - before;
        }
    }

    /// Takes blocks out that come to `bytes`, and says which of each window, in ranges.
    pub(super) fn victims(&mut self, bytes: u64) -> Vec<(WindowId, Vec<Range<u32>>)> {
        let mut chosen: BTreeMap<WindowId, Vec<u32>> = BTreeMap::new();
        let goal = self.resident_bytes().saturating_sub(bytes);
        while self.resident_bytes() > goal {
            let cold_pages = self.pages - self.hot_pages;
            let from_cold = cold_pages * COLD_SHARE >= self.pages || self.hot.is_empty();
            let first = if from_cold { &mut self.cold } else { &mut self.hot };
            let Some(queued) = first
                .pop_front()
                .or_else(|| self.hot.pop_front())
                .or_else(|| self.cold.pop_front())
            else {
                break;
            };
            if self.leave(queued) {
                chosen.entry(queued.window).or_default().push(queued.block);
            }
        }
        while let Some(&(window, block, then)) = self.ghosts.front() {
            if self.departures - then <= self.blocks.max(1) {
                break;
            }
            self.ghosts.pop_front();
            if let Some(blocks) = self.windows.get_mut(&window) {
                if blocks.left.get(&block) == Some(&then) {
                    blocks.left.remove(&block);
                }
            }
        }
        chosen.into_iter().map(|(window, blocks)| (window, ranges(blocks))).collect()
    }

    fn leave(&mut self, queued: Queued) -> bool {
        let Some(blocks) = self.windows.get_mut(&queued.window) else { return false };
        let known = blocks.present.get(&queued.block);
        if known.is_none_or(|block| block.stamp != queued.stamp) {
            return false;
        }
        Self::set(&mut self.pages, &mut self.hot_pages, blocks, queued.block, 0);
        blocks.present.remove(&queued.block);
        self.blocks -= 1;
        self.departures += 1;
        blocks.left.insert(queued.block, self.departures);
        self.ghosts.push_back((queued.window, queued.block, self.departures));
        true
    }

    /// The window is gone.
    pub(super) fn forget(&mut self, window: WindowId) {
        let Some(blocks) = self.windows.remove(&window) else { return };
        let hot: u64 =
            blocks.present.values().filter(|one| one.hot).map(|one| u64::from(one.pages)).sum();
        self.hot_pages -= hot;
        self.pages -= blocks.pages;
        self.blocks -= blocks.present.len() as u64;
        self.cold.retain(|queued| queued.window != window);
        self.hot.retain(|queued| queued.window != window);
        self.ghosts.retain(|&(ghost, ..)| ghost != window);
    }
}

/// Sorted blocks as ranges.
fn ranges(mut blocks: Vec<u32>) -> Vec<Range<u32>> {
    blocks.sort_unstable();
    let mut ranges: Vec<Range<u32>> = Vec::new();
    for block in blocks {
        match ranges.last_mut() {
            Some(range) if range.end == block => range.end += 1,
            _ => ranges.push(block..block + 1),
        }
    }
    ranges
}

/// When to start trimming, and when to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Marks {
    /// Beyond this, blocks leave.
    pub(super) high: u64,
    /// Stop at this.
    pub(super) low: u64,
}

impl Marks {
    /// Below the limit by what may come before the trimmer looks again.
    pub(super) fn of(limit: u64) -> Self {
        /// What a thread maps in two or three milliseconds, from the page cache.
        const MOST: u64 = 64 << 20;
        let high = limit - (limit / 4).min(MOST);
        Self { high, low: high - (high / 4).min(MOST) }
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // ranges are what is compared
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn ledger() -> Ledger {
        Ledger::new(PAGE, 4)
    }

    fn come(ledger: &mut Ledger, window: WindowId, blocks: Range<u32>) {
        for block in blocks {
            ledger.observe(window, block..block + 1, &[(block, 4)]);
        }
    }

    fn check(ledger: &Ledger) {
        let pages: u64 = ledger.windows.values().map(|blocks| blocks.pages).sum();
        let counted: u64 = ledger
            .windows
            .values()
            .flat_map(|blocks| blocks.present.values())
            .map(|block| u64::from(block.pages))
            .sum();
        assert_eq!((ledger.pages, ledger.pages), (pages, counted));
        let blocks: usize = ledger.windows.values().map(|blocks| blocks.present.len()).sum();
        assert_eq!(ledger.blocks, blocks as u64);
    }

    #[test]
    fn what_came_first_leaves_first() {
        let mut ledger = ledger();
        come(&mut ledger, 1, 0..10);
        assert_eq!(ledger.resident_bytes(), 50 * PAGE);
        assert_eq!(ledger.victims(11 * PAGE), [(1, vec![0..3])]);
        assert_eq!(ledger.resident_bytes(), 35 * PAGE);
        check(&ledger);
    }

    #[test]
    fn page_tables_count() {
        let mut ledger = ledger();
        ledger.observe(1, 0..100, &[(7, 1), (50, 1)]);
        assert_eq!(ledger.resident_bytes(), 4 * PAGE);
        // The kernel has reclaimed the page; its table stays.
        ledger.observe(1, 0..100, &[(50, 1)]);
        assert_eq!(ledger.resident_bytes(), 3 * PAGE);
        assert_eq!(ledger.of_window(1), (PAGE, 2 * PAGE));
        assert_eq!(ledger.victims(3 * PAGE), [(1, vec![7..8, 50..51])]);
        assert_eq!(ledger.resident_bytes(), 0);
    }

    #[test]
    fn only_blocks_that_are_not_full_are_asked_about_again() {
        let mut ledger = ledger();
        assert_eq!(ledger.unfilled(1, 10), [0..10]);
        ledger.observe(1, 0..10, &[(2, 4), (3, 4), (5, 3), (9, 4)]);
        assert_eq!(ledger.unfilled(1, 10), [0..2, 4..9]);
        ledger.victims(1);
        assert_eq!(ledger.unfilled(1, 10), [0..3, 4..9]);
    }

    #[test]
    fn a_scan_again_and_again_makes_nothing_hot() {
        let mut ledger = ledger();
        for _ in 0..5 {
            for block in 0..100 {
                come(&mut ledger, 1, block..block + 1);
                let over = ledger.resident_bytes().saturating_sub(10 * 5 * PAGE);
                if over > 0 {
                    ledger.victims(over);
                }
            }
        }
        assert_eq!(ledger.hot_pages, 0);
        check(&ledger);
    }

    #[test]
    fn what_comes_back_at_once_outlives_a_scan() {
        let mut ledger = ledger();
        let mut left = 0;
        for block in 10..1000 {
            // Block 0 is used all the time: it comes back whenever it has left.
            come(&mut ledger, 1, 0..1);
            come(&mut ledger, 1, block..block + 1);
            let over = ledger.resident_bytes().saturating_sub(10 * 5 * PAGE);
            if over > 0 {
                let gone = ledger.victims(over);
                left += usize::from(gone[0].1[0].start == 0);
            }
        }
        assert_eq!(left, 1);
        check(&ledger);
    }

    #[test]
    fn windows_that_share_a_limit_leave_in_one_order_and_are_forgotten() {
        let mut ledger = ledger();
        come(&mut ledger, 1, 0..2);
        come(&mut ledger, 2, 0..2);
        come(&mut ledger, 1, 5..6);
        assert_eq!(ledger.victims(15 * PAGE), [(1, vec![0..2]), (2, vec![0..1])]);
        ledger.forget(2);
        assert_eq!(ledger.resident_bytes(), 5 * PAGE);
        assert_eq!(ledger.victims(u64::MAX), [(1, vec![5..6])]);
        assert_eq!(ledger.victims(u64::MAX), []);
        check(&ledger);
    }

    #[test]
    fn marks_leave_room_below_the_limit() {
        assert_eq!(Marks::of(256 << 20), Marks { high: 192 << 20, low: 144 << 20 });
        assert_eq!(Marks::of(8 << 30).high, (8 << 30) - (64 << 20));
        assert_eq!(Marks::of(0), Marks { high: 0, low: 0 });
        let small = Marks::of(4 << 20);
        assert!(small.low < small.high && small.high < 4 << 20);
    }
}
