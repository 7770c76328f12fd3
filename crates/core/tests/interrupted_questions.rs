//! Questions about many pages stop at the first answer that asks them to, having done at
//! most a piece.

mod common;

use std::cell::Cell;

use common::{open, options, StopAt, PAGE};
use fremap_core::error::{Error, Interrupt, Result, Uninterruptible};
use fremap_core::store::Store;
use fremap_core::units::{FilePage, Pages, Selection};
use fremap_core::window::EngineKind;

/// That a call asks at least `pieces` times, and does nothing more once it is to stop.
fn stops<T: std::fmt::Debug>(pieces: usize, call: impl Fn(&dyn Interrupt) -> Result<T>) {
    for at in [1, pieces] {
        let interrupt = StopAt { asked: Cell::new(0), at };
        let error = call(&interrupt).expect_err("interrupted");
        assert!(matches!(error, Error::Interrupted { .. }), "{error}");
        assert_eq!(interrupt.asked.get(), at, "asked again after it was to stop");
    }
    call(&Uninterruptible).expect("carried out");
}

fn large_store() -> Store {
    Store::memory(4 << 30, Some(PAGE as u64)).expect("memory")
}

#[test]
fn residency_is_asked_for_in_pieces() {
    let store = large_store();
    stops(16, |interrupt| store.resident_until(&Pages::Range(0..1 << 20), interrupt));
}

#[test]
fn a_scattered_prefetch_can_be_stopped_before_it_is_queued() {
    let store = large_store();
    let pages: Vec<FilePage> = (0..10_000).map(|page| FilePage(page * 7 % 65_536)).collect();
    let pages = Pages::List(pages);
    stops(2, |interrupt| store.prefetch_until(&pages, interrupt));
}

#[test]
fn what_a_window_shows_is_told_in_pieces() {
    for engine in [EngineKind::Alias, EngineKind::Paged] {
        let store = std::sync::Arc::new(large_store());
        let window = open(&store, &options(engine));
        stops(2, |interrupt| window.mapping(&Selection::All, interrupt));
        stops(2, |interrupt| window.protection(&Selection::All, interrupt));
        stops(4, |interrupt| window.present(&Selection::All, interrupt));
        stops(4, |interrupt| window.dirty(&Selection::All, interrupt));
    }
}

#[test]
fn a_pin_that_is_stopped_leaves_nothing_pinned() {
    let store = std::sync::Arc::new(large_store());
    let window = std::sync::Arc::new(open(&store, &options(EngineKind::Paged)));
    let many = Selection::Range(0, 20_000);
    for at in 1..=4 {
        let interrupt = StopAt { asked: Cell::new(0), at };
        let error = window.pin(&many, &interrupt).expect_err("interrupted");
        assert!(matches!(error, Error::Interrupted { .. }), "{error}");
        assert_eq!(interrupt.asked.get(), at, "asked again after it was to stop");
        // The first pieces are of pinning: none has been loaded.
        let present = window.present(&Selection::All, &Uninterruptible).expect("present");
        assert!(!present.contains(&true));
        // What is pinned cannot be evicted.
        window.evict(&many, false, &Uninterruptible).expect("nothing is pinned");
    }
}

#[test]
fn an_aliased_eviction_stops_between_pieces() {
    let store = std::sync::Arc::new(large_store());
    let window = open(&store, &options(EngineKind::Alias));
    let all = Selection::Range(0, 20_000);
    stops(5, |interrupt| window.evict(&all, false, interrupt));
}
