//! Which extent is in which slot, which calls need it, and what is evicted.
//!
//! Pure: no lock, no system call. [`SharedSlotTable`](super::SharedSlotTable) has the lock.

use std::collections::HashMap;

use super::{Key, Slot, SlotStats};
use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::room::{check_growth, collected, no_room, room_for};
use crate::units::{FilePage, WindowPage};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Empty,
    /// A call is reading this extent.
    Coming(Key),
    Here(Key),
}

#[derive(Clone, Copy, Debug)]
struct State {
    content: Content,
    /// Calls under way that name the slot's extent.
    users: u32,
    /// Holds that outlast the call that made them.
    pins: u32,
}

impl State {
    fn may_leave(self) -> bool {
        self.users == 0 && self.pins == 0
    }

    /// The extent that is there.
    fn key(self) -> Option<Key> {
        match self.content {
            Content::Here(key) => Some(key),
            Content::Empty | Content::Coming(_) => None,
        }
    }
}

/// The key of the extent that a slot shows, and whether it is pinned.
pub type Occupant = (Option<Key>, bool);

/// Slots that a call has taken for the keys that it names.
#[derive(Clone, Debug)]
pub struct Taken {
    /// The slot of each key, as they were named.
    pub slots: Vec<Slot>,
    /// Each key once, rising, with its slot.
    pub distinct: Vec<(Key, Slot)>,
    /// Those of them that are to be brought.
    pub missing: Vec<(Key, Slot)>,
}

/// Whether the extents of a call are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// All of them are.
    Here,
    /// One is still being brought.
    Coming,
    /// One was not brought, or was evicted meanwhile.
    Lost,
}

/// The slots of a table.
///
/// Invariants: a key is in `slot_of` if and only if a slot has it, coming or here. A slot
/// is in the cache if and only if its extent is here. An extent that comes has a user.
#[derive(Debug)]
pub struct SlotTable {
    slots: Vec<State>,
    slot_of: HashMap<Key, Slot>,
    /// Slots that are empty, perhaps with a user left over from a failure.
    empty: Vec<Slot>,
    cache: Cache,
    /// What was done so far, and how many slots are pinned.
    stats: SlotStats,
}

fn page(slot: Slot) -> WindowPage {
    WindowPage(slot.0.into())
}

impl SlotTable {
    /// All slots are empty.
    ///
    /// # Errors
    /// [`Error::Memory`] if there is no memory for them.
    pub fn new(slot_count: u32) -> Result<Self> {
        let count = slot_count as usize;
        let mut slots = room_for("Slots", count)?;
        // Taken from the end: slot 0 first.
        let mut empty = room_for("Slots", count)?;
        let mut slot_of = HashMap::new();
        check_growth::<(Key, Slot)>("Slots", (0, 0), count)?;
        slot_of.try_reserve(count).map_err(|_| no_room::<(Key, Slot)>("Slots", count))?;
        slots.resize(count, State { content: Content::Empty, users: 0, pins: 0 });
        empty.extend((0..slot_count).rev().map(Slot));
        Ok(Self {
            slots,
            slot_of,
            empty,
            cache: Cache::new(slot_count.into())
                .map_err(|_| no_room::<[u32; 4]>("Slots", count))?,
            stats: SlotStats::default(),
        })
    }

    /// What the slots hold and what was done with them so far.
    #[must_use]
    pub fn stats(&self) -> SlotStats {
        SlotStats { filled: self.cache.len(), ..self.stats }
    }

    /// The key of the extent that each slot shows.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn keys(&self) -> Result<Vec<Option<Key>>> {
        collected("keys", self.slots.iter().map(|state| state.key()))
    }

    /// The key of the extent that each slot shows, and whether it is pinned; None where one is
    /// not there.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn at(&self, numbers: &[i64]) -> Result<Option<Vec<Occupant>>> {
        let mut found = room_for("slots", numbers.len())?;
        for &number in numbers {
            let state = usize::try_from(number).ok().and_then(|slot| self.slots.get(slot));
            let Some(state) = state else { return Ok(None) };
            found.push((state.key(), state.pins > 0));
        }
        Ok(Some(found))
    }

    /// The slots of these keys if all of them are there. They may leave at any time.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn find(&mut self, operation: &'static str, keys: &[Key]) -> Result<Option<Vec<Slot>>> {
        let here = |key: &Key| {
            let slot = *self.slot_of.get(key)?;
            (self.state(slot).content == Content::Here(*key)).then_some(slot)
        };
        let mut slots = room_for(operation, keys.len())?;
        slots.extend(keys.iter().map_while(here));
        if slots.len() < keys.len() {
            return Ok(None);
        }
        for &slot in &slots {
            self.cache.touched(page(slot));
        }
        self.stats.hits += keys.len() as u64;
        Ok(Some(slots))
    }

    /// Takes a slot for each key, at once for all of them: none leaves before
    /// [`release`](Self::release). None if others have to finish first; nothing has
    /// changed then.
    ///
    /// # Errors
    /// [`Error::Slots`] if there is no room even when they have; [`Error::Memory`].
    pub fn reserve(&mut self, operation: &'static str, keys: &[Key]) -> Result<Option<Taken>> {
        let mut rising = collected(operation, keys.iter().copied())?;
        rising.sort_unstable();
        rising.dedup();
        let own = rising.iter().filter_map(|key| self.slot_of.get(key).copied());
        let own: Vec<Slot> = collected(operation, own)?;
        self.check_room(operation, rising.len(), &own)?;
        let wanted = rising.len() - own.len();
        let mut slots = room_for(operation, keys.len())?;
        let mut distinct = room_for(operation, rising.len())?;
        let mut missing = room_for(operation, wanted)?;
        let (mut spare, victims) = (room_for(operation, wanted)?, room_for(operation, wanted)?);
        let left = self.slot_of.capacity() - self.slot_of.len();
        check_growth::<(Key, Slot)>(operation, (self.slot_of.len(), left), wanted)?;
        let room = self.slot_of.try_reserve(wanted);
        room.map_err(|_| no_room::<(Key, Slot)>(operation, wanted))?;
        self.name(&own);
        if !self.spare(wanted, &mut spare, victims) {
            self.unname(&own);
            return Ok(None);
        }
        for &slot in &own {
            self.cache.touched(page(slot));
        }
        self.name(&spare);
        for key in rising {
            let slot = if let Some(&slot) = self.slot_of.get(&key) {
                slot
            } else {
                let Some(slot) = spare.pop() else { break };
                self.slot_of.insert(key, slot);
                self.state_mut(slot).content = Content::Coming(key);
                missing.push((key, slot));
                slot
            };
            distinct.push((key, slot));
        }
        self.stats.misses += missing.len() as u64;
        self.stats.hits += (keys.len() - missing.len()) as u64;
        slots.extend(keys.iter().filter_map(|key| self.slot_of.get(key).copied()));
        Ok(Some(Taken { slots, distinct, missing }))
    }

    /// Forgets the extents of these keys that are there; each slot stays named until
    /// [`release`](Self::release), so that its memory can be emptied before it gets another.
    /// None if a call names one of them; nothing has changed then.
    ///
    /// # Errors
    /// [`Error::Argument`] if one of them is pinned; [`Error::Memory`].
    pub fn evict(&mut self, operation: &'static str, keys: &[Key]) -> Result<Option<Taken>> {
        let here = keys.iter().filter_map(|key| Some((*key, *self.slot_of.get(key)?)));
        let mut distinct: Vec<(Key, Slot)> = collected(operation, here)?;
        distinct.sort_unstable();
        distinct.dedup();
        if let Some((key, _)) = distinct.iter().find(|(_, slot)| self.state(*slot).pins > 0) {
            return Err(Error::Argument(format!(
                "{operation}: key {} is pinned; release its pin first",
                key.0
            )));
        }
        if distinct.iter().any(|&(_, slot)| !self.state(slot).may_leave()) {
            return Ok(None);
        }
        let slots = collected(operation, distinct.iter().map(|&(_, slot)| slot))?;
        for &(key, slot) in &distinct {
            self.slot_of.remove(&key);
            self.cache.removed(page(slot));
            *self.state_mut(slot) = State { content: Content::Empty, users: 1, pins: 0 };
            self.empty.push(slot);
        }
        self.stats.evictions += distinct.len() as u64;
        Ok(Some(Taken { slots, distinct, missing: Vec::new() }))
    }

    /// Says that the first `done` of what was missing has arrived, and the rest will not.
    pub fn settle(&mut self, missing: &[(Key, Slot)], done: usize) {
        for (position, &(key, slot)) in missing.iter().enumerate() {
            if position < done {
                self.state_mut(slot).content = Content::Here(key);
                self.cache.inserted(page(slot), FilePage(key.0));
                self.stats.arrivals += 1;
            } else {
                self.state_mut(slot).content = Content::Empty;
                self.slot_of.remove(&key);
                self.empty.push(slot);
            }
        }
    }

    /// Whether what a call has taken is there.
    #[must_use]
    pub fn arrival(&self, taken: &Taken) -> Arrival {
        let mut arrival = Arrival::Here;
        for &(key, slot) in &taken.distinct {
            match self.state(slot).content {
                Content::Here(other) if other == key => {}
                Content::Coming(other) if other == key => arrival = Arrival::Coming,
                _ => return Arrival::Lost,
            }
        }
        arrival
    }

    /// The call is over: its extents may leave.
    pub fn release(&mut self, taken: &Taken) {
        for &(_, slot) in &taken.distinct {
            self.state_mut(slot).users -= 1;
        }
    }

    /// The call is over, but its extents stay until they are let go of.
    pub fn pin(&mut self, taken: &Taken) {
        for &(_, slot) in &taken.distinct {
            let state = self.state_mut(slot);
            state.pins += 1;
            let first = state.pins == 1;
            self.stats.pinned += u64::from(first);
        }
        self.release(taken);
    }

    /// A pin is over.
    pub fn unpin(&mut self, taken: &Taken) {
        for &(_, slot) in &taken.distinct {
            let state = self.state_mut(slot);
            state.pins -= 1;
            let last = state.pins == 0;
            self.stats.pinned -= u64::from(last);
        }
    }

    fn state(&self, slot: Slot) -> &State {
        &self.slots[slot.0 as usize]
    }

    fn state_mut(&mut self, slot: Slot) -> &mut State {
        &mut self.slots[slot.0 as usize]
    }

    fn name(&mut self, slots: &[Slot]) {
        for &slot in slots {
            self.state_mut(slot).users += 1;
        }
    }

    fn unname(&mut self, slots: &[Slot]) {
        for &slot in slots {
            self.state_mut(slot).users -= 1;
        }
    }

    /// Fails where pins on others leave too few slots.
    fn check_room(&self, operation: &'static str, wanted: usize, own: &[Slot]) -> Result<()> {
        let own_pinned = own.iter().filter(|&&slot| self.state(slot).pins > 0).count();
        let pinned = self.stats.pinned as usize - own_pinned;
        if wanted + pinned <= self.slots.len() {
            return Ok(());
        }
        Err(Error::Slots { operation, wanted, slots: self.slots.len(), pinned })
    }

    /// Finds so many slots that are empty now, made so if need be; false if others have to
    /// finish first. `spare` and `victims` are empty, with room for as many.
    fn spare(&mut self, count: usize, spare: &mut Vec<Slot>, mut victims: Vec<WindowPage>) -> bool {
        let free = |slot: &&Slot| self.state(**slot).may_leave();
        let more = count - self.empty.iter().rev().filter(free).take(count).count();
        let leaving =
            |state: &&State| matches!(state.content, Content::Here(_)) && state.may_leave();
        if more > 0 && self.slots.iter().filter(leaving).take(more).count() < more {
            return false;
        }
        self.take_empty(count - more, spare);
        let slots = &self.slots;
        let shows = |page: WindowPage| match slots[page.0 as usize] {
            state @ State { content: Content::Here(key), .. } if state.may_leave() => {
                Some(FilePage(key.0))
            }
            _ => None,
        };
        self.cache.victims(more, shows, &mut victims);
        self.stats.evictions += victims.len() as u64;
        for victim in victims {
            let slot = Slot(victim.0 as u32);
            if let Content::Here(key) = self.state(slot).content {
                self.slot_of.remove(&key);
            }
            self.state_mut(slot).content = Content::Empty;
            spare.push(slot);
        }
        // They are popped: empty slots first, in their order.
        spare.reverse();
        true
    }

    /// Takes this number of empty slots out; the caller knows that there are enough.
    fn take_empty(&mut self, count: usize, taken: &mut Vec<Slot>) {
        let mut named = Vec::new();
        while taken.len() < count {
            let Some(slot) = self.empty.pop() else { break };
            let to = if self.state(slot).may_leave() { &mut *taken } else { &mut named };
            to.push(slot);
        }
        self.empty.extend(named.into_iter().rev());
    }
}
