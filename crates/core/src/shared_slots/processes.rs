//! Tests: processes that die with the lock, or between two steps of an object's beginning and end.

use std::path::PathBuf;
use std::sync::Arc;

use super::layout::{header, Counter, Geometry, Layout, Stage};
use super::object::{self, Object, Wanted};
use super::table::Words;
use super::SharedSlots;
use crate::error::{Error, Uninterruptible};
use crate::slot_table::Key;
use crate::sys::shm::dies_after;
use crate::sys::span::system_page_bytes;

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
fn processes_that_cannot_see_each_other_share_nothing() {
    let name = name("namespaces");
    let slots = attached(&name);
    let own = slots.object.mapping.get(header::NAMESPACES);
    slots.object.mapping.set(header::NAMESPACES, own + 1);
    let refused = SharedSlots::attach(&wanted(&name), &Uninterruptible).unwrap_err();
    assert!(matches!(&refused, Error::Unsupported { reason, .. } if reason.contains("namespace")));
    // Also a child of fork, which has the memory already.
    dies_after(|| {
        let call = slots.reserve("ensure", &keys(&[1]), false, &Uninterruptible);
        assert!(matches!(call, Err(Error::Unsupported { .. })));
    });
    assert!(slots.reserve("ensure", &keys(&[1]), false, &Uninterruptible).is_ok(), "it is one");
    slots.object.mapping.set(header::NAMESPACES, own);
    drop(slots);
    assert!(!is_listed(&name));
}
