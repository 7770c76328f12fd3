//! Writing stores: what arrives, and what never does.

mod numbered;

use fremap_core::error::{Error, Uninterruptible};
use fremap_core::store::{OpenMode, Store};
use fremap_core::sys::span::Span;
use fremap_core::units::Pages;
use numbered::{assert_pages, list, numbered, page_content, read, scattered, truncate, Scratch};

const PAGE: usize = 4096;

fn make(size_bytes: u64, page_bytes: u64, direct: bool) -> (Scratch, Store) {
    let file = Scratch::new();
    let mode = OpenMode::Create { size_bytes };
    let store = Store::open(file.path(), mode, Some(page_bytes), direct).expect("made");
    (file, store)
}

fn contents(pages: &[u64], page_bytes: usize) -> Vec<u8> {
    pages.iter().flat_map(|&page| page_content(page, page_bytes)).collect()
}

fn write(store: &Store, pages: &[u64]) -> fremap_core::error::Result<()> {
    let mut data = contents(pages, store.page_size().bytes());
    store.write(&list(pages), Span::of(&mut data), &Uninterruptible)
}

#[test]
fn pages_in_any_order_and_in_runs() {
    for direct in [false, true] {
        for page_bytes in [PAGE, 64 << 10, 2 << 20] {
            let size = 7 * page_bytes as u64 + 4096 + 33;
            let (file, store) = make(size, page_bytes as u64, direct);
            let pages = [7, 0, 1, 2, 3, 6, 5, 4];
            write(&store, &pages).expect("written");
            store.sync().expect("synced");
            let (bytes, outcome) = read(&store, &pages);
            outcome.expect("read");
            assert_pages(&bytes, &pages, page_bytes, size);
            let found = std::fs::metadata(file.path()).expect("there").len();
            assert_eq!(found, size, "writing never changes the size");
        }
    }
}

#[test]
fn runs_longer_than_the_buffer() {
    let count = 1000;
    let (_file, store) = make(count * PAGE as u64, PAGE as u64, false);
    let pages: Vec<u64> = (0..count).collect();
    let mut data = contents(&pages, PAGE);
    store.write(&Pages::Range(0..count), Span::of(&mut data), &Uninterruptible).expect("written");
    assert_pages(&read(&store, &pages).0, &pages, PAGE, count * PAGE as u64);
}

#[test]
fn the_last_of_two_writes_to_a_page_stays() {
    let (_file, store) = make(4 * PAGE as u64, PAGE as u64, false);
    let mut data: Vec<u8> = [vec![1; PAGE], vec![2; PAGE], vec![3; PAGE]].concat();
    store.write(&list(&[2, 2, 2]), Span::of(&mut data), &Uninterruptible).expect("written");
    assert_eq!(read(&store, &[2]).0, vec![3; PAGE]);
}

#[test]
fn a_file_that_was_cut_is_not_made_longer() {
    let (file, store) = make(10 * PAGE as u64, PAGE as u64, false);
    truncate(&file, 4 * PAGE as u64 + 10);
    match write(&store, &[0, 4, 5, 1]) {
        Err(Error::Truncated { file_page: 5, completed: 2, .. }) => {}
        other => panic!("expected a truncation, got {other:?}"),
    }
    let found = std::fs::metadata(file.path()).expect("there").len();
    assert_eq!(found, 4 * PAGE as u64 + 10);
    assert!(matches!(
        write(&store, &[9]),
        Err(Error::Truncated { file_page: 9, completed: 0, .. })
    ));
}

#[test]
fn a_file_that_grew_keeps_what_is_behind_the_old_end() {
    let (file, store) = make(PAGE as u64 + 100, PAGE as u64, false);
    truncate(&file, 2 * PAGE as u64);
    write(&store, &[1]).expect("written");
    let bytes = std::fs::read(file.path()).expect("read");
    assert_eq!(bytes[PAGE..PAGE + 100], page_content(1, PAGE)[..100]);
    assert!(bytes[PAGE + 100..].iter().all(|&byte| byte == 0));
}

#[test]
fn what_may_not_be_written() {
    let file = numbered(2 * PAGE, PAGE);
    let store = Store::open(file.path(), OpenMode::Read, None, false).expect("opened");
    assert!(matches!(write(&store, &[0]), Err(Error::Unsupported { .. })));
    let store = Store::open(file.path(), OpenMode::ReadWrite, None, false).expect("opened");
    let mut short = vec![0; PAGE - 1];
    let outcome = store.write(&list(&[0]), Span::of(&mut short), &Uninterruptible);
    assert!(matches!(outcome, Err(Error::Argument(_))));
    write(&store, &[]).expect("nothing");
    assert_pages(&read(&store, &[0, 1]).0, &[0, 1], PAGE, 2 * PAGE as u64);
}

#[test]
fn writes_are_seen_through_a_populated_map() {
    let (_file, store) = make(600 * PAGE as u64, PAGE as u64, false);
    let all: Vec<u64> = (0..600).collect();
    write(&store, &all).expect("written");
    let some = scattered(2000, 600, 3);
    for _ in 0..3 {
        assert_pages(&read(&store, &some).0, &some, PAGE, 600 * PAGE as u64);
    }
    assert!(store.counters().bytes_copied > 0);
    let mut ones = vec![1; PAGE];
    store.write(&list(&[77]), Span::of(&mut ones), &Uninterruptible).expect("written");
    assert_eq!(read(&store, &[77, 77]).0, vec![1; 2 * PAGE]);
}
