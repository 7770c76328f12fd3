//! Windows on real stores, engine by engine: little of what the tests in Python do to them.

mod common;

use common::{number, numbered, open, options, remap, shown, ENGINES, NOW};
use fremap_core::error::Uninterruptible;
use fremap_core::units::{Prot, Selection};
use fremap_core::window::{RemapOptions, Target, WindowOptions};

#[test]
fn pages_are_remapped_backwards() {
    let store = numbered(3000);
    for engine in ENGINES {
        let window = open(&store, &options(engine));
        assert_eq!(shown(&window, 0..3000), (1..=3000).collect::<Vec<_>>(), "{engine}");
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
