//! The slot table of one process: several threads share its slots, each of which shows an extent.
//!
//! [`slots`] decides which extent is in which slot and what is evicted. This module has the lock,
//! which is held only for these decisions, and the waiting. The caller loads extents: it
//! [`reserve`](SharedSlotTable::reserve)s slots, reads, and reports the result.

mod slots;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub(crate) use slots::Arrival;
pub use slots::{Occupant, SlotTable, Taken};

use crate::error::{Error, Interrupt, Result};
use crate::room::room_for;
use crate::units;

/// How long a wait may keep the caller's interrupt waiting.
const WAIT: Duration = Duration::from_millis(25);

/// The number of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub u64);

/// The number of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

/// A table that any number of threads may use.
#[derive(Debug)]
pub struct SharedSlotTable {
    extent_count: u64,
    state: Mutex<(SlotTable, bool)>,
    /// An extent has arrived or has not, slots may leave, or the table is closed.
    changed: Condvar,
    /// The process that made it: in a child of fork nobody may ever unlock.
    owner: u32,
}

/// Numbers of extents, of which there are `limit`, as keys; negative ones count from the end.
pub(crate) fn keys_of(operation: &'static str, numbers: &[i64], limit: u64) -> Result<Vec<Key>> {
    let mut keys = room_for(operation, numbers.len())?;
    for &number in numbers {
        let key = units::resolve_index(number, limit).map(Key);
        keys.push(key.ok_or_else(|| units::outside(operation, "key", number, limit))?);
    }
    Ok(keys)
}

/// What slots hold and what was done with them so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotStats {
    /// Keys that were named and were there, repeats counted.
    pub hits: u64,
    /// Extents that had to be brought.
    pub misses: u64,
    /// Extents that left for others.
    pub evictions: u64,
    /// Extents that arrived.
    pub arrivals: u64,
    /// Slots with an extent.
    pub filled: u64,
    /// Slots that are pinned.
    pub pinned: u64,
}

/// A call that names extents, and what it was given. Dropped, it is over: what it has not brought
/// counts as lost, and its pins end. In a child of fork it is its parent's, and does nothing.
pub trait SlotCall: Send + Sync {
    /// The slot of each key, as they were named.
    fn slots(&self) -> &[Slot];

    /// The extents to load, in ascending order of keys.
    fn missing(&self) -> &[(Key, Slot)];

    /// The first `done` of what was missing are in their slots, and the rest will not be.
    fn settle(&self, done: usize);

    /// Waits until all extents are there, also those that others bring. False if one was not
    /// brought, or was evicted meanwhile.
    ///
    /// # Errors
    /// [`Error::Interrupted`]; [`Error::Closed`] of slots that processes share.
    fn wait(&self, interrupt: &dyn Interrupt) -> Result<bool>;

    /// The extents may leave again.
    fn release(&self);

    /// The extents stay until [`unpin`](Self::unpin).
    fn pin(&self);

    /// What was pinned may leave again.
    fn unpin(&self);
}

/// How far a call has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Stage {
    /// The missing extents are being loaded.
    Bringing,
    /// The extents stay for the call.
    Named,
    /// They stay until they are let go of.
    Pinned,
    Over,
}

/// A call that names extents in slots of this process.
#[derive(Debug)]
pub struct Call {
    table: Arc<SharedSlotTable>,
    taken: Taken,
    stage: Mutex<Stage>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SharedSlotTable {
    /// An empty table, for a store with this number of extents.
    ///
    /// # Errors
    /// [`Error::Memory`] if there is no memory for the table.
    pub fn new(slot_count: u32, extent_count: u64) -> Result<Self> {
        Ok(Self {
            extent_count,
            state: Mutex::new((SlotTable::new(slot_count)?, false)),
            changed: Condvar::new(),
            owner: crate::sys::process::id(),
        })
    }

    /// # Errors
    /// [`Error::Fork`] in a child of fork.
    pub fn check_process(&self, operation: &'static str) -> Result<()> {
        if self.owner == crate::sys::process::id() {
            return Ok(());
        }
        Err(Error::Fork { operation, what: "slot table", owner: self.owner })
    }

    /// Numbers as keys; negative ones count from the end.
    ///
    /// # Errors
    /// [`Error::PageRange`] naming the first that is outside; [`Error::Memory`].
    pub fn keys(&self, operation: &'static str, numbers: &[i64]) -> Result<Vec<Key>> {
        keys_of(operation, numbers, self.extent_count)
    }

    fn open(&self, operation: &'static str) -> Result<MutexGuard<'_, (SlotTable, bool)>> {
        self.check_process(operation)?;
        let state = lock(&self.state);
        if state.1 {
            return Err(Error::Closed { operation, what: "slot table" });
        }
        Ok(state)
    }

    /// The table as it is now.
    ///
    /// # Errors
    /// [`Error::Fork`].
    pub fn look<T>(
        &self,
        operation: &'static str,
        look: impl FnOnce(&SlotTable) -> T,
    ) -> Result<T> {
        self.check_process(operation)?;
        Ok(look(&lock(&self.state).0))
    }

    /// Refuses later calls, and those that wait.
    pub fn close(&self) {
        if self.check_process("close").is_ok() {
            lock(&self.state).1 = true;
            self.changed.notify_all();
        }
    }

    /// See [`SlotTable::find`].
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::Fork`].
    pub fn find(&self, operation: &'static str, keys: &[Key]) -> Result<Option<Vec<Slot>>> {
        self.open(operation)?.0.find(operation, keys)
    }

    /// Takes a slot for each key, once other calls have left enough of them.
    ///
    /// # Errors
    /// [`Error::Slots`], [`Error::Closed`], [`Error::Fork`], [`Error::Interrupted`].
    pub fn reserve(
        self: &Arc<Self>,
        operation: &'static str,
        keys: &[Key],
        interrupt: &dyn Interrupt,
    ) -> Result<Call> {
        self.once(operation, interrupt, |table| table.reserve(operation, keys))
    }

    /// Forgets the extents of keys, once no other call names them; see [`SlotTable::evict`].
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::Closed`], [`Error::Fork`], [`Error::Interrupted`].
    pub fn evict(
        self: &Arc<Self>,
        operation: &'static str,
        keys: &[Key],
        interrupt: &dyn Interrupt,
    ) -> Result<Call> {
        self.once(operation, interrupt, |table| table.evict(operation, keys))
    }

    /// Tries until other calls have finished that are in the way.
    fn once(
        self: &Arc<Self>,
        operation: &'static str,
        interrupt: &dyn Interrupt,
        mut attempt: impl FnMut(&mut SlotTable) -> Result<Option<Taken>>,
    ) -> Result<Call> {
        let mut state = self.open(operation)?;
        loop {
            if let Some(taken) = attempt(&mut state.0)? {
                let whole = taken.missing.is_empty();
                let first = if whole { Stage::Named } else { Stage::Bringing };
                return Ok(Call { table: Arc::clone(self), taken, stage: Mutex::new(first) });
            }
            // Who waits has taken nothing, so nobody waits for one that waits.
            drop(self.changed.wait_timeout(state, WAIT));
            interrupt.check()?;
            state = self.open(operation)?;
        }
    }
}

impl Call {
    /// Goes from one stage to another, if it is at the first.
    fn go(&self, from: Stage, to: Stage, then: impl FnOnce(&mut SlotTable, &Taken)) {
        if self.table.owner != crate::sys::process::id() {
            return; // the locks may be those of a thread that is not here
        }
        let mut stage = lock(&self.stage);
        if *stage == from {
            *stage = to;
            then(&mut lock(&self.table.state).0, &self.taken);
            self.table.changed.notify_all();
        }
    }
}

impl SlotCall for Call {
    fn slots(&self) -> &[Slot] {
        &self.taken.slots
    }

    fn missing(&self) -> &[(Key, Slot)] {
        &self.taken.missing
    }

    fn settle(&self, done: usize) {
        self.go(Stage::Bringing, Stage::Named, |table, taken| table.settle(&taken.missing, done));
    }

    fn wait(&self, interrupt: &dyn Interrupt) -> Result<bool> {
        loop {
            let state = lock(&self.table.state);
            match state.0.arrival(&self.taken) {
                Arrival::Here => return Ok(true),
                Arrival::Lost => return Ok(false),
                Arrival::Coming => drop(self.table.changed.wait_timeout(state, WAIT)),
            }
            interrupt.check()?;
        }
    }

    fn release(&self) {
        self.go(Stage::Named, Stage::Over, SlotTable::release);
    }

    fn pin(&self) {
        self.go(Stage::Named, Stage::Pinned, SlotTable::pin);
    }

    fn unpin(&self) {
        self.go(Stage::Pinned, Stage::Over, SlotTable::unpin);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.settle(0);
        self.release();
        self.unpin();
    }
}
