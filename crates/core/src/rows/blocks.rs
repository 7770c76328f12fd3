//! Memory for blocks that are read past the page cache, from which rows are copied.

use rustix::io::Errno;

use crate::sys::fork_lock::ForkLock;
use crate::sys::mm::{Access, Advice, Region};
use crate::sys::ring::DEPTH;
use crate::sys::span::Span;

/// Bytes that one direct read is asked for at most: from here on a device gains nothing by
/// longer ones.
pub(super) const MAX_BLOCK_BYTES: usize = 256 << 10;
/// The coarsest alignment that there is room for.
pub(super) const MAX_ALIGN: u32 = 64 << 10;
/// What alignment is as a rule at most.
const COMMON_ALIGN: usize = 4096;
/// Bytes between two requests' blocks: what is asked for, and what lies before and behind it.
const STRIDE: usize = MAX_BLOCK_BYTES + 2 * MAX_ALIGN as usize;
/// What the memory that waits for the next take comes to at most.
const MAX_IDLE_BYTES: usize = 32 << 20;

/// A block for each request that may be in flight, and one more. Only what was once read into
/// takes memory.
#[derive(Debug)]
pub(super) struct Blocks {
    region: Region,
    /// Bytes of the longest request that it was for.
    longest_bytes: usize,
    /// The process that made it: a child of fork shares its pages until they are written.
    owner: u32,
}

impl Blocks {
    fn new() -> Result<Self, Errno> {
        let region = Region::anonymous(STRIDE * (DEPTH + 1), 1 << 16, Access::Write)?;
        // A huge page would hold a few blocks of which a take touches the front.
        let _kept = region.advise(0, region.len(), Advice::NoHugePage);
        Ok(Self { region, longest_bytes: 0, owner: crate::sys::process::id() })
    }

    /// One of the blocks for requests in flight.
    pub(super) fn of(&self, number: u32) -> Span<'_> {
        self.region.span(number as usize * STRIDE, STRIDE)
    }

    /// The one that no request has.
    pub(super) fn spare(&self) -> Span<'_> {
        self.of(DEPTH as u32)
    }

    /// What it may take of memory.
    fn bytes(&self) -> usize {
        (self.longest_bytes + 2 * COMMON_ALIGN) * DEPTH
    }
}

/// Blocks that wait for the next take that reads past the page cache.
#[derive(Debug, Default)]
pub(super) struct BlockPool {
    idle: ForkLock<Vec<Blocks>>,
}

impl BlockPool {
    pub(super) const fn new() -> Self {
        Self { idle: ForkLock::new(Vec::new()) }
    }

    /// Blocks for requests of so many bytes each.
    pub(super) fn take(&self, request_bytes: usize) -> Result<Blocks, Errno> {
        let idle = self.idle.lock().pop();
        let owner = crate::sys::process::id();
        let mut blocks = match idle.filter(|blocks| blocks.owner == owner) {
            Some(blocks) => blocks,
            None => Blocks::new()?,
        };
        blocks.longest_bytes = blocks.longest_bytes.max(request_bytes);
        Ok(blocks)
    }

    pub(super) fn give_back(&self, blocks: Blocks) {
        let mut idle = self.idle.lock();
        if idle.iter().map(Blocks::bytes).sum::<usize>() + blocks.bytes() <= MAX_IDLE_BYTES {
            idle.push(blocks);
            return;
        }
        drop(idle);
        drop(blocks);
    }
}
