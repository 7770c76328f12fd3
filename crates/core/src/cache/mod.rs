//! Which pages to evict from a window whose memory budget is full.
//!
//! A touch of a present page costs nothing and leaves no trace, so fremap does not see it. It sees
//! that a page is loaded, that a call names a page, and that an evicted page is loaded again soon.
//! The policy uses only that (`docs/decisions/005-eviction-policy.md`):
//!
//! - A page that is loaded is on *probation*. Pages on probation are evicted in the order in which
//!   they were loaded, so a scan is evicted in runs.
//! - An evicted page is remembered as a *ghost*: its file page, without content.
//! - A page is *protected* if it is loaded again while its ghost exists, or if a call names it
//!   while it is on probation.
//! - While more than a tenth of the budget is on probation, pages are evicted from there.
//!   Otherwise a protected page, chosen at random, is evicted and remembered as well.
//!
//! So a scan displaces at most a tenth of the budget, however long it is. The choice among
//! protected pages is random for two reasons: their order says nothing about their use, because
//! hits are invisible; and a loop over slightly more than the budget would always evict the page
//! that it needs next.
//!
//! Pure: no system call, no lock, the same victims for the same calls. Only [`Cache::new`],
//! [`Cache::resize`] and [`Cache::reserve`] allocate: 12 bytes a page of the budget, 2 of them for
//! ghosts.

use rustix::io::Errno;

use crate::room::Zeros;
use crate::units::{FilePage, WindowPage};

mod ghosts;
mod index;
#[cfg(test)]
mod tests;

use ghosts::{below, mix, Ghosts};
use index::Index;

/// Pages that may exceed the budget: a fault cannot be refused when
/// nothing can be evicted.
const SPARE_PAGES: usize = 512;
/// The part of the budget that probation keeps when protected pages are evicted.
const PROBATION_PART: usize = 10;
/// Victims that are taken at once, at most.
const BATCH_PAGES: usize = 64;
/// A batch is at most this part of the budget.
const BATCH_PART: usize = 64;

/// The two queues of pages that are present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Queue {
    Probation,
    Protected,
}

/// Slots in a row, perhaps round the end of the ring.
#[derive(Clone, Copy, Debug, Default)]
struct Stretch {
    start: usize,
    len: usize,
}

/// The pages that are present in a window, and which of them to evict next.
///
/// Invariants: each page that is in has one slot and one cell of the index. The
/// slots are a ring with two stretches, probation and protected, neither with holes,
/// that never overlap. Probation is in the order in which its pages came, except
/// that a page removed from its middle gives its place to the oldest. The
/// protected have no order, so that they can make way.
#[derive(Debug)]
pub struct Cache {
    capacity: usize,
    /// Numbers of window pages.
    slots: Zeros<u32>,
    index: Index,
    probation: Stretch,
    protected: Stretch,
    ghosts: Ghosts,
    /// Draws so far: the state of the random numbers.
    draws: u64,
}

impl Cache {
    /// An empty cache with a budget of `capacity_pages` pages.
    ///
    /// # Errors
    /// ENOMEM.
    ///
    /// # Panics
    /// If the budget is 2^32 pages or more. Window pages have to be below 2^32
    /// as well: the caller checks the size of its window.
    pub fn new(capacity_pages: u64) -> Result<Self, Errno> {
        let capacity = capacity_pages as usize;
        let slots = slots_for(capacity);
        Ok(Self {
            capacity,
            slots: Zeros::new(slots)?,
            index: Index::new(slots)?,
            probation: Stretch::default(),
            protected: Stretch::default(),
            ghosts: Ghosts::new(capacity)?,
            draws: 0,
        })
    }

    /// Pages of the budget.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity as u64
    }

    /// Pages that are present.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.count() as u64
    }

    /// Whether no page is present.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count() == 0
    }

    /// Whether a page is present.
    #[must_use]
    pub fn contains(&self, page: WindowPage) -> bool {
        self.find(page).is_some()
    }

    /// Pages to evict before `coming` more pages fit into the budget.
    #[must_use]
    pub fn excess(&self, coming: u64) -> u64 {
        (self.len() + coming).saturating_sub(self.capacity())
    }

    /// How many victims to take at once when a fault finds the budget full: few
    /// enough that probation is not emptied by it.
    #[must_use]
    pub fn batch_pages(&self) -> usize {
        (self.capacity / BATCH_PART).clamp(1, BATCH_PAGES)
    }

    /// Bytes that it takes once all of it has been used.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.slots.len() * size_of::<u32>() + self.index.bytes() + self.ghosts.bytes()) as u64
    }

    /// A page came into the window, showing `file_page`. If it is in already, it
    /// shows something else from now on, and what it showed is not remembered.
    ///
    /// # Panics
    /// If there is no room: the budget is exceeded by 512 pages and by what was
    /// reserved. If the page is not below 2^32.
    pub fn inserted(&mut self, page: WindowPage, file_page: FilePage) {
        let number = u32::try_from(page.0).expect("a window of less than 2^32 pages");
        self.removed(page);
        let known = self.ghosts.take(file_page);
        self.push(if known { Queue::Protected } else { Queue::Probation }, number);
    }

    /// A page was dropped for another reason than the budget, or can no longer be evicted
    /// (pinned, placed). Says whether it was in.
    pub fn removed(&mut self, page: WindowPage) -> bool {
        let Some(slot) = self.find(page) else {
            return false;
        };
        self.remove(slot);
        true
    }

    /// A call named a page. Does nothing for a page that is not present.
    pub fn touched(&mut self, page: WindowPage) {
        let Some(slot) = self.find(page) else {
            return;
        };
        if self.queue_of(slot) == Queue::Probation {
            let number = self.remove(slot);
            self.push(Queue::Protected, number);
        }
    }

    /// Takes up to `count` pages out and appends them to `out`, which has room for
    /// them if nothing is to be allocated. Fewer only if no other page may leave.
    ///
    /// `shows` answers with the file page that a page shows, or with None if it
    /// may not leave now. It is asked at most three times about each page that stays,
    /// so pages that will not leave for long had better be [`removed`](Self::removed).
    ///
    /// A victim that stays in the window after all is [`inserted`](Self::inserted)
    /// again, and will be protected.
    pub fn victims(
        &mut self,
        count: usize,
        shows: impl Fn(WindowPage) -> Option<FilePage>,
        out: &mut Vec<WindowPage>,
    ) {
        let target = self.capacity / PROBATION_PART;
        // Pages on probation, and protected ones in a row, that may not leave.
        let (mut kept, mut stay) = (0, 0);
        let mut at = None;
        for _ in 0..count {
            let mut taken = None;
            if self.probation.len > target {
                taken = self.take_probation(&mut kept, &shows);
            }
            if taken.is_none() {
                taken = self.take_protected(&mut at, &mut stay, &shows);
            }
            if taken.is_none() {
                taken = self.take_probation(&mut kept, &shows);
            }
            let Some((page, file_page)) = taken else {
                return;
            };
            self.ghosts.remember(file_page);
            out.push(page);
        }
    }

    /// Appends up to `count` pages to `out` that will probably be evicted next and are `wanted`.
    /// They stay present.
    pub fn next(
        &self,
        count: usize,
        wanted: impl Fn(WindowPage) -> bool,
        out: &mut Vec<WindowPage>,
    ) {
        let on_probation = (0..self.probation.len).map(|at| self.after(self.probation.start, at));
        // As one that is drawn, and those behind it, which leave where it may not.
        let drawn = below(mix(self.draws + 1), self.protected.len.max(1));
        let protected = (0..self.protected.len).map(|at| {
            let position = (drawn + at) % self.protected.len;
            self.after(self.protected.start, position)
        });
        let page = |slot: usize| WindowPage(self.slots[slot].into());
        if self.probation.len > self.capacity / PROBATION_PART {
            let slots = on_probation.chain(protected);
            out.extend(slots.map(page).filter(|&page| wanted(page)).take(count));
        } else {
            let slots = protected.chain(on_probation);
            out.extend(slots.map(page).filter(|&page| wanted(page)).take(count));
        }
    }

    /// A present page is evicted and remembered as a ghost; returns whether it was present.
    pub fn left(&mut self, page: WindowPage, file_page: FilePage) -> bool {
        let was_in = self.removed(page);
        if was_in {
            self.ghosts.remember(file_page);
        }
        was_in
    }

    /// A victim stays after all, because it was changed: it becomes the last on probation.
    pub fn stayed(&mut self, page: WindowPage, file_page: FilePage) {
        self.ghosts.take(file_page);
        self.inserted(page, file_page);
    }

    /// Makes the budget `capacity_pages` pages. Nothing leaves: [`excess`](Self::excess)
    /// says how many have to. Allocates; the ghosts are forgotten if their number
    /// is off by more than a factor of two (so they may be 4 bytes a page after it).
    ///
    /// # Errors
    /// ENOMEM: nothing has changed.
    pub fn resize(&mut self, capacity_pages: u64) -> Result<(), Errno> {
        let capacity = capacity_pages as usize;
        let fits = (capacity / 2..=capacity * 2).contains(&self.ghosts.limit());
        let ghosts = (!fits).then(|| Ghosts::new(capacity)).transpose()?;
        self.rebuild(slots_for(capacity.max(self.count())))?;
        self.capacity = capacity;
        if let Some(ghosts) = ghosts {
            self.ghosts = ghosts;
        }
        Ok(())
    }

    /// Allocates room for `coming` more pages, beyond the budget if necessary.
    ///
    /// # Errors
    /// ENOMEM: nothing has changed.
    pub fn reserve(&mut self, coming: u64) -> Result<(), Errno> {
        let needed = self.count() + coming as usize;
        if needed > self.slots.len() {
            self.rebuild(slots_for(needed))?;
        }
        Ok(())
    }

    fn count(&self) -> usize {
        self.probation.len + self.protected.len
    }

    fn find(&self, page: WindowPage) -> Option<usize> {
        self.index.find(u32::try_from(page.0).ok()?, &self.slots)
    }

    /// The slot `offset` (at most a turn) after `slot`.
    fn after(&self, slot: usize, offset: usize) -> usize {
        let next = slot + offset;
        next.checked_sub(self.slots.len()).unwrap_or(next)
    }

    fn end(&self, stretch: Stretch) -> usize {
        self.after(stretch.start, stretch.len)
    }

    fn queue_of(&self, slot: usize) -> Queue {
        let from_start = self.after(slot, self.slots.len() - self.probation.start);
        if from_start < self.probation.len {
            Queue::Probation
        } else {
            Queue::Protected
        }
    }

    fn relocate(&mut self, from: usize, to: usize) {
        if from != to {
            let number = self.slots[from];
            self.index.update(number, from, to);
            self.slots[to] = number;
        }
    }

    /// Adds a page that is not present.
    fn push(&mut self, queue: Queue, number: u32) {
        assert!(self.count() < self.slots.len(), "pages leave before others come");
        if self.protected.len == 0 {
            self.protected.start = self.end(self.probation);
        }
        let slot = match queue {
            Queue::Probation => {
                let slot = self.end(self.probation);
                if self.protected.len > 0 && slot == self.protected.start {
                    self.relocate(slot, self.end(self.protected));
                    self.protected.start = self.after(slot, 1);
                }
                self.probation.len += 1;
                slot
            }
            Queue::Protected => {
                let mut slot = self.end(self.protected);
                if self.protected.len > 0 && slot == self.probation.start {
                    slot = self.after(self.protected.start, self.slots.len() - 1);
                    self.protected.start = slot;
                }
                self.protected.len += 1;
                slot
            }
        };
        self.slots[slot] = number;
        self.index.insert(number, slot);
    }

    /// Takes the page out that stands in `slot`.
    fn remove(&mut self, slot: usize) -> u32 {
        let number = self.slots[slot];
        self.index.remove(number, slot, &self.slots);
        match self.queue_of(slot) {
            Queue::Probation => {
                self.relocate(self.probation.start, slot);
                self.probation.start = self.after(self.probation.start, 1);
                self.probation.len -= 1;
            }
            Queue::Protected => {
                self.protected.len -= 1;
                self.relocate(self.end(self.protected), slot);
            }
        }
        number
    }

    /// The oldest page on probation that may leave. Those that may not, counted in
    /// `kept`, go to the end; with one turn all have been asked.
    fn take_probation(
        &mut self,
        kept: &mut usize,
        shows: impl Fn(WindowPage) -> Option<FilePage>,
    ) -> Option<(WindowPage, FilePage)> {
        while *kept < self.probation.len {
            let number = self.remove(self.probation.start);
            let page = WindowPage(number.into());
            if let Some(file_page) = shows(page) {
                return Some((page, file_page));
            }
            self.push(Queue::Probation, number);
            *kept += 1;
        }
        None
    }

    /// A protected page that may leave: any, as long as each drawn may, else the
    /// next from there. `stay` counts those in a row that may not; with a turn of
    /// them nothing is left.
    fn take_protected(
        &mut self,
        at: &mut Option<usize>,
        stay: &mut usize,
        shows: impl Fn(WindowPage) -> Option<FilePage>,
    ) -> Option<(WindowPage, FilePage)> {
        while *stay < self.protected.len {
            let drawn = at.unwrap_or_else(|| {
                self.draws += 1;
                below(mix(self.draws), self.protected.len)
            });
            let position = if drawn < self.protected.len { drawn } else { 0 };
            let slot = self.after(self.protected.start, position);
            let page = WindowPage(self.slots[slot].into());
            if let Some(file_page) = shows(page) {
                self.remove(slot);
                *stay = 0;
                *at = at.map(|_| position);
                return Some((page, file_page));
            }
            *stay += 1;
            *at = Some(position + 1);
        }
        None
    }

    /// Moves all that is in to as many slots.
    fn rebuild(&mut self, slots: usize) -> Result<(), Errno> {
        let (new, index) = (Zeros::new(slots)?, Index::new(slots)?);
        let ring = std::mem::replace(&mut self.slots, new);
        self.index = index;
        let (probation, protected) = (self.probation, self.protected);
        self.probation = Stretch::default();
        self.protected = Stretch::default();
        for (queue, stretch) in [(Queue::Probation, probation), (Queue::Protected, protected)] {
            for slot in stretch.start..stretch.start + stretch.len {
                self.push(queue, ring[slot % ring.len()]);
            }
        }
        Ok(())
    }
}

/// Slots for a number of pages.
fn slots_for(pages: usize) -> usize {
    let slots = pages.saturating_add(SPARE_PAGES);
    assert!(slots < u32::MAX as usize, "a budget of less than 2^32 pages");
    slots
}
