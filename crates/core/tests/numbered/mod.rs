//! Files whose every word says where it belongs.

#![allow(dead_code, reason = "each test file uses its part")]

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use fremap_core::error::{Result, Uninterruptible};
use fremap_core::scatter::Sink;
use fremap_core::store::{OpenMode, Store};
use fremap_core::sys::call::clear;
use fremap_core::sys::span::Span;
use fremap_core::units::{FilePage, Pages};

static MADE: AtomicU64 = AtomicU64::new(0);

/// The turn of a test that has calls fail, which they do for a whole process; every call
/// goes through again when it ends.
pub struct Turn(#[allow(dead_code, reason = "held")] MutexGuard<'static, ()>);

impl Drop for Turn {
    fn drop(&mut self) {
        clear();
    }
}

pub fn turn() -> Turn {
    static TURN: Mutex<()> = Mutex::new(());
    Turn(TURN.lock().unwrap_or_else(PoisonError::into_inner))
}

/// A path of this test's own; what is there goes when it is dropped.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("fremap-test-{}-{number}", std::process::id());
        // On a disk, where /tmp may be in memory.
        Self(Path::new(env!("CARGO_TARGET_TMPDIR")).join(name))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.0.exists() {
            std::fs::remove_file(&self.0).expect("the scratch file can be removed");
        }
    }
}

/// What a page of a numbered file holds: in each word the page and the word's place.
///
/// Tests compare the same few pages again and again, and without optimization making one
/// takes longer than reading it: small ones are kept.
pub fn page_content(page: u64, page_bytes: usize) -> Vec<u8> {
    thread_local! {
        static KEPT: RefCell<HashMap<(u64, usize), Vec<u8>>> = RefCell::default();
    }
    if page_bytes > 4096 {
        return made(page, page_bytes);
    }
    KEPT.with_borrow_mut(|kept| {
        kept.entry((page, page_bytes)).or_insert_with(|| made(page, page_bytes)).clone()
    })
}

fn made(page: u64, page_bytes: usize) -> Vec<u8> {
    let mut content = vec![0; page_bytes];
    for (word, bytes) in (0_u64..).zip(content.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&((page << 24) | word | 1 << 60).to_ne_bytes());
    }
    content
}

/// A file of `size_bytes` bytes with numbered pages.
pub fn numbered(size_bytes: usize, page_bytes: usize) -> Scratch {
    let scratch = Scratch::new();
    let mut file = std::io::BufWriter::new(File::create(scratch.path()).expect("made"));
    for (page, start) in (0_u64..).zip((0..size_bytes).step_by(page_bytes)) {
        let content = page_content(page, page_bytes);
        file.write_all(&content[..page_bytes.min(size_bytes - start)]).expect("written");
    }
    let file = file.into_inner().expect("written");
    file.sync_all().expect("synced");
    settle(&file);
    scratch
}

/// Waits until the kernel's coarse clock is past the file's last change: a read that began in the
/// same tick would be done again.
fn settle(file: &File) {
    let changed = file.metadata().expect("known");
    let changed = (changed.ctime(), changed.ctime_nsec());
    loop {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
        if (now.tv_sec, now.tv_nsec) > changed {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

pub fn open(scratch: &Scratch) -> Store {
    Store::open(scratch.path(), OpenMode::Read, None, false).expect("opened")
}

pub fn open_sized(scratch: &Scratch, page_bytes: u64) -> Store {
    Store::open(scratch.path(), OpenMode::Read, Some(page_bytes), false).expect("opened")
}

/// Drops the file's pages from the page cache.
pub fn drop_cached(scratch: &Scratch) {
    let file = File::open(scratch.path()).expect("opened");
    file.sync_all().expect("synced");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("dropped");
}

/// Brings a range of bytes into the page cache, and nothing else.
pub fn cache(scratch: &Scratch, bytes: Range<u64>) {
    let file = File::open(scratch.path()).expect("opened");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).expect("advised");
    let mut buffer = vec![0; (bytes.end - bytes.start) as usize];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut buffer, bytes.start).expect("read");
}

pub fn truncate(scratch: &Scratch, size_bytes: u64) {
    let file = File::options().write(true).open(scratch.path()).expect("opened");
    file.set_len(size_bytes).expect("cut");
}

pub fn list(pages: &[u64]) -> Pages<FilePage> {
    Pages::List(pages.iter().map(|&page| FilePage(page)).collect())
}

/// `count` pages below `limit` in an order that looks random, with repeats.
pub fn scattered(count: usize, limit: u64, seed: u64) -> Vec<u64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % limit
    })
    .take(count)
    .collect()
}

/// Reads pages into new memory.
pub fn read(store: &Store, pages: &[u64]) -> (Vec<u8>, Result<()>) {
    let mut bytes = vec![0xa5; pages.len() * store.page_size().bytes()];
    let outcome = store.read(&list(pages), Span::of(&mut bytes), &Uninterruptible);
    (bytes, outcome)
}

/// Fails unless `bytes` are these pages of a numbered file of `size_bytes`.
pub fn assert_pages(bytes: &[u8], pages: &[u64], page_bytes: usize, size_bytes: u64) {
    for (&page, found) in pages.iter().zip(bytes.chunks(page_bytes)) {
        let mut expected = page_content(page, page_bytes);
        let within = size_bytes.saturating_sub(page * page_bytes as u64).min(page_bytes as u64);
        expected[within as usize..].fill(0);
        assert!(found == expected, "file page {page} is wrong");
    }
}

/// Memory for all pages of a read, in chunks, that notes what it was told.
pub struct Chunked<'m> {
    pub memory: Span<'m>,
    pub page_bytes: usize,
    pub chunk_pages: usize,
    pub limit: usize,
    pub handed_out: usize,
    pub completed: Vec<Range<usize>>,
    /// Fails after so many chunks.
    pub fail_after: usize,
}

impl<'m> Chunked<'m> {
    pub fn new(memory: Span<'m>, page_bytes: usize, chunk_pages: usize, limit: usize) -> Self {
        let fail_after = usize::MAX;
        Self {
            memory,
            page_bytes,
            chunk_pages,
            limit,
            handed_out: 0,
            completed: Vec::new(),
            fail_after,
        }
    }

    pub fn completed_pages(&self) -> usize {
        self.completed.last().map_or(0, |range| range.end)
    }
}

impl<'m> Sink<'m> for Chunked<'m> {
    fn chunk_pages(&self) -> usize {
        self.chunk_pages
    }

    fn chunks_in_flight(&self) -> usize {
        self.limit
    }

    fn buffer(&mut self, chunk: usize) -> Span<'m> {
        assert_eq!(chunk, self.handed_out, "chunks are asked for in order");
        self.handed_out += 1;
        assert!(self.handed_out - self.completed.len() <= self.limit, "too many in flight");
        let start = chunk * self.chunk_pages * self.page_bytes;
        let len = (self.chunk_pages * self.page_bytes).min(self.memory.len() - start);
        self.memory.part(start, len)
    }

    fn complete(&mut self, requests: Range<usize>) -> Result<()> {
        assert!(!requests.is_empty(), "nothing is not completed");
        assert_eq!(requests.start, self.completed.len() * self.chunk_pages, "in order");
        if self.completed.len() == self.fail_after {
            return Err(fremap_core::error::Error::Argument("the sink is full".into()));
        }
        self.completed.push(requests);
        Ok(())
    }
}
