//! Tests: processes that die while they have the lock, or while they create or remove an object.

use std::path::PathBuf;
use std::sync::Arc;

use super::layout::{header, Counter, Geometry, Layout, Stage};
use super::object::{self, Object, Wanted};
use super::table::Words;
use super::words::{Holds, OwnerIndex};
use super::{SharedSlots, Tenure};
use crate::error::{Error, Uninterruptible};
use crate::slot_table::{Key, SlotCall};
use crate::sys::forked::dies_after;
use crate::sys::span::{system_page_bytes, Span};

const SLOTS: u64 = 4;

fn geometry() -> Geometry {
    let page_bytes = system_page_bytes() as u64;
    let store_bytes = 10 * page_bytes;
    Geometry { page_bytes, extent_pages: 1, slot_count: SLOTS, store_bytes, store: 7 }
}

/// A name that only this test has.
fn name(test: &str) -> String {
    format!("test-{}-{test}", std::process::id())
}

fn wanted(name: &str) -> Wanted<'_> {
    Wanted { name, geometry: geometry(), changed: None, most_bytes: None }
}

fn attached(name: &str) -> Arc<SharedSlots> {
    Arc::new(SharedSlots::attach(&wanted(name), &Uninterruptible).unwrap())
}

fn is_listed(name: &str) -> bool {
    object::list().unwrap().iter().any(|one| one.name == name)
}

fn keys(numbers: &[u64]) -> Vec<Key> {
    numbers.iter().copied().map(Key).collect()
}

#[test]
fn a_process_that_dies_with_the_lock_leaves_a_table_that_is_repaired() {
    let name = name("lock");
    let slots = attached(&name);
    let call = slots.reserve("pin", &keys(&[1, 2]), false, &Uninterruptible).unwrap();
    call.settle(2);
    call.pin();
    dies_after(|| {
        let own = slots.tenure(&Uninterruptible).unwrap();
        let locked = slots.object.lock(&Uninterruptible).unwrap();
        let mut given = super::Given::default();
        locked.table.reserve(own.owner(), &keys(&[3, 4]), (2, false), &mut given).unwrap();
        // What follows from the truth is nonsense by now.
        for at in header::FREE..header::COUNTERS {
            slots.object.mapping.set(at, 77);
        }
        for bucket in 0..slots.object.layout.bucket_count {
            slots.object.mapping.set(slots.object.layout.buckets + bucket, 99);
        }
        std::mem::forget(locked);
    });
    // Whoever waits for what it was bringing finds that it is dead, and brings it.
    let waits = slots.reserve("pin", &keys(&[1, 3]), false, &Uninterruptible).unwrap();
    assert!(waits.missing().is_empty());
    assert!(!waits.wait(&Uninterruptible).unwrap());
    drop(waits);
    let all = slots.reserve("pin", &keys(&[1, 2, 3, 4]), false, &Uninterruptible).unwrap();
    assert_eq!(all.missing().iter().map(|&(key, _)| key.0).collect::<Vec<_>>(), [3, 4]);
    assert_eq!(all.slots()[..2], *call.slots());
    let locked = slots.object.lock(&Uninterruptible).unwrap();
    assert_eq!(locked.table.counter(Counter::Repairs), 1);
    assert_eq!(locked.table.counter(Counter::Deaths), 1);
    drop(locked);
    drop((all, call));
    drop(slots);
    assert!(!is_listed(&name));
}

#[test]
fn an_object_that_has_no_memory_yet_is_gone_on_with() {
    let name = name("begun");
    let layout = Layout::new(&geometry(), system_page_bytes()).unwrap();
    let path: PathBuf = object::path_of("test", &name).unwrap();
    dies_after(|| object::create(&path, &wanted(&name), &layout).unwrap());
    assert!(is_listed(&name));
    // Also one for other slots is in nobody's way.
    let other = Geometry { slot_count: SLOTS + 1, ..geometry() };
    let slots = SharedSlots::attach(&Wanted { geometry: other, ..wanted(&name) }, &Uninterruptible);
    assert_eq!(slots.unwrap().geometry(), other);
    assert!(!is_listed(&name));
    dies_after(|| object::create(&path, &wanted(&name), &layout).unwrap());
    let slots = attached(&name);
    let call = slots.reserve("ensure", &keys(&[0, 1, 2, 3]), false, &Uninterruptible).unwrap();
    assert_eq!(call.missing().len(), 4);
    drop((call, slots));
    assert!(!is_listed(&name));
}

#[test]
fn an_object_that_was_about_to_lose_its_name_is_replaced() {
    let name = name("unnamed");
    let old = attached(&name);
    dies_after(|| {
        let locked = old.object.lock(&Uninterruptible).unwrap();
        old.object.mapping.set(header::STAGE, Stage::Unnamed as u64);
        std::mem::forget(locked);
    });
    let new = attached(&name);
    new.reserve("ensure", &keys(&[1]), false, &Uninterruptible).unwrap().settle(1);
    assert!(old.find("ensure", &keys(&[1]), &Uninterruptible).unwrap().is_none());
    assert_eq!(
        new.find("ensure", &keys(&[1]), &Uninterruptible).unwrap().map(|at| at.len()),
        Some(1)
    );
    drop(old);
    assert!(is_listed(&name), "the name is that of the new one");
    drop(new);
    assert!(!is_listed(&name));
}

#[test]
fn an_object_in_use_is_not_removed_unless_by_force() {
    let name = name("remove");
    let slots = attached(&name);
    let refused = object::remove(&name, false, &Uninterruptible).unwrap_err();
    assert!(matches!(&refused, Error::Argument(text) if text.contains("is used by 1 process")));
    object::remove(&name, true, &Uninterruptible).unwrap();
    assert!(!is_listed(&name));
    assert!(Object::attach(&wanted(&name), &Uninterruptible).is_ok(), "another one");
    object::remove(&name, true, &Uninterruptible).unwrap();
    let gone = object::remove(&name, false, &Uninterruptible).unwrap_err();
    assert!(matches!(gone, Error::Io { errno: rustix::io::Errno::NOENT, .. }));
    assert!(slots.reserve("ensure", &keys(&[0]), false, &Uninterruptible).is_ok(), "it goes on");
}

#[test]
fn a_process_that_leaves_lets_go_of_slots_when_nothing_is_read_into_them_any_more() {
    let name = name("leaves");
    let (slots, other) = (attached(&name), attached(&name));
    let calls =
        [1, 2].map(|key| slots.reserve("ensure", &keys(&[key]), false, &Uninterruptible).unwrap());
    slots.close();
    slots.leave();
    let waits = calls[0].wait(&Uninterruptible);
    assert!(matches!(waits, Err(Error::Closed { .. })));
    let given = |call: &super::SharedCall| {
        let locked = other.object.lock(&Uninterruptible).unwrap();
        call.slots().iter().any(|&slot| locked.table.total(slot) != Holds::default())
    };
    // Another process may not have the slots while this one writes to them.
    assert!(calls.iter().all(given));
    let [one, two] = calls;
    one.settle(1);
    assert!(given(&two));
    two.settle(1);
    assert!(!given(&one) && !given(&two));
    let locked = other.object.lock(&Uninterruptible).unwrap();
    assert_eq!(locked.table.owners().count(), 1);
    drop(locked);
    drop((one, two, slots));
    assert!(is_listed(&name));
    drop(other);
    assert!(!is_listed(&name));
}

#[test]
fn a_slot_into_which_a_dead_process_was_reading_gets_other_memory() {
    let name = name("renewed");
    let slots = attached(&name);
    let here = slots.reserve("pin", &keys(&[1]), false, &Uninterruptible).unwrap();
    let fill = |call: &super::SharedCall, byte| {
        let mut content = vec![byte; geometry().extent_bytes() as usize];
        slots.slot_memory(call.slots()[0]).copy_span(Span::of(&mut content));
    };
    fill(&here, 5);
    here.settle(1);
    dies_after(|| {
        let coming = slots.reserve("ensure", &keys(&[2]), false, &Uninterruptible).unwrap();
        fill(&coming, 6);
        std::mem::forget(coming);
    });
    let waits = slots.reserve("ensure", &keys(&[2]), false, &Uninterruptible).unwrap();
    assert!(waits.missing().is_empty());
    assert!(!waits.wait(&Uninterruptible).unwrap());
    // A device that still writes for the dead process writes to memory that no slot has.
    let shown = |call: &super::SharedCall| slots.slot_memory(call.slots()[0]).to_vec();
    assert!(shown(&waits).iter().all(|&byte| byte == 0));
    assert!(shown(&here).iter().all(|&byte| byte == 5));
}

#[test]
fn what_is_written_behind_the_end_of_the_store_is_zeros() {
    let name = name("end");
    let whole = geometry();
    let bytes = whole.page_bytes as usize;
    let cut = Geometry { store_bytes: whole.store_bytes - whole.page_bytes / 2, ..whole };
    let wanted = Wanted { geometry: cut, ..wanted(&name) };
    let slots = Arc::new(SharedSlots::attach(&wanted, &Uninterruptible).unwrap());
    let call = slots.reserve("write", &keys(&[8, 9]), true, &Uninterruptible).unwrap();
    let mut content = vec![7_u8; 2 * bytes];
    call.fill(Span::of(&mut content)).unwrap();
    let mut shown = vec![1_u8; bytes];
    Span::of(&mut shown).copy_span(slots.slot_memory(call.slots()[0]));
    assert!(shown.iter().all(|&byte| byte == 7));
    Span::of(&mut shown).copy_span(slots.slot_memory(call.slots()[1]));
    assert!(shown[..bytes / 2].iter().all(|&byte| byte == 7));
    assert!(shown[bytes / 2..].iter().all(|&byte| byte == 0));
}

#[test]
fn what_killed_processes_leave_is_read_anew_where_the_store_may_be_written() {
    let name = name("left");
    let read_only = |changed| Wanted { changed: Some(changed), ..wanted(&name) };
    let finds = |wanted: &Wanted<'_>| {
        let slots = Arc::new(SharedSlots::attach(wanted, &Uninterruptible).unwrap());
        slots.find("ensure", &keys(&[1]), &Uninterruptible).unwrap().is_some()
    };
    // (who has left it, who comes, whether he finds it)
    let cases = [
        (read_only(5), read_only(5), true),
        (read_only(5), read_only(6), false),
        (read_only(5), wanted(&name), false),
        (wanted(&name), wanted(&name), false),
        (wanted(&name), read_only(5), false),
    ];
    for (left, comes, is_found) in cases {
        dies_after(|| {
            let slots = Arc::new(SharedSlots::attach(&left, &Uninterruptible).unwrap());
            slots.reserve("ensure", &keys(&[1]), false, &Uninterruptible).unwrap().settle(1);
            std::mem::forget(slots);
        });
        assert_eq!(finds(&comes), is_found, "{left:?} {comes:?}");
        assert!(!is_listed(&name));
    }
    // While a process uses them, they are what it has.
    let slots = attached(&name);
    slots.reserve("ensure", &keys(&[1]), false, &Uninterruptible).unwrap().settle(1);
    assert!(finds(&wanted(&name)));
}

#[test]
fn a_name_goes_with_the_last_process_also_where_the_first_died_as_it_began() {
    let name = name("half-begun");
    let first = attached(&name);
    first.object.mapping.set(header::STAGE, Stage::Begun as u64);
    drop(attached(&name));
    assert!(is_listed(&name));
    drop(first);
    assert!(!is_listed(&name));
}

#[test]
fn a_tenure_is_not_that_of_a_descendant_with_the_same_number() {
    let own = Tenure::new(OwnerIndex(1023), u16::MAX);
    assert_eq!(own.owner(), OwnerIndex(1023));
    assert!(own.is_own());
    dies_after(|| {
        assert!(!own.is_own());
        // As if this child had got the number that its parent had.
        let forks = u64::from(u16::MAX) << 48;
        let child = Tenure::new(OwnerIndex(1023), u16::MAX);
        assert!(child.is_own());
        assert!(!Tenure(own.0 & forks | child.0 & !forks).is_own());
    });
}

#[test]
fn processes_that_cannot_see_each_other_share_nothing() {
    let name = name("namespaces");
    let slots = attached(&name);
    // A process that seems dead from here.
    let locked = slots.object.lock(&Uninterruptible).unwrap();
    locked.table.admit(OwnerIndex(9), u64::from(u32::MAX >> 1) << 32 | 1);
    drop(locked);
    let own = slots.object.mapping.get(header::NAMESPACES);
    slots.object.mapping.set(header::NAMESPACES, own + 1);
    let refused = SharedSlots::attach(&wanted(&name), &Uninterruptible).unwrap_err();
    assert!(matches!(&refused, Error::Unsupported { reason, .. } if reason.contains("namespace")));
    // Also a child of fork, which has the memory already.
    dies_after(|| {
        let call = slots.reserve("ensure", &keys(&[1]), false, &Uninterruptible);
        assert!(matches!(call, Err(Error::Unsupported { .. })));
        assert!(matches!(slots.stats(&Uninterruptible), Err(Error::Unsupported { .. })));
    });
    // It must not take back what those hold whom it does not see.
    let locked = slots.object.lock(&Uninterruptible).unwrap();
    assert_eq!(locked.table.owners().count(), 2);
    assert_eq!(locked.table.counter(Counter::Deaths), 0);
    drop(locked);
    assert!(slots.reserve("ensure", &keys(&[1]), false, &Uninterruptible).is_ok(), "it is one");
    slots.object.mapping.set(header::NAMESPACES, own);
    drop(slots);
    assert!(!is_listed(&name));
}
