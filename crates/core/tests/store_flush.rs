//! Pages written from where they lie: what arrives in which files, by how many writes, and
//! what is known of them when one fails.
//!
//! Calls are counted and failures asked for by process, so these tests take turns.

mod numbered;

use std::sync::Arc;

use fremap_core::error::{Error, Interrupt, Result, Uninterruptible};
use fremap_core::store::{OpenMode, Outgoing, Store};
use fremap_core::sys::call::{clear, count, inject, inject_short, Call};
use fremap_core::sys::mm::{Access, Region};
use fremap_core::sys::ring::Ring;
use fremap_core::units::FilePage;
use numbered::{numbered, page_content, truncate, turn, Scratch};
use rustix::io::Errno;

const PAGE: usize = 4096;
/// What is written to a page is the content of the one that is so much further on.
const NEW: u64 = 1 << 20;
/// Single pages, a run, and one that is longer than a write.
const PAGES: u64 = 800;
const FOR_GOOD: u32 = 1 << 30;

fn dirty() -> Vec<u64> {
    (0..200).step_by(7).chain(210..214).chain(300..700).collect()
}

/// How many writes those are.
const RUNS: u64 = 29 + 1 + 2;

/// Who carries writes out that are in flight together.
#[derive(Clone, Copy, Debug, PartialEq)]
enum By {
    Ring,
    Threads,
    Caller,
}

const EACH: [By; 3] = [By::Ring, By::Threads, By::Caller];

impl By {
    /// Takes away what would be used before it.
    fn prepare(self) {
        clear();
        if self != Self::Ring {
            inject(Call::RingSetup, 0, Errno::NOSYS, FOR_GOOD);
        }
        if self == Self::Caller {
            // Blocking signals is what starting threads begins with.
            inject(Call::SignalMask, 0, Errno::INVAL, FOR_GOOD);
        }
    }

    /// The call that writes, or the answer to it.
    fn call(self) -> Call {
        if self == Self::Ring && Ring::new().is_ok() {
            Call::RingWriteAnswer
        } else {
            Call::Write
        }
    }

    /// Which of these lengths a write may have: `O_DIRECT` makes it in whole pages, while
    /// the answer of a ring may say anything.
    fn lengths(self, all: &[usize]) -> Vec<usize> {
        let answer = self.call() == Call::RingWriteAnswer;
        all.iter().copied().filter(|bytes| answer || bytes.is_multiple_of(PAGE)).collect()
    }
}

/// The memory of pages that were changed.
struct Changed {
    memory: Region,
    pages: Vec<u64>,
    page_bytes: usize,
}

impl Changed {
    fn new(pages: &[u64], page_bytes: usize) -> Self {
        let memory = Region::anonymous(pages.len() * page_bytes, PAGE, Access::Write);
        let memory = memory.expect("memory");
        for (index, &page) in pages.iter().enumerate() {
            let content = page_content(page + NEW, page_bytes);
            memory.span(index * page_bytes, page_bytes).copy_from(&content);
        }
        Self { memory, pages: pages.to_vec(), page_bytes }
    }

    fn write(&self, store: &Store, interrupt: &dyn Interrupt) -> Result<()> {
        let size = store.size_bytes();
        let outgoing = |(index, &page): (usize, &u64)| Outgoing {
            page: FilePage(page),
            content: self.memory.span(index * self.page_bytes, self.page_bytes),
            file_bytes: self.page_bytes.min((size - page * self.page_bytes as u64) as usize),
        };
        let outgoing: Vec<Outgoing<'_>> = self.pages.iter().enumerate().map(outgoing).collect();
        store.write_from(&outgoing, interrupt)
    }
}

fn open(file: &Scratch, page_bytes: usize, direct: bool) -> Store {
    Store::open(file.path(), OpenMode::ReadWrite, Some(page_bytes as u64), direct).expect("opened")
}

/// Which pages of a file hold what was written; the others hold what they held before.
fn written(file: &Scratch, first: u64, page_bytes: usize) -> Vec<u64> {
    let bytes = std::fs::read(file.path()).expect("read");
    let mut written = Vec::new();
    for (page, found) in (first..).zip(bytes.chunks(page_bytes)) {
        if found == &page_content(page + NEW, page_bytes)[..found.len()] {
            written.push(page);
        } else {
            let before = page_content(page - first, page_bytes);
            assert!(found == &before[..found.len()], "file page {page} is wrong");
        }
    }
    written
}

/// What is known of pages when their writing failed.
fn check_failed(outcome: Result<()>, file: &Scratch, pages: &[u64], errno: Errno) -> usize {
    let Err(Error::Io { operation: "write", path, file_page, errno: told, completed, .. }) =
        outcome
    else {
        panic!("expected {errno}, got {outcome:?}");
    };
    assert_eq!((path.as_deref(), told), (Some(file.path()), errno));
    assert_eq!(file_page, Some(pages[completed]), "the first that is missing");
    let found = written(file, 0, PAGE);
    assert!(found.starts_with(&pages[..completed]), "{completed} are in the file");
    assert!(found.iter().all(|page| pages.contains(page)));
    completed
}

#[test]
fn each_run_of_a_direct_file_is_one_write() {
    let _turn = turn();
    let changed = Changed::new(&dirty(), PAGE);
    for by in EACH {
        by.prepare();
        let file = numbered(PAGES as usize * PAGE, PAGE);
        let store = open(&file, PAGE, true);
        let before = [Call::RingWriteAnswer, Call::Write].map(count);
        changed.write(&store, &Uninterruptible).expect("written");
        let after = [Call::RingWriteAnswer, Call::Write].map(count);
        let made = if by.call() == Call::Write { [0, RUNS] } else { [RUNS, 0] };
        assert_eq!([after[0] - before[0], after[1] - before[1]], made, "{by:?}");
        assert_eq!(written(&file, 0, PAGE), dirty());
        assert_eq!(store.counters().bytes_written, (dirty().len() * PAGE) as u64);
        store.sync().expect("synced");
    }
}

#[test]
fn one_run_and_runs_through_the_page_cache_need_no_queue() {
    let _turn = turn();
    for (pages, direct, runs) in [(vec![3, 4, 5], true, 1), (dirty(), false, RUNS)] {
        let file = numbered(PAGES as usize * PAGE, PAGE);
        let store = open(&file, PAGE, direct);
        let before = [Call::RingSetup, Call::SignalMask, Call::Write].map(count);
        Changed::new(&pages, PAGE).write(&store, &Uninterruptible).expect("written");
        let after = [Call::RingSetup, Call::SignalMask, Call::Write].map(count);
        assert_eq!(after, [before[0], before[1], before[2] + runs]);
        assert_eq!(written(&file, 0, PAGE), pages);
    }
}

#[test]
fn large_pages_and_a_file_that_ends_within_one() {
    let _turn = turn();
    for page_bytes in [PAGE, 16 << 10, 2 << 20] {
        for tail in [100, PAGE - 1, page_bytes - PAGE + 33] {
            for by in EACH {
                by.prepare();
                let size = 6 * page_bytes + tail;
                let file = numbered(size, page_bytes);
                let store = open(&file, page_bytes, true);
                // What is read here is in the page cache, beside what is written directly.
                assert!(written(&file, 0, page_bytes).is_empty());
                let changed = Changed::new(&[0, 2, 4, 5, 6], page_bytes);
                changed.write(&store, &Uninterruptible).expect("written");
                store.sync().expect("synced");
                assert_eq!(written(&file, 0, page_bytes), changed.pages, "{by:?}");
                let found = std::fs::metadata(file.path()).expect("there").len();
                assert_eq!(found, size as u64, "writing never changes the size");
            }
        }
    }
}

#[test]
fn short_writes_go_on_from_a_whole_page() {
    let _turn = turn();
    let changed = Changed::new(&dirty(), PAGE);
    for by in EACH {
        let file = numbered(PAGES as usize * PAGE, PAGE);
        let store = open(&file, PAGE, true);
        // Whichever run it is, it is written in two parts, or again where no page came.
        for bytes in by.lengths(&[0, 512, PAGE - 1, PAGE, PAGE + 512, 3 * PAGE, 200 * PAGE + 1]) {
            for skip in (0..RUNS as u32).step_by(3) {
                by.prepare();
                inject_short(by.call(), skip, bytes as u32, 1);
                let before = count(by.call());
                changed.write(&store, &Uninterruptible).expect("written");
                let made = count(by.call()) - before;
                assert!((RUNS..=RUNS + 1).contains(&made), "{made} writes");
                assert!(bytes > 0 || made == RUNS + 1);
            }
        }
        assert_eq!(written(&file, 0, PAGE), dirty());
        // A page of each at a time.
        by.prepare();
        for bytes in by.lengths(&[PAGE, PAGE + 7]) {
            inject_short(by.call(), 0, bytes as u32, FOR_GOOD);
        }
        let before = count(by.call());
        changed.write(&store, &Uninterruptible).expect("written");
        assert_eq!(count(by.call()) - before, dirty().len() as u64, "{by:?}");
        assert_eq!(written(&file, 0, PAGE), dirty());
    }
}

#[test]
fn writes_that_get_no_further_end() {
    let _turn = turn();
    let changed = Changed::new(&dirty(), PAGE);
    for by in EACH {
        for bytes in by.lengths(&[0, 1, PAGE - 1]) {
            let file = numbered(PAGES as usize * PAGE, PAGE);
            let store = open(&file, PAGE, true);
            by.prepare();
            inject_short(by.call(), 0, bytes as u32, FOR_GOOD);
            let outcome = changed.write(&store, &Uninterruptible);
            assert_eq!(check_failed(outcome, &file, &dirty(), Errno::NOSPC), 0);
        }
    }
}

#[test]
fn interrupted_and_busy_writes_are_made_again() {
    let _turn = turn();
    let changed = Changed::new(&dirty(), PAGE);
    for by in EACH {
        for errno in [Errno::INTR, Errno::AGAIN] {
            let file = numbered(PAGES as usize * PAGE, PAGE);
            let store = open(&file, PAGE, true);
            for skip in [0, 1, 30] {
                by.prepare();
                inject(by.call(), skip, errno, 5);
                let before = count(by.call());
                changed.write(&store, &Uninterruptible).expect("written");
                assert_eq!(count(by.call()) - before, RUNS + 5, "{by:?}");
            }
            assert_eq!(written(&file, 0, PAGE), dirty());
            by.prepare();
            inject(by.call(), 0, errno, FOR_GOOD);
            let outcome = changed.write(&store, &Uninterruptible);
            assert_eq!(check_failed(outcome, &file, &dirty(), errno), 0, "not for ever");
        }
    }
}

#[test]
fn the_first_run_that_fails_is_told_of() {
    let _turn = turn();
    let changed = Changed::new(&dirty(), PAGE);
    for by in EACH {
        for errno in [Errno::IO, Errno::NOSPC] {
            for skip in [0, 1, 7, 20, 29, 30, 31] {
                for times in [1, FOR_GOOD] {
                    let file = numbered(PAGES as usize * PAGE, PAGE);
                    let store = open(&file, PAGE, true);
                    by.prepare();
                    inject(by.call(), skip, errno, times);
                    let outcome = changed.write(&store, &Uninterruptible);
                    let completed = check_failed(outcome, &file, &dirty(), errno);
                    if by.call() == Call::Write {
                        let missing = dirty()[completed];
                        assert!(!written(&file, 0, PAGE).contains(&missing), "{by:?}");
                    }
                    clear();
                    changed.write(&store, &Uninterruptible).expect("the retry");
                    assert_eq!(written(&file, 0, PAGE), dirty());
                }
            }
        }
    }
}

#[test]
fn a_ring_that_fails_under_way() {
    let _turn = turn();
    let changed = Changed::new(&dirty(), PAGE);
    for errno in [Errno::IO, Errno::AGAIN, Errno::BUSY, Errno::INTR, Errno::BADF] {
        for skip in 0..4 {
            for failures in [1, FOR_GOOD] {
                let file = numbered(PAGES as usize * PAGE, PAGE);
                let store = open(&file, PAGE, true);
                inject(Call::RingEnter, skip, errno, failures);
                changed.write(&store, &Uninterruptible).expect("written by other means");
                clear();
                assert_eq!(written(&file, 0, PAGE), dirty());
            }
        }
    }
}

/// A row of a direct file, one through the page cache, and a direct one that ends within a page.
fn row() -> (Vec<Scratch>, Store) {
    let sizes = [10 * PAGE, 10 * PAGE, 10 * PAGE + 100];
    let files: Vec<Scratch> = sizes.iter().map(|&size| numbered(size, PAGE)).collect();
    let members = files.iter().zip([true, false, true]);
    let members = members.map(|(file, direct)| Arc::new(open(file, PAGE, direct))).collect();
    (files, Store::concat(members).expect("a row"))
}

fn written_in_row(files: &[Scratch]) -> Vec<u64> {
    let firsts = (0..).step_by(10);
    files.iter().zip(firsts).flat_map(|(file, first)| written(file, first, PAGE)).collect()
}

#[test]
fn a_row_of_direct_files_and_others() {
    let _turn = turn();
    let changed = Changed::new(&[0, 2, 8, 9, 10, 11, 15, 19, 20, 22, 29, 30], PAGE);
    for by in EACH {
        by.prepare();
        let (files, store) = row();
        let before = [Call::RingWriteAnswer, Call::Write].map(count);
        changed.write(&store, &Uninterruptible).expect("written");
        let after = [Call::RingWriteAnswer, Call::Write].map(count);
        assert_eq!(written_in_row(&files), changed.pages);
        // 0, 2, 8 to 9; 10 to 11, 15, 19; 20, 22, 29, and what is left of 30.
        let made = if by.call() == Call::Write { [0, 10] } else { [6, 4] };
        assert_eq!([after[0] - before[0], after[1] - before[1]], made, "{by:?}");
        assert_eq!(std::fs::metadata(files[2].path()).expect("there").len(), 40960 + 100);
        // Of the first file nothing fails, of the second the last run does.
        by.prepare();
        inject(Call::Write, if made[0] == 0 { 8 } else { 2 }, Errno::IO, 1);
        match changed.write(&store, &Uninterruptible) {
            Err(Error::Io {
                errno: Errno::IO, file_page: Some(19), completed: 7, path, ..
            }) => {
                assert_eq!(path.as_deref(), Some(files[1].path()));
            }
            other => panic!("expected EIO, got {other:?}"),
        }
    }
}

#[test]
fn a_file_that_was_cut_is_not_made_longer() {
    let _turn = turn();
    let pages = [0, 2, 3, 4, 5, 7, 9];
    let changed = Changed::new(&pages, PAGE);
    for by in EACH {
        for (left, missing, completed) in
            [(0, 0, 0), (3 * PAGE, 3, 2), (4 * PAGE + 10, 5, 4), (6 * PAGE, 7, 5), (9 * PAGE, 9, 6)]
        {
            let file = numbered(10 * PAGE, PAGE);
            let store = open(&file, PAGE, true);
            truncate(&file, left as u64);
            by.prepare();
            match changed.write(&store, &Uninterruptible) {
                Err(Error::Truncated {
                    operation: "write", file_page, completed: told, ..
                }) => {
                    assert_eq!((file_page, told), (missing, completed), "{by:?}, {left}");
                }
                other => panic!("expected a truncation, got {other:?}"),
            }
            assert_eq!(std::fs::metadata(file.path()).expect("there").len(), left as u64);
            assert!(written(&file, 0, PAGE).starts_with(&pages[..completed]));
        }
    }
}

#[test]
fn a_size_that_cannot_be_asked() {
    let _turn = turn();
    let changed = Changed::new(&dirty(), PAGE);
    for by in EACH {
        for skip in [0, 5, 31] {
            let file = numbered(PAGES as usize * PAGE, PAGE);
            let store = open(&file, PAGE, true);
            by.prepare();
            inject(Call::Stat, skip, Errno::IO, 1);
            match changed.write(&store, &Uninterruptible) {
                Err(Error::Io { errno: Errno::IO, file_page: None, completed, .. }) => {
                    assert!(written(&file, 0, PAGE).starts_with(&dirty()[..completed]));
                    let before = if skip == 31 { dirty().len() - 144 } else { skip as usize };
                    assert_eq!(completed, before, "{by:?}");
                }
                other => panic!("expected EIO, got {other:?}"),
            }
        }
    }
}

struct Stop;

impl Interrupt for Stop {
    fn check(&self) -> Result<()> {
        Err(Error::Interrupted { completed: 0 })
    }
}

#[test]
fn an_interrupt_says_how_far_it_came() {
    let _turn = turn();
    // So many that it is asked for, whatever they take.
    let pages: Vec<u64> = (0..12_000).step_by(2).collect();
    let changed = Changed::new(&pages, PAGE);
    for by in EACH {
        let file = numbered(12_000 * PAGE, PAGE);
        let store = open(&file, PAGE, true);
        by.prepare();
        match changed.write(&store, &Stop) {
            Err(Error::Interrupted { completed }) => {
                let found = written(&file, 0, PAGE);
                assert!(found.starts_with(&pages[..completed]));
                assert!(found.len() < pages.len(), "{by:?}: it went on to the end");
            }
            other => panic!("expected an interrupt, got {other:?}"),
        }
    }
}
