//! What each window page shows, and its state.
//!
//! The table has one word for each window page: the file page that it shows, its protection, and
//! whether its content is in the window. It makes no system call. It allocates nothing after it was
//! made, because all words have their addresses from the start. Blocks of words only use memory if
//! one of their pages was changed: a window that is linear, or shows nothing, takes one bit for
//! every 512 pages.

mod entry;

use std::ops::Range;

use hashbrown::HashTable;

pub use entry::{Entry, Residency, Shown};

use crate::error::Result;
use crate::room::{check_growth, no_room, push, zeros, Zeros};
use crate::units::{FilePage, PageIndex, Prot, Run, WindowPage};

/// Words that are written together for the first time: a page of memory.
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
/// Has the numbers of the window pages in blocks of which a page shows something else than it
/// did first; what the others show is reckoned. Five to eleven bytes a page.
#[derive(Debug, Default)]
struct Appearances(HashTable<u32>);

fn hash(page: FilePage) -> u64 {
    // Fibonacci hashing; the table takes its tags from the high bits and the place from the low.
    let mixed = page.0.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed ^ (mixed >> 32)
}

fn shown_hash(words: &[u64], number: u32) -> u64 {
    let entry = Entry::from_word(words[number as usize]);
    entry.shown().file_page().map_or(0, hash)
}

impl Appearances {
    /// The largest window whose pages can be numbered here.
    const MAX_PAGES: u64 = u32::MAX as u64;

    /// Window page `number` shows a page, as its word says by now.
    fn add(&mut self, number: u32, words: &[u64]) {
        self.0.insert_unique(shown_hash(words, number), number, |&other| shown_hash(words, other));
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
    /// The words of the blocks in use.
    words: Zeros<u64>,
    /// A bit for each block: whether it is in use.
    used: Zeros<u64>,
    /// A bit for each block: whether [`appearances`](Self::appearances) are listed.
    listed: Zeros<u64>,
    counts: Counts,
    /// Where it has to be known which window page shows a file page.
    appearances: Option<Appearances>,
}

fn split(page: WindowPage) -> (usize, usize) {
    let index = page.0 as usize;
    (index / BLOCK_PAGES, index % BLOCK_PAGES)
}

fn bit(bits: &[u64], block: usize) -> bool {
    bits[block / 64] & 1 << (block % 64) != 0
}

fn set_bit(bits: &mut [u64], block: usize) {
    bits[block / 64] |= 1 << (block % 64);
}

impl Table {
    /// The table of a window of `page_count` pages, all absent.
    pub fn new(page_count: u64, origin: Origin, prot: Prot) -> Result<Self> {
        let bits = (page_count as usize).div_ceil(BLOCK_PAGES).div_ceil(64);
        Ok(Self {
            page_count,
            origin,
            prot,
            words: zeros("Window", page_count as usize)?,
            used: zeros("Window", bits)?,
            listed: zeros("Window", 0)?,
            counts: Counts::default(),
            appearances: None,
        })
    }

    /// The largest table that can say where a file page appears.
    pub const MAX_PAGES_WITH_APPEARANCES: u64 = Appearances::MAX_PAGES;

    /// The same table, nothing of it changed yet, that can say where a file page appears.
    pub fn with_appearances(mut self) -> Result<Self> {
        assert!(self.page_count <= Appearances::MAX_PAGES, "pages that a number can name");
        assert!(self.used.iter().all(|&bits| bits == 0), "a table that was not changed");
        self.listed = zeros("Window", self.used.len())?;
        self.appearances = Some(Appearances::default());
        Ok(self)
    }

    /// Makes sure that [`set`](Self::set) has room to note that `pages` show something else.
    pub fn reserve_moves(
        &mut self,
        operation: &'static str,
        pages: impl IntoIterator<Item = WindowPage>,
    ) -> Result<()> {
        let Some(all) = &mut self.appearances else { return Ok(()) };
        let (mut added, mut last) = (0, None);
        for page in pages {
            let (block, _) = split(page);
            let unlisted = last != Some(block) && !bit(&self.listed, block);
            added += if unlisted { BLOCK_PAGES } else { 1 };
            last = Some(block);
        }
        // Each page is listed once.
        let added = added.min(self.page_count as usize - all.0.len());
        let words = &self.words;
        let left = all.0.capacity() - all.0.len();
        check_growth::<u64>(operation, (all.0.len(), left), added)?;
        let reserved = all.0.try_reserve(added, |&number| shown_hash(words, number));
        reserved.map_err(|_| no_room::<u64>(operation, added))
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
            |page: &WindowPage| page.0 < self.page_count && !bit(&self.listed, split(*page).0);
        listed.chain(linear.filter(unchanged))
    }

    /// Pages of the window.
    pub fn page_count(&self) -> u64 {
        self.page_count
    }

    /// How many pages are in which state.
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
    pub fn get(&self, page: WindowPage) -> Entry {
        assert!(page.0 < self.page_count, "page outside the window");
        if bit(&self.used, split(page).0) {
            Entry::from_word(self.words[page.0 as usize])
        } else {
            self.original(page)
        }
    }

    /// Pages from `page` on, up to the end of their block, that nothing was ever
    /// changed of.
    pub fn original_pages(&self, page: WindowPage) -> u64 {
        let (block, slot) = split(page);
        if bit(&self.used, block) {
            return 0;
        }
        ((BLOCK_PAGES - slot) as u64).min(self.page_count - page.0)
    }

    /// Adds pages that are present, from `from` on, to `present` until that is full, without
    /// a look at those of which nothing was ever changed. Says where to go on; None at the end.
    pub fn present_pages(
        &self,
        from: WindowPage,
        present: &mut Vec<WindowPage>,
    ) -> Option<WindowPage> {
        let mut page = from;
        while page.0 < self.page_count {
            let unused = self.original_pages(page);
            if unused > 0 {
                page = page.offset(unused);
                continue;
            }
            if self.get(page).present() {
                if present.len() == present.capacity() {
                    return Some(page);
                }
                present.push(page);
            }
            page = page.offset(1);
        }
        None
    }

    /// Ranges of `pages`, none longer than `most`, outside of which no page is present or
    /// about to change. Whole blocks are left out.
    pub fn used_ranges(
        &self,
        operation: &'static str,
        pages: Range<u64>,
        most: u64,
    ) -> Result<Vec<Range<u64>>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let uses = |&word: &u64| {
            let entry = Entry::from_word(word);
            entry.present() || entry.held()
        };
        let mut start = pages.start;
        while start < pages.end {
            let (block, slot) = split(WindowPage(start));
            let end = (start + (BLOCK_PAGES - slot) as u64).min(pages.end);
            if bit(&self.used, block) && self.words[self.pages_of(block)].iter().any(uses) {
                match ranges.last_mut().filter(|last| last.end == start && end - last.start <= most)
                {
                    Some(last) => last.end = end,
                    None => push(operation, &mut ranges, start..end)?,
                }
            }
            start = end;
        }
        Ok(ranges)
    }

    fn pages_of(&self, block: usize) -> Range<usize> {
        let first = block * BLOCK_PAGES;
        first..(first + BLOCK_PAGES).min(self.page_count as usize)
    }

    /// Replaces the word of `page`.
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
        let (block, _) = split(page);
        if !bit(&self.used, block) {
            self.begin_block(block);
        }
        let moved = old.shown() != entry.shown();
        if moved {
            self.list_block(block);
        }
        if let (true, Some(all), Shown::File(file)) = (moved, &mut self.appearances, old.shown()) {
            all.remove(page.0 as u32, file);
        }
        self.words[page.0 as usize] = entry.word();
        if let (true, Some(all), Shown::File(_)) = (moved, &mut self.appearances, entry.shown()) {
            all.add(page.0 as u32, &self.words);
        }
        self.count(old, u64::wrapping_sub);
        self.count(entry, u64::wrapping_add);
    }

    /// Writes the words of a block for the first time.
    fn begin_block(&mut self, block: usize) {
        for index in self.pages_of(block) {
            self.words[index] = self.original(WindowPage(index as u64)).word();
        }
        set_bit(&mut self.used, block);
    }

    /// Lists where the pages of a block in use are shown, before one shows something else for
    /// the first time.
    fn list_block(&mut self, block: usize) {
        let pages = self.pages_of(block);
        let Some(all) = &mut self.appearances else { return };
        if bit(&self.listed, block) {
            return;
        }
        set_bit(&mut self.listed, block);
        if matches!(self.origin, Origin::Linear(_)) {
            pages.for_each(|page| all.add(page as u32, &self.words));
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

    /// Changes the word of `page`.
    pub fn update(&mut self, page: WindowPage, change: impl FnOnce(Entry) -> Entry) {
        self.set(page, change(self.get(page)));
    }

    /// Whether a page of `run` satisfies `test`.
    pub fn any(&self, run: Run<WindowPage>, test: impl Fn(Entry) -> bool) -> bool {
        run.pages().any(|page| test(self.get(page)))
    }

    /// Bytes that the table occupies.
    pub fn bytes(&self) -> u64 {
        let blocks: u32 = self.used.iter().map(|bits| bits.count_ones()).sum();
        let words = (blocks as usize * BLOCK_PAGES).min(self.words.len());
        let index = self.appearances.as_ref().map_or(0, |all| all.0.allocation_size());
        ((words + self.used.len() + self.listed.len()) * size_of::<u64>() + index) as u64
    }
}

#[cfg(test)]
mod tests;
