//! The files under a store: each is a part of the run of pages.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use super::source::{key, page_of, Source};
use crate::units::{FilePage, PageIndex, PageSize, Run};

/// A file or a piece of shared memory, open for as long as a store has it.
#[derive(Debug)]
pub(crate) struct File {
    /// The path that it was opened by.
    pub(crate) path: Option<PathBuf>,
    pub(crate) writable: bool,
    /// Through the page cache. What is mapped, written, synced and asked about.
    pub(crate) fd: OwnedFd,
    /// The same file past the page cache, for a direct store's reads and writes.
    pub(crate) direct_fd: Option<OwnedFd>,
    /// The file system keeps the file in memory: reads never wait for a device.
    pub(crate) memory_backed: bool,
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
}

impl Part {
    pub(crate) fn new(first: FilePage, name: Option<PathBuf>, file: Arc<File>) -> Self {
        Self { first, name, file, source: Source::default() }
    }

    /// What is mapped, written, synced and asked about.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.file.fd.as_fd()
    }

    /// What reads go through.
    pub(crate) fn read_fd(&self) -> BorrowedFd<'_> {
        self.file.direct_fd.as_ref().map_or_else(|| self.fd(), |fd| fd.as_fd())
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
