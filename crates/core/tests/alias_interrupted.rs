//! A remap of engine alias that is stopped: taking back what was done could take as long as to
//! go on. System calls are counted for a whole process, so this test program has one test.

mod common;

use std::cell::Cell;
use std::sync::Arc;

use common::{open, options, StopAt, LAZY, NOW, PAGE};
use fremap_core::error::{Error, Uninterruptible};
use fremap_core::store::Store;
use fremap_core::sys::call::{count, Call};
use fremap_core::units::Selection;
use fremap_core::window::{EngineKind, Target};

#[test]
fn an_aliased_remap_that_is_stopped_takes_nothing_back() {
    const COUNT: i64 = 8192;
    /// Extents that are mapped between two questions.
    const BATCH: u64 = 1024;
    let store = Arc::new(Store::memory(4 << 30, Some(PAGE as u64)).expect("memory"));
    // Each its own mapping, and none next to what was there.
    let files: Vec<i64> = (0..COUNT).map(|page| (COUNT - page) * 2).collect();
    let all = Selection::Range(0, COUNT);
    for at in 1..=9 {
        let window = open(&store, &options(EngineKind::Alias));
        let interrupt = StopAt { asked: Cell::new(0), at };
        let before = count(Call::Mmap);
        let target = Target::From(0);
        let error = window
            .remap(&Selection::List(files.clone()), &target, LAZY, &interrupt)
            .expect_err("interrupted");
        assert!(matches!(error, Error::Interrupted { .. }), "{error}");
        assert_eq!(interrupt.asked.get(), at, "asked again after it was to stop");
        let shown = window.mapping(&Selection::All, &Uninterruptible).expect("mapping");
        let shown = &shown[..COUNT as usize];
        let done = shown.iter().zip(&files).take_while(|(shown, file)| shown == file).count();
        let mapped = count(Call::Mmap) - before;
        assert_eq!((done as u64, mapped % BATCH), (mapped, 0), "the front, and nothing twice");
        let mut rest = (0..COUNT).zip(shown).skip(done);
        assert!(rest.all(|(page, shown)| page == *shown), "the rest is as it was");
        // What the table says is what is shown.
        window.populate(&all, false, &Uninterruptible).expect("populated");
        window.remap(&all, &target, NOW, &Uninterruptible).expect("carried out");
    }
}
