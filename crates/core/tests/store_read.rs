//! Reading stores: every way in which a page may come, and every way it may not.

mod numbered;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};

use fremap_core::error::{Error, Interrupt, Result, Uninterruptible};
use fremap_core::store::{OpenMode, Store};
use fremap_core::sys::cachestat::cached_pages;
use fremap_core::sys::mm::{Access, Region, Sharing};
use fremap_core::sys::span::Span;
use fremap_core::units::{FilePage, Pages};
use numbered::{
    assert_pages, cache, drop_cached, list, numbered, open, open_sized, read, scattered, truncate,
    Chunked,
};

const PAGE: usize = 4096;

/// Enough to cross chunks of the source map and of the sink.
const PAGES: u64 = 3000;

fn whole_file() -> numbered::Scratch {
    numbered(PAGES as usize * PAGE, PAGE)
}

fn assert_read(store: &Store, pages: &[u64]) {
    let (bytes, outcome) = read(store, pages);
    outcome.expect("read");
    assert_pages(&bytes, pages, store.page_size().bytes(), store.size_bytes());
}

#[test]
fn warm_pages_in_any_order_with_repeats() {
    let file = whole_file();
    cache(&file, 0..PAGES * PAGE as u64);
    let store = open(&file);
    for seed in 0..4 {
        assert_read(&store, &scattered(5000, PAGES, seed));
    }
    let counters = store.counters();
    assert!(counters.bytes_copied > 0, "the source map is used once it pays: {counters:?}");
    let read_before = store.counters().bytes_read;
    assert_read(&store, &scattered(5000, PAGES, 9));
    assert_eq!(store.counters().bytes_read, read_before, "warm pages need no system call");
    assert!(store.source_table_bytes() > 0);
}

#[test]
fn pages_of_which_none_or_half_are_cached() {
    let file = whole_file();
    let store = open(&file);
    for (seed, cached) in [(0, 0), (1, 0), (0, PAGES / 2), (1, PAGES / 2), (2, PAGES / 2)] {
        drop_cached(&file);
        cache(&file, 0..cached * PAGE as u64);
        assert_read(&store, &scattered(5000, PAGES, seed));
    }
}

#[test]
fn runs_of_neighbours_are_one_request() {
    let file = whole_file();
    let store = open(&file);
    drop_cached(&file);
    let pages: Vec<u64> = (0..256).collect();
    assert_read(&store, &pages);
    assert_eq!(store.counters().reads, 1);
    assert_eq!(store.counters().bytes_read, 256 * PAGE as u64);
}

#[test]
fn repeats_are_read_once() {
    let file = whole_file();
    let store = open(&file);
    drop_cached(&file);
    assert_read(&store, &[100, 7, 100, 7, 100, 2000, 7]);
    assert_eq!(store.counters().bytes_read, 3 * PAGE as u64);
}

#[test]
fn the_last_page_may_be_partial() {
    let size = 300 * PAGE + 1234;
    let file = numbered(size, PAGE);
    let store = open(&file);
    assert_eq!(store.page_count(), 301);
    let pages: Vec<u64> = scattered(600, 301, 1).into_iter().chain([300, 299, 300]).collect();
    for _ in 0..4 {
        assert_read(&store, &pages);
        assert_read(&store, &[300]);
    }
    drop_cached(&file);
    assert_read(&store, &pages);
}

#[test]
fn what_others_leave_behind_the_end_is_not_seen() {
    let file = numbered(PAGE + 100, PAGE);
    let store = open(&file);
    let other = std::fs::File::options().read(true).write(true).open(file.path()).expect("opened");
    let region = Region::anonymous(PAGE, PAGE, Access::Write).expect("memory");
    region
        .map_file(Sharing::Shared, 0, PAGE, other.as_fd(), PAGE as u64, Access::Write)
        .expect("mapped");
    region.span(100, 8).copy_from(&[0xff; 8]);
    for _ in 0..40 {
        assert_read(&store, &[0, 1, 0, 1]);
    }
}

#[test]
fn large_pages() {
    for page_bytes in [64 << 10, 2 << 20, 4 << 20] {
        let size = 5 * page_bytes + 4096 * 3 + 5;
        let file = numbered(size, page_bytes);
        let store = open_sized(&file, page_bytes as u64);
        assert_eq!(store.page_count(), 6);
        for _ in 0..3 {
            assert_read(&store, &[5, 0, 3, 3, 1, 2, 4, 5]);
        }
        drop_cached(&file);
        assert_read(&store, &[5, 0, 3, 3, 1, 2, 4, 5]);
    }
}

#[test]
fn holes_of_shared_memory_read_as_zeros_and_stay_holes() {
    let store = Store::memory(PAGES * PAGE as u64, None).expect("made");
    let mut written = vec![7; PAGE];
    store.write(&list(&[5]), Span::of(&mut written), &Uninterruptible).expect("written");
    let (bytes, outcome) = read(&store, &scattered(4000, PAGES, 3));
    outcome.expect("read");
    assert!(bytes.iter().all(|&byte| byte == 0 || byte == 7));
    let stat = rustix::fs::fstat(store.fd().expect("one file")).expect("stat");
    assert_eq!(stat.st_blocks, 8, "one page");
    let resident = store.resident(&Pages::Range(0..PAGES)).expect("told");
    assert_eq!(resident.iter().filter(|&&here| here).count(), 1);
    assert!(resident[5]);
}

#[test]
fn written_shared_memory_is_copied_from_the_map() {
    let store = Store::memory(PAGES * PAGE as u64, None).expect("made");
    let mut bytes: Vec<u8> =
        (0..PAGES).flat_map(|page| numbered::page_content(page, PAGE)).collect();
    store.write(&Pages::Range(0..PAGES), Span::of(&mut bytes), &Uninterruptible).expect("written");
    for seed in 0..3 {
        assert_read(&store, &scattered(5000, PAGES, seed));
    }
    assert!(store.counters().bytes_copied > 0);
}

/// Waits until the file's last change is past by the kernel's clock: until then nothing is copied.
fn wait_until_settled(store: &Store) {
    let stat = rustix::fs::fstat(store.fd().expect("one file")).expect("stat");
    let changed = (stat.st_ctime, i64::try_from(stat.st_ctime_nsec).expect("below a second"));
    loop {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
        if (now.tv_sec, now.tv_nsec) > changed {
            return;
        }
        std::thread::yield_now();
    }
}

#[test]
fn what_was_dropped_from_a_populated_map_is_read_and_populated_anew() {
    let store = Store::memory(512 * PAGE as u64, None).expect("made");
    let mut bytes: Vec<u8> = (0..512).flat_map(|page| numbered::page_content(page, PAGE)).collect();
    let mut fill =
        || store.write(&Pages::Range(0..512), Span::of(&mut bytes), &Uninterruptible).expect("ok");
    let pages = scattered(400, 512, 2);
    for _ in 0..3 {
        fill();
        wait_until_settled(&store);
        for _ in 0..3 {
            assert_read(&store, &pages);
        }
        let copied = store.counters().bytes_copied;
        assert!(copied > 0);
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(store.fd().expect("one file"), flags, 0, store.size_bytes())
            .expect("punched");
        let (zeros, outcome) = read(&store, &pages);
        outcome.expect("read");
        assert!(zeros.iter().all(|&byte| byte == 0));
        assert_eq!(store.counters().bytes_copied, copied, "holes are not touched");
        assert_eq!(rustix::fs::fstat(store.fd().expect("one file")).expect("stat").st_blocks, 0);
        assert_eq!(store.source_table_bytes(), PAGE as u64);
    }
}

#[test]
fn a_cached_page_is_copied_without_a_read_when_asked() {
    let file = whole_file();
    drop_cached(&file);
    cache(&file, 0..40 * PAGE as u64);
    let store = open(&file);
    let pages: Vec<FilePage> = (0..40).rev().map(FilePage).collect();
    assert_eq!(store.resident(&Pages::List(pages.clone())).expect("told"), vec![true; 40]);
    let mut bytes = vec![0; 40 * PAGE];
    let mut sink = Chunked::new(Span::of(&mut bytes), PAGE, 16, 2);
    store.scatter_resident(&pages, &mut sink, &Uninterruptible).expect("read");
    assert_eq!(store.counters().bytes_read, 0);
    let numbers: Vec<u64> = pages.iter().map(|page| page.0).collect();
    assert_pages(&bytes, &numbers, PAGE, store.size_bytes());
}

/// Bytes that this thread has had read from devices.
fn device_bytes() -> u64 {
    let counts = std::fs::read_to_string("/proc/thread-self/io").expect("read");
    let line = counts.lines().find_map(|line| line.strip_prefix("read_bytes: ")).expect("counted");
    line.parse().expect("a number")
}

#[test]
fn resident_pages_are_had_without_the_device() {
    let file = numbered(4000 * PAGE, PAGE);
    drop_cached(&file);
    // Reading on from the front leaves marks behind at which the kernel reads ahead.
    let mut front = vec![0; 1100 * PAGE];
    let mut reader = std::fs::File::open(file.path()).expect("opened");
    std::io::Read::read_exact(&mut reader, &mut front).expect("read");
    let store = open(&file);
    // What is being read ahead is in the cache at once and resident when it has come.
    let mask = loop {
        let mask = store.resident(&Pages::Range(0..4000)).expect("told");
        let here = mask.iter().filter(|&&here| here).count() as u64;
        // Before Linux 6.5 nobody can tell, and the mask is taken as it is.
        if cached_pages(store.fd().expect("one file"), 0, store.size_bytes())
            .map_or(true, |now| now == here)
        {
            break mask;
        }
    };
    let wanted: Vec<FilePage> =
        (0..4000).filter(|&page| mask[page as usize]).map(FilePage).collect();
    assert!(wanted.len() >= 1100 && wanted.len() < 4000);
    let before = device_bytes();
    for wanted in wanted.chunks(8) {
        // A few pages from a new store: too few for a map to be populated.
        let store = open(&file);
        let mut bytes = vec![0; wanted.len() * PAGE];
        let mut sink = Chunked::new(Span::of(&mut bytes), PAGE, 64, 4);
        store.scatter_resident(wanted, &mut sink, &Uninterruptible).expect("read");
        let pages: Vec<u64> = wanted.iter().map(|page| page.0).collect();
        assert_pages(&bytes, &pages, PAGE, store.size_bytes());
    }
    assert_eq!(device_bytes() - before, 0);
}

#[test]
fn residency_is_told_page_by_page() {
    let file = whole_file();
    drop_cached(&file);
    let store = open(&file);
    cache(&file, 10 * PAGE as u64..20 * PAGE as u64);
    cache(&file, 2000 * PAGE as u64..2001 * PAGE as u64);
    let expected = |page: u64| (10..20).contains(&page) || page == 2000;
    let all = store.resident(&Pages::Range(0..PAGES)).expect("told");
    assert_eq!(all, (0..PAGES).map(expected).collect::<Vec<_>>());
    let some = scattered(4000, PAGES, 5);
    let told = store.resident(&list(&some)).expect("told");
    assert_eq!(told, some.iter().map(|&page| expected(page)).collect::<Vec<_>>());
    assert_eq!(store.counters().bytes_read, 0);
}

/// Runs `body` in a child, as another user if one is given, and says how it exited.
fn in_child(user: Option<u32>, body: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child calls `body` and ends; it has one thread.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "fork");
        if child == 0 {
            let changed = user.is_none_or(|user| {
                libc::setresgid(user, user, user) == 0 && libc::setresuid(user, user, user) == 0
            });
            libc::_exit(if changed { body() } else { 99 });
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        assert!(libc::WIFEXITED(status), "the child died: {status}");
        libc::WEXITSTATUS(status)
    }
}

#[test]
fn a_child_of_fork_reads_through_rings_of_its_own() {
    let file = whole_file();
    let store = open(&file);
    let pages = scattered(1000, PAGES, 11);
    drop_cached(&file);
    assert_read(&store, &pages);
    drop_cached(&file);
    let good = |bytes: &[u8]| {
        let expected = pages.iter().map(|&page| numbered::page_content(page, PAGE));
        expected.zip(bytes.chunks(PAGE)).all(|(expected, found)| expected == found)
    };
    let child = in_child(None, || {
        let (bytes, outcome) = read(&store, &pages);
        i32::from(outcome.is_err() || !good(&bytes))
    });
    assert_eq!(child, 0);
    drop_cached(&file);
    assert_read(&store, &pages);
}

#[test]
fn residency_is_not_told_to_everybody_and_reads_do_without() {
    const NOBODY: u32 = 65_534;
    // Ours while we are root; else one that root owns will do.
    let own = whole_file();
    let is_root = rustix::process::geteuid().is_root();
    let path = if is_root { own.path() } else { std::path::Path::new("/bin/sh") };
    let store = Store::open(path, OpenMode::Read, None, false).expect("opened");
    let pages: Vec<u64> = (0..store.page_count()).rev().collect();
    let front = std::fs::read(path).expect("read")[..PAGE].to_vec();
    let body = || {
        let told = store.resident(&Pages::Range(0..1));
        for _ in 0..3 {
            let (bytes, outcome) = read(&store, &pages);
            if outcome.is_err() || bytes[bytes.len() - PAGE..] != front {
                return 1;
            }
        }
        // What mincore may lie about is not copied.
        let copied = store.counters().bytes_copied;
        if matches!(told, Err(Error::Unsupported { .. })) && copied == 0 {
            0
        } else {
            2
        }
    };
    assert_eq!(in_child(is_root.then_some(NOBODY), body), 0);
}

#[test]
fn a_large_page_is_resident_when_all_of_it_is() {
    let file = numbered(4 << 20, PAGE);
    drop_cached(&file);
    cache(&file, 0..(128 << 10));
    let store = open_sized(&file, 64 << 10);
    cache(&file, (192 << 10)..(196 << 10));
    let told = store.resident(&Pages::Range(0..5)).expect("told");
    assert_eq!(told, [true, true, false, false, false]);
}

#[test]
fn prefetch_brings_pages_without_waiting() {
    let file = whole_file();
    drop_cached(&file);
    let store = open(&file);
    store.prefetch(&list(&[3, 4, 5, 2999])).expect("started");
    store.prefetch(&list(&scattered(500, PAGES, 2))).expect("started");
    assert_read(&store, &[3, 4, 5, 2999]);
}

#[test]
fn direct_reads() {
    let size = 700 * PAGE + 77;
    let file = numbered(size, PAGE);
    let store = Store::open(file.path(), OpenMode::Read, None, true).expect("opened");
    assert!(store.direct());
    let pages = scattered(2000, 701, 4);
    drop_cached(&file);
    assert_read(&store, &pages);
    assert_read(&store, &[700]);
    // Memory at an odd address goes through a buffer.
    let mut bytes = vec![0; pages.len() * PAGE + 1];
    store.read(&list(&pages), Span::of(&mut bytes[1..]), &Uninterruptible).expect("read");
    assert_pages(&bytes[1..], &pages, PAGE, size as u64);
}

#[test]
fn memory_at_an_odd_address() {
    let file = whole_file();
    let store = open(&file);
    let pages = scattered(3000, PAGES, 8);
    for _ in 0..3 {
        let mut bytes = vec![0; pages.len() * PAGE + 3];
        store.read(&list(&pages), Span::of(&mut bytes[3..]), &Uninterruptible).expect("read");
        assert_pages(&bytes[3..], &pages, PAGE, store.size_bytes());
    }
}

fn assert_truncated(outcome: Result<()>, page: u64, done: usize) {
    match outcome {
        Err(Error::Truncated { file_page, completed, .. }) => {
            assert_eq!((file_page, completed), (page, done));
        }
        other => panic!("expected a truncation, got {other:?}"),
    }
}

#[test]
fn a_file_cut_short_is_an_error_that_names_the_page() {
    let file = whole_file();
    for warm in [false, true] {
        truncate(&file, PAGES * PAGE as u64);
        let store = open(&file);
        if warm {
            for seed in 0..3 {
                let _ = read(&store, &scattered(6000, PAGES, seed));
            }
            assert!(store.counters().bytes_copied > 0);
        }
        truncate(&file, 1500 * PAGE as u64);
        assert_truncated(read(&store, &[3, 1499, 1500, 7]).1, 1500, 2);
        assert_truncated(read(&store, &(0..PAGES).collect::<Vec<_>>()).1, 1500, 1500);
        assert_truncated(read(&store, &[2900]).1, 2900, 0);
        store.refresh().expect("refreshed");
        assert_eq!(store.page_count(), 1500);
        read(&store, &(0..1500).collect::<Vec<_>>()).1.expect("all of it is there");
        assert_truncated(read(&store, &[0, 2900]).1, 2900, 1);
    }
}

#[test]
fn a_file_cut_within_a_page_shows_no_silent_zeros() {
    let file = numbered(512 * PAGE, PAGE);
    let store = open(&file);
    for _ in 0..3 {
        assert_read(&store, &scattered(1000, 512, 1));
    }
    truncate(&file, 512 * PAGE as u64 - 100);
    assert_truncated(read(&store, &[1, 2, 511, 3]).1, 511, 2);
}

#[test]
fn truncation_under_way_never_crashes() {
    let file = numbered(1024 * PAGE, PAGE);
    let store = open(&file);
    let rounds = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while rounds.load(Ordering::Relaxed) < 200 {
                truncate(&file, 100 * PAGE as u64);
                truncate(&file, 1024 * PAGE as u64);
            }
        });
        for seed in 0..200 {
            match read(&store, &scattered(2000, 1024, seed)).1 {
                Ok(()) | Err(Error::Truncated { .. }) => {}
                Err(other) => panic!("{other}"),
            }
            rounds.fetch_add(1, Ordering::Relaxed);
        }
    });
}

#[test]
fn several_threads_at_once() {
    let file = whole_file();
    drop_cached(&file);
    let store = open(&file);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (store, file) = (&store, &file);
            scope.spawn(move || {
                for round in 0..6 {
                    assert_read(store, &scattered(2000, PAGES, thread * 100 + round));
                    drop_cached(file);
                }
            });
        }
    });
}

#[test]
fn a_refresh_does_not_disturb_reads_under_way() {
    let file = whole_file();
    let store = open(&file);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..50 {
                store.refresh().expect("refreshed");
            }
        });
        for seed in 0..10 {
            assert_read(&store, &scattered(4000, PAGES, seed));
        }
    });
}

#[test]
fn chunks_come_in_order_and_are_bounded() {
    let file = whole_file();
    let store = open(&file);
    for (chunk_pages, limit) in [(1, 1), (7, 2), (64, 4), (1000, 3), (100_000, 1)] {
        drop_cached(&file);
        let pages = scattered(3001, PAGES, chunk_pages as u64);
        let wanted: Vec<FilePage> = pages.iter().map(|&page| FilePage(page)).collect();
        let mut bytes = vec![0; pages.len() * PAGE];
        let mut sink = Chunked::new(Span::of(&mut bytes), PAGE, chunk_pages, limit);
        store.scatter(&wanted, &mut sink, &Uninterruptible).expect("read");
        assert_eq!(sink.completed_pages(), pages.len());
        assert_pages(&bytes, &pages, PAGE, store.size_bytes());
    }
}

#[test]
fn more_requests_than_are_planned_at_once() {
    let file = numbered(64 * PAGE, PAGE);
    let store = open(&file);
    let pages = scattered(150_000, 64, 6);
    let wanted: Vec<FilePage> = pages.iter().map(|&page| FilePage(page)).collect();
    let mut bytes = vec![0; pages.len() * PAGE];
    for chunk_pages in [1000, 100_000] {
        let mut sink = Chunked::new(Span::of(&mut bytes), PAGE, chunk_pages, 2);
        store.scatter(&wanted, &mut sink, &Uninterruptible).expect("read");
        assert_eq!(sink.completed_pages(), pages.len());
        assert_pages(&bytes, &pages, PAGE, store.size_bytes());
    }
}

#[test]
fn an_error_of_the_sink_ends_the_read() {
    let file = whole_file();
    drop_cached(&file);
    let store = open(&file);
    let wanted: Vec<FilePage> = (0..1000).map(FilePage).collect();
    let mut bytes = vec![0; 1000 * PAGE];
    let mut sink = Chunked::new(Span::of(&mut bytes), PAGE, 50, 4);
    sink.fail_after = 3;
    let error = store.scatter(&wanted, &mut sink, &Uninterruptible).expect_err("full");
    assert!(matches!(error, Error::Argument(_)));
    assert_eq!(sink.completed_pages(), 150);
    assert_read(&store, &(0..1000).collect::<Vec<_>>());
}

struct StopAfter(AtomicUsize);

impl Interrupt for StopAfter {
    fn check(&self) -> Result<()> {
        let left = self.0.load(Ordering::Relaxed);
        if left == 0 {
            return Err(Error::Interrupted { completed: 0 });
        }
        self.0.store(left - 1, Ordering::Relaxed);
        Ok(())
    }
}

#[test]
fn an_interrupt_says_how_far_it_came() {
    let file = whole_file();
    let store = open(&file);
    let wanted: Vec<FilePage> = scattered(60_000, PAGES, 1).into_iter().map(FilePage).collect();
    let mut bytes = vec![0; 60_000 * PAGE];
    for checks in 0..3 {
        drop_cached(&file);
        let mut sink = Chunked::new(Span::of(&mut bytes), PAGE, 100, 4);
        let interrupt = StopAfter(AtomicUsize::new(checks));
        match store.scatter(&wanted, &mut sink, &interrupt) {
            Err(Error::Interrupted { completed }) => assert_eq!(completed, sink.completed_pages()),
            other => panic!("expected an interrupt, got {other:?}"),
        }
    }
    assert_read(&store, &[1, 2, 3]);
}
