//! A page that the kernel would not drop is never shown as what it became.
//! Failures hold for a whole process, so this test program has one test.

mod common;

use common::{number, numbered, open, options, remap, ENGINES, LAZY, NOW};
use fremap_core::error::{Result, Uninterruptible};
use fremap_core::sys::call::{clear, inject, Call};
use fremap_core::units::Selection;
use fremap_core::window::{EngineKind, Target, Window};
use rustix::io::Errno;

const ONE: Selection = Selection::Range(10, 11);

fn evict(window: &Window) -> Result<()> {
    window.evict(&ONE, false, &Uninterruptible)
}

fn remap_lazily(window: &Window) -> Result<()> {
    let (pages, at) = (Selection::List(vec![40]), Target::From(10));
    window.remap(&pages, &at, LAZY, &Uninterruptible).map(|_| ())
}

/// The kernel refuses all advice, whichever way it is given.
fn refused(call: impl FnOnce() -> Result<()>) -> Result<()> {
    inject(Call::Madvise, 0, Errno::AGAIN, u32::MAX);
    inject(Call::ProcessMadvise, 0, Errno::AGAIN, u32::MAX);
    let outcome = call();
    clear();
    outcome
}

#[test]
fn a_later_remap_or_evict_drops_what_a_failed_one_left() {
    let store = numbered(64);
    let in_order: Vec<i64> = (0..64).collect();
    for engine in ENGINES {
        for fails in [evict, remap_lazily] {
            let window = open(&store, &options(engine));
            remap(&window, &in_order, 0, NOW);
            let outcome = refused(|| fails(&window));
            if engine != EngineKind::Alias {
                let error = outcome.expect_err("the kernel refused");
                assert_eq!(error.completed(), 0, "{engine}");
                assert_eq!(
                    window.mapping(&Selection::All, &Uninterruptible).unwrap()[10],
                    10,
                    "{engine}"
                );
            }
            remap_lazily(&window).unwrap();
            assert_eq!(
                window.mapping(&Selection::All, &Uninterruptible).unwrap()[10],
                40,
                "{engine}"
            );
            if engine == EngineKind::Eager {
                assert!(
                    !window.present(&Selection::All, &Uninterruptible).unwrap()[10],
                    "what is there is out of date"
                );
                window.populate(&ONE, false, &Uninterruptible).unwrap();
            }
            assert_eq!(number(&window, 10), 41, "{engine}");
            evict(&window).unwrap();
            window.populate(&ONE, false, &Uninterruptible).unwrap();
            assert_eq!(number(&window, 10), 41, "{engine}");
        }
    }
}
