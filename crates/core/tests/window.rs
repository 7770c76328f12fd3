//! Windows on real stores, engine by engine.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use common::{number, numbered, open, options, remap, shown, ENGINES, LAZY, NOW, PAGE};
use fremap_core::engine::EngineKind;
use fremap_core::error::{Error, Uninterruptible};
use fremap_core::store::Store;
use fremap_core::sys::span::Span;
use fremap_core::units::{Pages, Prot, Selection};
use fremap_core::window::{RemapOptions, Target, WindowOptions};

#[test]
fn a_new_window_shows_the_store() {
    let store = numbered(20);
    for engine in ENGINES {
        let window = open(&store, &options(engine));
        assert_eq!(shown(&window, 0..20), (1..=20).collect::<Vec<_>>(), "{engine}");
    }
}

#[test]
fn pages_are_remapped_backwards() {
    let store = numbered(3000);
    for engine in ENGINES {
        let window = open(&store, &options(engine));
        for _ in 0..3 {
            let backwards: Vec<i64> = (0..3000).rev().collect();
            assert!(remap(&window, &backwards, 0, NOW).iter().all(|&here| here));
            assert_eq!(shown(&window, 0..3000), (1..=3000).rev().collect::<Vec<_>>(), "{engine}");
            let forwards: Vec<i64> = (0..3000).collect();
            remap(&window, &forwards, 0, NOW);
            assert_eq!(shown(&window, 0..3000), (1..=3000).collect::<Vec<_>>(), "{engine}");
        }
    }
}

#[test]
fn repeats_and_scattered_targets() {
    let store = numbered(50);
    for engine in ENGINES {
        let window = open(&store, &options(engine));
        let at = Target::List(vec![40, 3, 4, 0]);
        let pages = Selection::List(vec![7, 7, 8, 49]);
        window.remap(&pages, &at, NOW, &Uninterruptible).unwrap();
        let numbers = [40, 3, 4, 0, 1].map(|page| number(&window, page));
        assert_eq!(numbers, [8, 8, 9, 50, 2], "{engine}");
    }
}

#[test]
fn a_lazy_remap_is_brought_by_a_touch_and_never_shows_the_old_page() {
    let store = numbered(50);
    for engine in [EngineKind::Alias, EngineKind::Paged] {
        let window = open(&store, &WindowOptions { populate: true, ..options(engine) });
        let mask = remap(&window, &[30, 31, 5], 10, LAZY);
        assert_eq!(mask, [false; 3]);
        assert_eq!(
            window.present(&Selection::All, &Uninterruptible).unwrap()[10..13],
            [false; 3],
            "{engine}"
        );
        assert_eq!(shown(&window, 10..13), [31, 32, 6], "{engine}");
        assert_eq!(
            window.present(&Selection::All, &Uninterruptible).unwrap()[10..13],
            [true; 3],
            "{engine}"
        );
    }
}

#[test]
fn a_paged_window_is_one_mapping_whatever_it_shows() {
    let store = numbered(2000);
    let window = open(&store, &options(EngineKind::Paged));
    let every_seventh: Vec<i64> = (0..2000).map(|page| (page * 7) % 2000).collect();
    remap(&window, &every_seventh, 0, NOW);
    let odd = Selection::List((0..1000).map(|page| page * 2 + 1).collect());
    window.protect(&odd, Prot::None, &Uninterruptible).unwrap();
    assert_eq!(window.vma_count().unwrap(), 1);
    window.protect(&odd, Prot::Read, &Uninterruptible).unwrap();
    assert_eq!(number(&window, 3), 22);
    assert_eq!(window.vma_count().unwrap(), 1);
}

#[test]
fn evicted_pages_come_back_right() {
    let store = numbered(100);
    for engine in [EngineKind::Alias, EngineKind::Paged] {
        let window = open(&store, &options(engine));
        remap(&window, &(0..100).rev().collect::<Vec<_>>(), 0, NOW);
        window.evict(&Selection::Range(10, 60), false, &Uninterruptible).unwrap();
        assert_eq!(shown(&window, 0..100), (1..=100).rev().collect::<Vec<_>>(), "{engine}");
    }
}

#[test]
fn placed_pages_are_kept_until_discarded() {
    let store = numbered(10);
    for engine in ENGINES {
        let window = open(&store, &options(engine));
        let content = [200_u64.to_le_bytes(); PAGE / 8].concat();
        window.place(&Selection::Range(2, 4), Some(&content), &Uninterruptible).unwrap();
        window.place(&Selection::Range(5, 6), None, &Uninterruptible).unwrap();
        assert_eq!(shown(&window, 1..6), [2, 200, 200, 5, 6], "{engine}");
        assert_eq!(
            window.mapping(&Selection::All, &Uninterruptible).unwrap()[1..6],
            [1, -2, -2, 4, -2],
            "{engine}"
        );
        let refused =
            window.remap(&Selection::Range(0, 4), &Target::From(0), NOW, &Uninterruptible);
        assert!(matches!(refused, Err(Error::Placed { window_page: 2, .. })), "{engine}");
        window.protect(&Selection::All, Prot::None, &Uninterruptible).unwrap();
        window.protect(&Selection::All, Prot::Read, &Uninterruptible).unwrap();
        assert_eq!(shown(&window, 1..6), [2, 200, 200, 5, 6], "{engine} after protect");
        remap(&window, &[9, 8], 2, RemapOptions { discard: true, ..NOW });
        assert_eq!(shown(&window, 2..4), [10, 9], "{engine}");
        window.evict(&Selection::Range(5, 6), true, &Uninterruptible).unwrap();
        assert_eq!(window.mapping(&Selection::All, &Uninterruptible).unwrap()[5], -1, "{engine}");
    }
}

#[test]
fn pages_without_access_stay_so_when_they_are_remapped() {
    let store = numbered(10);
    for engine in ENGINES {
        let window = open(&store, &options(engine));
        window.protect(&Selection::Range(3, 5), Prot::None, &Uninterruptible).unwrap();
        let mask = remap(&window, &[9, 8, 7, 6], 2, NOW);
        assert_eq!(mask, [true, false, false, true], "{engine}");
        assert_eq!(
            window.protection(&Selection::All, &Uninterruptible).unwrap()[2..6],
            [Prot::Read, Prot::None, Prot::None, Prot::Read]
        );
        let given = RemapOptions { prot: Some(Prot::Read), ..NOW };
        assert_eq!(remap(&window, &[1, 2], 3, given), [true, true]);
        assert_eq!(shown(&window, 2..6), [10, 2, 3, 7], "{engine}");
    }
}

#[test]
fn large_pages_are_remapped_whole() {
    let store = Store::memory(64 * 65536 - 5000, Some(65536)).unwrap();
    let mut content: Vec<u8> = (0..64 * 65536 - 5000_u32).map(|byte| (byte / 4096) as u8).collect();
    content.resize(64 * 65536, 0);
    store.write(&Pages::Range(0..64), Span::of(&mut content), &Uninterruptible).unwrap();
    let store = Arc::new(store);
    for engine in [EngineKind::Paged, EngineKind::Eager] {
        let window = open(&store, &options(engine));
        remap(&window, &(0..64).rev().collect::<Vec<_>>(), 0, NOW);
        for page in 0..64 {
            let bytes = window.memory().part(page * 65536, 65536).to_vec();
            assert_eq!(bytes, content[(63 - page) * 65536..][..65536], "{engine} page {page}");
        }
    }
}

#[test]
fn readers_see_the_old_page_or_the_new_one_and_never_another() {
    let store = numbered(512);
    for engine in [EngineKind::Alias, EngineKind::Paged] {
        let window = open(&store, &WindowOptions { page_count: Some(256), ..options(engine) });
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        for page in 0..256 {
                            let bytes = window.memory().part(page * PAGE + 64, 8).to_vec();
                            let word = u64::from_le_bytes(bytes.try_into().unwrap()) as usize;
                            let right = [page + 1, page + 257, 256 - page, 512 - page];
                            assert!(right.contains(&word), "page {page} shows {word}");
                        }
                    }
                });
            }
            let rounds: [Vec<i64>; 4] = [
                (256..512).collect(),
                (0..256).rev().collect(),
                (0..256).collect(),
                (256..512).rev().collect(),
            ];
            for round in 0..200 {
                let options = if round % 3 == 0 { LAZY } else { NOW };
                remap(&window, &rounds[round % 4], 0, options);
                if round % 5 == 0 {
                    window.evict(&Selection::All, false, &Uninterruptible).unwrap();
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}

#[test]
fn a_locked_window_is_populated_and_refuses_to_drop() {
    let store = numbered(64);
    for engine in ENGINES {
        let window = open(&store, &WindowOptions { lock: true, ..options(engine) });
        assert!(
            window.present(&Selection::All, &Uninterruptible).unwrap().iter().all(|&here| here),
            "{engine}"
        );
        remap(&window, &(0..64).rev().collect::<Vec<_>>(), 0, NOW);
        assert_eq!(number(&window, 0), 64, "{engine}");
        assert!(window.evict(&Selection::All, false, &Uninterruptible).is_err());
        window.protect(&Selection::Range(0, 9), Prot::None, &Uninterruptible).unwrap();
        window.protect(&Selection::Range(0, 9), Prot::Read, &Uninterruptible).unwrap();
        assert_eq!(number(&window, 5), 59, "{engine}");
    }
}

#[test]
fn a_page_that_loads_nothing_between_two_of_one_run_is_changed_too() {
    let store = numbered(8);
    for engine in ENGINES {
        let window = open(&store, &WindowOptions { page_count: Some(3), ..options(engine) });
        window.protect(&Selection::Range(0, 1), Prot::None, &Uninterruptible).unwrap();
        let at = Target::List(vec![1, 0, 2]);
        window.remap(&Selection::Range(5, 8), &at, NOW, &Uninterruptible).unwrap();
        assert_eq!(
            window.mapping(&Selection::All, &Uninterruptible).unwrap(),
            [6, 5, 7],
            "{engine}"
        );
    }
}
