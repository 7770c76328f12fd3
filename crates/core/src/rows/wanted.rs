//! The bytes that are still to be had: where they lie and where they go.

use super::Rows;
use crate::sys::span::Span;

use super::blocks::MAX_BLOCK_BYTES;

/// Bytes that are read by one request through the page cache.
pub(super) const MAX_RUN_BYTES: usize = 1 << 20;

/// A row, a part of a long one, or rows of a range that follow each other. Sorts by where
/// the bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Wanted {
    pub(super) shard: u32,
    pub(super) len: u32,
    pub(super) offset: u64,
    /// The first byte of the piece's memory that they go to.
    pub(super) place: usize,
}

impl Wanted {
    pub(super) fn memory_in<'m>(&self, into: Span<'m>) -> Span<'m> {
        into.part(self.place, self.len as usize)
    }

    pub(super) fn end(&self) -> u64 {
        self.offset + u64::from(self.len)
    }
}

impl Rows {
    /// Bytes that one request reads at most.
    fn most_bytes(&self) -> usize {
        if self.direct {
            MAX_BLOCK_BYTES
        } else {
            MAX_RUN_BYTES
        }
    }

    /// Adds bytes of a shard to those wanted, in parts that a request each can read. They are
    /// cut where the file's offset is a multiple of the largest request, so that the same bytes
    /// are cut alike each time, and at whole blocks.
    pub(super) fn want(
        &self,
        wanted: &mut Vec<Wanted>,
        shard: u32,
        offset: u64,
        len: usize,
        place: usize,
    ) {
        let most = self.most_bytes();
        if len <= most {
            wanted.push(Wanted { shard, len: len as u32, offset, place });
            return;
        }
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let part = (most - (at % most as u64) as usize).min(len - done);
            wanted.push(Wanted { shard, len: part as u32, offset: at, place: place + done });
            done += part;
        }
    }
}
