//! A file that grows beyond what a window's table can name is refused, not shown wrongly.

mod common;

use common::{number, numbered, open, options, ENGINES, NOW, PAGE};
use fremap_core::error::{Error, Uninterruptible};
use fremap_core::units::Selection;
use fremap_core::window::Target;

/// Pages that a table can number.
const NAMEABLE: i64 = 1 << 40;

#[test]
fn pages_beyond_what_a_table_can_name_are_refused_and_nothing_changes() {
    for engine in ENGINES {
        let store = numbered(64);
        let window = open(&store, &options(engine));
        let grown = (NAMEABLE as u64 + 4) * PAGE as u64;
        rustix::fs::ftruncate(store.fd().expect("one file"), grown).unwrap();
        store.refresh().unwrap();
        for page in [NAMEABLE, NAMEABLE + 3] {
            let (pages, at) = (Selection::List(vec![page]), Target::From(3));
            let refused = window.remap(&pages, &at, NOW, &Uninterruptible);
            assert!(matches!(refused, Err(Error::PageRange { .. })), "{engine}: {refused:?}");
        }
        assert_eq!(window.mapping(&Selection::All, &Uninterruptible).unwrap()[3], 3, "{engine}");
        assert_eq!(number(&window, 3), 4, "{engine}");
    }
}
