//! Counters of what a store has read and written; relaxed, so that they cost nothing.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a store has read and written since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreCounters {
    /// Bytes copied from the page cache through the map of the file.
    pub bytes_copied: u64,
    /// Bytes read by system calls.
    pub bytes_read: u64,
    /// Read requests made of the kernel.
    pub reads: u64,
    /// Bytes written by system calls.
    pub bytes_written: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    bytes_copied: AtomicU64,
    bytes_read: AtomicU64,
    reads: AtomicU64,
    bytes_written: AtomicU64,
}

impl Counters {
    pub(crate) fn add_copied(&self, bytes: usize) {
        self.bytes_copied.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn add_read(&self, bytes: usize) {
        self.bytes_read.fetch_add(bytes as u64, Ordering::Relaxed);
        self.reads.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_written(&self, bytes: usize) {
        self.bytes_written.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> StoreCounters {
        StoreCounters {
            bytes_copied: self.bytes_copied.load(Ordering::Relaxed),
            bytes_read: self.bytes_read.load(Ordering::Relaxed),
            reads: self.reads.load(Ordering::Relaxed),
            bytes_written: self.bytes_written.load(Ordering::Relaxed),
        }
    }
}
