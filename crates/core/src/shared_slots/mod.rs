//! Slots that all processes of a user share, each of which shows an extent of a store.
//!
//! The slots, and the table that says what they show, are one object in shared memory
//! ([`object`]). [`table`] decides which extent is in which slot and what is evicted, in such a
//! way that a process may be killed at any instruction. This module has the lock, which is held
//! only for these decisions, and the waiting. No content is read or written while the lock is
//! held.
//!
//! Each process is an *owner*. A child of fork has the memory, and becomes an owner with its
//! first call. When a process dies, the next process that needs something takes back what the
//! dead one held or was loading: a process that waits for an extent checks whether the process
//! that loads it is alive, and a process that needs room checks all of them.

mod call;
mod layout;
mod object;
#[cfg(test)]
mod processes;
mod table;
#[cfg(test)]
mod tests;
mod words;

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::sync::Arc;

pub use call::SharedCall;
pub use layout::Geometry;
pub use object::{list, remove, Listed, Wanted};

use crate::error::{Error, Interrupt, Result};
use crate::room::{collected, room_for};
use crate::slot_table::{keys_of, Key, Occupant, Slot, SlotStats};
use crate::sys::span::Span;
use crate::sys::{fork, process};
use layout::{Counter, MOST_OWNERS};
use object::{Locked, Object};
use table::{Given, Refusal};
use words::{Content, OwnerIndex};

/// This process's use of the slots: from when it becomes an owner until it leaves.
///
/// From the top: how many forks there were before it, 16 bits; its number, 22; which of its
/// tenures this is, 16; the owner, 10. The number alone would not do: a worker may have the
/// number that an ancestor had, whose tenure it finds in its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tenure(u64);

/// The bits of a tenure that say which owner it is.
const OWNER_BITS: u32 = MOST_OWNERS.ilog2();
/// The bits below those that say which process.
const PROCESS_SHIFT: u32 = OWNER_BITS + 16;

impl Tenure {
    fn new(owner: OwnerIndex, number: u16) -> Self {
        Self(this_process() << PROCESS_SHIFT | u64::from(number) << OWNER_BITS | owner.0 as u64)
    }

    /// Whether it is of this process, and not of one that has forked it.
    fn is_own(self) -> bool {
        self.0 >> PROCESS_SHIFT == this_process()
    }

    fn owner(self) -> OwnerIndex {
        OwnerIndex(self.0 as usize & (MOST_OWNERS - 1))
    }
}

fn this_process() -> u64 {
    // The kernel has no process numbers of more bits.
    u64::from(fork::generation() & 0xffff) << 22 | u64::from(process::id())
}

/// What a look for extents has found that waits for nobody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// All are here, in these slots.
    All(Vec<Slot>),
    /// One is not.
    NotAll,
    /// Another thread or process has the lock.
    Busy,
}

/// Slots that processes share, as this process has them.
#[derive(Debug)]
pub struct SharedSlots {
    object: Object,
    /// The [`Tenure`], 0 for none; in a child of fork that of its parent, which is none.
    tenure: AtomicU64,
    /// How many tenures this process had.
    tenures: AtomicU16,
    closed: AtomicBool,
    /// Calls of this tenure that bring extents; changed only under the lock.
    bringing: AtomicUsize,
    /// The tenure ends with the last of them; changed only under the lock.
    leaving: AtomicBool,
}

impl Drop for SharedSlots {
    fn drop(&mut self) {
        self.leave();
    }
}

impl SharedSlots {
    /// Opens the slots of a name, or makes them.
    ///
    /// # Errors
    /// [`Error::Argument`] where there are others of that name; [`Error::SharedMemory`],
    /// [`Error::Budget`], [`Error::Io`]; [`Error::Unsupported`]; [`Error::Interrupted`].
    pub fn attach(wanted: &Wanted<'_>, interrupt: &dyn Interrupt) -> Result<Self> {
        let (object, owner) = Object::attach(wanted, interrupt)?;
        Ok(Self {
            object,
            tenure: AtomicU64::new(Tenure::new(owner, 0).0),
            tenures: AtomicU16::new(1),
            closed: AtomicBool::new(false),
            bringing: AtomicUsize::new(0),
            leaving: AtomicBool::new(false),
        })
    }

    /// What the slots show.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.object.geometry
    }

    /// The memory of the slots, one after another.
    #[must_use]
    pub fn memory(&self) -> Span<'_> {
        self.object.mapping.span(self.object.layout.slots_offset, self.object.layout.slots_bytes)
    }

    /// The memory of one of them.
    fn slot_memory(&self, slot: Slot) -> Span<'_> {
        let bytes = self.object.geometry.extent_bytes() as usize;
        self.memory().part(slot.0 as usize * bytes, bytes)
    }

    /// Refuses later calls of this process, and those that wait.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.object.notify();
    }

    fn check_open(&self, operation: &'static str) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::Closed { operation, what: "slot table" });
        }
        Ok(())
    }

    /// Numbers as keys; negative ones count from the end.
    ///
    /// # Errors
    /// [`Error::PageRange`] naming the first that is outside; [`Error::Memory`].
    pub fn keys(&self, operation: &'static str, numbers: &[i64]) -> Result<Vec<Key>> {
        keys_of(operation, numbers, self.object.layout.extent_count)
    }

    // The tenure.

    /// This process's, which it begins if it has none.
    fn tenure(&self, interrupt: &dyn Interrupt) -> Result<Tenure> {
        let known = self.tenure.load(Ordering::Acquire);
        if Tenure(known).is_own() {
            return Ok(Tenure(known));
        }
        let dead = self.object.dead()?;
        let locked = self.object.lock(interrupt)?;
        self.object.dismiss(&locked, &dead);
        // Another thread may have begun one meanwhile.
        let known = self.tenure.load(Ordering::Acquire);
        if Tenure(known).is_own() {
            return Ok(Tenure(known));
        }
        let owner = self.object.admit(&locked)?;
        let tenure = Tenure::new(owner, self.tenures.fetch_add(1, Ordering::Relaxed));
        // In a child of fork they are what its parent's were.
        self.bringing.store(0, Ordering::Relaxed);
        self.leaving.store(false, Ordering::Relaxed);
        self.tenure.store(tenure.0, Ordering::Release);
        Ok(tenure)
    }

    /// Whether a tenure is still that of this process.
    fn is_current(&self, _locked: &Locked<'_>, tenure: Tenure) -> bool {
        tenure.is_own() && self.tenure.load(Ordering::Acquire) == tenure.0
    }

    /// Lets go of all that this process has. The last process takes the name of the slots
    /// along. A later call begins again.
    ///
    /// Where other threads are reading into slots, the last of them does it: another process
    /// that was given such a slot would find in it what is still being read.
    pub fn leave(&self) {
        let known = Tenure(self.tenure.load(Ordering::Acquire));
        if !known.is_own() {
            return;
        }
        // Those are taken back by the next process, too.
        let dead = self.object.dead().unwrap_or_default();
        let Some(locked) = self.object.lock_anyway() else { return };
        if self.is_current(&locked, known) {
            if self.bringing.load(Ordering::Relaxed) > 0 {
                self.leaving.store(true, Ordering::Relaxed);
            } else {
                self.end(&locked, known, &dead);
            }
        }
        drop(locked);
        self.object.notify();
    }

    /// Ends this process's tenure.
    fn end(&self, locked: &Locked<'_>, tenure: Tenure, dead: &[(OwnerIndex, u64)]) {
        self.tenure.store(0, Ordering::Release);
        self.object.leave(locked, tenure.owner(), dead);
    }

    /// A call of the current tenure no longer writes to its slots.
    fn has_brought(&self, locked: &Locked<'_>, tenure: Tenure) {
        let before = self.bringing.fetch_sub(1, Ordering::Relaxed);
        if before == 1 && self.leaving.load(Ordering::Relaxed) {
            self.end(locked, tenure, &[]);
        }
    }

    /// Takes back what processes had that are dead. Says whether there was one.
    fn sweep(&self, interrupt: &dyn Interrupt) -> Result<bool> {
        let dead = self.object.dead()?;
        if dead.is_empty() {
            return Ok(false);
        }
        let locked = self.object.lock(interrupt)?;
        let any = self.object.dismiss(&locked, &dead);
        drop(locked);
        self.object.notify();
        Ok(any)
    }

    // Calls.

    /// The slots of these keys if all of them are there. They may leave at any time.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::Memory`], [`Error::Interrupted`].
    pub fn find(
        &self,
        operation: &'static str,
        keys: &[Key],
        interrupt: &dyn Interrupt,
    ) -> Result<Option<Vec<Slot>>> {
        self.check_open(operation)?;
        let mut slots = room_for(operation, keys.len())?;
        let locked = self.object.lock(interrupt)?;
        Ok(locked.table.hit(keys, &mut slots).then_some(slots))
    }

    /// The same without waiting for other threads or processes.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::Memory`].
    pub fn try_find(&self, operation: &'static str, keys: &[Key]) -> Result<Found> {
        self.check_open(operation)?;
        let mut slots = room_for(operation, keys.len())?;
        let Some(locked) = self.object.try_lock() else { return Ok(Found::Busy) };
        Ok(if locked.table.hit(keys, &mut slots) { Found::All(slots) } else { Found::NotAll })
    }

    /// Takes a slot for each key, once other calls have left enough of them; with `writes` slots
    /// that this process is to [`fill`](SharedCall::fill).
    ///
    /// # Errors
    /// [`Error::Slots`], [`Error::Closed`], [`Error::Interrupted`], [`Error::Memory`], and where
    /// this process cannot be an owner those of [`attach`](Self::attach).
    pub fn reserve(
        self: &Arc<Self>,
        operation: &'static str,
        keys: &[Key],
        writes: bool,
        interrupt: &dyn Interrupt,
    ) -> Result<SharedCall> {
        let mut rising = collected(operation, keys.iter().copied())?;
        rising.sort_unstable();
        rising.dedup();
        let mut given = Given {
            distinct: room_for(operation, rising.len())?,
            missing: room_for(operation, rising.len())?,
        };
        let mut slots = room_for(operation, keys.len())?;
        let mut has_swept = false;
        loop {
            self.check_open(operation)?;
            let tenure = self.tenure(interrupt)?;
            let locked = self.object.lock(interrupt)?;
            if !self.is_current(&locked, tenure) {
                continue;
            }
            let counts = (keys.len(), writes);
            let refusal = match locked.table.reserve(tenure.owner(), &rising, counts, &mut given) {
                Ok(()) => {
                    self.bringing
                        .fetch_add(usize::from(!given.missing.is_empty()), Ordering::Relaxed);
                    drop(locked);
                    slots.extend(keys.iter().filter_map(|key| slot_of(&given, *key)));
                    return Ok(SharedCall::new(Arc::clone(self), tenure, slots, given));
                }
                Err(refusal) => refusal,
            };
            let notice = self.object.must_wait(&locked);
            drop(locked);
            if !has_swept {
                // What is in the way may be nobody's.
                has_swept = true;
                self.sweep(interrupt)?;
                continue;
            }
            match refusal {
                Refusal::Full { pinned } => {
                    let (wanted, slots) = (rising.len(), self.object.layout.slot_count);
                    return Err(Error::Slots { operation, wanted, slots, pinned });
                }
                Refusal::Busy => {
                    has_swept = self.object.sleep(notice);
                    interrupt.check()?;
                }
            }
        }
    }

    /// Has the extents of keys be read again by the next calls that name them. Who holds their
    /// slots keeps the content. Says how many were there.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::Interrupted`].
    pub fn evict(
        &self,
        operation: &'static str,
        keys: &[Key],
        interrupt: &dyn Interrupt,
    ) -> Result<usize> {
        self.check_open(operation)?;
        let locked = self.object.lock(interrupt)?;
        let evicted = keys.iter().filter(|&&key| locked.table.evict(key)).count();
        drop(locked);
        self.object.notify();
        Ok(evicted)
    }

    // What is there.

    /// The key of the extent that each slot shows.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Interrupted`].
    pub fn shown(&self, interrupt: &dyn Interrupt) -> Result<Vec<Option<Key>>> {
        let count = self.object.layout.slot_count;
        let mut keys = room_for("keys", count)?;
        let locked = self.object.lock(interrupt)?;
        keys.extend((0..count as u32).map(|slot| here(&locked, Slot(slot))));
        Ok(keys)
    }

    /// The key of the extent that each of these slots shows, and whether it is pinned; None where
    /// one is not there.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Interrupted`].
    pub fn at(&self, numbers: &[i64], interrupt: &dyn Interrupt) -> Result<Option<Vec<Occupant>>> {
        let mut found = room_for("slots", numbers.len())?;
        let locked = self.object.lock(interrupt)?;
        for &number in numbers {
            let slot = u32::try_from(number).ok().map(Slot);
            let slot = slot.filter(|slot| (slot.0 as usize) < self.object.layout.slot_count);
            let Some(slot) = slot else { return Ok(None) };
            found.push((here(&locked, slot), locked.table.total(slot).pins > 0));
        }
        Ok(Some(found))
    }

    /// What the slots hold and what was done with them.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub fn stats(&self, interrupt: &dyn Interrupt) -> Result<SlotStats> {
        // Pins of the dead are none.
        self.sweep(interrupt)?;
        let locked = self.object.lock(interrupt)?;
        let (filled, pinned) = locked.table.counts();
        Ok(SlotStats {
            hits: locked.table.counter(Counter::Hits),
            misses: locked.table.counter(Counter::Misses),
            evictions: locked.table.counter(Counter::Evictions),
            arrivals: locked.table.counter(Counter::Arrivals),
            filled,
            pinned,
        })
    }
}

fn here(locked: &Locked<'_>, slot: Slot) -> Option<Key> {
    match locked.table.content(slot) {
        Content::Here(key) => Some(key),
        Content::Empty | Content::Coming(..) | Content::Writing(..) => None,
    }
}

fn slot_of(given: &Given, key: Key) -> Option<Slot> {
    let index = given.distinct.binary_search_by_key(&key, |&(key, _)| key).ok()?;
    Some(given.distinct[index].1)
}
