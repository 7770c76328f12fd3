//! How much of the files may be mapped, and what is unmapped when that is full.

use std::sync::atomic::{AtomicU64, Ordering};

use super::files::Files;
use crate::memory::Reservation;
use crate::store::source::{SourceMap, CHUNK_BYTES};
use crate::sys::fork_lock::ForkLock;
use crate::sys::mm::system_page_bytes;

/// Rows read by system calls for each chunk that takes the place of another: mapping
/// one costs as much as 50 to 200 reads lose, and when rows are wanted evenly from more
/// than the budget holds, nothing is gained by it.
const READS_A_REPLACEMENT: u64 = 1024;
/// Chunks that are looked at to find one that was not used.
const LOOKS: usize = 512;

#[derive(Debug)]
pub(super) struct MapBudget {
    limit: Option<Reservation>,
    /// Chunks that are mapped; each with its page table.
    chunks: AtomicU64,
    reads_since: AtomicU64,
    hand: ForkLock<Hand>,
    /// Unmappings that were begun, and that have ended: who copied meanwhile may have mapped
    /// pages again that nobody counts.
    begun: AtomicU64,
    ended: AtomicU64,
}

/// The chunk that is looked at next.
#[derive(Debug, Default)]
struct Hand {
    file: usize,
    chunk: usize,
}

impl MapBudget {
    pub(super) fn new(limit: Option<Reservation>) -> Self {
        Self {
            limit,
            chunks: AtomicU64::new(0),
            reads_since: AtomicU64::new(0),
            hand: ForkLock::default(),
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
        }
    }

    /// Unmappings that were begun so far.
    pub(super) fn begun(&self) -> u64 {
        self.begun.load(Ordering::SeqCst)
    }

    /// Unmappings that have ended so far.
    pub(super) fn ended(&self) -> u64 {
        self.ended.load(Ordering::SeqCst)
    }

    /// Unmaps a chunk; says whether it was one that counts.
    pub(super) fn unmap(&self, map: &SourceMap, chunk: usize) -> bool {
        self.begun.fetch_add(1, Ordering::SeqCst);
        let counted = map.unmap_chunk(chunk);
        if counted {
            self.give_back();
        }
        self.ended.fetch_add(1, Ordering::SeqCst);
        counted
    }

    pub(super) fn limit_bytes(&self) -> Option<u64> {
        self.limit.as_ref().map(Reservation::bytes)
    }

    pub(super) fn note_reads(&self, rows: u64) {
        self.reads_since.fetch_add(rows, Ordering::Relaxed);
    }

    /// Counts one more chunk, if that is within the limit once another was unmapped, or none.
    pub(super) fn claim(&self, files: &Files) -> bool {
        let Some(limit) = self.limit_bytes() else {
            self.chunks.fetch_add(1, Ordering::Relaxed);
            return true;
        };
        let most = || {
            // The page tables that there are, some of which the kernel may keep, and one more.
            let tables = files.mapped().table_bytes() + system_page_bytes() as u64;
            limit.saturating_sub(tables) / CHUNK_BYTES as u64
        };
        let take = || {
            let most = most();
            let within = |chunks: u64| (chunks < most).then_some(chunks + 1);
            self.chunks.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within)
        };
        // Its share of the memory has shrunk.
        while self.chunks.load(Ordering::Relaxed) > most() && self.unmap_one(files) {}
        if take().is_ok() {
            return true;
        }
        if self.reads_since.load(Ordering::Relaxed) < READS_A_REPLACEMENT || !self.unmap_one(files)
        {
            return false;
        }
        self.reads_since.store(0, Ordering::Relaxed);
        take().is_ok()
    }

    /// A chunk that was claimed is not mapped, or not any more.
    pub(super) fn give_back(&self) {
        self.chunks.fetch_sub(1, Ordering::Relaxed);
    }

    /// Unmaps a chunk that was not used since the hand came by the last time.
    fn unmap_one(&self, files: &Files) -> bool {
        // Who finds the hand taken goes without.
        let Some(mut hand) = self.hand.try_lock() else { return false };
        for _ in 0..LOOKS {
            let file = hand.file % files.len();
            let Some(map) = files.map_if_made(file).filter(|map| hand.chunk < map.chunk_count())
            else {
                *hand = Hand { file: file + 1, chunk: 0 };
                continue;
            };
            let chunk = hand.chunk;
            hand.chunk += 1;
            if map.is_populated(chunk) && !map.take_use(chunk) && self.unmap(&map, chunk) {
                return true;
            }
        }
        false
    }
}
