//! The parts of a store: each is a file and the pages that it has.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::Arc;

use super::durability::Durability;
use super::last_change::LastChange;
use super::source::{key, page_of, Source};
use crate::io::is_unchanged;
use crate::sys::clock::fine_ns;
use crate::sys::mm::system_page_bytes;
use crate::units::{FilePage, PageIndex, PageSize, Run};

/// A file or a piece of shared memory, open for as long as a store has it.
#[derive(Debug)]
pub(crate) struct File {
    /// The path that it was opened by.
    pub(crate) path: Option<PathBuf>,
    pub(crate) writable: bool,
    /// Through the page cache. What is mapped, written, synced and asked about.
    pub(crate) fd: Arc<OwnedFd>,
    /// The same file past the page cache, for a direct store's reads and writes.
    pub(crate) direct_fd: Option<Arc<OwnedFd>>,
    /// The file system keeps the file in memory: reads never wait for a device.
    pub(crate) memory_backed: bool,
    pub(super) durability: Durability,
    pub(super) own_writes: OwnWrites,
}

/// When a store wrote a file last: it changed the file itself then.
#[derive(Debug)]
pub(crate) struct OwnWrites {
    last_ns: AtomicI64,
}

impl Default for OwnWrites {
    fn default() -> Self {
        Self { last_ns: AtomicI64::new(i64::MIN) }
    }
}

impl OwnWrites {
    /// A write begins, or has ended.
    pub(super) fn note(&self) {
        self.last_ns.fetch_max(fine_ns(), Ordering::AcqRel);
    }

    /// Whether one began or ended since this time of the coarse clock.
    pub(crate) fn any_since(&self, began_ns: i64) -> bool {
        self.last_ns.load(Ordering::Acquire) >= began_ns
    }
}

/// The pages of one file within a store.
#[derive(Debug)]
pub(crate) struct Part {
    /// The store's page that is the first of the file.
    pub(crate) first: FilePage,
    /// What messages call it, where it has a name.
    pub(crate) name: Option<PathBuf>,
    pub(crate) file: Arc<File>,
    /// The store's own map of the file.
    pub(crate) source: Source,
    /// Says whether what was copied from the map is good.
    pub(crate) last_change: LastChange,
}

impl Part {
    pub(crate) fn new(first: FilePage, name: Option<PathBuf>, file: Arc<File>) -> Self {
        Self { first, name, file, source: Source::default(), last_change: LastChange::default() }
    }

    /// What is mapped, written, synced and asked about.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.file.fd.as_fd()
    }

    /// What reads and writes in flight together go through, or what goes past the page cache if
    /// there is that, and what they are aligned to.
    pub(crate) fn file(&self, past_cache: bool) -> (Arc<OwnedFd>, usize) {
        match self.file.direct_fd.as_ref().filter(|_| past_cache) {
            Some(direct) => (Arc::clone(direct), system_page_bytes()),
            None => (Arc::clone(&self.file.fd), 1),
        }
    }

    /// Whether the file is as it was when a read of the bytes before `end` began. A file that the
    /// store itself wrote meanwhile changes all the time, so that only its size tells then.
    pub(crate) fn is_unchanged(&self, end: u64, began_ns: i64) -> bool {
        let own = self.file.own_writes.any_since(began_ns);
        is_unchanged(self.fd(), end, if own { i64::MAX } else { began_ns })
    }

    /// The byte of the file at which a page of the store begins.
    pub(crate) fn offset_of(&self, page: FilePage, page_size: PageSize) -> u64 {
        page_size.bytes_of(page.0 - self.first.0)
    }
}

/// Parts in the order of their pages.
#[derive(Debug)]
pub(crate) struct Parts(Box<[Part]>);

impl Parts {
    /// At least one part, the first of which begins with page 0.
    pub(crate) fn new(parts: Vec<Part>) -> Self {
        assert!(!parts.is_empty(), "a store has a file");
        Self(parts.into_boxed_slice())
    }

    pub(crate) fn all(&self) -> &[Part] {
        &self.0
    }

    pub(crate) fn last(&self) -> &Part {
        &self.0[self.0.len() - 1]
    }

    /// The number of the part that has a page; the last one has those beyond the end.
    pub(crate) fn index_of(&self, page: FilePage) -> usize {
        // Of parts without pages that begin with it, too, the last is the one that has it.
        if self.0.len() == 1 {
            0
        } else {
            self.0.partition_point(|part| part.first <= page) - 1
        }
    }

    pub(crate) fn of(&self, page: FilePage) -> &Part {
        &self.0[self.index_of(page)]
    }

    /// The first page behind a part; the last part has no end.
    pub(crate) fn end(&self, index: usize) -> FilePage {
        self.0.get(index + 1).map_or(FilePage(u64::MAX), |next| next.first)
    }

    /// The keys of a part's pages at the front of sorted `keys`, made to name the pages
    /// of its file, and the rest.
    pub(crate) fn split_keys<'k>(
        &self,
        index: usize,
        keys: &'k mut [u64],
    ) -> (&'k mut [u64], &'k mut [u64]) {
        let (first, end) = (self.0[index].first, self.end(index));
        let count = keys.partition_point(|&key| page_of(key) < end.0);
        let (own, rest) = keys.split_at_mut(count);
        if first.0 > 0 {
            for own in own.iter_mut() {
                *own -= key(first.0, 0);
            }
        }
        (own, rest)
    }

    /// A run of pages, cut where one file ends and the next begins.
    pub(crate) fn cut(&self, mut run: Run<FilePage>) -> impl Iterator<Item = Run<FilePage>> + '_ {
        std::iter::from_fn(move || {
            let left = self.end(self.index_of(run.first)).0 - run.first.0;
            let piece = Run { first: run.first, count: run.count.min(left) };
            run = Run { first: run.first.offset(piece.count), count: run.count - piece.count };
            (piece.count > 0).then_some(piece)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::error::Uninterruptible;
    use crate::store::Store;
    use crate::sys::clock::coarse_ns;
    use crate::sys::file as sys_file;
    use crate::sys::span::Span;
    use crate::units::Pages;

    /// Parts that begin with these pages.
    fn parts(firsts: &[u64]) -> Parts {
        let part = |&first: &u64| {
            let fd = Arc::new(sys_file::memory_file("parts").expect("a memfd"));
            let durability = Durability::default();
            let file = File {
                path: None,
                writable: true,
                fd,
                direct_fd: None,
                memory_backed: true,
                durability,
                own_writes: OwnWrites::default(),
            };
            Part::new(FilePage(first), None, Arc::new(file))
        };
        Parts::new(firsts.iter().map(part).collect())
    }

    #[test]
    fn a_page_is_in_the_last_part_that_begins_with_it_or_before() {
        let parts = parts(&[0, 3, 3, 3, 7]);
        let found = [0, 2, 3, 6, 7, 1000].map(|page| parts.index_of(FilePage(page)));
        assert_eq!(found, [0, 0, 3, 3, 4, 4]);
        assert_eq!(parts.of(FilePage(5)).offset_of(FilePage(5), page_size()), 2 * 4096);
        assert_eq!(parts.end(0), FilePage(3));
        assert_eq!(parts.end(4), FilePage(u64::MAX));
    }

    #[test]
    fn a_run_is_cut_at_each_end_of_a_file() {
        let parts = parts(&[0, 3, 3, 7]);
        let cut = |first, count| -> Vec<(u64, u64)> {
            let pieces = parts.cut(Run { first: FilePage(first), count });
            pieces.map(|piece| (piece.first.0, piece.count)).collect()
        };
        assert_eq!(cut(0, 3), [(0, 3)]);
        assert_eq!(cut(1, 9), [(1, 2), (3, 4), (7, 3)]);
        assert_eq!(cut(7, 1), [(7, 1)]);
    }

    #[test]
    fn keys_of_a_part_name_the_pages_of_its_file() {
        let parts = parts(&[0, 3, 7]);
        let mut keys = [key(2, 5), key(3, 1), key(6, 0), key(7, 2)];
        let (none, rest) = parts.split_keys(0, &mut keys);
        assert_eq!(none, [key(2, 5)]);
        let (own, rest) = parts.split_keys(1, rest);
        assert_eq!(own, [key(0, 1), key(3, 0)]);
        let (own, rest) = parts.split_keys(2, rest);
        assert_eq!((own.len(), rest.len()), (1, 0));
        assert_eq!(own, [key(0, 2)]);
    }

    /// What was read at the time of a change that was not the store's own is not trusted, though
    /// the store may write; what it wrote itself is no reason to read again.
    #[test]
    fn who_changed_the_file_is_known() {
        let store = Store::memory(4 * 4096, Some(4096)).expect("a memfd");
        let part = &store.parts.all()[0];
        let other = std::fs::File::from(part.fd().try_clone_to_owned().expect("a descriptor"));
        let run = Run { first: FilePage(1), count: 2 };
        let mut content = vec![0; 2 * 4096];
        let mut read = || store.read_run_unchanged(run, Span::of(&mut content));
        // Until the coarse clock stands still from the change to the read.
        loop {
            let began_ns = coarse_ns();
            other.write_all_at(b"foreign", 4096).expect("room");
            let (element, scattered) = (read(), part.is_unchanged(4096, began_ns));
            if coarse_ns() == began_ns {
                assert!(!element && !scattered);
                break;
            }
        }
        for _ in 0..100 {
            let began_ns = coarse_ns();
            let mut data = vec![7; 4096];
            let page = Pages::List(vec![FilePage(1)]);
            store.write(&page, Span::of(&mut data), &Uninterruptible).expect("room");
            assert!(read() && part.is_unchanged(4096, began_ns));
        }
        assert!(!part.is_unchanged(5 * 4096, coarse_ns()), "cut");
    }

    fn page_size() -> PageSize {
        PageSize::new(4096, 4096).expect("a page")
    }
}
