//! Slot tables checked against their promises, in long random histories, and between threads.

use std::collections::{HashMap, HashSet};

use super::*;
use crate::error::Uninterruptible;

const SLOTS: u32 = 8;
const EXTENTS: u64 = 30;

fn keys(numbers: &[u64]) -> Vec<Key> {
    numbers.iter().copied().map(Key).collect()
}

/// Random numbers that are the same in each run.
struct Draws(u64);

impl Draws {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
        (self.0 >> 33) % limit
    }

    fn keys(&mut self, most: u64) -> Vec<Key> {
        let count = self.below(most + 1);
        (0..count).map(|_| Key(self.below(EXTENTS))).collect()
    }
}

/// Takes slots and says that all extents came.
fn fill(table: &mut SlotTable, wanted: &[Key]) -> Taken {
    let taken = table.reserve("ensure", wanted).expect("room").expect("nobody else");
    table.settle(&taken.missing, taken.missing.len());
    taken
}

#[test]
fn slots_are_taken_in_order_and_repeats_share_one() {
    let mut table = SlotTable::new(SLOTS).expect("room");
    let taken = fill(&mut table, &keys(&[7, 3, 7]));
    assert_eq!(taken.slots, [Slot(1), Slot(0), Slot(1)]);
    assert_eq!(taken.missing, [(Key(3), Slot(0)), (Key(7), Slot(1))]);
    table.release(&taken);
    assert_eq!(
        table.find("slots", &keys(&[3, 3, 7])).unwrap(),
        Some(vec![Slot(0), Slot(0), Slot(1)])
    );
    assert_eq!(table.find("slots", &keys(&[3, 4])).unwrap(), None);
    let stats = SlotStats { hits: 4, misses: 2, arrivals: 2, filled: 2, ..SlotStats::default() };
    assert_eq!(table.stats(), stats);
}

#[test]
fn an_extent_that_comes_is_not_found_before_it_is_there() {
    let mut table = SlotTable::new(SLOTS).expect("room");
    let first = table.reserve("ensure", &keys(&[1, 2])).expect("room").expect("free");
    assert_eq!(table.find("slots", &keys(&[1])).unwrap(), None);
    let second = table.reserve("ensure", &keys(&[2, 3])).expect("room").expect("free");
    assert_eq!(second.missing.len(), 1);
    assert_eq!(table.arrival(&second), Arrival::Coming);
    table.settle(&second.missing, 1);
    table.settle(&first.missing, 1);
    assert_eq!((table.arrival(&first), table.arrival(&second)), (Arrival::Lost, Arrival::Lost));
    assert_eq!(table.keys().unwrap()[..3], [Some(Key(1)), None, Some(Key(3))]);
    table.release(&first);
    table.release(&second);
    assert_eq!(fill(&mut table, &keys(&[2])).slots, [Slot(1)], "the empty one");
}

#[test]
fn a_call_that_has_to_wait_has_changed_nothing() {
    let mut table = SlotTable::new(2).expect("room");
    let first = table.reserve("ensure", &keys(&[0, 1])).expect("room").expect("free");
    let before = format!("{table:?}");
    assert!(table.reserve("ensure", &keys(&[1, 2])).expect("room later").is_none());
    assert_eq!(format!("{table:?}"), before);
    table.settle(&first.missing, 2);
    table.release(&first);
    let second = fill(&mut table, &keys(&[1, 2]));
    assert_eq!(second.slots[0], first.slots[1]);
}

#[test]
fn pinned_slots_are_refused_at_once() {
    let mut table = SlotTable::new(3).expect("room");
    let first = fill(&mut table, &keys(&[0, 1]));
    table.pin(&first);
    assert_eq!((table.stats().filled, table.stats().pinned), (2, 2));
    let refused = table.reserve("ensure", &keys(&[2, 3]));
    assert!(matches!(refused, Err(Error::Slots { wanted: 2, slots: 3, pinned: 2, .. })));
    let second = fill(&mut table, &keys(&[0, 1, 2]));
    table.release(&second);
    table.unpin(&first);
    let third = fill(&mut table, &keys(&[3, 4, 5]));
    table.release(&third);
    assert_eq!((table.stats().filled, table.stats().pinned), (3, 0));
}

#[test]
fn long_histories_keep_what_is_named_and_held() {
    let mut draws = Draws(2002);
    let mut table = SlotTable::new(SLOTS).expect("room");
    let mut pinned: Vec<Taken> = Vec::new();
    let mut shown: HashMap<Slot, Key> = HashMap::new();
    for _ in 0..20_000 {
        if draws.below(4) == 0 && !pinned.is_empty() {
            let at = draws.below(pinned.len() as u64) as usize;
            table.unpin(&pinned.swap_remove(at));
            continue;
        }
        let wanted = draws.keys(6);
        let distinct: HashSet<Key> = wanted.iter().copied().collect();
        let kept: HashSet<Key> =
            pinned.iter().flat_map(|taken| taken.distinct.iter().map(|&(key, _)| key)).collect();
        let room = distinct.union(&kept).count() <= SLOTS as usize;
        let Ok(taken) = table.reserve("ensure", &wanted) else {
            assert!(!room);
            continue;
        };
        assert!(room);
        let taken = taken.expect("no other call is under way");
        let done = draws.below(taken.missing.len() as u64 + 1) as usize;
        for (position, &(key, slot)) in taken.missing.iter().enumerate() {
            shown.remove(&slot);
            if position < done {
                shown.insert(slot, key);
            }
        }
        table.settle(&taken.missing, done);
        let all = done == taken.missing.len();
        assert_eq!(table.arrival(&taken), if all { Arrival::Here } else { Arrival::Lost });
        if all {
            assert!(wanted.iter().zip(&taken.slots).all(|(key, slot)| shown[slot] == *key));
        }
        if all && draws.below(3) == 0 {
            table.pin(&taken);
            pinned.push(taken);
        } else {
            table.release(&taken);
        }
        for taken in &pinned {
            assert!(taken.distinct.iter().all(|(key, slot)| shown[slot] == *key), "it was pinned");
        }
        let keys = (0..SLOTS).map(|slot| shown.get(&Slot(slot)).copied());
        assert!(table.keys().unwrap().into_iter().eq(keys));
        assert_eq!(table.stats().filled, shown.len() as u64);
    }
    let stats = table.stats();
    assert!(stats.evictions > 1000 && stats.hits > 1000);
}

#[test]
fn a_call_that_is_dropped_leaves_its_slots() {
    let table = Arc::new(SharedSlotTable::new(2, EXTENTS).expect("room"));
    let call = table.reserve("ensure", &keys(&[0, 1]), &Uninterruptible).expect("room");
    drop(call);
    let call = table.reserve("ensure", &keys(&[2, 3]), &Uninterruptible).expect("room");
    call.settle(2);
    call.pin();
    drop(call);
    let call = table.reserve("ensure", &keys(&[3, 4]), &Uninterruptible).expect("room");
    assert_eq!(call.missing().len(), 1);
}

#[test]
fn threads_wait_for_room_and_for_each_other() {
    let table = Arc::new(SharedSlotTable::new(4, EXTENTS).expect("room"));
    let shown: [Mutex<Option<Key>>; 4] = Default::default();
    let work = |seed: u64| {
        let mut draws = Draws(seed);
        for round in 0..2000 {
            let wanted = draws.keys(3);
            let call = table.reserve("ensure", &wanted, &Uninterruptible).expect("room");
            let missing = call.missing();
            for &(key, slot) in missing {
                *lock(&shown[slot.0 as usize]) = Some(key);
            }
            // One in ten cannot be brought.
            call.settle(if round % 10 == 0 { 0 } else { missing.len() });
            if call.wait(&Uninterruptible).expect("no interrupt") {
                for (key, slot) in wanted.iter().zip(call.slots()) {
                    assert_eq!(*lock(&shown[slot.0 as usize]), Some(*key));
                }
            }
            call.release();
        }
    };
    std::thread::scope(|scope| {
        for seed in 1..=4 {
            scope.spawn(move || work(seed));
        }
    });
}

#[test]
fn closing_ends_a_wait() {
    let table = Arc::new(SharedSlotTable::new(1, EXTENTS).expect("room"));
    let call = table.reserve("ensure", &keys(&[0]), &Uninterruptible).expect("room");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| table.reserve("ensure", &keys(&[1]), &Uninterruptible).err());
        table.close();
        let ended = waiting.join().expect("no panic");
        assert!(matches!(ended, Some(Error::Closed { .. })));
    });
    drop(call);
    assert!(matches!(table.find("ensure", &[]), Err(Error::Closed { .. })));
    assert!(matches!(
        table.keys("ensure", &[3, -1, 99]),
        Err(Error::PageRange { index: 99, limit: EXTENTS, .. })
    ));
}
