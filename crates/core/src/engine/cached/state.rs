//! The state of a window that shows copies: its table, and what belongs to its pages.

use std::collections::HashMap;

use super::budget::Budget;
use super::frames::Tracking;
use super::page_tables::PageTables;
use super::reads::Reads;
use crate::error::Result;
use crate::plan::Members;
use crate::room::{check_growth, no_room, zeros};
use crate::store::Outgoing;
use crate::sys::span::Span;
use crate::sys::zeros::Zeros;
use crate::table::{Entry, Shown, Table};
use crate::units::{FilePage, PageSize, WindowPage};

/// Pages at which a file has ended while they were shown that faults have room for.
const MAX_CUT_PAGES: usize = 64;

/// The table and the content that is kept outside the window.
#[derive(Debug)]
pub struct State {
    pub(super) table: Table,
    /// Content of placed pages to which access was taken away.
    denied_content: HashMap<WindowPage, Vec<u8>>,
    /// The reads in progress for faults.
    pub reads: Reads,
    /// File pages that are shown as they were when the file ended within them, and
    /// how many bytes of them it had.
    cut: Vec<(FilePage, usize)>,
    /// The hash of each page's content in the store, where writes are found by it.
    hashes: Zeros<u128>,
    /// Pages were written since the store was last made durable.
    pub(super) unsynced: bool,
    /// How often each pinned page is pinned.
    pins: HashMap<WindowPage, u32>,
    pub(super) page_tables: PageTables,
    /// How often a page became present, and absent again.
    pub(super) pages_in: u64,
    pub(super) pages_out: u64,
    /// Where there is a budget, and the window does not fit into it.
    pub(super) budget: Option<Budget>,
    /// Pages of the call under way that nobody evicts meanwhile, not even a fault: it acts on
    /// what it has loaded.
    pub(super) staying: Option<Members>,
}

impl State {
    pub(super) fn new(table: Table, tracking: Option<Tracking>, page: PageSize) -> Result<Self> {
        let by_content = tracking == Some(Tracking::Content);
        let hashes = zeros("Window", if by_content { table.page_count() as usize } else { 0 })?;
        let (denied_content, cut) = (HashMap::new(), Vec::new());
        let page_tables = PageTables::new(&table, page)?;
        Ok(Self {
            table,
            denied_content,
            reads: Reads::default(),
            cut,
            hashes,
            unsynced: false,
            pins: HashMap::new(),
            page_tables,
            pages_in: 0,
            pages_out: 0,
            budget: None,
            staying: None,
        })
    }

    /// Makes sure that a signal handler that serves a fault allocates nothing.
    pub fn allocate_ahead(&mut self) {
        self.cut.reserve(MAX_CUT_PAGES);
    }

    /// Whether another page at which the file ends can be noted without allocating. Forgets
    /// those that no window page shows any more with something to be written.
    pub fn has_room_for_cut(&mut self) -> bool {
        if self.cut.len() >= MAX_CUT_PAGES {
            let table = &self.table;
            let needed = |entry: Entry| entry.present() || entry.held();
            self.cut.retain(|&(page, _)| {
                table.appearances(page).any(|window_page| needed(table.get(window_page)))
            });
        }
        self.cut.len() < MAX_CUT_PAGES
    }

    /// A file page was loaded, when the file had `file_bytes` bytes of it.
    pub fn note_loaded(&mut self, page: FilePage, file_bytes: usize, page_size: PageSize) {
        self.cut.retain(|&(cut, _)| cut != page);
        if file_bytes < page_size.bytes() {
            self.cut.push((page, file_bytes));
        }
    }

    /// File pages that were loaded when the file ended within them.
    pub(super) fn cut_pages(&self) -> impl Iterator<Item = FilePage> + '_ {
        self.cut.iter().map(|&(page, _)| page)
    }

    /// Bytes that the file had of a page when it was loaded.
    pub(super) fn file_bytes(&self, page: FilePage, page_size: PageSize) -> usize {
        let cut = self.cut.iter().find(|&&(cut, _)| cut == page);
        cut.map_or(page_size.bytes(), |&(_, file_bytes)| file_bytes)
    }

    /// The word of a page.
    pub fn get(&self, page: WindowPage) -> Entry {
        self.table.get(page)
    }

    /// Pages that calls are about to change.
    pub fn held_pages(&self) -> u64 {
        self.table.counts().held
    }

    /// Changes the word of a page for a call.
    pub(super) fn set(&mut self, page: WindowPage, entry: Entry) {
        self.reads.outdate(page);
        self.mark(page, entry);
    }

    /// The same for a page that shows something else from now on: denied content is lost.
    pub(super) fn replace(&mut self, page: WindowPage, entry: Entry) {
        if !self.denied_content.is_empty() {
            self.denied_content.remove(&page);
        }
        self.set(page, entry);
    }

    /// Keeps the content of a placed page to which access is taken away, for which there is
    /// [room](Self::reserve_denied).
    pub(super) fn keep_denied(&mut self, page: WindowPage, content: Vec<u8>) {
        self.denied_content.insert(page, content);
    }

    /// What [`keep_denied`](Self::keep_denied) has kept of a page.
    pub(super) fn denied_content(&self, page: WindowPage) -> Option<&[u8]> {
        self.denied_content.get(&page).map(Vec::as_slice)
    }

    /// A page is in the window again with its denied content.
    pub(super) fn forget_denied(&mut self, page: WindowPage) {
        self.denied_content.remove(&page);
    }

    /// Notes what the store has of a page, by its hash.
    pub(super) fn note_hash(&mut self, page: WindowPage, hash: u128) {
        self.hashes[page.0 as usize] = hash;
    }

    /// The hash of what the store has of a page, where it was noted.
    pub(super) fn hash(&self, page: WindowPage) -> u128 {
        self.hashes[page.0 as usize]
    }

    /// Marks a page absent before the kernel is asked to drop it. What is placed
    /// and has no denied content is lost with it.
    pub(super) fn begin_drop(&mut self, page: WindowPage) -> Entry {
        let old = self.get(page);
        if old.present() {
            let placed = old.shown() == Shown::Placed;
            let left = if placed { old.with_shown(Shown::Nothing) } else { old };
            self.set(page, left.begin_drop());
        } else {
            self.reads.outdate(page);
        }
        old
    }

    /// Changes the word of a page, but not what may be being read for it.
    pub fn mark(&mut self, page: WindowPage, entry: Entry) {
        // A page is pinned and held whatever it shows and wherever its content is.
        let old = self.get(page);
        let entry = entry.with_pinned(old.pinned());
        let entry = if old.held() { entry.hold() } else { entry };
        self.pages_in += u64::from(entry.present() && !old.present());
        self.pages_out += u64::from(old.present() && !entry.present());
        self.note_change(page, entry);
        self.table.set(page, entry);
    }

    /// Holds a page that is not held. A read in progress for it becomes out of date.
    pub(super) fn hold(&mut self, page: WindowPage) {
        debug_assert!(!self.get(page).held(), "held by somebody else");
        self.set(page, self.get(page).hold());
    }

    /// Ends the hold of a page, which the caller has.
    pub(super) fn release(&mut self, page: WindowPage) {
        self.table.set(page, self.get(page).released());
    }

    /// Allocates room to keep the content of more denied pages.
    pub(super) fn reserve_denied(&mut self, operation: &'static str, count: usize) -> Result<()> {
        let kept = &mut self.denied_content;
        let left = kept.capacity() - kept.len();
        check_growth::<(WindowPage, Vec<u8>)>(operation, (kept.len(), left), count)?;
        let reserved = kept.try_reserve(count);
        reserved.map_err(|_| no_room::<(WindowPage, Vec<u8>)>(operation, count))
    }

    /// Allocates room to pin more pages.
    pub(super) fn reserve_pins(&mut self, count: usize) -> Result<()> {
        let left = self.pins.capacity() - self.pins.len();
        check_growth::<(WindowPage, u32)>("pin", (self.pins.len(), left), count)?;
        self.pins.try_reserve(count).map_err(|_| no_room::<(WindowPage, u32)>("pin", count))
    }

    /// Pins a page once more, or once less.
    pub(super) fn change_pin(&mut self, page: WindowPage, pin: bool) {
        let count = self.pins.entry(page).or_insert(0);
        *count = if pin { *count + 1 } else { count.saturating_sub(1) };
        let pinned = *count > 0;
        if !pinned {
            self.pins.remove(&page);
        }
        let entry = self.get(page).with_pinned(pinned);
        self.note_change(page, entry);
        self.table.set(page, entry);
    }
}

/// A page that is being written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Writing {
    pub(super) window_page: WindowPage,
    pub(super) file_page: FilePage,
    /// Bytes of it that the file had when it was read.
    pub(super) file_bytes: usize,
}

impl Writing {
    pub(super) fn outgoing(self, content: Span<'_>) -> Outgoing<'_> {
        Outgoing { page: self.file_page, content, file_bytes: self.file_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Origin;
    use crate::units::Prot;

    /// Two calls must not take one page for theirs: what one does to it must not end the
    /// hold that the other waits for.
    #[test]
    fn a_hold_lasts_until_it_is_released_whatever_becomes_of_the_page() {
        let page_size = PageSize::new(4096, 4096).expect("a power of two");
        let table = Table::new(4, Origin::Linear(FilePage(0)), Prot::Write);
        let table = table.and_then(Table::with_appearances).unwrap();
        let mut state = State::new(table, Some(Tracking::Kernel), page_size).unwrap();
        let page = WindowPage(1);
        state.hold(page);
        let steps: [fn(Entry) -> Entry; 8] = [
            Entry::finish_load,
            Entry::note_write,
            Entry::finish_drop,
            Entry::fail_load,
            |_| Entry::new(Shown::File(FilePage(3)), Prot::Write),
            |_| Entry::new(Shown::Placed, Prot::Write).finish_load(),
            Entry::deny,
            |entry| entry.allow(Prot::Read),
        ];
        for step in steps {
            let entry = step(state.get(page));
            state.set(page, entry);
            assert!(state.get(page).held(), "{entry:?}");
        }
        state.mark(page, Entry::new(Shown::File(FilePage(3)), Prot::Read).finish_load());
        _ = state.begin_drop(page);
        assert_eq!(state.held_pages(), 1);
        state.release(page);
        assert_eq!(state.held_pages(), 0);
    }
}
