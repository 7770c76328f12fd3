//! The n-th system call of a kind fails: what is read is right, or the error says
//! what is not; nothing hangs, and the store goes on.
//!
//! Failures are asked for by process, so these tests take turns.

mod numbered;

use fremap_core::error::{Error, Result, Uninterruptible};
use fremap_core::store::{OpenMode, Store};
use fremap_core::sys::call::{clear, count, inject, Call};
use fremap_core::sys::span::Span;
use fremap_core::units::{FilePage, Pages};
use numbered::{
    assert_pages, cache, drop_cached, list, numbered, open, read, scattered, turn, Chunked, Scratch,
};
use rustix::io::Errno;

const PAGE: usize = 4096;
const PAGES: u64 = 1500;

fn file() -> Scratch {
    numbered(PAGES as usize * PAGE, PAGE)
}

/// Reads cold pages while calls fail; says how it ended and how many chunks'
/// pages came, all of them checked.
fn read_cold(file: &Scratch, store: &Store, pages: &[u64]) -> Result<usize> {
    drop_cached(file);
    read_checked(store, pages)
}

fn read_checked(store: &Store, pages: &[u64]) -> Result<usize> {
    let wanted: Vec<FilePage> = pages.iter().map(|&page| FilePage(page)).collect();
    let mut bytes = vec![0; pages.len() * PAGE];
    let mut sink = Chunked::new(Span::of(&mut bytes), PAGE, 128, 4);
    let outcome = store.scatter(&wanted, &mut sink, &Uninterruptible);
    let done = sink.completed_pages();
    assert_pages(&bytes[..done * PAGE], &pages[..done], PAGE, store.size_bytes());
    match outcome {
        Ok(()) => {
            assert_eq!(done, pages.len());
            Ok(done)
        }
        Err(error) => {
            assert_eq!(error.completed(), done, "{error}");
            Err(error)
        }
    }
}

#[test]
fn without_rings_threads_read() {
    let _turn = turn();
    let file = file();
    let pages = scattered(3000, PAGES, 1);
    for errno in [Errno::NOSYS, Errno::PERM, Errno::ACCESS, Errno::NOMEM] {
        let store = open(&file);
        inject(Call::RingSetup, 0, errno, 1000);
        let entered = count(Call::RingEnter);
        read_cold(&file, &store, &pages).expect("read");
        assert_eq!(count(Call::RingEnter), entered, "no ring was used");
        clear();
    }
}

#[test]
fn without_rings_and_threads_the_caller_reads() {
    let _turn = turn();
    let file = file();
    let store = open(&file);
    drop_cached(&file);
    inject(Call::RingSetup, 0, Errno::NOSYS, 1000);
    // Blocking signals is what starting threads begins with; so does copying.
    inject(Call::SignalMask, 0, Errno::INVAL, 1000);
    read_checked(&store, &scattered(1000, PAGES, 1)).expect("read");
}

#[test]
fn a_ring_that_fails_under_way() {
    let _turn = turn();
    let file = file();
    let pages = scattered(3000, PAGES, 2);
    let store = open(&file);
    for errno in [Errno::IO, Errno::AGAIN, Errno::BUSY, Errno::INTR, Errno::BADF] {
        for skip in [0, 1, 5] {
            for failures in [1, 1000] {
                inject(Call::RingEnter, skip, errno, failures);
                read_cold(&file, &store, &pages[..1000]).expect("read by other means");
                clear();
            }
        }
    }
    read_cold(&file, &store, &pages).expect("a new ring");
}

#[test]
fn a_read_that_fails_names_its_page() {
    let _turn = turn();
    let file = file();
    let pages = scattered(600, PAGES, 3);
    // Where threads read: a request that fails once is made again page by page …
    for skip in [0, 1, 17, 100] {
        let store = open(&file);
        inject(Call::RingSetup, 0, Errno::NOSYS, 1000);
        inject(Call::Read, skip, Errno::IO, 1);
        read_cold(&file, &store, &pages).expect("the second attempt is good");
        clear();
    }
    // … and one that fails for good is an error.
    for skip in [0, 200, 400] {
        let store = open(&file);
        inject(Call::RingSetup, 0, Errno::NOSYS, 1000);
        inject(Call::Read, skip, Errno::IO, 100_000);
        match read_cold(&file, &store, &pages) {
            Err(Error::Io { errno: Errno::IO, file_page: Some(page), completed, .. }) => {
                assert_eq!(pages[completed], page, "the first page that is missing");
            }
            other => panic!("expected EIO, got {other:?}"),
        }
        clear();
        read_cold(&file, &store, &pages).expect("the store goes on");
    }
}

#[test]
fn a_run_that_fails_is_read_page_by_page() {
    let _turn = turn();
    let file = file();
    let store = open(&file);
    let pages: Vec<u64> = (100..200).collect();
    drop_cached(&file);
    inject(Call::RingSetup, 0, Errno::NOSYS, 1000);
    inject(Call::Read, 0, Errno::IO, 1);
    let before = count(Call::Read);
    read_checked(&store, &pages).expect("the second attempt is good");
    assert_eq!(count(Call::Read) - before, 101);
}

#[test]
fn interrupted_and_busy_reads_go_on() {
    let _turn = turn();
    let file = file();
    let store = open(&file);
    let mut bytes = vec![0; PAGE];
    for errno in [Errno::INTR, Errno::AGAIN] {
        inject(Call::Read, 0, errno, 5);
        store.read_page(FilePage(9), Span::of(&mut bytes)).expect("read");
        assert_pages(&bytes, &[9], PAGE, store.size_bytes());
    }
    inject(Call::Read, 0, Errno::AGAIN, 1000);
    let error = store.read_page(FilePage(9), Span::of(&mut bytes)).expect_err("not for ever");
    assert!(matches!(error, Error::Io { errno: Errno::AGAIN, file_page: Some(9), .. }));
}

#[test]
fn memory_that_the_kernel_cannot_reach_is_filled_by_us() {
    let _turn = turn();
    let file = file();
    let store = open(&file);
    inject(Call::Read, 0, Errno::FAULT, 1);
    let (bytes, outcome) = read(&store, &[5]);
    outcome.expect("read");
    assert_pages(&bytes, &[5], PAGE, store.size_bytes());
    inject(Call::RingSetup, 0, Errno::NOSYS, 1000);
    // A run, then its first page: the rest of it is read as usual.
    inject(Call::Read, 0, Errno::FAULT, 2);
    read_cold(&file, &store, &(0..100).collect::<Vec<_>>()).expect("read");
}

#[test]
fn without_a_map_pages_are_read() {
    let _turn = turn();
    let file = file();
    let pages = scattered(3000, PAGES, 4);
    for (call, errno) in [
        (Call::Mmap, Errno::NOMEM),
        (Call::Mincore, Errno::AGAIN),
        (Call::Madvise, Errno::INVAL),
        (Call::SignalAction, Errno::INVAL),
        (Call::SignalMask, Errno::INVAL),
    ] {
        let store = open(&file);
        cache(&file, 0..PAGES * PAGE as u64);
        inject(call, 0, errno, 100_000);
        for _ in 0..3 {
            read_checked(&store, &pages).expect("read by system calls");
        }
        assert_eq!(store.counters().bytes_copied, 0, "{call:?}");
        clear();
        for _ in 0..3 {
            read_checked(&store, &pages).expect("read");
        }
        assert!(store.counters().bytes_copied > 0, "after {call:?}");
    }
}

#[test]
fn a_map_that_fails_under_way() {
    let _turn = turn();
    let file = file();
    let pages = scattered(3000, PAGES, 5);
    cache(&file, 0..PAGES * PAGE as u64);
    for call in [Call::Mincore, Call::Madvise, Call::SignalAction, Call::SignalMask, Call::Stat] {
        for skip in 0..12 {
            let store = open(&file);
            inject(call, skip, Errno::AGAIN, 1);
            for _ in 0..3 {
                read_checked(&store, &pages).expect("read");
            }
            clear();
        }
    }
}

#[test]
fn residency_that_cannot_be_asked() {
    let _turn = turn();
    let file = file();
    let store = open(&file);
    cache(&file, 0..PAGES * PAGE as u64);
    inject(Call::Mincore, 0, Errno::AGAIN, 1);
    let error = store.resident(&Pages::Range(0..PAGES)).expect_err("refused");
    assert!(matches!(error, Error::Io { errno: Errno::AGAIN, .. }));
    let store = open(&file);
    inject(Call::Mmap, 0, Errno::NODEV, 1000);
    let told = store.resident(&list(&[0, 5, 1499])).expect("asked another way");
    assert_eq!(told, [true, true, true]);
    inject(Call::Cachestat, 0, Errno::NOSYS, 1000);
    store.resident(&list(&[0])).expect_err("no way is left");
}

#[test]
fn writes_that_fail_say_how_far_they_came() {
    let _turn = turn();
    let file = Scratch::new();
    let mode = OpenMode::Create { size_bytes: 100 * PAGE as u64 };
    let store = Store::open(file.path(), mode, None, false).expect("made");
    let pages = [9, 50, 51, 3];
    let mut data: Vec<u8> =
        pages.iter().flat_map(|&page| numbered::page_content(page, PAGE)).collect();
    inject(Call::Write, 0, Errno::INTR, 4);
    store.write(&list(&pages), Span::of(&mut data), &Uninterruptible).expect("written");
    inject(Call::Write, 1, Errno::NOSPC, 1);
    match store.write(&list(&pages), Span::of(&mut data), &Uninterruptible) {
        Err(Error::Io { errno: Errno::NOSPC, file_page: Some(50), completed: 1, .. }) => {}
        other => panic!("expected ENOSPC, got {other:?}"),
    }
    inject(Call::Sync, 0, Errno::IO, 1);
    assert!(matches!(store.sync(), Err(Error::Io { errno: Errno::IO, .. })));
    // What was written may be lost, and nobody can write it again but the caller.
    store.sync().expect_err("not acknowledged");
    store.refresh().expect("acknowledged");
    store.sync().expect("the retry");
    assert_pages(&read(&store, &pages).0, &pages, PAGE, store.size_bytes());
}

#[test]
fn opening_that_fails_keeps_no_name() {
    let _turn = turn();
    let name = format!("fremap-failing-{}", std::process::id());
    inject(Call::Truncate, 0, Errno::NOSPC, 1);
    Store::shared_memory(&name, Some(4096), None).expect_err("no space");
    Store::shared_memory(&name, Some(4096), None).expect("the name is free");
    Store::unlink_shared_memory(&name).expect("unlinked");
}

#[test]
fn a_file_system_without_direct_reads_is_named() {
    let _turn = turn();
    let file = file();
    inject(Call::Open, 1, Errno::INVAL, 1);
    let error = Store::open(file.path(), OpenMode::Read, None, true).expect_err("refused");
    assert!(error.to_string().contains("O_DIRECT"), "{error}");
}

#[test]
fn prefetches_that_cannot_have_a_thread_or_are_refused() {
    let _turn = turn();
    let file = file();
    let store = open(&file);
    let pages = list(&scattered(400, PAGES, 7));
    inject(Call::SignalMask, 0, Errno::INVAL, 1);
    store.prefetch(&pages).expect("started by the caller");
    inject(Call::Advise, 0, Errno::INVAL, 1);
    let error = store.prefetch(&list(&[1])).expect_err("refused");
    assert!(matches!(error, Error::Io { errno: Errno::INVAL, .. }));
}
