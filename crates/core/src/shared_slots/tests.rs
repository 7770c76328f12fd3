//! The table compared with what it must show, also after a death at each of its writes.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::panic::{catch_unwind, panic_any, AssertUnwindSafe};

use super::layout::{header, Counter, Geometry, Layout, MOST_OWNERS};
use super::table::{Given, Refusal, Table, Words};
use super::words::{Content, Holds, OwnerIndex};
use crate::error::Error;
use crate::slot_table::{Arrival, Key, Slot};

const SLOTS: u64 = 5;
const EXTENTS: u64 = 12;

/// What a process that uses it dies of.
struct Killed;

/// Memory in which whoever makes the n-th store from now on dies before it.
#[derive(Clone)]
struct Memory {
    words: RefCell<Vec<u64>>,
    left: Cell<Option<usize>>,
}

impl Words for Memory {
    fn get(&self, at: usize) -> u64 {
        self.words.borrow().get(at).copied().unwrap_or(0)
    }

    fn set(&self, at: usize, value: u64) {
        match self.left.get() {
            Some(0) => panic_any(Killed),
            Some(left) => self.left.set(Some(left - 1)),
            None => {}
        }
        let mut words = self.words.borrow_mut();
        if at >= words.len() {
            words.resize(at + 1, 0);
        }
        words[at] = value;
    }
}

fn layout() -> Layout {
    let geometry = Geometry {
        page_bytes: 4096,
        extent_pages: 1,
        slot_count: SLOTS,
        store_bytes: EXTENTS * 4096,
        store: 7,
    };
    Layout::new(&geometry, 4096).unwrap()
}

fn memory(layout: &Layout) -> Memory {
    let memory = Memory { words: RefCell::default(), left: Cell::new(None) };
    let table = Table::new(&memory, layout);
    table.repair();
    for owner in [0, 1] {
        table.admit(OwnerIndex(owner), 100 + owner as u64);
    }
    memory
}

const ONE: OwnerIndex = OwnerIndex(0);
const TWO: OwnerIndex = OwnerIndex(1);

type Reserved = Result<Given, Refusal>;

impl Table<'_, Memory> {
    fn reserved(&self, owner: OwnerIndex, keys: &[u64], anew: bool) -> Reserved {
        let rising: Vec<Key> =
            keys.iter().copied().collect::<BTreeSet<_>>().into_iter().map(Key).collect();
        let mut given = Given::default();
        self.reserve(owner, &rising, (keys.len(), anew), &mut given).map(|()| given)
    }

    /// Brings extents, and keeps them for the call.
    fn brought(&self, owner: OwnerIndex, keys: &[u64]) -> Given {
        let given = self.reserved(owner, keys, false).unwrap();
        self.settle(owner, &given.missing, given.missing.len());
        assert_eq!(self.arrival(&given.distinct), Arrival::Here);
        given
    }

    fn ensured(&self, owner: OwnerIndex, keys: &[u64]) -> Vec<Slot> {
        let given = self.brought(owner, keys);
        self.release(owner, &given.distinct);
        given.distinct.into_iter().map(|(_, slot)| slot).collect()
    }

    fn shown(&self) -> Vec<Content> {
        (0..SLOTS as u32).map(|slot| self.content(Slot(slot))).collect()
    }

    /// What follows from the truth is what it must be.
    fn check(&self, layout: &Layout) {
        let mut idle = 0;
        let mut filled = 0;
        let mut pinned = 0;
        let mut keys = BTreeSet::new();
        let mut free: BTreeSet<u32> = BTreeSet::new();
        let owners: Vec<OwnerIndex> = self.owners().map(|(owner, _)| owner).collect();
        for number in 0..SLOTS as u32 {
            let slot = Slot(number);
            let rows = owners.iter().map(|&owner| self.holds(owner, slot));
            let total = rows.fold((0, 0), |sum, holds| (sum.0 + holds.users, sum.1 + holds.pins));
            assert_eq!(self.total(slot), Holds { users: total.0, pins: total.1 });
            let is_held = total != (0, 0);
            pinned += u64::from(total.1 > 0);
            match self.content(slot) {
                Content::Empty if !is_held => assert!(free.insert(number)),
                Content::Empty => {}
                Content::Coming(key, owner) | Content::Writing(key, owner) => {
                    assert!(keys.insert(key.0), "twice");
                    assert_ne!(self.owner(owner), 0);
                    assert_ne!(self.holds(owner, slot), Holds::default());
                    assert_eq!(self.find(key), Some(slot));
                }
                Content::Here(key) => {
                    assert!(keys.insert(key.0), "twice");
                    filled += 1;
                    idle += u64::from(!is_held);
                    assert_eq!(self.find(key), Some(slot));
                }
            }
        }
        let found = (0..EXTENTS).filter(|&key| self.find(Key(key)).is_some());
        assert_eq!(found.collect::<BTreeSet<_>>(), keys);
        assert_eq!(self.counts(), (filled, pinned));
        assert_eq!(self.word(header::IDLE_COUNT), idle);
        assert_eq!(self.word(header::FREE_COUNT), free.len() as u64);
        let mut next = self.word(header::FREE);
        while next != 0 {
            let slot = (next - 1) as u32;
            assert!(free.remove(&slot), "not free, or twice");
            next = self.word(layout.links + slot as usize) & 0xffff_ffff;
        }
        assert!(free.is_empty());
        let on_probation = (0..SLOTS as u32).filter(|&slot| {
            matches!(self.content(Slot(slot)), Content::Here(_))
                && self.word(layout.links + slot as usize) >> 32 == 0
        });
        assert_eq!(self.word(header::PROBATION_COUNT), on_probation.count() as u64);
    }
}

#[test]
fn contents_and_holds_are_words() {
    for content in [
        Content::Empty,
        Content::Here(Key(0)),
        Content::Here(Key((1 << 48) - 1)),
        Content::Coming(Key(0), OwnerIndex(0)),
        Content::Coming(Key((1 << 48) - 1), OwnerIndex(MOST_OWNERS - 1)),
        Content::Writing(Key(1), OwnerIndex(1)),
    ] {
        assert_eq!(Content::of(content.word()), content);
    }
    let holds = Holds { users: u32::MAX, pins: 1 };
    assert_eq!(Holds::of(holds.word()), holds);
    assert_eq!((Content::Empty.word(), Holds::default().word()), (0, 0), "as fresh memory has it");
}

#[test]
fn an_extent_is_brought_once_whoever_names_it() {
    let layout = layout();
    let memory = memory(&layout);
    let table = Table::new(&memory, &layout);
    let first = table.reserved(ONE, &[3, 1], false).unwrap();
    assert_eq!(first.missing.len(), 2);
    let second = table.reserved(TWO, &[3, 4], false).unwrap();
    assert_eq!(second.missing, [(Key(4), second.distinct[1].1)]);
    assert_eq!(second.distinct[0], first.distinct[1]);
    assert_eq!(table.arrival(&second.distinct[..1]), Arrival::Coming);
    assert!(!table.hit(&[Key(3)], &mut Vec::new()), "not there yet");
    table.settle(ONE, &first.missing, 2);
    assert_eq!(table.arrival(&first.distinct), Arrival::Here);
    assert_eq!(table.arrival(&second.distinct), Arrival::Coming);
    table.settle(TWO, &second.missing, 0);
    assert_eq!(table.arrival(&second.distinct), Arrival::Lost);
    table.check(&layout);
    table.release(TWO, &second.distinct);
    table.release(ONE, &first.distinct);
    table.check(&layout);
    let mut slots = Vec::new();
    assert!(table.hit(&[Key(1), Key(3), Key(1)], &mut slots));
    assert_eq!(slots, [first.distinct[0].1, first.distinct[1].1, first.distinct[0].1]);
    let counted = [Counter::Hits, Counter::Misses, Counter::Arrivals, Counter::Evictions];
    assert_eq!(counted.map(|counter| table.counter(counter)), [1 + 3, 3, 2, 0]);
}

#[test]
fn what_another_process_holds_stays() {
    let layout = layout();
    let memory = memory(&layout);
    let table = Table::new(&memory, &layout);
    let pinned = table.brought(ONE, &[0, 1]);
    table.pin(ONE, &pinned.distinct);
    let named = table.brought(ONE, &[2]);
    for key in 3..EXTENTS {
        table.ensured(TWO, &[key, 0]);
        assert!([0, 1, 2].iter().all(|&key| table.find(Key(key)).is_some()));
        table.check(&layout);
    }
    assert_eq!(table.reserved(TWO, &[5, 6, 7], false).unwrap_err(), Refusal::Busy);
    assert_eq!(table.reserved(TWO, &[5, 6, 7, 8], false).unwrap_err(), Refusal::Full { pinned: 2 });
    assert_eq!(
        table.reserved(TWO, &[0, 1, 6, 7, 8, 9], false).unwrap_err(),
        Refusal::Full { pinned: 0 }
    );
    table.check(&layout);
    table.release(ONE, &named.distinct);
    table.ensured(TWO, &[5, 6, 7]);
    table.unpin(ONE, &pinned.distinct);
    table.ensured(TWO, &[5, 6, 7, 8, 9]);
    table.check(&layout);
}

#[test]
fn what_is_evicted_stays_for_its_holders_and_is_read_anew_for_others() {
    let layout = layout();
    let memory = memory(&layout);
    let table = Table::new(&memory, &layout);
    let old = table.brought(ONE, &[0]);
    table.pin(ONE, &old.distinct);
    assert!(table.evict(Key(0)));
    assert!(!table.evict(Key(0)));
    let new = table.brought(TWO, &[0]);
    assert_ne!(new.distinct[0].1, old.distinct[0].1);
    table.release(TWO, &new.distinct);
    for key in 1..EXTENTS {
        assert!(!table.ensured(TWO, &[key]).contains(&old.distinct[0].1), "is held");
        table.check(&layout);
    }
    table.unpin(ONE, &old.distinct);
    table.check(&layout);
    let all = [0, 1, 2, 3, 4];
    assert!(table.ensured(TWO, &all).contains(&old.distinct[0].1));
}

#[test]
fn what_is_evicted_while_it_comes_does_not_arrive() {
    let layout = layout();
    let memory = memory(&layout);
    let table = Table::new(&memory, &layout);
    let coming = table.reserved(ONE, &[0], false).unwrap();
    assert!(!table.evict(Key(0)), "it was not there");
    let again = table.reserved(TWO, &[0], false).unwrap();
    assert_eq!(again.missing.len(), 1);
    assert_ne!(again.missing, coming.missing, "somebody still writes to the first slot");
    table.settle(ONE, &coming.missing, 1);
    assert_eq!(table.arrival(&coming.distinct), Arrival::Lost);
    table.settle(TWO, &again.missing, 1);
    assert_eq!(table.arrival(&again.distinct), Arrival::Here);
    table.release(ONE, &coming.distinct);
    table.release(TWO, &again.distinct);
    table.check(&layout);
}

#[test]
fn what_is_written_comes_to_other_slots_where_it_is_held() {
    let layout = layout();
    let memory = memory(&layout);
    let table = Table::new(&memory, &layout);
    let old = table.brought(ONE, &[0, 1]);
    table.pin(ONE, &old.distinct);
    table.ensured(TWO, &[2]);
    let new = table.reserved(TWO, &[0, 2], true).unwrap();
    assert_eq!(new.missing, new.distinct);
    assert!(!old.distinct.contains(&new.missing[0]));
    assert_eq!(table.content(old.distinct[0].1), Content::Empty);
    table.settle(TWO, &new.missing, 2);
    table.release(TWO, &new.distinct);
    table.check(&layout);
    assert_eq!(table.reserved(TWO, &[0, 1, 2, 3], true).unwrap_err(), Refusal::Full { pinned: 2 });
    table.unpin(ONE, &old.distinct);
    table.check(&layout);
    assert_eq!(table.reserved(TWO, &[0, 1, 2, 3, 4], true).unwrap().missing.len(), 5);
}

#[test]
fn one_process_at_a_time_writes_an_extent() {
    let layout = layout();
    let memory = memory(&layout);
    let table = Table::new(&memory, &layout);
    let first = table.reserved(ONE, &[0, 1], true).unwrap();
    assert_eq!(table.reserved(TWO, &[1, 2], true).unwrap_err(), Refusal::Busy);
    table.check(&layout);
    assert!(!table.evict(Key(1)), "its content will be what the store has");
    let waiting = table.reserved(TWO, &[1], false).unwrap();
    assert_eq!(waiting.distinct, first.distinct[1..]);
    assert_eq!(table.arrival(&waiting.distinct), Arrival::Coming);
    table.settle(ONE, &first.missing, 2);
    assert_eq!(table.arrival(&waiting.distinct), Arrival::Here);
    assert_eq!(table.reserved(TWO, &[1, 2], true).unwrap().missing.len(), 2);
    table.check(&layout);
    // Also after one that died over it.
    assert_eq!(table.reserved(ONE, &[2], true).unwrap_err(), Refusal::Busy);
    table.dismiss(TWO);
    assert_eq!(table.reserved(ONE, &[2], true).unwrap().missing.len(), 1);
    table.check(&layout);
}

#[test]
fn what_is_named_again_and_again_outlasts_a_scan() {
    let geometry = Geometry {
        page_bytes: 4096,
        extent_pages: 1,
        slot_count: 20,
        store_bytes: 100 * 4096,
        store: 7,
    };
    let layout = Layout::new(&geometry, 4096).unwrap();
    let memory = memory(&layout);
    let table = Table::new(&memory, &layout);
    let hot: Vec<u64> = (0..10).collect();
    for _ in 0..3 {
        table.ensured(ONE, &hot);
    }
    for key in 10..100 {
        table.ensured(TWO, &[key]);
    }
    assert!(hot.iter().all(|&key| table.find(Key(key)).is_some()));
}

#[test]
fn a_loop_over_a_bit_more_than_the_slots_finds_most() {
    let store_bytes = 50 * 4096;
    let geometry =
        Geometry { page_bytes: 4096, extent_pages: 1, slot_count: 40, store_bytes, store: 7 };
    let layout = Layout::new(&geometry, 4096).unwrap();
    let memory = memory(&layout);
    let table = Table::new(&memory, &layout);
    for key in (0..50).cycle().take(2000) {
        table.ensured(ONE, &[key]);
    }
    assert!(table.counter(Counter::Hits) > 800, "{}", table.counter(Counter::Hits));
    table.repair();
    assert_eq!(table.counts(), (40, 0));
}

#[test]
fn owners_that_leave_hold_nothing() {
    let layout = layout();
    let memory = memory(&layout);
    let table = Table::new(&memory, &layout);
    let pinned = table.brought(ONE, &[0]);
    table.pin(ONE, &pinned.distinct);
    let coming = table.reserved(ONE, &[1, 2], false).unwrap();
    let waiting = table.reserved(TWO, &[1], false).unwrap();
    table.dismiss(ONE);
    table.check(&layout);
    assert_eq!(table.arrival(&waiting.distinct), Arrival::Lost);
    assert_eq!(table.find(Key(0)), Some(pinned.distinct[0].1), "what is there stays");
    assert_eq!(table.counts(), (1, 0));
    table.release(TWO, &waiting.distinct);
    table.check(&layout);
    assert!(coming.missing.iter().all(|&(_, slot)| table.content(slot) == Content::Empty));
    assert_eq!(table.vacancy(), Some(ONE));
    table.admit(ONE, 200);
    table.ensured(ONE, &[0, 1, 2, 3, 4]);
    table.check(&layout);
}

#[test]
fn counts_that_somebody_has_written_over_are_repaired() {
    let layout = layout();
    let memory = memory(&layout);
    let table = Table::new(&memory, &layout);
    let pinned = table.brought(ONE, &[0, 1, 2]);
    table.ensured(TWO, &[3]);
    for count in [u64::MAX, 77] {
        memory.set(header::FREE_COUNT, count);
        memory.set(header::IDLE_COUNT, count);
        // Two of these are there, one has room, and two have none.
        assert_eq!(table.reserved(TWO, &[0, 4, 5, 6, 3], false).unwrap_err(), Refusal::Busy);
        table.check(&layout);
    }
    memory.set(header::PINNED_COUNT, u64::MAX);
    let refused = table.reserved(TWO, &[3], false).unwrap_err();
    assert!(matches!(refused, Refusal::Full { .. }));
    table.release(ONE, &pinned.distinct);
    table.repair();
    table.ensured(TWO, &[0, 4, 5, 6, 3]);
    table.check(&layout);
}

#[test]
fn a_header_that_says_nonsense_is_no_layout() {
    let right = Geometry {
        page_bytes: 4096,
        extent_pages: 1,
        slot_count: SLOTS,
        store_bytes: EXTENTS * 4096,
        store: 7,
    };
    for wrong in [
        Geometry { page_bytes: 0, ..right },
        Geometry { extent_pages: 0, ..right },
        Geometry { slot_count: 0, ..right },
        Geometry { slot_count: 1 << 31, page_bytes: 1, ..right },
        Geometry { extent_pages: u64::MAX, ..right },
        // Keys that a slot's word has no bits for.
        Geometry { store_bytes: (1 << 60) + 1, ..right },
    ] {
        assert!(matches!(Layout::new(&wrong, 4096), Err(Error::Argument(_))), "{wrong:?}");
    }
    assert!(Layout::new(&Geometry { store_bytes: 1 << 60, ..right }, 4096).is_ok());
}

type Step = fn(&Table<'_, Memory>, &Given);

/// Each change of the table, on a table in which processes hold, wait and bring.
const STEPS: &[(&str, Step)] = &[
    ("hit", |table, _| assert!(table.hit(&[Key(0), Key(1)], &mut Vec::new()))),
    ("reserve", |table, _| drop(table.reserved(ONE, &[1, 7, 8], false).unwrap())),
    ("reserve busy", |table, _| {
        assert_eq!(table.reserved(ONE, &[0, 1, 7, 8, 9], false).unwrap_err(), Refusal::Busy);
    }),
    ("reserve to write", |table, _| drop(table.reserved(ONE, &[0, 1], true).unwrap())),
    ("settle what was written", |table, _| {
        let given = table.reserved(ONE, &[0, 1], true).unwrap();
        table.settle(ONE, &given.missing, 2);
    }),
    ("settle", |table, coming| table.settle(ONE, &coming.missing, 1)),
    ("settle none", |table, coming| table.settle(ONE, &coming.missing, 0)),
    ("release", |table, coming| {
        table.settle(ONE, &coming.missing, 1);
        table.release(ONE, &coming.distinct);
    }),
    ("pin", |table, coming| {
        table.settle(ONE, &coming.missing, 1);
        table.pin(ONE, &coming.distinct);
        table.unpin(ONE, &coming.distinct);
    }),
    ("evict", |table, _| {
        assert_eq!([0, 1, 4].map(|key| table.evict(Key(key))), [true, true, false]);
    }),
    ("dismiss", |table, _| table.dismiss(ONE)),
    ("dismiss another", |table, _| table.dismiss(TWO)),
    ("admit", |table, _| table.admit(OwnerIndex(2), 102)),
    ("repair", |table, _| table.repair()),
];

/// Two processes: one pins 0, both name 1, one brings 4, and 5 leaves for others.
fn begun(table: &Table<'_, Memory>) -> Given {
    let pinned = table.brought(TWO, &[0]);
    table.pin(TWO, &pinned.distinct);
    table.ensured(TWO, &[1, 5]);
    table.reserved(ONE, &[4], false).unwrap()
}

#[test]
fn a_death_at_any_store_leaves_what_can_be_repaired() {
    // Each death is a panic, and nothing to tell.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !panic.payload().is::<Killed>() {
            hook(panic);
        }
    }));
    die_at_every_store();
}

fn die_at_every_store() {
    let layout = layout();
    for (name, step) in STEPS {
        let fresh = memory(&layout);
        let coming = begun(&Table::new(&fresh, &layout));
        let mut deaths = 0;
        loop {
            let memory = fresh.clone();
            let table = Table::new(&memory, &layout);
            memory.left.set(Some(deaths));
            let outcome = catch_unwind(AssertUnwindSafe(|| step(&table, &coming)));
            memory.left.set(None);
            match outcome {
                Ok(()) => break,
                Err(reason) if reason.is::<Killed>() => {}
                Err(failure) => std::panic::resume_unwind(failure),
            }
            recover(&memory, &layout, name);
            deaths += 1;
        }
        assert!(deaths > 0, "{name} stores nothing");
    }
}

/// What the next process does, which may die over it as well.
fn recover(memory: &Memory, layout: &Layout, name: &str) {
    for deaths in 0.. {
        let again = memory.clone();
        let table = Table::new(&again, layout);
        again.left.set(Some(deaths));
        let outcome = catch_unwind(AssertUnwindSafe(|| table.repair()));
        again.left.set(None);
        if outcome.is_err() {
            table.repair();
        }
        table.check(layout);
        // What another process pinned is there and stays, unless it was that which left.
        let pinned = (0..SLOTS as u32).map(Slot).filter(|&slot| table.holds(TWO, slot).pins > 0);
        let pinned: Vec<Slot> = pinned.collect();
        if table.owner(TWO) != 0 && name != "dismiss another" {
            assert_eq!(pinned.len(), 1, "{name}");
        }
        table.dismiss(ONE);
        table.check(layout);
        assert!(table.shown().iter().all(|content| content.bringer().is_none()));
        let left = SLOTS - pinned.len() as u64;
        let keys: Vec<u64> = (6..6 + left).collect();
        table.admit(OwnerIndex(3), 103);
        let slots = table.ensured(OwnerIndex(3), &keys);
        assert!(pinned.iter().all(|slot| !slots.contains(slot)), "{name}");
        table.check(layout);
        if outcome.is_ok() {
            break;
        }
    }
}
