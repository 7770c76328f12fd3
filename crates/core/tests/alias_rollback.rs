//! A remap that fails leaves placed pages as they were, those that it had replaced too.
//! Failures hold for a whole process, so this test program has one test.

mod common;

use common::{numbered, open, options, shown, NOW, PAGE};
use fremap_core::error::Uninterruptible;
use fremap_core::sys::call::{clear, inject, Call};
use fremap_core::units::Selection;
use fremap_core::window::{EngineKind, RemapOptions, Target};
use rustix::io::Errno;

#[test]
fn placed_pages_survive_a_remap_that_fails() {
    let store = numbered(64);
    let content = [200_u64.to_le_bytes(); PAGE / 8].concat();
    // Page 11 is replaced before the failure, page 20 would be after it.
    let at = [10, 11, 20];
    for first_that_fails in 0..3 {
        let window = open(&store, &options(EngineKind::Alias));
        for page in [11, 20] {
            let page = Selection::Range(page, page + 1);
            window.place(&page, Some(&content), &Uninterruptible).unwrap();
        }
        inject(Call::Mmap, first_that_fails, Errno::NOMEM, 1);
        let outcome = window.remap(
            &Selection::List(vec![30, 40, 50]),
            &Target::List(at.to_vec()),
            RemapOptions { discard: true, ..NOW },
            &Uninterruptible,
        );
        clear();
        assert_eq!(outcome.expect_err("no memory").completed(), 0);
        let mapping = window.mapping(&Selection::All, &Uninterruptible).unwrap();
        assert_eq!(
            [10, 11, 20].map(|page: usize| mapping[page]),
            [10, -2, -2],
            "{first_that_fails}"
        );
        assert_eq!(shown(&window, 9..12), [10, 11, 200], "{first_that_fails}");
        assert_eq!(shown(&window, 19..22), [20, 200, 22], "{first_that_fails}");
    }
}
