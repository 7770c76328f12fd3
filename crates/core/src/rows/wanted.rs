//! The bytes that a take still has to read: where they are, and where they go.

use super::blocks::MAX_BLOCK_BYTES;
use super::Rows;
use crate::error::Result;
use crate::io::{Segment, MAX_REQUEST_BYTES};
use crate::room::push;

impl Rows {
    /// Bytes that one request reads at most.
    fn most_bytes(&self) -> usize {
        if self.direct {
            MAX_BLOCK_BYTES
        } else {
            MAX_REQUEST_BYTES
        }
    }

    /// Adds bytes of a shard to those wanted, in parts that a request each can read. They are
    /// cut where the file's offset is a multiple of the largest request, so that the same bytes
    /// are cut alike each time, and at whole blocks.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::error::Error::Memory).
    pub(super) fn want(
        &self,
        wanted: &mut Vec<Segment>,
        shard: u32,
        offset: u64,
        len: usize,
        place: usize,
    ) -> Result<()> {
        let most = self.most_bytes();
        if len <= most {
            return push("take", wanted, Segment { file: shard, offset, place, len: len as u32 });
        }
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let part = (most - (at % most as u64) as usize).min(len - done);
            let segment =
                Segment { file: shard, offset: at, place: place + done, len: part as u32 };
            push("take", wanted, segment)?;
            done += part;
        }
        Ok(())
    }
}
