//! What each window page shows, and in which state it is.
//!
//! The table owns one word a window page: the file page it shows, its
//! protection, and whether its content is in the window. It makes no system
//! call. Blocks of words exist only where a page was ever changed: a window that
//! is linear, or shows nothing, costs a pointer every 512 pages.

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
/// an unreadable page is not present.
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
        let rest = Self::UNREADABLE | Self::WITHHELD | Self::LINGERING;
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
}

/// One word for each page of a window.
#[derive(Debug)]
pub struct Table {
    page_count: u64,
    origin: Origin,
    prot: Prot,
    blocks: Vec<Option<Box<[Entry; BLOCK_PAGES]>>>,
    counts: Counts,
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
        let mut table =
            Self { page_count, origin, prot, blocks: Vec::new(), counts: Counts::default() };
        table.blocks.resize_with(blocks, || None);
        table
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
        let first = WindowPage((block * BLOCK_PAGES) as u64);
        if self.blocks[block].is_none() {
            let mut words = Box::new([Entry::new(Shown::Nothing, self.prot); BLOCK_PAGES]);
            for (word, index) in words.iter_mut().zip(first.0..self.page_count) {
                *word = self.original(WindowPage(index));
            }
            self.blocks[block] = Some(words);
        }
        self.blocks[block].as_mut().expect("made above")[slot] = entry;
        self.count(old, u64::wrapping_sub);
        self.count(entry, u64::wrapping_add);
    }

    fn count(&mut self, entry: Entry, add: fn(u64, u64) -> u64) {
        let counts = &mut self.counts;
        counts.present = add(counts.present, u64::from(entry.present()));
        counts.placed = add(counts.placed, u64::from(entry.shown() == Shown::Placed));
        counts.denied = add(counts.denied, u64::from(entry.prot() == Prot::None));
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
        (self.blocks.len() * size_of::<usize>() + allocated * BLOCK_PAGES * size_of::<Entry>())
            as u64
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
        assert_eq!(table.counts(), Counts { present: 1, placed: 0, denied: 0 });
        table.update(page, |entry| entry.with_present(false).with_prot(Prot::None));
        assert_eq!(table.counts(), Counts { present: 0, placed: 0, denied: 1 });
        table.set(page, Entry::new(Shown::Placed, Prot::Read).with_present(true));
        assert_eq!(table.counts(), Counts { present: 1, placed: 1, denied: 0 });
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
