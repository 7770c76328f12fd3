//! What each window page shows, and in which state it is.
//!
//! The table owns one word a window page: the file page it shows, its
//! protection, and whether its content is in the window. It makes no system
//! call. Blocks of words exist only where a page was ever changed: a window that
//! is linear, or shows nothing, costs a pointer every 512 pages.

use std::ops::Range;

use hashbrown::HashTable;

use crate::units::{FilePage, PageIndex, Prot, Run, WindowPage};

/// Words that are allocated together.
const BLOCK_PAGES: usize = 512;

/// What a window page shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// A page of the store.
    File(FilePage),
    /// Nothing: a touch is SIGBUS or SIGSEGV.
    Nothing,
    /// Content of its own, with no file behind it.
    Placed,
}

impl Shown {
    /// The file page, if it is one.
    #[must_use]
    pub fn file_page(self) -> Option<FilePage> {
        match self {
            Self::File(page) => Some(page),
            Self::Nothing | Self::Placed => None,
        }
    }

    /// As users see it: the file page, -1 for nothing, -2 for a placed page.
    #[must_use]
    pub fn number(self) -> i64 {
        match self {
            Self::File(page) => page.0.cast_signed(),
            Self::Nothing => -1,
            Self::Placed => -2,
        }
    }
}

/// The word of one window page.
///
/// Invariants: a page that may not be touched ([`Prot::None`]) is not present;
/// an unreadable page is not present; what is dirty or being written is present.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    const FILE_PAGE: u64 = (1 << 40) - 1;
    const NOTHING: u64 = Self::FILE_PAGE;
    const PLACED: u64 = Self::FILE_PAGE - 1;
    /// Store pages that a table can name.
    pub const MAX_FILE_PAGES: u64 = Self::PLACED;

    const PRESENT: u64 = 1 << 40;
    const UNREADABLE: u64 = 1 << 41;
    const WITHHELD: u64 = 1 << 42;
    const LINGERING: u64 = 1 << 43;
    const PROT_SHIFT: u32 = 44;
    const PROT: u64 = 3 << Self::PROT_SHIFT;
    const DIRTY: u64 = 1 << 46;
    const WRITING: u64 = 1 << 47;
    const HELD: u64 = 1 << 48;
    const PINNED: u64 = 1 << 49;

    /// A page that shows `shown`, absent.
    ///
    /// # Panics
    /// If it is a file page that a table cannot name.
    #[must_use]
    pub fn new(shown: Shown, prot: Prot) -> Self {
        let page = match shown {
            Shown::File(page) => {
                assert!(page.0 < Self::MAX_FILE_PAGES, "a file page that fits a word");
                page.0
            }
            Shown::Nothing => Self::NOTHING,
            Shown::Placed => Self::PLACED,
        };
        Self(page).with_prot(prot)
    }

    /// What it shows.
    #[must_use]
    pub fn shown(self) -> Shown {
        match self.0 & Self::FILE_PAGE {
            Self::NOTHING => Shown::Nothing,
            Self::PLACED => Shown::Placed,
            page => Shown::File(FilePage(page)),
        }
    }

    /// What may be done with it.
    #[must_use]
    pub fn prot(self) -> Prot {
        match (self.0 & Self::PROT) >> Self::PROT_SHIFT {
            0 => Prot::None,
            1 => Prot::Read,
            _ => Prot::Write,
        }
    }

    /// Whether its content is in the window: a touch does not fault.
    #[must_use]
    pub fn present(self) -> bool {
        self.0 & Self::PRESENT != 0
    }

    /// Whether reading it failed, and a touch is SIGBUS until it is populated or evicted.
    #[must_use]
    pub fn unreadable(self) -> bool {
        self.0 & Self::UNREADABLE != 0
    }

    /// Whether it was present when access was taken away, so that giving
    /// access back has to bring the content back.
    #[must_use]
    pub fn withheld(self) -> bool {
        self.0 & Self::WITHHELD != 0
    }

    /// Whether the kernel may still have what it showed before it became absent:
    /// a call that was to drop it failed. The next one drops it.
    #[must_use]
    pub fn lingering(self) -> bool {
        self.0 & Self::LINGERING != 0
    }

    /// Whether it was stored to since it was loaded or last written.
    #[must_use]
    pub fn dirty(self) -> bool {
        self.0 & Self::DIRTY != 0
    }

    /// Whether what was stored before is on its way to the store.
    #[must_use]
    pub fn writing(self) -> bool {
        self.0 & Self::WRITING != 0
    }

    /// Whether the store may not have all of its content.
    #[must_use]
    pub fn unsaved(self) -> bool {
        self.0 & (Self::DIRTY | Self::WRITING) != 0
    }

    /// Whether somebody is about to change it: who stores to it waits.
    #[must_use]
    pub fn held(self) -> bool {
        self.0 & Self::HELD != 0
    }

    /// Whether it may not leave the window for others.
    #[must_use]
    pub fn pinned(self) -> bool {
        self.0 & Self::PINNED != 0
    }

    /// The same page with other protection.
    #[must_use]
    pub fn with_prot(self, prot: Prot) -> Self {
        let bits = match prot {
            Prot::None => 0,
            Prot::Read => 1,
            Prot::Write => 2,
        };
        Self(self.0 & !Self::PROT | bits << Self::PROT_SHIFT)
    }

    fn with(self, bit: u64, on: bool) -> Self {
        Self(if on { self.0 | bit } else { self.0 & !bit })
    }

    /// The same page, present or absent; either way it can be read again.
    #[must_use]
    pub fn with_present(self, present: bool) -> Self {
        let rest = Self::UNREADABLE
            | Self::WITHHELD
            | Self::LINGERING
            | Self::DIRTY
            | Self::WRITING
            | Self::HELD;
        self.with(Self::PRESENT, present).with(rest, false)
    }

    /// The same page, absent, a touch being SIGBUS.
    #[must_use]
    pub fn with_unreadable(self) -> Self {
        self.with_present(false).with(Self::UNREADABLE, true)
    }

    /// The same page, absent, but perhaps not to the kernel.
    #[must_use]
    pub fn with_lingering(self) -> Self {
        self.with_present(false).with(Self::LINGERING, true)
    }

    /// The same page, stored to or not.
    #[must_use]
    pub fn with_dirty(self, dirty: bool) -> Self {
        self.with(Self::DIRTY, dirty)
    }

    /// The same page, its content on its way to the store or not.
    #[must_use]
    pub fn with_writing(self, writing: bool) -> Self {
        self.with(Self::WRITING, writing)
    }

    /// The same page, held or let go.
    #[must_use]
    pub fn with_held(self, held: bool) -> Self {
        self.with(Self::HELD, held)
    }

    /// The same page, pinned or not.
    #[must_use]
    pub fn with_pinned(self, pinned: bool) -> Self {
        self.with(Self::PINNED, pinned)
    }

    /// The same page without access, its content to come back with it.
    #[must_use]
    pub fn with_withheld(self, withheld: bool) -> Self {
        self.with(Self::WITHHELD, withheld)
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Entry")
            .field("shown", &self.shown())
            .field("prot", &self.prot())
            .field("present", &self.present())
            .field("unreadable", &self.unreadable())
            .field("unsaved", &self.unsaved())
            .finish_non_exhaustive()
    }
}

/// What a window shows before anything is remapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Window page i shows file page `first + i`.
    Linear(FilePage),
    /// No page shows anything.
    Nothing,
}

/// Pages of a window in each state, kept as the table changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages whose content is in the window.
    pub present: u64,
    /// Pages with content of their own.
    pub placed: u64,
    /// Pages that may not be touched.
    pub denied: u64,
    /// Pages that were stored to, as far as the table knows, and are not in the store.
    pub unsaved: u64,
    /// Pages that may not leave the window.
    pub pinned: u64,
    /// Pages that somebody is about to change.
    pub held: u64,
}

/// Where file pages appear, for windows in which each may appear once.
///
/// Has the numbers of the window pages in blocks that exist; a block that does not
/// shows what the window showed first, which is reckoned. Five to eleven bytes a page.
#[derive(Debug, Default)]
struct Appearances(HashTable<u32>);

fn hash(page: FilePage) -> u64 {
    // Fibonacci hashing; the table takes its tags from the high bits and the place from the low.
    let mixed = page.0.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed ^ (mixed >> 32)
}

type Blocks = Vec<Option<Box<[Entry; BLOCK_PAGES]>>>;

fn word(blocks: &Blocks, number: u32) -> Option<Entry> {
    let (block, slot) = split(WindowPage(number.into()));
    blocks[block].as_ref().map(|block| block[slot])
}

impl Appearances {
    /// The largest window whose pages can be numbered here.
    const MAX_PAGES: u64 = u32::MAX as u64;

    /// Window page `number` shows a page, as its word in `blocks` says by now.
    fn add(&mut self, number: u32, blocks: &Blocks) {
        let hash_of = |&number: &u32| {
            let shown = word(blocks, number).and_then(|entry| entry.shown().file_page());
            shown.map_or(0, hash)
        };
        self.0.insert_unique(hash_of(&number), number, hash_of);
    }

    /// Window page `number` is about to show something else than `page`.
    fn remove(&mut self, number: u32, page: FilePage) {
        if let Ok(entry) = self.0.find_entry(hash(page), |&other| other == number) {
            entry.remove();
        }
    }
}

/// One word for each page of a window.
#[derive(Debug)]
pub struct Table {
    page_count: u64,
    origin: Origin,
    prot: Prot,
    blocks: Blocks,
    counts: Counts,
    /// Where it has to be known which window page shows a file page.
    appearances: Option<Appearances>,
}

fn split(page: WindowPage) -> (usize, usize) {
    let index = page.0 as usize;
    (index / BLOCK_PAGES, index % BLOCK_PAGES)
}

impl Table {
    /// The table of a window of `page_count` pages, all absent.
    #[must_use]
    pub fn new(page_count: u64, origin: Origin, prot: Prot) -> Self {
        let blocks = (page_count as usize).div_ceil(BLOCK_PAGES);
        let mut table = Self {
            page_count,
            origin,
            prot,
            blocks: Vec::new(),
            counts: Counts::default(),
            appearances: None,
        };
        table.blocks.resize_with(blocks, || None);
        table
    }

    /// The largest table that can say where a file page appears.
    pub const MAX_PAGES_WITH_APPEARANCES: u64 = Appearances::MAX_PAGES;

    /// The same table, nothing of it changed yet, that can say where a file page appears.
    ///
    /// # Panics
    /// If it has more than [`MAX_PAGES_WITH_APPEARANCES`](Self::MAX_PAGES_WITH_APPEARANCES)
    /// pages, or was changed.
    #[must_use]
    pub fn with_appearances(mut self) -> Self {
        assert!(self.page_count <= Appearances::MAX_PAGES, "pages that a number can name");
        assert!(self.blocks.iter().all(Option::is_none), "a table that was not changed");
        self.appearances = Some(Appearances::default());
        self
    }

    /// The window pages that show a file page; none where the table does not know.
    pub fn appearances(&self, page: FilePage) -> impl Iterator<Item = WindowPage> + '_ {
        let listed = self.appearances.iter().flat_map(move |all| all.0.iter_hash(hash(page)));
        let listed = listed.map(|&number| WindowPage(number.into()));
        let listed = listed.filter(move |&other| self.get(other).shown() == Shown::File(page));
        let linear = match (&self.appearances, self.origin) {
            (Some(_), Origin::Linear(first)) => page.0.checked_sub(first.0).map(WindowPage),
            _ => None,
        };
        let unchanged =
            |page: &WindowPage| page.0 < self.page_count && self.blocks[split(*page).0].is_none();
        listed.chain(linear.filter(unchanged))
    }

    /// Pages of the window.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        self.page_count
    }

    /// How many pages are in which state.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    fn original(&self, page: WindowPage) -> Entry {
        let shown = match self.origin {
            Origin::Linear(first) => Shown::File(first.offset(page.0)),
            Origin::Nothing => Shown::Nothing,
        };
        Entry::new(shown, self.prot)
    }

    /// The word of `page`.
    ///
    /// # Panics
    /// If the page is outside the window.
    #[must_use]
    pub fn get(&self, page: WindowPage) -> Entry {
        assert!(page.0 < self.page_count, "page outside the window");
        let (block, slot) = split(page);
        self.blocks[block].as_ref().map_or_else(|| self.original(page), |block| block[slot])
    }

    /// Pages from `page` on, up to the end of their block, that nothing was ever
    /// changed of.
    #[must_use]
    pub fn original_pages(&self, page: WindowPage) -> u64 {
        let (block, slot) = split(page);
        if self.blocks[block].is_some() {
            return 0;
        }
        ((BLOCK_PAGES - slot) as u64).min(self.page_count - page.0)
    }

    /// The pages that are present, without a look at those that nothing was ever changed of.
    #[must_use]
    pub fn present_pages(&self) -> Vec<WindowPage> {
        let mut present = Vec::with_capacity(self.counts.present as usize);
        for (block, words) in self.blocks.iter().enumerate() {
            let first = (block * BLOCK_PAGES) as u64;
            let words = words.iter().flat_map(|words| words.iter()).zip(first..);
            let those = words.filter(|(entry, _)| entry.present());
            present.extend(those.map(|(_, page)| WindowPage(page)));
        }
        present
    }

    /// Ranges of `pages`, none longer than `most`, outside of which no page is present or
    /// about to change. Whole blocks are left out.
    #[must_use]
    pub fn used_ranges(&self, pages: Range<u64>, most: u64) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let uses = |entry: &Entry| entry.present() || entry.held() || entry.unsaved();
        let mut start = pages.start;
        while start < pages.end {
            let (block, slot) = split(WindowPage(start));
            let end = (start + (BLOCK_PAGES - slot) as u64).min(pages.end);
            if self.blocks[block].as_ref().is_some_and(|words| words.iter().any(uses)) {
                match ranges.last_mut().filter(|last| last.end == start && end - last.start <= most)
                {
                    Some(last) => last.end = end,
                    None => ranges.push(start..end),
                }
            }
            start = end;
        }
        ranges
    }

    /// Replaces the word of `page`.
    ///
    /// # Panics
    /// If the page is outside the window, or is present without being accessible.
    pub fn set(&mut self, page: WindowPage, entry: Entry) {
        let old = self.get(page);
        if old == entry {
            return;
        }
        assert!(!entry.present() || entry.prot() != Prot::None, "present without access");
        let (block, slot) = split(page);
        if self.blocks[block].is_none() {
            self.add_block(block);
        }
        let moved = old.shown() != entry.shown();
        if let (true, Some(all), Shown::File(file)) = (moved, &mut self.appearances, old.shown()) {
            all.remove(page.0 as u32, file);
        }
        self.blocks[block].as_mut().expect("made above")[slot] = entry;
        if let (true, Some(all), Shown::File(_)) = (moved, &mut self.appearances, entry.shown()) {
            all.add(page.0 as u32, &self.blocks);
        }
        self.count(old, u64::wrapping_sub);
        self.count(entry, u64::wrapping_add);
    }

    /// Makes the words of all pages, so that [`set`](Self::set) allocates nothing for what
    /// changes no file page.
    pub fn allocate_ahead(&mut self) {
        for block in 0..self.blocks.len() {
            if self.blocks[block].is_none() {
                self.add_block(block);
            }
        }
    }

    fn add_block(&mut self, block: usize) {
        let first = (block * BLOCK_PAGES) as u64;
        let mut words = Box::new([Entry::new(Shown::Nothing, self.prot); BLOCK_PAGES]);
        let pages = first..self.page_count.min(first + BLOCK_PAGES as u64);
        for (word, index) in words.iter_mut().zip(pages.clone()) {
            *word = self.original(WindowPage(index));
        }
        self.blocks[block] = Some(words);
        if let (Some(all), Origin::Linear(_)) = (&mut self.appearances, self.origin) {
            pages.for_each(|page| all.add(page as u32, &self.blocks));
        }
    }

    fn count(&mut self, entry: Entry, add: fn(u64, u64) -> u64) {
        let counts = &mut self.counts;
        counts.present = add(counts.present, u64::from(entry.present()));
        counts.placed = add(counts.placed, u64::from(entry.shown() == Shown::Placed));
        counts.denied = add(counts.denied, u64::from(entry.prot() == Prot::None));
        counts.unsaved = add(counts.unsaved, u64::from(entry.unsaved()));
        counts.pinned = add(counts.pinned, u64::from(entry.pinned()));
        counts.held = add(counts.held, u64::from(entry.held()));
    }

    /// Changes the word of `page` and returns what it was.
    pub fn update(&mut self, page: WindowPage, change: impl FnOnce(Entry) -> Entry) -> Entry {
        let old = self.get(page);
        self.set(page, change(old));
        old
    }

    /// Whether a page of `run` satisfies `test`.
    #[must_use]
    pub fn any(&self, run: Run<WindowPage>, test: impl Fn(Entry) -> bool) -> bool {
        run.pages().any(|page| test(self.get(page)))
    }

    /// Every word, in order.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        (0..self.page_count).map(|index| self.get(WindowPage(index)))
    }

    /// Bytes that the table occupies.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let allocated = self.blocks.iter().filter(|block| block.is_some()).count();
        let index = self.appearances.as_ref().map_or(0, |all| all.0.allocation_size());
        (self.blocks.len() * size_of::<usize>()
            + allocated * BLOCK_PAGES * size_of::<Entry>()
            + index) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(table: &Table, page: u64) -> i64 {
        table.get(WindowPage(page)).shown().number()
    }

    #[test]
    fn a_linear_window_costs_a_pointer_every_512_pages() {
        let table = Table::new(1 << 22, Origin::Linear(FilePage(7)), Prot::Read);
        assert_eq!(shown(&table, 0), 7);
        assert_eq!(shown(&table, (1 << 22) - 1), 7 + (1 << 22) - 1);
        assert_eq!(table.bytes(), (1 << 22) / 512 * 8);
    }

    #[test]
    fn a_fully_remapped_window_stays_below_16_bytes_a_page() {
        let mut table = Table::new(4096, Origin::Nothing, Prot::Read);
        for page in 0..4096 {
            table.set(WindowPage(page), Entry::new(Shown::File(FilePage(4095 - page)), Prot::Read));
        }
        assert!(table.bytes() <= 4096 * 16);
        assert_eq!(shown(&table, 0), 4095);
        assert_eq!(shown(&table, 4095), 0);
    }

    #[test]
    fn changing_a_page_leaves_its_neighbours() {
        let mut table = Table::new(700, Origin::Linear(FilePage(0)), Prot::Read);
        table.set(WindowPage(513), Entry::new(Shown::Placed, Prot::Read));
        assert_eq!([512, 513, 514, 699].map(|page| shown(&table, page)), [512, -2, 514, 699]);
    }

    #[test]
    fn counts_follow_every_change() {
        let mut table = Table::new(10, Origin::Linear(FilePage(0)), Prot::Read);
        let page = WindowPage(3);
        table.update(page, |entry| entry.with_present(true));
        assert_eq!(table.counts(), Counts { present: 1, ..Counts::default() });
        table.update(page, |entry| entry.with_present(false).with_prot(Prot::None));
        assert_eq!(table.counts(), Counts { denied: 1, ..Counts::default() });
        table.set(page, Entry::new(Shown::Placed, Prot::Read).with_present(true));
        assert_eq!(table.counts(), Counts { present: 1, placed: 1, ..Counts::default() });
        table.set(page, Entry::new(Shown::File(FilePage(3)), Prot::Write).with_present(true));
        table.update(page, |entry| entry.with_dirty(true));
        assert_eq!(table.counts(), Counts { present: 1, unsaved: 1, ..Counts::default() });
        table.update(page, |entry| entry.with_dirty(false).with_writing(true));
        assert_eq!(table.counts(), Counts { present: 1, unsaved: 1, ..Counts::default() });
        table.update(page, |entry| entry.with_present(false));
        assert_eq!(table.counts(), Counts::default());
    }

    #[test]
    fn only_blocks_in_use_are_looked_at() {
        let mut table = Table::new(5000, Origin::Linear(FilePage(0)), Prot::Write);
        assert_eq!(table.used_ranges(0..5000, 4096), []);
        table.allocate_ahead();
        assert_eq!(table.used_ranges(0..5000, 4096), []);
        table.update(WindowPage(600), |entry| entry.with_present(true));
        table.update(WindowPage(1024), |entry| entry.with_held(true));
        table.update(WindowPage(4999), |entry| entry.with_dirty(true).with_present(true));
        assert_eq!(table.used_ranges(0..5000, 4096), [512..1536, 4608..5000]);
        assert_eq!(table.used_ranges(700..4999, 512), [700..1024, 1024..1536, 4608..4999]);
        table.update(WindowPage(600), |entry| entry.with_present(false));
        assert_eq!(table.used_ranges(0..1024, 4096), []);
    }

    fn appearances(table: &Table, page: u64) -> Vec<u64> {
        let mut found: Vec<u64> = table.appearances(FilePage(page)).map(|page| page.0).collect();
        found.sort_unstable();
        found
    }

    #[test]
    fn a_file_page_is_found_where_it_is_shown() {
        let mut table =
            Table::new(2000, Origin::Linear(FilePage(10)), Prot::Write).with_appearances();
        assert_eq!(appearances(&table, 1510), [1500], "nothing was changed there");
        assert_eq!(appearances(&table, 9), []);
        assert_eq!(appearances(&table, 2010), []);
        table.set(WindowPage(3), Entry::new(Shown::File(FilePage(1510)), Prot::Read));
        assert_eq!(appearances(&table, 1510), [3, 1500]);
        assert_eq!(appearances(&table, 13), [], "it was shown there before");
        assert_eq!(appearances(&table, 14), [4], "its block was changed, not its page");
        table.set(WindowPage(1500), Entry::new(Shown::Placed, Prot::Write));
        table.set(WindowPage(3), Entry::new(Shown::File(FilePage(1510)), Prot::Write));
        assert_eq!(appearances(&table, 1510), [3]);
    }

    #[test]
    fn appearances_follow_any_changes() {
        const PAGES: u64 = 1500;
        let mut table = Table::new(PAGES, Origin::Nothing, Prot::Write).with_appearances();
        let mut state = 1_u64;
        let mut random = move |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        for _ in 0..20_000 {
            let shown = match random(8) {
                0 => Shown::Nothing,
                1 => Shown::Placed,
                _ => Shown::File(FilePage(random(300))),
            };
            table.set(WindowPage(random(PAGES)), Entry::new(shown, Prot::Write));
        }
        for page in 0..300 {
            let shows = |&index: &u64| shown(&table, index).cast_unsigned() == page;
            assert_eq!(appearances(&table, page), (0..PAGES).filter(shows).collect::<Vec<_>>());
        }
        assert!(table.bytes() <= PAGES * 24);
    }

    #[test]
    fn the_largest_file_page_is_neither_nothing_nor_placed() {
        let last = FilePage(Entry::MAX_FILE_PAGES - 1);
        let entry = Entry::new(Shown::File(last), Prot::Write);
        assert_eq!(entry.shown(), Shown::File(last));
        assert_eq!(entry.prot(), Prot::Write);
        assert!(!entry.present() && !entry.unreadable() && !entry.withheld());
    }

    #[test]
    fn becoming_present_or_absent_forgets_that_a_page_was_unreadable() {
        let entry = Entry::new(Shown::File(FilePage(1)), Prot::Read).with_unreadable();
        assert!(entry.unreadable() && !entry.present());
        assert!(!entry.with_present(true).unreadable());
        assert!(!entry.with_present(false).unreadable());
    }

    #[test]
    #[should_panic(expected = "present without access")]
    fn a_page_without_access_cannot_be_present() {
        let mut table = Table::new(1, Origin::Nothing, Prot::Read);
        table.set(WindowPage(0), Entry::new(Shown::Nothing, Prot::None).with_present(true));
    }
}
