//! Rows of stores whose pages other processes provide: whole pages are asked for, each once.

use super::wanted::Wanted;
use super::{count, Rows};
use crate::error::Result;
use crate::store::{Pace, Store};
use crate::sys::span::Span;
use crate::units::{FilePage, Pages, Row};

/// Bytes of pages that are asked for together.
const TOGETHER_BYTES: usize = 256 << 20;

/// Where bytes lie in the page that is asked for as the `page`-th, and where they go.
struct Copy {
    page: usize,
    within: usize,
    len: usize,
    to: usize,
}

impl Rows {
    /// Takes rows, some of which lie in stores that have no file.
    pub(super) fn take_provided(
        &self,
        ids: &Pages<Row>,
        into: Span<'_>,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        let piece_rows = self.piece_rows();
        let mut wanted = Vec::new();
        for start in (0..ids.len()).step_by(piece_rows) {
            let rows = start..ids.len().min(start + piece_rows);
            let part = into.part(rows.start * self.row_bytes, rows.len() * self.row_bytes);
            for (position, index) in rows.clone().enumerate() {
                let (shard, offset) = self.locate(ids.at(index).0);
                self.want(&mut wanted, shard, offset, self.row_bytes, position * self.row_bytes);
            }
            let (mut provided, filed): (Vec<Wanted>, Vec<Wanted>) = std::mem::take(&mut wanted)
                .into_iter()
                .partition(|part| self.files.shard(part.shard).provided().is_some());
            wanted = filed;
            self.provide(&mut provided, part, pace)?;
            count(&self.counters.rows_read, rows.len() as u64);
            self.read(&mut wanted, part, pace)?;
            wanted.clear();
        }
        Ok(())
    }

    /// Has parts of stores without a file provided.
    fn provide(&self, wanted: &mut [Wanted], into: Span<'_>, pace: &mut Pace<'_>) -> Result<()> {
        wanted.sort_unstable();
        for parts in wanted.chunk_by(|one, next| one.shard == next.shard) {
            let Some(store) = self.files.shard(parts[0].shard).provided() else { continue };
            let page_bytes = store.page_size().bytes();
            let most = (TOGETHER_BYTES / page_bytes).max(1);
            let (mut pages, mut copies): (Vec<FilePage>, Vec<Copy>) = (Vec::new(), Vec::new());
            for part in parts {
                let mut done = 0;
                while done < part.len as usize {
                    let at = part.offset + done as u64;
                    let wanted_page = FilePage(store.page_size().index_of(at));
                    let within = (at - store.page_size().bytes_of(wanted_page.0)) as usize;
                    let len = (page_bytes - within).min(part.len as usize - done);
                    if pages.last() != Some(&wanted_page) {
                        if pages.len() == most {
                            self.bring(store, &pages, &copies, into, pace)?;
                            pages.clear();
                            copies.clear();
                        }
                        pages.push(wanted_page);
                    }
                    let to = part.place + done;
                    copies.push(Copy { page: pages.len() - 1, within, len, to });
                    done += len;
                }
            }
            self.bring(store, &pages, &copies, into, pace)?;
        }
        Ok(())
    }

    fn bring(
        &self,
        store: &Store,
        pages: &[FilePage],
        copies: &[Copy],
        into: Span<'_>,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        // They rise with the pages.
        let mut take = |position: usize, content: Span<'_>| {
            let first = copies.partition_point(|copy| copy.page < position);
            for copy in copies[first..].iter().take_while(|copy| copy.page == position) {
                into.part(copy.to, copy.len).copy_span(content.part(copy.within, copy.len));
            }
        };
        store
            .provide(pages, &mut take, pace.interrupt())
            .map_err(|error| error.with_operation("take").with_completed(0))?;
        count(&self.counters.reads, 1);
        count(&self.counters.bytes_read, store.page_size().bytes_of(pages.len() as u64));
        pace.check(pages.len())
    }
}
