//! Which extent is in which slot, which process holds it, and what is evicted: every change of the
//! table.
//!
//! Pure: a [`Table`] changes the words of a [`Words`], which is memory of several processes or of a
//! test. The memory of several processes is reached by the guard of their lock
//! (`object::Locked`).
//!
//! A process may be killed between any two writes, so each write leaves the authoritative words
//! consistent:
//!
//! - A slot's *word* is its whole state: empty; being loaded or written (which extent, by which
//!   process); or loaded (which extent).
//! - Each process has its own row of *holds*, one word for each slot: running calls, and pins.
//! - A process is an *owner* from when its row is cleared until it is cleared again.
//!
//! Everything else (totals of holds, the hash index, the list of free slots, counts) follows from
//! these, and [`Table::repair`] rebuilds it. [`Table::dismiss`] takes back what a dead process held
//! or was loading.

use super::layout::{header, Counter, Layout, MOST_OWNERS};
use super::words::{Content, Holds, Link, OwnerIndex, PIN, USER};
use crate::slot_table::{Arrival, Key, Slot};

/// Memory in words, which others change only under the same lock.
pub trait Words {
    /// The word at a place; 0 beyond the end.
    fn get(&self, at: usize) -> u64;
    /// Changes it at once; nothing beyond the end.
    fn set(&self, at: usize, value: u64);
}

/// Uses of an extent that are remembered.
const MOST_USES: u32 = 3;
/// One in so many slots is for extents that were named once.
const PROBATION_PART: u64 = 10;
/// How many random extents are compared: the least used of them is evicted.
const SAMPLE: u64 = 8;

/// Slots that a call was given.
#[derive(Clone, Debug, Default)]
pub struct Given {
    /// Each key once, rising, with its slot.
    pub distinct: Vec<(Key, Slot)>,
    /// Those of them that are to be brought.
    pub missing: Vec<(Key, Slot)>,
}

/// Why a call was given no slots. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Calls under way need the room.
    Busy,
    /// There will be no room even when they have finished, because others have pinned slots.
    Full {
        /// Slots that are pinned for other extents.
        pinned: usize,
    },
}

/// The table.
pub struct Table<'t, W> {
    memory: &'t W,
    layout: &'t Layout,
}

fn hash(key: Key) -> u64 {
    // Fibonacci hashing: keys that follow each other are spread.
    key.0.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32)
}

impl<'t, W: Words> Table<'t, W> {
    pub fn new(memory: &'t W, layout: &'t Layout) -> Self {
        Self { memory, layout }
    }

    // Words.

    fn get(&self, at: usize) -> u64 {
        self.memory.get(at)
    }

    fn set(&self, at: usize, value: u64) {
        self.memory.set(at, value);
    }

    fn add(&self, at: usize, count: u64) {
        self.set(at, self.get(at).wrapping_add(count));
    }

    fn take(&self, at: usize, count: u64) {
        self.set(at, self.get(at).saturating_sub(count));
    }

    fn slots(&self) -> impl DoubleEndedIterator<Item = Slot> {
        (0..self.layout.slot_count as u32).map(Slot)
    }

    /// A word, for tests.
    #[cfg(test)]
    pub fn word(&self, at: usize) -> u64 {
        self.get(at)
    }

    /// What a slot's word says.
    pub fn content(&self, slot: Slot) -> Content {
        Content::of(self.get(self.layout.words + slot.0 as usize))
    }

    fn set_content(&self, slot: Slot, content: Content) {
        self.set(self.layout.words + slot.0 as usize, content.word());
    }

    /// The holds of all processes on a slot.
    pub fn total(&self, slot: Slot) -> Holds {
        Holds::of(self.get(self.layout.totals + slot.0 as usize))
    }

    fn set_total(&self, slot: Slot, holds: Holds) {
        self.set(self.layout.totals + slot.0 as usize, holds.word());
    }

    fn row(&self, owner: OwnerIndex, slot: Slot) -> usize {
        self.layout.holds + owner.0 * self.layout.holds_words + slot.0 as usize
    }

    /// The holds of a process on a slot.
    pub fn holds(&self, owner: OwnerIndex, slot: Slot) -> Holds {
        Holds::of(self.get(self.row(owner, slot)))
    }

    fn link(&self, slot: Slot) -> Link {
        Link::of(self.get(self.layout.links + slot.0 as usize))
    }

    fn set_link(&self, slot: Slot, link: Link) {
        self.set(self.layout.links + slot.0 as usize, link.word());
    }

    // Counters.

    /// How often something was done.
    pub fn counter(&self, counter: Counter) -> u64 {
        self.get(header::COUNTERS + counter as usize)
    }

    /// Counts it.
    pub fn count(&self, counter: Counter, count: usize) {
        if count > 0 {
            self.add(header::COUNTERS + counter as usize, count as u64);
        }
    }

    /// Slots whose extent is there, and slots that are pinned.
    pub fn counts(&self) -> (u64, u64) {
        (self.get(header::FILLED_COUNT), self.get(header::PINNED_COUNT))
    }

    // The hash index.

    fn bucket(&self, key: Key) -> usize {
        self.layout.buckets + (hash(key) as usize & (self.layout.bucket_count - 1))
    }

    /// The slot that a list's number from 1 means.
    fn numbered(&self, number: u64) -> Option<Slot> {
        let slot = u32::try_from(number.checked_sub(1)?).ok()?;
        ((slot as usize) < self.layout.slot_count).then_some(Slot(slot))
    }

    /// The slot that a key's extent is in, or comes to.
    pub fn find(&self, key: Key) -> Option<Slot> {
        let mut next = self.get(self.bucket(key));
        // No list is longer, whatever has happened to it.
        for _ in 0..self.layout.slot_count {
            let slot = self.numbered(next)?;
            if self.content(slot).key() == Some(key) {
                return Some(slot);
            }
            next = self.link(slot).next.into();
        }
        None
    }

    fn insert(&self, key: Key, slot: Slot, uses: u32) {
        let bucket = self.bucket(key);
        self.set_link(slot, Link { next: self.get(bucket) as u32, uses });
        self.set(bucket, u64::from(slot.0) + 1);
    }

    fn remove(&self, key: Key, slot: Slot) {
        let bucket = self.bucket(key);
        let next = self.link(slot).next;
        if self.numbered(self.get(bucket)) == Some(slot) {
            self.set(bucket, next.into());
            return;
        }
        let mut before = self.numbered(self.get(bucket));
        for _ in 0..self.layout.slot_count {
            let Some(at) = before else { return };
            let link = self.link(at);
            if link.next == slot.0 + 1 {
                self.set_link(at, Link { next, ..link });
                return;
            }
            before = self.numbered(link.next.into());
        }
    }

    // Free slots.

    fn push_free(&self, slot: Slot) {
        self.set_link(slot, Link { next: self.get(header::FREE) as u32, uses: 0 });
        self.set(header::FREE, u64::from(slot.0) + 1);
        self.add(header::FREE_COUNT, 1);
    }

    fn pop_free(&self) -> Option<Slot> {
        let slot = self.numbered(self.get(header::FREE))?;
        self.set(header::FREE, self.link(slot).next.into());
        self.take(header::FREE_COUNT, 1);
        Some(slot)
    }

    // Holds.

    /// Adds holds of a process on a slot.
    fn hold(&self, owner: OwnerIndex, slot: Slot, more: Holds) {
        let row = self.row(owner, slot);
        self.set(row, Holds::of(self.get(row)).plus(more).word());
        let before = self.total(slot);
        self.set_total(slot, before.plus(more));
        if before == Holds::default() {
            if let Content::Here(_) = self.content(slot) {
                self.take(header::IDLE_COUNT, 1);
            }
        }
        if before.pins == 0 && more.pins > 0 {
            self.add(header::PINNED_COUNT, 1);
        }
    }

    /// Takes holds of a process on a slot away.
    fn let_go(&self, owner: OwnerIndex, slot: Slot, less: Holds) {
        let row = self.row(owner, slot);
        self.set(row, Holds::of(self.get(row)).minus(less).word());
        self.lower_total(slot, less);
    }

    fn lower_total(&self, slot: Slot, less: Holds) {
        let before = self.total(slot);
        let after = before.minus(less);
        self.set_total(slot, after);
        if before.pins > 0 && after.pins == 0 {
            self.take(header::PINNED_COUNT, 1);
        }
        if before != Holds::default() && after == Holds::default() {
            match self.content(slot) {
                Content::Empty => self.push_free(slot),
                Content::Here(_) => self.add(header::IDLE_COUNT, 1),
                // Nobody brings it: he would hold it. `repair` finds none either.
                Content::Coming(key, _) | Content::Writing(key, _) => {
                    self.empty(slot, key);
                    self.push_free(slot);
                }
            }
        }
    }

    /// Has a slot show nothing. It is in no list afterwards.
    fn empty(&self, slot: Slot, key: Key) {
        let content = self.content(slot);
        self.set_content(slot, Content::Empty);
        if let Content::Here(_) = content {
            self.take(header::FILLED_COUNT, 1);
            self.take(header::PROBATION_COUNT, u64::from(self.link(slot).uses == 0));
            if self.total(slot) == Holds::default() {
                self.take(header::IDLE_COUNT, 1);
            }
        }
        self.remove(key, slot);
    }

    // What calls do.

    /// The slots of these keys if all of them are there. They may leave at any time.
    pub fn hit(&self, keys: &[Key], slots: &mut Vec<Slot>) -> bool {
        for &key in keys {
            match self.find(key) {
                Some(slot) if self.content(slot) == Content::Here(key) => slots.push(slot),
                _ => return false,
            }
        }
        for &slot in &*slots {
            self.touch(slot);
        }
        self.count(Counter::Hits, keys.len());
        true
    }

    fn touch(&self, slot: Slot) {
        let link = self.link(slot);
        if link.uses < MOST_USES {
            self.set_link(slot, Link { uses: link.uses + 1, ..link });
            if link.uses == 0 && matches!(self.content(slot), Content::Here(_)) {
                self.take(header::PROBATION_COUNT, 1);
            }
        }
    }

    /// Takes a slot for each of these keys, at once for all of them: none leaves before the
    /// process lets go. With `writes` the process is to bring all of them, in other slots than
    /// those that they are in; whoever holds these keeps them. One process at a time writes an
    /// extent, so that what the slot shows in the end is what the store has.
    ///
    /// `rising` are the keys, each once; `given` has room for them, and is empty. `named` is how
    /// often they were named.
    pub fn reserve(
        &self,
        owner: OwnerIndex,
        rising: &[Key],
        (named, writes): (usize, bool),
        given: &mut Given,
    ) -> Result<(), Refusal> {
        let is_written = |key: &Key| {
            let content = self.find(*key).map(|slot| self.content(slot));
            matches!(content, Some(Content::Writing(..)))
        };
        if writes && rising.iter().any(is_written) {
            return Err(Refusal::Busy);
        }
        let here = |key: &&Key| !writes && self.find(**key).is_some();
        let wanted = rising.len() - rising.iter().filter(here).count();
        let own_pinned = rising.iter().filter(here).filter_map(|key| self.find(*key));
        let own_pinned = own_pinned.filter(|&slot| self.total(slot).pins > 0).count();
        let pinned = (self.get(header::PINNED_COUNT) as usize).saturating_sub(own_pinned);
        if rising.len().saturating_add(pinned) > self.layout.slot_count {
            return Err(Refusal::Full { pinned });
        }
        // Before others leave: what is named stays.
        let found = |key: &Key| if writes { None } else { self.find(*key) };
        for slot in rising.iter().filter_map(found) {
            self.hold(owner, slot, USER);
        }
        let room = self.get(header::FREE_COUNT).saturating_add(self.get(header::IDLE_COUNT));
        // Also with `writes`: evicting an extent that nobody holds leaves their sum as it is.
        if (room as usize) < wanted {
            for slot in rising.iter().filter_map(found) {
                self.let_go(owner, slot, USER);
            }
            return Err(Refusal::Busy);
        }
        if writes {
            for &key in rising {
                self.evict(key);
            }
        }
        for &key in rising {
            let slot = if let Some(slot) = self.find(key) {
                self.touch(slot);
                slot
            } else {
                let Some(slot) = self.vacate() else {
                    // The counts promised more than there is: somebody has written over them.
                    self.settle(owner, &given.missing, 0);
                    self.release(owner, &given.distinct);
                    for slot in rising[given.distinct.len()..].iter().filter_map(found) {
                        self.let_go(owner, slot, USER);
                    }
                    given.missing.clear();
                    given.distinct.clear();
                    self.repair();
                    return Err(Refusal::Busy);
                };
                self.hold(owner, slot, USER);
                let made = if writes { Content::Writing } else { Content::Coming };
                self.set_content(slot, made(key, owner));
                self.insert(key, slot, u32::from(self.returns(key)));
                given.missing.push((key, slot));
                slot
            };
            given.distinct.push((key, slot));
        }
        self.count(Counter::Misses, given.missing.len());
        self.count(Counter::Hits, named - given.missing.len());
        Ok(())
    }

    /// An empty slot that no process holds; if there is none, one is emptied.
    ///
    /// As in the slots of one process (`docs/decisions/005-eviction-policy.md`), what was named
    /// once leaves first, in the order of the slots, while it is more than a tenth: a scan
    /// displaces no more. Else the least used of a few that are chosen at random leaves, and the
    /// others lose a use: a loop over a bit more than the slots would meet each extent just
    /// after it left, if there were an order.
    fn vacate(&self) -> Option<Slot> {
        if let Some(slot) = self.pop_free() {
            return Some(slot);
        }
        let count = self.layout.slot_count as u64;
        let mut spares_used = self.get(header::PROBATION_COUNT) > count / PROBATION_PART;
        if !spares_used {
            if let Some((slot, key)) = self.least_used_of_some() {
                self.leave(slot, key);
                return Some(slot);
            }
        }
        let mut hand = self.get(header::HAND) % count;
        for passed in 0..count * (u64::from(MOST_USES) + 2) {
            // Those on probation are all held.
            spares_used &= passed < count;
            let slot = Slot(hand as u32);
            hand = (hand + 1) % count;
            let Content::Here(key) = self.content(slot) else { continue };
            if self.total(slot) != Holds::default() {
                continue;
            }
            let link = self.link(slot);
            if link.uses == 0 {
                self.set(header::HAND, hand);
                self.leave(slot, key);
                return Some(slot);
            }
            if !spares_used {
                self.forget_use(slot);
            }
        }
        None
    }

    /// An extent that may leave, of some that are chosen by the number of those that left.
    fn least_used_of_some(&self) -> Option<(Slot, Key)> {
        let count = self.layout.slot_count as u64;
        let seed = hash(Key(self.counter(Counter::Evictions)));
        let chosen = |number: u64| {
            let slot = Slot((hash(Key(seed.wrapping_add(number))) % count) as u32);
            match self.content(slot) {
                Content::Here(key) if self.total(slot) == Holds::default() => Some((slot, key)),
                _ => None,
            }
        };
        let some = (0..SAMPLE).filter_map(chosen);
        let least = some.min_by_key(|&(slot, _)| self.link(slot).uses)?;
        for (slot, _) in (0..SAMPLE).filter_map(chosen) {
            if slot != least.0 && self.link(slot).uses > 0 {
                self.forget_use(slot);
            }
        }
        Some(least)
    }

    fn forget_use(&self, slot: Slot) {
        let link = self.link(slot);
        self.set_link(slot, Link { uses: link.uses - 1, ..link });
        self.add(header::PROBATION_COUNT, u64::from(link.uses == 1));
    }

    /// An extent makes room for another.
    fn leave(&self, slot: Slot, key: Key) {
        self.empty(slot, key);
        self.remember(key);
        self.count(Counter::Evictions, 1);
    }

    /// Remembers the key of an extent that leaves.
    fn remember(&self, key: Key) {
        let at = self.layout.ghosts + (hash(key) as usize & (self.layout.bucket_count - 1));
        self.set(at, key.0 + 1);
    }

    /// Whether an extent left not long ago.
    fn returns(&self, key: Key) -> bool {
        let at = self.layout.ghosts + (hash(key) as usize & (self.layout.bucket_count - 1));
        self.get(at) == key.0 + 1
    }

    /// Says that the first `done` of what was missing has arrived, and the rest will not. What
    /// was evicted meanwhile stays so: it may have been read before it changed.
    pub fn settle(&self, owner: OwnerIndex, missing: &[(Key, Slot)], done: usize) {
        for (position, &(key, slot)) in missing.iter().enumerate() {
            let content = self.content(slot);
            if content.key() != Some(key) || content.bringer() != Some(owner) {
                continue;
            }
            if position < done {
                self.set_content(slot, Content::Here(key));
                self.add(header::FILLED_COUNT, 1);
                self.add(header::PROBATION_COUNT, u64::from(self.link(slot).uses == 0));
                self.count(Counter::Arrivals, 1);
            } else {
                self.empty(slot, key);
            }
        }
    }

    /// Whether what a call was given is there.
    pub fn arrival(&self, distinct: &[(Key, Slot)]) -> Arrival {
        let mut arrival = Arrival::Here;
        for &(key, slot) in distinct {
            match self.content(slot) {
                Content::Here(other) if other == key => {}
                content if content.key() == Some(key) => arrival = Arrival::Coming,
                _ => return Arrival::Lost,
            }
        }
        arrival
    }

    /// The call is over: its extents may leave.
    pub fn release(&self, owner: OwnerIndex, distinct: &[(Key, Slot)]) {
        for &(_, slot) in distinct {
            self.let_go(owner, slot, USER);
        }
    }

    /// The call is over, but its extents stay until they are let go of.
    pub fn pin(&self, owner: OwnerIndex, distinct: &[(Key, Slot)]) {
        for &(_, slot) in distinct {
            self.hold(owner, slot, PIN);
            self.let_go(owner, slot, USER);
        }
    }

    /// A pin is over.
    pub fn unpin(&self, owner: OwnerIndex, distinct: &[(Key, Slot)]) {
        for &(_, slot) in distinct {
            self.let_go(owner, slot, PIN);
        }
    }

    /// Has a key's slot show nothing, if it has one, so that the next call reads it again. Who
    /// holds the slot keeps its content. What is being written stays, as it will be what the
    /// store has. Says whether the extent was there.
    pub fn evict(&self, key: Key) -> bool {
        let Some(slot) = self.find(key) else { return false };
        let was_here = match self.content(slot) {
            Content::Here(_) => true,
            Content::Coming(..) | Content::Empty => false,
            Content::Writing(..) => return false,
        };
        self.empty(slot, key);
        if self.total(slot) == Holds::default() {
            self.push_free(slot);
        }
        self.count(Counter::Evictions, usize::from(was_here));
        was_here
    }

    // Owners.

    /// The process that an owner is, 0 for none.
    pub fn owner(&self, owner: OwnerIndex) -> u64 {
        self.get(self.layout.owners + owner.0)
    }

    /// Owners there are, with the process of each.
    pub fn owners(&self) -> impl Iterator<Item = (OwnerIndex, u64)> + '_ {
        let all = (0..MOST_OWNERS).map(OwnerIndex);
        all.map(|owner| (owner, self.owner(owner))).filter(|&(_, process)| process != 0)
    }

    /// A number that no process has.
    pub fn vacancy(&self) -> Option<OwnerIndex> {
        (0..MOST_OWNERS).map(OwnerIndex).find(|&owner| self.owner(owner) == 0)
    }

    /// Has a process be an owner, which holds nothing yet.
    pub fn admit(&self, owner: OwnerIndex, process: u64) {
        for slot in self.slots() {
            let row = self.row(owner, slot);
            if self.get(row) != 0 {
                self.set(row, 0);
            }
        }
        self.set(self.layout.owners + owner.0, process);
    }

    /// Takes back what an owner holds and brings; its number is free afterwards.
    pub fn dismiss(&self, owner: OwnerIndex) {
        for slot in self.slots() {
            let row = self.row(owner, slot);
            let content = self.content(slot);
            if let (Some(key), true) = (content.key(), content.bringer() == Some(owner)) {
                self.empty(slot, key);
                if self.total(slot) == Holds::default() {
                    self.push_free(slot);
                }
            }
            let held = Holds::of(self.get(row));
            if held != Holds::default() {
                self.set(row, 0);
                self.lower_total(slot, held);
            }
        }
        self.set(self.layout.owners + owner.0, 0);
    }

    /// Rebuilds everything that follows from the authoritative words.
    pub fn repair(&self) {
        for bucket in 0..self.layout.bucket_count {
            self.set(self.layout.buckets + bucket, 0);
        }
        for at in [
            header::FREE,
            header::FREE_COUNT,
            header::IDLE_COUNT,
            header::FILLED_COUNT,
            header::PROBATION_COUNT,
            header::PINNED_COUNT,
        ] {
            self.set(at, 0);
        }
        // From the last, so that the first free slot is taken first.
        let owners: Vec<OwnerIndex> = self.owners().map(|(owner, _)| owner).collect();
        for slot in self.slots().rev() {
            self.repair_slot(slot, &owners);
        }
    }

    fn repair_slot(&self, slot: Slot, owners: &[OwnerIndex]) {
        let rows = owners.iter().map(|&owner| self.holds(owner, slot));
        let total = rows.fold(Holds::default(), Holds::plus);
        self.set_total(slot, total);
        self.add(header::PINNED_COUNT, u64::from(total.pins > 0));
        let found = self.content(slot);
        let is_known = |key: Key| key.0 < self.layout.extent_count && self.find(key).is_none();
        let is_right = found.key().is_some_and(is_known)
            && found.bringer().is_none_or(|owner| self.is_brought(slot, owner));
        let content = if is_right { found } else { Content::Empty };
        if found != content {
            self.set_content(slot, content);
        }
        if let Some(key) = content.key() {
            let uses = self.link(slot).uses.min(MOST_USES);
            self.insert(key, slot, uses);
        }
        let is_held = total != Holds::default();
        match content {
            Content::Here(_) => {
                self.add(header::FILLED_COUNT, 1);
                self.add(header::PROBATION_COUNT, u64::from(self.link(slot).uses == 0));
                self.add(header::IDLE_COUNT, u64::from(!is_held));
            }
            Content::Empty if !is_held => self.push_free(slot),
            Content::Empty | Content::Coming(..) | Content::Writing(..) => {}
        }
    }

    /// Whether an owner is there, and holds a slot.
    fn is_brought(&self, slot: Slot, owner: OwnerIndex) -> bool {
        owner.0 < MOST_OWNERS
            && self.owner(owner) != 0
            && self.holds(owner, slot) != Holds::default()
    }
}
