//! What each window page shows, and in which state it is.
//!
//! The table owns one word a window page: the file page it shows, its
//! protection, and whether its content is in the window. It makes no system
//! call. Blocks of words exist only where a page was ever changed: a window that
//! is linear, or shows nothing, costs a pointer every 512 pages.

mod entry;

use std::ops::Range;

use hashbrown::HashTable;

pub use entry::{Change, Entry, Residency, Shown};

use crate::units::{FilePage, PageIndex, Prot, Run, WindowPage};

/// Words that are allocated together.
const BLOCK_PAGES: usize = 512;

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
    /// Pages that were written to, as far as the table knows, and are not in the store.
    pub dirty: u64,
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
        let uses = |entry: &Entry| entry.present() || entry.held();
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
    /// If the page is outside the window, or the word breaks an invariant of [`Entry`].
    pub fn set(&mut self, page: WindowPage, entry: Entry) {
        let old = self.get(page);
        if old == entry {
            return;
        }
        assert!(
            !entry.present() || entry.prot() != Prot::None,
            "{entry:?}: present without access"
        );
        assert!(
            entry.residency() != Residency::Denied || entry.prot() == Prot::None,
            "{entry:?}: denied with access"
        );
        assert!(entry.clean() || entry.present(), "{entry:?}: changed without being there");
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
        counts.dirty = add(counts.dirty, u64::from(!entry.clean()));
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
mod tests;
